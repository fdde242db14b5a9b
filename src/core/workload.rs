//! Manifests and the location of their pods: a Pod, a controller's pod template, a List, an admission review.
//! cli/review.rs reads and splits the text.

use serde::Deserialize;
use serde_json::Value;

use super::admission::{AdmissionTarget, mismatch_path};
use super::plan::Scope;
use super::pod::Pod;
use super::refusal::Refusal;

/// One object of a manifest.
pub struct Subject {
    /// The whole object, before any patch.
    pub object: Value,
    /// `Kind namespace/name`, for messages.
    pub title: String,
    /// The namespace of its pods.
    pub namespace: String,
    pods: Pods,
}

/// Where an object's pod or pod template is.
enum Pods {
    /// The object creates no pods.
    Nowhere,
    /// In an admission request that the webhook allows unchanged.
    Untouched,
    /// At a JSON pointer to a new pod or pod template.
    At(&'static str),
    /// The object is a running pod that gets ephemeral containers; this is the old pod.
    Update(Value),
}

/// Kinds that create pods, with the JSON pointer to the pod or its template.
const KINDS: [(&str, &str, &str); 9] = [
    ("v1", "Pod", ""),
    ("v1", "PodTemplate", "/template"),
    ("v1", "ReplicationController", "/spec/template"),
    ("apps/v1", "Deployment", "/spec/template"),
    ("apps/v1", "StatefulSet", "/spec/template"),
    ("apps/v1", "DaemonSet", "/spec/template"),
    ("apps/v1", "ReplicaSet", "/spec/template"),
    ("batch/v1", "Job", "/spec/template"),
    ("batch/v1", "CronJob", "/spec/jobTemplate/spec/template"),
];

/// Returns the objects of a document: the items of a List, the object of an admission review, or the document itself.
/// Objects without a namespace are assumed to be in `namespace`.
#[must_use]
pub fn subjects(document: Value, namespace: &str) -> Vec<Subject> {
    let text = |field: &str| {
        document
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    if kind == "AdmissionReview" {
        return vec![review_subject(document, namespace)];
    }
    if let Some(item_kind) = kind.strip_suffix("List")
        && document.get("items").is_some_and(Value::is_array)
    {
        let item_kind =
            (!item_kind.is_empty()).then(|| (api_version.to_owned(), item_kind.to_owned()));
        let Value::Object(mut list) = document else {
            return Vec::new();
        };
        let Some(Value::Array(items)) = list.remove("items") else {
            return Vec::new();
        };
        return items
            .into_iter()
            .flat_map(|item| subjects(with_kind(item, item_kind.as_ref()), namespace))
            .collect();
    }
    let pods = KINDS
        .iter()
        .find(|known| (known.0, known.1) == (api_version, kind))
        .map_or(Pods::Nowhere, |known| Pods::At(known.2));
    let own = metadata(&document, "namespace");
    let namespace = own.unwrap_or(namespace).to_owned();
    let kind = if kind.is_empty() { "(no kind)" } else { kind };
    let title = format!("{kind} {namespace}/{}", name_of(&document));
    vec![Subject {
        title,
        namespace,
        pods,
        object: document,
    }]
}

fn metadata<'o>(object: &'o Value, field: &str) -> Option<&'o str> {
    object.get("metadata")?.get(field)?.as_str()
}

/// Returns an object's name, or its `generateName`.
fn name_of(object: &Value) -> &str {
    let name = metadata(object, "name").or_else(|| metadata(object, "generateName"));
    name.unwrap_or("(unnamed)")
}

/// Adds the kind to an item of a typed list, such as a PodList, where items may omit it.
fn with_kind(mut item: Value, kind: Option<&(String, String)>) -> Value {
    if let (Some((api_version, kind)), Some(fields)) = (kind, item.as_object_mut()) {
        fields
            .entry("apiVersion")
            .or_insert_with(|| api_version.as_str().into());
        fields.entry("kind").or_insert_with(|| kind.as_str().into());
    }
    item
}

fn review_subject(mut review: Value, namespace: &str) -> Subject {
    let text = |pointer: &str| {
        review
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let target = AdmissionTarget::of(
        &text("/request/resource/group"),
        &text("/request/resource/resource"),
        &text("/request/subResource"),
        &text("/request/operation"),
    );
    let namespace = Some(text("/request/namespace"))
        .filter(|own| !own.is_empty())
        .unwrap_or(namespace.to_owned());
    let mut take = |pointer: &str| review.pointer_mut(pointer).map_or(Value::Null, Value::take);
    let (object, old) = (take("/request/object"), take("/request/oldObject"));
    let pods = match target {
        AdmissionTarget::PodCreation => Pods::At(""),
        AdmissionTarget::NewEphemeralContainers => Pods::Update(old),
        AdmissionTarget::NotApplicable => Pods::Untouched,
    };
    Subject {
        title: format!("Pod {namespace}/{}", name_of(&object)),
        namespace,
        pods,
        object,
    }
}

impl Subject {
    /// Reports whether the object creates pods or is an admission request.
    #[must_use]
    pub const fn makes_pods(&self) -> bool {
        !matches!(self.pods, Pods::Nowhere)
    }

    /// Reports whether the webhook plans the object's pod or pod template.
    #[must_use]
    pub const fn is_planned(&self) -> bool {
        matches!(self.pods, Pods::At(_) | Pods::Update(_))
    }

    /// Returns the JSON pointer to the pod or pod template.
    #[must_use]
    pub const fn root(&self) -> &'static str {
        match self.pods {
            Pods::At(root) => root,
            Pods::Update(_) | Pods::Untouched | Pods::Nowhere => "",
        }
    }

    /// Returns the pod or pod template.
    ///
    /// # Errors
    /// Returns [`Refusal::Unreadable`] with the path of the missing template or of a value of the wrong type, or
    /// [`Refusal::NoObject`] for a request without an object.
    pub fn pod(&self) -> Result<Pod<'_>, Refusal> {
        // Only a request's object can be null.
        if self.object.is_null() {
            return Err(Refusal::NoObject);
        }
        let missing = || Refusal::Unreadable {
            place: self.root().trim_start_matches('/').replace('/', "."),
        };
        let value = self.object.pointer(self.root()).ok_or_else(missing)?;
        read(value, self.root())
    }

    /// Returns the old pod of an update.
    ///
    /// # Errors
    /// Returns [`Refusal::Unreadable`] with the path of a value of the wrong type.
    pub fn old_pod(&self) -> Result<Option<Pod<'_>>, Refusal> {
        match &self.pods {
            Pods::Update(old) if !old.is_null() => read(old, "/oldObject").map(Some),
            Pods::Update(_) | Pods::At(_) | Pods::Untouched | Pods::Nowhere => Ok(None),
        }
    }

    /// Returns which containers are planned.
    #[must_use]
    pub const fn scope<'s>(&self, old: Option<&'s Pod<'s>>) -> Scope<'s> {
        match self.pods {
            Pods::Update(_) => Scope::NewEphemeralContainers(old),
            Pods::At(_) | Pods::Untouched | Pods::Nowhere => Scope::Pod,
        }
    }
}

fn read<'v>(value: &'v Value, root: &str) -> Result<Pod<'v>, Refusal> {
    Pod::deserialize(value).map_err(|_| {
        let root = root.trim_start_matches('/').replace('/', ".");
        let place = mismatch_path::<Pod<'_>>(value);
        Refusal::Unreadable {
            place: if root.is_empty() {
                place
            } else {
                format!("{root}.{place}")
            },
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn titles_and_roots(document: Value) -> Vec<(String, Option<&'static str>)> {
        let subjects = subjects(document, "default");
        subjects
            .iter()
            .map(|subject| {
                let root = subject.is_planned().then(|| subject.root());
                assert_eq!(subject.makes_pods(), root.is_some());
                (subject.title.clone(), root)
            })
            .collect()
    }

    fn object(api_version: &str, kind: &str) -> Value {
        json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}})
    }

    #[test]
    fn each_kind_has_its_pod_pointer() {
        let table = [
            ("v1", "Pod", Some("")),
            ("v1", "PodTemplate", Some("/template")),
            ("v1", "ReplicationController", Some("/spec/template")),
            ("apps/v1", "Deployment", Some("/spec/template")),
            ("apps/v1", "StatefulSet", Some("/spec/template")),
            ("apps/v1", "DaemonSet", Some("/spec/template")),
            ("apps/v1", "ReplicaSet", Some("/spec/template")),
            ("batch/v1", "Job", Some("/spec/template")),
            ("batch/v1", "CronJob", Some("/spec/jobTemplate/spec/template")),
            ("batch.volcano.sh/v1alpha1", "Job", None),
            ("v1", "Service", None),
        ];
        for (api_version, kind, root) in table {
            assert_eq!(
                titles_and_roots(object(api_version, kind)),
                [(format!("{kind} default/x"), root)]
            );
        }
        assert_eq!(
            titles_and_roots(json!({"metadata": {"generateName": "g-", "namespace": "n"}})),
            [("(no kind) n/g-".to_owned(), None)]
        );
        assert_eq!(
            titles_and_roots(json!("text")),
            [("(no kind) default/(unnamed)".to_owned(), None)]
        );
    }

    #[test]
    fn list_yields_its_items() {
        let pod = json!({"metadata": {"name": "bare"}});
        let list = |api_version: &str, kind: &str, items: Value| json!({"apiVersion": api_version, "kind": kind, "items": items});
        assert_eq!(
            titles_and_roots(list(
                "v1",
                "List",
                json!([
                    object("v1", "Pod"),
                    list("v1", "List", json!([object("v1", "Service")]))
                ])
            )),
            [
                ("Pod default/x".to_owned(), Some("")),
                ("Service default/x".to_owned(), None)
            ]
        );
        assert_eq!(
            titles_and_roots(list("v1", "PodList", json!([pod]))),
            [("Pod default/bare".to_owned(), Some(""))]
        );
        assert_eq!(
            titles_and_roots(list("apps/v1", "DeploymentList", json!([pod]))),
            [("Deployment default/bare".to_owned(), Some("/spec/template"))]
        );
        assert_eq!(
            titles_and_roots(list("v1", "List", json!("text"))),
            [("List default/(unnamed)".to_owned(), None)]
        );
        assert_eq!(
            titles_and_roots(list("v1", "Pod", json!([pod]))),
            [("Pod default/(unnamed)".to_owned(), Some(""))]
        );
    }

    #[test]
    fn admission_review_yields_its_requests_object() {
        let review_of = |group: &str, resource: &str, sub_resource: &str, operation: &str| {
            json!({
                "kind": "AdmissionReview",
                "request": {
                    "resource": {"group": group, "resource": resource},
                    "subResource": sub_resource,
                    "operation": operation,
                    "namespace": "n",
                    "object": {"metadata": {"name": "x"}, "spec": {"ephemeralContainers": [{"name": "a"}, {"name": "b"}]}},
                    "oldObject": {"spec": {"ephemeralContainers": [{"name": "a"}]}},
                },
            })
        };
        let review = |resource: &str, sub_resource: &str, operation: &str| {
            review_of("", resource, sub_resource, operation)
        };
        let subject_of = |document: Value| subjects(document, "default").remove(0);
        for (document, is_planned) in [
            (review("pods", "", "CREATE"), true),
            (review("pods", "ephemeralcontainers", "UPDATE"), true),
            (review("pods", "", "UPDATE"), false),
            (review("deployments", "", "CREATE"), false),
            (review_of("metrics.k8s.io", "pods", "", "CREATE"), false),
        ] {
            let subject = subject_of(document);
            assert_eq!((subject.title.as_str(), subject.namespace.as_str()), ("Pod n/x", "n"));
            assert_eq!(
                (subject.makes_pods(), subject.is_planned(), subject.root()),
                (true, is_planned, "")
            );
        }
        let update = subject_of(review("pods", "ephemeralcontainers", "UPDATE"));
        let old = update.old_pod().unwrap();
        assert!(
            !update
                .scope(old.as_ref())
                .needs_no_mode(&update.pod().unwrap())
        );
        assert!(matches!(update.scope(old.as_ref()), Scope::NewEphemeralContainers(Some(_))));
        let mut without_old = review("pods", "ephemeralcontainers", "UPDATE");
        without_old["request"]["oldObject"] = json!(null);
        assert!(subject_of(without_old).old_pod().unwrap().is_none());
        let create = subject_of(review("pods", "", "CREATE"));
        assert!(create.old_pod().unwrap().is_none());
        assert!(matches!(create.scope(None), Scope::Pod));
        assert_eq!(subject_of(json!({"kind": "AdmissionReview"})).title, "Pod default/(unnamed)");
    }

    #[test]
    fn unreadable_pod_is_reported_by_path() {
        let path_of = |document: Value| match subjects(document, "default").remove(0).pod() {
            Err(Refusal::Unreadable { place }) => place,
            other => panic!("{other:?}"),
        };
        assert_eq!(path_of(object("apps/v1", "Deployment")), "spec.template");
        assert_eq!(path_of(json!({"apiVersion": "v1", "kind": "Pod", "spec": 7})), "spec");
        let cron_job = json!({"apiVersion": "batch/v1", "kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template":
            {"spec": {"containers": [{"env": [{"value": 7}]}]}}}}}});
        assert_eq!(
            path_of(cron_job),
            "spec.jobTemplate.spec.template.spec.containers[0].env[0].value"
        );
        let old = json!({"kind": "AdmissionReview", "request": {"resource": {"resource": "pods"}, "subResource": "ephemeralcontainers",
            "operation": "UPDATE", "object": {}, "oldObject": {"spec": 7}}});
        assert_eq!(
            subjects(old, "default").remove(0).old_pod().err(),
            Some(Refusal::Unreadable {
                place: "oldObject.spec".to_owned()
            })
        );
        let none = json!({"kind": "AdmissionReview", "request": {"resource": {"resource": "pods"}, "operation": "CREATE"}});
        let none = subjects(none, "default").remove(0);
        assert_eq!(none.pod().err(), Some(Refusal::NoObject));
    }
}
