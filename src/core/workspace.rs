//! Which workspace a pod belongs to, and what must be looked up for it. The lookup itself is an edge's
//! business (database/); what the answer means is mode.rs's.

use uuid::Uuid;

use super::mode::{Reason, Resolution};
use super::pod::Pod;
use super::policy::{Parameter, ParameterType, Policy, Unlabelled};
use super::refusal::Refusal;

/// How a pod's mode is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// It is no workspace pod, and stays as it is.
    NotAWorkspace,
    /// No lookup is needed, or possible.
    Resolved(Resolution),
    /// The policy's query, run with these parameters, tells.
    LookUp(Vec<ParameterValue>),
}

/// One parameter of the policy's query.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParameterValue {
    /// A label's value that is a UUID.
    Uuid(Uuid),
    /// A label's value, or the namespace.
    Text(String),
}

/// The workspace id that a pod claims: the label's value, empty where the label is absent or empty.
#[must_use]
pub fn workspace_id<'p>(policy: &Policy, pod: &'p Pod<'_>) -> &'p str {
    pod.label(policy.workspace_label.as_str())
        .unwrap_or_default()
}

/// Says how the mode of a pod in `namespace` is to be found.
///
/// # Errors
/// [`Refusal::MissingWorkspaceLabel`] if the pod lacks the label and the policy denies that.
pub fn identify(policy: &Policy, pod: &Pod<'_>, namespace: &str) -> Result<Identity, Refusal> {
    let missing = || Identity::Resolved(Resolution::fallback(Reason::MissingWorkspaceId));
    match pod.label(policy.workspace_label.as_str()) {
        Some("") => return Ok(missing()),
        Some(_) => {}
        None => {
            return match policy.unlabelled {
                Unlabelled::Ignore => Ok(Identity::NotAWorkspace),
                Unlabelled::PlatformManaged => Ok(missing()),
                Unlabelled::Deny => Err(Refusal::MissingWorkspaceLabel {
                    label: policy.workspace_label.as_str().to_owned(),
                }),
            };
        }
    }
    let mut values = Vec::with_capacity(policy.lookup.parameters.len());
    for parameter in &policy.lookup.parameters {
        let value = match parameter {
            Parameter::Namespace => ParameterValue::Text(namespace.to_owned()),
            Parameter::Label { label, kind } => {
                let text = pod.label(label.as_str()).unwrap_or_default();
                match (kind, Uuid::try_parse(text)) {
                    _ if text.is_empty() => return Ok(missing()),
                    (ParameterType::Text, _) => ParameterValue::Text(text.to_owned()),
                    (ParameterType::Uuid, Ok(uuid)) => ParameterValue::Uuid(uuid),
                    (ParameterType::Uuid, Err(_)) => {
                        return Ok(Identity::Resolved(Resolution::fallback(
                            Reason::InvalidWorkspaceId,
                        )));
                    }
                }
            }
        };
        values.push(value);
    }
    Ok(Identity::LookUp(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "88888888-8888-8888-8888-888888888888";

    fn identify_labels(policy: &str, labels: &str) -> Result<Identity, Refusal> {
        let pod = format!(r#"{{"metadata":{{"labels":{labels}}}}}"#);
        identify(
            &Policy::parse(policy).unwrap(),
            &serde_json::from_str(&pod).unwrap(),
            "ws-acme",
        )
    }

    #[test]
    fn the_label_says_whether_and_what_to_look_up() {
        let fallback = |reason| Identity::Resolved(Resolution::fallback(reason));
        let table = [
            ("{}", Identity::NotAWorkspace),
            ("null", Identity::NotAWorkspace),
            (
                r#"{"molecule.ai/workspace-id":""}"#,
                fallback(Reason::MissingWorkspaceId),
            ),
            (
                r#"{"molecule.ai/workspace-id":null}"#,
                fallback(Reason::MissingWorkspaceId),
            ),
            (
                r#"{"molecule.ai/workspace-id":"not-a-uuid"}"#,
                fallback(Reason::InvalidWorkspaceId),
            ),
            (
                r#"{"molecule.ai/workspace-id":" 88888888-8888-8888-8888-888888888888"}"#,
                fallback(Reason::InvalidWorkspaceId),
            ),
            (
                r#"{"molecule.ai/workspace-id":"88888888-8888-8888-8888-888888888888"}"#,
                Identity::LookUp(vec![ParameterValue::Uuid(Uuid::parse_str(ID).unwrap())]),
            ),
        ];
        for (labels, expected) in table {
            assert_eq!(identify_labels("", labels), Ok(expected), "{labels}");
        }
    }

    #[test]
    fn a_pod_without_the_label_gets_what_the_policy_says() {
        let fallback = Identity::Resolved(Resolution::fallback(Reason::MissingWorkspaceId));
        assert_eq!(
            identify_labels("unlabelled: platform_managed", "{}"),
            Ok(fallback)
        );
        assert_eq!(
            identify_labels("{unlabelled: deny, workspaceLabel: a/b}", "{}"),
            Err(Refusal::MissingWorkspaceLabel {
                label: "a/b".to_owned()
            })
        );
        // An empty label is no absent label.
        assert!(identify_labels("unlabelled: deny", r#"{"molecule.ai/workspace-id":""}"#).is_ok());
    }

    #[test]
    fn parameters_are_bound_in_the_order_of_the_policy() {
        let policy = "
            workspaceLabel: ws
            lookup:
              parameters:
              - {field: namespace}
              - {label: tenant, type: text}
              - {label: ws, type: uuid}";
        let labels = format!(r#"{{"ws":"{ID}","tenant":"acme"}}"#);
        let expected = vec![
            ParameterValue::Text("ws-acme".to_owned()),
            ParameterValue::Text("acme".to_owned()),
            ParameterValue::Uuid(Uuid::parse_str(ID).unwrap()),
        ];
        assert_eq!(
            identify_labels(policy, &labels),
            Ok(Identity::LookUp(expected))
        );
        // A second label that the key needs and the pod lacks: the id is incomplete.
        assert_eq!(
            identify_labels(policy, &format!(r#"{{"ws":"{ID}"}}"#)),
            Ok(Identity::Resolved(Resolution::fallback(
                Reason::MissingWorkspaceId
            )))
        );
    }
}
