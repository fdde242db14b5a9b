//! A program that is measured: the webhook or the floor, as a process of its own, ended by its id.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use ureq::Agent;

use crate::support::PROXY;
use crate::support::process::{cpu_of, memory_of};
use crate::support::program::{Authority, Start, wait_for};

pub(crate) struct Subject {
    child: Child,
    started: Instant,
    pub(crate) address: SocketAddr,
    health: Option<SocketAddr>,
    /// Holds its certificate, and its log.
    _folder: TempDir,
}

impl Subject {
    /// The webhook with a policy that has everything, logging as it does by default, to a file.
    pub(crate) fn webhook(database_url: &str) -> Self {
        let folder = certificate();
        let log = folder.path().join("log");
        let start = Start {
            policy: PROXY,
            database_url,
            ..Start::default()
        };
        let mut command = start.command(folder.path());
        let started = Instant::now();
        let child = command.stderr(File::create(&log).unwrap()).spawn().unwrap();
        let listening = wait_for("the webhook listens", || {
            let log = fs::read_to_string(&log).unwrap();
            let line = log.lines().find(|line| line.contains("\"listening\""))?;
            serde_json::from_str::<Value>(line).ok()
        });
        let address = |field: &str| listening[field].as_str().unwrap().parse().unwrap();
        Self {
            child,
            started,
            address: address("webhook"),
            health: Some(address("health")),
            _folder: folder,
        }
    }

    /// The floor, with the one SELECT.
    pub(crate) fn floor(database_url: &str, workspaces: u32) -> Self {
        let folder = certificate();
        let started = Instant::now();
        let mut child = Command::new(std::env::var_os("FLOOR").expect("FLOOR names the program"))
            .args(["tls.crt", "tls.key", database_url, &workspaces.to_string()])
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        Self {
            child,
            started,
            address: line.trim().parse().unwrap(),
            health: None,
            _folder: folder,
        }
    }

    /// CPU time so far, of user and system.
    pub(crate) fn cpu(&self) -> Duration {
        cpu_of(self.child.id())
    }

    /// A size of its `/proc/PID/status`, in KiB.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        memory_of(self.child.id(), field)
    }

    /// Ends the benchmark if one admission was not what it should be: looked up, and patched.
    pub(crate) fn did_its_work(&self) {
        let metrics = page(self.health.expect("a webhook has it"), "/metrics");
        for line in metrics.lines() {
            let is_right = if line.starts_with("llm_billing_admissions_total{") {
                line.contains("outcome=\"patched\"") && line.contains("reason=\"override\"")
            } else if line.starts_with("llm_billing_lookup_duration_seconds_count{") {
                // One more is the check at the start.
                line.contains("result=\"found\"") || line.ends_with(" 1")
            } else {
                true
            };
            assert!(is_right, "{line}");
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long after its start the webhook is ready.
pub(crate) fn ready_after(database_url: &str) -> Duration {
    let webhook = Subject::webhook(database_url);
    let health = webhook.health.expect("a webhook has it");
    wait_for("the webhook is ready", || {
        (page(health, "/readyz") == "ok\n").then_some(())
    });
    webhook.started.elapsed()
}

fn page(health: SocketAddr, path: &str) -> String {
    let agent: Agent = Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .into();
    let mut response = agent.get(format!("http://{health}{path}")).call().unwrap();
    response.body_mut().read_to_string().unwrap()
}

/// A folder with a certificate and its key.
fn certificate() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = Authority::new().issue("localhost");
    fs::write(folder.path().join("tls.crt"), certificate).unwrap();
    fs::write(folder.path().join("tls.key"), key).unwrap();
    folder
}
