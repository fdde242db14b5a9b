//! Time from request body to answer with a fixed lookup outcome, relative to the floor: one serde_json skim of the
//! body. Also how the time grows with the pod. HTTPS and the database are in load/.
//!
//! `cargo bench --bench in_process` prints the ratios at the end.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results, and panics if it cannot continue"
)]

mod support;

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};

use criterion::{BenchmarkId, Criterion, Throughput};
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use support::{LEADING_SPACE, RECORDED, SETTLED, body, policy};
use test_support::in_process::{answer_json, stored};

const ENTRIES: [usize; 4] = [10, 100, 1_000, 10_000];
const CONTAINERS: [usize; 3] = [1, 10, 100];
const MODES: [&str; 2] = ["platform_managed", "byok"];

fn main() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("criterion");
    let mut criterion = Criterion::default()
        .output_directory(&results)
        .configure_from_args();
    for (id, body) in all_bodies() {
        measure(&mut criterion, &id, &body);
    }
    criterion.final_summary();
    print_ratios(&results);
}

fn all_bodies() -> impl Iterator<Item = (String, Vec<u8>)> {
    let named = RECORDED.into_iter().chain([SETTLED, LEADING_SPACE]);
    let named = named.map(|name| (name.to_owned(), body(name)));
    let entries = ENTRIES.map(|count| (entries_id(count), grown(1, count)));
    let containers = CONTAINERS.map(|count| (containers_id(count), grown(count, 20)));
    named.chain(entries).chain(containers)
}

/// Returns the first recorded review with this many containers and env entries per container; every tenth entry is a
/// vendor key.
fn grown(containers: usize, entries: usize) -> Vec<u8> {
    let mut review: Value = serde_json::from_slice(&body(RECORDED[0])).unwrap();
    let entry = |index: usize| match index % 10 {
        0 => json!({"name": "OPENAI_API_KEY", "value": "sk-0"}),
        _ => json!({"name": format!("VARIABLE_{index}"), "value": "the value of a variable"}),
    };
    let list = &mut review["request"]["object"]["spec"]["containers"];
    let mut container = list[0].take();
    container["env"] = (0..entries).map(entry).collect();
    *list = (0..containers)
        .map(|index| {
            container["name"] = format!("container-{index}").into();
            container.clone()
        })
        .collect();
    serde_json::to_vec(&review).unwrap()
}

fn entries_id(count: usize) -> String {
    format!("1 container, {count} entries")
}

fn containers_id(count: usize) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} container{plural}, 20 entries")
}

fn measure(criterion: &mut Criterion, id: &str, body: &[u8]) {
    let policy = policy();
    let mut group = criterion.benchmark_group(id);
    group.throughput(Throughput::Bytes(u64::try_from(body.len()).unwrap()));
    group.bench_function("skim", |bencher| {
        bencher.iter(|| serde_json::from_slice::<IgnoredAny>(black_box(body)).unwrap());
    });
    for mode in MODES {
        let stored = stored(mode);
        group.bench_function(BenchmarkId::from_parameter(mode), |bencher| {
            bencher.iter(|| answer_json(&policy, &stored, black_box(body)).unwrap());
        });
    }
    group.finish();
}

fn print_ratios(results: &Path) {
    let time = |id: &str, what: &str| {
        let path: PathBuf = [id, what, "new", "estimates.json"].iter().collect();
        let text = fs::read(results.join(path)).ok()?;
        let estimates: Value = serde_json::from_slice(&text).ok()?;
        estimates["median"]["point_estimate"].as_f64()
    };
    let ratio = |id: &str, what: &str, to_id: &str, to: &str| {
        let ratio = Option::zip(time(id, what), time(to_id, to)).map(|(one, other)| one / other);
        ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"))
    };
    println!("\n| body to answer, against the skim | platform_managed | byok |\n|---|---|---|");
    for (id, _) in all_bodies() {
        let ratio_of = |mode| ratio(&id, mode, &id, "skim");
        println!("| {id} | {} | {} |", ratio_of(MODES[0]), ratio_of(MODES[1]));
    }
    println!("\n| ten times as much | platform_managed | byok |\n|---|---|---|");
    let entries = ENTRIES.map(entries_id);
    let containers = CONTAINERS.map(containers_id);
    for pair in entries.windows(2).chain(containers.windows(2)) {
        let ratio_of = |mode| ratio(&pair[1], mode, &pair[0], mode);
        println!("| {} | {} | {} |", pair[1], ratio_of(MODES[0]), ratio_of(MODES[1]));
    }
}
