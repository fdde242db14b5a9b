//! A stand-in for the API server, in this process. It stores any object, compares resource versions, evaluates RBAC for
//! impersonated users, pages, watches and evicts. It calls mutating webhooks about new pods, over TLS with their `caBundle`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use serde_json::{Value, json};

use super::api_server::agent;
use super::patch_of;

#[derive(Default)]
struct Store {
    objects: BTreeMap<String, Stored>,
    version: u64,
}

struct Stored {
    object: Value,
    /// The field manager that applied it last.
    manager: Option<String>,
}

type Shared = Arc<Mutex<Store>>;

/// Serves on its own thread, which ends with the process, and returns the address.
pub fn serve() -> SocketAddr {
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

type Parameters = BTreeMap<String, String>;

async fn answer(
    State(store): State<Shared>,
    method: Method,
    uri: Uri,
    Query(parameters): Query<Parameters>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request = Request {
        method: method.to_string(),
        target: Target::of(uri.path()),
        parameters,
        user: headers
            .get("impersonate-user")
            .map(|user| user.to_str().unwrap().to_owned()),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    if request.is_watch() && request.authorize(&store, "watch").is_ok() {
        return request.watch(store).into_response();
    }
    // The client that calls the webhooks blocks.
    let result = tokio::task::spawn_blocking(move || request.answer(&store)).await;
    let (status, object) = match result.unwrap() {
        Ok(answer) => answer,
        Err((code, reason, message)) => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "code": code, "reason": reason, "message": message});
            (code, status)
        }
    };
    let status = StatusCode::from_u16(status).unwrap();
    (status, [("content-type", "application/json")], object.to_string()).into_response()
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

struct Request {
    method: String,
    target: Target,
    parameters: Parameters,
    user: Option<String>,
    body: Value,
}

impl Request {
    fn answer(mut self, store: &Shared) -> Result<(u16, Value), Failure> {
        let exists = store
            .lock()
            .unwrap()
            .objects
            .contains_key(&self.target.whole);
        let verbs: &[&str] = match (self.method.as_str(), &self.target.name) {
            ("GET", Some(_)) => &["get"],
            ("GET", None) if self.is_watch() => &["watch"],
            ("GET", None) => &["list"],
            ("POST", _) => &["create"],
            ("PUT", _) => &["update"],
            // A server-side apply that creates needs both permissions on the name.
            ("PATCH", _) if exists => &["patch"],
            ("PATCH", _) => &["patch", "create"],
            _ => &["delete"],
        };
        for verb in verbs {
            self.authorize(store, verb)?;
        }
        let missing = |target: &Target| {
            let name = target.name.clone().unwrap_or_default();
            (404, "NotFound", format!("{} {name:?} not found", target.resource))
        };
        match self.method.as_str() {
            "GET" if self.target.name.is_none() => self.list(&store.lock().unwrap()),
            "POST" if self.target.sub_resource.as_deref() == Some("eviction") => {
                self.evict(&mut store.lock().unwrap())
            }
            "GET" => {
                let store = store.lock().unwrap();
                let stored = store
                    .objects
                    .get(&self.target.whole)
                    .ok_or(missing(&self.target))?;
                Ok((200, stored.object.clone()))
            }
            "POST" => {
                if self.target.resource == "pods" {
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
                if let Some(namespace) = &self.target.namespace {
                    self.body["metadata"]["namespace"] = namespace.as_str().into();
                }
                if self.parameters.contains_key("dryRun") {
                    return Ok((201, self.body));
                }
                let path = format!("{}/{name}", self.target.whole);
                let mut store = store.lock().unwrap();
                self.body["metadata"]["uid"] = format!("uid-{}", store.version).into();
                if store.objects.contains_key(&path) {
                    return Err((409, "AlreadyExists", format!("{name:?} already exists")));
                }
                Ok((201, store.put(&path, self.body, None)))
            }
            "PUT" if self.target.sub_resource.as_deref() == Some("status") => {
                let (path, _) = self.target.whole.rsplit_once('/').unwrap();
                let mut store = store.lock().unwrap();
                let old = store.objects.get(path).ok_or(missing(&self.target))?;
                let mut object = old.object.clone();
                object["status"] = self.body["status"].clone();
                Ok((200, store.put(path, object, None)))
            }
            "PUT" => {
                let mut store = store.lock().unwrap();
                let old = store
                    .objects
                    .get(&self.target.whole)
                    .ok_or(missing(&self.target))?;
                let version = &self.body["metadata"]["resourceVersion"];
                if version.is_string() && *version != old.object["metadata"]["resourceVersion"] {
                    let message = "the object has been modified; please apply your changes to the latest version";
                    return Err((409, "Conflict", message.to_owned()));
                }
                Ok((200, store.put(&self.target.whole, self.body, None)))
            }
            "PATCH" => {
                let manager = self.parameters.get("fieldManager").cloned();
                let mut store = store.lock().unwrap();
                if let Some(old) = store.objects.get(&self.target.whole)
                    && old.manager != manager
                    && old.object["data"] != self.body["data"]
                {
                    let message = "Apply failed with 1 conflict: conflict with another manager";
                    return Err((409, "Conflict", message.to_owned()));
                }
                if let Some(namespace) = &self.target.namespace {
                    self.body["metadata"]["namespace"] = namespace.as_str().into();
                }
                Ok((201, store.put(&self.target.whole, self.body, manager)))
            }
            _ => {
                let mut store = store.lock().unwrap();
                let old = store
                    .objects
                    .remove(&self.target.whole)
                    .ok_or(missing(&self.target))?;
                Ok((200, old.object))
            }
        }
    }

    fn is_watch(&self) -> bool {
        self.parameters.get("watch").is_some_and(|is| is == "true")
    }

    /// Streams the changes of a collection since a resource version. Deletions before the request are not among them.
    fn watch(mut self, store: Shared) -> Body {
        let version = |object: &Value| {
            let version = object["metadata"]["resourceVersion"].as_str();
            version.map_or(0, |version| version.parse::<u64>().unwrap())
        };
        let since = self.parameters.remove("resourceVersion");
        let since: u64 = since.map_or(0, |since| since.parse().unwrap());
        let listed = move |request: &Self, store: &Shared| {
            let (_, list) = request.list(&store.lock().unwrap()).ok()?;
            let items = list["items"].as_array()?.iter();
            let items = items.map(|item| (item["metadata"]["uid"].to_string(), item.clone()));
            Some(items.collect::<BTreeMap<String, Value>>())
        };
        let mut known = listed(&self, &store).unwrap_or_default();
        known.retain(|_, object| version(object) <= since);
        let state = (self, store, known);
        Body::from_stream(stream::unfold(state, move |(request, store, known)| async move {
            loop {
                let now = listed(&request, &store)?;
                let event = |kind, object| json!({"type": kind, "object": object}).to_string();
                let mut events: Vec<String> = Vec::new();
                for (uid, object) in &now {
                    match known.get(uid) {
                        None => events.push(event("ADDED", object)),
                        Some(old) if old != object => events.push(event("MODIFIED", object)),
                        Some(_) => {}
                    }
                }
                let gone = known.iter().filter(|(uid, _)| !now.contains_key(*uid));
                events.extend(gone.map(|(_, object)| event("DELETED", object)));
                if !events.is_empty() {
                    let lines = Bytes::from(events.join("\n") + "\n");
                    return Some((Ok::<_, Infallible>(lines), (request, store, now)));
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }))
    }

    /// Lists a collection's objects that match the selectors, one page at a time.
    fn list(&self, store: &Store) -> Result<(u16, Value), Failure> {
        let Target {
            whole, resource, ..
        } = &self.target;
        let start = match &self.target.namespace {
            Some(_) => format!("{whole}/"),
            None => format!("{}/namespaces/", whole.trim_end_matches(&format!("/{resource}"))),
        };
        let is_one = |path: &str| match (&self.target.namespace, path.strip_prefix(&start)) {
            (Some(_), Some(name)) => !name.contains('/'),
            // A namespaced kind across namespaces, or the namespaces themselves.
            (None, Some(rest)) => match rest.split('/').collect::<Vec<_>>()[..] {
                [_, kind, _] => kind == resource,
                [_] => resource == "namespaces",
                _ => false,
            },
            (_, None) => false,
        };
        let parts = |parameter: &str| {
            let text = self.parameters.get(parameter).cloned().unwrap_or_default();
            // Do not split at the commas of a set.
            let mut depth = 0;
            let parts = text.split(|c| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                c == ',' && depth == 0
            });
            let parts = parts.filter(|part| !part.is_empty()).map(str::to_owned);
            parts.collect::<Vec<String>>()
        };
        let (labels, fields) = (parts("labelSelector"), parts("fieldSelector"));
        let matches = |object: &Value| {
            let label = |part: &String| {
                let labels = &object["metadata"]["labels"];
                if let Some((key, set)) = part.split_once(" notin ") {
                    let mut set = set.trim_matches(['(', ')']).split(',');
                    return !set.any(|value| labels[key] == value);
                }
                match part.split_once('=') {
                    Some((key, value)) => labels[key] == value,
                    None => labels.get(part).is_some(),
                }
            };
            // The only field that clients select by is the phase.
            let field = |part: &String| {
                let phase = part.strip_prefix("status.phase!=").unwrap();
                object["status"]["phase"] != phase
            };
            labels.iter().all(label) && fields.iter().all(field)
        };
        let after = self.parameters.get("continue").cloned().unwrap_or_default();
        // In this namespace, every continue token has expired.
        if !after.is_empty() && self.target.namespace.as_deref() == Some("expires") {
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
            .filter(|(path, stored)| **path > after && is_one(path) && matches(&stored.object));
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

    /// Deletes a pod, unless it is running and a disruption budget selects it: no budget here allows a disruption.
    fn evict(&self, store: &mut Store) -> Result<(u16, Value), Failure> {
        let (pod, _) = self.target.whole.rsplit_once('/').unwrap();
        let namespace = self.target.namespace.as_deref().unwrap();
        let Some(stored) = store.objects.get(pod) else {
            return Err((404, "NotFound", format!("{pod} not found")));
        };
        let options = &self.body["deleteOptions"];
        let uid = &options["preconditions"]["uid"];
        if uid.is_string() && *uid != stored.object["metadata"]["uid"] {
            return Err((409, "Conflict", "the UID in the precondition is another one".to_owned()));
        }
        let budgets = format!("/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/");
        let labels = &stored.object["metadata"]["labels"];
        let is_running = stored.object["status"]["phase"] == "Running";
        let is_protected = is_running
            && store.objects.iter().any(|(path, budget)| {
                let wanted = budget.object["spec"]["selector"]["matchLabels"].as_object();
                let selects = |wanted: &serde_json::Map<_, _>| {
                    wanted.iter().all(|(key, value)| labels[key] == *value)
                };
                path.starts_with(&budgets) && wanted.is_some_and(selects)
            });
        if is_protected {
            let message = "Cannot evict pod as it would violate the pod's disruption budget.";
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 429,
                "reason": "TooManyRequests", "message": message, "details": {"causes": [{"reason": "DisruptionBudget"}]}});
            return Ok((429, status));
        }
        if options["dryRun"].is_null() {
            store.objects.remove(pod);
        }
        Ok((
            201,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
        ))
    }

    /// Evaluates RBAC for an impersonated user; the administrator may do anything.
    fn authorize(&self, store: &Shared, verb: &str) -> Result<(), Failure> {
        let Some(user) = &self.user else {
            return Ok(());
        };
        let Target {
            group,
            namespace,
            resource,
            ..
        } = &self.target;
        let name = self.target.name.as_deref().unwrap_or_default();
        let resource = match &self.target.sub_resource {
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

    /// Calls every mutating webhook about a new pod, each over its own connection.
    fn admit(&mut self, store: &Shared) -> Result<(), Failure> {
        let prefix = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/";
        let configurations: Vec<Value> = {
            let store = store.lock().unwrap();
            let all = store.objects.iter();
            all.filter(|(path, _)| path.starts_with(prefix))
                .map(|(_, stored)| stored.object.clone())
                .collect()
        };
        let webhooks = configurations
            .iter()
            .flat_map(|configuration| configuration["webhooks"].as_array().into_iter().flatten());
        for webhook in webhooks {
            let failed =
                |cause: String| (500, "InternalError", format!("failed calling webhook: {cause}"));
            let client = &webhook["clientConfig"];
            let authorities = STANDARD.decode(client["caBundle"].as_str().unwrap_or_default());
            let authorities = String::from_utf8(authorities.unwrap()).unwrap();
            let review = super::create(&self.body);
            let response = agent(Some(&authorities))
                .post(format!("{}?timeout=5s", client["url"].as_str().unwrap()))
                .header("content-type", "application/json")
                .send(review.to_string());
            let mut response = response.map_err(|error| failed(error.to_string()))?;
            let answer = response.body_mut().read_to_string();
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
