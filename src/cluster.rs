//! Kubernetes API client: connection, errors, and requests to read an object, evict a pod and write an event. Listing
//! pods is in audit.rs, the certificate's Secret in server/certificate/secret.rs.

use std::time::Duration;

use axum::http;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams, Request};
use kube::core::{ObjectMeta, Status};
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use thiserror::Error;

use crate::telemetry;

/// Limit on the time without data of a response. Longer than the API server's own limit on requests, which is one minute.
pub const READ_TIMEOUT: Duration = Duration::from_secs(65);

/// An error of the Kubernetes API, with the API server's message if it sent one. Names objects, never their contents.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// Neither a kubeconfig nor a service account is configured.
    #[error(
        "no cluster configured: set KUBECONFIG, or run in a pod with a service account token ({0})"
    )]
    Unknown(String),
    /// Another client changed the object concurrently.
    #[error("the object was changed concurrently: {0}")]
    Conflict(String),
    /// The API server refused the request.
    #[error("the API server refused the request: {0}")]
    Refused(String),
    /// The request failed on the way or in the API server.
    #[error("the request to the API server failed: {0}")]
    Unreachable(String),
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 409 => Self::Conflict(status.message),
            // Too many requests, or a server error: possibly transient.
            kube::Error::Api(status) if status.code == 429 || status.code >= 500 => {
                Self::Unreachable(status.message)
            }
            kube::Error::Api(status) => Self::Refused(status.message),
            // The error's own text quotes the response.
            kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => {
                Self::Unreachable("its answer cannot be read".to_owned())
            }
            // The connection's error is a chain, from "cannot connect" to the system's reason.
            kube::Error::Service(error) => Self::Unreachable(telemetry::chain(error.as_ref())),
            // The error's own text includes its causes.
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// Returns a client for the cluster of `KUBECONFIG`, the default kubeconfig or the service account, in this order. It
/// retries transient errors.
///
/// # Errors
/// [`ClusterError::Unknown`] and [`ClusterError::Unreachable`]
pub async fn connect() -> Result<Client, ClusterError> {
    Ok(Client::try_from(config().await?)?)
}

/// Returns a client that does not retry, and the API server's URL to show in a prompt. Evictions need it: a disruption
/// budget refuses them with 429, like a busy server.
///
/// # Errors
/// As [`connect`].
pub async fn connect_without_retries() -> Result<(Client, String), ClusterError> {
    let mut config = config().await?;
    config.default_retry = false;
    let url = config.cluster_url.to_string();
    Ok((Client::try_from(config)?, url))
}

async fn config() -> Result<Config, ClusterError> {
    let config = Config::infer().await;
    let mut config = config.map_err(|error| ClusterError::Unknown(error.to_string()))?;
    config.read_timeout = Some(READ_TIMEOUT);
    Ok(config)
}

/// Returns the object at an API path, without `managedFields`.
///
/// # Errors
/// [`ClusterError`]
pub async fn get(client: &Client, path: &str) -> Result<Value, ClusterError> {
    let request = http::Request::get(path)
        .body(Vec::new())
        .map_err(|error| ClusterError::Unreachable(error.to_string()))?;
    let mut object: Value = client.request(request).await?;
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    Ok(object)
}

/// The unique identity of a pod.
#[derive(Clone, Copy, Debug)]
pub struct PodName<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Distinguishes it from a later pod of the same name.
    pub uid: &'a str,
}

/// The result of an eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evicted {
    /// The pod is terminating.
    Done,
    /// A disruption budget prevents it for now; the API server's message.
    Kept(String),
    /// The pod is gone, or another one has its name.
    Gone,
}

/// Evicts a pod through the Eviction API, which honours disruption budgets.
///
/// # Errors
/// [`ClusterError`]
pub async fn evict(
    client: &Client,
    pod: PodName<'_>,
    dry_run: bool,
) -> Result<Evicted, ClusterError> {
    let eviction = Eviction {
        metadata: ObjectMeta {
            name: Some(pod.name.to_owned()),
            namespace: Some(pod.namespace.to_owned()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions {
            dry_run: dry_run.then(|| vec!["All".to_owned()]),
            preconditions: Some(Preconditions {
                uid: Some(pod.uid.to_owned()),
                ..Preconditions::default()
            }),
            ..DeleteOptions::default()
        }),
    };
    // kube's own `evict` misspells a field, which drops the dry run and the precondition.
    let pods: Api<Pod> = Api::namespaced(client.clone(), pod.namespace);
    let response: Result<Value, _> = pods
        .create_subresource("eviction", pod.name, &PostParams::default(), &eviction)
        .await;
    match response {
        Ok(_) => Ok(Evicted::Done),
        Err(kube::Error::Api(status)) if is_budget_refusal(&status) => {
            Ok(Evicted::Kept(status.message))
        }
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(Evicted::Gone),
        Err(error) => Err(error.into()),
    }
}

/// Reports whether a disruption budget refused the eviction, and not a busy server.
fn is_budget_refusal(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let mut reasons = causes.map(|cause| cause.reason.as_str());
    status.code == 429 && reasons.any(|reason| reason == "DisruptionBudget")
}

/// The annotation of a pod template by which `kubectl rollout restart` changes it.
pub const RESTARTED_ANNOTATION: &str = "kubectl.kubernetes.io/restartedAt";

/// Restarts a Deployment, StatefulSet or DaemonSet, named by its plural, as `kubectl rollout restart` does. Fails if it is not
/// of this resource version any more: another process may have restarted it. Returns the time that its template has now.
///
/// # Errors
/// [`ClusterError`]
pub async fn restart(
    client: &Client,
    namespace: &str,
    plural: &str,
    name: &str,
    resource_version: &str,
) -> Result<String, ClusterError> {
    let path = format!("/apis/apps/v1/namespaces/{namespace}/{plural}");
    let restarted_at = Timestamp::now().to_string();
    let annotations = json!({RESTARTED_ANNOTATION: restarted_at});
    let patch = json!({
        "metadata": {"resourceVersion": resource_version},
        "spec": {"template": {"metadata": {"annotations": annotations}}},
    });
    let parameters = PatchParams {
        field_manager: Some(env!("CARGO_PKG_NAME").to_owned()),
        ..PatchParams::default()
    };
    let request = Request::new(path).patch(name, &parameters, &Patch::Strategic(&patch));
    let request = request.map_err(|error| ClusterError::Unreachable(error.to_string()))?;
    client.request::<Value>(request).await?;
    Ok(restarted_at)
}

/// The type of an event.
#[derive(Clone, Copy, Debug)]
pub enum EventType {
    /// For information.
    Normal,
    /// Something needs attention.
    Warning,
}

/// Writes an event on a pod, which `kubectl describe pod` shows.
///
/// # Errors
/// [`ClusterError`]
pub async fn event_on_pod(
    client: &Client,
    pod: PodName<'_>,
    kind: EventType,
    reason: &str,
    message: &str,
) -> Result<(), ClusterError> {
    let now = Some(Time(Timestamp::now()));
    let text = |text: &str| Some(text.to_owned());
    // The API server refuses longer messages.
    let message = message.get(..message.floor_char_boundary(1024));
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.", pod.name)),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: text("v1"),
            kind: text("Pod"),
            namespace: text(pod.namespace),
            name: text(pod.name),
            uid: text(pod.uid),
            ..ObjectReference::default()
        },
        type_: text(match kind {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        }),
        reason: text(reason),
        message: message.map(str::to_owned),
        source: Some(EventSource {
            component: text(env!("CARGO_PKG_NAME")),
            host: None,
        }),
        first_timestamp: now.clone(),
        last_timestamp: now,
        count: Some(1),
        ..Event::default()
    };
    let events: Api<Event> = Api::namespaced(client.clone(), pod.namespace);
    events.create(&PostParams::default(), &event).await?;
    Ok(())
}
