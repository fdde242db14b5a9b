//! The vendor keys of a compiled policy: a set of names, each with the mask that hides it. Which names they are is
//! policy_file.rs's business, and in which mode and container they count is plan.rs's.

use std::collections::BTreeSet;

use super::env::Variable;
use super::policy_file::Name;

/// Names of variables, in order and each once, with their masks, rendered at the start.
#[derive(Clone, PartialEq)]
pub struct VendorKeys(Vec<Variable>);

impl VendorKeys {
    pub(super) const NONE: Self = Self(Vec::new());

    /// Renders the mask of each name.
    pub(super) fn new(names: &BTreeSet<Name>) -> Self {
        Self(
            names
                .iter()
                .map(|name| Variable::mask(name.as_str()))
                .collect(),
        )
    }

    /// Reports whether the name is one of them.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|mask| mask.name() == name)
    }

    /// Returns the mask of each.
    #[must_use]
    pub fn masks(&self) -> &[Variable] {
        &self.0
    }
}
