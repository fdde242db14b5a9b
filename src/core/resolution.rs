//! Billing modes and the contract's resolution table: lookup outcome → mode, source and reason.
//! Which workspace is looked up is identity.rs's business, and what a mode does to a pod is plan.rs's.

use std::fmt;

use serde::Serialize;

/// The variable that says which mode a container runs under.
pub const MODE_VARIABLE: &str = "MOLECULE_LLM_BILLING_MODE";
/// Its twin, for readers that tell the wished mode from the resolved one.
pub const RESOLVED_VARIABLE: &str = "MOLECULE_LLM_BILLING_MODE_RESOLVED";

/// Who pays for a workspace's LLM calls. The contract knows these three modes and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BillingMode {
    /// Calls go through the platform's metered proxy; vendor keys go.
    PlatformManaged,
    /// The workspace pays its vendor with its own keys, which stay.
    Byok,
    /// The platform pays for no LLM here; nothing but the mode is set.
    Disabled,
}

impl BillingMode {
    /// Every mode, in the contract's order.
    pub const ALL: [Self; 3] = [Self::PlatformManaged, Self::Byok, Self::Disabled];

    /// The mode that a stored value names. Exact match only: another case, a space or a hyphen is unknown.
    #[must_use]
    pub fn from_column(stored: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == stored)
    }

    /// The mode as it is stored in the database and written into env.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PlatformManaged => "platform_managed",
            Self::Byok => "byok",
            Self::Disabled => "disabled",
        }
    }
}

impl fmt::Display for BillingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the database returned for a workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupOutcome {
    /// The workspace has a row; `None` is NULL, which means that nobody chose a mode.
    Row(Option<String>),
    /// No row has this workspace.
    NoRow,
    /// The database did not answer, or not in time.
    Failed,
}

/// Where a mode comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The workspace's row names one of the three modes.
    WorkspaceOverride,
    /// Anything else: `platform_managed`.
    ConstantFallback,
}

impl Source {
    /// The source as annotations, logs and metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WorkspaceOverride => "workspace_override",
            Self::ConstantFallback => "constant_fallback",
        }
    }
}

/// Which row of the contract's resolution table applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The row names one of the three modes.
    Override,
    /// The row's mode is NULL.
    NoOverride,
    /// There is no row.
    WorkspaceNotFound,
    /// The row's mode is some other string.
    UnknownMode,
    /// The workspace id is no UUID, so no lookup was made.
    InvalidWorkspaceId,
    /// The workspace id is empty or absent, so no lookup was made.
    MissingWorkspaceId,
    /// The database failed.
    LookupError,
}

impl Reason {
    /// The reason as audit annotations, logs and metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Override => "override",
            Self::NoOverride => "no_override",
            Self::WorkspaceNotFound => "workspace_not_found",
            Self::UnknownMode => "unknown_mode",
            Self::InvalidWorkspaceId => "invalid_workspace_id",
            Self::MissingWorkspaceId => "missing_workspace_id",
            Self::LookupError => "lookup_error",
        }
    }
}

/// The resolver's answer for one workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Resolution {
    /// The mode that the env must say.
    pub mode: BillingMode,
    /// Where the mode comes from.
    pub source: Source,
    /// Which rule gave it.
    pub reason: Reason,
}

impl Resolution {
    /// A mode that somebody chose for the workspace.
    #[must_use]
    pub const fn chosen(mode: BillingMode) -> Self {
        Self {
            mode,
            source: Source::WorkspaceOverride,
            reason: Reason::Override,
        }
    }

    /// The constant fallback: no failure ever moves a workspace off `platform_managed`.
    #[must_use]
    pub const fn fallback(reason: Reason) -> Self {
        Self {
            mode: BillingMode::PlatformManaged,
            source: Source::ConstantFallback,
            reason,
        }
    }

    /// Returns the row of the contract's resolution table for a lookup's outcome.
    #[must_use]
    pub fn from_lookup(outcome: &LookupOutcome) -> Self {
        match outcome {
            LookupOutcome::Row(Some(mode)) => BillingMode::from_column(mode)
                .map_or(Self::fallback(Reason::UnknownMode), Self::chosen),
            LookupOutcome::Row(None) => Self::fallback(Reason::NoOverride),
            LookupOutcome::NoRow => Self::fallback(Reason::WorkspaceNotFound),
            LookupOutcome::Failed => Self::fallback(Reason::LookupError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_value_resolves_as_the_table_says() {
        let row = |mode: &str| LookupOutcome::Row(Some(mode.to_owned()));
        let table = [
            (
                row("platform_managed"),
                "platform_managed",
                "workspace_override",
                "override",
            ),
            (row("byok"), "byok", "workspace_override", "override"),
            (
                row("disabled"),
                "disabled",
                "workspace_override",
                "override",
            ),
            (
                row(""),
                "platform_managed",
                "constant_fallback",
                "unknown_mode",
            ),
            (
                row("BYOK"),
                "platform_managed",
                "constant_fallback",
                "unknown_mode",
            ),
            (
                row(" byok"),
                "platform_managed",
                "constant_fallback",
                "unknown_mode",
            ),
            (
                row("byok\n"),
                "platform_managed",
                "constant_fallback",
                "unknown_mode",
            ),
            (
                row("platform-managed"),
                "platform_managed",
                "constant_fallback",
                "unknown_mode",
            ),
            (
                LookupOutcome::Row(None),
                "platform_managed",
                "constant_fallback",
                "no_override",
            ),
            (
                LookupOutcome::NoRow,
                "platform_managed",
                "constant_fallback",
                "workspace_not_found",
            ),
            (
                LookupOutcome::Failed,
                "platform_managed",
                "constant_fallback",
                "lookup_error",
            ),
        ];
        for (stored, mode, source, reason) in table {
            let resolution = Resolution::from_lookup(&stored);
            assert_eq!(
                (
                    resolution.mode.as_str(),
                    resolution.source.as_str(),
                    resolution.reason.as_str()
                ),
                (mode, source, reason),
                "{stored:?}"
            );
        }
    }

    #[test]
    fn every_name_is_spelt_alike_in_text_and_in_json() {
        let json = |value: serde_json::Value| value.as_str().unwrap().to_owned();
        for mode in BillingMode::ALL {
            assert_eq!(json(serde_json::to_value(mode).unwrap()), mode.as_str());
            assert_eq!(mode.to_string(), mode.as_str());
        }
        for source in [Source::WorkspaceOverride, Source::ConstantFallback] {
            assert_eq!(json(serde_json::to_value(source).unwrap()), source.as_str());
        }
        for reason in [
            Reason::Override,
            Reason::NoOverride,
            Reason::WorkspaceNotFound,
            Reason::UnknownMode,
            Reason::InvalidWorkspaceId,
            Reason::MissingWorkspaceId,
            Reason::LookupError,
        ] {
            assert_eq!(json(serde_json::to_value(reason).unwrap()), reason.as_str());
        }
    }
}
