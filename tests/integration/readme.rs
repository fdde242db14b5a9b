//! The README's transcripts and its quick start match what the program does. Other pages are in docs.rs.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use test_support::program::program;
use test_support::transcript::{assert_transcripts, page};
use test_support::{env_map, patched};

#[test]
fn readme_transcripts_match_the_program() {
    assert_transcripts("README.md", 1, &[], |_| true);
}

#[test]
fn dev_servers_curl_line_gets_its_patch() {
    assert!(page("README.md").contains("cargo run -- serve --dev"));
    let folder = tempfile::tempdir().unwrap();
    let ports = [
        "--listen",
        "127.0.0.1:0",
        "--health-listen",
        "127.0.0.1:0",
        "--drain-delay",
        "0s",
    ];
    let mut child = program(&[&["serve", "--dev"], &ports[..]].concat())
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    let curl = lines
        .into_iter()
        .find(|line| line.starts_with("curl "))
        .unwrap();
    let answer = Command::new("sh")
        .args(["-c", &curl])
        .output()
        .expect("curl is not installed; scripts/check installs it");
    let answer: Value = serde_json::from_slice(&answer.stdout).unwrap();
    assert!(
        Command::new("kill")
            .arg(child.id().to_string())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let body = curl.split(" -d '").nth(1).unwrap().trim_end_matches('\'');
    let review: Value = serde_json::from_str(body).unwrap();
    let after = patched(&review, &answer);
    let proxy = "https://llm-proxy.example.test";
    let token = json!({"secretKeyRef": {"name": "molecule-llm-proxy", "key": "usage-token"}});
    let expected = json!({
        "MOLECULE_LLM_BILLING_MODE": "platform_managed",
        "MOLECULE_LLM_BILLING_MODE_RESOLVED": "platform_managed",
        "MOLECULE_LLM_BASE_URL": format!("{proxy}/openai/v1"),
        "MOLECULE_LLM_USAGE_TOKEN": token,
        "MOLECULE_LLM_ANTHROPIC_BASE_URL": format!("{proxy}/anthropic"),
        "ANTHROPIC_API_KEY": token,
        "ANTHROPIC_BASE_URL": format!("{proxy}/anthropic"),
        "MODEL": "opus",
    });
    assert_eq!(json!(env_map(&after["request"]["object"]["spec"]["containers"][0])), expected);
    // The file stays, so that the next start keeps edits to it.
    assert!(folder.path().join("llm-billing-dev.sqlite").exists());
}
