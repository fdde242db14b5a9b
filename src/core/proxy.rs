//! The contract's table of proxy variables, and the operator's extraEnv: policy and workspace → the
//! variables that a platform_managed container must have. Which containers get them is plan.rs's business.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::env::{Value, Variable};
use super::policy_file::{ExtraEnv, ProxySettings, UsageToken};

/// The runtime that speaks Anthropic's API; every other is taken to speak OpenAI's.
const CLAUDE_CODE: &str = "claude-code";
/// What stands for the workspace's id in the values of extraEnv.
const WORKSPACE_ID: &str = "{workspace_id}";

/// The metered proxy, its variables rendered at the start.
#[derive(Clone, PartialEq)]
pub struct Proxy {
    /// The contract's variables; `None` if the base URL or the usage token is absent.
    contract: Option<Contract>,
    /// Those of extraEnv, in its order.
    extra: Vec<(ExtraEnv, Variable)>,
    /// Names of containers that get no proxy variables.
    pub(super) exclude_containers: BTreeSet<String>,
}

#[derive(Clone, PartialEq)]
struct Contract {
    of_claude_code: Vec<Variable>,
    of_others: Vec<Variable>,
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
            // The kubelet takes `$$` for a dollar, and `$(NAME)` for a reference.
            UsageToken::Literal(token) => Value::Literal(token.replace('$', "$$")),
            UsageToken::Reference(source) => Value::Source(source.clone()),
        };
        let anthropic_base_url = settings.anthropic_base_url.as_ref().map(literal);
        let usage_url = settings.usage_url.as_ref().map(literal);

        let mut of_all = vec![
            Variable::new("MOLECULE_LLM_BASE_URL", base_url.clone()),
            Variable::new("MOLECULE_LLM_USAGE_TOKEN", token.clone()),
        ];
        if let Some(url) = &anthropic_base_url {
            of_all.push(Variable::new(
                "MOLECULE_LLM_ANTHROPIC_BASE_URL",
                url.clone(),
            ));
        }
        if let Some(url) = usage_url {
            of_all.push(Variable::new("MOLECULE_LLM_USAGE_URL", url));
        }
        let (mut of_claude_code, mut of_others) = (of_all.clone(), of_all);
        of_others.push(Variable::new("OPENAI_API_KEY", token.clone()));
        of_others.push(Variable::new("OPENAI_BASE_URL", base_url));
        if let Some(url) = anthropic_base_url {
            of_claude_code.push(Variable::new("ANTHROPIC_API_KEY", token));
            of_claude_code.push(Variable::new("ANTHROPIC_BASE_URL", url));
        }
        Some(Self {
            of_claude_code,
            of_others,
        })
    }
}

impl Proxy {
    /// The proxy variables of a container of this runtime, the contract's first, then extraEnv.
    /// `None` if the proxy lacks its base URL or its usage token, and so is none.
    #[must_use]
    pub fn variables(&self, runtime: &str, workspace_id: &str) -> Option<Vec<Cow<'_, Variable>>> {
        let contract = self.contract.as_ref()?;
        let contract = if runtime.trim().eq_ignore_ascii_case(CLAUDE_CODE) {
            &contract.of_claude_code
        } else {
            &contract.of_others
        };
        let mut variables: Vec<_> = contract.iter().map(Cow::Borrowed).collect();
        let extra = self.extra.iter();
        for (extra, variable) in extra.filter(|(extra, _)| extra.is_for(runtime)) {
            variables.retain(|other| other.name() != variable.name());
            variables.push(match (&extra.value_from, &extra.value) {
                (None, Some(text)) if text.contains(WORKSPACE_ID) => {
                    let value = Value::Literal(text.replace(WORKSPACE_ID, workspace_id));
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

    fn shown(proxy: &str, runtime: &str) -> Option<String> {
        let proxy = Policy::parse(&format!("proxy: {proxy}"))
            .unwrap()
            .proxy
            .unwrap();
        let variables = proxy.variables(runtime, "ws-1")?;
        let entries: Vec<&str> = variables.iter().map(|variable| variable.entry()).collect();
        Some(format!("[{}]", entries.join(",")))
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
    fn a_literal_token_reaches_the_container_as_it_is() {
        let token = "{value: 'a$b$$c$(HOME)'}";
        assert_eq!(
            shown(&format!("{{baseUrl: u, usageToken: {token}}}"), "").unwrap(),
            concat!(
                r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},"#,
                r#"{"name":"MOLECULE_LLM_USAGE_TOKEN","value":"a$$b$$$$c$$(HOME)"},"#,
                r#"{"name":"OPENAI_API_KEY","value":"a$$b$$$$c$$(HOME)"},"#,
                r#"{"name":"OPENAI_BASE_URL","value":"u"}]"#
            )
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
