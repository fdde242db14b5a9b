//! Billing modes and the contract's resolution table: lookup outcome → mode, source and reason. The workspace is
//! identified in identity.rs; a mode is applied to a pod in plan.rs.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The variable that holds a container's billing mode.
pub const MODE_VARIABLE: &str = "MOLECULE_LLM_BILLING_MODE";
/// Holds the same value, for programs that distinguish the requested mode from the resolved one.
pub const RESOLVED_VARIABLE: &str = "MOLECULE_LLM_BILLING_MODE_RESOLVED";

/// Who pays for a workspace's LLM calls. The contract has only these three modes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum BillingMode {
    /// Calls go through the platform's metered proxy; vendor keys and the catalogue's variables are removed.
    PlatformManaged,
    /// The workspace pays its vendor; its keys are not removed.
    Byok,
    /// The platform pays for no LLM; only the mode is set.
    Disabled,
}

impl BillingMode {
    /// Every mode, in the contract's order.
    pub const ALL: [Self; 3] = [Self::PlatformManaged, Self::Byok, Self::Disabled];

    /// Returns the mode with exactly this name; another case, a space or a hyphen makes it unknown.
    #[must_use]
    pub fn from_column(stored: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == stored)
    }

    /// Returns the name in the database and in env.
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
    /// The workspace's row.
    Row(Row),
    /// The workspace has no row.
    NoRow,
    /// The lookup failed or timed out.
    Failed,
}

/// A workspace's row.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// The first column; `None` is NULL: no mode was chosen.
    pub mode: Option<String>,
    /// The columns that the policy names, in the order of its `columns`; `None` is NULL.
    pub columns: Vec<Option<String>>,
}

impl fmt::Debug for Row {
    /// Shows no column's value: it becomes the value of an env entry.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row({:?}, {} columns)", self.mode, self.columns.len())
    }
}

impl LookupOutcome {
    /// Returns the outcome for a row of a mode alone; `None` is NULL.
    #[must_use]
    pub fn of_mode(mode: Option<&str>) -> Self {
        Self::Row(Row {
            mode: mode.map(str::to_owned),
            columns: Vec::new(),
        })
    }

    /// Returns the columns of the row; none if there is no row.
    #[must_use]
    pub fn columns(&self) -> &[Option<String>] {
        match self {
            Self::Row(row) => &row.columns,
            Self::NoRow | Self::Failed => &[],
        }
    }
}

/// Where a mode comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The workspace's row names one of the three modes.
    WorkspaceOverride,
    /// No row names a mode: `platform_managed`.
    ConstantFallback,
}

impl Source {
    /// Returns the name in annotations, logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WorkspaceOverride => "workspace_override",
            Self::ConstantFallback => "constant_fallback",
        }
    }
}

/// The row of the contract's resolution table that applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The row names one of the three modes.
    Override,
    /// The row's mode is NULL.
    NoOverride,
    /// The workspace has no row.
    WorkspaceNotFound,
    /// The row's mode is another string.
    UnknownMode,
    /// The workspace id, or another UUID parameter, is not a UUID (no lookup).
    InvalidWorkspaceId,
    /// The workspace id, or another label parameter, is empty or absent (no lookup).
    MissingWorkspaceId,
    /// The database lookup failed.
    LookupError,
    /// The row names another mode, but the running pod that gets a container was created as platform_managed.
    CreatedAs,
}

impl Reason {
    /// Returns the name in audit annotations, logs and metrics.
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
            Self::CreatedAs => "created_as",
        }
    }
}

/// The mode of one workspace, with its source and reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Resolution {
    /// The mode that the env must match.
    pub mode: BillingMode,
    /// Where the mode comes from.
    pub source: Source,
    /// The rule that gave the mode.
    pub reason: Reason,
}

impl Resolution {
    /// Returns the resolution for a mode that the workspace's row names.
    #[must_use]
    pub const fn chosen(mode: BillingMode) -> Self {
        Self {
            mode,
            source: Source::WorkspaceOverride,
            reason: Reason::Override,
        }
    }

    /// Returns the fallback: if the mode cannot be resolved, the pod gets `platform_managed`.
    #[must_use]
    pub const fn fallback(reason: Reason) -> Self {
        Self {
            mode: BillingMode::PlatformManaged,
            source: Source::ConstantFallback,
            reason,
        }
    }

    /// Returns the resolution for a new container of a pod that was created as platform_managed. Its label, and the
    /// workspace's mode, may have changed since; its env cannot.
    #[must_use]
    pub const fn of_platform_managed_pod(self) -> Self {
        match self.mode {
            BillingMode::PlatformManaged => self,
            BillingMode::Byok | BillingMode::Disabled => Self {
                mode: BillingMode::PlatformManaged,
                source: self.source,
                reason: Reason::CreatedAs,
            },
        }
    }

    /// Returns the row of the contract's resolution table for a lookup's outcome.
    #[must_use]
    pub fn from_lookup(outcome: &LookupOutcome) -> Self {
        match outcome {
            LookupOutcome::Row(row) => match &row.mode {
                Some(mode) => BillingMode::from_column(mode)
                    .map_or(Self::fallback(Reason::UnknownMode), Self::chosen),
                None => Self::fallback(Reason::NoOverride),
            },
            LookupOutcome::NoRow => Self::fallback(Reason::WorkspaceNotFound),
            LookupOutcome::Failed => Self::fallback(Reason::LookupError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_outcome_resolves_as_the_contract_says() {
        let row = |mode: &str| LookupOutcome::of_mode(Some(mode));
        let table = [
            (row("platform_managed"), "platform_managed", "workspace_override", "override"),
            (row("byok"), "byok", "workspace_override", "override"),
            (row("disabled"), "disabled", "workspace_override", "override"),
            (row(""), "platform_managed", "constant_fallback", "unknown_mode"),
            (row("BYOK"), "platform_managed", "constant_fallback", "unknown_mode"),
            (row(" byok"), "platform_managed", "constant_fallback", "unknown_mode"),
            (row("byok\n"), "platform_managed", "constant_fallback", "unknown_mode"),
            (row("platform-managed"), "platform_managed", "constant_fallback", "unknown_mode"),
            (LookupOutcome::of_mode(None), "platform_managed", "constant_fallback", "no_override"),
            (LookupOutcome::NoRow, "platform_managed", "constant_fallback", "workspace_not_found"),
            (LookupOutcome::Failed, "platform_managed", "constant_fallback", "lookup_error"),
        ];
        for (stored, mode, source, reason) in table {
            let resolution = Resolution::from_lookup(&stored);
            assert_eq!(
                (resolution.mode.as_str(), resolution.source.as_str(), resolution.reason.as_str()),
                (mode, source, reason),
                "{stored:?}"
            );
        }
    }

    #[test]
    fn names_are_the_same_in_text_and_json() {
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
            Reason::CreatedAs,
        ] {
            assert_eq!(json(serde_json::to_value(reason).unwrap()), reason.as_str());
        }
    }
}
