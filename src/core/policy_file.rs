//! The policy file: its fields, defaults, validation with line and field, and JSON schema.
//! Reading the file is cli's business. What decisions use is the compiled policy, policy.rs.
//!
//! Nothing here derives `Debug` if it can hold a value of an env entry.

use std::collections::BTreeSet;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_saphyr::Error as YamlError;
use thiserror::Error;

use super::resolution::{MODE_VARIABLE, RESOLVED_VARIABLE};

/// The policy file with every field and its default, commented. A test holds it equal to [`PolicyFile::default`].
pub const DEFAULT_POLICY: &str = include_str!("policy.default.yaml");

/// What the operator decided, read once at start. A new policy is a rollout.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(rename = "Policy")]
pub struct PolicyFile {
    /// The label whose value names a pod's workspace.
    pub workspace_label: Name,
    /// The label whose value names a pod's runtime, such as `claude-code`.
    pub runtime_label: Name,
    /// What happens to a pod without the workspace label.
    pub unlabelled: Unlabelled,
    /// How a workspace's mode is looked up.
    pub lookup: Lookup,
    /// Variables that a platform_managed container must not have, unless the proxy sets them.
    pub vendor_keys: BTreeSet<Name>,
    /// What happens to vendor keys that an envFrom source of a platform_managed container could bring.
    pub env_from: EnvFromRule,
    /// The metered proxy. Absent, platform_managed pods are refused.
    pub proxy: Option<ProxySettings>,
}

impl Default for PolicyFile {
    fn default() -> Self {
        Self {
            workspace_label: Name::of("molecule.ai/workspace-id"),
            runtime_label: Name::of("molecule.ai/runtime"),
            unlabelled: Unlabelled::Ignore,
            lookup: Lookup::default(),
            vendor_keys: BTreeSet::from(VENDOR_KEYS.map(Name::of)),
            env_from: EnvFromRule::Mask,
            proxy: None,
        }
    }
}

/// The contract's list.
const VENDOR_KEYS: [&str; 23] = [
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

/// A name that cannot be blank: of a variable, a label, a Secret, a key in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
pub struct Name(#[schemars(length(min = 1))] String);

impl Name {
    pub(super) fn of(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '=') {
            return Err("a name must not be empty and must have neither white space nor \"=\"");
        }
        Ok(Self(name))
    }
}

/// What happens to a pod without the workspace label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unlabelled {
    /// It is no workspace pod, and stays as it is.
    Ignore,
    /// It is treated as platform_managed, so leaving the label off is no way out.
    PlatformManaged,
    /// It is refused.
    Deny,
}

/// How a workspace's mode is looked up.
#[derive(Clone, PartialEq, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Lookup {
    /// Returns one row whose first column is the mode; no row means that the workspace is unknown.
    #[serde(deserialize_with = "query")]
    pub query: String,
    /// What the query's $1, $2, … stand for, in that order.
    pub parameters: Vec<Parameter>,
    /// Longest wait for one lookup, connecting included, such as `2s` or `500ms`; 30s at most. What the API server's
    /// own time-out leaves may shorten it.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "String")]
    pub timeout: Duration,
    /// What happens when the database fails.
    pub on_error: OnError,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            query: "SELECT llm_billing_mode FROM workspaces WHERE id = $1".to_owned(),
            parameters: vec![Parameter::Label {
                label: Name::of("molecule.ai/workspace-id"),
                kind: ParameterType::Uuid,
            }],
            timeout: Duration::from_secs(2),
            on_error: OnError::PlatformManaged,
        }
    }
}

/// One parameter of the query.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(try_from = "RawParameter")]
#[schemars(with = "RawParameter")]
pub enum Parameter {
    /// The value of one of the pod's labels.
    Label {
        /// The label's key.
        label: Name,
        /// How the database takes it.
        kind: ParameterType,
    },
    /// The pod's namespace, as text.
    Namespace,
}

/// How the database takes a label's value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ParameterType {
    /// As a UUID; a value that is none is not looked up.
    Uuid,
    /// As text.
    Text,
}

/// `{label: KEY, type: uuid | text}` or `{field: namespace}`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RawParameter {
    /// The label whose value is meant.
    label: Option<Name>,
    /// How the database takes it.
    #[serde(rename = "type")]
    kind: Option<ParameterType>,
    /// `namespace`, for the pod's namespace as text.
    field: Option<Field>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Field {
    Namespace,
}

impl TryFrom<RawParameter> for Parameter {
    type Error = &'static str;

    fn try_from(raw: RawParameter) -> Result<Self, Self::Error> {
        match raw {
            RawParameter {
                label: Some(label),
                kind: Some(kind),
                field: None,
            } => Ok(Self::Label { label, kind }),
            RawParameter {
                label: None,
                kind: None,
                field: Some(Field::Namespace),
            } => Ok(Self::Namespace),
            _ => Err(
                "a parameter is {label: KEY, type: uuid}, {label: KEY, type: text} or {field: namespace}",
            ),
        }
    }
}

/// What happens to a pod whose lookup fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// It is treated as platform_managed, with a warning.
    PlatformManaged,
    /// It is refused with status 503.
    Deny,
}

/// What happens to vendor keys that an envFrom source could bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnvFromRule {
    /// An empty-valued entry hides each of them.
    Mask,
    /// The pod is refused.
    Deny,
    /// They may come.
    Ignore,
}

/// The metered proxy. Values are trimmed, and a blank one counts as absent.
#[derive(Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(rename = "Proxy")]
pub struct ProxySettings {
    /// Base URL for clients that speak OpenAI's API. Without it there is no proxy.
    #[serde(deserialize_with = "trimmed")]
    pub base_url: Option<String>,
    /// Base URL for clients that speak Anthropic's API.
    #[serde(deserialize_with = "trimmed")]
    pub anthropic_base_url: Option<String>,
    /// Where a workspace reports or reads its usage.
    #[serde(deserialize_with = "trimmed")]
    pub usage_url: Option<String>,
    /// What the proxy knows the platform's workspaces by. Without it there is no proxy.
    #[serde(deserialize_with = "not_blank")]
    pub usage_token: Option<UsageToken>,
    /// Env entries to set besides; one here wins over the contract's of the same name.
    pub extra_env: Vec<ExtraEnv>,
    /// Names of containers that get the mode and lose vendor keys, but get no proxy variables.
    pub exclude_containers: BTreeSet<String>,
}

/// The usage token: a reference, or a literal, which whoever may read pods or reaches the webhook can read.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(from = "RawUsageToken")]
#[schemars(with = "RawUsageToken")]
pub enum UsageToken {
    /// A key of a Secret in each workspace's own namespace.
    Reference(EnvSource),
    /// The token itself, trimmed, and never empty.
    Literal(String),
}

/// `{secretKeyRef: {name: …, key: …}}` or `{value: …}`.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
enum RawUsageToken {
    /// A key of a Secret in each workspace's own namespace. Where it is missing, no container starts.
    SecretKeyRef(SecretKey),
    /// The token itself, which whoever may read pods or reaches the webhook can read.
    Value(String),
}

/// A key of a Secret that must be there.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SecretKey {
    /// The Secret.
    name: Name,
    /// The key in it.
    key: Name,
}

impl From<RawUsageToken> for UsageToken {
    fn from(raw: RawUsageToken) -> Self {
        match raw {
            RawUsageToken::SecretKeyRef(SecretKey { name, key }) => {
                Self::Reference(EnvSource::SecretKeyRef(OptionalKey {
                    name,
                    key,
                    optional: None,
                }))
            }
            RawUsageToken::Value(token) => Self::Literal(token.trim().to_owned()),
        }
    }
}

/// An env entry that the operator wants set on platform_managed containers.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExtraEnv {
    /// The variable.
    pub name: Name,
    /// Its literal value; `{workspace_id}` in it is filled in.
    pub value: Option<String>,
    /// Where its value comes from instead.
    pub value_from: Option<EnvSource>,
    /// The runtimes that get it, compared without regard to case and surrounding space; all where absent.
    pub runtimes: Option<Vec<String>>,
}

/// Where an env entry's value comes from, as in a pod.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum EnvSource {
    /// A key of a Secret.
    SecretKeyRef(OptionalKey),
    /// A key of a ConfigMap.
    ConfigMapKeyRef(OptionalKey),
    /// A field of the pod.
    FieldRef(FieldSource),
    /// A resource of a container.
    ResourceFieldRef(ResourceSource),
}

/// A key of a Secret or ConfigMap.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptionalKey {
    /// The object.
    pub name: Name,
    /// The key in it.
    pub key: Name,
    /// Whether the container starts without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

/// A field of the pod.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct FieldSource {
    /// Such as `metadata.name`.
    pub field_path: Name,
    /// `v1` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<Name>,
}

/// A resource of a container.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ResourceSource {
    /// Such as `limits.memory`.
    pub resource: Name,
    /// The entry's own container where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_name: Option<Name>,
    /// A quantity in its canonical form; `"0"` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divisor: Option<Name>,
}

impl PolicyFile {
    /// Reads a policy file.
    ///
    /// # Errors
    /// With line and column if the text is no YAML or a field is unknown, missing or of the wrong shape;
    /// with the field's path if fields contradict each other. No error repeats a value.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        // An empty file, or one of comments alone, is the default policy.
        let policy: Option<Self> =
            serde_saphyr::from_str(text).map_err(|error| PolicyError::from_yaml(&error))?;
        let policy = policy.unwrap_or_default();
        policy.validate()?;
        Ok(policy)
    }

    /// The JSON schema of the policy file, for editors and for the chart.
    #[must_use]
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).into()
    }

    /// What an operator should know before a rollout, though nothing is wrong enough to refuse.
    #[must_use]
    pub fn warnings(&self) -> Vec<&'static str> {
        let mut warnings = Vec::new();
        let Some(proxy) = &self.proxy else {
            return vec!["proxy is absent: every platform_managed pod will be refused"];
        };
        if proxy.base_url.is_none() {
            warnings.push(
                "proxy.baseUrl is absent or blank: every platform_managed pod will be refused",
            );
        }
        match &proxy.usage_token {
            Some(UsageToken::Reference(_)) => {}
            Some(UsageToken::Literal(_)) => warnings.push(
                "proxy.usageToken is a literal: whoever may read pods or the API server's audit log, or reaches the webhook, can read it; \
                 use secretKeyRef",
            ),
            None => {
                warnings.push("proxy.usageToken is absent or blank: every platform_managed pod will be refused");
            }
        }
        warnings
    }

    /// Whether the usage token itself is in the policy.
    #[must_use]
    pub fn has_literal_token(&self) -> bool {
        let proxy = self.proxy.as_ref();
        let token = proxy.and_then(|proxy| proxy.usage_token.as_ref());
        matches!(token, Some(UsageToken::Literal(_)))
    }

    fn validate(&self) -> Result<(), PolicyError> {
        let contradiction =
            |field: String, problem| Err(PolicyError::Contradiction { field, problem });
        let extra_env = self
            .proxy
            .as_ref()
            .map_or(&[][..], |proxy| &proxy.extra_env);
        for (index, extra) in extra_env.iter().enumerate() {
            let field = format!("proxy.extraEnv[{index}]");
            if [MODE_VARIABLE, RESOLVED_VARIABLE].contains(&extra.name.as_str()) {
                return contradiction(
                    field,
                    "is set to the resolved mode on every container; leave it out",
                );
            }
            if extra.value.is_some() && extra.value_from.is_some() {
                return contradiction(field, "has both value and valueFrom; leave one out");
            }
            if extra.runtimes.as_ref().is_some_and(Vec::is_empty) {
                return contradiction(
                    field,
                    "has an empty list of runtimes; leave runtimes out to mean all",
                );
            }
            if extra_env
                .iter()
                .take(index)
                .any(|other| other.name == extra.name && extra.shares_a_runtime_with(other))
            {
                return contradiction(
                    field,
                    "sets a variable that an earlier entry sets for the same runtime",
                );
            }
        }
        Ok(())
    }
}

impl ExtraEnv {
    /// Whether a pod of this runtime gets the entry.
    #[must_use]
    pub(super) fn is_for(&self, runtime: &str) -> bool {
        let same = |name: &String| name.trim().eq_ignore_ascii_case(runtime.trim());
        self.runtimes
            .as_ref()
            .is_none_or(|runtimes| runtimes.iter().any(same))
    }

    fn shares_a_runtime_with(&self, other: &Self) -> bool {
        self.runtimes
            .as_ref()
            .is_none_or(|runtimes| runtimes.iter().any(|runtime| other.is_for(runtime)))
    }
}

fn trimmed<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = Option::<String>::deserialize(deserializer)?;
    Ok(value
        .map(|value| value.trim().to_owned())
        .filter(|value| !value.is_empty()))
}

fn not_blank<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<UsageToken>, D::Error> {
    let token = Option::<UsageToken>::deserialize(deserializer)?;
    let is_blank =
        |token: &UsageToken| matches!(token, UsageToken::Literal(text) if text.is_empty());
    Ok(token.filter(|token| !is_blank(token)))
}

fn query<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let query = String::deserialize(deserializer)?;
    if query.trim().is_empty() {
        return Err(serde::de::Error::custom("the query must not be empty"));
    }
    Ok(query)
}

/// No API server waits longer.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() && duration <= MAX_TIMEOUT => Ok(duration),
        _ => Err(serde::de::Error::custom(
            "expected a duration above zero and of 30s at most, such as 2s or 500ms",
        )),
    }
}

/// Why a policy file cannot be used.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// The text does not fit the policy's fields.
    #[error("line {line}, column {column}: {problem}")]
    Syntax {
        /// From 1; 0 where the reader of YAML does not know.
        line: u64,
        /// From 1.
        column: u64,
        /// What is wrong there, without the value.
        problem: String,
    },
    /// Each field fits, but they contradict each other.
    #[error("{field} {problem}")]
    Contradiction {
        /// Path of the field.
        field: String,
        /// What is wrong, and the remedy.
        problem: &'static str,
    },
}

impl PolicyError {
    /// Keeps what the reader of YAML says of names and shapes, and drops what it says of values: a token
    /// may stand where something else was expected, or on a line beside it.
    fn from_yaml(error: &YamlError) -> Self {
        let error = error.without_snippet();
        let problem = match error {
            YamlError::SerdeUnknownField {
                field, expected, ..
            } => {
                format!(
                    "unknown field {field:?}; expected one of {}",
                    expected.join(", ")
                )
            }
            YamlError::SerdeMissingField { field, .. } => format!("field {field:?} is missing"),
            YamlError::SerdeUnknownVariant { expected, .. } => {
                format!("expected one of {}", expected.join(", "))
            }
            YamlError::Unexpected { expected, .. } => format!("expected {expected}"),
            YamlError::Message { msg, .. } => msg.clone(),
            YamlError::DuplicateMappingKey { .. } => "this key occurs twice".to_owned(),
            YamlError::ExternalMessage { .. } => "this is not valid YAML".to_owned(),
            _ => "the value does not have the expected shape".to_owned(),
        };
        let (line, column) = error
            .location()
            .map_or((0, 0), |at| (at.line(), at.column()));
        Self::Syntax {
            line,
            column,
            problem,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_has_every_field_with_its_default() {
        assert!(PolicyFile::parse(DEFAULT_POLICY).unwrap() == PolicyFile::default());
        assert!(PolicyFile::parse("").unwrap() == PolicyFile::default());
        assert!(PolicyFile::parse("# nothing but a remark\n").unwrap() == PolicyFile::default());
        let schema = PolicyFile::schema();
        for field in schema["properties"].as_object().unwrap().keys() {
            assert!(DEFAULT_POLICY.contains(&format!("{field}:")), "{field}");
        }
        let keys = &schema["properties"]["vendorKeys"]["default"];
        assert_eq!(*keys, serde_json::json!(VENDOR_KEYS));
    }

    #[test]
    fn the_commented_proxy_of_the_default_file_is_valid() {
        let lines: Vec<String> = DEFAULT_POLICY
            .lines()
            .skip_while(|line| !line.starts_with("# proxy:"))
            .map(|line| line.strip_prefix("# ").unwrap_or(line).to_owned())
            .collect();
        let policy = PolicyFile::parse(&lines.join("\n")).unwrap();
        assert_eq!(policy.warnings(), Vec::<&str>::new());
        let proxy = policy.proxy.unwrap();
        assert_eq!(
            proxy.base_url.as_deref(),
            Some("https://llm.example.com/openai/v1")
        );
        assert_eq!(proxy.extra_env.len(), 1);
    }

    #[test]
    fn a_mistake_is_named_with_its_line_and_never_with_its_value() {
        let table = [
            (
                "vendorKey: []",
                1,
                "unknown field \"vendorKey\"; expected one of workspaceLabel, runtimeLabel, ",
            ),
            (
                "lookup:\n  timeout: 2s\n  querry: x",
                3,
                "unknown field \"querry\"; expected one of query, parameters, ",
            ),
            (
                "unlabelled: sk-secret",
                1,
                "expected one of ignore, platform_managed, deny",
            ),
            (
                "lookup:\n  timeout: sk-secret",
                2,
                "expected a duration above zero and of 30s at most, such as 2s or 500ms",
            ),
            (
                "lookup:\n  timeout: 30s 1ms",
                2,
                "expected a duration above zero and of 30s at most, such as 2s or 500ms",
            ),
            (
                "lookup:\n  timeout: 0s",
                2,
                "expected a duration above zero and of 30s at most, such as 2s or 500ms",
            ),
            ("lookup:\n  query: ' '", 2, "the query must not be empty"),
            (
                "lookup:\n  parameters:\n  - {label: x}",
                3,
                "a parameter is {label: KEY, type: uuid}, ",
            ),
            (
                "lookup:\n  parameters:\n  - {label: x, type: uuid, field: namespace}",
                3,
                "a parameter is ",
            ),
            (
                "lookup:\n  parameters:\n  - {type: uuid, field: namespace}",
                3,
                "a parameter is ",
            ),
            (
                "proxy:\n  usageToken: sk-secret",
                2,
                "expected one of secretKeyRef, value",
            ),
            (
                "proxy:\n  usageToken: [sk-secret]",
                2,
                "the value does not have the expected shape",
            ),
            (
                "proxy:\n  usageToken: {secretKeyRef: {name: x}}",
                2,
                "field \"key\" is missing",
            ),
            (
                "proxy:\n  usageToken: {secretKeyRef: {name: '', key: x}}",
                2,
                "a name must not be empty",
            ),
            (
                "proxy:\n  baseUrl: {sk-secret: x}",
                2,
                "expected string scalar",
            ),
            (
                "vendorKeys:\n- A B",
                2,
                "a name must not be empty and must have neither white space nor \"=\"",
            ),
            (
                "vendorKeys:\n- A=sk-secret",
                2,
                "a name must not be empty and must have neither white space nor \"=\"",
            ),
            ("vendorKeys: sk-secret", 1, "expected sequence start"),
            ("envFrom: mask\nenvFrom: deny", 2, "this key occurs twice"),
            (
                "proxy:\n  usageToken: {value: sk-secret\n",
                2,
                "this is not valid YAML",
            ),
        ];
        for (text, line_expected, problem_expected) in table {
            let Err(PolicyError::Syntax { line, problem, .. }) = PolicyFile::parse(text) else {
                panic!("accepted: {text}");
            };
            assert!(problem.starts_with(problem_expected), "{text}: {problem}");
            assert!(!problem.contains("sk-secret"), "{problem}");
            assert_eq!(line, line_expected, "{text}: {problem}");
        }
    }

    #[test]
    fn fields_that_contradict_each_other_are_named_by_path() {
        let table = [
            (
                "[{name: MOLECULE_LLM_BILLING_MODE, value: byok}]",
                "proxy.extraEnv[0] is set to the resolved mode",
            ),
            (
                "[{name: MOLECULE_LLM_BILLING_MODE_RESOLVED}]",
                "proxy.extraEnv[0] is set to the resolved mode",
            ),
            (
                "[{name: A}, {name: B, value: b, valueFrom: {fieldRef: {fieldPath: x}}}]",
                "proxy.extraEnv[1] has both",
            ),
            (
                "[{name: A, runtimes: []}]",
                "proxy.extraEnv[0] has an empty list of runtimes",
            ),
            (
                "[{name: A}, {name: A, runtimes: [x]}]",
                "proxy.extraEnv[1] sets a variable that an earlier",
            ),
            (
                "[{name: A, runtimes: [x]}, {name: A}]",
                "proxy.extraEnv[1] sets a variable that an earlier",
            ),
            (
                "[{name: A, runtimes: [x, y]}, {name: A, runtimes: [' Y']}]",
                "proxy.extraEnv[1] sets a variable",
            ),
        ];
        for (extra_env, expected) in table {
            let error = PolicyFile::parse(&format!("proxy: {{extraEnv: {extra_env}}}"))
                .err()
                .unwrap()
                .to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        for extra_env in [
            "[{name: A, runtimes: [x]}, {name: A, runtimes: [y]}]",
            "[{name: A}, {name: B}]",
        ] {
            assert!(
                PolicyFile::parse(&format!("proxy: {{extraEnv: {extra_env}}}")).is_ok(),
                "{extra_env}"
            );
        }
    }

    #[test]
    fn an_operator_is_warned_of_a_proxy_that_is_none_and_of_a_literal_token() {
        let warnings = |text: &str| {
            let warnings = PolicyFile::parse(text).unwrap().warnings();
            warnings
                .iter()
                .map(|warning| warning.split(':').next().unwrap())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let token = "usageToken: {secretKeyRef: {name: x, key: y}}";
        assert_eq!(warnings(""), "proxy is absent");
        assert_eq!(
            warnings("proxy: {}"),
            "proxy.baseUrl is absent or blank, proxy.usageToken is absent or blank"
        );
        assert_eq!(
            warnings(&format!("proxy: {{baseUrl: ' ', {token}}}")),
            "proxy.baseUrl is absent or blank"
        );
        assert_eq!(
            warnings(&format!("proxy: {{baseUrl: https://x, {token}}}")),
            ""
        );
        assert_eq!(
            warnings("proxy: {baseUrl: x, usageToken: {value: ' '}}"),
            "proxy.usageToken is absent or blank"
        );
        assert_eq!(
            warnings("proxy: {baseUrl: x, usageToken: {value: t}}"),
            "proxy.usageToken is a literal"
        );
        let has_token = |text: &str| PolicyFile::parse(text).unwrap().has_literal_token();
        assert!(has_token("proxy: {usageToken: {value: t}}"));
        assert!(!has_token(&format!("proxy: {{{token}}}")) && !has_token(""));
    }
}
