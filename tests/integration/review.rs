//! `review`: every workload as users write it, in each output, with its exit code; and the inputs that it
//! cannot use.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use test_support::program::{program, run, shown};
use test_support::{PROXY, fixtures, recorded_reviews};

/// A folder with the policy and this file; the file's path.
fn files(name: &str, text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("policy.yaml"), PROXY).unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

/// Reviews a text as a file, with the proxy's policy.
fn review(text: &str, arguments: &[&str]) -> (i32, String, String) {
    let (folder, path) = files("manifest.yaml", text);
    let policy = folder.path().join("policy.yaml");
    run(&[
        &["review", "-f", &path, "--policy", policy.to_str().unwrap()],
        arguments,
    ]
    .concat())
}

fn workloads() -> Vec<(String, String)> {
    let entries = fs::read_dir(fixtures("workloads"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let name = |path: &std::path::Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let mut workloads: Vec<_> = entries
        .map(|path| (name(&path), fs::read_to_string(path).unwrap()))
        .collect();
    workloads.sort();
    workloads
}

#[test]
fn every_workload_gets_the_diff_and_the_patch_of_its_snapshot() {
    let workloads = workloads();
    assert_eq!(workloads.len(), 9);
    insta::with_settings!({snapshot_path => fixtures("snapshots"), prepend_module_to_snapshot => false, omit_expression => true}, {
        for (name, text) in &workloads {
            for mode in ["platform_managed", "byok", "disabled"] {
                let mut whole = String::new();
                for output in ["diff", "patch"] {
                    let (code, stdout, stderr) = review(text, &["--mode", mode, "-o", output]);
                    whole.push_str(&format!("$ review -o {output} --mode {mode}\n{stdout}--- stderr\n{stderr}--- exit code {code}\n"));
                }
                insta::assert_snapshot!(format!("review-{name}.{mode}"), whole);
            }
        }
    });
}

#[test]
fn the_outputs_agree_and_a_second_review_has_nothing_to_change() {
    for (name, text) in workloads() {
        let output =
            |output: &str, text: &str| review(text, &["--mode", "platform_managed", "-o", output]);
        let (_, yaml, _) = output("yaml", &text);
        let (_, json, _) = output("json", &text);
        let of_yaml: Value = serde_saphyr::from_str(&yaml).unwrap();
        let of_json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(of_yaml, of_json, "{name}");
        let mut patched: Value = serde_saphyr::from_str(&text).unwrap();
        let patch: json_patch::Patch = serde_json::from_str(&output("patch", &text).1).unwrap();
        json_patch::patch(&mut patched, &patch).unwrap();
        assert_eq!(patched, of_json, "{name}");
        let (code, diff, _) = output("diff", &yaml);
        assert_eq!((code, diff.as_str()), (0, ""), "{name}");
    }
}

#[test]
fn every_warning_is_shown_however_many_there_are_and_however_long() {
    let alias = |index: usize| json!({"name": format!("A{index}"), "valueFrom": {"secretKeyRef": {"name": "s", "key": "HF_TOKEN"}}});
    let name = "x".repeat(300);
    let env: Vec<Value> = (0..20).map(alias).collect();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"molecule.ai/workspace-id": ""}}, "spec": {"containers": [{"name": name, "env": env}]}});
    let (_, _, stderr) = review(&pod.to_string(), &[]);
    let warnings = stderr.lines().filter(|line| {
        line.starts_with("warning: ")
            && line.ends_with(" brings vendor key HF_TOKEN under another name, and stays")
    });
    assert_eq!(warnings.count(), 20, "{stderr}");
}

#[test]
fn a_recorded_review_gets_the_patch_that_the_webhook_gives() {
    for (name, recorded) in recorded_reviews() {
        let (code, patch, _) = review(&recorded.to_string(), &["--mode", "byok", "-o", "patch"]);
        let policy = llm_billing_webhook::core::policy::Policy::parse(PROXY).unwrap();
        let stored = test_support::in_process::stored("byok");
        let expected = test_support::patch_of(&test_support::in_process::answer(
            &policy, &stored, &recorded,
        ));
        assert_eq!(
            serde_json::from_str::<Value>(&patch).unwrap(),
            expected,
            "{name}"
        );
        assert_eq!(code, i32::from(expected != json!([])), "{name}");
    }
}

#[test]
fn several_documents_and_lists_are_reviewed_one_by_one() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: beside}
---
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: plain}
- apiVersion: batch/v1
  kind: CronJob
  metadata: {name: nightly}
  spec: {jobTemplate: {spec: {template: {metadata: {labels: {molecule.ai/workspace-id: ''}}, spec: {containers: [{name: c}]}}}}}
";
    let (code, stdout, stderr) = review(text, &["-o", "patch", "--mode", "byok", "-n", "team"]);
    assert_eq!(code, 1, "{stderr}");
    let patches: Vec<Value> = serde_json::Deserializer::from_str(&stdout)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(patches.len(), 3);
    assert_eq!(patches[..2], [json!([]), json!([])]);
    assert_eq!(
        patches[2][0]["path"],
        "/spec/jobTemplate/spec/template/spec/containers/0/env"
    );
    assert_eq!(
        stderr,
        "Service team/beside: makes no pods, and stays as it is\n\
         Pod team/plain: has no label molecule.ai/workspace-id, and stays as it is\n\
         CronJob team/nightly: platform_managed (constant_fallback, missing_workspace_id)\n"
    );
}

#[test]
fn the_mode_comes_from_the_database_unless_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("review.sqlite");
    let id = "88888888-8888-8888-8888-888888888888";
    test_support::sqlite(
        &file,
        &format!(
            "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT); INSERT INTO workspaces VALUES ('{id}', 'byok')"
        ),
    );
    let url = format!("sqlite://{}", file.display());
    let text = fs::read_to_string(fixtures("workloads/01-claude-code-pod.yaml")).unwrap();
    let said = |arguments: &[&str]| review(&text, arguments).2;
    assert_eq!(
        said(&["--database-url", &url]),
        "Pod ws-acme/ws-claude: byok (workspace_override, override)\n"
    );
    assert_eq!(
        said(&["--database-url", &url, "--mode", "disabled"]),
        "Pod ws-acme/ws-claude: disabled (workspace_override, override)\n"
    );
    let (code, stdout, stderr) = review(&text, &[]);
    let remedy = "error: Pod ws-acme/ws-claude: no database is given; set --database-url, or --mode to do without\n";
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (2, "", remedy));
    let (code, _, stderr) = review(&text, &["--database-url", "sqlite:///nonexistent/file"]);
    assert_eq!(code, 2);
    assert!(
        stderr.starts_with("error: Pod ws-acme/ws-claude: the database could not be asked: "),
        "{stderr}"
    );
}

#[test]
fn standard_input_is_read_and_colour_is_used_when_asked_for() {
    let text = "{apiVersion: v1, kind: Pod, metadata: {name: p, labels: {molecule.ai/workspace-id: ''}}, spec: {containers: [{name: c}]}}";
    let (folder, _) = files("unused", "");
    let policy = folder.path().join("policy.yaml");
    let mut child = program(&[
        "review",
        "-f",
        "-",
        "--color",
        "always",
        "--policy",
        policy.to_str().unwrap(),
    ])
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let (code, stdout, _) = shown(&child.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(
        stdout.contains("\u{1b}[32m+    - name: MOLECULE_LLM_BILLING_MODE\u{1b}[0m\n"),
        "{stdout}"
    );
    assert!(!review(text, &[]).1.contains('\u{1b}'));
}

#[test]
fn text_that_only_looks_like_a_number_or_a_truth_stays_text() {
    let texts = [
        "0123",
        "1e3",
        "null",
        "true",
        "yes",
        "on",
        "~",
        "",
        " x ",
        "1.0",
        "0x1f",
        "2026-11-24",
        "=",
        "<<",
        "a: b",
        "# c",
        "'",
        "\"",
        "\\",
        "\t",
        "é\u{0}x",
        "a\nb\n",
    ];
    let env: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"name": format!("V{index}"), "value": text}))
        .collect();
    let labels = json!({"molecule.ai/workspace-id": ""});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": labels}, "spec": {"containers": [{"name": "c", "env": env}]}});
    let (_, yaml, _) = review(&pod.to_string(), &["-o", "yaml"]);
    let after: Value = serde_saphyr::from_str(&yaml).unwrap();
    let entries = after["spec"]["containers"][0]["env"].as_array().unwrap();
    assert_eq!(entries[entries.len() - env.len()..], env);
}

#[test]
fn numbers_and_truths_are_read_as_kubectl_reads_them() {
    let pod = r#"
apiVersion: v1
kind: Pod
metadata: {name: p, labels: {molecule.ai/workspace-id: ""}}
spec:
  hostNetwork: yes
  terminationGracePeriodSeconds: 0x1e
  containers: [{name: c}]
  volumes: [{name: v, secret: {secretName: s, defaultMode: 0440}}]
"#;
    let (_, json, _) = review(pod, &["-o", "json"]);
    let after: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(after["spec"]["hostNetwork"], true);
    assert_eq!(after["spec"]["terminationGracePeriodSeconds"], 30);
    assert_eq!(after["spec"]["volumes"][0]["secret"]["defaultMode"], 0o440);
}

#[test]
fn what_cannot_be_reviewed_is_named_with_its_place_and_nothing_else_is_lost() {
    let table = [
        (
            "a: [",
            "error: cannot read FILE: line 1, column 4: this is not valid YAML\n",
        ),
        (
            "{\"a\": x]",
            "error: cannot read FILE: line 1, column 7: this is not valid JSON\n",
        ),
        (
            "",
            "error: FILE has no object that makes pods; expected a Pod, a workload, a List or an AdmissionReview of pods\n",
        ),
        (
            "kind: Service",
            "error: FILE has no object that makes pods; expected a Pod, a workload, a List or an AdmissionReview of pods\n",
        ),
        (
            "{apiVersion: apps/v1, kind: Deployment, metadata: {name: d}, spec: {}}",
            "error: Deployment default/d: UNREADABLE_REQUEST: spec.template is missing or has the wrong type; correct it and send the pod again\n",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: d}, spec: {containers: [{env: [{name: A, value: 1}]}]}}",
            "error: Pod default/d: UNREADABLE_REQUEST: spec.containers[0].env[0].value is missing or has the wrong type; correct it and send the pod again\n",
        ),
    ];
    for (text, expected) in table {
        let (_folder, path) = files("manifest", text);
        let (code, stdout, stderr) = run(&["review", "-f", &path, "--mode", "byok"]);
        assert_eq!(
            (
                code,
                stdout.as_str(),
                stderr.replace(&path, "FILE").as_str()
            ),
            (2, "", expected),
            "{text}"
        );
    }
    let missing = run(&["review", "-f", "/nonexistent.yaml"]);
    assert_eq!(
        missing.2,
        "error: cannot read /nonexistent.yaml: No such file or directory (os error 2)\n"
    );
    // One that is refused does not hide the others.
    let pod = |name: &str, value: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{molecule.ai/workspace-id: ''}}}}, spec: {{containers: [{{env: [{{name: A, value: {value}}}]}}]}}}}"
        )
    };
    let (code, stdout, _) = review(
        &format!("{}\n---\n{}\n", pod("wrong", "1"), pod("right", "one")),
        &[],
    );
    assert_eq!(code, 2);
    assert!(stdout.starts_with("--- Pod default/right\n"), "{stdout}");
    let (_, _, stderr) = run(&["review", "-f", "x", "--mode", "BYOK"]);
    assert!(
        stderr.contains("expected one of platform_managed, byok, disabled"),
        "{stderr}"
    );
}

#[test]
fn a_reader_that_has_seen_enough_does_not_change_the_verdict() {
    let pod = "tests/fixtures/workloads/01-claude-code-pod.yaml";
    for (arguments, code) in [
        (&["review", "-f", pod, "--mode", "byok"][..], 1),
        (&["review", "-f", pod, "--mode", "platform_managed"], 2),
        (&["policy", "default"], 0),
    ] {
        let mut child = program(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(code), "{arguments:?}");
    }
}
