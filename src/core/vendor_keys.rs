//! The vendor keys of a compiled policy: a set of names, each with the mask that hides it. Which names they are is
//! policy_file.rs's business, and in which mode and container they count is plan.rs's.

use std::collections::BTreeSet;

use super::env::{Lengths, Variable};
use super::policy_file::Name;

/// Names of variables, in order and each once, their masks rendered at the start. So few are found faster one by one than
/// in a tree, for most differ in length.
#[derive(Clone, PartialEq)]
pub struct VendorKeys {
    masks: Vec<Variable>,
    lengths: Lengths,
}

impl VendorKeys {
    pub(super) const NONE: Self = Self {
        masks: Vec::new(),
        lengths: Lengths::NONE,
    };

    /// Renders the mask of each name.
    pub(super) fn new(names: &BTreeSet<Name>) -> Self {
        let names = || names.iter().map(Name::as_str);
        Self {
            masks: names().map(Variable::mask).collect(),
            lengths: Lengths::of(names()),
        }
    }

    /// Reports whether the name is one of them.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.lengths.has(name) && self.masks.iter().any(|mask| mask.name() == name)
    }

    /// The mask of each.
    #[must_use]
    pub fn masks(&self) -> &[Variable] {
        &self.masks
    }
}
