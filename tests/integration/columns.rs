//! Schemas and variables of the operator's own: the worked examples of docs/configuration.md and wrong columns, on
//! PostgreSQL and SQLite.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::database::fail_to_start;
use test_support::api_server::ApiServer;
use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook, decode_output, program, run};
use test_support::{WORKSPACE_LABEL, create, defaulted, env_map, fixtures, patch_of, patched, pod};

const MANAGED: &str = "11111111-1111-4111-8111-111111111111";
const BYOK: &str = "22222222-2222-4222-8222-222222222222";
const UNDECIDED: &str = "33333333-3333-4333-8333-333333333333";
const UNKNOWN: &str = "99999999-9999-4999-8999-999999999999";

/// A database of one kind with a schema.
struct Database {
    folder: tempfile::TempDir,
    url: String,
    postgres: Option<Postgres>,
}

impl Database {
    fn both(schema: &str) -> [Self; 2] {
        let postgres = Postgres::with(schema);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("database.sqlite");
        test_support::sqlite(&file, schema);
        let sqlite = Self {
            url: format!("sqlite://{}", file.display()),
            folder,
            postgres: None,
        };
        let postgres = Self {
            folder: tempfile::tempdir().unwrap(),
            url: postgres.url(),
            postgres: Some(postgres),
        };
        [postgres, sqlite]
    }

    fn execute(&self, statement: &str) {
        match &self.postgres {
            Some(postgres) => postgres.execute(statement),
            None => test_support::sqlite(&self.folder.path().join("database.sqlite"), statement),
        }
    }

    fn write(&self, name: &str, text: &str) -> String {
        let file = self.folder.path().join(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

fn example(name: &str) -> (String, String) {
    let read = |extension: &str| {
        let file = fixtures("schemas").join(format!("{name}.{extension}"));
        fs::read_to_string(file).unwrap()
    };
    (read("sql"), read("yaml"))
}

/// Returns the variables that the webhook leaves in a pod which asks for two of its own.
fn env_of(webhook: &Webhook, workspace: &str) -> BTreeMap<String, Value> {
    let own = json!([
        {"name": "MOLECULE_RESOLVED_PROVIDER", "value": "own"},
        {"name": "ANTHROPIC_API_KEY", "value": "own"},
    ]);
    let review = create(&pod(workspace, &own));
    let answer = webhook.mutate(&review);
    let changed = patched(&review, &answer);
    assert_eq!(patch_of(&webhook.mutate(&defaulted(&changed))), json!([]));
    env_map(&changed["request"]["object"]["spec"]["containers"][0])
}

fn entries(entries: &[(&str, &str)]) -> BTreeMap<String, Value> {
    let token = json!({"secretKeyRef": {"name": "molecule-llm-proxy", "key": "usage-token"}});
    let value = |value: &str| match value {
        "TOKEN" => token.clone(),
        value => value.into(),
    };
    let entries = entries.iter();
    entries
        .map(|(name, text)| ((*name).to_owned(), value(text)))
        .collect()
}

/// Returns the expected variables: the mode's two, those of the proxy if there is a base URL, and these.
fn expected(mode: &str, base_url: Option<&str>, more: &[(&str, &str)]) -> BTreeMap<String, Value> {
    let mut all = entries(&[
        ("MOLECULE_LLM_BILLING_MODE", mode),
        ("MOLECULE_LLM_BILLING_MODE_RESOLVED", mode),
    ]);
    all.extend(entries(more));
    match base_url {
        Some(url) => all.extend(entries(&[
            ("MOLECULE_LLM_BASE_URL", url),
            ("MOLECULE_LLM_USAGE_TOKEN", "TOKEN"),
            ("OPENAI_API_KEY", "TOKEN"),
            ("OPENAI_BASE_URL", url),
        ])),
        None => all.extend(entries(&[("ANTHROPIC_API_KEY", "own")])),
    }
    all
}

#[test]
fn examples_give_each_workspace_its_variables() {
    let fixed = Some("https://llm.example.com/openai/v1");
    let own = [("MOLECULE_RESOLVED_PROVIDER", "own")];
    let provider = |name| [("MOLECULE_RESOLVED_PROVIDER", name)];
    let table = [
        ("mode", MANAGED, expected("platform_managed", fixed, &own)),
        ("mode", BYOK, expected("byok", None, &own)),
        ("mode", UNDECIDED, expected("platform_managed", fixed, &own)),
        ("mode", UNKNOWN, expected("platform_managed", fixed, &own)),
        (
            "provider",
            MANAGED,
            expected(
                "platform_managed",
                Some("https://llm.example.com/acme/openai/v1"),
                &provider("platform"),
            ),
        ),
        ("provider", BYOK, expected("byok", None, &provider("anthropic"))),
        // A NULL column: the variable is removed.
        (
            "provider",
            UNDECIDED,
            expected("platform_managed", Some("https://llm.example.com/globex/openai/v1"), &[]),
        ),
    ];
    for name in ["mode", "provider"] {
        let (schema, policy) = example(name);
        for database in Database::both(&schema) {
            let start = Start {
                policy: &policy,
                database_url: &database.url,
                ..Start::default()
            };
            let webhook = start.start();
            for (_, workspace, expected) in table.iter().filter(|(example, ..)| *example == name) {
                let env = env_of(&webhook, workspace);
                assert_eq!(env, *expected, "{name} {workspace} {}", database.url);
            }
            let log = webhook.log();
            assert!(log.contains("\"admission\"") && !log.contains("globex"), "{log}");
        }
    }
    // Without a row there is no organisation for the base URL.
    let (schema, policy) = example("provider");
    let [database, _] = Database::both(&schema);
    let start = Start {
        policy: &policy,
        database_url: &database.url,
        ..Start::default()
    };
    let answer = start.start().mutate(&create(&pod(UNKNOWN, &json!([]))));
    let message = answer["response"]["status"]["message"].as_str().unwrap();
    let refusal = "MISSING_COLUMN: MOLECULE_LLM_BASE_URL needs the column \"org\" of the workspace's row, and it is NULL or \
                   blank, or the workspace has no row; ";
    assert!(message.starts_with(refusal), "{message}");
}

#[test]
fn review_and_audit_use_the_columns() {
    for name in ["mode", "provider"] {
        let (schema, policy) = example(name);
        for database in Database::both(&schema) {
            let policy = database.write("policy.yaml", &policy);
            let databases = ["--policy", &policy, "--database-url", &database.url];
            let api = ApiServer::start();
            let kubeconfig = api.kubeconfig(database.folder.path(), None);
            let namespace =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ws-acme"}});
            api.create_all([&namespace]);
            for workspace in [MANAGED, BYOK, UNDECIDED] {
                let mut pod = json!({
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": format!("p-{}", &workspace[..4]), "namespace": "ws-acme", "labels": {WORKSPACE_LABEL: workspace}},
                    "spec": {"containers": [{"name": "agent", "image": "busybox", "env": [
                        {"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": {"name": "own", "key": "k"}}},
                    ]}]},
                });
                let manifest = database.write("pod.json", &pod.to_string());
                let arguments =
                    [&["review", "-f", &manifest, "-o", "patch"][..], &databases].concat();
                let (code, stdout, stderr) = run(&arguments);
                assert_eq!(code, 1, "{stderr}");
                let patch: json_patch::Patch = serde_json::from_str(&stdout).unwrap();
                json_patch::patch(&mut pod, &patch).unwrap();
                api.create_all([&pod]);
            }
            let audit = || {
                let mut command = program(&["audit", "-A", "-o", "json"]);
                command.args(databases).env("KUBECONFIG", &kubeconfig);
                let (code, stdout, stderr) = decode_output(&command.output().unwrap());
                let report: Value = serde_json::from_str(&stdout).unwrap_or_default();
                (code, report["pods"].clone(), stderr)
            };
            let (code, _, stderr) = audit();
            assert_eq!((code, stderr.as_str()), (0, "3 pods audited, all in sync\n"));
            if name == "provider" {
                database.execute(&format!(
                    "UPDATE workspaces SET provider = 'openai' WHERE id = '{BYOK}'"
                ));
                let (code, pods, _) = audit();
                assert_eq!(code, 1);
                assert_eq!(pods[1]["findings"], json!(["wrong_variable"]));
                let details = json!(["container \"agent\": MOLECULE_RESOLVED_PROVIDER"]);
                assert_eq!(pods[1]["details"], details);
            }
        }
    }
}

#[test]
fn column_that_is_missing_or_no_text_is_named() {
    let (schema, policy) = example("provider");
    let [postgres, sqlite] = Database::both(&schema);
    let missing = policy.replace("org, provider\n", "provider\n");
    let number = policy.replace("org, provider\n", "7 AS org, provider\n");
    // As behind a pooler.
    let pooled = format!("{}&statement-cache-capacity=0", postgres.url);
    for (policy, url, error) in [
        (&missing, &postgres.url, "no column \"org\", which the policy's variables or proxy name"),
        (&missing, &sqlite.url, "no column \"org\", which the policy's variables or proxy name"),
        (&missing, &pooled, "no column \"org\", which the policy's variables or proxy name"),
        (&number, &postgres.url, "a column \"org\" that is not text; cast it to text"),
    ] {
        let file = postgres.write("policy.yaml", policy);
        let (code, report, _) = run(&["check", "--policy", &file, "--database-url", url]);
        let error = format!("error database     the policy's query returns {error}\n");
        assert!(code == 2 && report.ends_with(&error), "{url}: {report}");
        let (code, stderr) = fail_to_start(policy, url);
        let error = error.trim_start_matches("error database     ");
        assert!(code == 2 && stderr.contains(error), "{stderr}");
    }
}

#[test]
fn unusable_value_fails_its_workspace_alone() {
    let (schema, policy) = example("provider");
    let policy = format!("{policy}unlabelled: ignore\n");
    for database in Database::both(&schema) {
        let long = "x".repeat(4097);
        database.execute(&format!("UPDATE workspaces SET provider = '{long}' WHERE id = '{BYOK}'"));
        let start = Start {
            policy: &policy,
            database_url: &database.url,
            ..Start::default()
        };
        let webhook = start.start();
        let reason = |workspace: &str| {
            let answer = webhook.mutate(&create(&pod(workspace, &json!([]))));
            answer["response"]["auditAnnotations"]["reason"].clone()
        };
        assert_eq!(reason(BYOK), "lookup_error");
        assert_eq!(reason(MANAGED), "override");
        let line = webhook.wait_for_log("lookup refused");
        let error = "the policy's query returns a value of more than 4096 bytes, or one with a NUL character, in column \\\"provider\\\"";
        assert!(line.contains(error) && !line.contains("xxxx"), "{line}");
    }
}
