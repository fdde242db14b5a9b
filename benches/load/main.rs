//! Load benchmark: the release build against the alternatives, with the same requests and the same PostgreSQL. The
//! programs take turns, so that noise on the machine affects all of them. Prints the tables of docs/performance.md.
//!
//! `scripts/load [TABLE…]` runs it. `PROGRAM_UNDER_TEST` and `ALTERNATIVES` name the programs; wrk generates the load.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results, and panics if it cannot continue"
)]

mod subject;
mod wrk;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use subject::{Kind, Subject, time_to_ready};
use test_support::postgres::{Cluster, PgBouncer, Postgres};
use test_support::{env_map, patched, program, recorded};
use wrk::{Load, Measured, median};

/// Workspaces in the small table and in the large one.
const FEW: u32 = 1_000;
const MANY: u32 = 1_000_000;
/// Environment variable: seconds per measurement.
const SECONDS: &str = "LOAD_SECONDS";
/// Environment variable: measurements of each program per table row.
const ROUNDS: &str = "LOAD_ROUNDS";
/// Admissions of the memory test.
const LONG_RUN_COUNT: u64 = 200_000;

/// The programs, the webhook first.
const ALL: [Kind; 4] = [
    Kind::Webhook,
    Kind::FLOOR,
    Kind::Alternative("careful"),
    Kind::Alternative("idiomatic"),
];

fn main() {
    let setting = |name, default| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
    };
    let bench = Bench {
        time: Duration::from_secs(setting(SECONDS, 5)),
        rounds: setting(ROUNDS, 3),
        small: Load::of(&["claude-code-pod", "hermes-deployment-pod"], 10_000),
        large: Load::of(&["large-pod-20-containers"], 20),
        cluster: Cluster::start(),
    };
    let few = bench.table(FEW);
    let many = bench.table(MANY);
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.iter().any(|wanted| wanted == "earlier") {
        bench.earlier(&few);
    }
    let tables: [(&str, &dyn Fn()); 7] = [
        ("start", &|| bench.starts(&few)),
        ("instructions", &|| bench.instructions(&few)),
        ("alternatives", &|| bench.alternatives(&few)),
        ("floor", &|| bench.side_by_side(&few)),
        ("workspaces", &|| bench.tables(&few, &many)),
        ("memory", &|| bench.memory(&few)),
        ("replicas", &|| bench.replicas(&many)),
    ];
    for (name, print) in tables {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            print();
        }
    }
}

struct Bench {
    time: Duration,
    rounds: u64,
    /// Reviews of 3 to 5 KB.
    small: Load,
    /// Reviews of 200 KB.
    large: Load,
    cluster: Arc<Cluster>,
}

impl Bench {
    /// Creates a table of this many workspaces, all platform_managed, the mode with the most work.
    fn table(&self, workspaces: u32) -> Postgres {
        let schema = format!(
            "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);
             INSERT INTO workspaces SELECT lpad(to_hex(n), 32, '0')::uuid, 'platform_managed'
                 FROM generate_series(0, {workspaces} - 1) AS n;
             ANALYZE workspaces"
        );
        Postgres::on(&self.cluster, &schema)
    }

    fn starts(&self, table: &Postgres) {
        let size = std::fs::metadata(program::program_path()).unwrap().len();
        let mut times: Vec<f64> = (0..5)
            .map(|_| time_to_ready(&table.url()).as_secs_f64() * 1e3)
            .collect();
        println!("\n| binary, bytes | ready after, ms, median of 5 |\n|---|---|");
        println!("| {size} | {:.0} |", median(&mut times));
    }

    /// Prints user-space instructions per admission, absolute and relative to the webhook's.
    fn instructions(&self, table: &Postgres) {
        println!("\n| instructions an admission | 3-5 KB | 200 KB |\n|---|---|---|");
        let mut webhook = [0.0; 2];
        for kind in ALL {
            let instructions = [&self.small, &self.large].map(|load| {
                // Both runs include the start, so their difference does not.
                let [short, long] = [2, 12].map(|seconds| {
                    let subject = Subject::start_under_callgrind(kind, &table.url(), FEW);
                    let time = Duration::from_secs(seconds);
                    let sent = load.send(subject.address, 4, FEW, time);
                    (wrk::float(sent.requests), wrk::float(subject.stop_and_count()))
                });
                (long.1 - short.1) / (long.0 - short.0)
            });
            if kind == Kind::Webhook {
                webhook = instructions;
            }
            let [small, large] = [0, 1].map(|load| {
                let ratio = instructions[load] / webhook[load];
                format!("{:.0} ({ratio:.2})", instructions[load])
            });
            println!("| {} | {small} | {large} |", kind.name());
        }
    }

    /// Prints the CPU of this build relative to an earlier one's.
    fn earlier(&self, table: &Postgres) {
        println!("\n| CPU against the earlier build's | connections | ratio |\n|---|---|---|");
        let [webhook, earlier] =
            [Kind::Webhook, Kind::Earlier].map(|kind| Subject::start(kind, &table.url(), FEW));
        for (names, many) in [
            (&["claude-code-pod"], 10_000),
            (&["hermes-deployment-pod"], 10_000),
            (&["large-pod-20-containers"], 20),
        ] {
            let load = Load::of(names, many);
            for connections in [1, 16] {
                let [now, before] =
                    self.by_turns(&load, connections, [(&webhook, FEW), (&earlier, FEW)]);
                println!("| {} | {connections} | {:.2} |", names[0], now.cpu / before.cpu);
            }
        }
    }

    /// Prints the alternatives' CPU relative to the webhook's.
    fn alternatives(&self, table: &Postgres) {
        let [webhook, floor, careful, idiomatic] =
            ALL.map(|kind| Subject::start(kind, &table.url(), FEW));
        for name in [
            "claude-code-pod",
            "hermes-deployment-pod",
            "large-pod-20-containers",
        ] {
            let mut review = recorded(name);
            review["request"]["object"]["metadata"]["labels"][test_support::WORKSPACE_LABEL] =
                uuid::Uuid::nil().to_string().into();
            let expected = env_after(&review, &webhook);
            for alternative in [&careful, &idiomatic] {
                assert_eq!(env_after(&review, alternative), expected, "{name}");
            }
        }
        println!(
            "\n| CPU against the webhook's | floor | careful | idiomatic |\n|---|---|---|---|"
        );
        for (name, load) in [("3-5 KB", &self.small), ("200 KB", &self.large)] {
            let subjects = [&webhook, &floor, &careful, &idiomatic].map(|subject| (subject, FEW));
            let [webhook, alternatives @ ..] = self.by_turns(load, 16, subjects);
            let [floor, careful, idiomatic] = alternatives.map(|one| one.cpu / webhook.cpu);
            println!("| {name}, 16 connections | {floor:.2} | {careful:.2} | {idiomatic:.2} |");
        }
        webhook.assert_all_patched();
    }

    fn side_by_side(&self, table: &Postgres) {
        let webhook = Subject::start(Kind::Webhook, &table.url(), FEW);
        let floor = Subject::start(Kind::FLOOR, &table.url(), FEW);
        println!(
            "\n| reviews | connections | throughput | p50 | p99 | CPU | webhook, admissions/s | webhook, CPU µs | floor, CPU µs |\n\
             |---|---|---|---|---|---|---|---|---|"
        );
        for (name, load) in [("3-5 KB", &self.small), ("200 KB", &self.large)] {
            for connections in [1, 16, 64] {
                let [one, other] =
                    self.by_turns(load, connections, [(&webhook, FEW), (&floor, FEW)]);
                println!(
                    "| {name} | {connections} | {} | {:.0} | {:.1} | {:.1} |",
                    one.ratios_to(&other),
                    one.per_second,
                    one.cpu,
                    other.cpu
                );
            }
        }
        webhook.assert_all_patched();
    }

    fn tables(&self, few: &Postgres, many: &Postgres) {
        let in_few = Subject::start(Kind::Webhook, &few.url(), FEW);
        let in_many = Subject::start(Kind::Webhook, &many.url(), MANY);
        println!(
            "\n| {MANY} workspaces against {FEW}, connections | throughput | p50 | p99 | CPU |\n|---|---|---|---|---|"
        );
        for connections in [1, 16] {
            let subjects = [(&in_many, MANY), (&in_few, FEW)];
            let [many, few] = self.by_turns(&self.small, connections, subjects);
            println!("| {connections} | {} |", many.ratios_to(&few));
        }
        in_few.assert_all_patched();
        in_many.assert_all_patched();
    }

    /// Measures the subjects in turns, each with its number of workspaces.
    fn by_turns<const N: usize>(
        &self,
        load: &Load,
        connections: u32,
        subjects: [(&Subject, u32); N],
    ) -> [Measured; N] {
        let mut all = subjects.map(|_| Vec::new());
        for _ in 0..self.rounds {
            for ((subject, workspaces), measured) in subjects.iter().zip(&mut all) {
                measured.push(self.measure(load, connections, *workspaces, subject));
            }
        }
        all.map(Measured::median_of)
    }

    fn measure(
        &self,
        load: &Load,
        connections: u32,
        workspaces: u32,
        subject: &Subject,
    ) -> Measured {
        let before = subject.cpu();
        let sent = load.send(subject.address, connections, workspaces, self.time);
        Measured::of(&sent, subject.cpu() - before)
    }

    fn memory(&self, table: &Postgres) {
        let webhook = Subject::start(Kind::Webhook, &table.url(), FEW);
        println!("\n| memory | KiB |\n|---|---|\n| at rest | {} |", webhook.memory("VmRSS"));
        self.measure(&self.large, 64, FEW, &webhook);
        println!("| most, 64 connections, 200 KB reviews | {} |", webhook.memory("VmHWM"));
        let mut admissions = 0;
        let mut reported = 0;
        while admissions < LONG_RUN_COUNT {
            let sent = self
                .small
                .send(webhook.address, 16, FEW, Duration::from_secs(2));
            admissions += sent.requests;
            if admissions - reported >= LONG_RUN_COUNT / 4 {
                reported = admissions;
                println!("| after {admissions} more, 3-5 KB | {} |", webhook.memory("VmRSS"));
            }
        }
        println!("| most | {} |", webhook.memory("VmHWM"));
        webhook.assert_all_patched();
    }

    /// Prints the CPU per admission of replicas, PostgreSQL and PgBouncer, for several replicas on one PostgreSQL.
    fn replicas(&self, table: &Postgres) {
        println!(
            "\n| replicas | by way of | admissions/s | webhook, CPU µs | PostgreSQL, CPU µs | PgBouncer, CPU µs | connections to PostgreSQL |\n\
             |---|---|---|---|---|---|---|"
        );
        let bouncer = PgBouncer::start(&self.cluster);
        let pooled = format!("{}?statement-cache-capacity=0", table.url_via(bouncer.port()));
        for (way, url) in [("-", table.url()), ("PgBouncer", pooled)] {
            for count in [1, 2, 4, 8] {
                let replicas: Vec<Subject> = (0..count)
                    .map(|_| Subject::start(Kind::Webhook, &url, MANY))
                    .collect();
                let cpu = || {
                    let webhooks = replicas.iter().map(Subject::cpu).sum::<Duration>();
                    (webhooks, self.cluster.cpu(), bouncer.cpu())
                };
                let before = cpu();
                let each = 64 / count;
                let sent = std::thread::scope(|scope| {
                    let send = |replica: &Subject| {
                        let address = replica.address;
                        scope.spawn(move || self.small.send(address, each, MANY, self.time))
                    };
                    let sending: Vec<_> = replicas.iter().map(send).collect();
                    let sent = sending.into_iter().map(|one| one.join().unwrap());
                    sent.collect::<Vec<_>>()
                });
                let after = cpu();
                let requests: u64 = sent.iter().map(|one| one.requests).sum();
                let each = |after: Duration, before: Duration| {
                    (after - before).as_secs_f64() * 1e6 / wrk::float(requests)
                };
                println!(
                    "| {count} | {way} | {:.0} | {:.1} | {:.1} | {:.1} | {} |",
                    wrk::float(requests) / self.time.as_secs_f64(),
                    each(after.0, before.0),
                    each(after.1, before.1),
                    each(after.2, before.2),
                    self.cluster.connections("reader"),
                );
                replicas.iter().for_each(Subject::assert_all_patched);
            }
        }
    }
}

/// Returns the env of each container after the program's patch.
fn env_after(review: &Value, subject: &Subject) -> Vec<BTreeMap<String, Value>> {
    let after = patched(review, &subject.answer(review));
    let spec = &after["request"]["object"]["spec"];
    let lists = [&spec["initContainers"], &spec["containers"]];
    let containers = lists.into_iter().filter_map(Value::as_array).flatten();
    containers.map(env_map).collect()
}
