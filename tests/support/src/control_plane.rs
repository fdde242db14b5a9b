//! The real control plane on loopback: etcd, the API server and, on request, the controllers. The programs come from
//! the folder that `KUBEBUILDER_ASSETS` names, and are killed when the test ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rcgen::KeyPair;
use serde_json::Value;
use tempfile::TempDir;

use super::api_server::{TOKEN, agent};
use super::postgres::free_port;
use super::program::wait_for;

/// The API server's audit policy: it logs pods as they were requested.
const AUDIT_POLICY: &str = "
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Request, resources: [{group: \"\", resources: [pods, pods/ephemeralcontainers]}]}
- {level: None}
";

const API_SERVER: &str = "kube-apiserver";
const CONTROLLERS: &str = "kube-controller-manager";

/// A running control plane.
pub struct ControlPlane {
    /// The API server's URL.
    pub url: String,
    assets: PathBuf,
    folder: TempDir,
    /// The flags of the API server.
    flags: Vec<(&'static str, String)>,
    /// The kubeconfig of the controllers, if they run.
    kubeconfig: String,
    /// By program.
    children: BTreeMap<String, Child>,
}

impl ControlPlane {
    /// Starts etcd and the API server, and waits until it is ready.
    pub fn start(assets: &Path) -> Self {
        let [store, peers, port] = [free_port(), free_port(), free_port()];
        let (store, peers) =
            (format!("http://127.0.0.1:{store}"), format!("http://127.0.0.1:{peers}"));
        let mut plane = Self {
            url: format!("https://127.0.0.1:{port}"),
            assets: assets.to_owned(),
            folder: tempfile::tempdir().unwrap(),
            flags: Vec::new(),
            kubeconfig: String::new(),
            children: BTreeMap::new(),
        };
        let folder = plane.folder.path().to_owned();
        let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let key = KeyPair::generate().unwrap();
        fs::write(path("sa.key"), key.serialize_pem()).unwrap();
        fs::write(path("sa.pub"), key.public_key_pem()).unwrap();
        fs::write(path("audit.yaml"), AUDIT_POLICY).unwrap();
        let tokens = format!("{TOKEN},administrator,1,system:masters\n");
        fs::write(path("tokens.csv"), tokens).unwrap();
        plane.run(
            "etcd",
            &[
                ("data-dir", &path("etcd")),
                ("name", "test"),
                ("listen-client-urls", &store),
                ("advertise-client-urls", &store),
                ("listen-peer-urls", &peers),
                ("initial-advertise-peer-urls", &peers),
                ("initial-cluster", &format!("test={peers}")),
                ("unsafe-no-fsync", "true"),
            ],
        );
        plane.flags = vec![
            ("etcd-servers", store),
            ("bind-address", "127.0.0.1".to_owned()),
            ("advertise-address", "127.0.0.1".to_owned()),
            ("secure-port", port.to_string()),
            ("cert-dir", path("certificates")),
            ("service-account-issuer", "https://localhost".to_owned()),
            ("service-account-key-file", path("sa.pub")),
            ("service-account-signing-key-file", path("sa.key")),
            ("service-cluster-ip-range", "10.0.0.0/24".to_owned()),
            ("token-auth-file", path("tokens.csv")),
            ("authorization-mode", "RBAC".to_owned()),
            ("audit-policy-file", path("audit.yaml")),
            ("audit-log-path", path("audit.log")),
            // No controller creates the service accounts that this plugin requires.
            ("disable-admission-plugins", "ServiceAccount".to_owned()),
        ];
        plane.start_api_server();
        plane
    }

    fn start_api_server(&mut self) {
        let flags = self.flags.clone();
        let flags: Vec<(&str, &str)> = flags
            .iter()
            .map(|(name, value)| (*name, &**value))
            .collect();
        self.run(API_SERVER, &flags);
        wait_for("the API server is ready", || {
            let client = agent(Some(&self.read_certificate()?));
            let ready = client
                .get(format!("{}/readyz", self.url))
                .header("authorization", format!("Bearer {TOKEN}"))
                .call();
            (ready.ok()?.status() == 200).then_some(())
        });
    }

    /// Kills the API server, runs the closure, and starts the API server again. Controllers that run are started again, too:
    /// they would watch again only after a pause of up to 30 s.
    pub fn without_api_server(&mut self, work: impl FnOnce()) {
        self.kill(API_SERVER);
        work();
        self.start_api_server();
        if self.kill(CONTROLLERS) {
            self.run_controllers();
        }
    }

    /// Kills a program. Returns `false` if it was not started.
    fn kill(&mut self, program: &str) -> bool {
        let Some(mut child) = self.children.remove(program) else {
            return false;
        };
        child.kill().unwrap();
        child.wait().unwrap();
        true
    }

    /// Starts the controllers, which create the pods of workloads. Returns `false` if they are not installed.
    pub fn start_controllers(&mut self, kubeconfig: &Path) -> bool {
        if !self.assets.join(CONTROLLERS).is_file() {
            return false;
        }
        self.kubeconfig = kubeconfig.to_str().unwrap().to_owned();
        self.run_controllers();
        true
    }

    fn run_controllers(&mut self) {
        let kubeconfig = self.kubeconfig.clone();
        let kubeconfig = kubeconfig.as_str();
        let (certificates, key) = (self.path("controllers"), self.path("sa.key"));
        self.run(
            CONTROLLERS,
            &[
                ("kubeconfig", kubeconfig),
                ("authentication-kubeconfig", kubeconfig),
                ("authorization-kubeconfig", kubeconfig),
                ("bind-address", "127.0.0.1"),
                ("secure-port", &free_port().to_string()),
                ("cert-dir", &certificates),
                ("leader-elect", "false"),
                ("service-account-private-key-file", &key),
            ],
        );
    }

    fn run(&mut self, program: &str, arguments: &[(&str, &str)]) {
        let flags = arguments
            .iter()
            .map(|(flag, value)| format!("--{flag}={value}"));
        let log = fs::File::create(self.path(&format!("{program}.log"))).unwrap();
        let child = Command::new(self.assets.join(program))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("KUBEBUILDER_ASSETS: {program}: {error}"));
        self.children.insert(program.to_owned(), child);
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// Returns the events of the audit log so far.
    pub fn audit_log(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.path("audit.log")).unwrap_or_default();
        // The last line may be incomplete.
        let events = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        events.collect()
    }

    fn read_certificate(&self) -> Option<String> {
        fs::read_to_string(self.path("certificates/apiserver.crt")).ok()
    }

    /// Returns the certificates in PEM by which a client trusts the API server.
    pub fn authority(&self) -> String {
        self.read_certificate().unwrap()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.children.values_mut().rev() {
            // Both fail only if the process has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
