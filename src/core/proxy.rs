//! The proxy variables of a platform_managed container: the contract's table, then the operator's extraEnv. plan.rs
//! decides which containers get them.

use std::collections::BTreeSet;

use super::env::{Entry, Value, Variable};
use super::placeholders::Placeholders;
use super::policy_file::{EnvSource, ExtraEnv, Name, OptionalKey, ProxySettings, UsageToken};
use super::refusal::Refusal;

/// The runtime that uses Anthropic's API. All others are assumed to use OpenAI's.
const CLAUDE_CODE: &str = "claude-code";

/// The metered proxy, with its variables rendered at startup.
#[derive(Clone)]
pub struct Proxy {
    /// The contract's variables; `None` if the base URL or the usage token is absent.
    contract: Option<Contract>,
    /// The variables of extraEnv, in order.
    extra: Vec<(ExtraEnv, Template)>,
    /// Names of containers that get no proxy variables.
    pub(super) exclude_containers: BTreeSet<String>,
}

#[derive(Clone)]
struct Contract {
    claude_code: Vec<Template>,
    others: Vec<Template>,
}

/// A variable, with or without placeholders.
#[derive(Clone)]
struct Template {
    variable: Variable,
    has_placeholders: bool,
}

impl From<ProxySettings> for Proxy {
    fn from(settings: ProxySettings) -> Self {
        let contract = Contract::of(&settings);
        let extra = settings.extra_env.into_iter().map(|extra| {
            let value = match (&extra.value_from, &extra.value) {
                (Some(source), _) => Value::Source(source.clone()),
                (None, text) => Value::Literal(text.clone().unwrap_or_default()),
            };
            let template = Template::new(extra.name.as_str(), value);
            (extra, template)
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
        let literal = |name: &str, text: &String| Template {
            variable: Variable::new(name, Value::Literal(text.clone())),
            has_placeholders: false,
        };
        let base_url = settings.base_url.as_ref()?;
        let token = settings.usage_token.as_ref()?;
        let token = |name: &str| match token {
            // The kubelet reads `$$` as a dollar and `$(NAME)` as a reference.
            UsageToken::Literal(token) => literal(name, &token.replace('$', "$$")),
            UsageToken::Reference(source) => Template::new(name, Value::Source(source.clone())),
        };

        let mut common = vec![
            literal("MOLECULE_LLM_BASE_URL", base_url),
            token("MOLECULE_LLM_USAGE_TOKEN"),
        ];
        if let Some(url) = &settings.anthropic_base_url {
            common.push(literal("MOLECULE_LLM_ANTHROPIC_BASE_URL", url));
        }
        if let Some(url) = &settings.usage_url {
            common.push(literal("MOLECULE_LLM_USAGE_URL", url));
        }
        let (mut claude_code, mut others) = (common.clone(), common);
        others.push(token("OPENAI_API_KEY"));
        others.push(literal("OPENAI_BASE_URL", base_url));
        if let Some(url) = &settings.anthropic_base_url {
            claude_code.push(token("ANTHROPIC_API_KEY"));
            claude_code.push(literal("ANTHROPIC_BASE_URL", url));
        }
        Some(Self {
            claude_code,
            others,
        })
    }
}

impl Proxy {
    /// Reports whether there is a base URL and a usage token; without them, platform_managed pods are refused.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.contract.is_some()
    }

    /// Returns the proxy variables for a runtime: the contract's first, then extraEnv. Returns `None` if the base URL
    /// or the usage token is absent.
    ///
    /// # Errors
    /// [`Refusal::InvalidReference`]
    pub fn variables(
        &self,
        runtime: &str,
        placeholders: Placeholders<'_>,
    ) -> Result<Option<Vec<Entry<'_>>>, Refusal> {
        let Some(contract) = &self.contract else {
            return Ok(None);
        };
        let contract = if runtime.trim().eq_ignore_ascii_case(CLAUDE_CODE) {
            &contract.claude_code
        } else {
            &contract.others
        };
        let mut templates: Vec<&Template> = contract.iter().collect();
        let extra = self.extra.iter();
        for (_, template) in extra.filter(|(extra, _)| extra.is_for(runtime)) {
            templates.retain(|other| other.variable.name() != template.variable.name());
            templates.push(template);
        }
        let filled = templates
            .into_iter()
            .map(|template| template.fill(placeholders));
        filled.collect::<Result<_, _>>().map(Some)
    }
}

impl Template {
    fn new(name: &str, value: Value) -> Self {
        let has_placeholders = match &value {
            Value::Literal(text) => Placeholders::are_in(text),
            Value::Source(source) => source.reference().is_some_and(|reference| {
                Placeholders::are_in(reference.name.as_str())
                    || Placeholders::are_in(reference.key.as_str())
            }),
        };
        Self {
            variable: Variable::new(name, value),
            has_placeholders,
        }
    }

    fn fill(&self, placeholders: Placeholders<'_>) -> Result<Entry<'_>, Refusal> {
        if !self.has_placeholders {
            return Ok(Entry::from(&self.variable));
        }
        let name = self.variable.name();
        let value = match self.variable.value() {
            Value::Literal(text) => Value::Literal(placeholders.fill(text)),
            Value::Source(source) => {
                let filled = source.fill(placeholders);
                Value::Source(filled.ok_or_else(|| Refusal::InvalidReference {
                    variable: name.to_owned(),
                })?)
            }
        };
        Ok(Entry::filled(Variable::new(name, value)))
    }
}

impl EnvSource {
    /// Fills the placeholders of a reference. Returns `None` if the result is not a valid name or key.
    fn fill(&self, placeholders: Placeholders<'_>) -> Option<Self> {
        let fill = |reference: &OptionalKey| {
            let (name, key) =
                placeholders.fill_reference(reference.name.as_str(), reference.key.as_str())?;
            Some(OptionalKey {
                name: Name::of(&name),
                key: Name::of(&key),
                optional: reference.optional,
            })
        };
        Some(match self {
            Self::SecretKeyRef(reference) => Self::SecretKeyRef(fill(reference)?),
            Self::ConfigMapKeyRef(reference) => Self::ConfigMapKeyRef(fill(reference)?),
            Self::FieldRef(_) | Self::ResourceFieldRef(_) => self.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::json::list;
    use crate::core::policy::Policy;

    const PLACEHOLDERS: Placeholders<'_> = Placeholders {
        workspace_id: "ws-1",
        namespace: "ws-acme",
    };

    fn render(proxy: &str, runtime: &str) -> Option<String> {
        let proxy = Policy::parse(&format!("proxy: {proxy}"))
            .unwrap()
            .proxy
            .unwrap();
        let variables = proxy.variables(runtime, PLACEHOLDERS).unwrap()?;
        let mut entries = String::new();
        list(&mut entries, &variables, |out, entry| entry.write(out));
        Some(entries)
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
            - {name: HEADERS, value: 'id: {workspace_id}/{namespace}', runtimes: [' Hermes ']}
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
                r#"{"name":"HEADERS","value":"id: ws-1/ws-acme"},"#,
                r#"{"name":"OPENAI_BASE_URL","value":"other"},"#,
                r#"{"name":"NODE","valueFrom":{"fieldRef":{"fieldPath":"spec.nodeName"}}},"#,
                r#"{"name":"FLAG"}]"#
            )
        );
        assert!(!render(&indented, "codex").unwrap().contains("HEADERS"));
    }

    #[test]
    fn references_are_filled_for_each_workspace() {
        let proxy = "
            baseUrl: u
            usageToken: {secretKeyRef: {name: 'llm-{workspace_id}', key: 'token-{namespace}'}}
            extraEnv:
            - {name: MAP, valueFrom: {configMapKeyRef: {name: '{namespace}', key: k, optional: true}}}
            - {name: NODE, valueFrom: {fieldRef: {fieldPath: '{namespace}'}}}";
        let proxy = format!("\n{proxy}");
        let token = r#""valueFrom":{"secretKeyRef":{"name":"llm-ws-1","key":"token-ws-acme"}}}"#;
        assert_eq!(
            render(&proxy, "").unwrap(),
            [
                r#"[{"name":"MOLECULE_LLM_BASE_URL","value":"u"},"#,
                &format!(r#"{{"name":"MOLECULE_LLM_USAGE_TOKEN",{token},"#),
                &format!(r#"{{"name":"OPENAI_API_KEY",{token},"#),
                r#"{"name":"OPENAI_BASE_URL","value":"u"},"#,
                r#"{"name":"MAP","valueFrom":{"configMapKeyRef":{"name":"ws-acme","key":"k","optional":true}}},"#,
                r#"{"name":"NODE","valueFrom":{"fieldRef":{"fieldPath":"{namespace}"}}}]"#,
            ]
            .concat()
        );
        let proxy = Policy::parse(&format!("proxy: {proxy}"))
            .unwrap()
            .proxy
            .unwrap();
        for workspace_id in ["", "Upper", "a_b"] {
            let placeholders = Placeholders {
                workspace_id,
                ..PLACEHOLDERS
            };
            let refusal = proxy.variables("", placeholders).err();
            let variable = "MOLECULE_LLM_USAGE_TOKEN".to_owned();
            assert_eq!(refusal, Some(Refusal::InvalidReference { variable }), "{workspace_id}");
        }
    }
}
