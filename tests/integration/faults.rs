//! Faults injected into a real database while pods are admitted. Every answer is correct or what `lookup.onError` says,
//! none times out, and the first answer afterwards is correct.
//!
//! `scripts/faults` prints the counts of each test: the table in docs/reliability.md.

use std::collections::BTreeMap;

use test_support::PROXY;
use test_support::load::{LONG_LOOKUP_TIMEOUT, LoadClient, schema};
use test_support::postgres::{Cluster, Postgres};
use test_support::program::{Start, Webhook, wait_for};
use test_support::relay::Relay;

/// Concurrent clients: as many as lookups that may wait during an outage.
const CLIENT_COUNT: usize = 16;

const QUERY: &str = "SELECT llm_billing_mode FROM workspaces WHERE id = $1";

/// Causes a fault, calls what waits during the fault, and ends the fault.
type Fault<'a> = &'a dyn Fn(&dyn Fn());

/// A running webhook and a client of it.
struct Program {
    webhook: Webhook,
    client: LoadClient,
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
            // A connection that the check at the start still opens would outlast a fault that closes all others.
            webhook.wait_until_ready();
            let client = webhook.load_client(on_error);
            Self { webhook, client }
        })
    }

    /// Sends admissions while a fault fails every lookup, until more lookups have failed than clients wait. Asserts that
    /// the log has `error`, and that only lookups of result `kind` or `timeout` are counted.
    fn assert_lookups_fail(&self, name: &str, kind: &str, error: &str) {
        let before = self.lookups();
        let tally = self.client.run_during(name, CLIENT_COUNT, || {
            self.wait_for_lookups(&before, CLIENT_COUNT + 1);
        });
        assert_eq!(tally.correct, 0, "{name}: {tally:?}");
        self.webhook.wait_for_log(error);
        let mut failed = self.lookups_since(&before);
        assert!(failed.remove(kind).is_some(), "{name}: {failed:?}");
        failed.remove("timeout");
        assert_eq!(failed, BTreeMap::new(), "{name}");
    }

    /// Returns the number of lookups by result.
    fn lookups(&self) -> BTreeMap<String, usize> {
        let metrics = self.webhook.health("/metrics").1;
        let count = |line: &str| {
            let line = line.strip_prefix("llm_billing_lookup_duration_seconds_count{result=\"")?;
            let (kind, count) = line.split_once("\"} ")?;
            Some((kind.to_owned(), count.parse().unwrap()))
        };
        metrics.lines().filter_map(count).collect()
    }

    /// Waits until so many lookups have ended since `before`.
    fn wait_for_lookups(&self, before: &BTreeMap<String, usize>, count: usize) {
        wait_for("lookups end", || {
            (self.lookups_since(before).values().sum::<usize>() >= count).then_some(())
        });
    }

    /// Returns the number of lookups by result since `before`.
    fn lookups_since(&self, before: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
        let mut lookups = self.lookups();
        for (kind, count) in before {
            *lookups.get_mut(kind).unwrap() -= count;
        }
        lookups.retain(|_, count| *count > 0);
        lookups
    }
}

#[test]
fn restart_or_killed_backend_causes_no_wrong_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_via(cluster.port());
    let faults: [(&str, &dyn Fn()); 4] = [
        ("restart, fast", &|| cluster.pg_ctl(&["restart", "--mode=fast"])),
        ("restart, immediate", &|| cluster.pg_ctl(&["restart", "--mode=immediate"])),
        ("backends terminated", &|| {
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'",
            )
        }),
        ("a backend killed with signal 9", &|| cluster.kill_backend("reader")),
    ];
    for program in Program::for_each_on_error(&url) {
        program.client.assert_correct();
        for (name, fault) in faults {
            program.client.run_during(name, CLIENT_COUNT, fault);
            program.client.assert_correct();
        }
    }
}

#[test]
fn stopped_database_yields_the_policys_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_via(cluster.port());
    let programs = Program::for_each_on_error(&url);
    for program in &programs {
        program.client.assert_correct();
    }
    cluster.pg_ctl(&["stop", "--mode=immediate"]);
    for program in &programs {
        program.assert_lookups_fail(
            "stopped: connections are refused",
            "unavailable",
            "Connection refused",
        );
    }
    cluster.pg_ctl(&["start"]);
    for program in &programs {
        program.client.assert_correct();
    }
}

#[test]
fn network_black_hole_delays_no_answer() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let relay = Relay::to(cluster.port());
    let url = postgres.url_via(relay.port);
    let programs = Program::for_each_on_error(&url);
    for program in &programs {
        program.client.assert_correct();
    }
    for program in &programs {
        relay.drop_traffic(true);
        program.assert_lookups_fail(
            "a black hole: accepts, and never answers",
            "timeout",
            "did not answer in time",
        );
        relay.drop_traffic(false);
        program.client.assert_correct();
    }
}

#[test]
fn only_a_few_lookups_wait_during_an_outage() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    postgres.execute("CREATE TABLE released ()");
    // The server must cancel abandoned queries; otherwise each deadline adds 16 backends.
    let lock = "BEGIN; LOCK TABLE workspaces;
        DO $$ BEGIN
            WHILE NOT EXISTS (SELECT FROM released) LOOP PERFORM pg_sleep(0.05); END LOOP;
            ASSERT (SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader') <= 2 * 16;
        END $$;
        COMMIT";
    let hang = |wait: &dyn Fn()| {
        std::thread::scope(|scope| {
            scope.spawn(|| postgres.execute(lock));
            wait();
            postgres.execute("INSERT INTO released DEFAULT VALUES");
        });
        postgres.execute("TRUNCATE released");
    };
    let stop = |wait: &dyn Fn()| {
        cluster.pg_ctl(&["stop", "--mode=immediate"]);
        wait();
        cluster.pg_ctl(&["start"]);
    };
    let faults: [(&str, &str, Fault); 2] = [
        ("the table is locked: lookups hang", "timeout", &hang),
        ("stopped, with 64 clients", "unavailable", &stop),
    ];
    for program in Program::for_each_on_error(&postgres.url_via(cluster.port())) {
        for (name, kind, fault) in faults {
            program.client.assert_correct();
            let before = program.lookups();
            let count = |kind: &str| {
                let lookups = program.lookups_since(&before);
                lookups.get(kind).copied().unwrap_or_default()
            };
            // All 64 wait until the first deadline, then 16 at a time. Those that wait for one of the 16 connections
            // end with `timeout`, even if the database is stopped.
            let failed = || count("timeout") + count("unavailable");
            program.client.run_during(name, 64, || {
                fault(&|| {
                    wait_for("the second deadline passes", || (failed() >= 64 + 16).then_some(()));
                });
            });
            program.client.assert_correct();
            assert!(count(kind) >= 16, "{name}: {kind}");
            assert!(count("crowded") > failed(), "{name}: {}", failed());
        }
    }
}

#[test]
fn slow_query_ends_at_the_deadline() {
    let postgres = Postgres::with(&schema());
    let slow = "SELECT CASE WHEN pg_sleep(20) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1";
    for program in Program::for_each_on_error_with("2s", slow, &postgres.url()) {
        program.assert_lookups_fail("a slow query", "timeout", "did not answer in time");
    }
}

#[test]
fn exhausted_connections_fail_lookups_until_freed() {
    let postgres = Postgres::on(&Cluster::start(), &schema());
    for program in Program::for_each_on_error(&postgres.url()) {
        postgres.execute(
            "ALTER ROLE reader CONNECTION LIMIT 0;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'",
        );
        program.assert_lookups_fail(
            "no connection is free",
            "unavailable",
            "too many connections for role",
        );
        postgres.execute("ALTER ROLE reader CONNECTION LIMIT -1");
        program.client.assert_correct();
    }
}

#[test]
fn standby_in_recovery_serves_lookups() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_via(cluster.port());
    cluster.restart_as_standby();
    for program in Program::for_each_on_error_with(LONG_LOOKUP_TIMEOUT, QUERY, &url) {
        let before = program.lookups();
        let wait = || program.wait_for_lookups(&before, 100);
        let tally = program
            .client
            .run_during("a standby, in recovery", CLIENT_COUNT, wait);
        assert_eq!(tally.per_policy, 0);
    }
}

#[test]
fn missing_schema_is_logged_until_restored() {
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
        for (name, fault, error, remedy) in table {
            program.client.assert_correct();
            postgres.execute(fault);
            program.assert_lookups_fail(name, "refused", error);
            let line = program.webhook.wait_for_log(error);
            assert!(line.contains("\"ERROR\""), "{line}");
            postgres.execute(remedy);
            program.client.assert_correct();
        }
    }
}
