//! The vendor keys of a policy, as a set of names, each with the mask that hides it. Which names they are is policy.rs's
//! business, and in which mode and container they count is plan.rs's.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::env::{Lengths, Variable};
use super::policy::Name;

/// Names of variables, in order and each once, their masks made at the start. So few are found faster one by one than in
/// a tree, for most differ in length. Serialized for the default in the policy's schema.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "BTreeSet<Name>", into = "BTreeSet<Name>")]
pub struct VendorKeys {
    masks: Vec<Variable>,
    lengths: Lengths,
}

impl VendorKeys {
    pub(super) const NONE: Self = Self {
        masks: Vec::new(),
        lengths: Lengths::NONE,
    };

    /// Whether the name is one of them.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.lengths.has(name) && self.masks.iter().any(|mask| mask.name() == name)
    }

    /// The mask of each.
    #[must_use]
    pub fn masks(&self) -> &[Variable] {
        &self.masks
    }
}

impl From<BTreeSet<Name>> for VendorKeys {
    fn from(names: BTreeSet<Name>) -> Self {
        let names = || names.iter().map(Name::as_str);
        Self {
            masks: names().map(Variable::mask).collect(),
            lengths: Lengths::of(names()),
        }
    }
}

impl From<VendorKeys> for BTreeSet<Name> {
    fn from(keys: VendorKeys) -> Self {
        let names = keys.masks.iter().map(Variable::name);
        names.map(Name::of).collect()
    }
}
