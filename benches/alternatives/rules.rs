//! The policy of tests/fixtures/policy.yaml for platform_managed, with the names of the default policy.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use llm_billing_webhook::core::catalogue::{self, Mask};
pub(crate) use llm_billing_webhook::core::pod::{MODE_ANNOTATION, SOURCE_ANNOTATION};
use llm_billing_webhook::core::policy::Policy;
use serde_json::{Value, json};
pub(crate) use test_support::{RUNTIME_LABEL, WORKSPACE_LABEL};

pub(crate) const SOURCE: &str = "workspace_override";

/// The variables that the default policy removes.
pub(crate) static REMOVED: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let policy = Policy::parse("").expect("an empty policy is valid");
    let restrictions = policy.restrictions.all().iter();
    let removed = restrictions.filter(|restriction| restriction.is_removed);
    removed
        .map(|restriction| restriction.name().to_owned())
        .collect()
});

pub(crate) fn is_removed(name: &str) -> bool {
    REMOVED.contains(name)
}

/// Returns the entries that hide what an envFrom source could set in a container of this runtime.
pub(crate) fn masks(runtime: &str) -> Vec<Value> {
    let required = required(runtime);
    let like = |name: &str, from: &str| {
        let mut entry = required.iter().find(|entry| entry["name"] == from).cloned();
        if let Some(entry) = &mut entry {
            entry["name"] = name.into();
        }
        entry
    };
    let mask = |name: &String| {
        let entry = match catalogue::find(name).map(|row| row.mask) {
            Some(Mask::OpenAiBaseUrl) => like(name, "MOLECULE_LLM_BASE_URL"),
            Some(Mask::AnthropicBaseUrl) => like(name, "MOLECULE_LLM_ANTHROPIC_BASE_URL"),
            Some(Mask::AnthropicToken) => like(name, "ANTHROPIC_API_KEY"),
            Some(Mask::Literal(value)) => Some(json!({"name": name, "value": value})),
            None => None,
        };
        entry.unwrap_or_else(|| json!({"name": name, "value": ""}))
    };
    REMOVED.iter().map(mask).collect()
}

/// Returns the env entries that a container of this runtime must have.
pub(crate) fn required(runtime: &str) -> Vec<Value> {
    let literal = |name: &str, value: &str| json!({"name": name, "value": value});
    let token = |name: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": "molecule-llm-proxy", "key": "usage-token"}}});
    let openai = "https://proxy.example.test/openai/v1";
    let anthropic = "https://proxy.example.test/anthropic";
    let mut required = vec![
        literal("MOLECULE_LLM_BILLING_MODE", "platform_managed"),
        literal("MOLECULE_LLM_BILLING_MODE_RESOLVED", "platform_managed"),
        literal("MOLECULE_LLM_BASE_URL", openai),
        token("MOLECULE_LLM_USAGE_TOKEN"),
        literal("MOLECULE_LLM_ANTHROPIC_BASE_URL", anthropic),
        literal("MOLECULE_LLM_USAGE_URL", "https://proxy.example.test/usage"),
    ];
    if runtime == "claude-code" {
        required.push(token("ANTHROPIC_API_KEY"));
        required.push(literal("ANTHROPIC_BASE_URL", anthropic));
    } else {
        required.push(token("OPENAI_API_KEY"));
        required.push(literal("OPENAI_BASE_URL", openai));
    }
    required
}
