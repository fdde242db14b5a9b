//! The variables that every container of a workspace gets, from the policy's `variables`: by default the contract's two.
//! plan.rs brings the containers in sync with them.

use super::env::Value;
use super::placeholders::{Placeholders, fill_mode};
use super::policy_file::VariableSetting;
use super::refusal::Refusal;
use super::resolution::BillingMode;
use super::template::{Template, Variables};

/// The variables of each mode, rendered at startup as far as the mode allows.
#[derive(Clone)]
pub struct WorkspaceVariables {
    platform_managed: Vec<Template>,
    byok: Vec<Template>,
    disabled: Vec<Template>,
}

impl WorkspaceVariables {
    pub(super) fn new(settings: &[VariableSetting]) -> Self {
        let of = |mode: BillingMode| {
            let settings = settings.iter().filter(|setting| setting.is_for(mode));
            let template = |setting: &VariableSetting| {
                let value = fill_mode(&setting.value, mode.as_str());
                Template::new(setting.name.as_str(), Value::Literal(value))
            };
            settings.map(template).collect()
        };
        Self {
            platform_managed: of(BillingMode::PlatformManaged),
            byok: of(BillingMode::Byok),
            disabled: of(BillingMode::Disabled),
        }
    }

    fn of(&self, mode: BillingMode) -> &[Template] {
        match mode {
            BillingMode::PlatformManaged => &self.platform_managed,
            BillingMode::Byok => &self.byok,
            BillingMode::Disabled => &self.disabled,
        }
    }

    /// Returns a pod's variables.
    ///
    /// # Errors
    /// See [`Template::fill`].
    pub(super) fn fill(&self, placeholders: Placeholders<'_>) -> Result<Variables<'_>, Refusal> {
        let mut variables = Variables::default();
        for template in self.of(placeholders.resolution.mode) {
            variables.add(template, placeholders)?;
        }
        Ok(variables)
    }

    /// Reports whether the policy has a variable of this name in this mode.
    pub(super) fn contains(&self, mode: BillingMode, name: &str) -> bool {
        self.of(mode).iter().any(|template| template.name() == name)
    }
}
