//! The policy that decisions use, compiled once at startup from the policy file. policy_file.rs has the file's fields,
//! defaults and errors.
//!
//! No `Debug`: the proxy may hold a token.

use super::policy_file::{
    ChangedEntriesRule, EnvFromRule, Lookup, Name, PolicyError, PolicyFile, Unlabelled,
};
use super::proxy::Proxy;
use super::restrictions::Restrictions;
use super::variables::WorkspaceVariables;

/// The compiled policy. Each field means what the field of the same name in [`PolicyFile`] means, unless it says
/// otherwise.
#[derive(Clone)]
pub struct Policy {
    /// The label that holds a pod's workspace id.
    pub workspace_label: Name,
    /// The label that holds a pod's runtime.
    pub runtime_label: Name,
    /// What happens to a pod without the workspace label.
    pub unlabelled: Unlabelled,
    /// How a workspace's mode is looked up.
    pub lookup: Lookup,
    /// The names of the columns in the templates of `variables` and `proxy`, sorted.
    pub columns: Vec<String>,
    /// The variables that every container of a workspace gets.
    pub variables: WorkspaceVariables,
    /// The variables that are removed on platform_managed, or get a warning: `vendorKeys`, `catalogue` and `allow`.
    pub restrictions: Restrictions,
    /// What happens to removed variables that an envFrom source could set.
    pub env_from: EnvFromRule,
    /// What happens when a container's own entries are removed or replaced.
    pub changed_entries: ChangedEntriesRule,
    /// The proxy with its rendered variables; `None` if the file has none.
    pub proxy: Option<Proxy>,
}

impl Policy {
    /// Reads and compiles the text of a policy file.
    ///
    /// # Errors
    /// See [`PolicyFile::parse`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        PolicyFile::parse(text).map(Self::from)
    }
}

impl From<PolicyFile> for Policy {
    fn from(file: PolicyFile) -> Self {
        Self {
            columns: file.columns(),
            variables: WorkspaceVariables::new(&file.variables),
            restrictions: Restrictions::new(&file),
            workspace_label: file.workspace_label,
            runtime_label: file.runtime_label,
            unlabelled: file.unlabelled,
            lookup: file.lookup,
            env_from: file.env_from,
            changed_entries: file.changed_entries,
            proxy: file.proxy.map(Proxy::from),
        }
    }
}
