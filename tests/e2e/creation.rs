//! Every way to create a pod, and the env that the API server stores.

use serde_json::{Value, json};

use crate::world::{BYOK, MANAGED, NAMESPACE, World, assert_env_matches, env_of, pod, policy};
use test_support::WORKSPACE_LABEL;
use test_support::program::wait_for;

/// Workspace label and its billing mode: each mode and each fallback.
const CASES: [(&str, &str); 8] = [
    (MANAGED, "platform_managed"),
    (BYOK, "byok"),
    ("33333333-3333-4333-8333-333333333333", "disabled"),
    ("44444444-4444-4444-8444-444444444444", "platform_managed"),
    ("55555555-5555-4555-8555-555555555555", "platform_managed"),
    ("66666666-6666-4666-8666-666666666666", "platform_managed"),
    ("not-a-uuid", "platform_managed"),
    ("", "platform_managed"),
];

fn own_key() -> Value {
    json!([{"name": "HF_TOKEN", "value": "own"}, {"name": "KEEP", "value": "1"}])
}

/// Returns a workload's pod template, with the labels that select it.
fn template(case: usize, kind: &str, workspace: &str) -> Value {
    json!({
        "metadata": {"labels": {WORKSPACE_LABEL: workspace, "case": case.to_string(), "of": kind}},
        "spec": {
            "restartPolicy": if ["Job", "CronJob"].contains(&kind) { "Never" } else { "Always" },
            "initContainers": [{"name": "init", "image": "busybox", "env": own_key()}],
            "containers": [{"name": "agent", "image": "busybox", "env": own_key()}],
        },
    })
}

pub(crate) fn workload(case: usize, kind: &str, workspace: &str) -> Value {
    let name = format!("{}-{case}", kind.to_lowercase());
    let template = template(case, kind, workspace);
    let selector = json!({"matchLabels": {"case": case.to_string(), "of": kind}});
    let (api_version, spec) = match kind {
        "Deployment" | "DaemonSet" => {
            ("apps/v1", json!({"selector": selector, "template": template}))
        }
        "StatefulSet" => {
            ("apps/v1", json!({"serviceName": name, "selector": selector, "template": template}))
        }
        "Job" => ("batch/v1", json!({"template": template})),
        _ => (
            "batch/v1",
            json!({"schedule": "0 0 1 1 *", "jobTemplate": {"spec": {"template": template}}}),
        ),
    };
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec})
}

#[test]
fn every_created_pod_matches_its_billing_mode() {
    let Some(mut world) = World::start() else {
        return;
    };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, &policy(""), &["guard.enabled=true"]);
    let has_controllers = world.start_controllers();
    // A DaemonSet creates a pod for each node.
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}});
    world.api.create_all([&node]);
    let kinds = ["Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"];
    for (case, (workspace, _)) in CASES.iter().enumerate() {
        let applied = world
            .write("pod.json", &pod(&format!("applied-{case}"), workspace, &own_key()).to_string());
        world.kubectl_ok(&["apply", "-f", &applied]);
        let created = world
            .write("pod.json", &pod(&format!("created-{case}"), workspace, &own_key()).to_string());
        world.kubectl_ok(&["create", "-f", &created]);
        let labels = format!("--labels={WORKSPACE_LABEL}={workspace}");
        world.kubectl_ok(&[
            "-n",
            NAMESPACE,
            "run",
            &format!("run-{case}"),
            "--image=busybox",
            "--env=HF_TOKEN=own",
            &labels,
        ]);
        let list: Vec<Value> = kinds
            .iter()
            .map(|kind| workload(case, kind, workspace))
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": list});
        world.kubectl_ok(&[
            "apply",
            "-f",
            &world.write("workloads.json", &list.to_string()),
        ]);
        let cron_job = format!("cronjob/cronjob-{case}");
        world.kubectl_ok(&[
            "-n",
            NAMESPACE,
            "create",
            "job",
            &format!("from-cron-{case}"),
            &format!("--from={cron_job}"),
        ]);
    }
    let each = if has_controllers { 3 + kinds.len() } else { 3 };
    wait_for("all pods exist", || (world.pods().len() >= CASES.len() * each).then_some(()));
    for pod in world.pods() {
        let labels = &pod["metadata"]["labels"];
        let workspace = labels[WORKSPACE_LABEL].as_str().unwrap();
        let (_, mode) = CASES.iter().find(|(id, _)| *id == workspace).unwrap();
        for list in ["initContainers", "containers"] {
            for container in pod["spec"][list].as_array().into_iter().flatten() {
                assert_env_matches(container, mode);
            }
        }
        assert_eq!(pod["metadata"]["annotations"]["molecule.ai/llm-billing-mode"], *mode);
    }

    let debug = |name: &str| -> Vec<String> {
        let flags = [
            "--image=busybox",
            "--attach=false",
            "--env=HF_TOKEN=own",
            "--profile=general",
        ];
        let start = ["-n", NAMESPACE, "debug", name];
        start.into_iter().chain(flags).map(str::to_owned).collect()
    };
    let with = |debug: &[String], more: &[&str]| {
        let arguments: Vec<&str> = debug
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        world.kubectl_ok(&arguments);
    };
    // A debug container, and a copy that keeps the labels.
    for (case, (_, mode)) in CASES.iter().enumerate() {
        let name = format!("applied-{case}");
        let debug = debug(&name);
        with(&debug, &["-c", "debugger"]);
        let debugged = world.stored(&name).unwrap();
        assert_env_matches(&debugged["spec"]["ephemeralContainers"][0], mode);
        let copy = format!("--copy-to=copy-{case}");
        with(&debug, &[&copy, "--keep-labels", "-c", "debugger"]);
        let copied = world.stored(&format!("copy-{case}")).unwrap();
        for container in copied["spec"]["containers"].as_array().unwrap() {
            assert_env_matches(container, mode);
        }
    }
    // Without --keep-labels a copy has no labels, so it is not a workspace pod: the webhook leaves its containers
    // unchanged.
    with(&debug("applied-0"), &["--copy-to=unlabelled", "-c", "debugger"]);
    let copied = world.stored("unlabelled").unwrap();
    assert_env_matches(&copied["spec"]["containers"][0], CASES[0].1);
    let debugger = env_of(&copied["spec"]["containers"][1]);
    assert_eq!(debugger, [("HF_TOKEN".to_owned(), "own".to_owned())]);
}

/// Removes the metadata that the API server sets.
fn without_bookkeeping(mut pod: Value) -> Value {
    let metadata = pod["metadata"].as_object_mut().unwrap();
    for field in [
        "uid",
        "creationTimestamp",
        "resourceVersion",
        "managedFields",
        "generation",
    ] {
        metadata.remove(field);
    }
    pod
}

#[test]
fn dry_run_and_diff_match_the_created_pod() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, &policy(""), &[]);
    for (name, workspace) in [("managed", MANAGED), ("byok", BYOK)] {
        let file = world.write("pod.json", &pod(name, workspace, &own_key()).to_string());
        let dry_run = world.kubectl_ok(&["apply", "--dry-run=server", "-o", "json", "-f", &file]);
        assert_eq!(world.stored(name), None);
        let (code, diff, _) = world.kubectl(&["diff", "-f", &file]);
        assert_eq!(code, 1, "there is something to create");
        let applied = world.kubectl_ok(&["apply", "-o", "json", "-f", &file]);
        let [dry_run, applied] = [dry_run, applied]
            .map(|text| without_bookkeeping(serde_json::from_str(&text).unwrap()));
        assert_eq!(dry_run, applied);
        assert_eq!(without_bookkeeping(world.stored(name).unwrap()), applied);
        for (variable, value) in env_of(&applied["spec"]["containers"][0]) {
            assert!(
                diff.contains(&format!("+    - name: {variable}\n")),
                "{variable} is not in {diff}"
            );
            assert!(diff.contains(&value));
        }
        assert!(diff.contains("+    molecule.ai/llm-billing-mode: "), "{diff}");
    }
}

#[test]
fn relabelled_pod_gets_no_key_by_kubectl_debug() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, &policy(""), &["guard.enabled=true"]);
    world
        .api
        .create_all([&pod("relabelled", MANAGED, &json!([]))]);
    let label = format!("{WORKSPACE_LABEL}={BYOK}");
    world.kubectl_ok(&[
        "-n",
        NAMESPACE,
        "label",
        "--overwrite",
        "pod",
        "relabelled",
        &label,
    ]);
    let annotation = "molecule.ai/llm-billing-mode=byok";
    world.kubectl_ok(&[
        "-n",
        NAMESPACE,
        "annotate",
        "--overwrite",
        "pod",
        "relabelled",
        annotation,
    ]);
    let debug = [
        "-n",
        NAMESPACE,
        "debug",
        "relabelled",
        "--image=busybox",
        "--attach=false",
        "--env=OPENAI_API_KEY=own",
    ];
    let (code, _, stderr) = world.kubectl(&debug);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("Warning: the pod was created as platform_managed, and its workspace"),
        "{stderr}"
    );
    assert!(stderr.contains("Warning: platform_managed replaces env OPENAI_API_KEY"), "{stderr}");
    let stored = world.stored("relabelled").unwrap();
    assert_env_matches(&stored["spec"]["ephemeralContainers"][0], "platform_managed");
}

/// A pod's env is immutable, so a second apply must not restore an entry that the webhook changed.
#[test]
fn second_apply_is_refused_if_the_create_changed_an_entry() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, &policy(""), &[]);
    let literal = |name: &str| json!([{"name": name, "value": "own"}]);
    let reference = json!([{"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": {"name": "own", "key": "key"}}}]);
    let removed = "Warning: platform_managed removes env XAI_API_KEY\n";
    let replaced = "Warning: platform_managed replaces env OPENAI_API_KEY\n";
    let base_url = "Warning: platform_managed replaces env OPENAI_BASE_URL\n";
    let immutable = Some("pod updates may not change fields other than");
    let both = Some("may not be specified when `value` is not empty");
    // Workspace, the author's env, the create's warning, the error of a client-side and of a server-side second apply.
    let table = [
        (MANAGED, literal("OTHER"), "", None, None),
        (BYOK, literal("XAI_API_KEY"), "", None, None),
        (MANAGED, literal("XAI_API_KEY"), removed, immutable, immutable),
        (MANAGED, literal("OPENAI_API_KEY"), replaced, both, both),
        (MANAGED, reference, replaced, immutable, immutable),
        (MANAGED, literal("OPENAI_BASE_URL"), base_url, immutable, immutable),
    ];
    for (index, (workspace, env, warning, client_side, server_side)) in table.iter().enumerate() {
        for (side, error) in [("false", client_side), ("true", server_side)] {
            let name = format!("applied-{index}-{side}");
            let file = world.write("pod.json", &pod(&name, workspace, env).to_string());
            let server_side = format!("--server-side={side}");
            let apply = || world.kubectl(&["apply", &server_side, "-f", &file]);
            let (code, _, created) = apply();
            assert_eq!((code, created.as_str()), (0, *warning), "{env} {side}");
            let (code, _, again) = apply();
            match error {
                None => assert_eq!(code, 0, "{env} {side}: {again}"),
                Some(error) => assert!(code == 1 && again.contains(error), "{env} {side}: {again}"),
            }
            // A new pod takes the old one's place.
            world.kubectl_ok(&["replace", "--force", "-f", &file]);
        }
    }
}
