//! The environment of the e2e tests: a real control plane with the chart's webhook configurations, the real program
//! behind them, and kubectl. The tests themselves are in the other files.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use test_support::api_server::ApiServer;
use test_support::chart::{render, with_tools};
use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook, decode_output, wait_for};
use test_support::{PROXY, WORKSPACE_LABEL};

/// The namespace of the workspaces in the fixtures.
pub(crate) const NAMESPACE: &str = "ws-acme";
/// A byok workspace.
pub(crate) const BYOK: &str = "22222222-2222-4222-8222-222222222222";
/// A platform_managed workspace.
pub(crate) const MANAGED: &str = "11111111-1111-4111-8111-111111111111";

/// Workspaces by id, each with its stored mode as SQL: every mode, no mode and an unknown mode.
const ROWS: [(&str, &str); 5] = [
    (MANAGED, "'platform_managed'"),
    (BYOK, "'byok'"),
    ("33333333-3333-4333-8333-333333333333", "'disabled'"),
    ("44444444-4444-4444-8444-444444444444", "NULL"),
    ("55555555-5555-4555-8555-555555555555", "'enterprise'"),
];

pub(crate) struct World {
    pub(crate) api: ApiServer,
    pub(crate) folder: tempfile::TempDir,
    kubeconfig: PathBuf,
}

impl World {
    /// Starts the control plane, or returns `None` and prints once why the suite is skipped.
    pub(crate) fn start() -> Option<Self> {
        static SKIPPED: Once = Once::new();
        if std::env::var_os("KUBEBUILDER_ASSETS").is_none() {
            SKIPPED.call_once(|| {
                let line = "skipped: tests/e2e: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver\n";
                std::io::stderr().write_all(line.as_bytes()).unwrap();
            });
            return None;
        }
        let (api, folder) = (ApiServer::start(), tempfile::tempdir().unwrap());
        let kubeconfig = api.kubeconfig(folder.path(), None);
        let world = Self {
            api,
            folder,
            kubeconfig,
        };
        world.create_namespace(NAMESPACE, &json!({}));
        Some(world)
    }

    pub(crate) fn create_namespace(&self, name: &str, labels: &Value) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.api.create_all([&namespace]);
    }

    /// Starts the controllers, and reports whether kube-controller-manager is available.
    pub(crate) fn start_controllers(&mut self) -> bool {
        let plane = self.api.control_plane.as_mut().unwrap();
        let started = plane.start_controllers(&self.kubeconfig);
        if !started {
            eprintln!(
                "skipped: pods of workloads: KUBEBUILDER_ASSETS has no kube-controller-manager"
            );
        }
        started
    }

    /// Creates the table of workspaces in a real PostgreSQL.
    pub(crate) fn workspaces() -> Postgres {
        let rows: Vec<String> = ROWS
            .iter()
            .map(|(id, mode)| format!("('{id}', {mode})"))
            .collect();
        Postgres::with(&format!(
            "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text); INSERT INTO workspaces VALUES {}",
            rows.join(", ")
        ))
    }

    /// Starts the program, and applies the webhook configurations that the chart renders with these settings.
    pub(crate) fn install(&self, postgres: &Postgres, policy: &str, settings: &[&str]) -> Webhook {
        let webhook = Start {
            policy,
            database_url: &postgres.url(),
            ..Start::default()
        }
        .start();
        self.configure(settings, webhook.address.port(), &webhook.authority.pem());
        webhook
    }

    /// Applies the chart's webhook configurations with kubectl, with this port of loopback in place of the Service.
    pub(crate) fn configure(&self, settings: &[&str], port: u16, authority: &str) {
        let provided = [
            "database.existingSecret=db",
            "tls.mode=provided",
            "tls.provided.secretName=tls",
        ];
        let mut configurations: Vec<Value> = render(&[&provided, settings].concat())
            .into_iter()
            .filter(|object| {
                object["kind"]
                    .as_str()
                    .unwrap()
                    .ends_with("WebhookConfiguration")
            })
            .collect();
        for configuration in &mut configurations {
            for webhook in configuration["webhooks"].as_array_mut().unwrap() {
                let path = webhook["clientConfig"]["service"]["path"].take();
                let url = format!("https://localhost:{port}{}", path.as_str().unwrap());
                webhook["clientConfig"] =
                    json!({"url": url, "caBundle": STANDARD.encode(authority)});
            }
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": configurations});
        let file = self.write("configurations.json", &list.to_string());
        self.kubectl_ok(&["apply", "-f", &file]);
        // The API server picks a new configuration up with a delay.
        let is_namespaced = settings
            .iter()
            .any(|setting| setting.starts_with("scope=namespace"));
        if !is_namespaced {
            self.wait_until_called(NAMESPACE);
        }
    }

    /// Waits until the API server calls the webhook for pods of a namespace.
    pub(crate) fn wait_until_called(&self, namespace: &str) {
        let pod = pod("probe", MANAGED, &json!([]));
        wait_for("the webhook is called", || {
            let path = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
            let mut pod = pod.clone();
            pod["metadata"]["namespace"] = namespace.into();
            let (status, created) = self.api.request("POST", &path, Some(&pod));
            let is_mutated = created["metadata"]["annotations"]
                .get("molecule.ai/llm-billing-mode")
                .is_some();
            (is_mutated || status != 201).then_some(())
        });
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let file = self.folder.path().join(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }

    /// Runs a tool against the cluster, and returns its exit code, stdout and stderr.
    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(program);
        with_tools(&mut command, Path::new(""))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::null());
        decode_output(&command.output().unwrap())
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> (i32, String, String) {
        self.tool("kubectl", arguments)
    }

    /// Runs kubectl, which must succeed, and returns its stdout.
    pub(crate) fn kubectl_ok(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.kubectl(arguments);
        assert_eq!(code, 0, "kubectl {arguments:?}: {stderr}");
        stdout
    }

    /// Returns the pod with this name in the workspaces' namespace.
    pub(crate) fn stored(&self, pod: &str) -> Option<Value> {
        self.api
            .get(&format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}"))
    }

    /// Returns the pods in the workspaces' namespace.
    pub(crate) fn pods(&self) -> Vec<Value> {
        let list = self
            .api
            .get(&format!("/api/v1/namespaces/{NAMESPACE}/pods"))
            .unwrap();
        list["items"].as_array().unwrap().clone()
    }

    pub(crate) fn kubeconfig(&self) -> &str {
        self.kubeconfig.to_str().unwrap()
    }
}

/// Returns a pod with one container.
pub(crate) fn pod(name: &str, workspace: &str, env: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {WORKSPACE_LABEL: workspace}},
        "spec": {"containers": [{"name": "agent", "image": "busybox", "env": env}]},
    })
}

/// Returns the fixtures' policy, preceded by these fields.
pub(crate) fn policy(fields: &str) -> String {
    format!("{fields}\n{PROXY}")
}

/// Returns a container's env entries as name and literal value, with `""` for a reference.
pub(crate) fn env_of(container: &Value) -> Vec<(String, String)> {
    let entries = container["env"].as_array().into_iter().flatten();
    entries
        .map(|entry| {
            let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
            (text("name"), text("value"))
        })
        .collect()
}

/// Asserts that a container's env matches its billing mode. Its manifest may set `HF_TOKEN`.
pub(crate) fn assert_env_matches(container: &Value, mode: &str) {
    let env = env_of(container);
    let values = |name: &str| -> Vec<&str> {
        let found = env.iter().filter(|(own, _)| own == name);
        found.map(|(_, value)| value.as_str()).collect()
    };
    let context = format!("{mode}: {container}");
    assert_eq!(values("MOLECULE_LLM_BILLING_MODE"), [mode], "{context}");
    assert_eq!(values("MOLECULE_LLM_BILLING_MODE_RESOLVED"), [mode], "{context}");
    if mode == "platform_managed" {
        assert_eq!(values("HF_TOKEN"), [""; 0], "{context}");
        assert_eq!(
            values("MOLECULE_LLM_BASE_URL"),
            ["https://proxy.example.test/openai/v1"],
            "{context}"
        );
        assert_eq!(values("OPENAI_API_KEY"), [""], "{context}");
    } else {
        assert_eq!(values("MOLECULE_LLM_BASE_URL"), [""; 0], "{context}");
        assert_eq!(values("OPENAI_API_KEY"), [""; 0], "{context}");
    }
}

/// Sets a flag when dropped, so that threads end even after a panic.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
