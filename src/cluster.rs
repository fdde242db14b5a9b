//! The Kubernetes API as a client: how to reach it, how its errors read, and what commands ask of it: an object, an
//! eviction, an event. Pods are listed by audit.rs; the certificate's Secret is server/certificate/secret.rs's.

use std::time::Duration;

use axum::http;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::core::{ObjectMeta, Status};
use kube::{Api, Client, Config};
use serde_json::Value;
use thiserror::Error;

/// Longest wait for an answer: the API server ends what takes longer than a minute.
const MAX_ANSWER_BYTES: Duration = Duration::from_secs(65);

/// What went wrong, in the API server's words where it has any. They name objects, and never what is in them.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// Neither a service account nor a kubeconfig tells where the API server is.
    #[error("no cluster is known here; mount a service account's token, or set KUBECONFIG ({0})")]
    Unknown(String),
    /// Somebody else changed the object meanwhile.
    #[error("the object was changed meanwhile: {0}")]
    Conflict(String),
    /// The API server refuses the request.
    #[error("the API server refuses: {0}")]
    Refused(String),
    /// The API server cannot be asked.
    #[error("the API server cannot be asked: {0}")]
    Unreachable(String),
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 409 => Self::Conflict(status.message),
            // Too many requests, or a fault of the server's: it may pass.
            kube::Error::Api(status) if status.code == 429 || status.code >= 500 => {
                Self::Unreachable(status.message)
            }
            kube::Error::Api(status) => Self::Refused(status.message),
            // Its text quotes what was answered.
            kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => {
                Self::Unreachable("its answer cannot be read".to_owned())
            }
            // Its text has its causes in it.
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// A client for the cluster that the environment tells of: by `KUBECONFIG` or the kubeconfig in its usual place, else by
/// a service account's token. What the API server cannot do just now is tried again.
///
/// # Errors
/// [`ClusterError::Unknown`] and [`ClusterError::Unreachable`]
pub async fn connect() -> Result<Client, ClusterError> {
    Ok(Client::try_from(config().await?)?)
}

/// One that takes the first answer, for evictions: a disruption budget refuses them as if the server were busy. And
/// the API server's address, to ask people about.
///
/// # Errors
/// As [`connect`].
pub async fn connect_without_retries() -> Result<(Client, String), ClusterError> {
    let mut config = config().await?;
    config.default_retry = false;
    let address = config.cluster_url.to_string();
    Ok((Client::try_from(config)?, address))
}

async fn config() -> Result<Config, ClusterError> {
    let config = Config::infer().await;
    let mut config = config.map_err(|error| ClusterError::Unknown(error.to_string()))?;
    config.read_timeout = Some(MAX_ANSWER_BYTES);
    Ok(config)
}

/// An object as it is stored, by its path, without the record of who manages which field.
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

/// A pod by what tells it from any other.
#[derive(Clone, Copy, Debug)]
pub struct PodName<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Tells it from a later pod of the same name.
    pub uid: &'a str,
}

/// What became of an eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evicted {
    /// The pod is being ended.
    Done,
    /// A disruption budget keeps it for now; the API server's words.
    Kept(String),
    /// It is not there any more, or is another one.
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
    // kube's own eviction spells a field's name wrong, and loses dry-run and precondition.
    let pods: Api<Pod> = Api::namespaced(client.clone(), pod.namespace);
    let answered: Result<Value, _> = pods
        .create_subresource("eviction", pod.name, &PostParams::default(), &eviction)
        .await;
    match answered {
        Ok(_) => Ok(Evicted::Done),
        Err(kube::Error::Api(status)) if is_of_budget(&status) => Ok(Evicted::Kept(status.message)),
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(Evicted::Gone),
        Err(error) => Err(error.into()),
    }
}

/// Whether a disruption budget refuses, and not a server that is busy.
fn is_of_budget(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let mut reasons = causes.map(|cause| cause.reason.as_str());
    status.code == 429 && reasons.any(|reason| reason == "DisruptionBudget")
}

/// Writes a warning where `kubectl describe pod` shows it.
///
/// # Errors
/// [`ClusterError`]
pub async fn warn_on_pod(
    client: &Client,
    pod: PodName<'_>,
    reason: &str,
    message: &str,
) -> Result<(), ClusterError> {
    let now = Some(Time(Timestamp::now()));
    let text = |text: &str| Some(text.to_owned());
    // The API server refuses more.
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
        type_: text("Warning"),
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
