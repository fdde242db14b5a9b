//! The vendor keys of a compiled policy: a set of names, each with its mask. policy_file.rs lists the names; plan.rs
//! decides in which modes and containers they apply.

use std::collections::BTreeSet;

use super::env::Variable;
use super::policy_file::Name;

/// The names of the vendor keys, sorted and unique, each with its mask rendered at startup.
#[derive(Clone)]
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

    /// Reports whether the name is a vendor key.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|mask| mask.name() == name)
    }

    /// Returns the mask of each vendor key.
    #[must_use]
    pub fn masks(&self) -> &[Variable] {
        &self.0
    }
}
