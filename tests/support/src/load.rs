//! Admissions of a byok workspace's pod, asked without a break while something goes on, and counted by how
//! they ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::Agent;

use super::{create, pod};

/// The byok workspace.
pub const BYOK: &str = "88888888-8888-8888-8888-888888888888";
/// What the API server says that it waits at most.
const PATIENCE: Duration = Duration::from_secs(5);

/// A table with that workspace, for PostgreSQL.
pub fn schema() -> String {
    format!(
        "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);
         INSERT INTO workspaces VALUES ('{BYOK}', 'byok')"
    )
}

/// `lookup.timeout` for tests in which no lookup may fail, however busy the machine is: nearly all the time that there
/// is.
pub const PATIENT: &str = "4s";

/// How admissions ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Admitted as byok.
    pub right: usize,
    /// As the policy says for a failed lookup: refused with its code, or platform_managed with a warning.
    pub as_the_policy_says: usize,
    /// Anything else, no answer included.
    pub wrong: Vec<String>,
    /// No answer before the API server gives up.
    pub hung: usize,
}

/// Who asks, where, and what the policy there says about a failed lookup.
pub struct Asker {
    pub client: Agent,
    pub port: u16,
    pub on_error: &'static str,
}

impl Asker {
    /// Asks once.
    pub fn ask(&self, tally: &mut Tally) {
        let started = Instant::now();
        let answer = self.answer();
        if started.elapsed() >= PATIENCE {
            tally.hung += 1;
            return;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return tally.wrong.push(error.to_string()),
        };
        let response = &answer["response"];
        let of = |name: &str| response["auditAnnotations"][name].as_str();
        let allowed = response["allowed"] == true;
        match (self.on_error, allowed, of("mode"), of("reason")) {
            (_, true, Some("byok"), Some("override")) => tally.right += 1,
            ("platform_managed", true, Some("platform_managed"), Some("lookup_error"))
                if response["warnings"][0].is_string() =>
            {
                tally.as_the_policy_says += 1
            }
            ("deny", false, _, Some("lookup_error")) if response["status"]["code"] == 503 => {
                tally.as_the_policy_says += 1
            }
            _ => tally.wrong.push(answer.to_string()),
        }
    }

    fn answer(&self) -> Result<Value, ureq::Error> {
        let (port, seconds) = (self.port, PATIENCE.as_secs());
        let mut response = self
            .client
            .post(format!(
                "https://localhost:{port}/mutate?timeout={seconds}s"
            ))
            .header("content-type", "application/json")
            .send(create(&pod(BYOK, &json!([]))).to_string())?;
        let text = response.body_mut().read_to_string()?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Asks from several clients without a break, each at least once, until what goes on is over. Prints a
    /// line of the table in docs/reliability.md. That one is wrong or hangs fails the test.
    #[expect(clippy::print_stdout, reason = "scripts/faults shows it")]
    pub fn ask_during(&self, name: &str, clients: usize, goes_on: impl FnOnce()) -> Tally {
        let over = AtomicBool::new(false);
        let client = || {
            let mut tally = Tally::default();
            self.ask(&mut tally);
            while !over.load(Ordering::Relaxed) {
                self.ask(&mut tally);
            }
            tally
        };
        let mut all = Tally::default();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
            let until_the_end = SetAtEnd(&over);
            goes_on();
            drop(until_the_end);
            for client in clients {
                let one = client.join().unwrap();
                all.right += one.right;
                all.as_the_policy_says += one.as_the_policy_says;
                all.wrong.extend(one.wrong);
                all.hung += one.hung;
            }
        });
        let (right, said) = (all.right, all.as_the_policy_says);
        let (wrong, hung) = (all.wrong.len(), all.hung);
        let tried = right + said + wrong + hung;
        let on_error = self.on_error;
        println!("| {name} | `{on_error}` | {tried} | {right} | {said} | {wrong} | {hung} |");
        assert!(wrong == 0 && hung == 0, "{name}: {all:?}");
        all
    }

    /// The very next answer is right.
    pub fn is_right(&self) {
        let mut tally = Tally::default();
        self.ask(&mut tally);
        let right = Tally {
            right: 1,
            ..Tally::default()
        };
        assert_eq!(tally, right);
    }
}

/// Ends the clients even if what goes on panics.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
