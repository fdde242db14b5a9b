//! The `review` command: every fixture workload in each output format, exit codes, and errors for unusable input.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use test_support::program::{decode_output, program, run};
use test_support::{PROXY, fixtures, recorded_reviews};

/// Creates a folder with the policy and this file, and returns the folder and the file's path.
fn files(name: &str, text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("policy.yaml"), PROXY).unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

/// Runs `review` on a file with this text, under a policy with a proxy.
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
fn workload_diffs_and_patches_match_their_snapshots() {
    let workloads = workloads();
    assert_eq!(workloads.len(), 9);
    insta::with_settings!({snapshot_path => fixtures("snapshots"), prepend_module_to_snapshot => false, omit_expression => true}, {
        for (name, text) in &workloads {
            for mode in ["platform_managed", "byok", "disabled"] {
                let mut transcript = String::new();
                for output in ["diff", "patch"] {
                    let (code, stdout, stderr) = review(text, &["--mode", mode, "-o", output]);
                    transcript.push_str(&format!("$ review -o {output} --mode {mode}\n{stdout}--- stderr\n{stderr}--- exit code {code}\n"));
                }
                insta::assert_snapshot!(format!("review-{name}.{mode}"), transcript);
            }
        }
    });
}

#[test]
fn outputs_agree_and_a_second_review_changes_nothing() {
    for (name, text) in workloads() {
        let output =
            |output: &str, text: &str| review(text, &["--mode", "platform_managed", "-o", output]);
        let (_, yaml, _) = output("yaml", &text);
        let (_, json, _) = output("json", &text);
        let from_yaml: Value = serde_saphyr::from_str(&yaml).unwrap();
        let from_json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(from_yaml, from_json, "{name}");
        let mut patched: Value = serde_saphyr::from_str(&text).unwrap();
        let patch: json_patch::Patch = serde_json::from_str(&output("patch", &text).1).unwrap();
        json_patch::patch(&mut patched, &patch).unwrap();
        assert_eq!(patched, from_json, "{name}");
        let (code, diff, _) = output("diff", &yaml);
        assert_eq!((code, diff.as_str()), (0, ""), "{name}");
    }
}

#[test]
fn warnings_are_neither_dropped_nor_truncated() {
    let alias = |index: usize| json!({"name": format!("A{index}"), "valueFrom": {"secretKeyRef": {"name": "s", "key": "HF_TOKEN"}}});
    let name = "x".repeat(300);
    let env: Vec<Value> = (0..20).map(alias).collect();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"molecule.ai/workspace-id": ""}}, "spec": {"containers": [{"name": name, "env": env}]}});
    let (_, _, stderr) = review(&pod.to_string(), &[]);
    let warnings = stderr.lines().filter(|line| {
        line.starts_with("warning: ")
            && line.ends_with(" exposes vendor key HF_TOKEN under another name; not removed")
    });
    assert_eq!(warnings.count(), 20, "{stderr}");
}

#[test]
fn recorded_review_gets_the_webhooks_patch() {
    for (name, recorded) in recorded_reviews() {
        let (code, patch, _) = review(&recorded.to_string(), &["--mode", "byok", "-o", "patch"]);
        let policy = llm_billing_webhook::core::policy::Policy::parse(PROXY).unwrap();
        let stored = test_support::in_process::stored("byok");
        let expected =
            test_support::patch_of(&test_support::in_process::answer(&policy, &stored, &recorded));
        assert_eq!(serde_json::from_str::<Value>(&patch).unwrap(), expected, "{name}");
        assert_eq!(code, i32::from(expected != json!([])), "{name}");
    }
}

#[test]
fn documents_and_list_items_are_reviewed_separately() {
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
    assert_eq!(patches[2][0]["path"], "/spec/jobTemplate/spec/template/spec/containers/0/env");
    assert_eq!(
        stderr,
        "Service team/beside: makes no pods, and stays as it is\n\
         Pod team/plain: has no label molecule.ai/workspace-id, and stays as it is\n\
         CronJob team/nightly: platform_managed (constant_fallback, missing_workspace_id)\n\
         CronJob team/nightly: needs Secret molecule-llm-proxy (key usage-token) in namespace team\n"
    );
}

#[test]
fn mode_flag_overrides_the_database() {
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
    let stderr = |arguments: &[&str]| review(&text, arguments).2;
    assert_eq!(
        stderr(&["--database-url", &url]),
        "Pod ws-acme/ws-claude: byok (workspace_override, override)\n"
    );
    assert_eq!(
        stderr(&["--database-url", &url, "--mode", "disabled"]),
        "Pod ws-acme/ws-claude: disabled (workspace_override, override)\n"
    );
    let (code, stdout, stderr) = review(&text, &[]);
    let expected = "error: Pod ws-acme/ws-claude: no database is given; set --database-url, or --mode to skip the lookup\n";
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (2, "", expected));
    let (code, _, stderr) = review(&text, &["--database-url", "sqlite:///nonexistent/file"]);
    assert_eq!(code, 2);
    assert!(
        stderr.starts_with(
            "error: Pod ws-acme/ws-claude: cannot query the database at /nonexistent/file: "
        ),
        "{stderr}"
    );
}

#[test]
fn review_reads_stdin_and_colours_on_request() {
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
    let (code, stdout, _) = decode_output(&child.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(
        stdout.contains("\u{1b}[32m+    - name: MOLECULE_LLM_BILLING_MODE\u{1b}[0m\n"),
        "{stdout}"
    );
    assert!(!review(text, &[]).1.contains('\u{1b}'));
}

#[test]
fn strings_that_look_like_other_types_stay_strings() {
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
fn numbers_and_booleans_are_parsed_as_in_kubectl() {
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
fn files_directories_and_stdin_are_reviewed_in_order() {
    let pod = |name: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{molecule.ai/workspace-id: 88888888-8888-8888-8888-888888888888}}}}, spec: {{containers: [{{name: c}}]}}}}"
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir_all(path("all/below/empty")).unwrap();
    for (file, pod_name) in [
        ("all/2.yaml", "two"),
        ("all/1.yml", "one"),
        ("all/below/3.json", "three"),
        ("4", "four"),
    ] {
        fs::write(path(file), pod(pod_name)).unwrap();
    }
    fs::write(path("all/notes.txt"), "no manifest").unwrap();
    std::os::unix::fs::symlink(path("all"), path("all/below/loop")).unwrap();
    let review = |arguments: &[&str]| {
        let mut command = program(&["review", "--mode", "byok", "-o", "patch"]);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(pod("five").as_bytes())
            .unwrap();
        let (code, _, stderr) = decode_output(&child.wait_with_output().unwrap());
        let names = stderr
            .lines()
            .filter_map(|line| line.strip_prefix("Pod default/"));
        let names = names
            .filter_map(|line| line.split_once(':'))
            .map(|(name, _)| name.to_owned());
        (code, names.collect::<Vec<_>>().join(" "), stderr)
    };
    let (all, four) = (path("all"), path("4"));
    let (code, names, _) = review(&["-f", &four, "-f", &all, "-f", "-"]);
    assert_eq!((code, names.as_str()), (1, "four one two five"));
    let (code, names, _) = review(&["-R", "-f", &all]);
    assert_eq!((code, names.as_str()), (1, "one two three"));

    let failed = |arguments: &[&str], expected: &str| {
        let (code, _, stderr) = review(arguments);
        assert!(code == 2 && stderr.contains(expected), "{code} {stderr}");
    };
    let empty = path("all/below/empty");
    failed(
        &["-f", &empty],
        &format!("{empty} has no .json, .yaml or .yml file; -R reads the directories below it too"),
    );
    failed(&["-R", "-f", &empty], &format!("{empty} has no object that makes pods"));
    failed(&["-f", "-", "-f", "-"], "standard input is given more than once");
    fs::write(path("all/below/3.json"), "{").unwrap();
    failed(
        &["-R", "-f", &all],
        &format!("cannot read {}: line 1, column 1: ", path("all/below/3.json")),
    );
}

#[test]
fn every_template_of_a_workload_is_planned() {
    let template = "{metadata: {labels: {molecule.ai/workspace-id: 88888888-8888-8888-8888-888888888888}}, spec: {containers: [{name: c}]}}";
    let review = |kind: &str, spec: &str, arguments: &[&str]| {
        let text = format!(
            "apiVersion: {kind}\nmetadata: {{name: x}}\nspec: {}",
            spec.replace("POD", template)
        );
        let (code, after, stderr) =
            review(&text, &[&["--mode", "disabled", "-o", "json"], arguments].concat());
        (code, after.matches("MOLECULE_LLM_BILLING_MODE\"").count(), stderr)
    };
    let cluster =
        "{headGroupSpec: {template: POD}, workerGroupSpecs: [{template: POD}, {template: POD}]}";
    assert_eq!(
        review("ray.io/v1\nkind: RayCluster", cluster, &[]),
        (
            1,
            3,
            "RayCluster default/x spec.headGroupSpec.template: disabled (workspace_override, override)\n\
             RayCluster default/x spec.workerGroupSpecs.0.template: disabled (workspace_override, override)\n\
             RayCluster default/x spec.workerGroupSpecs.1.template: disabled (workspace_override, override)\n"
                .to_owned()
        )
    );
    let (code, modes, stderr) = review("acme.io/v1\nkind: Fleet", "{pods: [POD, POD]}", &[]);
    assert!(
        code == 2
            && modes == 0
            && stderr.contains("--template-path names the pod template of another kind"),
        "{stderr}"
    );
    let paths = ["--template-path", "Fleet=spec.pods.*"];
    let (code, modes, _) = review("acme.io/v1\nkind: Fleet", "{pods: [POD, POD]}", &paths);
    assert_eq!((code, modes), (1, 2));
    let (code, _, stderr) = review("acme.io/v1\nkind: Fleet", "{}", &["--template-path", "Fleet"]);
    assert!(
        code == 2 && stderr.contains("expected KIND=PATH, such as Workspace=spec.podTemplate"),
        "{stderr}"
    );
    let (code, _, stderr) = review("serving.knative.dev/v1\nkind: Service", "{}", &[]);
    assert!(
        code == 2 && stderr.contains("Service default/x") && stderr.contains("spec.template"),
        "{stderr}"
    );
}

#[test]
fn unusable_input_is_reported_with_its_location() {
    let table = [
        ("a: [", "error: cannot read FILE: line 1, column 4: this is not valid YAML\n"),
        ("{\"a\": x]", "error: cannot read FILE: line 1, column 7: this is not valid JSON\n"),
        (
            "",
            "error: FILE has no object that makes pods; expected a Pod, a workload, a List or an AdmissionReview of pods; --template-path names the pod template of another kind\n",
        ),
        (
            "kind: Service",
            "error: FILE has no object that makes pods; expected a Pod, a workload, a List or an AdmissionReview of pods; --template-path names the pod template of another kind\n",
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
            (code, stdout.as_str(), stderr.replace(&path, "FILE").as_str()),
            (2, "", expected),
            "{text}"
        );
    }
    let missing = run(&["review", "-f", "/nonexistent.yaml"]);
    assert_eq!(
        missing.2,
        "error: cannot read /nonexistent.yaml: No such file or directory (os error 2)\n"
    );
    // An unusable object does not keep the others from being reviewed.
    let pod = |name: &str, value: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{molecule.ai/workspace-id: ''}}}}, spec: {{containers: [{{env: [{{name: A, value: {value}}}]}}]}}}}"
        )
    };
    let (code, stdout, _) =
        review(&format!("{}\n---\n{}\n", pod("wrong", "1"), pod("right", "one")), &[]);
    assert_eq!(code, 2);
    assert!(stdout.starts_with("--- Pod default/right\n"), "{stdout}");
    let (_, _, stderr) = run(&["review", "-f", "x", "--mode", "BYOK"]);
    assert!(stderr.contains("expected one of platform_managed, byok, disabled"), "{stderr}");
}

#[test]
fn closed_stdout_does_not_change_the_exit_code() {
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
