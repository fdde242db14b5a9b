//! How often one admission asks for memory, from the body's bytes to the answer's, and for how much.
//!
//! `cargo bench --bench allocations`

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints what it finds, and ends where it cannot go on"
)]

mod support;

use support::{RECORDED, SETTLED, body, policy};
use test_support::in_process::{stored, written};

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
            // The first one also makes what is made but once.
            written(&policy, &stored, &body).unwrap();
            let before = dhat::HeapStats::get();
            let answer = written(&policy, &stored, &body).unwrap();
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
