//! The audit of running pods: findings, output formats, evictions, permissions. How the core compares one pod is tested
//! in `src/core/audit.rs`.

use std::fs;
use std::process::Command;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use test_support::api_server::{ApiServer, collection_of, report_skipped};
use test_support::chart::RELEASE;
use test_support::load::BYOK;
use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook, decode_output, program, wait_for};
use test_support::transcript::assert_transcripts;
use test_support::{PROXY, WORKSPACE_LABEL};

/// Workspaces, named after the state of their pods.
pub(crate) const IN_SYNC: &str = "11111111-1111-4111-8111-111111111111";
pub(crate) const OLD: &str = "22222222-2222-4222-8222-222222222222";
pub(crate) const FLIPPED: &str = "33333333-3333-4333-8333-333333333333";
pub(crate) const OUTAGE: &str = "44444444-4444-4444-8444-444444444444";
pub(crate) const NAMESPACE: &str = "ws-acme";

/// A cluster, a webhook for its pods, and the webhook's database.
pub(crate) struct Platform {
    pub(crate) api: ApiServer,
    pub(crate) postgres: Postgres,
    webhook: Webhook,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) kubeconfig: String,
    pub(crate) policy: String,
}

impl Platform {
    pub(crate) fn start() -> Self {
        let schema = format!(
            "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);
             INSERT INTO workspaces VALUES
                 ('{IN_SYNC}', 'platform_managed'), ('{OLD}', 'platform_managed'), ('{FLIPPED}', 'byok'), ('{OUTAGE}', 'byok')"
        );
        let postgres = Postgres::with(&schema);
        let start = Start {
            policy: PROXY,
            database_url: &postgres.url(),
            ..Start::default()
        };
        let webhook = start.start();
        let (api, folder) = (ApiServer::start(), tempfile::tempdir().unwrap());
        let kubeconfig = api.kubeconfig(folder.path(), None);
        let kubeconfig = kubeconfig.to_str().unwrap().to_owned();
        let policy = webhook.folder.path().join("policy.yaml");
        let platform = Self {
            api,
            postgres,
            policy: policy.to_str().unwrap().to_owned(),
            webhook,
            folder,
            kubeconfig,
        };
        for name in [NAMESPACE, "expires", RELEASE] {
            let namespace =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            platform.api.create_all([&namespace]);
        }
        platform
    }

    /// Registers the webhook for pods.
    pub(crate) fn register_webhook(&self) {
        let configuration = json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "llm-billing"},
            "webhooks": [{
                "name": "mutate.llm-billing.molecule.ai",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "objectSelector": {"matchExpressions": [{"key": WORKSPACE_LABEL, "operator": "Exists"}]},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
                "clientConfig": {
                    "url": format!("https://localhost:{}/mutate", self.webhook.address.port()),
                    "caBundle": STANDARD.encode(self.webhook.authority.pem()),
                },
            }],
        });
        self.api.create_all([&configuration]);
        // A real API server applies the configuration with a delay.
        wait_for("pods pass the webhook", || {
            let pod = pod("probe", IN_SYNC, None);
            let path = format!("{}?dryRun=All", collection_of(&pod));
            let created = self.api.request("POST", &path, Some(&pod)).1;
            created["metadata"]["annotations"]
                .get("molecule.ai/llm-billing-mode")
                .map(|_| ())
        });
    }

    /// Creates four pods: one in sync, and one for each cause of drift.
    pub(crate) fn create_drift(&self) {
        self.api
            .create_all([&pod("old", OLD, Some("ReplicaSet/old"))]);
        self.register_webhook();
        self.api.create_all([
            &pod("true", IN_SYNC, None),
            &pod("flipped", FLIPPED, Some("ReplicaSet/flipped")),
        ]);
        self.postgres
            .execute("ALTER TABLE workspaces RENAME TO gone");
        self.api
            .create_all([&pod("outage", OUTAGE, Some("Job/outage"))]);
        self.postgres
            .execute("ALTER TABLE gone RENAME TO workspaces");
        self.set(FLIPPED, "disabled");
    }

    /// Creates a pod without the label, in a namespace whose pods are all in scope.
    pub(crate) fn create_without_label(&self) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "scoped", "labels": {"workspaces": "yes"}}});
        let mut unlabelled = pod("unlabelled", "", None);
        let metadata = unlabelled["metadata"].as_object_mut().unwrap();
        metadata.remove("labels");
        metadata.insert("namespace".to_owned(), "scoped".into());
        self.api.create_all([&namespace, &unlabelled]);
    }

    pub(crate) fn set(&self, workspace: &str, mode: &str) {
        self.postgres.execute(&format!(
            "UPDATE workspaces SET llm_billing_mode = '{mode}' WHERE id = '{workspace}'"
        ));
    }

    fn command(&self, arguments: &[&str], kubeconfig: &str) -> Command {
        let mut command = program(&["audit", "--policy", &self.policy]);
        command
            .args(["--database-url", &self.postgres.url()])
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .stdin(std::process::Stdio::null());
        command
    }

    /// Runs an audit and returns exit code, stdout and stderr.
    fn audit(&self, arguments: &[&str]) -> (i32, String, String) {
        decode_output(&self.command(arguments, &self.kubeconfig).output().unwrap())
    }

    /// Creates pods of a realistic size, two for each workspace, all in sync. Returns their number: `AUDIT_PODS`, or 1,500.
    pub(crate) fn create_many(&self) -> usize {
        let pods: usize = std::env::var("AUDIT_PODS").map_or(1_500, |pods| pods.parse().unwrap());
        self.postgres.execute(&format!(
            "INSERT INTO workspaces SELECT ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, 'byok' FROM generate_series(1, {}) i",
            pods / 2
        ));
        let recorded = &test_support::recorded_reviews()["claude-code-pod"]["request"]["object"];
        let threads = 8;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let api = &self.api;
                scope.spawn(move || {
                    for index in (thread..pods).step_by(threads) {
                        let mut pod = recorded.clone();
                        pod["metadata"] = json!({
                            "name": format!("ws-{index:06}"),
                            "namespace": NAMESPACE,
                            "labels": {WORKSPACE_LABEL: format!("00000000-0000-4000-8000-{:012}", index / 2 + 1)},
                            "annotations": {"molecule.ai/llm-billing-mode": "byok", "molecule.ai/llm-billing-source": "workspace_override"},
                        });
                        let env = pod["spec"]["containers"][0]["env"].as_array_mut().unwrap();
                        for name in ["MOLECULE_LLM_BILLING_MODE", "MOLECULE_LLM_BILLING_MODE_RESOLVED"] {
                            env.push(json!({"name": name, "value": "byok"}));
                        }
                        api.create_all([&pod]);
                    }
                });
            }
        });
        pods
    }

    /// Returns the number of transactions that the database has committed.
    pub(crate) fn transactions(&self) -> usize {
        let count = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()";
        self.postgres.query(count).parse().unwrap()
    }

    pub(crate) fn pod_names(&self) -> Vec<String> {
        let pods = self
            .api
            .get(&format!("/api/v1/namespaces/{NAMESPACE}/pods"))
            .unwrap();
        let pods = pods["items"].as_array().unwrap().iter();
        pods.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// Returns a pod with its own vendor key and, optionally, a controller.
pub(crate) fn pod(name: &str, workspace: &str, owner: Option<&str>) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {WORKSPACE_LABEL: workspace, "app": name}},
        "spec": {"containers": [{"name": "agent", "image": "busybox", "env": [{"name": "OPENAI_API_KEY", "value": "sk-own-0123456789"}]}]},
    });
    if let Some((kind, name)) = owner.and_then(|owner| owner.split_once('/')) {
        let api = if kind == "Job" { "batch/v1" } else { "apps/v1" };
        pod["metadata"]["ownerReferences"] = json!([{"apiVersion": api, "kind": kind, "name": name, "uid": "u", "controller": true}]);
    }
    pod
}

#[test]
fn audit_reports_each_drift_with_its_finding() {
    let platform = Platform::start();
    platform.create_drift();
    let (code, stdout, stderr) = platform.audit(&["-n", NAMESPACE, "-o", "json"]);
    assert_eq!(code, 1, "{stderr}");
    assert_eq!(
        stderr,
        "4 pods audited, 3 drifted: wrong_mode 3, vendor_key 1, proxy_variable 1, fallback_in_force 1, not_seen 1\n"
    );
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let entry = |pod: &str,
                 owner: Value,
                 workspace: &str,
                 modes: (&str, &str),
                 findings: Value,
                 details: Value| {
        let secrets = match modes.0 {
            "platform_managed" => json!(["molecule-llm-proxy (key usage-token)"]),
            _ => json!([]),
        };
        json!({
            "namespace": NAMESPACE, "pod": pod, "owner": owner, "workspace": workspace,
            "mode": modes.0, "source": "workspace_override", "reason": "override", "mode_in_env": modes.1,
            "findings": findings, "details": details, "secrets": secrets,
        })
    };
    let mode = "container \"agent\": MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED";
    let all = "container \"agent\": OPENAI_API_KEY, MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED, \
        MOLECULE_LLM_BASE_URL, MOLECULE_LLM_USAGE_TOKEN, MOLECULE_LLM_ANTHROPIC_BASE_URL, MOLECULE_LLM_USAGE_URL, OPENAI_BASE_URL";
    let expected = json!({
        "pods": [
            entry("flipped", json!("ReplicaSet/flipped"), FLIPPED, ("disabled", "byok"), json!(["wrong_mode"]), json!([mode])),
            entry("old", json!("ReplicaSet/old"), OLD, ("platform_managed", "-"), json!(["wrong_mode", "vendor_key", "proxy_variable", "not_seen"]), json!([all])),
            entry("outage", json!("Job/outage"), OUTAGE, ("byok", "platform_managed"), json!(["wrong_mode", "fallback_in_force"]), json!([mode])),
            entry("true", Value::Null, IN_SYNC, ("platform_managed", "platform_managed"), json!([]), json!([])),
        ],
        "summary": {"audited": 4, "drifted": 3, "not_audited": [], "complete": true, "error": null},
    });
    assert_eq!(report, expected);

    let yaml = platform.audit(&["-n", NAMESPACE, "-o", "yaml"]).1;
    assert_eq!(serde_saphyr::from_str::<Value>(&yaml).unwrap(), expected);
    let csv = platform.audit(&["-A", "-l", "app=outage", "-o", "csv"]).1;
    assert_eq!(
        csv,
        "namespace,pod,owner,workspace,database,env,findings,source,reason,details,secrets\n\
         ws-acme,outage,Job/outage,44444444-4444-4444-8444-444444444444,byok,platform_managed,\"wrong_mode,fallback_in_force\",\
         workspace_override,override,\"container \"\"agent\"\": MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED\",-\n"
    );
    let (code, table, _) = platform.audit(&["-n", NAMESPACE, "--only-drift"]);
    assert_eq!(code, 1);
    assert_eq!(
        table,
        "NAMESPACE  POD      OWNER               WORKSPACE                             DATABASE          ENV               FINDINGS\n\
         ws-acme    flipped  ReplicaSet/flipped  33333333-3333-4333-8333-333333333333  disabled          byok              wrong_mode\n\
         ws-acme    old      ReplicaSet/old      22222222-2222-4222-8222-222222222222  platform_managed  -                 wrong_mode,vendor_key,proxy_variable,not_seen\n\
         ws-acme    outage   Job/outage          44444444-4444-4444-8444-444444444444  byok              platform_managed  wrong_mode,fallback_in_force\n"
    );
    let wide = platform.audit(&[
        "-n",
        NAMESPACE,
        "--workspace",
        IN_SYNC,
        "--wide",
        "--color",
        "always",
    ]);
    assert_eq!(wide.0, 0);
    assert_eq!(
        wide.1,
        "\u{1b}[1mNAMESPACE  POD   OWNER  WORKSPACE                             DATABASE          ENV               FINDINGS  SOURCE              REASON    DETAILS  SECRETS\u{1b}[0m\n\
         ws-acme    true  -      11111111-1111-4111-8111-111111111111  platform_managed  platform_managed  -         workspace_override  override  -        molecule-llm-proxy (key usage-token)\n"
    );
    assert_eq!(wide.2, "1 pods audited, all in sync\n");
    assert!(
        ![stdout, csv, table, yaml].concat().contains("sk-own"),
        "output contains an env value"
    );
}

#[test]
fn pod_that_lost_its_label_is_reported() {
    let platform = Platform::start();
    platform.register_webhook();
    let unlabelled = |name: &str| {
        let mut pod = pod(name, "", None);
        pod["metadata"]["labels"] = json!({"app": name});
        pod
    };
    platform.api.create_all([
        &pod("relabelled", FLIPPED, Some("ReplicaSet/relabelled")),
        // Never was a workspace's.
        &unlabelled("other"),
    ]);
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/relabelled");
    let mut stored = platform.api.get(&path).unwrap();
    let labels = stored["metadata"]["labels"].as_object_mut().unwrap();
    labels.remove(WORKSPACE_LABEL);
    let (status, answer) = platform.api.request("PUT", &path, Some(&stored));
    assert_eq!(status, 200, "{answer}");
    let (code, stdout, stderr) = platform.audit(&["-A", "--wide", "-o", "csv"]);
    assert_eq!(code, 1, "{stderr}");
    assert_eq!(
        stdout,
        "namespace,pod,owner,workspace,database,env,findings,source,reason,details,secrets\n\
         ws-acme,relabelled,ReplicaSet/relabelled,-,platform_managed,byok,label_changed,constant_fallback,\
         missing_workspace_id,\"no label \"\"molecule.ai/workspace-id\"\"\",-\n"
    );
}

#[test]
fn eviction_spares_bare_and_budgeted_pods() {
    let platform = Platform::start();
    platform.api.create_all([&pod("bare", OLD, None)]);
    platform.create_drift();
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "outage", "namespace": NAMESPACE},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "outage"}}},
    });
    platform.api.create_all([&budget]);
    // A disruption budget counts running pods.
    let outage = format!("/api/v1/namespaces/{NAMESPACE}/pods/outage");
    let mut running = platform.api.get(&outage).unwrap();
    running["status"] =
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    let (status, answer) = platform
        .api
        .request("PUT", &format!("{outage}/status"), Some(&running));
    assert_eq!(status, 200, "{answer}");
    let before = platform.pod_names();

    let (code, _, stderr) = platform.audit(&["-n", NAMESPACE, "--evict"]);
    assert_eq!(
        (code, stderr.as_str()),
        (
            2,
            "error: --evict asks for confirmation, but stdin is not a terminal; add --yes or --dry-run\n"
        )
    );

    let evict = |extra: &[&str]| {
        let arguments = [
            &["-n", NAMESPACE, "--evict", "--evictions-per-minute", "60"],
            extra,
        ]
        .concat();
        let (code, _, stderr) = platform.audit(&arguments);
        assert_eq!(code, 1, "{stderr}");
        let mut lines = stderr.lines().skip(1).map(str::to_owned);
        lines
            .next()
            .into_iter()
            .chain(lines)
            .collect::<Vec<String>>()
    };
    let bare = "skipped ws-acme/bare: no controller would recreate it; see --evict-bare";
    let budget =
        "skipped ws-acme/outage: Cannot evict pod as it would violate the pod's disruption budget.";
    let actions = evict(&["--dry-run"]);
    assert_eq!(
        actions,
        [
            bare,
            "would evict ws-acme/flipped",
            "would evict ws-acme/old",
            budget
        ]
    );
    assert_eq!(platform.pod_names(), before);

    let started = Instant::now();
    let actions = evict(&["--yes"]);
    assert_eq!(
        actions,
        [
            bare,
            "evicted ws-acme/flipped",
            "evicted ws-acme/old",
            budget
        ]
    );
    // Three evictions are tried, with two pauses of 1 s between them.
    assert!(started.elapsed().as_secs() >= 2, "{:?}", started.elapsed());
    wait_for("the pods have ended", || {
        (platform.pod_names() == ["bare", "outage", "true"]).then_some(())
    });

    platform
        .api
        .delete(&format!("/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/outage"));
    let actions = evict(&["--yes", "--evict-bare"]);
    assert_eq!(actions, ["evicted ws-acme/bare", "evicted ws-acme/outage"]);
    wait_for("the pods have ended", || (platform.pod_names() == ["true"]).then_some(()));

    // Recreate the pods as their controllers would.
    platform.api.create_all([
        &pod("flipped", FLIPPED, Some("ReplicaSet/flipped")),
        &pod("old", OLD, Some("ReplicaSet/old")),
        &pod("outage", OUTAGE, Some("Job/outage")),
    ]);
    let (code, stdout, stderr) = platform.audit(&["-A", "--only-drift", "--evict", "--yes"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", "4 pods audited, all in sync\n"));
}

#[test]
fn incomplete_audit_exits_with_an_error() {
    let platform = Platform::start();
    platform.register_webhook();
    platform.api.create_all([&pod("true", IN_SYNC, None)]);
    let kubeconfig = platform
        .api
        .kubeconfig(platform.folder.path(), Some("unprivileged"));
    let forbidden = platform
        .command(&["-n", NAMESPACE], kubeconfig.to_str().unwrap())
        .output()
        .unwrap();
    let (code, stdout, stderr) = decode_output(&forbidden);
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("error: the audit ended early, after 0 pods; the others were not audited: cannot list the pods in namespace ws-acme: the API server refused the request: "), "{stderr}");
    assert!(stderr.contains("unprivileged"), "{stderr}");

    let unconfigured = platform.command(&["-A"], "/nonexistent").output().unwrap();
    let (code, _, stderr) = decode_output(&unconfigured);
    assert_eq!(code, 2);
    assert!(stderr.starts_with("error: no cluster configured: "), "{stderr}");

    platform
        .postgres
        .execute("ALTER TABLE workspaces RENAME TO gone");
    let file = platform.folder.path().join("metrics.prom");
    let (code, stdout, stderr) = platform.audit(&["-A", "--metrics-file", file.to_str().unwrap()]);
    let error = "error: cannot audit: the database refuses the policy's query: relation \"workspaces\" does not exist\n";
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (2, "", error));
    assert!(!file.exists());
    platform
        .postgres
        .execute("ALTER TABLE gone RENAME TO workspaces");
    let (code, _, stderr) = platform.audit(&["-n", "nowhere"]);
    assert_eq!((code, stderr.as_str()), (0, "no pods found\n"));
}

#[test]
fn unusable_parameters_skip_only_that_pod() {
    let platform = Platform::start();
    platform.api.create_all([
        &pod("good", FLIPPED, None),
        &pod("not-a-uuid", "not-a-uuid", None),
    ]);
    let query = "SELECT llm_billing_mode FROM workspaces WHERE id = $1::uuid";
    let policy = format!(
        "lookup: {{query: {query:?}, parameters: [{{label: molecule.ai/workspace-id, type: text}}]}}\n{PROXY}"
    );
    let file = platform.folder.path().join("policy.yaml");
    fs::write(&file, policy).unwrap();
    let metrics = platform.folder.path().join("metrics.prom");
    let mut command = program(&[
        "audit",
        "-A",
        "-o",
        "json",
        "--policy",
        file.to_str().unwrap(),
    ]);
    command
        .args(["--database-url", &platform.postgres.url()])
        .args(["--metrics-file", metrics.to_str().unwrap()])
        .env("KUBECONFIG", &platform.kubeconfig);
    let (code, stdout, stderr) = decode_output(&command.output().unwrap());
    assert_eq!(code, 2);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["pods"][0]["pod"], "good");
    assert_eq!(report["pods"][0]["mode"], "byok");
    let error = "ws-acme/not-a-uuid: the database cannot use the pod's parameters: invalid input syntax for type uuid: \"not-a-uuid\"";
    let summary = json!({"audited": 1, "drifted": 1, "not_audited": [error], "complete": false, "error": null});
    assert_eq!(report["summary"], summary);
    assert_eq!(
        stderr,
        format!(
            "error: not audited: {error}\n1 pods audited, 1 drifted; the audit is incomplete\n"
        )
    );
    assert!(!metrics.exists());
}

#[test]
fn unlabelled_scope_requires_a_namespace_selection() {
    let platform = Platform::start();
    platform.create_without_label();
    for (rule, finding) in [("platform_managed", "vendor_key"), ("deny", "refused")] {
        let file = platform.folder.path().join("policy.yaml");
        fs::write(&file, format!("unlabelled: {rule}\n{PROXY}")).unwrap();
        let audit = |arguments: &[&str]| {
            let mut command = program(&["audit", "--policy", file.to_str().unwrap()]);
            command
                .args(["--database-url", &platform.postgres.url()])
                .args(arguments)
                .env("KUBECONFIG", &platform.kubeconfig);
            decode_output(&command.output().unwrap())
        };
        let (code, stdout, stderr) = audit(&["-A"]);
        assert_eq!((code, stdout.as_str()), (2, ""));
        assert!(
            stderr.starts_with("error: see -n and --namespace-selector: the policy's `unlabelled` also covers pods without the workspace label"),
            "{stderr}"
        );
        for scope in [["-n", "scoped"], ["--namespace-selector", "workspaces=yes"]] {
            let (code, stdout, stderr) = audit(&[&scope[..], &["-o", "csv"]].concat());
            assert_eq!(code, 1, "{stderr}");
            assert_eq!(stdout.lines().count(), 2, "{stdout}");
            assert!(stdout.contains(finding), "{stdout}");
        }
    }
}

#[test]
fn expired_list_reports_the_audit_progress() {
    // Only the stand-in can expire a continue token on demand.
    let api = ApiServer::stand_in();
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("modes.sqlite");
    test_support::sqlite(&database, "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)");
    for index in 0..501 {
        let mut pod = pod(&format!("p{index:04}"), IN_SYNC, None);
        pod["metadata"]["namespace"] = "expires".into();
        api.create_all([&pod]);
    }
    let mut command = program(&["audit", "-n", "expires", "--only-drift", "-o", "json"]);
    command
        .args([
            "--database-url",
            &format!("sqlite://{}", database.display()),
        ])
        .env("KUBECONFIG", api.kubeconfig(folder.path(), None));
    let (code, stdout, stderr) = decode_output(&command.output().unwrap());
    assert_eq!(code, 2);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["pods"].as_array().unwrap().len(), 500);
    assert_eq!(report["summary"]["complete"], false);
    let error = "the list of pods in namespace expires expired before its end: too many pods, or a slow database; \
        audit one namespace at a time";
    assert_eq!(report["summary"]["error"], error);
    assert!(
        stderr.starts_with("500 pods audited, 500 drifted; the audit is incomplete\n"),
        "{stderr}"
    );
    assert!(stderr.ends_with(
        "error: the audit ended early, after 500 pods; the others were not audited: the list of pods in namespace expires expired \
         before its end: too many pods, or a slow database; audit one namespace at a time\n"
    ), "{stderr}");
}

#[test]
fn batch_query_looks_up_many_workspaces() {
    let platform = Platform::start();
    platform.api.create_all([
        &pod("known", FLIPPED, None),
        &pod("null", OUTAGE, None),
        &pod("unknown", "99999999-9999-4999-8999-999999999999", None),
        &pod("invalid", "not-a-uuid", None),
        &pod("empty", "", None),
    ]);
    platform.postgres.execute(&format!(
        "UPDATE workspaces SET llm_billing_mode = NULL WHERE id = '{OUTAGE}';
         ALTER TABLE workspaces ADD namespace text;
         UPDATE workspaces SET namespace = '{NAMESPACE}'"
    ));
    let reasons = |query: &str, parameters: &str, url: &str| {
        let policy = format!("lookup: {{query: \"{query}\", parameters: [{parameters}]}}\n{PROXY}");
        let file = platform.folder.path().join("policy.yaml");
        fs::write(&file, policy).unwrap();
        let mut command = program(&["audit", "-A", "-o", "json"]);
        command
            .args(["--policy", file.to_str().unwrap(), "--database-url", url])
            .env("KUBECONFIG", &platform.kubeconfig)
            .env("RUST_LOG", "off");
        let (code, stdout, stderr) = decode_output(&command.output().unwrap());
        assert_eq!(code, 1, "{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        let pods = report["pods"].as_array().unwrap().iter();
        pods.map(|pod| {
            format!(
                "{} {} {}",
                pod["pod"].as_str().unwrap(),
                pod["mode"].as_str().unwrap(),
                pod["reason"].as_str().unwrap()
            )
        })
        .collect::<Vec<_>>()
    };
    let expected = [
        "empty platform_managed missing_workspace_id",
        "invalid platform_managed invalid_workspace_id",
        "known byok override",
        "null platform_managed no_override",
        "unknown platform_managed workspace_not_found",
    ];
    let label = "{label: molecule.ai/workspace-id, type: uuid}";
    let with_namespace = format!("{label}, {{field: namespace}}");
    let select = "SELECT llm_billing_mode FROM workspaces WHERE id = $1";
    let url = platform.postgres.url();
    for (query, parameters) in [
        (select.to_owned(), label),
        (format!("{select} AND namespace = $2"), with_namespace.as_str()),
        // More columns than the mode, and an ORDER BY.
        ("SELECT llm_billing_mode, id FROM workspaces WHERE id = $1 ORDER BY 1".to_owned(), label),
        // A literal that looks like a parameter, and a quoted name.
        (format!("{select} AND '$1''$2' <> 'x' AND \\\"id\\\" = $1"), label),
        // A comment could contain $1, so each workspace gets its own query.
        (format!("{select} /* $1 */"), label),
    ] {
        assert_eq!(reasons(&query, parameters, &url), expected, "{query}");
    }
    // The batch query reads what the webhook reads: a mode padded with blanks is unknown.
    let padded =
        reasons("SELECT rpad(llm_billing_mode, 20) FROM workspaces WHERE id = $1", label, &url);
    assert_eq!(padded[2], "known platform_managed unknown_mode");
    let uncached = format!("{url}&statement-cache-capacity=0");
    assert_eq!(reasons(select, label, &uncached), expected);

    for index in 0..100 {
        let id = format!("{index:08}-0000-4000-8000-000000000000");
        platform
            .api
            .create_all([&pod(&format!("p{index}"), &id, None)]);
    }
    let transactions = |query: &str| {
        let before = platform.transactions();
        reasons(query, label, &url);
        platform.transactions() - before
    };
    let (batched, single) = (transactions(select), transactions(&format!("{select} /* $1 */")));
    assert!(batched < 20, "{batched}");
    assert!(single >= 100, "{single}");
}

#[test]
fn audit_writes_metrics_file_and_pod_events() {
    let platform = Platform::start();
    platform.create_drift();
    let file = platform.folder.path().join("drift.prom");
    let arguments = ["-A", "--metrics-file", file.to_str().unwrap(), "--events"];
    let (code, _, stderr) = platform.audit(&arguments);
    assert_eq!(code, 1, "{stderr}");
    let metrics = fs::read_to_string(&file).unwrap();
    for line in [
        "llm_billing_drift_pods{mode=\"disabled\",finding=\"wrong_mode\"} 1\n",
        "llm_billing_drift_pods{mode=\"byok\",finding=\"fallback_in_force\"} 1\n",
        "llm_billing_drift_pods{mode=\"platform_managed\",finding=\"vendor_key\"} 1\n",
        "llm_billing_drift_pods{mode=\"platform_managed\",finding=\"refused\"} 0\n",
        "llm_billing_audited_pods 4\n",
        "llm_billing_last_audit_timestamp_seconds ",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    assert!(!metrics.contains(OLD));
    let events = platform
        .api
        .get(&format!("/api/v1/namespaces/{NAMESPACE}/events"))
        .unwrap();
    let mut messages: Vec<String> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["reason"] == "LlmBillingDrift")
        .map(|event| {
            format!(
                "{}: {}",
                event["involvedObject"]["name"].as_str().unwrap(),
                event["message"].as_str().unwrap()
            )
        })
        .collect();
    messages.sort();
    assert_eq!(messages.len(), 3);
    assert_eq!(
        messages[0],
        "flipped: the env of this pod does not match the billing mode (wrong_mode): container \"agent\": MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED"
    );
}

#[test]
fn audit_needs_each_permission() {
    let platform = Platform::start();
    platform.create_drift();
    // The permissions that docs/audit.md names.
    let name = "audit";
    let rule = |resource: &str, verb: &str| json!({"apiGroups": [""], "resources": [resource], "verbs": [verb]});
    let kind = |kind: &str, rest: Value| {
        let mut object = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name}});
        object
            .as_object_mut()
            .unwrap()
            .extend(rest.as_object().unwrap().clone());
        object
    };
    let rules = [
        rule("pods", "list"),
        rule("events", "create"),
        rule("pods/eviction", "create"),
    ];
    platform.api.create_all([
        &kind("ClusterRole", json!({"rules": rules})),
        &kind(
            "ClusterRoleBinding",
            json!({
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}],
            }),
        ),
    ]);
    let arguments = [
        "--all-namespaces",
        "--only-drift",
        "--events",
        "--evict",
        "--yes",
    ];
    let user = format!("system:serviceaccount:{NAMESPACE}:{name}");
    let kubeconfig = platform.api.kubeconfig(platform.folder.path(), Some(&user));
    let audit = || {
        decode_output(
            &platform
                .command(&arguments, kubeconfig.to_str().unwrap())
                .output()
                .unwrap(),
        )
    };
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/audit";
    let rules = platform.api.get(role).unwrap()["rules"]
        .as_array()
        .unwrap()
        .clone();
    for rule in &rules {
        platform.api.change(role, |role| {
            role["rules"]
                .as_array_mut()
                .unwrap()
                .retain(|other| other != rule)
        });
        let (code, _, stderr) = audit();
        assert_eq!(code, 2, "{stderr}");
        let resource = rule["resources"][0].as_str().unwrap();
        assert!(
            stderr.contains("is forbidden") && stderr.contains(resource),
            "{resource}: {stderr}"
        );
        platform
            .api
            .change(role, |role| role["rules"] = rules.clone().into());
        // Recreate pods that were evicted although another permission was missing.
        for (name, workspace, owner) in [
            ("flipped", FLIPPED, "ReplicaSet/flipped"),
            ("old", OLD, "ReplicaSet/old"),
        ] {
            let _ = platform.api.request(
                "POST",
                &format!("/api/v1/namespaces/{NAMESPACE}/pods"),
                Some(&pod(name, workspace, Some(owner))),
            );
        }
        platform.set(FLIPPED, ["byok", "disabled"][usize::from(resource != "pods")]);
    }
    platform.set(FLIPPED, "platform_managed");
    let (code, _, stderr) = audit();
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("evicted ws-acme/flipped"), "{stderr}");
}

#[test]
fn cluster_object_is_reviewed_like_a_manifest() {
    let platform = Platform::start();
    platform.create_drift();
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ws", "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": {"app": "ws"}},
            "template": {
                "metadata": {"labels": {WORKSPACE_LABEL: FLIPPED, "app": "ws"}},
                "spec": {"containers": [{"name": "agent", "image": "busybox"}]},
            },
        },
    });
    platform.api.create_all([&deployment]);
    let review = |arguments: &[&str]| {
        let mut command = program(&[
            "review",
            "--policy",
            &platform.policy,
            "--database-url",
            &platform.postgres.url(),
        ]);
        command
            .args(arguments)
            .env("KUBECONFIG", &platform.kubeconfig);
        decode_output(&command.output().unwrap())
    };
    let (code, stdout, stderr) = review(&["-n", NAMESPACE, "pod/true"]);
    assert_eq!(
        (code, stdout.as_str(), stderr.as_str()),
        (
            0,
            "",
            "Pod ws-acme/true: platform_managed (workspace_override, override)\n\
             Pod ws-acme/true: needs Secret molecule-llm-proxy (key usage-token) in namespace ws-acme\n"
        )
    );
    let (code, stdout, _) = review(&["-n", NAMESPACE, "po/old", "-o", "json"]);
    assert_eq!(code, 1);
    let after: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(after["spec"]["containers"][0]["env"][0]["value"], "platform_managed");
    assert_eq!(after["metadata"].get("managedFields"), None);
    let (code, stdout, _) = review(&["-n", NAMESPACE, "deployment/ws", "-o", "patch"]);
    assert_eq!(code, 1);
    assert!(stdout.contains("/spec/template/spec/containers/0/env"), "{stdout}");
    let (code, _, stderr) = review(&["-n", NAMESPACE, "pod/none"]);
    assert_eq!(code, 2);
    assert!(
        stderr.starts_with(
            "error: cannot read pod/none: the API server refused the request: pods \"none\" not found"
        ),
        "{stderr}"
    );
    for (arguments, expected) in [
        (vec!["service/x"], "expected KIND/NAME, with a kind of pod, deployment"),
        (vec!["pod"], "expected KIND/NAME"),
        (vec!["pod/a/b"], "expected KIND/NAME"),
        (vec!["pod/x", "-f", "y"], "cannot be used with"),
        (vec![], "required arguments were not provided"),
    ] {
        let (code, _, stderr) = review(&arguments);
        assert_eq!(code, 2);
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[test]
fn audit_page_transcripts_match_program_output() {
    let platform = Platform::start();
    platform.create_drift();
    platform
        .postgres
        .execute(&format!("INSERT INTO workspaces VALUES ('{BYOK}', 'byok')"));
    let url = platform.postgres.url();
    let environment = [
        ("LLM_BILLING_POLICY", "tests/fixtures/policy.yaml"),
        ("LLM_BILLING_DATABASE_URL", url.as_str()),
        ("KUBECONFIG", platform.kubeconfig.as_str()),
    ];
    // The stand-in has no API discovery, which kubectl needs for `apply`.
    let is_run = |command: &str| {
        let is_run = platform.api.is_real() || !command.starts_with("kubectl apply");
        if !is_run {
            report_skipped(command);
        }
        is_run
    };
    assert_transcripts("docs/audit.md", 5, &environment, is_run);
}

#[test]
fn sweep_queries_once_per_page_in_bounded_memory() {
    let platform = Platform::start();
    let pods = platform.create_many();
    let before = platform.transactions();
    let started = Instant::now();
    let mut command = platform.command(&["-A", "--only-drift"], &platform.kubeconfig);
    let mut child = command
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let size = line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse().unwrap());
        peak = std::cmp::max(peak, size);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let elapsed = started.elapsed();
    let (code, _, stderr) = decode_output(&child.wait_with_output().unwrap());
    assert_eq!((code, stderr), (0, format!("{pods} pods audited, all in sync\n")));
    // This includes the transactions of the counting psql.
    let queries = platform.transactions() - before;
    println!(
        "{pods} pods of {} workspaces: {elapsed:.1?}, {peak} KiB at most, {queries} transactions",
        pods / 2
    );
    assert!(queries <= pods.div_ceil(500) + 10, "{queries}");
    // The limit is the same for three pages and for forty.
    assert!(peak < 64 * 1024, "{peak} KiB");
}
