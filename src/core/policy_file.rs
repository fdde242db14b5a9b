//! The policy file: its fields, defaults, validation with line and field, and JSON schema. cli/args.rs reads the file;
//! policy.rs has the compiled policy that decisions use.
//!
//! Types that can hold an env entry's value do not derive `Debug`.

use std::collections::BTreeSet;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_saphyr::Error as YamlError;
use thiserror::Error;

use super::catalogue::{self, Kind};
use super::placeholders::{columns_in, is_valid_reference};
use super::resolution::{BillingMode, MODE_VARIABLE, RESOLVED_VARIABLE};

/// The policy file with comments: every field with its default. A test keeps it equal to [`PolicyFile::default`].
pub const DEFAULT_POLICY: &str = include_str!("policy.default.yaml");

/// The operator's policy, read once at startup. Restart the webhook to apply a change.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(rename = "Policy")]
pub struct PolicyFile {
    /// The label that holds a pod's workspace id.
    pub workspace_label: Name,
    /// The label that holds a pod's runtime, such as `claude-code`.
    pub runtime_label: Name,
    /// What happens to a pod without the workspace label.
    pub unlabelled: Unlabelled,
    /// How a workspace's mode is looked up.
    pub lookup: Lookup,
    /// Variables that every container of a workspace gets.
    pub variables: Vec<VariableSetting>,
    /// Variables that a platform_managed container must not have, unless the proxy sets them.
    pub vendor_keys: BTreeSet<Name>,
    /// What happens to the catalogue's variables on platform_managed, by kind; see `llm-billing-webhook catalogue`. No
    /// variable that the proxy sets is removed.
    pub catalogue: CatalogueRules,
    /// Variables that remain on platform_managed, without a warning, although `vendorKeys` or the catalogue has them.
    pub allow: BTreeSet<Name>,
    /// What happens to removed variables that an envFrom source of a platform_managed container could set.
    pub env_from: EnvFromRule,
    /// What happens when a new container's own env entries are removed or replaced.
    pub changed_entries: ChangedEntriesRule,
    /// The metered proxy. If absent, platform_managed pods are refused.
    pub proxy: Option<ProxySettings>,
}

impl Default for PolicyFile {
    fn default() -> Self {
        Self {
            workspace_label: Name::of("molecule.ai/workspace-id"),
            runtime_label: Name::of("molecule.ai/runtime"),
            unlabelled: Unlabelled::Ignore,
            lookup: Lookup::default(),
            variables: [MODE_VARIABLE, RESOLVED_VARIABLE]
                .map(VariableSetting::of_mode)
                .into(),
            vendor_keys: BTreeSet::from(VENDOR_KEYS.map(Name::of)),
            catalogue: CatalogueRules::default(),
            allow: BTreeSet::new(),
            env_from: EnvFromRule::Mask,
            changed_entries: ChangedEntriesRule::Warn,
            proxy: None,
        }
    }
}

/// The contract's list of vendor keys.
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

/// The variables that the proxy may set, from the contract's table.
const PROXY_VARIABLES: [&str; 8] = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "MOLECULE_LLM_ANTHROPIC_BASE_URL",
    "MOLECULE_LLM_BASE_URL",
    "MOLECULE_LLM_USAGE_TOKEN",
    "MOLECULE_LLM_USAGE_URL",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
];

/// A name of a variable, label, Secret or key. It cannot be blank.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
pub struct Name(#[schemars(length(min = 1))] String);

impl Name {
    pub(super) fn of(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// Returns the name.
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
    /// The pod belongs to no workspace and is not changed.
    Ignore,
    /// The pod is treated as platform_managed, so omitting the label does not bypass the meter.
    PlatformManaged,
    /// The pod is refused.
    Deny,
}

/// How a workspace's mode is looked up.
#[derive(Clone, PartialEq, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Lookup {
    /// Returns one row whose first column is the mode; no row means that the workspace is unknown, several rows are an
    /// error. Templates refer to further columns by name; these are text.
    #[serde(deserialize_with = "query")]
    pub query: String,
    /// The values of the query's $1, $2, …, in that order.
    pub parameters: Vec<Parameter>,
    /// Timeout of one lookup including connecting, such as `2s` or `500ms`; at most 30s. The API server's timeout can
    /// shorten it.
    #[serde(deserialize_with = "duration")]
    #[schemars(with = "String")]
    pub timeout: Duration,
    /// What happens when the lookup fails.
    pub on_error: OnError,
    /// The channel on which PostgreSQL notifies `converge` of changed rows. The payload is the workspace id, or empty if
    /// any row may have changed.
    pub channel: Option<Name>,
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
            channel: None,
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
        /// The type of the value in the query.
        kind: ParameterType,
    },
    /// The pod's namespace, as text.
    Namespace,
}

/// The type of a label's value in the query.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ParameterType {
    /// A UUID. A value that is not a UUID is not looked up.
    Uuid,
    /// Text.
    Text,
}

/// `{label: KEY, type: uuid | text}` or `{field: namespace}`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RawParameter {
    /// The label whose value is passed.
    label: Option<Name>,
    /// The type of the value in the query.
    #[serde(rename = "type")]
    kind: Option<ParameterType>,
    /// `namespace`: the pod's namespace, as text.
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
    /// The pod is treated as platform_managed, with a warning.
    PlatformManaged,
    /// The pod is refused with status 503.
    Deny,
}

/// What happens to the catalogue's variables on platform_managed, by kind.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CatalogueRules {
    /// Keys and tokens of LLM vendors.
    pub credential: CatalogueRule,
    /// Base URLs, hosts and endpoints of LLM vendors. `ANTHROPIC_BASE_URL` is not removed, only warned about: the
    /// contract keeps it. To remove it, add it to `vendorKeys`.
    pub endpoint: CatalogueRule,
    /// Switches that choose another backend, and their settings.
    pub route: CatalogueRule,
    /// Headers that are added to each call.
    pub header: CatalogueRule,
    /// Configuration with keys or endpoints in it, or the path of such a file.
    pub config: CatalogueRule,
    /// Variables that programs also use for other purposes.
    pub shared: CatalogueRule,
}

impl Default for CatalogueRules {
    fn default() -> Self {
        Self {
            credential: CatalogueRule::Remove,
            endpoint: CatalogueRule::Remove,
            route: CatalogueRule::Remove,
            header: CatalogueRule::Remove,
            config: CatalogueRule::Remove,
            shared: CatalogueRule::Warn,
        }
    }
}

impl CatalogueRules {
    /// Returns the rule of a kind.
    pub(super) const fn rule(&self, kind: Kind) -> CatalogueRule {
        match kind {
            Kind::Credential => self.credential,
            Kind::Endpoint => self.endpoint,
            Kind::Route => self.route,
            Kind::Header => self.header,
            Kind::Config => self.config,
            Kind::Shared => self.shared,
        }
    }
}

/// What happens to variables of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CatalogueRule {
    /// The variables are removed.
    Remove,
    /// The variables are not removed, and a warning names them.
    Warn,
    /// The variables are neither removed nor warned about.
    Ignore,
}

/// A variable that every container of a workspace gets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VariableSetting {
    /// The variable's name.
    pub name: Name,
    /// The value. `{mode}`, `{source}`, `{workspace_id}`, `{namespace}` and `{column NAME}` in it are replaced. If the
    /// column is NULL or the workspace has no row, the variable is left out, and removed if the container has it.
    pub value: String,
    /// The modes in which containers get it. If absent, all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modes: Option<BTreeSet<BillingMode>>,
}

impl VariableSetting {
    fn of_mode(name: &str) -> Self {
        Self {
            name: Name::of(name),
            value: "{mode}".to_owned(),
            modes: None,
        }
    }

    /// Reports whether containers get it in this mode.
    pub(super) fn is_for(&self, mode: BillingMode) -> bool {
        self.modes
            .as_ref()
            .is_none_or(|modes| modes.contains(&mode))
    }
}

/// What happens to removed variables that an envFrom source could set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnvFromRule {
    /// Each variable is hidden by an entry of its name: empty, or with the proxy's value if programs reject an empty one.
    Mask,
    /// The pod is refused.
    Deny,
    /// The variables are allowed.
    Ignore,
}

/// What happens when a new container's own env entries are removed or replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangedEntriesRule {
    /// A warning names the variables.
    Warn,
    /// Nothing.
    Ignore,
}

/// The metered proxy. Values are trimmed; a blank value counts as absent. All values, and the names and keys of references,
/// can have the placeholders of `variables`. A pod is refused if a column is NULL, except for a literal in extraEnv.
#[derive(Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(rename = "Proxy")]
pub struct ProxySettings {
    /// Base URL for clients of OpenAI's API. If absent, platform_managed pods are refused.
    #[serde(deserialize_with = "trimmed")]
    pub base_url: Option<String>,
    /// Base URL for clients of Anthropic's API.
    #[serde(deserialize_with = "trimmed")]
    pub anthropic_base_url: Option<String>,
    /// URL at which a workspace reports or reads its usage.
    #[serde(deserialize_with = "trimmed")]
    pub usage_url: Option<String>,
    /// Token that authenticates workspaces to the proxy. If absent, platform_managed pods are refused.
    #[serde(deserialize_with = "not_blank")]
    pub usage_token: Option<UsageToken>,
    /// Additional env entries. An entry overrides the contract's variable of the same name.
    pub extra_env: Vec<ExtraEnv>,
    /// Names of containers that get no proxy variables. Their mode is set and restricted variables are removed.
    pub exclude_containers: BTreeSet<String>,
}

/// The usage token: a reference, or a literal visible to any client that can read pods or reach the webhook.
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
    /// A key of a Secret in each workspace's own namespace. Containers do not start if it is missing.
    SecretKeyRef(SecretKey),
    /// The token itself, visible to any client that can read pods or reach the webhook.
    Value(String),
}

/// A key of a Secret that must exist.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SecretKey {
    /// The Secret's name. Its placeholders are replaced, so that each workspace can have its own token. A pod for which
    /// the result is not a valid name is refused.
    #[schemars(length(min = 1))]
    name: String,
    /// The key in it, with the same placeholders.
    #[schemars(length(min = 1))]
    key: String,
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

/// An additional env entry for platform_managed containers.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExtraEnv {
    /// The variable's name.
    pub name: Name,
    /// The literal value. If it has the placeholder of a column that is NULL, the entry is left out, and removed if the
    /// container has it.
    pub value: Option<String>,
    /// The source of the value, instead of a literal.
    pub value_from: Option<EnvSource>,
    /// The runtimes that get the entry, ignoring case and surrounding space. If absent, all runtimes get it.
    pub runtimes: Option<Vec<String>>,
}

/// The source of an env entry's value, as in a pod.
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
    /// The object's name. Its placeholders are replaced.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The key in it, with the same placeholders.
    #[schemars(length(min = 1))]
    pub key: String,
    /// Whether the container starts if the key is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

/// A field of the pod.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct FieldSource {
    /// The field's path, such as `metadata.name`.
    pub field_path: Name,
    /// The path's API version; `v1` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<Name>,
}

/// A resource of a container.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ResourceSource {
    /// The resource, such as `limits.memory`.
    pub resource: Name,
    /// The container's name; the entry's own container if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_name: Option<Name>,
    /// A quantity in canonical form; `"0"` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divisor: Option<Name>,
}

impl PolicyFile {
    /// Reads a policy file.
    ///
    /// # Errors
    /// Returns line and column if the text is not YAML or a field is unknown, missing or of the wrong shape.
    /// Returns the field's path if fields contradict each other. No error repeats a value.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        // A file that is empty or has only comments is the default policy.
        let policy: Option<Self> =
            serde_saphyr::from_str(text).map_err(|error| PolicyError::from_yaml(&error))?;
        let policy = policy.unwrap_or_default();
        policy.validate()?;
        Ok(policy)
    }

    /// Returns the JSON schema of the policy file, for editors and the chart.
    #[must_use]
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).into()
    }

    /// Returns warnings about a valid policy, for the operator before a rollout.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self
            .proxy_warnings()
            .into_iter()
            .map(str::to_owned)
            .collect();
        let restricted = || {
            let vendor_keys = self.vendor_keys.iter().map(Name::as_str);
            vendor_keys.chain(catalogue::ROWS.iter().map(|row| row.variable))
        };
        for name in self.allow.iter().map(Name::as_str) {
            if restricted().any(|restricted| restricted == name) {
                continue;
            }
            let distance = |restricted: &&str| strsim::levenshtein(restricted, name);
            let nearest = restricted().min_by_key(distance).unwrap_or_default();
            warnings.push(format!(
                "allow: {name} is neither in vendorKeys nor in the catalogue, so the entry has no effect; the nearest name is {nearest}"
            ));
        }
        warnings
    }

    fn proxy_warnings(&self) -> Vec<&'static str> {
        let mut warnings = Vec::new();
        let Some(proxy) = &self.proxy else {
            return vec!["proxy is absent: every platform_managed pod will be refused"];
        };
        if proxy.base_url.is_none() {
            warnings.push(
                "proxy.baseUrl is absent or blank: every platform_managed pod will be refused",
            );
        }
        let anthropic = proxy.anthropic_base_url.as_deref().unwrap_or_default();
        if anthropic.trim_end_matches('/').ends_with("/v1") {
            warnings.push(
                "proxy.anthropicBaseUrl ends in /v1: clients of Anthropic's API append /v1/messages, so they call /v1/v1/messages; \
                 remove /v1 from it",
            );
        }
        match &proxy.usage_token {
            Some(UsageToken::Reference(_)) => {}
            Some(UsageToken::Literal(_)) => warnings.push(
                "proxy.usageToken is a literal: any client that can read pods or the API server's audit log, or reach the webhook, can read it; \
                 use secretKeyRef",
            ),
            None => {
                warnings.push("proxy.usageToken is absent or blank: every platform_managed pod will be refused");
            }
        }
        let token = match &proxy.usage_token {
            Some(UsageToken::Reference(source)) => Some(source),
            Some(UsageToken::Literal(_)) | None => None,
        };
        let extra = proxy.extra_env.iter();
        let mut sources = extra
            .filter_map(|extra| extra.value_from.as_ref())
            .chain(token);
        if self.unlabelled == Unlabelled::PlatformManaged
            && sources.any(EnvSource::needs_workspace_id)
        {
            warnings.push(
                "unlabelled is platform_managed and a reference of the proxy has {workspace_id}: every pod without the workspace \
                 label will be refused (INVALID_REFERENCE); use {namespace} in the reference, or unlabelled: deny",
            );
        }
        warnings
    }

    /// Reports whether the policy contains the usage token itself.
    #[must_use]
    pub fn has_literal_token(&self) -> bool {
        let proxy = self.proxy.as_ref();
        let token = proxy.and_then(|proxy| proxy.usage_token.as_ref());
        matches!(token, Some(UsageToken::Literal(_)))
    }

    /// Returns each text that may have placeholders, with its field's path.
    fn templates(&self) -> Vec<(String, &str)> {
        let variables = self.variables.iter().enumerate();
        let mut templates: Vec<_> = variables
            .map(|(index, variable)| (format!("variables[{index}]"), variable.value.as_str()))
            .collect();
        let Some(proxy) = &self.proxy else {
            return templates;
        };
        for (field, text) in [
            ("baseUrl", &proxy.base_url),
            ("anthropicBaseUrl", &proxy.anthropic_base_url),
            ("usageUrl", &proxy.usage_url),
        ] {
            templates.extend(text.as_deref().map(|text| (format!("proxy.{field}"), text)));
        }
        let field = "proxy.usageToken";
        match &proxy.usage_token {
            Some(UsageToken::Literal(token)) => templates.push((field.to_owned(), token)),
            Some(UsageToken::Reference(source)) => templates.extend(source.templates(field)),
            None => {}
        }
        for (index, extra) in proxy.extra_env.iter().enumerate() {
            let field = format!("proxy.extraEnv[{index}]");
            let sources = extra.value_from.iter();
            templates.extend(sources.flat_map(|source| source.templates(&field)));
            templates.extend(extra.value.as_deref().map(|value| (field, value)));
        }
        templates
    }

    /// Returns the names of the columns that the query must return besides the mode, sorted.
    #[must_use]
    pub fn columns(&self) -> Vec<String> {
        let templates = self.templates();
        let columns = templates
            .iter()
            .flat_map(|(_, template)| columns_in(template));
        let columns: BTreeSet<&str> = columns.collect();
        columns.into_iter().map(str::to_owned).collect()
    }

    fn validate(&self) -> Result<(), PolicyError> {
        for (field, template) in self.templates() {
            // A nested placeholder is not supported.
            if columns_in(template).any(|name| name.is_empty() || name.contains('{')) {
                return contradiction(field, "has {column NAME} without the name of a column");
            }
        }
        self.validate_variables()?;
        self.proxy
            .as_ref()
            .map_or(Ok(()), |proxy| proxy.validate(&self.variables))
    }

    fn validate_variables(&self) -> Result<(), PolicyError> {
        let is_mode =
            |variable: &VariableSetting| *variable == VariableSetting::of_mode(MODE_VARIABLE);
        if !self.variables.iter().any(is_mode) {
            return contradiction(
                "variables".to_owned(),
                "lacks {name: MOLECULE_LLM_BILLING_MODE, value: '{mode}'}, which audits and checks rely on; add it",
            );
        }
        for (index, variable) in self.variables.iter().enumerate() {
            let field = format!("variables[{index}]");
            if variable.modes.as_ref().is_some_and(BTreeSet::is_empty) {
                return contradiction(
                    field,
                    "has an empty list of modes; leave modes out to mean all",
                );
            }
            if variable.is_for(BillingMode::PlatformManaged)
                && PROXY_VARIABLES.contains(&variable.name.as_str())
            {
                return contradiction(
                    field,
                    "sets a variable that the proxy sets; give it modes: [byok, disabled], or use proxy.extraEnv",
                );
            }
            let shares_a_mode = |other: &VariableSetting| {
                let mut modes = BillingMode::ALL.into_iter();
                other.name == variable.name
                    && modes.any(|mode| other.is_for(mode) && variable.is_for(mode))
            };
            if self.variables.iter().take(index).any(shares_a_mode) {
                return contradiction(
                    field,
                    "sets a variable that an earlier entry sets in the same mode",
                );
            }
        }
        Ok(())
    }
}

fn contradiction(field: String, problem: &'static str) -> Result<(), PolicyError> {
    Err(PolicyError::Contradiction { field, problem })
}

impl ProxySettings {
    fn validate(&self, variables: &[VariableSetting]) -> Result<(), PolicyError> {
        if let Some(UsageToken::Reference(source)) = &self.usage_token
            && !source.is_valid()
        {
            return contradiction("proxy.usageToken".to_owned(), INVALID_REFERENCE);
        }
        for (index, extra) in self.extra_env.iter().enumerate() {
            let field = format!("proxy.extraEnv[{index}]");
            if extra
                .value_from
                .as_ref()
                .is_some_and(|source| !source.is_valid())
            {
                return contradiction(field, INVALID_REFERENCE);
            }
            let is_set = |variable: &VariableSetting| {
                variable.name == extra.name && variable.is_for(BillingMode::PlatformManaged)
            };
            if variables.iter().any(is_set) {
                return contradiction(
                    field,
                    "sets a variable that `variables` sets on every container; remove the entry",
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
            let mut earlier = self.extra_env.iter().take(index);
            if earlier.any(|other| other.name == extra.name && extra.shares_a_runtime_with(other)) {
                return contradiction(
                    field,
                    "sets a variable that an earlier entry sets for the same runtime",
                );
            }
        }
        Ok(())
    }
}

const INVALID_REFERENCE: &str = "refers to a Secret, ConfigMap or key with an invalid name; names are lower-case letters, \
     digits, \"-\" and \".\", and the placeholders are {workspace_id}, {namespace} and {column NAME}";

impl EnvSource {
    /// Returns the key of a Secret or ConfigMap that the source refers to.
    pub(super) const fn reference(&self) -> Option<&OptionalKey> {
        match self {
            Self::SecretKeyRef(reference) | Self::ConfigMapKeyRef(reference) => Some(reference),
            Self::FieldRef(_) | Self::ResourceFieldRef(_) => None,
        }
    }

    /// Returns the texts that may have placeholders, each with the source's field.
    fn templates<'a>(&'a self, field: &str) -> impl Iterator<Item = (String, &'a str)> {
        let reference = self.reference().into_iter();
        let texts =
            reference.flat_map(|reference| [reference.name.as_str(), reference.key.as_str()]);
        texts.map(move |text| (field.to_owned(), text))
    }

    /// Reports whether a reference has the workspace id in its name or key.
    fn needs_workspace_id(&self) -> bool {
        self.templates("")
            .any(|(_, text)| text.contains("{workspace_id}"))
    }

    /// Reports whether a reference is valid for some workspace.
    fn is_valid(&self) -> bool {
        self.reference()
            .is_none_or(|reference| is_valid_reference(&reference.name, &reference.key))
    }
}

impl ExtraEnv {
    /// Reports whether pods of this runtime get the entry.
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

/// The API server's own maximum for a webhook call.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() && duration <= MAX_TIMEOUT => Ok(duration),
        _ => Err(serde::de::Error::custom(
            "expected a duration above zero and at most 30s, such as 2s or 500ms",
        )),
    }
}

/// A reason to reject a policy file.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// The text does not match the policy's fields.
    #[error("line {line}, column {column}: {problem}")]
    Syntax {
        /// From 1; 0 if the YAML parser reports no line.
        line: u64,
        /// From 1.
        column: u64,
        /// The problem, without the value.
        problem: String,
    },
    /// Each field is valid, but the fields contradict each other.
    #[error("{field} {problem}")]
    Contradiction {
        /// The field's path.
        field: String,
        /// The problem and the remedy.
        problem: &'static str,
    },
}

impl PolicyError {
    /// Keeps what the YAML parser reports about names and shapes, and drops what it reports about values. A token may
    /// be in the wrong field or on a neighboring line.
    fn from_yaml(error: &YamlError) -> Self {
        let error = error.without_snippet();
        let problem = match error {
            YamlError::SerdeUnknownField {
                field, expected, ..
            } => {
                let suggestion = nearest_field(field, expected)
                    .map(|nearest| format!(" (did you mean {nearest}?)"))
                    .unwrap_or_default();
                let expected = expected.join(", ");
                format!("unknown field {field:?}{suggestion}; expected one of {expected}")
            }
            YamlError::SerdeMissingField { field, .. } => format!("field {field:?} is missing"),
            YamlError::SerdeUnknownVariant { expected, .. } => {
                format!("expected one of {}", expected.join(", "))
            }
            YamlError::Unexpected { expected, .. } => format!("expected {expected}"),
            YamlError::Message { msg, .. } => msg.clone(),
            YamlError::DuplicateMappingKey { .. } => "duplicate key".to_owned(),
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

/// Returns the field that is most like an unknown one, if at most a third of its letters differ.
fn nearest_field(unknown: &str, fields: &[&'static str]) -> Option<&'static str> {
    let unknown = unknown.to_ascii_lowercase();
    let distance = |field: &str| strsim::damerau_levenshtein(&field.to_ascii_lowercase(), &unknown);
    let fields = fields.iter().map(|&field| (distance(field), field));
    let (distance, nearest) = fields.min_by_key(|(distance, _)| *distance)?;
    (distance * 3 <= nearest.len()).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_file_has_every_field_with_its_default() {
        assert!(PolicyFile::parse(DEFAULT_POLICY).unwrap() == PolicyFile::default());
        assert!(PolicyFile::parse("").unwrap() == PolicyFile::default());
        assert!(PolicyFile::parse("# only a comment\n").unwrap() == PolicyFile::default());
        let schema = PolicyFile::schema();
        for field in schema["properties"].as_object().unwrap().keys() {
            assert!(DEFAULT_POLICY.contains(&format!("{field}:")), "{field}");
        }
        let keys = &schema["properties"]["vendorKeys"]["default"];
        assert_eq!(*keys, serde_json::json!(VENDOR_KEYS));
    }

    #[test]
    fn default_files_commented_proxy_is_valid() {
        let lines: Vec<String> = DEFAULT_POLICY
            .lines()
            .skip_while(|line| !line.starts_with("# proxy:"))
            .map(|line| line.strip_prefix("# ").unwrap_or(line).to_owned())
            .collect();
        let policy = PolicyFile::parse(&lines.join("\n")).unwrap();
        assert_eq!(policy.warnings(), Vec::<String>::new());
        let proxy = policy.proxy.unwrap();
        assert_eq!(proxy.base_url.as_deref(), Some("https://llm.example.com/openai/v1"));
        assert_eq!(proxy.extra_env.len(), 1);
    }

    #[test]
    fn syntax_error_names_the_line_without_the_value() {
        let table = [
            (
                "vendorKey: []",
                1,
                "unknown field \"vendorKey\" (did you mean vendorKeys?); expected one of workspaceLabel, runtimeLabel, ",
            ),
            (
                "lookup:\n  timeout: 2s\n  querry: x",
                3,
                "unknown field \"querry\" (did you mean query?); expected one of query, parameters, ",
            ),
            (
                "proxy:\n  baseURL: u",
                2,
                "unknown field \"baseURL\" (did you mean baseUrl?); expected one of baseUrl, ",
            ),
            ("proxy:\n  address: u", 2, "unknown field \"address\"; expected one of baseUrl, "),
            ("unlabelled: sk-secret", 1, "expected one of ignore, platform_managed, deny"),
            (
                "lookup:\n  timeout: sk-secret",
                2,
                "expected a duration above zero and at most 30s, such as 2s or 500ms",
            ),
            (
                "lookup:\n  timeout: 30s 1ms",
                2,
                "expected a duration above zero and at most 30s, such as 2s or 500ms",
            ),
            (
                "lookup:\n  timeout: 0s",
                2,
                "expected a duration above zero and at most 30s, such as 2s or 500ms",
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
            ("lookup:\n  parameters:\n  - {type: uuid, field: namespace}", 3, "a parameter is "),
            ("proxy:\n  usageToken: sk-secret", 2, "expected one of secretKeyRef, value"),
            ("proxy:\n  usageToken: [sk-secret]", 2, "the value does not have the expected shape"),
            ("proxy:\n  usageToken: {secretKeyRef: {name: x}}", 2, "field \"key\" is missing"),
            ("proxy:\n  baseUrl: {sk-secret: x}", 2, "expected string scalar"),
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
            ("envFrom: mask\nenvFrom: deny", 2, "duplicate key"),
            ("proxy:\n  usageToken: {value: sk-secret\n", 2, "this is not valid YAML"),
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
    fn contradiction_names_the_fields_path() {
        let table = [
            (
                "[{name: MOLECULE_LLM_BILLING_MODE, value: byok}]",
                "proxy.extraEnv[0] sets a variable that `variables` sets",
            ),
            (
                "[{name: MOLECULE_LLM_BILLING_MODE_RESOLVED}]",
                "proxy.extraEnv[0] sets a variable that `variables` sets",
            ),
            (
                "[{name: A}, {name: B, value: b, valueFrom: {fieldRef: {fieldPath: x}}}]",
                "proxy.extraEnv[1] has both",
            ),
            ("[{name: A, runtimes: []}]", "proxy.extraEnv[0] has an empty list of runtimes"),
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
            (
                "[{name: A, valueFrom: {secretKeyRef: {name: 'a-{workspace}', key: k}}}]",
                "proxy.extraEnv[0] refers to a Secret, ConfigMap or key with an invalid name",
            ),
            (
                "[{name: A, valueFrom: {configMapKeyRef: {name: a, key: '{namespace}/b'}}}]",
                "proxy.extraEnv[0] refers to a Secret, ConfigMap or key with an invalid name",
            ),
            (
                "[], usageToken: {secretKeyRef: {name: '', key: k}}",
                "proxy.usageToken refers to a Secret, ConfigMap or key with an invalid name",
            ),
            (
                "[], usageToken: {secretKeyRef: {name: 'A-{workspace_id}', key: k}}",
                "proxy.usageToken refers to a Secret, ConfigMap or key with an invalid name",
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
            "[{name: A, valueFrom: {secretKeyRef: {name: 'a-{workspace_id}.{namespace}', key: 'K_{namespace}'}}}]",
        ] {
            assert!(
                PolicyFile::parse(&format!("proxy: {{extraEnv: {extra_env}}}")).is_ok(),
                "{extra_env}"
            );
        }
    }

    #[test]
    fn variables_that_contradict_are_rejected_with_their_path() {
        let mode = "{name: MOLECULE_LLM_BILLING_MODE, value: '{mode}'}";
        let table = [
            ("[]", "variables lacks {name: MOLECULE_LLM_BILLING_MODE, value: '{mode}'}"),
            ("[{name: MOLECULE_LLM_BILLING_MODE, value: '{source}'}]", "variables lacks "),
            (
                "[{name: MOLECULE_LLM_BILLING_MODE, value: '{mode}', modes: [byok]}]",
                "variables lacks ",
            ),
            ("[MODE, {name: A, value: a, modes: []}]", "variables[1] has an empty list of modes"),
            (
                "[MODE, {name: OPENAI_API_KEY, value: a}]",
                "variables[1] sets a variable that the proxy",
            ),
            (
                "[MODE, {name: A, value: a}, {name: A, value: b, modes: [byok]}]",
                "variables[2] sets a variable that an earlier entry sets in the same mode",
            ),
            ("[MODE, {name: A, value: '{column }'}]", "variables[1] has {column NAME} without"),
            ("[MODE, {name: A, value: '{column}'}]", "variables[1] has {column NAME} without"),
            (
                "[MODE, {name: A, value: '{column {mode}}'}]",
                "variables[1] has {column NAME} without",
            ),
            (
                "[MODE, {name: A, value: a}]\nproxy: {extraEnv: [{name: A, value: b}]}",
                "proxy.extraEnv[0] sets a variable that `variables` sets",
            ),
            ("[MODE]\nproxy: {baseUrl: '{column}'}", "proxy.baseUrl has {column NAME} without"),
            (
                "[MODE]\nproxy: {usageToken: {secretKeyRef: {name: a, key: '{column}'}}}",
                "proxy.usageToken has {column NAME} without",
            ),
        ];
        let parse = |variables: &str| {
            PolicyFile::parse(&format!(
                "variables: {}",
                variables.replace("[MODE", &format!("[{mode}"))
            ))
        };
        for (variables, expected) in table {
            let error = parse(variables).err().unwrap().to_string();
            assert!(error.starts_with(expected), "{variables}: {error}");
        }
        for variables in [
            "[MODE, {name: A, value: a, modes: [byok]}, {name: A, value: b, modes: [disabled]}]",
            "[MODE, {name: OPENAI_API_KEY, value: a, modes: [byok]}]",
            "[MODE, {name: A, value: a, modes: [byok]}]\nproxy: {extraEnv: [{name: A, value: b}]}",
        ] {
            assert!(parse(variables).is_ok(), "{variables}");
        }
    }

    #[test]
    fn columns_come_from_all_templates() {
        let policy = "
            variables:
            - {name: MOLECULE_LLM_BILLING_MODE, value: '{mode}'}
            - {name: PROVIDER, value: '{column provider}/{column provider}'}
            proxy:
              baseUrl: '{column base}'
              anthropicBaseUrl: '{column anthropic}'
              usageUrl: '{column usage}'
              usageToken: {secretKeyRef: {name: '{column secret}', key: '{column key}'}}
              extraEnv:
              - {name: A, value: '{column extra}'}
              - {name: B, valueFrom: {configMapKeyRef: {name: '{column map}', key: k}}}";
        let columns = PolicyFile::parse(policy).unwrap().columns();
        let expected = [
            "anthropic",
            "base",
            "extra",
            "key",
            "map",
            "provider",
            "secret",
            "usage",
        ];
        assert_eq!(columns, expected);
        assert_eq!(PolicyFile::default().columns(), [""; 0]);
    }

    #[test]
    fn warning_names_the_nearest_to_an_unknown_allowed_name() {
        let policy =
            "allow: [OPENAI_API_KEYZ, XAI_API_KEY, CLAUDE_CODE_USE_BEDROK, AWS_ACCESS_KEY_ID]";
        let warnings = PolicyFile::parse(policy).unwrap().warnings();
        let expected = |name: &str, nearest: &str| {
            format!(
                "allow: {name} is neither in vendorKeys nor in the catalogue, so the entry has no effect; the nearest name is {nearest}"
            )
        };
        let expected = [
            expected("CLAUDE_CODE_USE_BEDROK", "CLAUDE_CODE_USE_BEDROCK"),
            expected("OPENAI_API_KEYZ", "OPENAI_API_KEY"),
        ];
        assert_eq!(warnings[1..], expected);
    }

    #[test]
    fn warnings_cover_incomplete_proxy_and_literal_token() {
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
        assert_eq!(warnings(&format!("proxy: {{baseUrl: https://x, {token}}}")), "");
        assert_eq!(
            warnings("proxy: {baseUrl: x, usageToken: {value: ' '}}"),
            "proxy.usageToken is absent or blank"
        );
        assert_eq!(
            warnings("proxy: {baseUrl: x, usageToken: {value: t}}"),
            "proxy.usageToken is a literal"
        );
        let with_anthropic = |url: &str| {
            warnings(&format!("proxy: {{baseUrl: u, anthropicBaseUrl: '{url}', {token}}}"))
        };
        assert_eq!(with_anthropic("https://x/anthropic"), "");
        for url in ["https://x/anthropic/v1", "https://x/v1//"] {
            assert_eq!(with_anthropic(url), "proxy.anthropicBaseUrl ends in /v1");
        }
        let of_workspace =
            "proxy: {baseUrl: u, usageToken: {secretKeyRef: {name: 'x-{workspace_id}', key: y}}}";
        let in_extra = format!(
            "proxy: {{baseUrl: u, {token}, extraEnv: [{{name: A, valueFrom: {{configMapKeyRef: {{name: x, key: 'k-{{workspace_id}}'}}}}}}]}}"
        );
        let of_namespace =
            "proxy: {baseUrl: u, usageToken: {secretKeyRef: {name: 'x-{namespace}', key: y}}}";
        for (proxy, is_refused) in [
            (of_workspace, true),
            (&in_extra, true),
            (of_namespace, false),
        ] {
            let refused = if is_refused {
                "unlabelled is platform_managed and a reference of the proxy has {workspace_id}"
            } else {
                ""
            };
            assert_eq!(warnings(&format!("unlabelled: platform_managed\n{proxy}")), refused);
            assert_eq!(warnings(&format!("unlabelled: deny\n{proxy}")), "");
        }
        let has_token = |text: &str| PolicyFile::parse(text).unwrap().has_literal_token();
        assert!(has_token("proxy: {usageToken: {value: t}}"));
        assert!(!has_token(&format!("proxy: {{{token}}}")) && !has_token(""));
    }
}
