//! A measured program: the webhook or an alternative, run as a child process. The load is in wrk.rs.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use ureq::Agent;

use test_support::PROXY;
use test_support::process::{cpu_of, memory_of};
use test_support::program::{Authority, Start, wait_for};

/// The measured program.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The webhook.
    Webhook,
    /// An earlier build of the webhook, which `EARLIER` names.
    Earlier,
    /// A program in benches/alternatives, by name.
    Alternative(&'static str),
}

impl Kind {
    pub(crate) const FLOOR: Self = Self::Alternative("floor");

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Earlier => "earlier webhook",
            Self::Alternative(name) => name,
        }
    }
}

/// Returns the same command for the earlier build.
fn of_earlier(command: &Command) -> Command {
    let mut earlier = Command::new(std::env::var_os("EARLIER").expect("EARLIER names the program"));
    earlier.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => earlier.env(name, value),
            None => earlier.env_remove(name),
        };
    }
    earlier
}

pub(crate) struct Subject {
    child: Child,
    started: Instant,
    pub(crate) address: SocketAddr,
    health: Option<SocketAddr>,
    authority: Authority,
    /// Holds the certificate and the output.
    folder: TempDir,
}

impl Subject {
    /// Starts a program on a database with this many workspaces. The webhook has a policy with a proxy. Output goes
    /// to files.
    pub(crate) fn start(kind: Kind, database_url: &str, workspaces: u32) -> Self {
        Self::start_as(kind, database_url, workspaces, |command| command)
    }

    /// Starts a program under callgrind, which counts its instructions.
    pub(crate) fn start_under_callgrind(kind: Kind, database_url: &str, workspaces: u32) -> Self {
        Self::start_as(kind, database_url, workspaces, |command| {
            let mut valgrind = Command::new("valgrind");
            valgrind
                .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
                .arg(command.get_program())
                .args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => valgrind.env(name, value),
                    None => valgrind.env_remove(name),
                };
            }
            if let Some(folder) = command.get_current_dir() {
                valgrind.current_dir(folder);
            }
            valgrind
        })
    }

    fn start_as(
        kind: Kind,
        database_url: &str,
        workspaces: u32,
        wrap: impl Fn(Command) -> Command,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::generate();
        let (certificate, key) = authority.issue("localhost");
        fs::write(folder.path().join("tls.crt"), certificate).unwrap();
        fs::write(folder.path().join("tls.key"), key).unwrap();
        let command = match kind {
            Kind::Webhook | Kind::Earlier => {
                let start = Start {
                    policy: PROXY,
                    database_url,
                    ..Start::default()
                };
                let command = start.command(folder.path());
                match kind {
                    Kind::Earlier => of_earlier(&command),
                    _ => command,
                }
            }
            Kind::Alternative(name) => {
                let program =
                    std::env::var_os("ALTERNATIVES").expect("ALTERNATIVES names the program");
                let mut command = Command::new(program);
                command
                    .args([name, "tls.crt", "tls.key", database_url])
                    .arg(workspaces.to_string())
                    .current_dir(folder.path());
                command
            }
        };
        let output = |name| File::create(folder.path().join(name)).unwrap();
        let started = Instant::now();
        let child = wrap(command)
            .stdout(output(STDOUT))
            .stderr(output(STDERR))
            .spawn()
            .unwrap();
        let (address, health) = wait_for("the program listens", || match kind {
            Kind::Webhook | Kind::Earlier => {
                let log = read(&folder, STDERR);
                let line = log.lines().find(|line| line.contains("\"listening\""))?;
                let line: Value = serde_json::from_str(line).ok()?;
                let address = |field: &str| line[field].as_str().unwrap().parse().unwrap();
                Some((address("webhook"), Some(address("health"))))
            }
            Kind::Alternative(_) => {
                let address = read(&folder, STDOUT);
                Some((address.strip_suffix('\n')?.parse().unwrap(), None))
            }
        });
        Self {
            child,
            started,
            address,
            health,
            authority,
            folder,
        }
    }

    /// Returns the CPU time used so far, user and system.
    pub(crate) fn cpu(&self) -> Duration {
        cpu_of(self.child.id())
    }

    /// Returns a size in the process's `/proc/PID/status`, in KiB.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        memory_of(self.child.id(), field)
    }

    /// Returns the answer to a review.
    pub(crate) fn answer(&self, review: &Value) -> Value {
        let url = format!("https://localhost:{}/mutate", self.address.port());
        let request = self.authority.client().post(url);
        let request = request.header("content-type", "application/json");
        let mut response = request.send(review.to_string()).unwrap();
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap()
    }

    /// Stops a program started with [`Self::start_under_callgrind`], and returns its instruction count.
    pub(crate) fn stop_and_count(mut self) -> u64 {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill").args(["-s", "TERM", &pid]).status();
        assert!(killed.unwrap().success());
        self.child.wait().unwrap();
        let stderr = read(&self.folder, STDERR);
        let count = stderr
            .lines()
            .find_map(|line| line.split_once("Collected : "));
        let (_, count) = count.expect("callgrind prints what it collected");
        count.trim().parse().unwrap()
    }

    /// Asserts that every admission so far was looked up and patched.
    pub(crate) fn assert_all_patched(&self) {
        let metrics = page(self.health.expect("a webhook has it"), "/metrics");
        for line in metrics.lines() {
            let is_right = if line.starts_with("llm_billing_admissions_total{") {
                line.contains("outcome=\"patched\"") && line.contains("reason=\"override\"")
            } else if line.starts_with("llm_billing_lookup_duration_seconds_count{") {
                // The check at the start is one lookup with another result.
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
        // Both fail only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";

fn read(folder: &TempDir, name: &str) -> String {
    fs::read_to_string(Path::join(folder.path(), name)).unwrap()
}

/// Starts the webhook, and returns the time until it is ready.
pub(crate) fn time_to_ready(database_url: &str) -> Duration {
    let webhook = Subject::start(Kind::Webhook, database_url, 0);
    let health = webhook.health.expect("a webhook has it");
    wait_for("the webhook is ready", || (page(health, "/readyz") == "ok\n").then_some(()));
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
