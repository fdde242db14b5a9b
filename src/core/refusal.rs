//! Why a pod is refused. Every message starts with a stable code and ends with the remedy; none carries
//! a value of an env entry. Bodies that are no admission review at all are admission.rs's business.

use thiserror::Error;

/// A refusal of one pod, as the person who created it reads it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The mode needs a proxy and the policy has none that is complete.
    #[error(
        "MISSING_PLATFORM_PROXY: the workspace is platform_managed and no LLM proxy is configured; \
         set proxy.baseUrl and proxy.usageToken in the webhook's policy, or the workspace's mode to byok or disabled"
    )]
    MissingPlatformProxy,
    /// An envFrom source could bring vendor keys and the policy says `envFrom: deny`.
    #[error(
        "ENV_FROM_VENDOR_KEY: envFrom of container {container:?} can bring {keys} to a platform_managed workspace; \
         name the variables that you need under env, or give the source a prefix that no vendor key starts with"
    )]
    EnvFromVendorKey {
        /// The container's name.
        container: String,
        /// What could come, by name; shortened where there are many.
        keys: String,
    },
    /// The pod has no workspace label and the policy says `unlabelled: deny`.
    #[error(
        "MISSING_WORKSPACE_LABEL: the pod has no label {label:?}; set it to the workspace's id"
    )]
    MissingWorkspaceLabel {
        /// The label's key, from the policy.
        label: String,
    },
    /// The database failed, and the policy says `lookup.onError: deny`, or the guard cannot tell whether a pod is settled.
    #[error(
        "LOOKUP_FAILED: the workspace's billing mode could not be looked up; try again, and if it stays, ask the platform's operators"
    )]
    LookupFailed,
    /// The guard saw a pod whose env is not what the webhook would make it.
    #[error(
        "ENV_NOT_SETTLED: {findings}; remove what adds or changes these variables after the llm-billing-webhook \
         (another mutating webhook, perhaps), then create the pod again"
    )]
    NotSettled {
        /// Containers and variables by name.
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
        /// Path of the part, such as `object.spec.containers[0].env[2].value`.
        place: String,
    },
}

impl Refusal {
    /// The stable code with which the message starts.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::MissingPlatformProxy => "MISSING_PLATFORM_PROXY",
            Self::EnvFromVendorKey { .. } => "ENV_FROM_VENDOR_KEY",
            Self::MissingWorkspaceLabel { .. } => "MISSING_WORKSPACE_LABEL",
            Self::LookupFailed => "LOOKUP_FAILED",
            Self::NotSettled { .. } => "ENV_NOT_SETTLED",
            Self::NoObject => "NO_OBJECT",
            Self::Unreadable { .. } => "UNREADABLE_REQUEST",
        }
    }

    /// The HTTP status that the API server hands on in its answer to the user.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::MissingPlatformProxy
            | Self::EnvFromVendorKey { .. }
            | Self::MissingWorkspaceLabel { .. }
            | Self::NotSettled { .. } => 403,
            Self::LookupFailed => 503,
            Self::NoObject | Self::Unreadable { .. } => 400,
        }
    }

    /// The Kubernetes name of [`Self::status`].
    #[must_use]
    pub(super) const fn status_reason(&self) -> &'static str {
        match self.status() {
            400 => "BadRequest",
            503 => "ServiceUnavailable",
            _ => "Forbidden",
        }
    }
}
