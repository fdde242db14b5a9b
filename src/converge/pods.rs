//! The running pods as a watch keeps them: the fields that an audit reads, and the owner.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cluster::RESTARTED_ANNOTATION;
use crate::core::pod::{MODE_ANNOTATION, SOURCE_ANNOTATION};

/// The annotation of a workload or pod that is not to be recreated: `paused`.
pub(super) const CONVERGE_ANNOTATION: &str = "molecule.ai/llm-billing-converge";
/// The label by which a Deployment's ReplicaSets differ.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// A running pod. Its `Debug` shows no env.
#[derive(Clone, Deserialize)]
#[serde(from = "Fields")]
pub(super) struct WatchedPod {
    meta: ObjectMeta,
    pub(super) owner: Owner,
    pub(super) is_terminating: bool,
    pub(super) is_paused: bool,
    pub(super) is_ready: bool,
    /// Whether it has one of the webhook's annotations.
    pub(super) is_annotated: bool,
    /// When its template was last restarted, as of its creation.
    pub(super) restarted_at: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    /// The fields that an audit reads, as JSON.
    pub(super) json: Arc<str>,
}

/// What would recreate a pod.
#[derive(Clone, Debug)]
pub(super) enum Owner {
    /// Nothing.
    None,
    /// The kubelet, from a file.
    Node,
    /// A Deployment, StatefulSet or DaemonSet, which a rollout restarts.
    Rollout {
        /// Its kind.
        kind: &'static str,
        /// Its plural name in the API.
        plural: &'static str,
        /// Its name.
        name: String,
    },
    /// Another controller: it recreates pods that are evicted.
    Other {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
}

impl Owner {
    fn of(reference: Option<&OwnerReference>, labels: &BTreeMap<String, String>) -> Self {
        let Some(OwnerReference { kind, name, .. }) = reference else {
            return Self::None;
        };
        let rollout = |kind, plural, name: &str| Self::Rollout {
            kind,
            plural,
            name: name.to_owned(),
        };
        // A ReplicaSet of a Deployment has its name and the hash of its template.
        let hash = labels.get(TEMPLATE_HASH);
        let deployment = hash.and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'));
        match (kind.as_str(), deployment) {
            ("Node", _) => Self::Node,
            ("ReplicaSet", Some(deployment)) => rollout("Deployment", "deployments", deployment),
            ("StatefulSet", _) => rollout("StatefulSet", "statefulsets", name),
            ("DaemonSet", _) => rollout("DaemonSet", "daemonsets", name),
            _ => Self::Other {
                kind: kind.clone(),
                name: name.clone(),
            },
        }
    }

    /// Returns the kind, for metrics and messages.
    pub(super) fn kind(&self) -> &str {
        match self {
            Self::None => "Pod",
            Self::Node => "Node",
            Self::Rollout { kind, .. } => kind,
            Self::Other { kind, .. } => kind,
        }
    }
}

impl WatchedPod {
    pub(super) fn uid(&self) -> &str {
        self.meta.uid.as_deref().unwrap_or_default()
    }

    pub(super) fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    pub(super) fn namespace(&self) -> &str {
        self.meta.namespace.as_deref().unwrap_or_default()
    }

    /// Returns the name of what is recreated: the owner, or the pod itself.
    pub(super) fn workload(&self) -> String {
        let name = match &self.owner {
            Owner::None | Owner::Node => self.name(),
            Owner::Rollout { name, .. } | Owner::Other { name, .. } => name,
        };
        format!("{}/{}/{name}", self.namespace(), self.owner.kind())
    }
}

impl fmt::Debug for WatchedPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.name())
    }
}

impl Resource for WatchedPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// The fields that are kept.
#[derive(Deserialize, Serialize)]
struct Fields {
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default, skip_serializing)]
    status: Status,
}

#[derive(Default, Deserialize)]
struct Status {
    conditions: Option<Vec<Condition>>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    #[serde(skip_serializing)]
    resource_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deletion_timestamp: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_references: Option<Vec<OwnerReference>>,
}

#[derive(Deserialize, Serialize)]
struct OwnerReference {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    name: String,
    controller: Option<bool>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(skip_serializing_if = "Option::is_none")]
    init_containers: Option<Vec<Container>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    containers: Option<Vec<Container>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ephemeral_containers: Option<Vec<Container>>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default)]
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    env: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    env_from: Option<Value>,
}

impl From<Fields> for WatchedPod {
    fn from(mut fields: Fields) -> Self {
        let metadata = &mut fields.metadata;
        let mut annotations = metadata.annotations.take().unwrap_or_default();
        let is_paused = annotations
            .remove(CONVERGE_ANNOTATION)
            .is_some_and(|value| value == "paused");
        let restarted_at = annotations.remove(RESTARTED_ANNOTATION);
        annotations.retain(|key, _| [MODE_ANNOTATION, SOURCE_ANNOTATION].contains(&key.as_str()));
        let is_annotated = !annotations.is_empty();
        metadata.annotations = Some(annotations);
        let labels = metadata.labels.clone().unwrap_or_default();
        let mut owners = metadata.owner_references.iter().flatten();
        let owner = Owner::of(owners.find(|owner| owner.controller == Some(true)), &labels);
        let mut conditions = fields.status.conditions.iter().flatten();
        let is_ready = conditions.any(|one| one.kind == "Ready" && one.status == "True");
        let meta = ObjectMeta {
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            uid: metadata.uid.clone(),
            resource_version: metadata.resource_version.clone(),
            ..ObjectMeta::default()
        };
        let json =
            serde_json::to_string(&fields).unwrap_or_else(|_| unreachable!("all keys are strings"));
        Self {
            meta,
            owner,
            is_terminating: fields.metadata.deletion_timestamp.is_some(),
            is_paused,
            is_ready,
            is_annotated,
            restarted_at,
            labels,
            json: json.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn watched(owner: Option<(&str, &str)>, hash: Option<&str>, is_ready: &str) -> WatchedPod {
        let owners = owner.map(|(kind, name)| {
            json!([{"apiVersion": "x", "kind": "Other", "name": "not-the-controller"},
                   {"kind": kind, "name": name, "controller": true}])
        });
        let labels = hash.map_or(json!({}), |hash| json!({TEMPLATE_HASH: hash}));
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": "7", "labels": labels,
                         "annotations": {"other": "x", MODE_ANNOTATION: "byok", CONVERGE_ANNOTATION: "paused"},
                         "ownerReferences": owners, "managedFields": []},
            "spec": {"nodeName": "x", "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "sk-secret"}]}]},
            "status": {"phase": "Running", "conditions": [
                {"type": "Initialized", "status": "True"}, {"type": "Ready", "status": is_ready},
            ]},
        });
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn workload_is_named_by_the_pods_controller() {
        for (owner, hash, expected) in [
            (None, None, "n/Pod/p"),
            (Some(("Node", "node-1")), None, "n/Node/p"),
            (Some(("ReplicaSet", "web-5d4")), Some("5d4"), "n/Deployment/web"),
            (Some(("ReplicaSet", "web-5d4")), Some("other"), "n/ReplicaSet/web-5d4"),
            (Some(("ReplicaSet", "web")), None, "n/ReplicaSet/web"),
            (Some(("StatefulSet", "db")), None, "n/StatefulSet/db"),
            (Some(("DaemonSet", "agent")), None, "n/DaemonSet/agent"),
            (Some(("Job", "once")), None, "n/Job/once"),
        ] {
            assert_eq!(watched(owner, hash, "True").workload(), expected);
        }
    }

    #[test]
    fn pod_keeps_what_an_audit_reads() {
        let pod = watched(None, None, "True");
        assert!(pod.is_paused && pod.is_ready && !pod.is_terminating);
        assert!(!watched(None, None, "False").is_ready);
        let kept: Value = serde_json::from_str(&pod.json).unwrap();
        let expected = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {}, "annotations": {MODE_ANNOTATION: "byok"}},
            "spec": {"containers": [{"name": "c", "env": [{"name": "A", "value": "sk-secret"}]}]},
        });
        assert_eq!(kept, expected);
        assert_eq!(format!("{pod:?}"), "n/p");
    }
}
