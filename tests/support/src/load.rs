//! Continuous admissions of a byok workspace's pod during a fault, counted by outcome.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::Agent;

use super::{create, pod};

/// The byok workspace's id.
pub const BYOK: &str = "88888888-8888-8888-8888-888888888888";
/// The timeout that each request announces, as the API server does.
const API_SERVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns a PostgreSQL schema with that workspace.
pub fn schema() -> String {
    format!(
        "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);
         INSERT INTO workspaces VALUES ('{BYOK}', 'byok')"
    )
}

/// `lookup.timeout` for tests in which no lookup may fail on a busy machine: most of the API server's timeout.
pub const LONG_LOOKUP_TIMEOUT: &str = "4s";

/// Admissions counted by outcome.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Admitted as byok.
    pub correct: usize,
    /// Answered as `lookup.onError` says: refused with 503, or platform_managed with a warning.
    pub per_policy: usize,
    /// Any other answer, or a failed request.
    pub wrong: Vec<String>,
    /// No answer within the API server's timeout.
    pub timed_out: usize,
}

/// A client of one webhook, with the `lookup.onError` of the webhook's policy.
pub struct LoadClient {
    pub client: Agent,
    pub port: u16,
    pub on_error: &'static str,
}

impl LoadClient {
    /// Sends one admission and counts its outcome.
    pub fn admit(&self, tally: &mut Tally) {
        let started = Instant::now();
        let answer = self.send();
        if started.elapsed() >= API_SERVER_TIMEOUT {
            tally.timed_out += 1;
            return;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return tally.wrong.push(error.to_string()),
        };
        let response = &answer["response"];
        let field = |name: &str| response["auditAnnotations"][name].as_str();
        let allowed = response["allowed"] == true;
        match (self.on_error, allowed, field("mode"), field("reason")) {
            (_, true, Some("byok"), Some("override")) => tally.correct += 1,
            ("platform_managed", true, Some("platform_managed"), Some("lookup_error"))
                if response["warnings"][0].is_string() =>
            {
                tally.per_policy += 1
            }
            ("deny", false, _, Some("lookup_error")) if response["status"]["code"] == 503 => {
                tally.per_policy += 1
            }
            _ => tally.wrong.push(answer.to_string()),
        }
    }

    fn send(&self) -> Result<Value, ureq::Error> {
        let (port, seconds) = (self.port, API_SERVER_TIMEOUT.as_secs());
        let mut response = self
            .client
            .post(format!("https://localhost:{port}/mutate?timeout={seconds}s"))
            .header("content-type", "application/json")
            .send(create(&pod(BYOK, &json!([]))).to_string())?;
        let text = response.body_mut().read_to_string()?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Sends admissions from several clients without a break until `fault` returns; each client sends at least one.
    /// Prints a row of the table in docs/reliability.md. Panics if an answer is wrong or times out.
    #[expect(clippy::print_stdout, reason = "scripts/faults shows it")]
    pub fn run_during(&self, name: &str, clients: usize, fault: impl FnOnce()) -> Tally {
        let over = AtomicBool::new(false);
        let client = || {
            let mut tally = Tally::default();
            self.admit(&mut tally);
            while !over.load(Ordering::Relaxed) {
                self.admit(&mut tally);
            }
            tally
        };
        let mut all = Tally::default();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
            let stop = SetOnDrop(&over);
            fault();
            drop(stop);
            for client in clients {
                let tally = client.join().unwrap();
                all.correct += tally.correct;
                all.per_policy += tally.per_policy;
                all.wrong.extend(tally.wrong);
                all.timed_out += tally.timed_out;
            }
        });
        let (correct, per_policy) = (all.correct, all.per_policy);
        let (wrong, timed_out) = (all.wrong.len(), all.timed_out);
        let tried = correct + per_policy + wrong + timed_out;
        let on_error = self.on_error;
        println!(
            "| {name} | `{on_error}` | {tried} | {correct} | {per_policy} | {wrong} | {timed_out} |"
        );
        assert!(wrong == 0 && timed_out == 0, "{name}: {all:?}");
        all
    }

    /// Asserts that the next answer is correct.
    pub fn assert_correct(&self) {
        let mut tally = Tally::default();
        self.admit(&mut tally);
        let correct = Tally {
            correct: 1,
            ..Tally::default()
        };
        assert_eq!(tally, correct);
    }
}

/// Stops the clients even if the fault panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
