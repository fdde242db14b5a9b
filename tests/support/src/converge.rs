//! `converge` as a process, and what its metrics say.

use std::net::SocketAddr;
use std::process::Stdio;

use super::postgres::Postgres;
use super::program::{Running, health, program, wait_for};

/// Starts `converge`, without a start delay unless the arguments have one, and waits until it listens. Returns it with the
/// address of its health endpoint.
pub fn start(
    policy: &str,
    postgres: &Postgres,
    kubeconfig: &str,
    arguments: &[&str],
) -> (Running, SocketAddr) {
    let mut command = program(&["converge", "--policy", policy]);
    command
        .args(["--database-url", &postgres.url()])
        .args(["--health-listen", "127.0.0.1:0"])
        .args(arguments)
        .args(match arguments.contains(&"--start-delay") {
            true => &[][..],
            false => &["--start-delay", "0s"],
        })
        .env("KUBECONFIG", kubeconfig)
        // With one worker, a task that does not yield blocks all others.
        .env("TOKIO_WORKER_THREADS", "1")
        .stdin(Stdio::null());
    let mut running = Running::start(&mut command);
    let listening = running.wait_until_listening();
    let address = listening["health"].as_str().unwrap().parse().unwrap();
    (running, address)
}

/// Waits until the metrics have this line.
pub fn wait_for_metric(address: SocketAddr, line: &str) {
    wait_for(line, || {
        let metrics = health(address, "/metrics").1;
        metrics.lines().any(|own| own == line).then_some(())
    });
}

/// Returns the number of comparisons so far.
pub fn comparisons(address: SocketAddr) -> usize {
    let metrics = health(address, "/metrics").1;
    let mut lines = metrics.lines();
    let count =
        lines.find_map(|line| line.strip_prefix("llm_billing_audits_total{result=\"ok\"} "));
    count.unwrap().parse().unwrap()
}
