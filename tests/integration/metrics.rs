//! The metrics at `/metrics` match docs/metrics.md, and a real Prometheus can scrape them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use test_support::chart::with_tools;
use test_support::load::BYOK;
use test_support::postgres::{Postgres, free_port};
use test_support::program::{Start, Webhook, wait_for};
use test_support::transcript::page;
use test_support::{PROXY, create, pod};

/// Each series' type and label names, by its name.
type Series = BTreeMap<String, (String, BTreeSet<String>)>;

/// A running webhook in which every counted event has happened at least once.
struct Run {
    webhook: Webhook,
    _postgres: Postgres,
}

fn run() -> Run {
    let postgres = Postgres::with(&test_support::load::schema());
    let webhook = Start {
        policy: PROXY,
        database_url: &postgres.url(),
        ..Start::default()
    }
    .start();
    // One stays with a warning, the others are removed.
    let env = json!([
        {"name": "ANTHROPIC_BASE_URL", "value": "https://x"},
        {"name": "XAI_BASE_URL", "value": "https://x"},
        {"name": "XAI_API_KEY", "value": "x"},
    ]);
    for workspace in [BYOK, "99999999-9999-4999-8999-999999999999"] {
        webhook.mutate(&create(&pod(workspace, &env)));
    }
    let (certificate, key) = webhook.authority.issue("localhost");
    fs::write(webhook.folder.path().join("tls.key"), key).unwrap();
    fs::write(webhook.folder.path().join("tls.crt"), certificate).unwrap();
    webhook.wait_for_log("certificate reloaded");
    Run {
        webhook,
        _postgres: postgres,
    }
}

/// Returns the series documented on the page for `serve`.
fn documented() -> Series {
    documented_in(0)
}

/// Returns those documented for `converge` alone.
pub(crate) fn documented_of_converge() -> Series {
    documented_in(1)
}

/// Returns the series documented before (0) or after (1) the heading of `converge`.
fn documented_in(part: usize) -> Series {
    let page = page("docs/metrics.md");
    let mut parts = page.split("\n## The series of `converge`");
    let page = parts.nth(part).unwrap();
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| `llm_billing_"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let labels = cells[2]
            .split(", ")
            .map(|label| label.trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        (cells[0].trim_matches('`').to_owned(), (cells[1].to_owned(), labels))
    };
    rows.map(row).collect()
}

/// Returns the series in a scrape's text.
pub(crate) fn exposed(text: &str) -> Series {
    let mut series = Series::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let ending = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        series.insert(format!("{name}{ending}"), (kind.to_owned(), BTreeSet::new()));
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels) = line.split_once(['{', ' ']).unwrap();
        let parts = ["_bucket", "_sum", "_count"];
        let whole = parts.iter().find_map(|part| name.strip_suffix(part));
        let (_, known) = series.get_mut(whole.unwrap_or(name)).unwrap();
        if line.contains('{') {
            let labels = labels.split_once('}').unwrap().0.split("\",");
            let labels = labels.map(|label| label.split_once('=').unwrap().0);
            known.extend(labels.filter(|label| *label != "le").map(str::to_owned));
        }
    }
    series
}

#[test]
fn exposed_series_match_the_documentation() {
    let run = run();
    let text = run.webhook.health("/metrics").1;
    assert_eq!(exposed(&text), documented());
    for line in [
        "llm_billing_admissions_in_flight 0\n",
        "llm_billing_warnings_total{kind=\"base_url\"} 1\n",
        "llm_billing_removed_variables_total{kind=\"endpoint\"} 1\n",
        "llm_billing_removed_variables_total{kind=\"vendor_key\"} 1\n",
        "llm_billing_database_connections{state=\"used\"} 0\n",
        "llm_billing_lookup_retries_total 0\n",
        "llm_billing_build_info{version=\"0.1.0\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[test]
fn prometheus_scrapes_every_documented_series() {
    let run = run();
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let config = json!({
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "webhook", "static_configs": [{"targets": [run.webhook.health.to_string()]}]}],
    });
    let file = folder.path().join("prometheus.yaml");
    fs::write(&file, config.to_string()).unwrap();
    let mut prometheus = Command::new("prometheus");
    let mut child = with_tools(&mut prometheus, Path::new(""))
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("Prometheus is not installed; scripts/check installs it");
    let query = |path: &str| -> Option<Value> {
        let url = format!("http://127.0.0.1:{port}/api/v1/{path}");
        let mut answer = run.webhook.client.get(url).call().ok()?;
        serde_json::from_str(&answer.body_mut().read_to_string().ok()?).ok()
    };
    let scraped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // Prometheus writes `up` at the end of a scrape; before that, some series are still missing.
        wait_for("Prometheus has scraped", || {
            query("query?query=up%3D%3D1")?["data"]["result"]
                .get(0)
                .cloned()
        });
        query("label/__name__/values").unwrap()["data"].take()
    }));
    // Both fail only if the process has already ended.
    let _ = child.kill();
    let _ = child.wait();
    let scraped: BTreeSet<String> = serde_json::from_value(scraped.unwrap()).unwrap();
    for (name, (kind, _)) in documented() {
        let name = if kind == "histogram" {
            format!("{name}_bucket")
        } else {
            name
        };
        assert!(scraped.contains(&name), "{name} is not in {scraped:?}");
    }
}
