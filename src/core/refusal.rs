//! The reasons to refuse a pod. Every message starts with a stable code and ends with the remedy; none contains the
//! value of an env entry. Errors about bodies that are not admission reviews are in admission.rs.

use thiserror::Error;

/// A refusal of one pod; its message is for the person who created the pod.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The mode needs a proxy, and the policy's proxy is absent or incomplete.
    #[error(
        "MISSING_PLATFORM_PROXY: the workspace is platform_managed and no LLM proxy is configured; \
         set proxy.baseUrl and proxy.usageToken in the webhook's policy, or the workspace's mode to byok or disabled"
    )]
    MissingPlatformProxy,
    /// An envFrom source could set removed variables and the policy says `envFrom: deny`.
    #[error(
        "ENV_FROM_VENDOR_KEY: envFrom of container {container:?} can set {keys}, which platform_managed removes; \
         list the variables that you need under env, or give the source a prefix that none of these names starts with"
    )]
    EnvFromVendorKey {
        /// The container's name.
        container: String,
        /// The removed variables' names; shortened if there are many.
        keys: String,
    },
    /// A reference of the proxy's settings has placeholders, and the pod's workspace id or namespace makes it invalid.
    #[error(
        "INVALID_REFERENCE: the Secret or ConfigMap that the webhook's policy names for {variable} has no valid name for \
         this pod's workspace id, namespace and row; correct the pod's label, the row, or the reference in the policy's proxy"
    )]
    InvalidReference {
        /// The name of the variable that the policy sets.
        variable: String,
    },
    /// A proxy setting has the placeholder of a column that is NULL or blank, or of a workspace without a row.
    #[error(
        "MISSING_COLUMN: {variable} needs the column {column:?} of the workspace's row, and it is NULL or blank, or the \
         workspace has no row; set it in the platform's database, or change the proxy in the webhook's policy"
    )]
    MissingColumn {
        /// The name of the variable that the policy sets.
        variable: String,
        /// The column's name.
        column: String,
    },
    /// The pod has no workspace label and the policy says `unlabelled: deny`.
    #[error(
        "MISSING_WORKSPACE_LABEL: the pod has no label {label:?}; set it to the workspace's id"
    )]
    MissingWorkspaceLabel {
        /// The label's key, from the policy.
        label: String,
    },
    /// The lookup failed, and the policy says `lookup.onError: deny` or the validating webhook needs the mode.
    #[error(
        "LOOKUP_FAILED: the workspace's billing mode could not be looked up; try again; if it keeps failing, contact the platform's operators"
    )]
    LookupFailed,
    /// The validating webhook found an env that does not match the billing mode.
    #[error(
        "ENV_NOT_SETTLED: {findings}; another mutating webhook probably changes these variables after the \
         llm-billing-webhook; stop it from doing so, then create the pod again"
    )]
    NotSettled {
        /// The names of containers and variables.
        findings: String,
    },
    /// The request's operation needs an object and has none.
    #[error("NO_OBJECT: the admission request has no object; send the pod in request.object")]
    NoObject,
    /// A part of the request has the wrong shape.
    #[error(
        "UNREADABLE_REQUEST: {place} is missing or has the wrong type; correct it and send the pod again"
    )]
    Unreadable {
        /// The part's path, such as `object.spec.containers[0].env[2].value`.
        place: String,
    },
}

impl Refusal {
    /// Returns the stable code at the start of the message.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::MissingPlatformProxy => "MISSING_PLATFORM_PROXY",
            Self::EnvFromVendorKey { .. } => "ENV_FROM_VENDOR_KEY",
            Self::InvalidReference { .. } => "INVALID_REFERENCE",
            Self::MissingColumn { .. } => "MISSING_COLUMN",
            Self::MissingWorkspaceLabel { .. } => "MISSING_WORKSPACE_LABEL",
            Self::LookupFailed => "LOOKUP_FAILED",
            Self::NotSettled { .. } => "ENV_NOT_SETTLED",
            Self::NoObject => "NO_OBJECT",
            Self::Unreadable { .. } => "UNREADABLE_REQUEST",
        }
    }

    /// Returns the HTTP status that the API server passes on to the user, and Kubernetes' name of it.
    #[must_use]
    pub const fn status(&self) -> (u16, &'static str) {
        match self {
            Self::MissingPlatformProxy
            | Self::EnvFromVendorKey { .. }
            | Self::InvalidReference { .. }
            | Self::MissingColumn { .. }
            | Self::MissingWorkspaceLabel { .. }
            | Self::NotSettled { .. } => (403, "Forbidden"),
            Self::LookupFailed => (503, "ServiceUnavailable"),
            Self::NoObject | Self::Unreadable { .. } => (400, "BadRequest"),
        }
    }
}
