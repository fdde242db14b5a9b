//! Warnings for the user who creates a pod: changed entries, references to removed variables, variables that could
//! bypass the meter, and missing credentials. plan.rs plans the containers.

use std::collections::BTreeSet;

use super::catalogue::{self, Kind};
use super::env::{Changes, Required, references};
use super::pod::{Container, Text, UnknownField, ValueFrom};
use super::resolution::BillingMode;
use super::restrictions::{Class, Restriction, Restrictions};

/// The API server truncates longer warnings, in bytes.
const MAX_WARNING_BYTES: usize = 256;
/// The API server drops warnings beyond 4,096 bytes in total.
const MAX_WARNINGS: usize = 15;

/// What a warning is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarningKind {
    /// The lookup of the mode failed.
    LookupFailed,
    /// A container is added to a pod that was created as platform_managed, and whose workspace has another mode.
    CreatedAs,
    /// Entries of the pod's author are removed or replaced.
    ChangedEntries,
    /// A command, argument or env entry refers to a removed variable.
    KeyInUse,
    /// An env entry exposes a vendor key or a credential of the catalogue under another name.
    KeyUnderAnotherName,
    /// An env entry or an envFrom source has a kind of source that this version does not know.
    UnknownSource,
    /// A vendor's base URL is not removed.
    BaseUrl,
    /// A variable of the catalogue is not removed.
    Catalogue,
    /// Nothing in a byok pod could bring a vendor's credential.
    MissingByokCredential,
}

impl WarningKind {
    /// Returns the kind as metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LookupFailed => "lookup_failed",
            Self::CreatedAs => "created_as",
            Self::ChangedEntries => "changed_entries",
            Self::KeyInUse => "key_in_use",
            Self::KeyUnderAnotherName => "key_under_another_name",
            Self::UnknownSource => "unknown_source",
            Self::BaseUrl => "base_url",
            Self::Catalogue => "catalogue",
            Self::MissingByokCredential => "missing_byok_credential",
        }
    }
}

/// One warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// What the warning is about.
    pub kind: WarningKind,
    /// The message: names only, no values.
    pub text: String,
}

impl Warning {
    pub(super) fn lookup_failed() -> Self {
        Self {
            kind: WarningKind::LookupFailed,
            text: "the workspace's billing mode could not be looked up; the pod is treated as platform_managed".to_owned(),
        }
    }

    pub(super) fn created_as() -> Self {
        Self {
            kind: WarningKind::CreatedAs,
            text: "the pod was created as platform_managed, and its workspace or the workspace's mode has changed since; \
                   the new container is platform_managed; create the pod again to change its mode"
                .to_owned(),
        }
    }

    pub(super) fn missing_byok_credential() -> Self {
        Self {
            kind: WarningKind::MissingByokCredential,
            text: "MISSING_BYOK_CREDENTIAL: the workspace is byok and the pod has no variable of a known credential, no Secret, \
                   ConfigMap or volume; add the workspace's own key by secretKeyRef, unless its image or identity brings one"
                .to_owned(),
        }
    }
}

/// The variables whose entries are removed or replaced, in any container of a pod.
#[derive(Default)]
pub(super) struct ChangedEntries<'a> {
    removed: Vec<&'a str>,
    replaced: Vec<&'a str>,
}

impl<'a> ChangedEntries<'a> {
    pub(super) fn add(
        &mut self,
        container: &'a Container<'_>,
        required: &Required<'_>,
        changes: &Changes<'_>,
    ) {
        let entries = container.entries();
        for entry in changes
            .remove
            .iter()
            .filter_map(|&index| entries.get(index))
        {
            let name = entry.name.as_str();
            // A mask leaves nothing of the entry, so it counts as removed.
            let mut set = required.variables.iter();
            let names = if set.any(|variable| variable.name() == name) {
                &mut self.replaced
            } else {
                &mut self.removed
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }

    /// Returns a warning that names the variables, if there are any.
    pub(super) fn warning(self, mode: BillingMode) -> Option<Warning> {
        let part = |verb: &str, names: Vec<&str>| {
            let mut part = verb.to_owned();
            // Both lists fit into a warning.
            summarize_names(&mut part, 4, names.iter().copied());
            (!names.is_empty()).then_some(part)
        };
        let parts = [
            part("removes env ", self.removed),
            part("replaces env ", self.replaced),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| Warning {
            kind: WarningKind::ChangedEntries,
            text: format!("{} {}", mode.as_str(), parts.join("; ")),
        })
    }
}

/// Appends the first names to a message, at most `shown`, and counts the others.
pub(super) fn summarize_names<'a>(
    message: &mut String,
    shown: usize,
    names: impl Iterator<Item = &'a str>,
) {
    let mut names = names.fuse();
    for (index, name) in names.by_ref().take(shown).enumerate() {
        if index > 0 {
            message.push_str(", ");
        }
        message.push_str(name);
    }
    let more = names.count();
    if more > 0 {
        message.push_str(&format!(" and {more} more"));
    }
}

/// Adds warnings about a container's references to removed variables, and its variables that could bypass the meter.
pub(super) fn warn_about_container(
    restrictions: &Restrictions,
    container: &Container<'_>,
    required: &Required<'_>,
    changes: &Changes<'_>,
    warnings: &mut Vec<Warning>,
) {
    let mut warn = |kind, problem: String| {
        let text = format!("container {:?}: {problem}", container.name.as_str());
        warnings.push(Warning { kind, text });
    };
    let entries = container.entries();
    let added = |name: &str| changes.add.iter().find(|variable| variable.name() == name);
    // A variable is removed if its entry is removed or an empty mask hides it, but not if it gets another value.
    let is_removed = |name: &str| {
        restrictions.removes(name)
            && match added(name) {
                Some(variable) => variable.value().is_empty(),
                None => {
                    !required.contains(name)
                        && entries.iter().any(|entry| entry.name.as_str() == name)
                }
            }
    };
    let mut warn_about_references = |location: &dyn Fn() -> String, text: &str| {
        let keys: BTreeSet<&str> = references(text).filter(|name| is_removed(name)).collect();
        for key in keys {
            let problem =
                format!("{} refers to $({key}), which platform_managed removes", location());
            warn(WarningKind::KeyInUse, problem);
        }
    };
    for (field, texts) in [("command", &container.command), ("args", &container.args)] {
        for (index, text) in texts.iter().flatten().enumerate() {
            warn_about_references(&|| format!("{field}[{index}]"), text.as_str());
        }
    }
    let remaining = || {
        changes
            .others
            .iter()
            .filter_map(|&index| entries.get(index))
    };
    for entry in remaining() {
        // Values are most of a large pod, and few contain a dollar sign.
        let has_dollar = |value: &&Text<'_>| value.as_str().as_bytes().contains(&b'$');
        if let Some(value) = entry.value.as_ref().filter(has_dollar) {
            let location = || format!("env {}", entry.name.as_str());
            warn_about_references(&location, value.as_str());
        }
    }
    // A field that is unknown here can bring any variable, so it matters wherever variables are restricted.
    let unknown_source = |location: &dyn Fn() -> String, field: &UnknownField<'_>| {
        let field = field.name().filter(|_| !restrictions.all().is_empty())?;
        let location = location();
        Some(format!(
            "{location} has the field {field:?}, unknown to this version; it can bring a vendor key"
        ))
    };
    for (index, source) in container.env_from.iter().flatten().enumerate() {
        if let Some(problem) = unknown_source(&|| format!("envFrom[{index}]"), &source.unknown) {
            warn(WarningKind::UnknownSource, problem);
        }
    }
    for entry in remaining() {
        let name = entry.name.as_str();
        let from = entry.value_from.as_deref();
        let key = from.and_then(ValueFrom::key).filter(|key| {
            let restriction = restrictions.find(key).map(|(_, restriction)| restriction);
            restriction.is_some_and(Restriction::removes_credential)
        });
        let unknown = from.map(|from| &from.unknown);
        if let Some(problem) =
            unknown.and_then(|field| unknown_source(&|| format!("env {name}"), field))
        {
            warn(WarningKind::UnknownSource, problem);
        }
        if let Some(key) = key {
            let problem =
                format!("env {name} exposes vendor key {key} under another name; not removed");
            warn(WarningKind::KeyUnderAnotherName, problem);
        }
        let class = restrictions
            .find(name)
            .map(|(_, restriction)| restriction.class);
        let kind = match class {
            Some(Class::Catalogue(Kind::Endpoint)) => WarningKind::BaseUrl,
            Some(Class::Catalogue(_)) => WarningKind::Catalogue,
            None if is_unlisted_base_url(restrictions, name) => WarningKind::BaseUrl,
            Some(Class::VendorKey) | None => continue,
        };
        warn(kind, format!("env {name} can make calls bypass the meter; not removed"));
    }
}

/// Reports whether a variable is a vendor's base URL for which the policy has no rule: `X_BASE_URL` or `X_API_BASE`,
/// where `X_API_KEY` or `X_AUTH_TOKEN` is removed.
fn is_unlisted_base_url(restrictions: &Restrictions, name: &str) -> bool {
    let vendor = name
        .strip_suffix("_BASE_URL")
        .or_else(|| name.strip_suffix("_API_BASE"));
    vendor.is_some_and(|vendor| {
        ["_API_KEY", "_AUTH_TOKEN"]
            .iter()
            .any(|suffix| restrictions.removes(&format!("{vendor}{suffix}")))
            && catalogue::find(name).is_none()
            && !restrictions.allows(name)
    })
}

/// Returns the warnings' texts, truncated to the API server's limits.
#[must_use]
pub fn within_limits(warnings: &[Warning]) -> Vec<String> {
    let mut warnings: Vec<String> = warnings.iter().map(|one| one.text.clone()).collect();
    let more = warnings.len().saturating_sub(MAX_WARNINGS);
    if more > 0 {
        warnings.truncate(MAX_WARNINGS - 1);
        warnings.push(format!(
            "and {} more warnings; llm-billing-webhook review shows them all",
            more + 1
        ));
    }
    for warning in &mut warnings {
        if warning.len() > MAX_WARNING_BYTES {
            warning.truncate(warning.floor_char_boundary(MAX_WARNING_BYTES - "…".len()));
            warning.push('…');
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::placeholders::Workspace;
    use crate::core::plan::{Scope, plan};
    use crate::core::pod::Pod;
    use crate::core::policy::Policy;
    use crate::core::resolution::{BillingMode, Reason, Resolution};

    /// Parses a policy without warnings about changed entries, which have a test of their own.
    fn policy(fields: &str, proxy_fields: &str) -> Policy {
        let fields = format!("changedEntries: ignore\n{fields}");
        let proxy = "proxy: {baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}";
        Policy::parse(&format!("{fields}\n{proxy}{proxy_fields}}}")).unwrap()
    }

    fn with_container(container: &Value) -> String {
        json!({"metadata": {"annotations": {}}, "spec": {"containers": [container]}}).to_string()
    }

    /// Returns the warnings about a platform_managed pod with this container.
    fn warnings(policy: &Policy, container: &Value) -> Vec<String> {
        let pod = with_container(container);
        let pod = serde_json::from_str(&pod).unwrap();
        let warnings = plan(
            policy,
            Workspace::default(),
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )
        .unwrap()
        .warnings;
        within_limits(&warnings)
    }

    #[test]
    fn warning_names_the_authors_entries_that_change() {
        let env = json!([
            {"name": "XAI_API_KEY", "value": "x"}, {"name": "XAI_API_KEY", "value": "y"},
            {"name": "OPENAI_API_KEY", "value": "o"}, {"name": "OPENAI_BASE_URL", "value": "u"},
            {"name": "MOLECULE_LLM_BILLING_MODE", "value": "wrong"}, {"name": "KEEP", "value": "k"},
        ]);
        let sources = json!([{"prefix": "HF_", "secretRef": {"name": "s"}}]);
        let hidden =
            json!([{"name": "HF_TOKEN", "value": "h"}, {"name": "OPENAI_API_KEY", "value": "o"}]);
        let pod = json!({"spec": {
            "initContainers": [{"name": "i", "env": env}],
            "containers": [{"name": "c", "env": hidden, "envFrom": sources}],
            "ephemeralContainers": [{"name": "e", "env": env}],
        }})
        .to_string();
        let pod = serde_json::from_str(&pod).unwrap();
        let warnings = |fields: &str, mode, scope| {
            let proxy = "proxy: {baseUrl: u, usageToken: {value: t}}";
            let policy = Policy::parse(&format!("{fields}\n{proxy}")).unwrap();
            let plan =
                plan(&policy, Workspace::default(), Resolution::chosen(mode), &pod, scope).unwrap();
            let warnings = plan.warnings.iter();
            let changed = warnings.filter(|one| one.kind == WarningKind::ChangedEntries);
            changed.map(|one| one.text.clone()).collect::<Vec<_>>()
        };
        let changes = |mode: &str, changes: &str| format!("{mode} {changes}");
        let (managed, byok) = (BillingMode::PlatformManaged, BillingMode::Byok);
        assert_eq!(
            warnings("", managed, Scope::Pod),
            [changes(
                "platform_managed",
                "removes env XAI_API_KEY, HF_TOKEN; replaces env OPENAI_API_KEY, MOLECULE_LLM_BILLING_MODE"
            )]
        );
        let mode_variable = [changes("byok", "replaces env MOLECULE_LLM_BILLING_MODE")];
        assert_eq!(warnings("", byok, Scope::Pod), mode_variable);
        assert_eq!(warnings("", byok, Scope::NewEphemeralContainers(None)), mode_variable);
        assert_eq!(warnings("", managed, Scope::Running), Vec::<String>::new());
        let ignored = warnings("changedEntries: ignore", managed, Scope::Pod);
        assert_eq!(ignored, Vec::<String>::new());
    }

    #[test]
    fn warning_names_each_reference_to_a_removed_key() {
        let container = json!({
            "name": "c",
            "command": ["sh", "$(XAI_API_KEY) $(XAI_API_KEY) $(ZAI_API_KEY)"],
            "args": ["$(OPENAI_API_KEY) $$(XAI_API_KEY) $(KEEP)", "$(GLM_API_KEY)"],
            "envFrom": [{"prefix": "GLM_"}],
            "env": [
                {"name": "XAI_API_KEY", "value": "x"},
                {"name": "OPENAI_API_KEY", "value": "o"},
                {"name": "A", "value": "Bearer $(XAI_API_KEY) $"},
                {"name": "B", "value": "$(HF_TOKEN)"},
                {"name": "HF_TOKEN", "valueFrom": {"fieldRef": {"fieldPath": "x"}}},
                {"name": "MOLECULE_LLM_BASE_URL", "value": "$(XAI_API_KEY)"},
                {"name": "KIMI_API_KEY", "value": "$(XAI_API_KEY)"},
            ],
        });
        let warning = |location: &str, key: &str| {
            format!(
                "container \"c\": {location} refers to $({key}), which platform_managed removes"
            )
        };
        // ZAI_API_KEY is never set, OPENAI_API_KEY gets another value, and envFrom could set GLM_API_KEY.
        let expected = [
            warning("command[1]", "XAI_API_KEY"),
            warning("args[1]", "GLM_API_KEY"),
            warning("env A", "XAI_API_KEY"),
            warning("env B", "HF_TOKEN"),
        ];
        assert_eq!(warnings(&policy("", ""), &container), expected);
    }

    #[test]
    fn warning_names_variables_that_could_bypass_the_meter() {
        let from = |kind: &str, key: &str| json!({kind: {"name": "s", "key": key}});
        let container = json!({"name": "c", "env": [
            {"name": "ALIAS", "valueFrom": from("secretKeyRef", "XAI_API_KEY")},
            {"name": "OTHER", "valueFrom": from("configMapKeyRef", "HF_TOKEN")},
            {"name": "FILE", "valueFrom": from("fileKeyRef", "NOUS_API_KEY")},
            {"name": "FINE", "valueFrom": from("secretKeyRef", "xai")},
            {"name": "ZAI_API_KEY", "valueFrom": from("secretKeyRef", "ZAI_API_KEY")},
            {"name": "ANTHROPIC_BASE_URL", "value": "https://x"},
            {"name": "ZAI_API_BASE", "value": "https://x"},
            {"name": "MY_APP_BASE_URL", "value": "https://x"},
            {"name": "HF_BASE_URL", "value": "https://x"},
            {"name": "ACME_BASE_URL", "value": "https://x"},
            {"name": "AWS_ACCESS_KEY_ID", "value": "x"},
            {"name": "CREDENTIAL", "valueFrom": from("secretKeyRef", "AWS_BEARER_TOKEN_BEDROCK")},
            {"name": "ROUTE", "valueFrom": from("secretKeyRef", "CLAUDE_CODE_USE_BEDROCK")},
        ]});
        let alias = |name: &str, key: &str| {
            format!(
                "container \"c\": env {name} exposes vendor key {key} under another name; not removed"
            )
        };
        let base = |name: &str| {
            format!("container \"c\": env {name} can make calls bypass the meter; not removed")
        };
        let expected = [
            alias("ALIAS", "XAI_API_KEY"),
            alias("OTHER", "HF_TOKEN"),
            alias("FILE", "NOUS_API_KEY"),
            base("ANTHROPIC_BASE_URL"),
            base("ZAI_API_BASE"),
            base("AWS_ACCESS_KEY_ID"),
            alias("CREDENTIAL", "AWS_BEARER_TOKEN_BEDROCK"),
        ];
        assert_eq!(warnings(&policy("", ""), &container), expected);
        let quiet =
            policy("catalogue: {endpoint: ignore, shared: ignore}\nallow: [ZAI_API_BASE]", "");
        let expected = [
            alias("ALIAS", "XAI_API_KEY"),
            alias("OTHER", "HF_TOKEN"),
            alias("FILE", "NOUS_API_KEY"),
            alias("CREDENTIAL", "AWS_BEARER_TOKEN_BEDROCK"),
        ];
        assert_eq!(warnings(&quiet, &container), expected);
        // For Claude Code, the proxy replaces ANTHROPIC_BASE_URL.
        let pod = json!({"metadata": {"labels": {"molecule.ai/runtime": "claude-code"}}, "spec": {"containers": [
            {"name": "c", "env": [{"name": "ANTHROPIC_BASE_URL", "value": "https://x"}]},
        ]}})
        .to_string();
        let pod = serde_json::from_str(&pod).unwrap();
        let policy = policy("", "");
        let managed = plan(
            &policy,
            Workspace::default(),
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        assert_eq!(managed.warnings, []);
        let byok = plan(
            &policy,
            Workspace::default(),
            Resolution::chosen(BillingMode::Byok),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        assert_eq!(byok.warnings, []);
    }

    #[test]
    fn unknown_source_of_env_gets_a_warning_on_platform_managed() {
        let sources = json!([
            {"prefix": "A_", "secretRef": {"name": "s"}},
            {"prefix": "A_", "laterRef": {"name": "x"}},
            {"prefix": "A_", "configMapRef": {"name": "m"}, "laterRef": null},
        ]);
        let from = |source: Value| json!({"name": "A", "valueFrom": source});
        let container = json!({"name": "c", "envFrom": sources, "env": [
            from(json!({"laterKeyRef": {"key": "k"}, "other": [1]})),
            from(json!({"fieldRef": {"fieldPath": "metadata.name"}, "laterKeyRef": null})),
            from(json!({"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k", "optional": true}})),
        ]});
        let warning = |location: &str, field: &str| {
            format!(
                "container \"c\": {location} has the field {field:?}, unknown to this version; it can bring a vendor key"
            )
        };
        let expected = [
            warning("envFrom[1]", "laterRef"),
            warning("env A", "laterKeyRef"),
        ];
        assert_eq!(warnings(&policy("", ""), &container), expected);
        let all = "catalogue: {credential: ignore, endpoint: ignore, route: ignore, header: ignore, config: ignore, shared: ignore}";
        let unrestricted = policy(&format!("vendorKeys: []\n{all}"), "");
        assert_eq!(warnings(&unrestricted, &container), Vec::<String>::new());
        let text = with_container(&container);
        let pod = serde_json::from_str(&text).unwrap();
        let (restricted, byok) = (policy("", ""), Resolution::chosen(BillingMode::Byok));
        let plan = plan(&restricted, Workspace::default(), byok, &pod, Scope::Pod).unwrap();
        assert_eq!(plan.warnings, []);
    }

    #[test]
    fn failed_lookup_adds_a_warning() {
        let policy = policy("", "");
        let pod = Pod::default();
        let warnings = |reason| {
            let plan =
                plan(&policy, Workspace::default(), Resolution::fallback(reason), &pod, Scope::Pod)
                    .unwrap();
            within_limits(&plan.warnings)
        };
        assert_eq!(
            warnings(Reason::LookupError),
            [
                "the workspace's billing mode could not be looked up; the pod is treated as platform_managed"
            ]
        );
        assert_eq!(warnings(Reason::NoOverride), Vec::<String>::new());
    }

    #[test]
    fn each_warning_has_its_kind() {
        let from = json!({"secretKeyRef": {"name": "s", "key": "XAI_API_KEY"}});
        let sources = json!([{"prefix": "APP_", "laterRef": {"name": "x"}}]);
        let container = json!({"name": "c", "args": ["$(HF_TOKEN)"], "envFrom": sources, "env": [
            {"name": "HF_TOKEN", "value": "x"},
            {"name": "ALIAS", "valueFrom": from},
            {"name": "ZAI_API_BASE", "value": "https://x"},
        ]});
        let text = with_container(&container);
        let pod = serde_json::from_str(&text).unwrap();
        let policy = Policy::parse("proxy: {baseUrl: u, usageToken: {value: t}}").unwrap();
        let resolution = Resolution::fallback(Reason::LookupError);
        let plan = plan(&policy, Workspace::default(), resolution, &pod, Scope::Pod).unwrap();
        let kinds: Vec<&str> = plan.warnings.iter().map(|one| one.kind.as_str()).collect();
        let expected = [
            "lookup_failed",
            "changed_entries",
            "key_in_use",
            "unknown_source",
            "key_under_another_name",
            "base_url",
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn warnings_stay_within_the_api_servers_limits() {
        let alias = |index: usize| json!({"name": format!("A{index}"), "valueFrom": {"secretKeyRef": {"name": "s", "key": "HF_TOKEN"}}});
        let container =
            |count| json!({"name": "c", "env": (0..count).map(alias).collect::<Vec<_>>()});
        let policy = policy("", "");
        assert_eq!(warnings(&policy, &container(15)).len(), 15);
        let many = warnings(&policy, &container(16));
        assert_eq!(many.len(), 15);
        assert!(many[13].contains("env A13 "), "{}", many[13]);
        assert_eq!(many[14], "and 2 more warnings; llm-billing-webhook review shows them all");

        // 256 bytes fit, 257 do not; truncation never splits a character.
        let of_length = |name: &str| {
            let container = json!({"name": name, "env": [{"name": "ZAI_API_BASE"}]});
            warnings(&policy, &container).remove(0)
        };
        let rest = of_length("").len();
        let fits = of_length(&"x".repeat(256 - rest));
        assert_eq!((fits.len(), fits.ends_with("removed")), (256, true));
        let truncated = of_length(&"x".repeat(257 - rest));
        assert_eq!((truncated.len(), truncated.ends_with("rem…")), (256, true), "{truncated}");
        assert!(of_length(&"é".repeat(300)).len() <= 256);
    }
}
