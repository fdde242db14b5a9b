//! Faults of the database, injected into a real one while pods are admitted: every answer is right or as
//! the policy says for a failed lookup, none is wrong, none hangs, and the first one afterwards is right.
//!
//! `scripts/faults` prints what each test counted: the table in docs/reliability.md.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::postgres::{Cluster, Postgres};
use crate::support::program::{Start, Webhook};
use crate::support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";
/// What the API server says that it waits at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// Ends the clients of a test that fails.
const LONGEST_FAULT: Duration = Duration::from_secs(60);

fn schema() -> String {
    format!(
        "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);
         INSERT INTO workspaces VALUES ('{ID}', 'byok')"
    )
}

/// How admissions of a byok workspace's pod ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Admitted as byok.
    right: usize,
    /// As the policy says for a failed lookup: refused with its code, or platform_managed with a warning.
    as_the_policy_says: usize,
    /// Anything else.
    wrong: Vec<String>,
    /// Answered after the API server has given up.
    hung: usize,
}

/// A running program, and what its policy says about a failed lookup.
struct Program {
    webhook: Webhook,
    on_error: &'static str,
}

impl Program {
    fn for_each_on_error(database_url: &str) -> [Self; 2] {
        ["platform_managed", "deny"].map(|on_error| {
            let policy = &format!("lookup: {{onError: {on_error}, timeout: 2s}}\n{PROXY}");
            let start = Start {
                policy,
                database_url,
                ..Start::default()
            };
            Self {
                webhook: start.start(),
                on_error,
            }
        })
    }

    /// Asks once.
    fn ask(&self, tally: &mut Tally) {
        let started = Instant::now();
        let review = create(&pod(ID, &json!([]))).to_string();
        let path = format!("/mutate?timeout={}s", PATIENCE.as_secs());
        let mut response = self
            .webhook
            .post(&path, "application/json", review.as_bytes());
        let answer: Value =
            serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
        if started.elapsed() >= PATIENCE {
            tally.hung += 1;
        }
        let response = &answer["response"];
        let of = |name: &str| response["auditAnnotations"][name].as_str().unwrap();
        match (
            self.on_error,
            response["allowed"] == true,
            of("mode"),
            of("reason"),
        ) {
            (_, true, "byok", "override") => tally.right += 1,
            ("platform_managed", true, "platform_managed", "lookup_error")
                if response["warnings"][0].is_string() =>
            {
                tally.as_the_policy_says += 1
            }
            ("deny", false, _, "lookup_error") if response["status"]["code"] == 503 => {
                tally.as_the_policy_says += 1
            }
            _ => tally.wrong.push(answer.to_string()),
        }
    }

    /// Asks from several clients without a break while the fault goes on, each at least once.
    fn ask_during(&self, name: &str, clients: usize, fault: impl FnOnce()) -> Tally {
        let started = Instant::now();
        let over = AtomicBool::new(false);
        let client = || {
            let mut tally = Tally::default();
            self.ask(&mut tally);
            while !over.load(Ordering::Relaxed) && started.elapsed() < LONGEST_FAULT {
                self.ask(&mut tally);
            }
            tally
        };
        let mut all = Tally::default();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
            fault();
            over.store(true, Ordering::Relaxed);
            for client in clients {
                let one = client.join().unwrap();
                all.right += one.right;
                all.as_the_policy_says += one.as_the_policy_says;
                all.wrong.extend(one.wrong);
                all.hung += one.hung;
            }
        });
        let (right, said, wrong, hung) =
            (all.right, all.as_the_policy_says, all.wrong.len(), all.hung);
        let tried = right + said + wrong;
        let on_error = self.on_error;
        println!("| {name} | `{on_error}` | {tried} | {right} | {said} | {wrong} | {hung} |");
        assert!(all.wrong.is_empty() && all.hung == 0, "{name}: {all:?}");
        all
    }

    /// The same with a fault that lets no lookup succeed.
    fn fail_during(&self, name: &str, clients: usize, fault: impl FnOnce()) {
        let tally = self.ask_during(name, clients, fault);
        assert_eq!(tally.right, 0, "{name}: {tally:?}");
    }

    /// The very next lookup succeeds.
    fn is_right(&self) {
        let mut tally = Tally::default();
        self.ask(&mut tally);
        let right = Tally {
            right: 1,
            ..Tally::default()
        };
        assert_eq!(tally, right);
    }
}

fn a_moment() {
    std::thread::sleep(Duration::from_secs(1));
}

#[test]
fn a_restart_or_a_killed_backend_costs_no_wrong_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_by(cluster.port());
    let faults: [(&str, &dyn Fn()); 4] = [
        ("restart, fast", &|| {
            cluster.pg_ctl(&["restart", "--mode=fast"])
        }),
        ("restart, immediate", &|| {
            cluster.pg_ctl(&["restart", "--mode=immediate"])
        }),
        ("backends terminated", &|| {
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'",
            )
        }),
        ("a backend killed with signal 9", &|| {
            cluster.kill_a_backend("reader")
        }),
    ];
    for program in Program::for_each_on_error(&url) {
        program.is_right();
        for (name, fault) in faults {
            program.ask_during(name, 4, fault);
            program.is_right();
        }
    }
}

#[test]
fn while_the_database_is_down_every_answer_is_as_the_policy_says() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_by(cluster.port());
    let programs = Program::for_each_on_error(&url);
    for program in &programs {
        program.is_right();
    }
    cluster.pg_ctl(&["stop", "--mode=immediate"]);
    for program in &programs {
        program.fail_during("stopped: connections are refused", 4, a_moment);
    }
    cluster.pg_ctl(&["start"]);
    for program in &programs {
        program.is_right();
    }
}

#[test]
fn a_network_that_swallows_everything_holds_up_no_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let relay = Relay::to(cluster.port());
    let url = postgres.url_by(relay.port);
    for program in Program::for_each_on_error(&url) {
        program.is_right();
        relay.silent.store(true, Ordering::Relaxed);
        program.fail_during("a black hole: accepts, and says nothing", 4, a_moment);
        relay.silent.store(false, Ordering::Relaxed);
        program.is_right();
    }
}

#[test]
fn while_lookups_hang_only_a_few_wait_and_the_others_are_answered_at_once() {
    let postgres = Postgres::on(&Cluster::start(), &schema());
    for program in Program::for_each_on_error(&postgres.url()) {
        program.is_right();
        // Longer than two deadlines. The server ends what nobody waits for any more: else there would be
        // 16 backends more with each deadline.
        let lock = "BEGIN; LOCK TABLE workspaces; SELECT pg_sleep(4.5);
            DO $$ BEGIN
                ASSERT (SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader') <= 2 * 16;
            END $$;
            COMMIT";
        program.ask_during("the table is locked: lookups hang", 64, || {
            postgres.execute(lock)
        });
        program.is_right();
        let metrics = program.webhook.health("/metrics").1;
        let count = |result: &str| -> usize {
            let name = format!("llm_billing_lookup_duration_seconds_count{{result=\"{result}\"}} ");
            let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
            line.unwrap().parse().unwrap()
        };
        // All 64 wait in the first two seconds, 16 at a time from then on.
        let (timeout, crowded) = (count("timeout"), count("crowded"));
        assert!((64..=64 + 3 * 16).contains(&timeout), "{timeout}");
        assert!(crowded > 64, "{crowded}");
    }
}

#[test]
fn a_slow_query_ends_at_the_deadline() {
    let postgres = Postgres::with(&schema());
    for on_error in ["platform_managed", "deny"] {
        let slow = "'SELECT CASE WHEN pg_sleep(20) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1'";
        let policy =
            &format!("lookup: {{onError: {on_error}, timeout: 2s, query: {slow}}}\n{PROXY}");
        let database_url = &postgres.url();
        let start = Start {
            policy,
            database_url,
            ..Start::default()
        };
        let program = Program {
            webhook: start.start(),
            on_error,
        };
        program.fail_during("a slow query", 4, a_moment);
    }
}

#[test]
fn a_database_without_a_free_connection_is_a_failed_lookup_and_then_none() {
    let postgres = Postgres::on(&Cluster::start(), &schema());
    for program in Program::for_each_on_error(&postgres.url()) {
        postgres.execute(
            "ALTER ROLE reader CONNECTION LIMIT 0;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'",
        );
        program.fail_during("no connection is free", 4, a_moment);
        postgres.execute("ALTER ROLE reader CONNECTION LIMIT -1");
        program.is_right();
    }
}

#[test]
fn a_standby_that_is_in_recovery_is_read_like_any_other() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_by(cluster.port());
    cluster.become_standby();
    for program in Program::for_each_on_error(&url) {
        let tally = program.ask_during("a standby, in recovery", 4, a_moment);
        assert_eq!(tally.as_the_policy_says, 0);
    }
}

#[test]
fn a_schema_that_is_gone_is_loud_and_once_it_is_back_the_next_answer_is_right() {
    let table = [
        (
            "SELECT is revoked",
            "REVOKE SELECT ON workspaces FROM reader",
            "permission denied for table workspaces",
            "GRANT SELECT ON workspaces TO reader",
        ),
        (
            "the column is gone",
            "ALTER TABLE workspaces RENAME llm_billing_mode TO gone",
            "column \\\"llm_billing_mode\\\" does not exist",
            "ALTER TABLE workspaces RENAME gone TO llm_billing_mode",
        ),
        (
            "the table is gone",
            "ALTER TABLE workspaces RENAME TO gone",
            "relation \\\"workspaces\\\" does not exist",
            "ALTER TABLE gone RENAME TO workspaces",
        ),
    ];
    let postgres = Postgres::with(&schema());
    for program in Program::for_each_on_error(&postgres.url()) {
        for (name, fault, words, remedy) in table {
            program.is_right();
            postgres.execute(fault);
            program.fail_during(name, 4, || ());
            let line = program.webhook.wait_for_log(words);
            assert!(line.contains("\"ERROR\""), "{line}");
            let metrics = program.webhook.health("/metrics").1;
            assert!(
                metrics.contains(r#"lookup_duration_seconds_count{result="refused"}"#),
                "{metrics}"
            );
            postgres.execute(remedy);
            program.is_right();
        }
    }
}

/// A TCP port of loopback that leads to the database, and can be made to swallow everything.
struct Relay {
    port: u16,
    silent: Arc<AtomicBool>,
}

impl Relay {
    fn to(database: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let silent = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&silent);
        // Threads end with their connections, the first one with the process.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(("127.0.0.1", database)).unwrap();
                let (from_client, to_client) = (client.try_clone().unwrap(), client);
                let (from_server, to_server) = (server.try_clone().unwrap(), server);
                let silent = Arc::clone(&shared);
                std::thread::spawn(move || {
                    pass(from_client, &to_server, &silent);
                    let _ = to_server.shutdown(Shutdown::Both);
                });
                let silent = Arc::clone(&shared);
                std::thread::spawn(move || {
                    pass(from_server, &to_client, &silent);
                    let _ = to_client.shutdown(Shutdown::Both);
                });
            }
        });
        Self { port, silent }
    }
}

/// Passes on what comes, until either side closes. What comes in silence is lost, and so is its connection.
fn pass(mut from: impl Read, mut to: impl Write, silent: &AtomicBool) {
    let mut buffer = [0; 4096];
    let mut broken = false;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        broken |= silent.load(Ordering::Relaxed);
        if !broken && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
