//! The proxy variables of a platform_managed container: the contract's table, then the operator's extraEnv. plan.rs
//! decides which containers get them, template.rs fills their placeholders.

use std::collections::BTreeSet;

use super::env::Value;
use super::placeholders::{Placeholders, escape};
use super::policy_file::{ExtraEnv, ProxySettings, UsageToken};
use super::refusal::Refusal;
use super::template::{Template, Variables};

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
        let literal = |name: &str, text: &str| Template::new(name, Value::Literal(text.to_owned()));
        let base_url = settings.base_url.as_ref()?;
        let token = settings.usage_token.as_ref()?;
        let token = |name: &str| match token {
            UsageToken::Literal(token) => literal(name, &escape(token)),
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
    /// [`Refusal::InvalidReference`], and [`Refusal::MissingColumn`] for a variable of the contract.
    pub(super) fn variables(
        &self,
        runtime: &str,
        placeholders: Placeholders<'_>,
    ) -> Result<Option<Variables<'_>>, Refusal> {
        let Some(contract) = &self.contract else {
            return Ok(None);
        };
        let contract = if runtime.trim().eq_ignore_ascii_case(CLAUDE_CODE) {
            &contract.claude_code
        } else {
            &contract.others
        };
        let extra = self.extra.iter().filter(|(extra, _)| extra.is_for(runtime));
        let is_overridden = |template: &&Template| {
            let mut extra = extra.clone();
            extra.any(|(_, other)| other.name() == template.name())
        };
        let mut variables = Variables::default();
        for template in contract.iter().filter(|template| !is_overridden(template)) {
            variables
                .entries
                .push(template.fill_required(placeholders)?);
        }
        for (_, template) in extra.clone() {
            variables.add(template, placeholders)?;
        }
        Ok(Some(variables))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::json::list;
    use crate::core::placeholders::{Columns, Workspace};
    use crate::core::policy::Policy;
    use crate::core::resolution::{BillingMode, Resolution};

    const WORKSPACE: Workspace<'_> = Workspace {
        id: "ws-1",
        namespace: "ws-acme",
        columns: Columns {
            names: &[],
            values: &[],
        },
    };

    fn of(workspace: Workspace<'_>) -> Placeholders<'_> {
        let resolution = Resolution::chosen(BillingMode::PlatformManaged);
        Placeholders {
            workspace,
            resolution,
        }
    }

    fn parse(fields: &str) -> Proxy {
        let policy = Policy::parse(&format!("proxy: {fields}")).unwrap();
        policy.proxy.unwrap()
    }

    fn json(variables: &Variables<'_>) -> String {
        let mut entries = String::new();
        list(&mut entries, &variables.entries, |out, entry| entry.write(out));
        entries
    }

    fn render(fields: &str, runtime: &str) -> Option<String> {
        let proxy = parse(fields);
        let variables = proxy.variables(runtime, of(WORKSPACE)).unwrap()?;
        Some(json(&variables))
    }

    #[test]
    fn columns_fill_the_proxys_settings() {
        let proxy = parse(
            "
            baseUrl: 'https://{column org}.example.com/{mode}'
            anthropicBaseUrl: 'https://{column org}.example.com'
            usageToken: {secretKeyRef: {name: 'llm-{column org}', key: k}}
            extraEnv:
            - {name: PLAN, value: '{column plan}'}
            - {name: TEAM, value: '{column team}'}",
        );
        let names = ["org", "plan", "team"].map(str::to_owned);
        let variables = |values: &[Option<&str>]| {
            let values: Vec<Option<String>> = values
                .iter()
                .map(|value| value.map(str::to_owned))
                .collect();
            let columns = Columns {
                names: &names,
                values: &values,
            };
            let workspace = Workspace {
                columns,
                ..WORKSPACE
            };
            let variables = proxy.variables("hermes", of(workspace));
            variables.map(|variables| {
                let variables = variables.unwrap();
                (json(&variables), variables.absent.join(","))
            })
        };
        let token = r#""valueFrom":{"secretKeyRef":{"name":"llm-acme","key":"k"}}"#;
        let url = "https://acme.example.com/platform_managed";
        let expected = format!(
            r#"[{{"name":"MOLECULE_LLM_BASE_URL","value":"{url}"}},{{"name":"MOLECULE_LLM_USAGE_TOKEN",{token}}},{{"name":"MOLECULE_LLM_ANTHROPIC_BASE_URL","value":"https://acme.example.com"}},{{"name":"OPENAI_API_KEY",{token}}},{{"name":"OPENAI_BASE_URL","value":"{url}"}},{{"name":"TEAM"}}]"#
        );
        let acme = variables(&[Some("acme"), None, Some("")]);
        assert_eq!(acme, Ok((expected, "PLAN".to_owned())));
        let missing = Err(Refusal::MissingColumn {
            variable: "MOLECULE_LLM_BASE_URL".to_owned(),
            column: "org".to_owned(),
        });
        assert_eq!(variables(&[None, None, None]), missing);
        assert_eq!(variables(&[]), missing);
    }

    #[test]
    fn proxy_setting_that_is_blank_is_refused() {
        let proxy = parse("{baseUrl: '{column url}', usageToken: {value: '{column token}'}}");
        let names = ["token", "url"].map(str::to_owned);
        for (token, url, variable) in [
            (Some(" "), Some("u"), Some("MOLECULE_LLM_USAGE_TOKEN")),
            (Some("t"), Some(""), Some("MOLECULE_LLM_BASE_URL")),
            (Some("t$"), Some("u"), None),
        ] {
            let values = [token, url].map(|value| value.map(str::to_owned));
            let columns = Columns {
                names: &names,
                values: &values,
            };
            let workspace = Workspace {
                columns,
                ..WORKSPACE
            };
            match (proxy.variables("", of(workspace)), variable) {
                (Err(Refusal::MissingColumn { variable, .. }), Some(expected)) => {
                    assert_eq!(variable, expected);
                }
                (Ok(variables), None) => {
                    let json = json(&variables.unwrap());
                    assert!(json.contains(r#""OPENAI_API_KEY","value":"t$$""#), "{json}");
                }
                _ => panic!("{token:?} {url:?}"),
            }
        }
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
        let proxy = parse(&proxy);
        for id in ["", "Upper", "a_b"] {
            let workspace = Workspace { id, ..WORKSPACE };
            let refusal = proxy.variables("", of(workspace)).err();
            let variable = "MOLECULE_LLM_USAGE_TOKEN".to_owned();
            assert_eq!(refusal, Some(Refusal::InvalidReference { variable }), "{id}");
        }
    }
}
