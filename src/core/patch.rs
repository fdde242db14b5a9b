//! Plan → RFC 6902 operations, the fewest that do it. No operation repeats a value that stays: the API
//! server writes patches to its audit log.

use std::borrow::Cow;

use super::env::Variable;
use super::json::{list, object, text};
use super::plan::{AnnotationPlan, AnnotationsParent, ContainerPlan, Plan};

/// A JSON patch. No `Debug`: an env entry may hold a token.
pub struct Patch {
    /// The operations as a JSON list.
    pub json: String,
    /// How many they are.
    pub operations: usize,
}

/// What an operation writes.
#[derive(Clone, Copy)]
enum Content<'a> {
    /// One env entry.
    Entry(&'a Variable),
    /// A whole env list.
    Entries(&'a [Cow<'a, Variable>]),
    /// An annotation's value.
    Text(&'static str),
    /// All annotations.
    Annotations(&'a [AnnotationPlan]),
    /// Metadata that holds nothing but annotations.
    Metadata(&'a [AnnotationPlan]),
}

/// Room for the operations on one container, so that the text is seldom moved as it grows.
const BYTES_PER_CONTAINER: usize = 1536;

/// Writes a plan as operations on the object at `root`, a JSON pointer: empty for a pod, such as
/// `/spec/template` for a controller's pod template.
#[must_use]
pub fn patch(plan: &Plan<'_>, root: &str) -> Patch {
    let mut patch = Patch {
        json: String::with_capacity((plan.containers.len() + 1) * BYTES_PER_CONTAINER),
        operations: 0,
    };
    patch.json.push('[');
    for container in &plan.containers {
        patch.container(root, container);
    }
    patch.annotations(root, plan);
    patch.json.push(']');
    patch
}

// How operations begin, up to their path. Patches are the most of what is written, and their members always the same.
const ADD: &str = r#"{"op":"add","path":""#;
const REPLACE: &str = r#"{"op":"replace","path":""#;
const REMOVE: &str = r#"{"op":"remove","path":""#;

impl Patch {
    fn container(&mut self, root: &str, plan: &ContainerPlan<'_>) {
        let mut index = itoa::Buffer::new();
        let index = index.format(plan.index);
        let env = [root, "/spec/", plan.list.field(), "/", index, "/env"].concat();
        let (remove, add) = (&plan.changes.remove, plan.changes.add.as_slice());

        // Nothing stays: one operation writes the whole list.
        let Some(entries) = &plan.container.env else {
            return self.write(ADD, &env, None, Some(Content::Entries(add)));
        };
        if remove.len() == entries.len() {
            return self.write(REPLACE, &env, None, Some(Content::Entries(add)));
        }
        // What comes stands first, so it can take the places of entries that go from the list's head. All
        // else is removed from the end, so that the indices before it hold.
        let head = remove
            .iter()
            .enumerate()
            .take_while(|(place, index)| place == *index)
            .count();
        let replaced = head.min(add.len());
        for &index in remove.iter().skip(replaced).rev() {
            self.write(REMOVE, &env, Some(index), None);
        }
        for (index, variable) in add.iter().enumerate() {
            let op = if index < replaced { REPLACE } else { ADD };
            self.write(op, &env, Some(index), Some(Content::Entry(variable)));
        }
    }

    fn annotations(&mut self, root: &str, plan: &Plan<'_>) {
        let all = plan.annotations.as_slice();
        let mut add = |place: &str, content| {
            let path = [root, "/metadata", place].concat();
            self.write(ADD, &path, None, Some(content));
        };
        match plan.annotations_parent {
            AnnotationsParent::NoMetadata => add("", Content::Metadata(all)),
            AnnotationsParent::NoAnnotations => add("/annotations", Content::Annotations(all)),
            AnnotationsParent::Annotations => {
                for AnnotationPlan { key, value } in all {
                    let place = ["/annotations/", &escaped(key)].concat();
                    add(&place, Content::Text(value));
                }
            }
        }
    }

    /// Writes an operation on what a JSON pointer (RFC 6901) points to, or on an entry of that list. Nothing in a
    /// path needs to be escaped for JSON.
    fn write(&mut self, op: &str, path: &str, entry: Option<usize>, content: Option<Content<'_>>) {
        let out = &mut self.json;
        if self.operations > 0 {
            out.push(',');
        }
        self.operations += 1;
        out.push_str(op);
        out.push_str(path);
        if let Some(index) = entry {
            out.push('/');
            out.push_str(itoa::Buffer::new().format(index));
        }
        if let Some(content) = content {
            out.push_str("\",\"value\":");
            content.write(out);
            out.push('}');
        } else {
            out.push_str("\"}");
        }
    }
}

impl Content<'_> {
    fn write(self, out: &mut String) {
        match self {
            Self::Entry(variable) => out.push_str(variable.entry()),
            Self::Entries(all) => list(out, all, |out, one| out.push_str(one.entry())),
            Self::Text(value) => text(out, value),
            Self::Annotations(annotations) => annotations_written(out, annotations),
            Self::Metadata(annotations) => object(out, |metadata| {
                annotations_written(metadata.member("annotations"), annotations);
            }),
        }
    }
}

fn annotations_written(out: &mut String, annotations: &[AnnotationPlan]) {
    object(out, |all| {
        for AnnotationPlan { key, value } in annotations {
            all.text(key, value);
        }
    });
}

/// A member's name as a token of a JSON pointer (RFC 6901).
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::plan::{Scope, plan};
    use crate::core::policy::Policy;
    use crate::core::resolution::{BillingMode, Resolution};

    /// The operations for a pod whose mode is byok.
    fn patch(pod: &Value, root: &str) -> Value {
        let text = pod.to_string();
        let pod = serde_json::from_str(&text).unwrap();
        let policy = Policy::parse("").unwrap();
        let plan = plan(
            &policy,
            "",
            Resolution::chosen(BillingMode::Byok),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        serde_json::from_str(&super::patch(&plan, root).json).unwrap()
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
