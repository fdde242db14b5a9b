//! A Kubernetes API server for the tests: where `KUBEBUILDER_ASSETS` names a folder with `etcd` and
//! `kube-apiserver`, the real one; else a stand-in in this process, which keeps any object, compares versions,
//! evaluates RBAC for whoever is impersonated, and asks webhooks about new pods, over TLS and by their `caBundle`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::patch_of;
use super::postgres::free_port;
use super::program::{PATIENCE, wait_for};

/// A running API server, and its administrator.
pub(crate) struct ApiServer {
    url: String,
    client: Agent,
    /// The real one, with what it takes to reach it.
    control_plane: Option<ControlPlane>,
}

/// The administrator's token at the real one.
const TOKEN: &str = "administrator";

impl ApiServer {
    /// Starts one.
    pub(crate) fn start() -> Self {
        Self::of_assets().unwrap_or_else(Self::stand_in)
    }

    /// Starts the stand-in.
    pub(crate) fn stand_in() -> Self {
        Self {
            url: format!("http://{}", serve()),
            client: agent(None),
            control_plane: None,
        }
    }

    /// Starts the real one, or says aloud that what needs it is skipped.
    pub(crate) fn real(what: &str) -> Option<Self> {
        let real = Self::of_assets();
        if real.is_none() {
            say_skipped(what);
        }
        real
    }

    /// Whether it is the real one.
    pub(crate) fn is_real(&self) -> bool {
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

    /// A kubeconfig for `user`, whom the administrator impersonates, or for the administrator.
    pub(crate) fn kubeconfig(&self, folder: &Path, user: Option<&str>) -> PathBuf {
        let mut who = json!({ "token": TOKEN });
        if let Some(user) = user {
            who["as"] = user.into();
        }
        let mut cluster = json!({ "server": self.url });
        if let Some(control_plane) = &self.control_plane {
            cluster["certificate-authority-data"] =
                STANDARD.encode(control_plane.authority()).into();
        }
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": who}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
        });
        let name = user.unwrap_or("administrator").replace(':', "-");
        let file = folder.join(format!("kubeconfig-{name}"));
        fs::write(&file, config.to_string()).unwrap();
        file
    }

    /// Sends a request as the administrator: status and body.
    pub(crate) fn request(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {TOKEN}"))
            .header("content-type", "application/json");
        let body = body.map_or(String::new(), Value::to_string);
        let mut response = self.client.run(request.body(body).unwrap()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (
            response.status().as_u16(),
            serde_json::from_str(&text).unwrap(),
        )
    }

    /// An object by its path; `None` if it is not there.
    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        match self.request("GET", path, None) {
            (200, object) => Some(object),
            (404, _) => None,
            other => panic!("{path}: {other:?}"),
        }
    }

    /// Creates an object in the collection of this path.
    pub(crate) fn create(&self, path: &str, object: &Value) -> Value {
        let (status, created) = self.request("POST", path, Some(object));
        assert_eq!(status, 201, "{path}: {created}");
        created
    }

    /// Changes what is there.
    pub(crate) fn change(&self, path: &str, change: impl Fn(&mut Value)) {
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
    pub(crate) fn delete(&self, path: &str) {
        let (status, answer) = self.request("DELETE", path, None);
        assert_eq!(status, 200, "{path}: {answer}");
    }

    /// Creates a manifest's objects, each in its own namespace.
    pub(crate) fn create_all<'o>(&self, objects: impl IntoIterator<Item = &'o Value>) {
        for object in objects {
            self.create(&collection_of(object), object);
        }
    }
}

/// Says aloud that something needs the real API server, which is not there.
pub(crate) fn say_skipped(what: &str) {
    // Not by a macro, whose output the test harness keeps for itself.
    let line = format!(
        "skipped: {what}: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver\n"
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Where an object's kind is kept, by the rules of Kubernetes' paths.
pub(crate) fn collection_of(object: &Value) -> String {
    let api = match object["apiVersion"].as_str().unwrap() {
        "v1" => "/api/v1".to_owned(),
        version => format!("/apis/{version}"),
    };
    let plural = match object["kind"].as_str().unwrap() {
        "NetworkPolicy" => "networkpolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{api}/namespaces/{namespace}/{plural}"),
        None => format!("{api}/{plural}"),
    }
}

/// A client that trusts these authorities, if any.
fn agent(authorities: Option<&str>) -> Agent {
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
        .timeout_global(Some(PATIENCE))
        .build()
        .into()
}

/// The real etcd and API server on loopback, ended by their ids.
struct ControlPlane {
    url: String,
    folder: TempDir,
    etcd: Child,
    api_server: Child,
}

impl ControlPlane {
    fn start(assets: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let key = KeyPair::generate().unwrap();
        fs::write(path("sa.key"), key.serialize_pem()).unwrap();
        fs::write(path("sa.pub"), key.public_key_pem()).unwrap();
        let tokens = format!("{TOKEN},administrator,1,system:masters\n");
        fs::write(path("tokens.csv"), tokens).unwrap();
        let [store, peers, port] = [free_port(), free_port(), free_port()];
        let (store, peers) = (
            format!("http://127.0.0.1:{store}"),
            format!("http://127.0.0.1:{peers}"),
        );
        let run = |program: &str, arguments: &[(&str, &str)]| {
            let flags = arguments
                .iter()
                .map(|(flag, value)| format!("--{flag}={value}"));
            let log = fs::File::create(path(&format!("{program}.log"))).unwrap();
            Command::new(assets.join(program))
                .args(flags)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap_or_else(|error| panic!("KUBEBUILDER_ASSETS: {program}: {error}"))
        };
        let etcd = run(
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
        let api_server = run(
            "kube-apiserver",
            &[
                ("etcd-servers", &store),
                ("bind-address", "127.0.0.1"),
                ("advertise-address", "127.0.0.1"),
                ("secure-port", &port.to_string()),
                ("cert-dir", &path("certificates")),
                ("service-account-issuer", "https://localhost"),
                ("service-account-key-file", &path("sa.pub")),
                ("service-account-signing-key-file", &path("sa.key")),
                ("service-cluster-ip-range", "10.0.0.0/24"),
                ("token-auth-file", &path("tokens.csv")),
                ("authorization-mode", "RBAC"),
                // Nobody makes the accounts that it would ask for.
                ("disable-admission-plugins", "ServiceAccount"),
            ],
        );
        let control_plane = Self {
            url: format!("https://127.0.0.1:{port}"),
            folder,
            etcd,
            api_server,
        };
        wait_for("the API server is ready", || {
            let client = agent(Some(&control_plane.authority_if_made()?));
            let ready = client
                .get(format!("{}/readyz", control_plane.url))
                .header("authorization", format!("Bearer {TOKEN}"))
                .call();
            (ready.ok()?.status() == 200).then_some(())
        });
        control_plane
    }

    fn authority_if_made(&self) -> Option<String> {
        fs::read_to_string(self.folder.path().join("certificates/apiserver.crt")).ok()
    }

    fn authority(&self) -> String {
        self.authority_if_made().unwrap()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in [&mut self.api_server, &mut self.etcd] {
            // Both fail only if it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(Default)]
struct Store {
    objects: BTreeMap<String, Stored>,
    version: u64,
}

struct Stored {
    object: Value,
    /// Who applied it last.
    manager: Option<String>,
}

type Shared = Arc<Mutex<Store>>;

/// Serves on a thread of its own, which ends with the process.
fn serve() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let routes = Router::new().fallback(answer).with_state(Shared::default());
            axum::serve(listener, routes).await.unwrap();
        });
    });
    address
}

type Answer = (StatusCode, [(&'static str, &'static str); 1], String);
type Parameters = BTreeMap<String, String>;

async fn answer(
    State(store): State<Shared>,
    method: Method,
    uri: Uri,
    Query(parameters): Query<Parameters>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let asked = Asked {
        method: method.to_string(),
        at: Target::of(uri.path()),
        parameters,
        user: headers
            .get("impersonate-user")
            .map(|user| user.to_str().unwrap().to_owned()),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    // Webhooks are asked by a client that blocks.
    let answered = tokio::task::spawn_blocking(move || asked.answer(&store)).await;
    let (status, object) = match answered.unwrap() {
        Ok(done) => done,
        Err((code, reason, message)) => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "code": code, "reason": reason, "message": message});
            (code, status)
        }
    };
    let status = StatusCode::from_u16(status).unwrap();
    (
        status,
        [("content-type", "application/json")],
        object.to_string(),
    )
}

type Failure = (u16, &'static str, String);

/// The parts of a path.
struct Target {
    whole: String,
    group: String,
    namespace: Option<String>,
    resource: String,
    name: Option<String>,
    sub_resource: Option<String>,
}

impl Target {
    fn of(path: &str) -> Self {
        let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let group = if parts[0] == "api" {
            parts.drain(..2);
            String::new()
        } else {
            parts.drain(..3).nth(1).unwrap().to_owned()
        };
        let namespace = (parts[0] == "namespaces" && parts.len() > 2)
            .then(|| parts.drain(..2).nth(1).unwrap().to_owned());
        Self {
            whole: path.to_owned(),
            group,
            namespace,
            resource: parts[0].to_owned(),
            name: parts.get(1).map(|&name| name.to_owned()),
            sub_resource: parts.get(2).map(|&name| name.to_owned()),
        }
    }
}

struct Asked {
    method: String,
    at: Target,
    parameters: Parameters,
    user: Option<String>,
    body: Value,
}

impl Asked {
    fn answer(mut self, store: &Shared) -> Result<(u16, Value), Failure> {
        let is_there = store.lock().unwrap().objects.contains_key(&self.at.whole);
        let verbs: &[&str] = match (self.method.as_str(), &self.at.name) {
            ("GET", Some(_)) => &["get"],
            ("GET", None) => &["list"],
            ("POST", _) => &["create"],
            ("PUT", _) => &["update"],
            // Applying creates, and then takes the permission for both, on the name.
            ("PATCH", _) if is_there => &["patch"],
            ("PATCH", _) => &["patch", "create"],
            _ => &["delete"],
        };
        for verb in verbs {
            self.authorize(store, verb)?;
        }
        let missing = |at: &Target| {
            let name = at.name.clone().unwrap_or_default();
            (
                404,
                "NotFound",
                format!("{} {name:?} not found", at.resource),
            )
        };
        match self.method.as_str() {
            "GET" if self.at.name.is_none() => self.list(&store.lock().unwrap()),
            "POST" if self.at.sub_resource.as_deref() == Some("eviction") => {
                self.evict(&mut store.lock().unwrap())
            }
            "GET" => {
                let store = store.lock().unwrap();
                let stored = store.objects.get(&self.at.whole).ok_or(missing(&self.at))?;
                Ok((200, stored.object.clone()))
            }
            "POST" => {
                if self.at.resource == "pods" {
                    self.admit(store)?;
                }
                let metadata = &self.body["metadata"];
                let name = match metadata["name"].as_str() {
                    Some(name) => name.to_owned(),
                    None => {
                        let version = store.lock().unwrap().version;
                        format!("{}{version}", metadata["generateName"].as_str().unwrap())
                    }
                };
                self.body["metadata"]["name"] = name.as_str().into();
                if let Some(namespace) = &self.at.namespace {
                    self.body["metadata"]["namespace"] = namespace.as_str().into();
                }
                if self.parameters.contains_key("dryRun") {
                    return Ok((201, self.body));
                }
                let uid = store.lock().unwrap().version;
                self.body["metadata"]["uid"] = format!("uid-{uid}").into();
                let path = format!("{}/{name}", self.at.whole);
                let mut store = store.lock().unwrap();
                if store.objects.contains_key(&path) {
                    return Err((409, "AlreadyExists", format!("{name:?} already exists")));
                }
                Ok((201, store.put(&path, self.body, None)))
            }
            "PUT" if self.at.sub_resource.as_deref() == Some("status") => {
                let (path, _) = self.at.whole.rsplit_once('/').unwrap();
                let mut store = store.lock().unwrap();
                let old = store.objects.get(path).ok_or(missing(&self.at))?;
                let mut object = old.object.clone();
                object["status"] = self.body["status"].clone();
                Ok((200, store.put(path, object, None)))
            }
            "PUT" => {
                let mut store = store.lock().unwrap();
                let old = store.objects.get(&self.at.whole).ok_or(missing(&self.at))?;
                let version = &self.body["metadata"]["resourceVersion"];
                if version.is_string() && *version != old.object["metadata"]["resourceVersion"] {
                    let message = "the object has been modified; please apply your changes to the latest version";
                    return Err((409, "Conflict", message.to_owned()));
                }
                Ok((200, store.put(&self.at.whole, self.body, None)))
            }
            "PATCH" => {
                let manager = self.parameters.get("fieldManager").cloned();
                let mut store = store.lock().unwrap();
                if let Some(old) = store.objects.get(&self.at.whole)
                    && old.manager != manager
                    && old.object["data"] != self.body["data"]
                {
                    let message = "Apply failed with 1 conflict: conflict with another manager";
                    return Err((409, "Conflict", message.to_owned()));
                }
                if let Some(namespace) = &self.at.namespace {
                    self.body["metadata"]["namespace"] = namespace.as_str().into();
                }
                Ok((201, store.put(&self.at.whole, self.body, manager)))
            }
            _ => {
                let mut store = store.lock().unwrap();
                let old = store
                    .objects
                    .remove(&self.at.whole)
                    .ok_or(missing(&self.at))?;
                Ok((200, old.object))
            }
        }
    }

    /// A collection's objects that fit the selectors, a page at a time.
    fn list(&self, store: &Store) -> Result<(u16, Value), Failure> {
        let Target {
            whole, resource, ..
        } = &self.at;
        let start = match &self.at.namespace {
            Some(_) => format!("{whole}/"),
            None => format!(
                "{}/namespaces/",
                whole.trim_end_matches(&format!("/{resource}"))
            ),
        };
        let is_one = |path: &str| match (&self.at.namespace, path.strip_prefix(&start)) {
            (Some(_), Some(name)) => !name.contains('/'),
            (None, Some(rest)) => {
                rest.split('/').nth(1) == Some(resource) && rest.split('/').count() == 3
            }
            (_, None) => false,
        };
        let parts = |parameter: &str| {
            let text = self.parameters.get(parameter).cloned().unwrap_or_default();
            let parts = text
                .split(',')
                .filter(|part| !part.is_empty())
                .map(str::to_owned);
            parts.collect::<Vec<String>>()
        };
        let (labels, fields) = (parts("labelSelector"), parts("fieldSelector"));
        let fits = |object: &Value| {
            let label = |part: &String| match part.split_once('=') {
                Some((key, value)) => object["metadata"]["labels"][key] == value,
                None => object["metadata"]["labels"].get(part).is_some(),
            };
            // Of fields, only phases are asked about.
            let field = |part: &String| {
                let phase = part.strip_prefix("status.phase!=").unwrap();
                object["status"]["phase"] != phase
            };
            labels.iter().all(label) && fields.iter().all(field)
        };
        let after = self.parameters.get("continue").cloned().unwrap_or_default();
        // In this namespace, time passes faster than whoever pages.
        if !after.is_empty() && self.at.namespace.as_deref() == Some("expires") {
            let message =
                "The provided continue parameter is too old to display a consistent list result.";
            return Err((410, "Expired", message.to_owned()));
        }
        let limit = self
            .parameters
            .get("limit")
            .map_or(usize::MAX, |limit| limit.parse().unwrap());
        let mut found = store
            .objects
            .range(start.clone()..)
            .take_while(|(path, _)| path.starts_with(&start))
            .filter(|(path, stored)| **path > after && is_one(path) && fits(&stored.object));
        let page: Vec<_> = found.by_ref().take(limit).collect();
        let last = page
            .last()
            .map_or(String::new(), |(path, _)| (*path).clone());
        let next = if found.next().is_some() {
            last
        } else {
            String::new()
        };
        let items: Vec<&Value> = page.iter().map(|(_, stored)| &stored.object).collect();
        let version = store.version.to_string();
        Ok((
            200,
            json!({"metadata": {"resourceVersion": version, "continue": next}, "items": items}),
        ))
    }

    /// Ends a pod, unless it runs and a disruption budget selects it: none allows any, for nobody counts here what is
    /// healthy.
    fn evict(&self, store: &mut Store) -> Result<(u16, Value), Failure> {
        let (pod, _) = self.at.whole.rsplit_once('/').unwrap();
        let namespace = self.at.namespace.as_deref().unwrap();
        let Some(stored) = store.objects.get(pod) else {
            return Err((404, "NotFound", format!("{pod} not found")));
        };
        let options = &self.body["deleteOptions"];
        let uid = &options["preconditions"]["uid"];
        if uid.is_string() && *uid != stored.object["metadata"]["uid"] {
            return Err((
                409,
                "Conflict",
                "the UID in the precondition is another one".to_owned(),
            ));
        }
        let budgets = format!("/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/");
        let labels = &stored.object["metadata"]["labels"];
        let runs = stored.object["status"]["phase"] == "Running";
        let is_kept = runs
            && store.objects.iter().any(|(path, budget)| {
                let wanted = budget.object["spec"]["selector"]["matchLabels"].as_object();
                let selects = |wanted: &serde_json::Map<_, _>| {
                    wanted.iter().all(|(key, value)| labels[key] == *value)
                };
                path.starts_with(&budgets) && wanted.is_some_and(selects)
            });
        if is_kept {
            let message = "Cannot evict pod as it would violate the pod's disruption budget.";
            return Err((429, "TooManyRequests", message.to_owned()));
        }
        if options["dryRun"].is_null() {
            store.objects.remove(pod);
        }
        Ok((
            201,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
        ))
    }

    /// RBAC for whoever is impersonated; the administrator may do anything.
    fn authorize(&self, store: &Shared, verb: &str) -> Result<(), Failure> {
        let Some(user) = &self.user else {
            return Ok(());
        };
        let Target {
            group,
            namespace,
            resource,
            ..
        } = &self.at;
        let name = self.at.name.as_deref().unwrap_or_default();
        let resource = match &self.at.sub_resource {
            Some(sub_resource) => format!("{resource}/{sub_resource}"),
            None => resource.clone(),
        };
        let store = store.lock().unwrap();
        let has = |list: &Value, wanted: &str| {
            let mut items = list.as_array().into_iter().flatten();
            items.any(|item| item == wanted || item == "*")
        };
        let allows = |rule: &Value| {
            let names = &rule["resourceNames"];
            has(&rule["verbs"], verb)
                && has(&rule["apiGroups"], group)
                && has(&rule["resources"], &resource)
                && (names.is_null() || has(names, name))
        };
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let is_allowed = store.objects.iter().any(|(path, binding)| {
            let (binding, role) = (&binding.object, &binding.object["roleRef"]);
            let role_name = role["name"].as_str().unwrap_or_default();
            let role = match (path.strip_prefix(rbac), namespace) {
                (Some(path), _) if path.starts_with("/clusterrolebindings/") => {
                    format!("{rbac}/clusterroles/{role_name}")
                }
                (Some(path), Some(namespace))
                    if path.starts_with(&format!("/namespaces/{namespace}/rolebindings/")) =>
                {
                    format!("{rbac}/namespaces/{namespace}/roles/{role_name}")
                }
                _ => return false,
            };
            let mut subjects = binding["subjects"].as_array().into_iter().flatten();
            let is_subject = subjects.any(|subject| {
                let (of, name) = (&subject["namespace"], &subject["name"]);
                let (of, name) = (of.as_str().unwrap(), name.as_str().unwrap());
                *user == format!("system:serviceaccount:{of}:{name}")
            });
            let role = store.objects.get(&role).map(|role| &role.object["rules"]);
            let mut rules = role.and_then(Value::as_array).into_iter().flatten();
            is_subject && rules.any(allows)
        });
        if is_allowed {
            return Ok(());
        }
        let message = format!(
            "{resource} {name:?} is forbidden: User {user:?} cannot {verb} resource {resource:?}"
        );
        Err((403, "Forbidden", message))
    }

    /// Asks every mutating webhook about a new pod, each over a connection of its own.
    fn admit(&mut self, store: &Shared) -> Result<(), Failure> {
        let below = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/";
        let configurations: Vec<Value> = {
            let store = store.lock().unwrap();
            let all = store.objects.iter();
            all.filter(|(path, _)| path.starts_with(below))
                .map(|(_, stored)| stored.object.clone())
                .collect()
        };
        let webhooks = configurations
            .iter()
            .flat_map(|configuration| configuration["webhooks"].as_array().unwrap());
        for webhook in webhooks {
            let failed = |why: String| {
                (
                    500,
                    "InternalError",
                    format!("failed calling webhook: {why}"),
                )
            };
            let client = &webhook["clientConfig"];
            let authorities = STANDARD.decode(client["caBundle"].as_str().unwrap_or_default());
            let authorities = String::from_utf8(authorities.unwrap()).unwrap();
            let review = super::create(&self.body);
            let answered = agent(Some(&authorities))
                .post(format!("{}?timeout=5s", client["url"].as_str().unwrap()))
                .header("content-type", "application/json")
                .send(review.to_string());
            let mut answered = answered.map_err(|error| failed(error.to_string()))?;
            let answer = answered.body_mut().read_to_string();
            let answer = answer.map_err(|error| failed(error.to_string()))?;
            let answer: Value = serde_json::from_str(&answer).map_err(|_| failed(answer))?;
            if answer["response"]["allowed"] != true {
                let message = format!(
                    "admission webhook denied the request: {}",
                    answer["response"]["status"]["message"]
                );
                return Err((403, "Forbidden", message));
            }
            let patch: json_patch::Patch = serde_json::from_value(patch_of(&answer)).unwrap();
            json_patch::patch(&mut self.body, &patch).unwrap();
        }
        Ok(())
    }
}

impl Store {
    fn put(&mut self, path: &str, mut object: Value, manager: Option<String>) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let stored = Stored {
            object: object.clone(),
            manager,
        };
        self.objects.insert(path.to_owned(), stored);
        object
    }
}
