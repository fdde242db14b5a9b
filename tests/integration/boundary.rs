//! The wall around the core: what its files may not mention.

use std::fs;
use std::path::Path;

/// IO, waiting, HTTP, the clock and every edge of the crate.
const FORBIDDEN: [&str; 28] = [
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "SystemTime",
    "Instant",
    "tokio",
    "tracing",
    "sqlx",
    "axum",
    "hyper",
    "rustls",
    "clap",
    "prometheus_client",
    "async fn",
    "async move",
    ".await",
    "println!",
    "crate::audit",
    "crate::cli",
    "crate::cluster",
    "kube::",
    "crate::database",
    "crate::server",
    "crate::metrics",
    "crate::telemetry",
];

#[test]
fn the_core_knows_no_io_no_async_no_http_and_no_edge() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/core");
    let mut breaches = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let breach = |word: &&&str| code.contains(**word);
            if let Some(word) = FORBIDDEN.iter().find(breach) {
                breaches.push(format!("{}:{}: {word}", path.display(), index + 1));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}
