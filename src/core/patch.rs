//! Writes a plan as a JSON patch (RFC 6902) with few operations. No operation repeats an unchanged value, because the
//! API server writes patches to its audit log.

use super::env::Entry;
use super::json::{list, object, text};
use super::plan::{AnnotationPlan, AnnotationsParent, ContainerPlan, Plan};

/// A JSON patch. No `Debug`: an env entry may hold a token.
pub struct Patch {
    /// The operations as a JSON list.
    pub json: String,
    /// The number of operations.
    pub operations: usize,
}

/// The value that an operation writes.
#[derive(Clone, Copy)]
enum Content<'a> {
    /// One env entry.
    Entry(&'a Entry<'a>),
    /// A whole env list.
    Entries(&'a [Entry<'a>]),
    /// An annotation's value.
    Text(&'static str),
    /// All annotations.
    Annotations(&'a [AnnotationPlan]),
    /// Metadata with annotations only.
    Metadata(&'a [AnnotationPlan]),
}

/// Initial capacity for the operations on one container, and for each entry that they add. They avoid most
/// reallocations.
const BYTES_PER_CONTAINER: usize = 1024;
const BYTES_PER_ENTRY: usize = 48;

/// Writes a plan as operations on the object at `root`, a JSON pointer: empty for a pod, or the path of a pod template,
/// such as `/spec/template`.
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

// The beginnings of operations, up to the path. They are constants because most of a response is its patch.
const ADD: &str = r#"{"op":"add","path":""#;
const REPLACE: &str = r#"{"op":"replace","path":""#;
const REMOVE: &str = r#"{"op":"remove","path":""#;
const MOVE: &str = r#"{"op":"move","from":""#;

/// The operations of a move besides one for each remaining entry: move the list, add the new one, remove the old one.
const MOVE_OPERATIONS: usize = 3;

impl Patch {
    fn container(&mut self, root: &str, plan: &ContainerPlan<'_>) {
        let mut index = itoa::Buffer::new();
        let index = index.format(plan.index);
        let env = [root, "/spec/", plan.list.field(), "/", index, "/env"].concat();
        let (remove, add) = (&plan.changes.remove, plan.changes.add.as_slice());
        self.json.reserve(add.len() * BYTES_PER_ENTRY);

        // No entry remains: one operation writes the whole list.
        let Some(entries) = &plan.container.env else {
            return self.write(ADD, &env, None, Some(Content::Entries(add)));
        };
        if remove.len() == entries.len() {
            return self.write(REPLACE, &env, None, Some(Content::Entries(add)));
        }
        // Many variables before few entries: moving the entries takes less than half the operations.
        let remaining = entries.len() - remove.len();
        if add.len() > 2 * (remaining + MOVE_OPERATIONS) {
            return self.move_entries(&env, plan);
        }
        // Variables are added at the head, so they can replace entries that are removed there. Other entries are
        // removed from the end, so that earlier indices stay valid.
        let head = remove
            .iter()
            .enumerate()
            .take_while(|(position, index)| position == *index)
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

    /// Writes the added variables as a new list, and moves the remaining entries behind them.
    fn move_entries(&mut self, env: &str, plan: &ContainerPlan<'_>) {
        let old = [env, "Old"].concat();
        self.write_move(env, None, &old);
        self.write(ADD, env, None, Some(Content::Entries(&plan.changes.add)));
        let last = [env, "/-"].concat();
        let indices = 0..plan.container.entries().len();
        let remaining = indices.filter(|index| plan.changes.remove.binary_search(index).is_err());
        // Each move shortens the list.
        for (moved, index) in remaining.enumerate() {
            self.write_move(&old, Some(index - moved), &last);
        }
        self.write(REMOVE, &old, None, None);
    }

    fn annotations(&mut self, root: &str, plan: &Plan<'_>) {
        let all = plan.annotations.as_slice();
        let mut add = |suffix: &str, content| {
            let path = [root, "/metadata", suffix].concat();
            self.write(ADD, &path, None, Some(content));
        };
        match plan.annotations_parent {
            AnnotationsParent::NoMetadata => add("", Content::Metadata(all)),
            AnnotationsParent::NoAnnotations => add("/annotations", Content::Annotations(all)),
            AnnotationsParent::Annotations => {
                for AnnotationPlan { key, value } in all {
                    let suffix = ["/annotations/", &escape_token(key)].concat();
                    add(&suffix, Content::Text(value));
                }
            }
        }
    }

    /// Writes an operation on `path`, a JSON pointer (RFC 6901), or on an entry of the list there. The path needs no
    /// escaping for JSON.
    fn write(&mut self, op: &str, path: &str, entry: Option<usize>, content: Option<Content<'_>>) {
        self.begin(op, path, entry);
        let out = &mut self.json;
        if let Some(content) = content {
            out.push_str("\",\"value\":");
            content.write(out);
            out.push('}');
        } else {
            out.push_str("\"}");
        }
    }

    /// Writes an operation that moves what is at `from`, or an entry of the list there, to `path`.
    fn write_move(&mut self, from: &str, entry: Option<usize>, path: &str) {
        self.begin(MOVE, from, entry);
        self.json.push_str("\",\"path\":\"");
        self.json.push_str(path);
        self.json.push_str("\"}");
    }

    fn begin(&mut self, op: &str, pointer: &str, entry: Option<usize>) {
        let out = &mut self.json;
        if self.operations > 0 {
            out.push(',');
        }
        self.operations += 1;
        out.push_str(op);
        out.push_str(pointer);
        if let Some(index) = entry {
            out.push('/');
            out.push_str(itoa::Buffer::new().format(index));
        }
    }
}

impl Content<'_> {
    fn write(self, out: &mut String) {
        match self {
            Self::Entry(entry) => entry.write(out),
            Self::Entries(all) => list(out, all, |out, entry| entry.write(out)),
            Self::Text(value) => text(out, value),
            Self::Annotations(annotations) => write_annotations(out, annotations),
            Self::Metadata(annotations) => object(out, |metadata| {
                write_annotations(metadata.member("annotations"), annotations);
            }),
        }
    }
}

fn write_annotations(out: &mut String, annotations: &[AnnotationPlan]) {
    object(out, |all| {
        for AnnotationPlan { key, value } in annotations {
            all.text(key, value);
        }
    });
}

/// Escapes a member's name as a token of a JSON pointer (RFC 6901).
fn escape_token(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::placeholders::Workspace;
    use crate::core::plan::{Scope, plan};
    use crate::core::policy::Policy;
    use crate::core::resolution::{BillingMode, Resolution};

    /// Returns the operations for a byok pod.
    fn patch(pod: &Value, root: &str) -> Value {
        let text = pod.to_string();
        let pod = serde_json::from_str(&text).unwrap();
        let policy = Policy::parse("").unwrap();
        let plan = plan(
            &policy,
            Workspace::default(),
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
    fn env_patch_has_the_fewest_operations() {
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
            // No entry remains.
            (json!(null), whole("add")),
            (json!([]), whole("replace")),
            (json!([mode("x"), resolved("x"), mode("y")]), whole("replace")),
            // Some entries remain.
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
            // Entries removed at the head are replaced.
            (json!([mode("x"), keep]), json!([at("replace", 0, b()), at("add", 1, r())])),
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
            (json!([mode("x"), mode("byok"), resolved("byok")]), json!([at("remove", 0, None)])),
        ];
        for (env, expected) in table {
            assert_eq!(env_patch(&env), expected, "{env}");
        }
    }

    #[test]
    fn many_masks_move_the_remaining_entries() {
        let keys: Vec<String> = (0..10).map(|index| format!("KEY_{index}")).collect();
        let policy = json!({
            "vendorKeys": keys,
            "catalogue": {"credential": "ignore", "endpoint": "ignore", "route": "ignore", "header": "ignore", "config": "ignore"},
            "proxy": {"baseUrl": "u", "usageToken": {"value": "t"}},
        });
        let policy = Policy::parse(&policy.to_string()).unwrap();
        let operations = |env: Value| {
            let container = json!({"env": env, "envFrom": [{"secretRef": {"name": "s"}}]});
            let mut pod = json!({"metadata": {}, "spec": {"containers": [container]}});
            let text = pod.to_string();
            let decoded = serde_json::from_str(&text).unwrap();
            let managed = Resolution::chosen(BillingMode::PlatformManaged);
            let plan = plan(&policy, Workspace::default(), managed, &decoded, Scope::Pod).unwrap();
            let patch = super::patch(&plan, "").json;
            let patch: json_patch::Patch = serde_json::from_str(&patch).unwrap();
            json_patch::patch(&mut pod, &patch).unwrap();
            let container = &pod["spec"]["containers"][0];
            assert_eq!(container.as_object().unwrap().len(), 2, "{container}");
            let env = container["env"].as_array().unwrap();
            let names: Vec<String> = env
                .iter()
                .map(|entry| entry["name"].as_str().unwrap().to_owned())
                .collect();
            (
                patch
                    .0
                    .iter()
                    .map(|operation| operation.to_string())
                    .collect::<Vec<_>>(),
                names,
            )
        };
        let entry = |name: &str| json!({"name": name, "value": "x"});
        let (patch, names) =
            operations(json!([entry("KEY_1"), entry("A"), entry("KEY_2"), entry("B")]));
        let added = patch.get(1).unwrap();
        assert!(added.starts_with(r#"{"op":"add","path":"/spec/containers/0/env","value":[{"name":"MOLECULE_LLM_BILLING_MODE""#), "{added}");
        let moves = [&patch[..1], &patch[2..5]].concat();
        assert_eq!(
            moves,
            [
                r#"{"op":"move","from":"/spec/containers/0/env","path":"/spec/containers/0/envOld"}"#,
                r#"{"op":"move","from":"/spec/containers/0/envOld/1","path":"/spec/containers/0/env/-"}"#,
                r#"{"op":"move","from":"/spec/containers/0/envOld/2","path":"/spec/containers/0/env/-"}"#,
                r#"{"op":"remove","path":"/spec/containers/0/envOld"}"#,
            ]
        );
        assert_eq!((patch.len(), names.len()), (6, 18));
        assert_eq!(names[16..], ["A", "B"]);
        // 16 variables are added: with 5 or more remaining entries, each is added by itself.
        let others = |count: usize| {
            (0..count)
                .map(|index| entry(&format!("O{index}")))
                .collect()
        };
        assert_eq!(operations(others(4)).0.len(), 4 + MOVE_OPERATIONS + 1);
        assert_eq!(operations(others(5)).0.len(), 16 + 1);
    }

    #[test]
    fn absent_or_wrong_annotations_are_added() {
        let annotations = json!({
            "molecule.ai/llm-billing-mode": "byok",
            "molecule.ai/llm-billing-source": "workspace_override",
        });
        let all = |path: &str, value: Value| json!([{"op": "add", "path": path, "value": value}]);
        let one = |key: &str, value: &str| json!({"op": "add", "path": format!("/metadata/annotations/molecule.ai~1llm-billing-{key}"), "value": value});
        let table = [
            (json!({}), all("/metadata", json!({"annotations": annotations}))),
            (json!({"metadata": null}), all("/metadata", json!({"annotations": annotations}))),
            (json!({"metadata": {}}), all("/metadata/annotations", annotations.clone())),
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
        assert_eq!(escape_token("a/b~c/~1"), "a~1b~0c~1~01");
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
