//! Plan → RFC 6902 operations, the fewest that do it. No operation repeats a value that stays: the API
//! server writes patches to its audit log.

use std::collections::BTreeMap;

use serde::Serialize;

use super::env::Variable;
use super::plan::{AnnotationPlan, AnnotationsParent, ContainerPlan, Plan};

/// One operation of a JSON patch.
#[derive(Clone, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Operation<'a> {
    /// Adds a member or an array element, or sets a member.
    Add {
        /// Where, as a JSON pointer.
        path: String,
        /// What.
        value: Content<'a>,
    },
    /// Replaces what is there.
    Replace {
        /// Where, as a JSON pointer.
        path: String,
        /// By what.
        value: Content<'a>,
    },
    /// Removes what is there.
    Remove {
        /// Where, as a JSON pointer.
        path: String,
    },
}

/// What an operation writes. No `Debug`: an env entry may hold a token.
#[derive(Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Content<'a> {
    /// One env entry.
    Entry(Variable<'a>),
    /// A whole env list.
    Entries(Vec<Variable<'a>>),
    /// An annotation's value.
    Text(&'static str),
    /// All annotations.
    Annotations(BTreeMap<&'static str, &'static str>),
    /// Metadata that holds nothing but annotations.
    Metadata {
        /// All annotations.
        annotations: BTreeMap<&'static str, &'static str>,
    },
}

/// Writes a plan as operations on the object at `root`, a JSON pointer: empty for a pod, such as
/// `/spec/template` for a controller's pod template.
#[must_use]
pub fn operations<'a>(plan: &Plan<'a>, root: &str) -> Vec<Operation<'a>> {
    let mut operations = Vec::new();
    for container in &plan.containers {
        container_operations(container, root, &mut operations);
    }
    annotation_operations(plan, root, &mut operations);
    operations
}

fn container_operations<'a>(
    container: &ContainerPlan<'a>,
    root: &str,
    operations: &mut Vec<Operation<'a>>,
) {
    let env = format!(
        "{root}/spec/{}/{}/env",
        container.list.field(),
        container.index
    );
    let at = |index: usize| format!("{env}/{index}");
    let (remove, add) = (&container.changes.remove, &container.changes.add);
    let entry = |variable: &Variable<'a>| Content::Entry(variable.clone());

    // Nothing stays: one operation writes the whole list.
    let Some(entries) = &container.entries else {
        operations.push(Operation::Add {
            path: env,
            value: Content::Entries(add.clone()),
        });
        return;
    };
    if remove.len() == entries.len() {
        operations.push(Operation::Replace {
            path: env,
            value: Content::Entries(add.clone()),
        });
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
            .map(|&index| Operation::Remove { path: at(index) }),
    );
    for (index, variable) in add.iter().enumerate() {
        let (path, value) = (at(index), entry(variable));
        operations.push(if index < replaced {
            Operation::Replace { path, value }
        } else {
            Operation::Add { path, value }
        });
    }
}

fn annotation_operations(plan: &Plan<'_>, root: &str, operations: &mut Vec<Operation<'_>>) {
    let metadata = format!("{root}/metadata");
    let all = || {
        plan.annotations
            .iter()
            .map(|annotation| (annotation.key, annotation.value))
            .collect()
    };
    match plan.annotations_parent {
        AnnotationsParent::NoMetadata => {
            operations.push(Operation::Add {
                path: metadata,
                value: Content::Metadata { annotations: all() },
            });
        }
        AnnotationsParent::NoAnnotations => operations.push(Operation::Add {
            path: format!("{metadata}/annotations"),
            value: Content::Annotations(all()),
        }),
        AnnotationsParent::Annotations => {
            operations.extend(
                plan.annotations
                    .iter()
                    .map(|AnnotationPlan { key, value }| Operation::Add {
                        path: format!("{metadata}/annotations/{}", escaped(key)),
                        value: Content::Text(value),
                    }),
            );
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
        serde_json::to_value(operations(&plan, root)).unwrap()
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
