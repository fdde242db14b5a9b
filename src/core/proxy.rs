//! The proxy variables of a platform_managed container: the contract's table, then the operator's extraEnv. plan.rs
//! decides which containers get them.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::env::{Value, Variable};
use super::policy_file::{ExtraEnv, ProxySettings, UsageToken};

/// The runtime that uses Anthropic's API. All others are assumed to use OpenAI's.
const CLAUDE_CODE: &str = "claude-code";
/// The placeholder for the workspace id in extraEnv values.
const WORKSPACE_ID_PLACEHOLDER: &str = "{workspace_id}";

/// The metered proxy, with its variables rendered at startup.
#[derive(Clone)]
pub struct Proxy {
    /// The contract's variables; `None` if the base URL or the usage token is absent.
    contract: Option<Contract>,
    /// The variables of extraEnv, in order.
    extra: Vec<(ExtraEnv, Variable)>,
    /// Names of containers that get no proxy variables.
    pub(super) exclude_containers: BTreeSet<String>,
}

#[derive(Clone)]
struct Contract {
    claude_code: Vec<Variable>,
    others: Vec<Variable>,
}

impl From<ProxySettings> for Proxy {
    fn from(settings: ProxySettings) -> Self {
        let contract = Contract::of(&settings);
        let extra = settings.extra_env.into_iter().map(|extra| {
            let value = match (&extra.value_from, &extra.value) {
                (Some(source), _) => Value::Source(source.clone()),
                (None, text) => Value::Literal(text.clone().unwrap_or_default()),
            };
            let variable = Variable::new(extra.name.as_str(), value);
            (extra, variable)
        });
        Self {
            contract,
            extra: extra.collect(),
            exclude_containers: settings.exclude_containers,
        }
    }
}

impl Contract {
    fn of(settings: &ProxySettings) -> Option<Self> {
        let literal = |text: &String| Value::Literal(text.clone());
        let base_url = literal(settings.base_url.as_ref()?);
        let token = match settings.usage_token.as_ref()? {
            // The kubelet reads `$$` as a dollar and `$(NAME)` as a reference.
            UsageToken::Literal(token) => Value::Literal(token.replace('$', "$$")),
            UsageToken::Reference(source) => Value::Source(source.clone()),
        };
        let anthropic_base_url = settings.anthropic_base_url.as_ref().map(literal);
        let usage_url = settings.usage_url.as_ref().map(literal);

        let mut common = vec![
            Variable::new("MOLECULE_LLM_BASE_URL", base_url.clone()),
            Variable::new("MOLECULE_LLM_USAGE_TOKEN", token.clone()),
        ];
        if let Some(url) = &anthropic_base_url {
            common.push(Variable::new("MOLECULE_LLM_ANTHROPIC_BASE_URL", url.clone()));
        }
        if let Some(url) = usage_url {
            common.push(Variable::new("MOLECULE_LLM_USAGE_URL", url));
        }
        let (mut claude_code, mut others) = (common.clone(), common);
        others.push(Variable::new("OPENAI_API_KEY", token.clone()));
        others.push(Variable::new("OPENAI_BASE_URL", base_url));
        if let Some(url) = anthropic_base_url {
            claude_code.push(Variable::new("ANTHROPIC_API_KEY", token));
            claude_code.push(Variable::new("ANTHROPIC_BASE_URL", url));
        }
        Some(Self {
            claude_code,
            others,
        })
    }
}

impl Proxy {
    /// Returns the proxy variables for a runtime: the contract's first, then extraEnv. Returns `None` if the base URL
    /// or the usage token is absent.
    #[must_use]
    pub fn variables(&self, runtime: &str, workspace_id: &str) -> Option<Vec<Cow<'_, Variable>>> {
        let contract = self.contract.as_ref()?;
        let contract = if runtime.trim().eq_ignore_ascii_case(CLAUDE_CODE) {
            &contract.claude_code
        } else {
            &contract.others
        };
        let mut variables: Vec<_> = contract.iter().map(Cow::Borrowed).collect();
        let extra = self.extra.iter();
        for (extra, variable) in extra.filter(|(extra, _)| extra.is_for(runtime)) {
            variables.retain(|other| other.name() != variable.name());
            variables.push(match (&extra.value_from, &extra.value) {
                (None, Some(text)) if text.contains(WORKSPACE_ID_PLACEHOLDER) => {
                    let value =
                        Value::Literal(text.replace(WORKSPACE_ID_PLACEHOLDER, workspace_id));
                    Cow::Owned(Variable::new(variable.name(), value))
                }
                _ => Cow::Borrowed(variable),
            });
        }
        Some(variables)
    }
}

#[cfg(test)]
mod tests {
    use crate::core::policy::Policy;

    fn render(proxy: &str, runtime: &str) -> Option<String> {
        let proxy = Policy::parse(&format!("proxy: {proxy}"))
            .unwrap()
            .proxy
            .unwrap();
        let variables = proxy.variables(runtime, "ws-1")?;
        let entries: Vec<&str> = variables.iter().map(|variable| variable.entry()).collect();
        Some(format!("[{}]", entries.join(",")))
    }

    #[test]
    fn values_are_trimmed_and_blank_means_absent() {
        assert_eq!(render("{baseUrl: ' ', usageToken: {value: t}}", ""), None);
        assert_eq!(render("{baseUrl: u}", ""), None);
        assert_eq!(render("{baseUrl: u, usageToken: {value: ' '}}", ""), None);
        assert_eq!(
            render("{baseUrl: ' u ', anthropicBaseUrl: ' ', usageUrl: '', usageToken: {value: ' t\n'}}", "claude-code").unwrap(),
            r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},{"name":"MOLECULE_LLM_USAGE_TOKEN","value":"t"}]"#
        );
    }

    #[test]
    fn literal_token_is_escaped_against_kubelet_expansion() {
        let token = "{value: 'a$b$$c$(HOME)'}";
        assert_eq!(
            render(&format!("{{baseUrl: u, usageToken: {token}}}"), "").unwrap(),
            concat!(
                r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},"#,
                r#"{"name":"MOLECULE_LLM_USAGE_TOKEN","value":"a$$b$$$$c$$(HOME)"},"#,
                r#"{"name":"OPENAI_API_KEY","value":"a$$b$$$$c$$(HOME)"},"#,
                r#"{"name":"OPENAI_BASE_URL","value":"u"}]"#
            )
        );
    }

    #[test]
    fn runtime_comparison_ignores_case_and_surrounding_space() {
        let is_claude_code = |runtime| {
            let proxy = "{baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}}";
            render(proxy, runtime)
                .unwrap()
                .contains("ANTHROPIC_API_KEY")
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
    fn extra_env_overrides_contract_for_its_runtimes() {
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
            render(&indented, "hermes").unwrap(),
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
        assert!(!render(&indented, "codex").unwrap().contains("HEADERS"));
    }
}
