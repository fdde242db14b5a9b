//! Plan → RFC 6902 operations, the fewest that do it. No operation repeats a value that stays: the API
//! server writes patches to its audit log.

use super::env::{Value, Variable};
use super::json::{list, object, text};
use super::plan::{AnnotationPlan, AnnotationsParent, ContainerPlan, Plan};
use super::pod::ContainerList;

/// One operation of a JSON patch.
#[derive(Clone, Copy)]
pub enum Operation<'a> {
    /// Adds a member or an array element, or sets a member.
    Add(Path<'a>, Content<'a>),
    /// Replaces what is there.
    Replace(Path<'a>, Content<'a>),
    /// Removes what is there.
    Remove(Path<'a>),
}

/// A JSON pointer (RFC 6901), made text only as it is written.
#[derive(Clone, Copy)]
pub struct Path<'a> {
    /// The pointer to the object: empty for a pod, such as `/spec/template` for a controller's pod template.
    root: &'a str,
    place: Place,
}

/// A place in a pod or a pod template.
#[derive(Clone, Copy)]
enum Place {
    Env(ContainerList, usize),
    EnvEntry(ContainerList, usize, usize),
    Metadata,
    Annotations,
    Annotation(&'static str),
}

/// What an operation writes. No `Debug`: an env entry may hold a token.
#[derive(Clone, Copy)]
pub enum Content<'a> {
    /// One env entry.
    Entry(&'a Variable<'a>),
    /// A whole env list.
    Entries(&'a [Variable<'a>]),
    /// An annotation's value.
    Text(&'static str),
    /// All annotations.
    Annotations(&'a [AnnotationPlan]),
    /// Metadata that holds nothing but annotations.
    Metadata(&'a [AnnotationPlan]),
}

/// Most operations have no more bytes.
const MOST_BYTES: usize = 192;

/// The patch as JSON.
#[must_use]
pub fn written(operations: &[Operation<'_>]) -> String {
    let mut out = String::with_capacity(operations.len() * MOST_BYTES);
    list(&mut out, operations, |out, operation| operation.write(out));
    out
}

impl Operation<'_> {
    fn write(&self, out: &mut String) {
        let (op, path, content) = match self {
            Self::Add(path, content) => ("add", path, Some(content)),
            Self::Replace(path, content) => ("replace", path, Some(content)),
            Self::Remove(path) => ("remove", path, None),
        };
        // Patches are the most of what is written, and their members are always the same.
        out.push_str("{\"op\":\"");
        out.push_str(op);
        out.push_str("\",\"path\":\"");
        path.write(out);
        out.push('"');
        if let Some(content) = content {
            out.push_str(",\"value\":");
            content.write(out);
        }
        out.push('}');
    }
}

impl Path<'_> {
    /// Nothing in a path needs to be escaped for JSON.
    fn write(&self, out: &mut String) {
        out.push_str(self.root);
        let mut env = |list: ContainerList, container| {
            out.push_str("/spec/");
            out.push_str(list.field());
            out.push('/');
            out.push_str(itoa::Buffer::new().format(container));
            out.push_str("/env");
        };
        match self.place {
            Place::Env(list, container) => env(list, container),
            Place::EnvEntry(list, container, entry) => {
                env(list, container);
                out.push('/');
                out.push_str(itoa::Buffer::new().format(entry));
            }
            Place::Metadata => out.push_str("/metadata"),
            Place::Annotations => out.push_str("/metadata/annotations"),
            Place::Annotation(key) => {
                out.push_str("/metadata/annotations/");
                out.push_str(&escaped(key));
            }
        }
    }
}

impl Content<'_> {
    pub(super) fn write(&self, out: &mut String) {
        match self {
            Self::Entry(variable) => variable_written(out, variable),
            Self::Entries(variables) => list(out, variables, variable_written),
            Self::Text(value) => text(out, value),
            Self::Annotations(annotations) => annotations_written(out, annotations),
            Self::Metadata(annotations) => object(out, |metadata| {
                annotations_written(metadata.member("annotations"), annotations);
            }),
        }
    }
}

/// A variable as an env entry of a pod.
fn variable_written(out: &mut String, variable: &Variable<'_>) {
    out.push_str("{\"name\":");
    text(out, variable.name);
    match &variable.value {
        Value::Literal(value) => {
            out.push_str(",\"value\":");
            text(out, value);
        }
        Value::Source(source) => {
            out.push_str(",\"valueFrom\":");
            source.write(out);
        }
    }
    out.push('}');
}

fn annotations_written(out: &mut String, annotations: &[AnnotationPlan]) {
    object(out, |all| {
        for AnnotationPlan { key, value } in annotations {
            all.text(key, value);
        }
    });
}

/// Writes a plan as operations on the object at `root`, a JSON pointer: empty for a pod, such as
/// `/spec/template` for a controller's pod template.
#[must_use]
pub fn operations<'a>(plan: &'a Plan<'_>, root: &'a str) -> Vec<Operation<'a>> {
    let most = |plan: &ContainerPlan<'_>| plan.changes.remove.len() + plan.changes.add.len();
    let most = plan.containers.iter().map(most).sum::<usize>() + plan.annotations.len();
    let mut operations = Vec::with_capacity(most);
    for container in &plan.containers {
        container_operations(container, root, &mut operations);
    }
    annotation_operations(plan, root, &mut operations);
    operations
}

fn container_operations<'a>(
    plan: &'a ContainerPlan<'_>,
    root: &'a str,
    operations: &mut Vec<Operation<'a>>,
) {
    let path = |place| Path { root, place };
    let env = path(Place::Env(plan.list, plan.index));
    let at = |entry| path(Place::EnvEntry(plan.list, plan.index, entry));
    let (remove, add) = (&plan.changes.remove, plan.changes.add.as_slice());

    // Nothing stays: one operation writes the whole list.
    let Some(entries) = &plan.container.env else {
        operations.push(Operation::Add(env, Content::Entries(add)));
        return;
    };
    if remove.len() == entries.len() {
        operations.push(Operation::Replace(env, Content::Entries(add)));
        return;
    }
    // What comes stands first, so it can take the places of entries that go from the list's head. All
    // else is removed from the end, so that the indices before it hold.
    let head = remove
        .iter()
        .enumerate()
        .take_while(|(place, index)| place == *index)
        .count();
    let replaced = head.min(add.len());
    operations.extend(
        remove
            .iter()
            .skip(replaced)
            .rev()
            .map(|&index| Operation::Remove(at(index))),
    );
    for (index, variable) in add.iter().enumerate() {
        let (path, value) = (at(index), Content::Entry(variable));
        operations.push(if index < replaced {
            Operation::Replace(path, value)
        } else {
            Operation::Add(path, value)
        });
    }
}

fn annotation_operations<'a>(
    plan: &'a Plan<'_>,
    root: &'a str,
    operations: &mut Vec<Operation<'a>>,
) {
    let add = |place, content| Operation::Add(Path { root, place }, content);
    let all = plan.annotations.as_slice();
    match plan.annotations_parent {
        AnnotationsParent::NoMetadata => {
            operations.push(add(Place::Metadata, Content::Metadata(all)));
        }
        AnnotationsParent::NoAnnotations => {
            operations.push(add(Place::Annotations, Content::Annotations(all)));
        }
        AnnotationsParent::Annotations => {
            let one = |&AnnotationPlan { key, value }: &AnnotationPlan| {
                add(Place::Annotation(key), Content::Text(value))
            };
            operations.extend(all.iter().map(one));
        }
    }
}

/// A member's name as a token of a JSON pointer (RFC 6901).
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::mode::{BillingMode, Resolution};
    use crate::core::plan::{Scope, plan};
    use crate::core::policy::Policy;

    /// The operations for a pod whose mode is byok.
    fn patch(pod: &Value, root: &str) -> Value {
        let text = pod.to_string();
        let pod = serde_json::from_str(&text).unwrap();
        let policy = Policy::default();
        let plan = plan(
            &policy,
            Resolution::chosen(BillingMode::Byok),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        serde_json::from_str(&written(&operations(&plan, root))).unwrap()
    }

    fn env_patch(env: &Value) -> Value {
        let annotations = json!({
            "molecule.ai/llm-billing-mode": "byok",
            "molecule.ai/llm-billing-source": "workspace_override",
        });
        patch(
            &json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"env": env}]}}),
            "",
        )
    }

    #[test]
    fn env_takes_the_fewest_operations() {
        let variable = |name: &str, value: &str| json!({"name": name, "value": value});
        let mode = |value| variable("MOLECULE_LLM_BILLING_MODE", value);
        let resolved = |value| variable("MOLECULE_LLM_BILLING_MODE_RESOLVED", value);
        let keep = variable("KEEP", "1");
        let at = |op: &str, index: usize, value: Option<Value>| {
            let mut operation =
                json!({"op": op, "path": format!("/spec/containers/0/env/{index}")});
            if let Some(value) = value {
                operation["value"] = value;
            }
            operation
        };
        let whole = |op: &str| json!([{"op": op, "path": "/spec/containers/0/env", "value": [mode("byok"), resolved("byok")]}]);
        let (b, r) = (|| Some(mode("byok")), || Some(resolved("byok")));
        let table = [
            (json!([mode("byok"), keep, resolved("byok")]), json!([])),
            // Nothing stays, so nothing is repeated.
            (json!(null), whole("add")),
            (json!([]), whole("replace")),
            (
                json!([mode("x"), resolved("x"), mode("y")]),
                whole("replace"),
            ),
            // Something stays.
            (json!([keep]), json!([at("add", 0, b()), at("add", 1, r())])),
            (json!([keep, mode("byok")]), json!([at("add", 0, r())])),
            (
                json!([keep, mode("x"), keep, resolved("byok")]),
                json!([at("remove", 1, None), at("add", 0, b())]),
            ),
            (
                json!([keep, mode("x"), resolved("x")]),
                json!([
                    at("remove", 2, None),
                    at("remove", 1, None),
                    at("add", 0, b()),
                    at("add", 1, r())
                ]),
            ),
            // From the head, what goes gives its place to what comes.
            (
                json!([mode("x"), keep]),
                json!([at("replace", 0, b()), at("add", 1, r())]),
            ),
            (
                json!([mode("x"), resolved("x"), keep]),
                json!([at("replace", 0, b()), at("replace", 1, r())]),
            ),
            (
                json!([mode("x"), keep, resolved("x")]),
                json!([
                    at("remove", 2, None),
                    at("replace", 0, b()),
                    at("add", 1, r())
                ]),
            ),
            (
                json!([mode("x"), mode("y"), resolved("byok"), keep]),
                json!([at("remove", 1, None), at("replace", 0, b())]),
            ),
            (
                json!([mode("x"), mode("byok"), resolved("byok")]),
                json!([at("remove", 0, None)]),
            ),
        ];
        for (env, expected) in table {
            assert_eq!(env_patch(&env), expected, "{env}");
        }
    }

    #[test]
    fn annotations_are_added_where_they_are_absent_or_wrong() {
        let annotations = json!({
            "molecule.ai/llm-billing-mode": "byok",
            "molecule.ai/llm-billing-source": "workspace_override",
        });
        let all = |path: &str, value: Value| json!([{"op": "add", "path": path, "value": value}]);
        let one = |key: &str, value: &str| json!({"op": "add", "path": format!("/metadata/annotations/molecule.ai~1llm-billing-{key}"), "value": value});
        let table = [
            (
                json!({}),
                all("/metadata", json!({"annotations": annotations})),
            ),
            (
                json!({"metadata": null}),
                all("/metadata", json!({"annotations": annotations})),
            ),
            (
                json!({"metadata": {}}),
                all("/metadata/annotations", annotations.clone()),
            ),
            (
                json!({"metadata": {"annotations": null}}),
                all("/metadata/annotations", annotations.clone()),
            ),
            (
                json!({"metadata": {"annotations": {"a": "b"}}}),
                json!([one("mode", "byok"), one("source", "workspace_override")]),
            ),
            (
                json!({"metadata": {"annotations": {"molecule.ai/llm-billing-mode": null, "molecule.ai/llm-billing-source": "workspace_override"}}}),
                json!([one("mode", "byok")]),
            ),
            (json!({"metadata": {"annotations": annotations}}), json!([])),
        ];
        for (pod, expected) in table {
            assert_eq!(patch(&pod, ""), expected, "{pod}");
        }
    }

    #[test]
    fn paths_are_escaped_and_start_at_the_root() {
        assert_eq!(escaped("a/b~c/~1"), "a~1b~0c~1~01");
        let pod = json!({"metadata": {"annotations": {}}, "spec": {"initContainers": [{}, {"env": [{"name": "A"}]}]}});
        let patch = patch(&pod, "/spec/template");
        let paths: Vec<&str> = patch
            .as_array()
            .unwrap()
            .iter()
            .map(|operation| operation["path"].as_str().unwrap())
            .collect();
        assert_eq!(
            paths,
            [
                "/spec/template/spec/initContainers/0/env",
                "/spec/template/spec/initContainers/1/env/0",
                "/spec/template/spec/initContainers/1/env/1",
                "/spec/template/metadata/annotations/molecule.ai~1llm-billing-mode",
                "/spec/template/metadata/annotations/molecule.ai~1llm-billing-source",
            ]
        );
    }
}
