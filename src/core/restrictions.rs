//! The variables that are restricted on platform_managed: the policy's vendor keys and the catalogue's rows. policy_file.rs
//! has the rules; plan.rs decides in which modes and containers they apply.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::catalogue::{self, Kind, Mask};
use super::env::{Value, Variable};
use super::policy_file::{CatalogueRule, Name, PolicyFile};

/// What a restricted variable is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// One of the policy's `vendorKeys`.
    VendorKey,
    /// A variable of the catalogue.
    Catalogue(Kind),
}

impl Class {
    /// Returns the name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VendorKey => "vendor_key",
            Self::Catalogue(kind) => kind.as_str(),
        }
    }
}

/// A restricted variable.
#[derive(Clone)]
pub struct Restriction {
    /// What the variable is.
    pub class: Class,
    /// Whether the variable is removed; otherwise it gets a warning.
    pub is_removed: bool,
    /// How the variable is hidden.
    pub(super) mask: Mask,
    /// The entry that hides it if the mask is a literal or the container has no proxy variable for it, rendered at
    /// startup.
    pub(super) literal: Variable,
}

impl Restriction {
    /// Returns the variable's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.literal.name()
    }

    /// Reports whether the variable is removed and holds a credential.
    pub(super) fn removes_credential(&self) -> bool {
        self.is_removed
            && matches!(self.class, Class::VendorKey | Class::Catalogue(Kind::Credential))
    }
}

/// The restricted variables.
#[derive(Clone)]
pub struct Restrictions {
    /// Sorted by name.
    all: Vec<Restriction>,
    /// The indices of the names of each length. Every entry of every pod is looked up, and few names have the same length.
    by_length: Vec<Vec<usize>>,
    /// The policy's `allow`.
    allowed: BTreeSet<Name>,
}

/// The contract keeps this variable unless the proxy sets it, so the catalogue does not remove it.
const KEPT_BY_CONTRACT: &str = "ANTHROPIC_BASE_URL";

impl Restrictions {
    pub(super) const NONE: Self = Self {
        all: Vec::new(),
        by_length: Vec::new(),
        allowed: BTreeSet::new(),
    };

    /// Compiles the policy's rules.
    pub(super) fn new(file: &PolicyFile) -> Self {
        let restriction = |name: &str, class, is_removed| {
            let mask = catalogue::find(name).map_or(Mask::Literal(""), |row| row.mask);
            let literal = match mask {
                Mask::Literal(literal) => literal,
                Mask::OpenAiBaseUrl | Mask::AnthropicBaseUrl | Mask::AnthropicToken => "",
            };
            Restriction {
                class,
                is_removed,
                mask,
                literal: Variable::new(name, Value::Literal(literal.to_owned())),
            }
        };
        let vendor_keys = file.vendor_keys.iter();
        let mut all: Vec<Restriction> = vendor_keys
            .map(|name| restriction(name.as_str(), Class::VendorKey, true))
            .collect();
        for row in catalogue::ROWS {
            let is_removed = match file.catalogue.rule(row.kind) {
                CatalogueRule::Remove => row.variable != KEPT_BY_CONTRACT,
                CatalogueRule::Warn => false,
                CatalogueRule::Ignore => continue,
            };
            all.push(restriction(row.variable, Class::Catalogue(row.kind), is_removed));
        }
        all.retain(|one| {
            file.allow
                .iter()
                .all(|allowed| allowed.as_str() != one.name())
        });
        // A vendor key comes before its catalogue rows, so it is the entry that `dedup_by` keeps.
        all.sort_by(|a, b| a.name().cmp(b.name()));
        all.dedup_by(|a, b| a.name() == b.name());
        let longest = all.iter().map(|one| one.name().len()).max();
        let indices = |length| {
            let named = all
                .iter()
                .enumerate()
                .filter(|(_, one)| one.name().len() == length);
            named.map(|(index, _)| index).collect()
        };
        let by_length = (0..=longest.unwrap_or_default()).map(indices).collect();
        Self {
            all,
            by_length,
            allowed: file.allow.clone(),
        }
    }

    /// Returns the restriction of a name and its index, if it has one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(usize, &Restriction)> {
        let named = self.by_length.get(name.len())?;
        let compare = |index: &usize| {
            let restriction = self.all.get(*index);
            restriction.map_or(Ordering::Less, |restriction| restriction.name().cmp(name))
        };
        let index = *named.get(named.binary_search_by(compare).ok()?)?;
        self.all.get(index).map(|restriction| (index, restriction))
    }

    /// Reports whether the policy's `allow` names the variable.
    pub(super) fn allows(&self, name: &str) -> bool {
        self.allowed.iter().any(|allowed| allowed.as_str() == name)
    }

    /// Reports whether the variable is removed.
    pub(super) fn removes(&self, name: &str) -> bool {
        self.find(name)
            .is_some_and(|(_, restriction)| restriction.is_removed)
    }

    /// Returns all restrictions, sorted by name.
    #[must_use]
    pub fn all(&self) -> &[Restriction] {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what the policy does with each name: `CLASS removed`, `CLASS warned` or `-`.
    fn outcomes(policy: &str, names: &[&str]) -> Vec<String> {
        let restrictions = Restrictions::new(&PolicyFile::parse(policy).unwrap());
        let outcome = |name: &&str| match restrictions.find(name) {
            Some((_, restriction)) => {
                assert_eq!(restriction.name(), *name);
                let verb = if restriction.is_removed {
                    "removed"
                } else {
                    "warned"
                };
                format!("{} {verb}", restriction.class.as_str())
            }
            None => "-".to_owned(),
        };
        names.iter().map(outcome).collect()
    }

    #[test]
    fn rules_apply_by_kind_after_vendor_keys() {
        let names = [
            "ANTHROPIC_AUTH_TOKEN",
            "AWS_BEARER_TOKEN_BEDROCK",
            "OPENAI_API_BASE",
            "ANTHROPIC_BASE_URL",
            "CLAUDE_CODE_USE_BEDROCK",
            "ANTHROPIC_CUSTOM_HEADERS",
            "OPENCODE_CONFIG_CONTENT",
            "AWS_ACCESS_KEY_ID",
            "HOME",
        ];
        let by_default = [
            "vendor_key removed",
            "credential removed",
            "endpoint removed",
            "endpoint warned",
            "route removed",
            "header removed",
            "config removed",
            "shared warned",
            "-",
        ];
        assert_eq!(outcomes("", &names), by_default);
        let policy = "
            vendorKeys: [HOME, ANTHROPIC_BASE_URL]
            catalogue: {credential: ignore, endpoint: ignore, route: warn, header: ignore, config: warn, shared: remove}";
        let expected = [
            "-",
            "-",
            "-",
            "vendor_key removed",
            "route warned",
            "-",
            "config warned",
            "shared removed",
            "vendor_key removed",
        ];
        assert_eq!(outcomes(policy, &names), expected);
    }

    #[test]
    fn allowed_name_is_not_restricted() {
        let policy = "allow: [XAI_API_KEY, AWS_ACCESS_KEY_ID, ANTHROPIC_BASE_URL, OTHER]";
        let names = [
            "XAI_API_KEY",
            "AWS_ACCESS_KEY_ID",
            "ANTHROPIC_BASE_URL",
            "HF_TOKEN",
        ];
        assert_eq!(outcomes(policy, &names), ["-", "-", "-", "vendor_key removed"]);
    }
}
