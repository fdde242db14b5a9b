//! A Kubernetes API server for the tests, with its administrator's client. It is the real one if `KUBEBUILDER_ASSETS`
//! names a folder with `etcd` and `kube-apiserver`; otherwise a stand-in.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::control_plane::ControlPlane;
use super::program::TIMEOUT;
use super::stand_in;

/// A running API server and its administrator's client.
pub struct ApiServer {
    url: String,
    client: Agent,
    /// `None` for the stand-in.
    pub control_plane: Option<ControlPlane>,
}

/// The administrator's token on the real API server.
pub const TOKEN: &str = "administrator";

impl ApiServer {
    /// Starts the real API server if it is installed, otherwise the stand-in.
    pub fn start() -> Self {
        Self::of_assets().unwrap_or_else(Self::stand_in)
    }

    /// Starts the stand-in.
    pub fn stand_in() -> Self {
        Self {
            url: format!("http://{}", stand_in::serve()),
            client: agent(None),
            control_plane: None,
        }
    }

    /// Starts the real API server. If it is not installed, reports that `what` is skipped.
    pub fn real(what: &str) -> Option<Self> {
        let real = Self::of_assets();
        if real.is_none() {
            report_skipped(what);
        }
        real
    }

    /// Reports whether this is the real API server.
    pub fn is_real(&self) -> bool {
        self.control_plane.is_some()
    }

    fn of_assets() -> Option<Self> {
        let assets = std::env::var_os("KUBEBUILDER_ASSETS")?;
        let control_plane = ControlPlane::start(Path::new(&assets));
        Some(Self {
            url: control_plane.url.clone(),
            client: agent(Some(&control_plane.authority())),
            control_plane: Some(control_plane),
        })
    }

    /// Writes a kubeconfig for the administrator, who impersonates `user` if given. Returns its path.
    pub fn kubeconfig(&self, folder: &Path, user: Option<&str>) -> PathBuf {
        let mut credentials = json!({ "token": TOKEN });
        if let Some(user) = user {
            credentials["as"] = user.into();
        }
        let name = user.unwrap_or("administrator").replace(':', "-");
        let file = folder.join(format!("kubeconfig-{name}"));
        write_kubeconfig(&file, &self.cluster(), &credentials);
        file
    }

    /// Writes a kubeconfig that authenticates with this token. Returns its path.
    pub fn kubeconfig_with_token(&self, folder: &Path, token: &str) -> PathBuf {
        let file = folder.join("kubeconfig-with-token");
        write_kubeconfig(&file, &self.cluster(), &json!({ "token": token }));
        file
    }

    fn cluster(&self) -> Value {
        let mut cluster = json!({ "server": self.url });
        if let Some(control_plane) = &self.control_plane {
            cluster["certificate-authority-data"] =
                STANDARD.encode(control_plane.authority()).into();
        }
        cluster
    }

    /// Sends a request as the administrator, and returns status and body.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {TOKEN}"))
            .header("content-type", "application/json");
        let body = body.map_or(String::new(), Value::to_string);
        let mut response = self.client.run(request.body(body).unwrap()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap())
    }

    /// Returns an object by its path, or `None` if it does not exist.
    pub fn get(&self, path: &str) -> Option<Value> {
        match self.request("GET", path, None) {
            (200, object) => Some(object),
            (404, _) => None,
            other => panic!("{path}: {other:?}"),
        }
    }

    /// Creates an object in the collection of this path.
    pub fn create(&self, path: &str, object: &Value) -> Value {
        let (status, created) = self.request("POST", path, Some(object));
        assert_eq!(status, 201, "{path}: {created}");
        created
    }

    /// Updates an object, and retries after a conflict.
    pub fn change(&self, path: &str, change: impl Fn(&mut Value)) {
        loop {
            let mut object = self.get(path).unwrap();
            change(&mut object);
            match self.request("PUT", path, Some(&object)) {
                (200, _) => return,
                (409, _) => {}
                other => panic!("{path}: {other:?}"),
            }
        }
    }

    /// Deletes an object.
    pub fn delete(&self, path: &str) {
        let (status, answer) = self.request("DELETE", path, None);
        assert_eq!(status, 200, "{path}: {answer}");
    }

    /// Creates a manifest's objects, each in its own namespace.
    pub fn create_all<'o>(&self, objects: impl IntoIterator<Item = &'o Value>) {
        for object in objects {
            self.create(&collection_of(object), object);
        }
    }
}

/// Prints that `what` is skipped because it needs the real API server.
pub fn report_skipped(what: &str) {
    // The test harness captures what the print macros write.
    let line = format!(
        "skipped: {what}: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver\n"
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Returns the path of an object's collection, by Kubernetes' rules for paths.
pub fn collection_of(object: &Value) -> String {
    let api = match object["apiVersion"].as_str().unwrap() {
        "v1" => "/api/v1".to_owned(),
        version => format!("/apis/{version}"),
    };
    let kind = object["kind"].as_str().unwrap().to_lowercase();
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{kind}s"),
    };
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{api}/namespaces/{namespace}/{plural}"),
        None => format!("{api}/{plural}"),
    }
}

/// Returns a client that trusts these authorities, if any.
pub fn agent(authorities: Option<&str>) -> Agent {
    let roots = authorities.map(|pem| {
        let blocks = pem.split_inclusive("-----END CERTIFICATE-----");
        let certificates = blocks.filter_map(|block| Certificate::from_pem(block.as_bytes()).ok());
        RootCerts::from(certificates.collect::<Vec<_>>())
    });
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = TlsConfig::builder()
        .root_certs(roots.unwrap_or(RootCerts::from(Vec::new())))
        .unversioned_rustls_crypto_provider(provider)
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .allow_non_standard_methods(true)
        .timeout_global(Some(TIMEOUT))
        .build()
        .into()
}

/// Writes a kubeconfig for a cluster and credentials, as its format has them.
pub fn write_kubeconfig(file: &Path, cluster: &Value, credentials: &Value) {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": credentials}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
    });
    fs::write(file, config.to_string()).unwrap();
}
