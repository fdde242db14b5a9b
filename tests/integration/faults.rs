//! Faults of the database, injected into a real one while pods are admitted: every answer is right or as
//! the policy says for a failed lookup, none is wrong, none hangs, and the first one afterwards is right.
//!
//! `scripts/faults` prints what each test counted: the table in docs/reliability.md.

use std::collections::BTreeMap;
use std::time::Duration;

use test_support::PROXY;
use test_support::load::{Asker, PATIENT, schema};
use test_support::postgres::{Cluster, Postgres};
use test_support::program::{Start, Webhook};
use test_support::relay::Relay;

/// Who ask at the same time: no more than lookups that may wait while the database is in doubt.
const CLIENTS: usize = 16;

const QUERY: &str = "SELECT llm_billing_mode FROM workspaces WHERE id = $1";

/// A running program, and who asks it.
struct Program {
    webhook: Webhook,
    asker: Asker,
}

impl Program {
    fn for_each_on_error(database_url: &str) -> [Self; 2] {
        Self::for_each_on_error_with("2s", QUERY, database_url)
    }

    fn for_each_on_error_with(timeout: &str, query: &str, database_url: &str) -> [Self; 2] {
        ["platform_managed", "deny"].map(|on_error| {
            let policy = &format!(
                "lookup: {{onError: {on_error}, timeout: {timeout}, query: '{query}'}}\n{PROXY}"
            );
            let start = Start {
                policy,
                database_url,
                ..Start::default()
            };
            let webhook = start.start();
            let asker = webhook.asker(on_error);
            Self { webhook, asker }
        })
    }

    /// Asks during a fault that lets no lookup succeed. The log has the words, and nothing but `kind` is counted, or that
    /// time was too short.
    fn fail_during(&self, name: &str, kind: &str, words: &str, fault: impl FnOnce()) {
        let before = self.lookups();
        let tally = self.asker.ask_during(name, CLIENTS, fault);
        assert_eq!(tally.right, 0, "{name}: {tally:?}");
        self.webhook.wait_for_log(words);
        let mut failed = self.lookups_since(&before);
        assert!(failed.remove(kind).is_some(), "{name}: {failed:?}");
        failed.remove("timeout");
        assert_eq!(failed, BTreeMap::new(), "{name}");
    }

    /// How many lookups ended in each way.
    fn lookups(&self) -> BTreeMap<String, usize> {
        let metrics = self.webhook.health("/metrics").1;
        let count = |line: &str| {
            let line = line.strip_prefix("llm_billing_lookup_duration_seconds_count{result=\"")?;
            let (kind, count) = line.split_once("\"} ")?;
            Some((kind.to_owned(), count.parse().unwrap()))
        };
        metrics.lines().filter_map(count).collect()
    }

    /// The same, without those before.
    fn lookups_since(&self, before: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
        let mut lookups = self.lookups();
        for (kind, count) in before {
            *lookups.get_mut(kind).unwrap() -= count;
        }
        lookups.retain(|_, count| *count > 0);
        lookups
    }
}

/// Longer than a lookup's deadline.
fn a_moment() {
    std::thread::sleep(Duration::from_secs(3));
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
        program.asker.is_right();
        for (name, fault) in faults {
            program.asker.ask_during(name, CLIENTS, fault);
            program.asker.is_right();
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
        program.asker.is_right();
    }
    cluster.pg_ctl(&["stop", "--mode=immediate"]);
    for program in &programs {
        program.fail_during(
            "stopped: connections are refused",
            "unavailable",
            "Connection refused",
            a_moment,
        );
    }
    cluster.pg_ctl(&["start"]);
    for program in &programs {
        program.asker.is_right();
    }
}

#[test]
fn a_network_that_swallows_everything_holds_up_no_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let relay = Relay::to(cluster.port());
    let url = postgres.url_by(relay.port);
    let programs = Program::for_each_on_error(&url);
    for program in &programs {
        program.asker.is_right();
    }
    for program in &programs {
        relay.swallow(true);
        program.fail_during(
            "a black hole: accepts, and says nothing",
            "timeout",
            "did not answer in time",
            a_moment,
        );
        relay.swallow(false);
        program.asker.is_right();
    }
}

#[test]
fn while_lookups_hang_or_find_no_database_only_a_few_wait_and_the_others_are_answered_at_once() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    // Longer than two deadlines. The server ends what nobody waits for any more: else there would be 16 backends more
    // with each deadline.
    let lock = "BEGIN; LOCK TABLE workspaces; SELECT pg_sleep(4.5);
        DO $$ BEGIN
            ASSERT (SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader') <= 2 * 16;
        END $$;
        COMMIT";
    let faults: [(&str, &str, &dyn Fn()); 2] = [
        ("the table is locked: lookups hang", "timeout", &|| {
            postgres.execute(lock)
        }),
        ("stopped, and asked by many", "unavailable", &|| {
            cluster.pg_ctl(&["stop", "--mode=immediate"]);
            std::thread::sleep(Duration::from_millis(4500));
            cluster.pg_ctl(&["start"]);
        }),
    ];
    for program in Program::for_each_on_error(&postgres.url_by(cluster.port())) {
        for (name, kind, fault) in faults {
            program.asker.is_right();
            let before = program.lookups();
            program.asker.ask_during(name, 64, fault);
            program.asker.is_right();
            let lookups = program.lookups_since(&before);
            let count = |kind: &str| lookups.get(kind).copied().unwrap_or_default();
            // All 64 wait in the first two seconds, 16 at a time from then on. Those that wait for one of 16 places
            // know nothing but the time.
            let failed = count("timeout") + count("unavailable");
            assert!((64..=64 + 3 * 16).contains(&failed), "{name}: {failed}");
            assert!(count(kind) >= 16, "{name}: {lookups:?}");
            assert!(count("crowded") > 64, "{name}: {lookups:?}");
        }
    }
}

#[test]
fn a_slow_query_ends_at_the_deadline() {
    let postgres = Postgres::with(&schema());
    let slow = "SELECT CASE WHEN pg_sleep(20) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1";
    for program in Program::for_each_on_error_with("2s", slow, &postgres.url()) {
        program.fail_during(
            "a slow query",
            "timeout",
            "did not answer in time",
            a_moment,
        );
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
        program.fail_during(
            "no connection is free",
            "unavailable",
            "too many connections for role",
            a_moment,
        );
        postgres.execute("ALTER ROLE reader CONNECTION LIMIT -1");
        program.asker.is_right();
    }
}

#[test]
fn a_standby_that_is_in_recovery_is_read_like_any_other() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_by(cluster.port());
    cluster.become_standby();
    for program in Program::for_each_on_error_with(PATIENT, QUERY, &url) {
        let tally = program
            .asker
            .ask_during("a standby, in recovery", CLIENTS, a_moment);
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
            program.asker.is_right();
            postgres.execute(fault);
            program.fail_during(name, "refused", words, a_moment);
            let line = program.webhook.wait_for_log(words);
            assert!(line.contains("\"ERROR\""), "{line}");
            postgres.execute(remedy);
            program.asker.is_right();
        }
    }
}
