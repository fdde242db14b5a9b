//! Finds the workspace that a pod belongs to, and the parameters of its lookup. The lookup is executed in database/;
//! its outcome is interpreted in resolution.rs.

use uuid::Uuid;

use super::pod::Pod;
use super::policy::Policy;
use super::policy_file::{Parameter, ParameterType, Unlabelled};
use super::refusal::Refusal;
use super::resolution::Reason;

/// The workspace that a pod belongs to. `workspace` is the value of the pod's workspace label; empty if the label is
/// empty or absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity<'p> {
    /// The pod belongs to no workspace.
    NotAWorkspace,
    /// No lookup is possible.
    Fallback {
        /// The workspace id.
        workspace: &'p str,
        /// Why no lookup is possible.
        reason: Reason,
    },
    /// The policy's query returns the mode for these parameters.
    Lookup {
        /// The workspace id.
        workspace: &'p str,
        /// In the policy's order.
        parameters: Vec<ParameterValue>,
    },
}

/// One parameter of the policy's query.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParameterValue {
    /// A label's value, parsed as a UUID.
    Uuid(Uuid),
    /// A label's value, or the namespace.
    Text(String),
}

/// Returns the identity of a pod in `namespace`.
///
/// # Errors
/// [`Refusal::MissingWorkspaceLabel`] if the pod lacks the label and the policy says `unlabelled: deny`.
pub fn identify<'p>(
    policy: &Policy,
    pod: &'p Pod<'_>,
    namespace: &str,
) -> Result<Identity<'p>, Refusal> {
    let label = pod.label(policy.workspace_label.as_str());
    let workspace = label.unwrap_or_default();
    let fallback = |reason| Ok(Identity::Fallback { workspace, reason });
    match label {
        Some("") => return fallback(Reason::MissingWorkspaceId),
        Some(_) => {}
        None => {
            return match policy.unlabelled {
                Unlabelled::Ignore => Ok(Identity::NotAWorkspace),
                Unlabelled::PlatformManaged => fallback(Reason::MissingWorkspaceId),
                Unlabelled::Deny => Err(Refusal::MissingWorkspaceLabel {
                    label: policy.workspace_label.as_str().to_owned(),
                }),
            };
        }
    }
    let mut values = Vec::new();
    for parameter in &policy.lookup.parameters {
        let value = match parameter {
            Parameter::Namespace => ParameterValue::Text(namespace.to_owned()),
            Parameter::Label { label, kind } => {
                let text = pod.label(label.as_str()).unwrap_or_default();
                match (kind, Uuid::try_parse(text)) {
                    _ if text.is_empty() => return fallback(Reason::MissingWorkspaceId),
                    (ParameterType::Text, _) => ParameterValue::Text(text.to_owned()),
                    (ParameterType::Uuid, Ok(uuid)) => ParameterValue::Uuid(uuid),
                    (ParameterType::Uuid, Err(_)) => {
                        return fallback(Reason::InvalidWorkspaceId);
                    }
                }
            }
        };
        values.push(value);
    }
    Ok(Identity::Lookup {
        workspace,
        parameters: values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "88888888-8888-8888-8888-888888888888";

    fn assert_identity(policy: &str, labels: &str, expected: Result<Identity<'_>, Refusal>) {
        let pod = format!(r#"{{"metadata":{{"labels":{labels}}}}}"#);
        let pod = serde_json::from_str(&pod).unwrap();
        let identity = identify(&Policy::parse(policy).unwrap(), &pod, "ws-acme");
        assert_eq!(identity, expected, "{policy} {labels}");
    }

    fn fallback(workspace: &str, reason: Reason) -> Result<Identity<'_>, Refusal> {
        Ok(Identity::Fallback { workspace, reason })
    }

    fn uuid() -> ParameterValue {
        ParameterValue::Uuid(Uuid::parse_str(ID).unwrap())
    }

    #[test]
    fn identity_follows_the_workspace_label() {
        let spaced = format!(" {ID}");
        let parameters = vec![uuid()];
        let table = [
            ("{}".to_owned(), Ok(Identity::NotAWorkspace)),
            ("null".to_owned(), Ok(Identity::NotAWorkspace)),
            (label("\"\""), fallback("", Reason::MissingWorkspaceId)),
            (label("null"), fallback("", Reason::MissingWorkspaceId)),
            (label("\"not-a-uuid\""), fallback("not-a-uuid", Reason::InvalidWorkspaceId)),
            (label(&format!("{spaced:?}")), fallback(&spaced, Reason::InvalidWorkspaceId)),
            (
                label(&format!("{ID:?}")),
                Ok(Identity::Lookup {
                    workspace: ID,
                    parameters,
                }),
            ),
        ];
        for (labels, expected) in table {
            assert_identity("", &labels, expected);
        }
    }

    fn label(value: &str) -> String {
        format!(r#"{{"molecule.ai/workspace-id":{value}}}"#)
    }

    #[test]
    fn pod_without_label_follows_the_policy() {
        let missing = || fallback("", Reason::MissingWorkspaceId);
        assert_identity("unlabelled: platform_managed", "{}", missing());
        let refusal = Refusal::MissingWorkspaceLabel {
            label: "a/b".to_owned(),
        };
        let deny = "{unlabelled: deny, workspaceLabel: a/b}";
        assert_identity(deny, "{}", Err(refusal));
        // An empty label is not an absent label.
        assert_identity("unlabelled: deny", &label("\"\""), missing());
    }

    #[test]
    fn parameters_keep_the_order_of_the_policy() {
        let policy = "
            workspaceLabel: ws
            lookup:
              parameters:
              - {field: namespace}
              - {label: tenant, type: text}
              - {label: ws, type: uuid}";
        let labels = format!(r#"{{"ws":"{ID}","tenant":"acme"}}"#);
        let parameters = vec![
            ParameterValue::Text("ws-acme".to_owned()),
            ParameterValue::Text("acme".to_owned()),
            uuid(),
        ];
        let expected = Identity::Lookup {
            workspace: ID,
            parameters,
        };
        assert_identity(policy, &labels, Ok(expected));
        // The pod lacks a second label that the query needs.
        let incomplete = fallback(ID, Reason::MissingWorkspaceId);
        assert_identity(policy, &format!(r#"{{"ws":"{ID}"}}"#), incomplete);
    }
}
