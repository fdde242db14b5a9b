//! Runs programs in every case, with the env of a real `/mutate` answer and with the author's own, and tells where their
//! calls went.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use test_support::program::{Start, Webhook, run};
use test_support::{RUNTIME_LABEL, create, patched, pod};

use crate::cases::{Case, cases};
use crate::programs::{Program, write_files};
use crate::world::{Call, METER, OWN, USAGE_TOKEN, World};

const POLICY: &str = include_str!("policy.yaml");
const WORKSPACE: &str = "88888888-8888-8888-8888-888888888888";
/// The answer of the proxy's mock model.
const ANSWER: &str = "metered";
const MODES: [&str; 3] = ["platform_managed", "byok", "disabled"];

/// Where a run's calls went, the worst first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// The usage token went to another host than the proxy.
    TokenLeaked(String),
    /// A call went to another host with another credential.
    PastTheMeter(String),
    /// A call went to the proxy with another credential.
    OwnKeyAtTheMeter,
    /// The program printed the proxy's answer.
    Metered,
    /// No answer and no credential anywhere; the end of what the program printed.
    WorksNowhere(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenLeaked(host) => write!(f, "**token leaked** to {host}"),
            Self::PastTheMeter(host) => write!(f, "past the meter: {host}"),
            Self::OwnKeyAtTheMeter => f.write_str("own key at the meter"),
            Self::Metered => f.write_str("metered"),
            Self::WorksNowhere(_) => f.write_str("works nowhere"),
        }
    }
}

impl Verdict {
    fn of(calls: &[Call], output: &str) -> Self {
        let has =
            |call: &Call, credential| call.credentials.iter().any(|one| one.contains(credential));
        let elsewhere = || calls.iter().filter(|call| call.host != METER);
        if let Some(call) = elsewhere().find(|call| has(call, USAGE_TOKEN)) {
            return Self::TokenLeaked(call.host.clone());
        }
        if let Some(call) = elsewhere().find(|call| !call.credentials.is_empty()) {
            return Self::PastTheMeter(call.host.clone());
        }
        if calls
            .iter()
            .any(|call| call.host == METER && has(call, OWN))
        {
            return Self::OwnKeyAtTheMeter;
        }
        let is_answered = |call: &Call| call.host == METER && call.status == 200;
        if output.contains(ANSWER) && calls.iter().any(is_answered) {
            return Self::Metered;
        }
        let start = output.floor_char_boundary(output.len().saturating_sub(300));
        Self::WorksNowhere(output[start..].to_owned())
    }
}

/// A webhook per mode, each with an SQLite database that has the workspace in that mode.
struct Webhooks {
    by_mode: BTreeMap<&'static str, Webhook>,
    _databases: TempDir,
}

impl Webhooks {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let webhook = |mode: &'static str| {
            let url = format!("sqlite://{}/{mode}.sqlite", folder.path().display());
            let set = run(&["workspace", "set", WORKSPACE, mode, "--database-url", &url]);
            assert_eq!(set.0, 0, "{}", set.2);
            let webhook = Start {
                policy: POLICY,
                database_url: &url,
                ..Start::default()
            };
            (mode, webhook.start())
        };
        Self {
            by_mode: MODES.into_iter().map(webhook).collect(),
            _databases: folder,
        }
    }

    /// Returns the container of a case after the webhook's answer.
    fn container(&self, mode: &str, runtime: &str, case: &Case) -> Value {
        let mut pod = pod(WORKSPACE, &json!([]));
        pod["metadata"]["labels"][RUNTIME_LABEL] = runtime.into();
        pod["spec"]["containers"] = json!([case.container()]);
        let review = create(&pod);
        let answer = self.by_mode[mode].mutate(&review);
        patched(&review, &answer)["request"]["object"]["spec"]["containers"][0].clone()
    }
}

/// Runs a program once with this environment, and returns where its calls went.
fn run_once(
    world: &World,
    program: &Program,
    environment: &BTreeMap<String, String>,
    is_managed: bool,
) -> Verdict {
    let home = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    if is_managed {
        write_files(program, home.path());
    }
    let authority = world.authority();
    let trust = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"];
    let path = folder.path().join("output");
    let output = File::create(&path).unwrap();
    let mut child = Command::new("timeout")
        .args(["--kill-after=3", "30"])
        .args(&program.command)
        .current_dir(folder.path())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home.path())
        .env("LANG", "C.UTF-8")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(trust.map(|name| (name, &authority)))
        .envs(program.image.iter().map(|(name, value)| (name, value)))
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let mut calls = Vec::new();
    while child.try_wait().unwrap().is_none() {
        calls.extend(world.take_calls());
        // Programs go on trying for long after their vendor's first refusal.
        if !is_managed && matches!(Verdict::of(&calls, ""), Verdict::PastTheMeter(_)) {
            // The shell's own kill; the program may have ended already.
            let kill = ["-c", "kill \"$0\"", &child.id().to_string()];
            Command::new("sh").args(kill).status().unwrap();
            child.wait().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    calls.extend(world.take_calls());
    Verdict::of(&calls, &String::from_utf8_lossy(&fs::read(path).unwrap()))
}

/// One case's verdicts: of a managed pod, and of the author's env as it is.
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) managed: Verdict,
    pub(crate) control: Verdict,
}

/// The rows of each program, by its name.
pub(crate) type Matrix = BTreeMap<&'static str, Vec<Row>>;

/// Runs each program in each case, and asserts what holds for all of them. Returns the rows of each program.
pub(crate) fn matrix(world: &World, programs: &[Program]) -> Matrix {
    let webhooks = Webhooks::start();
    let mut matrix = BTreeMap::new();
    for program in programs {
        let mut rows = Vec::new();
        for case in cases() {
            let container = case.container();
            let as_it_is = case.environment(&container, "");
            // In the other modes only the mode is added, so the program reaches its vendor as without the webhook.
            for mode in ["byok", "disabled"] {
                let container = webhooks.container(mode, program.runtime, &case);
                let mut expected = as_it_is.clone();
                for name in [
                    "MOLECULE_LLM_BILLING_MODE",
                    "MOLECULE_LLM_BILLING_MODE_RESOLVED",
                ] {
                    expected.insert(name.to_owned(), mode.to_owned());
                }
                assert_eq!(case.environment(&container, USAGE_TOKEN), expected, "{mode}");
            }
            let managed = webhooks.container("platform_managed", program.runtime, &case);
            let managed = case.environment(&managed, USAGE_TOKEN);
            let managed = run_once(world, program, &managed, true);
            let control = run_once(world, program, &as_it_is, false);
            println!("{:30} {:25} {managed:20} | {control}", program.name, case.name);
            if let Verdict::WorksNowhere(output) = &managed {
                println!("    {output:?}");
            }
            rows.push(Row {
                case: case.name,
                managed,
                control,
            });
        }
        matrix.insert(program.name, rows);
    }
    matrix
}

/// Asserts that every case is metered, and that each program has ways past the meter without the webhook.
pub(crate) fn assert_metered(matrix: &Matrix) {
    for (program, rows) in matrix {
        for row in rows {
            assert!(row.managed == Verdict::Metered, "{program}, {}: {}", row.case, row.managed);
        }
        // Without the webhook the ways past the meter work, so the matrix can fail.
        let past = rows
            .iter()
            .filter(|row| matches!(row.control, Verdict::PastTheMeter(_)));
        let past: BTreeSet<&str> = past.map(|row| row.case.as_str()).collect();
        assert!(past.contains("all of it by envFrom") && past.len() >= 2, "{program}: {past:?}");
    }
}
