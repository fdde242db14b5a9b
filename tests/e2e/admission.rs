//! How the API server calls the webhook: reinvocation, timeouts and selectors; and what it passes on to kubectl, events
//! and its audit log.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::routing::post;
use axum_server::tls_rustls::RustlsConfig;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};

use crate::world::{BYOK, MANAGED, NAMESPACE, World, assert_env_matches, env_of, pod, policy};
use test_support::chart::render;
use test_support::program::{Authority, decode_output, program, wait_for};
use test_support::{PROXY, WORKSPACE_LABEL, fixtures};

/// Starts another mutating webhook, which applies this patch to pods without `XAI_API_KEY`. Returns its port and call
/// count.
fn start_other_webhook(patch: &'static str, authority: &Authority) -> (u16, Arc<AtomicUsize>) {
    let (certificate, key) = authority.issue("localhost");
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let answer = async move |body: String| {
        let review: Value = serde_json::from_str(&body).unwrap();
        counted.fetch_add(1, Ordering::Relaxed);
        let containers = review["request"]["object"]["spec"]["containers"].to_string();
        let mut response = json!({"uid": review["request"]["uid"], "allowed": true});
        if !containers.contains("XAI_API_KEY") {
            response["patchType"] = "JSONPatch".into();
            response["patch"] = STANDARD.encode(patch).into();
        }
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
        ([("content-type", "application/json")], review.to_string())
    };
    std::thread::spawn(move || {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            );
        let config = RustlsConfig::from_config(Arc::new(config.unwrap()));
        let routes = Router::new().route("/", post(answer)).into_make_service();
        // The server ends with the process.
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime
            .block_on(async {
                axum_server::from_tcp_rustls(listener, config)
                    .unwrap()
                    .serve(routes)
                    .await
            })
            .unwrap();
    });
    (port, calls)
}

/// Registers the other webhook, whose name sorts after the project's, so that it is called later.
fn register_other_webhook(world: &World, port: u16, authority: &Authority, reinvocation: &str) {
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "zz-other"},
        "webhooks": [{
            "name": "other.example.test",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "reinvocationPolicy": reinvocation,
            "objectSelector": {"matchLabels": {"other-webhook": "yes"}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
            "clientConfig": {"url": format!("https://localhost:{port}/"), "caBundle": STANDARD.encode(authority.pem())},
        }],
    });
    world.api.create_all([&configuration]);
}

/// Returns a pod that the other webhook selects.
fn selected_pod(name: &str) -> Value {
    let mut pod = pod(name, MANAGED, &json!([{"name": "KEEP", "value": "1"}]));
    pod["metadata"]["labels"]["other-webhook"] = "yes".into();
    pod
}

const ADD_KEY: &str = r#"[{"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "XAI_API_KEY", "value": "sk"}}]"#;
const ADD_SIDECAR: &str = r#"[{"op": "add", "path": "/spec/containers/-",
    "value": {"name": "sidecar", "image": "busybox", "env": [{"name": "XAI_API_KEY", "value": "sk"}]}}]"#;

/// Waits until the other webhook is called too, and creates a pod.
fn create_selected_pod(world: &World, calls: &AtomicUsize) -> (u16, Value) {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    wait_for("the other webhook is called", || {
        let _ =
            world
                .api
                .request("POST", &format!("{path}?dryRun=All"), Some(&selected_pod("probe")));
        (calls.load(Ordering::Relaxed) > 0).then_some(())
    });
    world
        .api
        .request("POST", &path, Some(&selected_pod("selected")))
}

#[test]
fn reinvocation_settles_what_a_later_webhook_appends() {
    for patch in [ADD_KEY, ADD_SIDECAR] {
        let Some(world) = World::start() else { return };
        let postgres = World::workspaces();
        let _webhook = world.install(&postgres, &policy(""), &["guard.enabled=true"]);
        let authority = Authority::generate();
        let (port, calls) = start_other_webhook(patch, &authority);
        register_other_webhook(&world, port, &authority, "Never");
        let (status, created) = create_selected_pod(&world, &calls);
        assert_eq!(status, 201, "{created}");
        for container in created["spec"]["containers"].as_array().unwrap() {
            assert_env_matches(container, "platform_managed");
            assert!(
                env_of(container)
                    .iter()
                    .all(|(name, _)| name != "XAI_API_KEY"),
                "{container}"
            );
        }
    }
}

#[test]
fn guard_refuses_changes_after_the_reinvocation() {
    for (guard, expected) in [("guard.enabled=true", 403), ("guard.enabled=false", 201)] {
        let Some(world) = World::start() else { return };
        let postgres = World::workspaces();
        let _webhook = world.install(&postgres, &policy(""), &[guard]);
        let authority = Authority::generate();
        let (port, calls) = start_other_webhook(ADD_KEY, &authority);
        // The API server reinvokes this webhook too, as the last one.
        register_other_webhook(&world, port, &authority, "IfNeeded");
        let (status, answer) = create_selected_pod(&world, &calls);
        assert_eq!(status, expected, "{answer}");
        if expected == 403 {
            let message = answer["message"].as_str().unwrap();
            let expected = "admission webhook \"validate.llm-billing.molecule.ai\" denied the request: \
                ENV_NOT_SETTLED: env of container \"agent\" is out of sync: XAI_API_KEY; ";
            assert!(message.starts_with(expected), "{message}");
        }
    }
}

#[test]
fn kubectl_shows_the_warnings() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    postgres.execute("INSERT INTO workspaces VALUES ('66666666-6666-6666-6666-666666666666', 'platform_managed')");
    let _webhook = world.install(&postgres, &policy(""), &[]);
    let file = fixtures("workloads/09-references.yaml");
    let (code, _, stderr) = world.kubectl(&["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{stderr}");
    for expected in [
        "Warning: platform_managed removes env ZAI_API_KEY\n",
        "Warning: container \"agent\": command[2] refers to $(ZAI_API_KEY), which platform_managed removes\n",
        "Warning: container \"agent\": env ALIAS exposes vendor key ANTHROPIC_API_KEY under another name; not removed\n",
    ] {
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[test]
fn denial_reaches_kubectl_and_the_workloads_events() {
    let Some(mut world) = World::start() else {
        return;
    };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, "", &[]);
    let labels = format!("--labels={WORKSPACE_LABEL}={MANAGED}");
    let (code, _, stderr) =
        world.kubectl(&["-n", NAMESPACE, "run", "denied", "--image=busybox", &labels]);
    assert_eq!(code, 1);
    let denial = "admission webhook \"mutate.llm-billing.molecule.ai\" denied the request: MISSING_PLATFORM_PROXY: \
        the workspace is platform_managed and no LLM proxy is configured; set proxy.baseUrl and proxy.usageToken in the \
        webhook's policy, or the workspace's mode to byok or disabled";
    assert_eq!(stderr, format!("Error from server (Forbidden): {denial}\n"));
    if !world.start_controllers() {
        return;
    }
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "denied", "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": {"app": "denied"}},
            "template": {
                "metadata": {"labels": {"app": "denied", WORKSPACE_LABEL: MANAGED}},
                "spec": {"containers": [{"name": "agent", "image": "busybox"}]},
            },
        },
    });
    world.api.create_all([&deployment]);
    wait_for("an event shows why the ReplicaSet has no pods", || {
        let events = world.kubectl_ok(&["-n", NAMESPACE, "events", "--types=Warning"]);
        (events.contains("FailedCreate")
            && events.contains("ReplicaSet/denied-")
            && events.contains(denial))
        .then_some(())
    });
}

#[test]
fn check_tells_a_policy_without_proxy_from_a_fault() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, "", &[]);
    let check = |policy: &str| {
        let policy = world.write("checked.yaml", policy);
        let mut check = program(&["check", "--policy", &policy, "--dry-run-in", NAMESPACE]);
        check.env("KUBECONFIG", world.kubeconfig());
        let (code, report, _) = decode_output(&check.output().unwrap());
        let line = report
            .lines()
            .find(|line| line.contains(" cluster "))
            .unwrap();
        (code, line.to_owned())
    };
    let expected = format!(
        "warn  cluster      the webhook refuses a new platform_managed pod in {NAMESPACE}, because the policy has no complete proxy"
    );
    assert_eq!(check(""), (0, expected));
    // A webhook that lacks the proxy of the policy is a fault.
    let (code, line) = check(PROXY);
    assert!(code == 2 && line.contains("MISSING_PLATFORM_PROXY"), "{code} {line}");
}

#[test]
fn audit_log_has_resolution_and_no_env_value() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let _webhook = world.install(&postgres, &policy(""), &[]);
    let env = json!([{"name": "HF_TOKEN", "value": "removed-0123456789"}, {"name": "KEEP", "value": "unmanaged-0123456789"}]);
    world.api.create_all([&pod("audited", MANAGED, &env)]);
    let event = wait_for("the audit log has the pod", || {
        let log = world.api.control_plane.as_ref().unwrap().audit_log();
        log.into_iter()
            .find(|event| event["objectRef"]["name"] == "audited")
    });
    let annotations = &event["annotations"];
    let own = |name: &str| annotations[&format!("mutate.llm-billing.molecule.ai/{name}")].clone();
    assert_eq!(
        ["mode", "source", "reason", "workspace"].map(own),
        [
            json!("platform_managed"),
            json!("workspace_override"),
            json!("override"),
            json!(MANAGED)
        ]
    );
    // The API server logs the patch, and no value from the pod.
    let text = annotations.to_string();
    assert!(text.contains("MOLECULE_LLM_BASE_URL"), "the patch is not in {text}");
    for value in ["unmanaged", "removed"] {
        assert!(!text.contains(value), "{value} is in {text}");
    }
}

#[test]
fn failed_lookup_warns_or_refuses_as_policy_says() {
    for on_error in ["platform_managed", "deny"] {
        let Some(world) = World::start() else { return };
        let postgres = World::workspaces();
        let fields = format!("lookup: {{onError: {on_error}}}");
        let _webhook = world.install(&postgres, &policy(&fields), &[]);
        postgres.execute("ALTER TABLE workspaces RENAME TO gone");
        let labels = format!("--labels={WORKSPACE_LABEL}={BYOK}");
        let (code, _, stderr) =
            world.kubectl(&["-n", NAMESPACE, "run", "down", "--image=busybox", &labels]);
        if on_error == "deny" {
            assert_eq!(code, 1);
            assert!(stderr.contains("denied the request: LOOKUP_FAILED: "), "{stderr}");
            assert_eq!(world.stored("down"), None);
        } else {
            assert_eq!(code, 0, "{stderr}");
            assert!(
                stderr.starts_with("Warning: the workspace's billing mode could not be looked up"),
                "{stderr}"
            );
            assert_env_matches(
                &world.stored("down").unwrap()["spec"]["containers"][0],
                "platform_managed",
            );
        }
    }
}

#[test]
fn failure_policy_decides_while_the_webhook_is_down() {
    for (failure_policy, expected) in [("Fail", 500), ("Ignore", 201)] {
        let Some(world) = World::start() else { return };
        let postgres = World::workspaces();
        let setting = format!("webhook.failurePolicy={failure_policy}");
        drop(world.install(&postgres, &policy(""), &[&setting]));
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let env = json!([{"name": "HF_TOKEN", "value": "own"}]);
        let (status, answer) = world
            .api
            .request("POST", &path, Some(&pod("alone", BYOK, &env)));
        assert_eq!(status, expected, "{answer}");
        if expected == 201 {
            let names = env_of(&answer["spec"]["containers"][0]);
            assert_eq!(names, [("HF_TOKEN".to_owned(), "own".to_owned())]);
        } else {
            let message = answer["message"].as_str().unwrap();
            assert!(
                message.contains("failed calling webhook \"mutate.llm-billing.molecule.ai\""),
                "{message}"
            );
        }
    }
}

#[test]
fn answer_arrives_before_the_api_servers_timeout() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let slow = "lookup: {timeout: 20s, query: \"SELECT CASE WHEN id::text = '22222222-2222-4222-8222-222222222222' AND \
        pg_sleep(15) IS NOT NULL THEN 'byok' ELSE llm_billing_mode END FROM workspaces WHERE id = $1\"}";
    let _webhook = world.install(&postgres, &policy(slow), &["webhook.timeoutSeconds=2"]);
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    let (status, created) = world
        .api
        .request("POST", &path, Some(&pod("slow", BYOK, &json!([]))));
    assert_eq!(status, 201, "{created}");
    assert_env_matches(&created["spec"]["containers"][0], "platform_managed");
    assert_eq!(
        created["metadata"]["annotations"]["molecule.ai/llm-billing-source"],
        "constant_fallback"
    );
}

#[test]
fn webhook_is_called_only_for_pods_in_scope() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let env = json!([{"name": "HF_TOKEN", "value": "own"}]);
    world.create_namespace("exempt", &json!({"workspaces": "yes"}));
    world.create_namespace("scoped", &json!({"workspaces": "yes"}));
    let create = |namespace: &str, workspace: Option<&str>| {
        let mut pod = pod("in-scope", workspace.unwrap_or_default(), &env);
        pod["metadata"]["namespace"] = namespace.into();
        if workspace.is_none() {
            pod["metadata"].as_object_mut().unwrap().remove("labels");
        }
        let path = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
        let (status, created) = world.api.request("POST", &path, Some(&pod));
        assert_eq!(status, 201, "{created}");
        created["spec"]["containers"][0].clone()
    };
    let is_untouched =
        |container: &Value| env_of(container) == [("HF_TOKEN".to_owned(), "own".to_owned())];

    let _webhook = world.install(&postgres, &policy(""), &["exemptNamespaces={exempt}"]);
    assert_env_matches(&create("scoped", Some(BYOK)), "byok");
    assert!(is_untouched(&create("scoped", None)));
    assert!(is_untouched(&create("exempt", Some(BYOK))));
    assert!(is_untouched(&create("kube-system", Some(BYOK))));

    let namespaces = [
        "scope=namespace",
        "namespaceSelector.matchLabels.workspaces=yes",
        "exemptNamespaces={exempt}",
    ];
    let fields = "unlabelled: platform_managed";
    let _webhook = world.install(&postgres, &policy(fields), &namespaces);
    wait_for("the namespace scope is in effect", || {
        (!is_untouched(&create("scoped", None))).then_some(())
    });
    assert_env_matches(&create("scoped", None), "platform_managed");
    assert_env_matches(&create("scoped", Some(BYOK)), "byok");
    assert!(is_untouched(&create("exempt", None)));
    assert!(is_untouched(&create(NAMESPACE, Some(BYOK))));
}

#[test]
fn label_change_is_refused_if_the_guard_says_so() {
    let Some(world) = World::start() else { return };
    let settings = [
        "database.existingSecret=db",
        "guard.refuseLabelChanges=true",
        "policy.lookup.parameters[0].label=tenant",
    ];
    let objects: Vec<Value> = render(&settings)
        .into_iter()
        .filter(|object| {
            let kind = object["kind"].as_str().unwrap();
            kind.starts_with("ValidatingAdmissionPolicy")
        })
        .collect();
    assert_eq!(objects.len(), 2);
    world.api.create_all(&objects);
    for (name, labels) in [
        ("workspace", json!({WORKSPACE_LABEL: BYOK, "tenant": "acme"})),
        ("other", json!({"app": "x"})),
    ] {
        let mut pod = pod(name, BYOK, &json!([]));
        pod["metadata"]["labels"] = labels;
        pod["metadata"]["annotations"] = json!({"molecule.ai/llm-billing-mode": "byok"});
        world.api.create_all([&pod]);
    }
    let change = |verb: &str, pod: &str, change: &str| {
        world.kubectl(&["-n", NAMESPACE, verb, "pod", pod, change, "--overwrite"])
    };
    let removal = format!("{WORKSPACE_LABEL}-");
    wait_for("the policy applies", || {
        let probe = [
            "--dry-run=server",
            "-n",
            NAMESPACE,
            "label",
            "pod",
            "workspace",
            &removal,
        ];
        (world.kubectl(&probe).0 == 1).then_some(())
    });
    let label = format!("metadata.labels[\"{WORKSPACE_LABEL}\"]");
    let annotation = "metadata.annotations[\"molecule.ai/llm-billing-mode\"]".to_owned();
    for (verb, argument, place) in [
        ("label", removal.as_str(), &label),
        ("label", &format!("{WORKSPACE_LABEL}={MANAGED}"), &label),
        ("label", "tenant=other", &"metadata.labels[\"tenant\"]".to_owned()),
        ("annotate", "molecule.ai/llm-billing-mode-", &annotation),
        ("annotate", "molecule.ai/llm-billing-mode=disabled", &annotation),
    ] {
        let (code, _, stderr) = change(verb, "workspace", argument);
        assert_eq!(code, 1, "{argument}");
        let expected = format!(
            "denied request: LABEL_CHANGED: {place} of a workspace's pod cannot be changed; create a new pod with it\n"
        );
        assert!(stderr.ends_with(&expected), "{argument}: {stderr}");
    }
    for (verb, pod, argument) in [
        ("label", "workspace", "app=y"),
        ("annotate", "workspace", "molecule.ai/llm-billing-source=x"),
        // As a warm pool does.
        ("label", "other", &*format!("{WORKSPACE_LABEL}={BYOK}")),
    ] {
        let (code, _, stderr) = change(verb, pod, argument);
        assert_eq!(code, 0, "{argument}: {stderr}");
    }
    world.kubectl_ok(&[
        "-n",
        NAMESPACE,
        "delete",
        "pod",
        "workspace",
        "--grace-period=0",
        "--force",
    ]);
}
