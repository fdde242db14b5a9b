//! Heap allocations of one admission, from request body to answer: their count and bytes.
//!
//! `cargo bench --bench allocations`

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results, and panics if it cannot continue"
)]

mod support;

use support::{RECORDED, SETTLED, body, policy};
use test_support::in_process::{answer_json, stored};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

fn main() {
    let _counting = dhat::Profiler::builder().testing().build();
    let policy = policy();
    println!(
        "| review | mode | body, bytes | allocations | bytes allocated |\n|---|---|---|---|---|"
    );
    for name in RECORDED.into_iter().chain([SETTLED]) {
        let body = body(name);
        for mode in ["platform_managed", "byok"] {
            let stored = stored(mode);
            // The first run also makes one-time allocations.
            answer_json(&policy, &stored, &body).unwrap();
            let before = dhat::HeapStats::get();
            let answer = answer_json(&policy, &stored, &body).unwrap();
            let after = dhat::HeapStats::get();
            println!(
                "| {name} | {mode} | {} | {} | {} |",
                body.len(),
                after.total_blocks - before.total_blocks,
                after.total_bytes - before.total_bytes
            );
            drop(answer);
        }
    }
}
