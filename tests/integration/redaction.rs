//! Secrets never appear in output: no env value, token or password in a run at the most verbose log level, nor in
//! any error that could quote one.

use std::fs;

use serde_json::json;

use test_support::postgres::{PASSWORD, Postgres};
use test_support::program::{Start, run};
use test_support::{create, patch_of, pod};

const TOKEN: &str = "literal-usage-token-0123456789";
const KEYS: [&str; 3] = [
    "sk-own-vendor-key-0123456789",
    "hf-another-key-0123456789",
    "value-that-stays-0123456789",
];
const ID: &str = "88888888-8888-8888-8888-888888888888";

fn policy() -> String {
    format!("proxy: {{baseUrl: https://proxy.example.test, usageToken: {{value: {TOKEN}}}}}")
}

fn assert_no_secret(what: &str, text: &str) {
    for secret in KEYS.iter().chain([&TOKEN, &PASSWORD]) {
        assert!(!text.contains(secret), "{secret} is in {what}:\n{text}");
    }
}

#[test]
fn run_at_trace_level_shows_no_secret() {
    let schema = format!(
        "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'platform_managed')"
    );
    let postgres = Postgres::with(&schema);
    let policy = &policy();
    let [key, other, unmanaged] = KEYS;
    let env = json!([
        {"name": "OPENAI_API_KEY", "value": key},
        {"name": "HF_TOKEN", "value": other},
        {"name": "KEEP", "value": unmanaged},
        {"name": "USES", "value": format!("$(HF_TOKEN) {unmanaged}")},
        {"name": "ANTHROPIC_BASE_URL", "value": unmanaged},
    ]);
    let review = create(&pod(ID, &env));
    let mut broken = review.clone();
    broken["request"]["object"]["spec"]["containers"][0]["env"][0]["value"] = json!([key]);
    let not_json = review.to_string().replace("\"KEEP\"", "KEEP");
    let database_urls = [
        postgres.url(),
        postgres.url_with("another-password-0123456789"),
        format!("postgres://reader@localhost/x?host=/nonexistent&passwd={PASSWORD}"),
    ];
    for (index, database_url) in database_urls.iter().enumerate() {
        let webhook = Start {
            policy,
            database_url,
            log: "trace",
            ..Start::default()
        }
        .start();
        let answer = webhook.mutate(&review);
        let mut without_patch = answer.clone();
        without_patch["response"]
            .as_object_mut()
            .unwrap()
            .remove("patch");
        assert_no_secret("the answer", &without_patch.to_string());
        assert_eq!(
            without_patch["response"]["warnings"]
                .as_array()
                .unwrap()
                .len(),
            if index == 0 { 3 } else { 4 }
        );
        // The patch sets the token, and repeats no value from the pod.
        let patch = patch_of(&answer).to_string();
        assert!(patch.contains(TOKEN));
        assert_no_secret("the patch", &patch.replace(TOKEN, ""));
        let refused = webhook.validate(&review);
        assert_eq!(refused["response"]["allowed"], false);
        assert_no_secret("the refusal", &refused.to_string());
        assert_no_secret("the refusal of a wrong type", &webhook.mutate(&broken).to_string());
        let mut bad = webhook.post("/mutate", "application/json", not_json.as_bytes());
        assert_no_secret("the answer to a bad request", &bad.body_mut().read_to_string().unwrap());
        let metrics = webhook.health("/metrics").1;
        assert_no_secret("the metrics", &metrics);
        // The policy's checksum would confirm a guessed token.
        assert!(!metrics.contains("llm_billing_policy_info"), "{metrics}");
        webhook.signal("TERM");
        let mut webhook = webhook;
        webhook.wait();
        let log = webhook.log();
        assert!(log.contains("\"admission\""), "{log}");
        assert_no_secret("the log", &log);
        assert!(!log.contains("another-password-0123456789"));
    }
}

#[test]
fn errors_quote_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name).to_str().unwrap().to_owned();
        fs::write(&path, text).unwrap();
        path
    };
    let [key, other, _] = KEYS;
    let commands = [
        vec![
            "check".to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:notaport/x"),
        ],
        vec![
            "check".to_owned(),
            "--database-url".to_owned(),
            format!("mysql://u:{PASSWORD}@127.0.0.1/x"),
        ],
        vec![
            "check".to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:1/x?sslmode={PASSWORD}"),
        ],
        vec![
            "check".to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:1/x?sslmode=require&sslpassword={PASSWORD}"),
        ],
        vec![
            "check".to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:1/x"),
        ],
        vec![
            "resolve".to_owned(),
            ID.to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:1/x"),
        ],
        vec![
            "workspace".to_owned(),
            "list".to_owned(),
            "--database-url".to_owned(),
            format!("postgres://u:{PASSWORD}@127.0.0.1:1/x"),
        ],
        vec![
            "check".to_owned(),
            "--policy".to_owned(),
            write("token.yaml", &format!("proxy:\n  usageToken: {TOKEN}\n")),
        ],
        vec![
            "check".to_owned(),
            "--policy".to_owned(),
            write("syntax.yaml", &format!("proxy:\n  usageToken: {{value: {TOKEN}\n  baseUrl: x")),
        ],
        vec![
            "check".to_owned(),
            "--policy".to_owned(),
            write("beside.yaml", &format!("proxy:\n  usageToken: {{value: {TOKEN}}}\n  wrong: x")),
        ],
        vec![
            "review".to_owned(),
            "-f".to_owned(),
            write(
                "value.yaml",
                &format!(
                    "apiVersion: v1\nkind: Pod\nspec: {{containers: [{{env: [{{name: A, value: [{key}]}}]}}]}}"
                ),
            ),
        ],
        vec![
            "review".to_owned(),
            "-f".to_owned(),
            write(
                "syntax-2.yaml",
                &format!(
                    "apiVersion: v1\nkind: Pod\nspec: {{containers: [{{env: [{{name: A, value: {key}\nb: {other}: x"
                ),
            ),
        ],
        vec![
            "review".to_owned(),
            "-f".to_owned(),
            write(
                "syntax.json",
                &format!("{{\"kind\": \"Pod\", \"spec\": {{\"env\": \"{key}\", {other}}}}}"),
            ),
        ],
    ];
    for arguments in commands {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, stdout, stderr) = run(&arguments);
        assert_eq!(code, 2, "{arguments:?}");
        assert_no_secret("the output", &format!("{stdout}{stderr}"));
    }
}
