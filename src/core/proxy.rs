//! The contract's table of proxy variables, and the operator's extraEnv: policy and workspace → the
//! variables that a platform_managed container must have. Which containers get them is plan.rs's business.

use std::borrow::Cow;

use super::env::{Value, Variable};
use super::policy::{Proxy, UsageToken};

/// The runtime that speaks Anthropic's API; every other is taken to speak OpenAI's.
const CLAUDE_CODE: &str = "claude-code";

/// The proxy variables of a container of this runtime, the contract's first, then extraEnv.
/// `None` if the proxy lacks its base URL or its usage token, and so is none.
#[must_use]
pub fn variables<'p>(
    proxy: &'p Proxy,
    runtime: &str,
    workspace_id: &str,
) -> Option<Vec<Variable<'p>>> {
    let literal = |text: &'p String| Value::Literal(Cow::Borrowed(text.as_str()));
    let base_url = literal(proxy.base_url.as_ref()?);
    let token = match proxy.usage_token.as_ref()? {
        UsageToken::Literal(token) if token.is_empty() => return None,
        UsageToken::Literal(token) => literal(token),
        UsageToken::Reference(source) => Value::Source(source),
    };
    let anthropic_base_url = proxy.anthropic_base_url.as_ref().map(literal);
    let usage_url = proxy.usage_url.as_ref().map(literal);

    let mut variables = vec![
        Variable::new("MOLECULE_LLM_BASE_URL", base_url.clone()),
        Variable::new("MOLECULE_LLM_USAGE_TOKEN", token.clone()),
    ];
    if let Some(url) = &anthropic_base_url {
        variables.push(Variable::new(
            "MOLECULE_LLM_ANTHROPIC_BASE_URL",
            url.clone(),
        ));
    }
    if let Some(url) = usage_url {
        variables.push(Variable::new("MOLECULE_LLM_USAGE_URL", url));
    }
    if !runtime.trim().eq_ignore_ascii_case(CLAUDE_CODE) {
        variables.push(Variable::new("OPENAI_API_KEY", token));
        variables.push(Variable::new("OPENAI_BASE_URL", base_url));
    } else if let Some(url) = anthropic_base_url {
        variables.push(Variable::new("ANTHROPIC_API_KEY", token));
        variables.push(Variable::new("ANTHROPIC_BASE_URL", url));
    }

    for extra in proxy.extra_env.iter().filter(|extra| extra.is_for(runtime)) {
        let value = match (&extra.value_from, &extra.value) {
            (Some(source), _) => Value::Source(source),
            (None, Some(text)) => {
                Value::Literal(text.replace("{workspace_id}", workspace_id).into())
            }
            (None, None) => Value::Literal("".into()),
        };
        variables.retain(|variable| variable.name != extra.name.as_str());
        variables.push(Variable::new(extra.name.as_str(), value));
    }
    Some(variables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::patch::Content;
    use crate::core::policy::Policy;

    fn shown(proxy: &str, runtime: &str) -> Option<String> {
        let proxy = Policy::parse(&format!("proxy: {proxy}"))
            .unwrap()
            .proxy
            .unwrap();
        let variables = variables(&proxy, runtime, "ws-1")?;
        let mut env = String::new();
        Content::Entries(&variables).write(&mut env);
        Some(env)
    }

    #[test]
    fn values_are_trimmed_and_a_blank_one_counts_as_absent() {
        assert_eq!(shown("{baseUrl: ' ', usageToken: {value: t}}", ""), None);
        assert_eq!(shown("{baseUrl: u}", ""), None);
        assert_eq!(shown("{baseUrl: u, usageToken: {value: ' '}}", ""), None);
        assert_eq!(
            shown("{baseUrl: ' u ', anthropicBaseUrl: ' ', usageUrl: '', usageToken: {value: ' t\n'}}", "claude-code").unwrap(),
            r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},{"name":"MOLECULE_LLM_USAGE_TOKEN","value":"t"}]"#
        );
    }

    #[test]
    fn the_runtime_is_compared_whole_without_case_and_surrounding_space() {
        let is_claude_code = |runtime| {
            let proxy = "{baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}}";
            shown(proxy, runtime).unwrap().contains("ANTHROPIC_API_KEY")
        };
        for runtime in ["claude-code", "CLAUDE-CODE", " Claude-Code\t"] {
            assert!(is_claude_code(runtime), "{runtime}");
        }
        for runtime in [
            "",
            "claude",
            "claude_code",
            "claude-code-2",
            "my claude-code",
        ] {
            assert!(!is_claude_code(runtime), "{runtime}");
        }
    }

    #[test]
    fn extra_env_is_set_besides_for_its_runtimes_and_wins_over_the_table() {
        let proxy = "
            baseUrl: u
            usageToken: {secretKeyRef: {name: s, key: k}}
            extraEnv:
            - {name: HEADERS, value: 'id: {workspace_id}/{workspace_id}', runtimes: [' Hermes ']}
            - {name: OPENAI_BASE_URL, value: other}
            - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
            - {name: FLAG}";
        let indented = format!("\n{proxy}");
        assert_eq!(
            shown(&indented, "hermes").unwrap(),
            concat!(
                r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},"#,
                r#"{"name":"MOLECULE_LLM_USAGE_TOKEN","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}},"#,
                r#"{"name":"OPENAI_API_KEY","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}},"#,
                r#"{"name":"HEADERS","value":"id: ws-1/ws-1"},"#,
                r#"{"name":"OPENAI_BASE_URL","value":"other"},"#,
                r#"{"name":"NODE","valueFrom":{"fieldRef":{"fieldPath":"spec.nodeName"}}},"#,
                r#"{"name":"FLAG","value":""}]"#
            )
        );
        assert!(!shown(&indented, "codex").unwrap().contains("HEADERS"));
    }
}
