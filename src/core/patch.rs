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
        remove[replaced..]
            .iter()
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
        _ if plan.annotations.is_empty() => {}
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
