//! Manifests and the location of their pods: a Pod, the pod templates of workloads, a List, an admission review.
//! cli/review.rs reads and splits the text.

use std::str::FromStr;

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
    /// At JSON pointers to a new pod or to pod templates.
    At(Vec<String>),
    /// The object is a running pod that gets ephemeral containers; this is the old pod.
    Update(Value),
}

/// Kinds that create pods, by API group, with the JSON pointers to the pod or its templates. `*` is each item of a list.
/// The first pointer is required; templates at the others may be absent.
const KINDS: [(&str, &str, &[&str]); 18] = [
    ("", "Pod", &[""]),
    ("", "PodTemplate", &["/template"]),
    ("", "ReplicationController", &["/spec/template"]),
    ("apps", "Deployment", &["/spec/template"]),
    ("apps", "StatefulSet", &["/spec/template"]),
    ("apps", "DaemonSet", &["/spec/template"]),
    ("apps", "ReplicaSet", &["/spec/template"]),
    ("batch", "Job", &["/spec/template"]),
    ("batch", "CronJob", &["/spec/jobTemplate/spec/template"]),
    // Argo Rollouts
    ("argoproj.io", "Rollout", &["/spec/template"]),
    // Agent Sandbox
    ("agents.x-k8s.io", "Sandbox", &["/spec/podTemplate"]),
    ("extensions.agents.x-k8s.io", "SandboxTemplate", &["/spec/podTemplate"]),
    // Knative Serving
    ("serving.knative.dev", "Service", &["/spec/template"]),
    ("serving.knative.dev", "Configuration", &["/spec/template"]),
    // KubeRay
    (
        "ray.io",
        "RayCluster",
        &[
            "/spec/headGroupSpec/template",
            "/spec/workerGroupSpecs/*/template",
        ],
    ),
    (
        "ray.io",
        "RayJob",
        &[
            "/spec/rayClusterSpec/headGroupSpec/template",
            "/spec/rayClusterSpec/workerGroupSpecs/*/template",
            "/spec/submitterPodTemplate",
        ],
    ),
    (
        "ray.io",
        "RayService",
        &[
            "/spec/rayClusterConfig/headGroupSpec/template",
            "/spec/rayClusterConfig/workerGroupSpecs/*/template",
        ],
    ),
    // JobSet
    ("jobset.x-k8s.io", "JobSet", &["/spec/replicatedJobs/*/template/spec/template"]),
];

/// Where a kind that is not in the table has its pod template.
#[derive(Clone, Debug)]
pub struct TemplatePath {
    kind: String,
    pointer: String,
}

impl FromStr for TemplatePath {
    type Err = &'static str;

    /// Reads `KIND=PATH`, such as `Workspace=spec.podTemplate`.
    fn from_str(text: &str) -> Result<Self, &'static str> {
        let expected = "expected KIND=PATH, such as Workspace=spec.podTemplate or Fleet=spec.groups.*.template";
        let (kind, path) = text.split_once('=').ok_or(expected)?;
        let path = path.trim_start_matches('.');
        if kind.is_empty() || path.split('.').any(str::is_empty) {
            return Err(expected);
        }
        Ok(Self {
            kind: kind.to_owned(),
            pointer: format!("/{}", path.replace('.', "/")),
        })
    }
}

/// Returns the objects of a document: the items of a List, the object of an admission review, or the document itself.
/// Objects without a namespace are assumed to be in `namespace`. `paths` are for kinds that the table lacks.
#[must_use]
pub fn subjects(document: Value, namespace: &str, paths: &[TemplatePath]) -> Vec<Subject> {
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
            .flat_map(|item| subjects(with_kind(item, item_kind.as_ref()), namespace, paths))
            .collect();
    }
    let pods = pods_of(&document, api_version, kind, paths);
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

fn pods_of(object: &Value, api_version: &str, kind: &str, paths: &[TemplatePath]) -> Pods {
    // `v1` alone has the core group.
    let group = api_version.split_once('/').map(|(group, _)| group);
    let group = group.or_else(|| (api_version == "v1").then_some(""));
    let known = KINDS
        .iter()
        .find(|known| (Some(known.0), known.1) == (group, kind));
    let pointers: Vec<&str> = match known {
        Some((_, _, pointers)) => pointers.to_vec(),
        None => {
            let given = paths.iter().filter(|path| path.kind == kind);
            given.map(|path| path.pointer.as_str()).collect()
        }
    };
    let Some((first, others)) = pointers.split_first() else {
        return Pods::Nowhere;
    };
    let mut found = expand(object, first);
    if found.is_empty() {
        // An error names the path that leads nowhere.
        found.push((*first).to_owned());
    }
    let others = others.iter().flat_map(|pointer| expand(object, pointer));
    found.extend(others.filter(|pointer| object.pointer(pointer).is_some()));
    Pods::At(found)
}

/// Replaces each `*` of a pointer by the indices of the list there.
fn expand(object: &Value, pointer: &str) -> Vec<String> {
    let Some((list, rest)) = pointer.split_once("/*") else {
        return vec![pointer.to_owned()];
    };
    let items = object.pointer(list).and_then(Value::as_array);
    let indices = 0..items.map_or(0, Vec::len);
    indices
        .flat_map(|index| expand(object, &format!("{list}/{index}{rest}")))
        .collect()
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
        AdmissionTarget::PodCreation => Pods::At(vec![String::new()]),
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

    /// Returns the JSON pointers to the pod or the pod templates that the webhook plans.
    #[must_use]
    pub fn roots(&self) -> Vec<&str> {
        match &self.pods {
            Pods::At(roots) => roots.iter().map(String::as_str).collect(),
            Pods::Update(_) => vec![""],
            Pods::Untouched | Pods::Nowhere => Vec::new(),
        }
    }

    /// Returns the pod or pod template at a root.
    ///
    /// # Errors
    /// Returns [`Refusal::Unreadable`] with the path of the missing template or of a value of the wrong type, or
    /// [`Refusal::NoObject`] for a request without an object.
    pub fn pod(&self, root: &str) -> Result<Pod<'_>, Refusal> {
        // Only a request's object can be null.
        if self.object.is_null() {
            return Err(Refusal::NoObject);
        }
        let missing = || Refusal::Unreadable {
            place: dotted(root),
        };
        let value = self.object.pointer(root).ok_or_else(missing)?;
        read(value, root)
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

/// Returns a JSON pointer as a path with dots, for messages.
#[must_use]
pub fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

fn read<'v>(value: &'v Value, root: &str) -> Result<Pod<'v>, Refusal> {
    Pod::deserialize(value).map_err(|_| {
        let root = dotted(root);
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

    /// Returns the title of each object of a document, and where its pod is.
    fn titles_and_roots(document: Value) -> Vec<(String, Option<String>)> {
        let subjects = subjects(document, "default", &[]);
        subjects
            .iter()
            .map(|subject| {
                let roots = subject.roots();
                assert_eq!(subject.makes_pods(), !roots.is_empty());
                (subject.title.clone(), roots.first().map(|&root| root.to_owned()))
            })
            .collect()
    }

    fn at(root: &str) -> Option<String> {
        Some(root.to_owned())
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
            ("argoproj.io/v1alpha1", "Rollout", Some("/spec/template")),
            ("agents.x-k8s.io/v1beta1", "Sandbox", Some("/spec/podTemplate")),
            ("extensions.agents.x-k8s.io/v1alpha1", "SandboxTemplate", Some("/spec/podTemplate")),
            ("serving.knative.dev/v1", "Service", Some("/spec/template")),
            ("batch.volcano.sh/v1alpha1", "Job", None),
            ("v1", "Service", None),
            ("v2", "Pod", None),
        ];
        for (api_version, kind, root) in table {
            assert_eq!(
                titles_and_roots(object(api_version, kind)),
                [(format!("{kind} default/x"), root.map(str::to_owned))]
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
    fn kind_with_several_templates_has_each_of_them() {
        let roots = |kind: &str, spec: Value, paths: &[&str]| {
            let (group, kind) = kind.split_once(' ').unwrap();
            let object = json!({"apiVersion": format!("{group}/v1"), "kind": kind, "spec": spec});
            let paths: Vec<TemplatePath> = paths.iter().map(|path| path.parse().unwrap()).collect();
            let subject = subjects(object, "default", &paths).remove(0);
            let roots = subject.roots();
            roots.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let head = "/spec/headGroupSpec/template";
        let workers = [{}, {}].map(|()| json!({"template": {}}));
        assert_eq!(
            roots(
                "ray.io RayCluster",
                json!({"headGroupSpec": {}, "workerGroupSpecs": workers}),
                &[]
            ),
            [
                head,
                "/spec/workerGroupSpecs/0/template",
                "/spec/workerGroupSpecs/1/template"
            ]
        );
        assert_eq!(roots("ray.io RayCluster", json!({}), &[]), [head]);
        let job = json!({"rayClusterSpec": {}, "submitterPodTemplate": {}});
        assert_eq!(
            roots("ray.io RayJob", job, &[]),
            [
                "/spec/rayClusterSpec/headGroupSpec/template",
                "/spec/submitterPodTemplate"
            ]
        );
        assert_eq!(
            roots("jobset.x-k8s.io JobSet", json!({"replicatedJobs": [{}]}), &[]),
            ["/spec/replicatedJobs/0/template/spec/template"]
        );
        // A list that is absent or empty: the error names the path.
        assert_eq!(
            roots("jobset.x-k8s.io JobSet", json!({}), &[]),
            ["/spec/replicatedJobs/*/template/spec/template"]
        );
        // Another kind, with the paths that are given for it.
        let paths = [
            "Fleet=spec.groups.*.pod",
            "Fleet=.spec.extra",
            "Other=spec.x",
            "Pod=spec.x",
        ];
        let fleet = json!({"groups": [{"pod": {}}], "extra": {}});
        assert_eq!(roots("acme.io Fleet", fleet, &paths), ["/spec/groups/0/pod", "/spec/extra"]);
        for invalid in ["Fleet", "=spec", "Fleet=", "Fleet=spec..x", "Fleet=."] {
            assert!(invalid.parse::<TemplatePath>().is_err(), "{invalid}");
        }
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
                ("Pod default/x".to_owned(), at("")),
                ("Service default/x".to_owned(), None)
            ]
        );
        assert_eq!(
            titles_and_roots(list("v1", "PodList", json!([pod]))),
            [("Pod default/bare".to_owned(), at(""))]
        );
        assert_eq!(
            titles_and_roots(list("apps/v1", "DeploymentList", json!([pod]))),
            [("Deployment default/bare".to_owned(), at("/spec/template"))]
        );
        assert_eq!(
            titles_and_roots(list("v1", "List", json!("text"))),
            [("List default/(unnamed)".to_owned(), None)]
        );
        assert_eq!(
            titles_and_roots(list("v1", "Pod", json!([pod]))),
            [("Pod default/(unnamed)".to_owned(), at(""))]
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
        let subject_of = |document: Value| subjects(document, "default", &[]).remove(0);
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
                (subject.makes_pods(), subject.is_planned(), subject.roots().len()),
                (true, is_planned, usize::from(is_planned))
            );
        }
        let update = subject_of(review("pods", "ephemeralcontainers", "UPDATE"));
        let old = update.old_pod().unwrap();
        assert!(
            !update
                .scope(old.as_ref())
                .needs_no_mode(&update.pod("").unwrap())
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
        let path_of = |document: Value| {
            let subject = subjects(document, "default", &[]).remove(0);
            match subject.pod(subject.roots()[0]) {
                Err(Refusal::Unreadable { place }) => place,
                other => panic!("{other:?}"),
            }
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
            subjects(old, "default", &[]).remove(0).old_pod().err(),
            Some(Refusal::Unreadable {
                place: "oldObject.spec".to_owned()
            })
        );
        let none = json!({"kind": "AdmissionReview", "request": {"resource": {"resource": "pods"}, "operation": "CREATE"}});
        let none = subjects(none, "default", &[]).remove(0);
        assert_eq!(none.pod("").err(), Some(Refusal::NoObject));
    }
}
