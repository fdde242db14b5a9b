//! The Helm chart: lint, refused settings, rendered objects, permissions, alerts, and the files that must match the
//! chart.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::{
    admissionregistration::v1 as admission, apps::v1 as apps, autoscaling::v2 as autoscaling,
    batch::v1 as batch, core::v1 as core, networking::v1 as networking, policy::v1 as policy,
    rbac::v1 as rbac,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use test_support::api_server::{ApiServer, collection_of};
use test_support::chart::{RELEASE, chart, helm, of_kind, render, render_error, with_tools};
use test_support::fixtures;
use test_support::program::{Authority, run};
use test_support::transcript::page;

const DATABASE: &str = "database.existingSecret=db";

/// Settings that together use every part of the chart.
const MATRIX: [&[&str]; 10] = [
    &[DATABASE],
    &[
        DATABASE,
        "guard.enabled=true",
        "guard.refuseLabelChanges=true",
        "converge.enabled=true",
        "tls.clientCA.secretName=clients",
        "database.caSecret.name=ca",
    ],
    &[
        DATABASE,
        "scope=namespace",
        "namespaceSelector.matchLabels.workspaces=yes",
        "namespaceSelector.matchExpressions[0].key=team",
        "namespaceSelector.matchExpressions[0].operator=In",
        "namespaceSelector.matchExpressions[0].values={a,b}",
        "converge.enabled=true",
        "serviceMonitor.enabled=true",
        "rbac.create=false",
        "tls.mode=provided",
        "tls.provided.secretName=tls",
        "networkPolicy.enabled=true",
        "fullnameOverride=a-name-of-sixty-three-characters-is-as-long-as-one-may-be-here",
    ],
    &[
        DATABASE,
        "converge.enabled=true",
        "converge.apply=true",
        "converge.window=22:00-06:00",
        "converge.evictBare=true",
        "database.caSecret.name=ca",
        "tolerations[0].operator=Exists",
    ],
    &[
        "database.sqlite.enabled=true",
        "database.sqlite.workspaces.22222222-2222-4222-8222-222222222222=byok",
        "replicas=1",
    ],
    &[DATABASE, "tls.mode=cert-manager", "guard.enabled=true"],
    &[DATABASE, "tls.mode=provided", "tls.provided.secretName=tls"],
    &[
        DATABASE,
        "scope=namespace",
        "namespaceSelector.matchLabels.workspaces=yes",
        "exemptNamespaces={db}",
    ],
    &[
        DATABASE,
        "autoscaling.enabled=true",
        "networkPolicy.enabled=true",
        "serviceMonitor.enabled=true",
        "podMonitor.enabled=true",
        "prometheusRule.enabled=true",
        "dashboard.enabled=true",
        "priorityClassName=system-cluster-critical",
        "podDisruptionBudget.enabled=true",
    ],
    &[
        DATABASE,
        "image.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000",
        "imagePullSecrets[0].name=registry",
        "extraArgs={--log-format=pretty}",
        "extraEnv[0].name=RUST_LOG",
        "extraEnv[0].value=debug",
        "nodeSelector.pool=system",
        "tolerations[0].operator=Exists",
        "commonLabels.team=platform",
        "podAnnotations.a=b",
        "fullnameOverride=other",
        "serviceAccount.create=false",
        "rbac.create=false",
    ],
];

#[test]
fn chart_passes_strict_lint() {
    let output = helm(&[
        "lint",
        "--strict",
        chart().to_str().unwrap(),
        "--set",
        DATABASE,
    ]);
    let text =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("[WARNING]"), "{text}");
}

#[test]
fn rendered_objects_match_the_kubernetes_types() {
    for settings in MATRIX {
        for object in render(settings) {
            let name = format!("{settings:?}: {} {}", object["kind"], object["metadata"]["name"]);
            let Some(read) = typed(&object) else { continue };
            assert_eq!(lost(&object, &read), Vec::<String>::new(), "{name}");
        }
    }
}

/// Returns the object as its Kubernetes type reads it, or `None` for a custom resource.
fn typed(object: &Value) -> Option<Value> {
    fn of<T: DeserializeOwned + Serialize>(object: &Value) -> Option<Value> {
        let read: T = serde_json::from_value(object.clone())
            .unwrap_or_else(|error| panic!("{error}: {object}"));
        Some(serde_json::to_value(read).unwrap())
    }
    let (api_version, kind) = (object["apiVersion"].as_str()?, object["kind"].as_str()?);
    match (api_version, kind) {
        ("v1", "ConfigMap") => of::<core::ConfigMap>(object),
        ("v1", "Namespace") => of::<core::Namespace>(object),
        ("v1", "Service") => of::<core::Service>(object),
        ("v1", "ServiceAccount") => of::<core::ServiceAccount>(object),
        ("apps/v1", "Deployment") => of::<apps::Deployment>(object),
        ("autoscaling/v2", "HorizontalPodAutoscaler") => {
            of::<autoscaling::HorizontalPodAutoscaler>(object)
        }
        ("batch/v1", "CronJob") => of::<batch::CronJob>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => of::<networking::NetworkPolicy>(object),
        ("policy/v1", "PodDisruptionBudget") => of::<policy::PodDisruptionBudget>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => of::<rbac::Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => of::<rbac::RoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => of::<rbac::ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
            of::<rbac::ClusterRoleBinding>(object)
        }
        ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration") => {
            of::<admission::MutatingWebhookConfiguration>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration") => {
            of::<admission::ValidatingWebhookConfiguration>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
            of::<admission::ValidatingAdmissionPolicy>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            of::<admission::ValidatingAdmissionPolicyBinding>(object)
        }
        ("cert-manager.io/v1", "Certificate" | "Issuer")
        | ("monitoring.coreos.com/v1", "ServiceMonitor" | "PodMonitor" | "PrometheusRule") => None,
        other => panic!("unexpected kind {other:?}"),
    }
}

/// Returns the paths of values in `object` that are missing or different in `read`.
fn lost(object: &Value, read: &Value) -> Vec<String> {
    let below = |key: String, object: &Value, read: &Value| -> Vec<String> {
        lost(object, read)
            .into_iter()
            .map(|path| format!("{key}.{path}"))
            .collect()
    };
    match (object, read) {
        (Value::Object(object), Value::Object(read)) => object
            .iter()
            // Serialization omits empty lists and objects.
            .filter(|(_, value)| !value.is_null() && **value != json!([]) && **value != json!({}))
            .flat_map(|(key, value)| {
                below(key.clone(), value, read.get(key).unwrap_or(&Value::Null))
            })
            .collect(),
        (Value::Array(object), Value::Array(read)) if object.len() == read.len() => object
            .iter()
            .zip(read)
            .enumerate()
            .flat_map(|(index, (object, read))| below(index.to_string(), object, read))
            .collect(),
        (object, read) if object == read => Vec::new(),
        (object, read) => vec![format!(" {object} is read as {read}")],
    }
}

#[test]
fn real_api_server_accepts_rendered_objects() {
    let Some(api) = ApiServer::real("accepting what the chart renders") else {
        return;
    };
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": RELEASE}});
    api.create_all([&namespace]);
    for settings in MATRIX {
        for object in render(settings) {
            if typed(&object).is_none() {
                continue;
            }
            let path = format!("{}?dryRun=All&fieldValidation=Strict", collection_of(&object));
            let (status, answer) = api.request("POST", &path, Some(&object));
            assert_eq!(status, 201, "{settings:?}: {answer}");
        }
    }
}

#[test]
fn unusable_settings_are_refused_with_the_remedy() {
    let table: [(&[&str], &str); 16] = [
        (&[], "no database is given: set database.existingSecret"),
        (&[DATABASE, "database.sqlite.enabled=true"], "are both set"),
        (&["database.sqlite.enabled=true"], "set replicas=1"),
        (&[DATABASE, "scope=namespace"], "set namespaceSelector.matchLabels"),
        (&[DATABASE, "policy.unlabelled=deny"], "set scope=namespace"),
        (&[DATABASE, "tls.mode=provided"], "set tls.provided.secretName"),
        (
            &[
                DATABASE,
                "tls.selfManaged.lifetime=1d",
                "tls.selfManaged.caLifetime=1d",
            ],
            "less than twice tls.selfManaged.lifetime",
        ),
        (&[DATABASE, "tls.mode=self-signed"], "'self-managed', 'cert-manager', 'provided'"),
        (&[DATABASE, "scope=everywhere"], "'labelled', 'namespace'"),
        (&[DATABASE, "webhook.failurePolicy=fail"], "'Fail', 'Ignore'"),
        (&[DATABASE, "webhook.timeoutSeconds=31"], "timeoutSeconds"),
        (&[DATABASE, "replicas=0"], "replicas"),
        (&[DATABASE, "replica=3"], "replica"),
        (&[DATABASE, "database.url=postgres://u:p@h/d"], "url"),
        (&[DATABASE, "policy.envfrom=deny"], "envfrom"),
        (&[DATABASE, "policy.lookup.onError=allow"], "value must be 'deny'"),
    ];
    for (settings, expected) in table {
        let error = render_error(settings);
        assert!(error.contains(expected), "{settings:?}: {error}");
        assert!(!error.contains("postgres://"), "{error}");
    }
}

#[test]
fn label_changes_are_refused_from_kubernetes_1_30_on() {
    let template = |version: &str| {
        let chart = chart();
        let output = helm(&[
            "template",
            chart.to_str().unwrap(),
            "--set",
            DATABASE,
            "--set",
            "guard.refuseLabelChanges=true",
            "--kube-version",
            version,
        ]);
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (is_accepted, error) = template("1.29.9");
    assert!(!is_accepted);
    let expected = "guard.refuseLabelChanges needs Kubernetes 1.30 or later, and this is v1.29.9: set it to false";
    assert!(error.contains(expected), "{error}");
    assert_eq!(template("1.30.0"), (true, String::new()));
}

#[test]
fn default_render_matches_its_snapshot() {
    let objects = render(&[DATABASE]);
    let documents: Vec<String> = objects
        .iter()
        .map(|object| serde_saphyr::to_string(object).unwrap())
        .collect();
    insta::with_settings!({snapshot_path => "../fixtures/snapshots", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!("chart-default", documents.join("---\n"));
    });
}

#[test]
fn program_accepts_the_charts_arguments_and_policy() {
    for settings in MATRIX {
        let objects = render(settings);
        let templates = [
            "/spec/template/spec",
            "/spec/jobTemplate/spec/template/spec",
        ];
        let specs = objects
            .iter()
            .flat_map(|object| templates.map(|template| object.pointer(template)));
        let containers = specs.flatten().flat_map(|spec| {
            let lists = ["initContainers", "containers"];
            let containers = lists.map(|list| spec[list].as_array().cloned().unwrap_or_default());
            containers.into_iter().flatten()
        });
        for container in containers {
            let arguments = container["args"].as_array().unwrap().iter();
            // An unknown argument is an error even with --help.
            let mut arguments: Vec<&str> = arguments
                .map(|argument| argument.as_str().unwrap())
                .collect();
            arguments.push("--help");
            let (code, _, stderr) = run(&arguments);
            assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        let policy = of_kind_named(&objects, "ConfigMap", "-policy")["data"]["policy.yaml"]
            .as_str()
            .unwrap()
            .to_owned();
        fs::write(&file, policy).unwrap();
        let (code, stdout, _) = run(&["check", "--policy", file.to_str().unwrap()]);
        assert_eq!(code, 0, "{stdout}");
    }
}

fn of_kind_named<'o>(objects: &'o [Value], kind: &str, ending: &str) -> &'o Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    found
        .find(|object| {
            object["metadata"]["name"]
                .as_str()
                .unwrap()
                .ends_with(ending)
        })
        .unwrap()
}

#[test]
fn namespace_scope_defaults_unlabelled_to_platform_managed() {
    let scope = [
        "scope=namespace",
        "namespaceSelector.matchLabels.workspaces=yes",
    ];
    let policy = |settings: &[&str]| -> Value {
        let objects = render(&[&[DATABASE], settings].concat());
        let text = of_kind_named(&objects, "ConfigMap", "-policy")["data"]["policy.yaml"]
            .as_str()
            .unwrap()
            .to_owned();
        serde_saphyr::from_str(&text).unwrap()
    };
    assert_eq!(policy(&[]), json!({}));
    assert_eq!(policy(&scope), json!({"unlabelled": "platform_managed"}));
    assert_eq!(
        policy(&[&scope[..], &["policy.unlabelled=deny"]].concat()),
        json!({"unlabelled": "deny"})
    );
    // A changed policy changes the checksum annotation, so the Deployment rolls out.
    let checksum = |settings: &[&str]| {
        let objects = render(&[&[DATABASE], settings].concat());
        of_kind(&objects, "Deployment")["spec"]["template"]["metadata"]["annotations"].clone()
    };
    assert_ne!(checksum(&[]), checksum(&["policy.envFrom=deny"]));
    assert_eq!(checksum(&[]), checksum(&["replicas=3"]));
}

#[test]
fn only_self_managed_tls_gets_token_and_permissions() {
    for (mode, has_token) in [
        ("self-managed", true),
        ("cert-manager", false),
        ("provided", false),
    ] {
        let mode = format!("tls.mode={mode}");
        let objects = render(&[DATABASE, &mode, "tls.provided.secretName=tls"]);
        let spec = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"];
        assert_eq!(spec["automountServiceAccountToken"], has_token, "{mode}");
        assert_eq!(of_kind(&objects, "ServiceAccount")["automountServiceAccountToken"], false);
        let kinds: BTreeSet<&str> = objects
            .iter()
            .map(|object| object["kind"].as_str().unwrap())
            .collect();
        for kind in ["Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"] {
            assert_eq!(kinds.contains(kind), has_token, "{mode} {kind}");
        }
    }
}

#[test]
fn provided_ca_bundle_reaches_the_webhook_configuration() {
    let pem = Authority::generate().pem();
    let ca_bundle = format!("tls.provided.caBundle={pem}");
    let objects = render(&[
        DATABASE,
        "tls.mode=provided",
        "tls.provided.secretName=tls",
        &ca_bundle,
    ]);
    let client = &of_kind(&objects, "MutatingWebhookConfiguration")["webhooks"][0]["clientConfig"];
    assert_eq!(client["caBundle"], STANDARD.encode(pem));
}

#[test]
fn values_schema_contains_the_policy_schema() {
    let schema = fs::read(chart().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let mut policy: Value = serde_json::from_str(&run(&["policy", "schema"]).1).unwrap();
    let policy = policy.as_object_mut().unwrap();
    policy.remove("$schema");
    let definitions = policy.remove("$defs").unwrap();
    let remedy = "values.schema.json is stale; put what `policy schema` prints into properties.policy and $defs";
    assert!(schema["properties"]["policy"] == json!(policy), "{remedy}");
    assert!(schema["$defs"] == definitions, "{remedy}");
}

#[test]
fn notes_warn_about_a_versioned_anthropic_base_url() {
    let chart = chart();
    let notes = |url: &str| {
        let url = format!("policy.proxy.anthropicBaseUrl={url}");
        let arguments = ["install", "x", chart.to_str().unwrap(), "--dry-run=client"];
        let output = helm(&[&arguments[..], &["--set", DATABASE, "--set", &url]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_once("\nNOTES:\n").unwrap().1.to_owned()
    };
    let warning = "WARNING: policy.proxy.anthropicBaseUrl ends in /v1.";
    assert!(notes("https://x/anthropic/v1/").contains(warning));
    assert!(!notes("https://x/anthropic").contains(warning));
}

#[test]
fn converge_is_scoped_monitored_and_restricted() {
    let objects = render(&[
        DATABASE,
        "converge.enabled=true",
        "converge.apply=true",
        "converge.window=22:00-06:00",
        "namespaceSelector.matchLabels.workspaces=yes",
        "networkPolicy.enabled=true",
        "podMonitor.enabled=true",
        "serviceMonitor.enabled=true",
        "prometheusRule.enabled=true",
    ]);
    let name = format!("{RELEASE}-converge");
    let of_converge = |kind: &str| {
        let mut found = objects.iter();
        found
            .find(|object| object["kind"] == kind && object["metadata"]["name"] == name.as_str())
            .unwrap()
    };
    let template = &of_converge("Deployment")["spec"]["template"];
    let selector = "--namespace-selector=kubernetes.io/metadata.name notin (kube-system,llm-billing-webhook),workspaces=yes";
    let arguments = template["spec"]["containers"][0]["args"]
        .as_array()
        .unwrap();
    assert!(arguments.contains(&selector.into()), "{arguments:?}");

    let selects = |selector: &Value, labels: &Value| {
        let equal = selector["matchLabels"].as_object().unwrap().iter();
        let mut one_of = selector["matchExpressions"]
            .as_array()
            .into_iter()
            .flatten();
        equal.clone().all(|(key, value)| labels[key] == *value)
            && one_of.all(|rule| {
                let key = rule["key"].as_str().unwrap();
                rule["operator"] == "In"
                    && rule["values"].as_array().unwrap().contains(&labels[key])
            })
    };
    let pod = &template["metadata"]["labels"];
    let service = &of_converge("Service")["metadata"]["labels"];
    assert!(selects(&of_kind(&objects, "PodMonitor")["spec"]["selector"], pod));
    assert!(selects(&of_kind(&objects, "ServiceMonitor")["spec"]["selector"], service));
    assert!(selects(&of_converge("NetworkPolicy")["spec"]["podSelector"], pod));

    // Until the window has passed, drift is expected.
    let rules = &of_kind(&objects, "PrometheusRule")["spec"]["groups"][0]["rules"];
    let mut rules = rules.as_array().unwrap().iter();
    let drifted = rules.find(|rule| rule["alert"] == "LlmBillingPodsDrifted");
    assert_eq!(drifted.unwrap()["for"], "1d");
}

/// Returns the rules with all of the chart's alerts.
fn alerts() -> Value {
    let objects = render(&[
        DATABASE,
        "prometheusRule.enabled=true",
        "converge.enabled=true",
        "converge.interval=10m",
        "webhook.failurePolicy=Ignore",
    ]);
    of_kind(&objects, "PrometheusRule")["spec"].clone()
}

#[test]
fn alerts_fire_exactly_when_expected() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("rules.yaml"), alerts().to_string()).unwrap();
    fs::copy(fixtures("alerts/alerts.yaml"), path("alerts.yaml")).unwrap();
    let mut promtool = Command::new("promtool");
    let output = with_tools(&mut promtool, Path::new(""))
        .args(["test", "rules"])
        .arg(path("alerts.yaml"))
        .output()
        .expect("promtool is not installed; scripts/check installs it");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

#[test]
fn each_alert_has_a_runbook_section_and_data() {
    let alerts = alerts();
    let groups = alerts["groups"].as_array().unwrap().iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
    let names: BTreeSet<String> = rules
        .map(|rule| {
            let name = rule["alert"].as_str().unwrap();
            let link = rule["annotations"]["runbook_url"].as_str().unwrap();
            assert!(link.ends_with(&format!("#{}", name.to_lowercase())), "{link}");
            name.to_owned()
        })
        .collect();
    let runbook = page("docs/runbook.md");
    let sections = runbook.lines().filter_map(|line| line.strip_prefix("## "));
    let sections = sections.filter(|section| section.starts_with("Llm"));
    assert_eq!(sections.map(str::to_owned).collect::<BTreeSet<_>>(), names);
    let data: Value = serde_saphyr::from_str(&page("tests/fixtures/alerts/alerts.yaml")).unwrap();
    for name in names {
        let is_expected_to_fire = data["tests"].as_array().unwrap().iter().any(|test| {
            let checks = test["alert_rule_test"].as_array().into_iter().flatten();
            checks.into_iter().any(|check| {
                let fires = check["exp_alerts"]
                    .as_array()
                    .is_some_and(|alerts| !alerts.is_empty());
                check["alertname"] == name.as_str() && fires
            })
        });
        assert!(is_expected_to_fire, "{name}");
    }
}

#[test]
fn plain_manifests_match_the_rendered_chart() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut render = Command::new(root.join("scripts/manifests"));
    let output = with_tools(render.arg("-"), Path::new("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let committed = fs::read_to_string(root.join("manifests/install.yaml")).unwrap();
    assert!(
        String::from_utf8(output.stdout).unwrap() == committed,
        "manifests/install.yaml is stale; run scripts/manifests"
    );
    // `kubectl delete -f` would delete the namespace, and with it the database's Secret.
    assert!(!committed.contains("kind: Namespace"));
}

#[test]
fn chart_crate_toolchain_and_image_versions_match() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
    let metadata: Value =
        serde_saphyr::from_str(&read("charts/llm-billing-webhook/Chart.yaml")).unwrap();
    assert_eq!(metadata["appVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(metadata["version"], env!("CARGO_PKG_VERSION"));
    let rust = env!("CARGO_PKG_RUST_VERSION");
    assert!(read("rust-toolchain.toml").contains(&format!("\"{rust}\"")));
    assert!(
        read("Dockerfile").contains(&format!("rust:{rust}-")),
        "the Dockerfile's Rust is not {rust}"
    );
}
