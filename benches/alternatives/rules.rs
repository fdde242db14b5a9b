//! The policy of tests/fixtures/policy.yaml for platform_managed, as constants.

use serde_json::{Value, json};

pub(crate) const WORKSPACE_LABEL: &str = "molecule.ai/workspace-id";
pub(crate) const RUNTIME_LABEL: &str = "molecule.ai/runtime";
pub(crate) const MODE_ANNOTATION: &str = "molecule.ai/llm-billing-mode";
pub(crate) const SOURCE_ANNOTATION: &str = "molecule.ai/llm-billing-source";
pub(crate) const SOURCE: &str = "workspace_override";

pub(crate) const VENDOR_KEYS: [&str; 23] = [
    "AI_GATEWAY_API_KEY",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ARCEEAI_API_KEY",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CODEX_AUTH_JSON",
    "DASHSCOPE_API_KEY",
    "DEEPSEEK_API_KEY",
    "GEMINI_API_KEY",
    "GLM_API_KEY",
    "HERMES_CUSTOM_API_KEY",
    "HERMES_CUSTOM_BASE_URL",
    "HF_TOKEN",
    "KIMI_API_KEY",
    "KIMI_CN_API_KEY",
    "MINIMAX_API_KEY",
    "MINIMAX_CN_API_KEY",
    "NOUS_API_KEY",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "OPENROUTER_API_KEY",
    "XAI_API_KEY",
    "ZAI_API_KEY",
];

/// Returns the env entries that a container of this runtime must have.
pub(crate) fn required(runtime: &str) -> Vec<Value> {
    let literal = |name: &str, value: &str| json!({"name": name, "value": value});
    let token = |name: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": "molecule-llm-proxy", "key": "usage-token"}}});
    let openai = "https://proxy.example.test/openai/v1";
    let anthropic = "https://proxy.example.test/anthropic/v1";
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
