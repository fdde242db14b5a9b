//! The load: wrk sends recorded reviews of many workspaces over keep-alive connections, as the API server does. Also
//! the figures computed from wrk's output. The measured programs are in subject.rs.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::NamedTempFile;
use uuid::Uuid;

use test_support::{WORKSPACE_LABEL, recorded};

/// Reviews that wrk sends in turn.
pub(crate) struct Load {
    names: &'static [&'static str],
    count: u32,
}

/// wrk's results.
pub(crate) struct Sent {
    pub(crate) requests: u64,
    time: Duration,
    p50: Duration,
    p99: Duration,
}

impl Load {
    /// Returns this many reviews of different workspaces, made from these recorded ones.
    pub(crate) const fn of(names: &'static [&'static str], count: u32) -> Self {
        Self { names, count }
    }

    /// Sends the reviews repeatedly for a time. Their workspaces are spread over a table of this many.
    pub(crate) fn send(
        &self,
        address: SocketAddr,
        connections: u32,
        workspaces: u32,
        time: Duration,
    ) -> Sent {
        let reviews = self.reviews(workspaces);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/load/reviews.lua");
        let output = Command::new("wrk")
            .args(["--threads=1", "--timeout=10s"])
            .arg(format!("--connections={connections}"))
            .arg(format!("--duration={}s", time.as_secs()))
            .arg(format!("--script={}", script.display()))
            .arg(format!("https://{address}"))
            .args(["--".as_ref(), reviews.path()])
            .output()
            .expect("wrk is not installed; scripts/load installs it");
        let stdout = String::from_utf8(output.stdout).unwrap();
        let line = stdout
            .lines()
            .find_map(|line| line.strip_prefix("measured "));
        let line =
            line.unwrap_or_else(|| panic!("{stdout}{}", String::from_utf8_lossy(&output.stderr)));
        let numbers: Vec<u64> = line.split(' ').map(|one| one.parse().unwrap()).collect();
        let [requests, time, p50, p99, errors] = numbers.try_into().unwrap();
        assert_eq!(errors, 0, "some requests failed:\n{stdout}");
        Sent {
            requests,
            time: Duration::from_micros(time),
            p50: Duration::from_micros(p50),
            p99: Duration::from_micros(p99),
        }
    }

    /// Writes a file with one review a line, for workspaces spread over the whole table.
    fn reviews(&self, workspaces: u32) -> NamedTempFile {
        let mut all: Vec<Value> = self.names.iter().map(|name| recorded(name)).collect();
        let mut lines = String::new();
        for turn in 0..self.count {
            let review = &mut all[turn as usize % self.names.len()];
            let workspace = u64::from(turn) * u64::from(workspaces) / u64::from(self.count);
            review["request"]["object"]["metadata"]["labels"][WORKSPACE_LABEL] =
                Uuid::from_u128(workspace.into()).to_string().into();
            writeln!(lines, "{review}").unwrap();
        }
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines).unwrap();
        file
    }
}

/// One program's figures.
pub(crate) struct Measured {
    pub(crate) per_second: f64,
    p50: f64,
    p99: f64,
    /// Microseconds per admission.
    pub(crate) cpu: f64,
}

impl Measured {
    pub(crate) fn of(sent: &Sent, cpu: Duration) -> Self {
        Self {
            per_second: float(sent.requests) / sent.time.as_secs_f64(),
            p50: sent.p50.as_secs_f64(),
            p99: sent.p99.as_secs_f64(),
            cpu: cpu.as_secs_f64() * 1e6 / float(sent.requests),
        }
    }

    /// Returns the median of each figure.
    #[expect(clippy::needless_pass_by_value, reason = "it consumes the rounds")]
    pub(crate) fn median_of(rounds: Vec<Self>) -> Self {
        let of =
            |figure: fn(&Self) -> f64| median(&mut rounds.iter().map(figure).collect::<Vec<_>>());
        Self {
            per_second: of(|one| one.per_second),
            p50: of(|one| one.p50),
            p99: of(|one| one.p99),
            cpu: of(|one| one.cpu),
        }
    }

    /// Returns the table cells throughput, p50, p99 and CPU, each as the ratio to the other's.
    pub(crate) fn ratios_to(&self, other: &Self) -> String {
        format!(
            "{:.2} | {:.2} | {:.2} | {:.2}",
            self.per_second / other.per_second,
            self.p50 / other.p50,
            self.p99 / other.p99,
            self.cpu / other.cpu
        )
    }
}

pub(crate) fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    let [below, above] = [figures.len() - 1, figures.len()].map(|half| figures[half / 2]);
    below.midpoint(above)
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few millions")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}
