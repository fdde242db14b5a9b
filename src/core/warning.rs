//! What the person who creates a pod should know: which uses of a vendor key are lost, and what stays and could lead
//! past the meter. How a container is planned is plan.rs's business.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::env::{Changes, Variable, references};
use super::pod::Container;
use super::vendor_keys::VendorKeys;

/// The API server shows longer warnings shortened, in bytes.
const MAX_WARNING_BYTES: usize = 256;
/// The API server drops all warnings past 4,096 bytes together.
const MAX_WARNINGS: usize = 15;

/// What a warning is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarningKind {
    /// The mode could not be looked up.
    LookupFailed,
    /// A command, argument or entry refers to a key that goes.
    KeyInUse,
    /// An entry brings a vendor key under another name.
    KeyUnderAnotherName,
    /// A vendor's base URL stays.
    BaseUrl,
}

impl WarningKind {
    /// The kind as metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LookupFailed => "lookup_failed",
            Self::KeyInUse => "key_in_use",
            Self::KeyUnderAnotherName => "key_under_another_name",
            Self::BaseUrl => "base_url",
        }
    }
}

/// One warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// What it is about.
    pub kind: WarningKind,
    /// The sentence, by names and without any value.
    pub text: String,
}

impl Warning {
    pub(super) fn of_failed_lookup() -> Self {
        Self {
            kind: WarningKind::LookupFailed,
            text: "the workspace's billing mode could not be looked up; the pod is treated as platform_managed".to_owned(),
        }
    }
}

/// Says what loses a vendor key that it refers to, and what stays and could lead past the meter.
pub(super) fn of_container(
    vendor_keys: &VendorKeys,
    container: &Container<'_>,
    required: &[Cow<'_, Variable>],
    changes: &Changes<'_>,
    warnings: &mut Vec<Warning>,
) {
    let mut warn = |kind, what: String| {
        let text = format!("container {:?}: {what}", container.name.as_str());
        warnings.push(Warning { kind, text });
    };
    let entries = container.entries();
    let is_required = |name: &str| required.iter().any(|variable| variable.name() == name);
    let comes = |name: &str| changes.add.iter().find(|variable| variable.name() == name);
    // A key goes if its entry is removed, or if a new mask hides it; not if it comes with another value.
    let key_goes = |name: &str| {
        vendor_keys.contains(name)
            && match comes(name) {
                Some(variable) => variable.is_mask(),
                None => {
                    !is_required(name) && entries.iter().any(|entry| entry.name.as_str() == name)
                }
            }
    };
    let mut warn_of_references = |place: &dyn Fn() -> String, text: &str| {
        let keys: BTreeSet<&str> = references(text).filter(|name| key_goes(name)).collect();
        for key in keys {
            let what = format!(
                "{} refers to $({key}), which platform_managed takes away",
                place()
            );
            warn(WarningKind::KeyInUse, what);
        }
    };
    for (field, texts) in [("command", &container.command), ("args", &container.args)] {
        for (index, text) in texts.iter().flat_map(|texts| &texts.0) {
            warn_of_references(&|| format!("{field}[{index}]"), text.as_str());
        }
    }
    let staying = || {
        changes
            .others
            .iter()
            .filter_map(|&index| entries.get(index))
    };
    for entry in staying() {
        if let Some(value) = entry.value.as_ref().filter(|value| value.may_refer) {
            let place = || format!("env {}", entry.name.as_str());
            warn_of_references(&place, value.text.as_str());
        }
    }
    for entry in staying() {
        let name = entry.name.as_str();
        let from = entry.value_from.as_deref();
        let key = from.and_then(|from| {
            from.secret_key_ref
                .as_ref()
                .or(from.config_map_key_ref.as_ref())
        });
        if let Some(key) = key
            .map(|key| key.key.as_str())
            .filter(|key| vendor_keys.contains(key))
        {
            let what = format!("env {name} brings vendor key {key} under another name, and stays");
            warn(WarningKind::KeyUnderAnotherName, what);
        }
        if is_vendor_base_url(vendor_keys, name) {
            let what =
                format!("env {name} stays on platform_managed, and can lead calls past the meter");
            warn(WarningKind::BaseUrl, what);
        }
    }
}

/// Whether a variable tells a vendor's client where to call: `X_BASE_URL` or `X_API_BASE`, where
/// `X_API_KEY` or `X_AUTH_TOKEN` is a vendor key.
fn is_vendor_base_url(vendor_keys: &VendorKeys, name: &str) -> bool {
    let vendor = name
        .strip_suffix("_BASE_URL")
        .or_else(|| name.strip_suffix("_API_BASE"));
    vendor.is_some_and(|vendor| {
        ["_API_KEY", "_AUTH_TOKEN"]
            .iter()
            .any(|suffix| vendor_keys.contains(&format!("{vendor}{suffix}")))
    })
}

/// The warnings as they are answered, within what the API server hands on.
#[must_use]
pub fn answered(warnings: &[Warning]) -> Vec<String> {
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
    use crate::core::plan::{Scope, plan};
    use crate::core::pod::Pod;
    use crate::core::policy::Policy;
    use crate::core::resolution::{BillingMode, Reason, Resolution};

    fn policy(fields: &str, proxy_fields: &str) -> Policy {
        let proxy = "proxy: {baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}";
        Policy::parse(&format!("{fields}\n{proxy}{proxy_fields}}}")).unwrap()
    }

    fn with_container(container: &Value) -> String {
        json!({"metadata": {"annotations": {}}, "spec": {"containers": [container]}}).to_string()
    }

    /// The warnings of a platform_managed pod with this container.
    fn warnings(policy: &Policy, container: &Value) -> Vec<String> {
        let pod = with_container(container);
        let pod = serde_json::from_str(&pod).unwrap();
        let warnings = plan(
            policy,
            "",
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )
        .unwrap()
        .warnings;
        answered(&warnings)
    }

    #[test]
    fn every_use_of_a_key_that_goes_is_warned_of_with_container_place_and_key() {
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
        let place = |place: &str, key: &str| {
            format!(
                "container \"c\": {place} refers to $({key}), which platform_managed takes away"
            )
        };
        // ZAI_API_KEY was never there; OPENAI_API_KEY comes with another value; GLM_API_KEY came by envFrom.
        let expected = [
            place("command[1]", "XAI_API_KEY"),
            place("args[1]", "GLM_API_KEY"),
            place("env A", "XAI_API_KEY"),
            place("env B", "HF_TOKEN"),
        ];
        assert_eq!(warnings(&policy("", ""), &container), expected);
    }

    #[test]
    fn what_stays_and_could_lead_past_the_meter_is_warned_of() {
        let from = |kind: &str, key: &str| json!({kind: {"name": "s", "key": key}});
        let container = json!({"name": "c", "env": [
            {"name": "ALIAS", "valueFrom": from("secretKeyRef", "XAI_API_KEY")},
            {"name": "OTHER", "valueFrom": from("configMapKeyRef", "HF_TOKEN")},
            {"name": "FINE", "valueFrom": from("secretKeyRef", "xai")},
            {"name": "ZAI_API_KEY", "valueFrom": from("secretKeyRef", "ZAI_API_KEY")},
            {"name": "ANTHROPIC_BASE_URL", "value": "https://x"},
            {"name": "XAI_API_BASE", "value": "https://x"},
            {"name": "MY_APP_BASE_URL", "value": "https://x"},
            {"name": "HF_BASE_URL", "value": "https://x"},
        ]});
        let alias = |name: &str, key: &str| {
            format!(
                "container \"c\": env {name} brings vendor key {key} under another name, and stays"
            )
        };
        let base = |name: &str| {
            format!(
                "container \"c\": env {name} stays on platform_managed, and can lead calls past the meter"
            )
        };
        let expected = [
            alias("ALIAS", "XAI_API_KEY"),
            alias("OTHER", "HF_TOKEN"),
            base("ANTHROPIC_BASE_URL"),
            base("XAI_API_BASE"),
        ];
        assert_eq!(warnings(&policy("", ""), &container), expected);
        // Claude Code's own base URL is set by the proxy, so that none stays.
        let pod = json!({"metadata": {"labels": {"molecule.ai/runtime": "claude-code"}}, "spec": {"containers": [
            {"name": "c", "env": [{"name": "ANTHROPIC_BASE_URL", "value": "https://x"}]},
        ]}})
        .to_string();
        let pod = serde_json::from_str(&pod).unwrap();
        let policy = policy("", "");
        let managed = plan(
            &policy,
            "",
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        assert_eq!(managed.warnings, []);
        let byok = plan(
            &policy,
            "",
            Resolution::chosen(BillingMode::Byok),
            &pod,
            Scope::Pod,
        )
        .unwrap();
        assert_eq!(byok.warnings, []);
    }

    #[test]
    fn a_failed_lookup_is_warned_of() {
        let policy = policy("", "");
        let pod = Pod::default();
        let warnings = |reason| {
            let plan = plan(&policy, "", Resolution::fallback(reason), &pod, Scope::Pod).unwrap();
            answered(&plan.warnings)
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
    fn each_warning_says_what_it_is_about() {
        let from = json!({"secretKeyRef": {"name": "s", "key": "XAI_API_KEY"}});
        let container = json!({"name": "c", "args": ["$(HF_TOKEN)"], "env": [
            {"name": "HF_TOKEN", "value": "x"},
            {"name": "ALIAS", "valueFrom": from},
            {"name": "XAI_BASE_URL", "value": "https://x"},
        ]});
        let text = with_container(&container);
        let pod = serde_json::from_str(&text).unwrap();
        let policy = policy("", "");
        let resolution = Resolution::fallback(Reason::LookupError);
        let plan = plan(&policy, "", resolution, &pod, Scope::Pod).unwrap();
        let kinds: Vec<&str> = plan.warnings.iter().map(|one| one.kind.as_str()).collect();
        let expected = [
            "lookup_failed",
            "key_in_use",
            "key_under_another_name",
            "base_url",
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn warnings_stay_within_what_the_api_server_hands_on() {
        let alias = |index: usize| json!({"name": format!("A{index}"), "valueFrom": {"secretKeyRef": {"name": "s", "key": "HF_TOKEN"}}});
        let container =
            |count| json!({"name": "c", "env": (0..count).map(alias).collect::<Vec<_>>()});
        let policy = policy("", "");
        assert_eq!(warnings(&policy, &container(15)).len(), 15);
        let many = warnings(&policy, &container(16));
        assert_eq!(many.len(), 15);
        assert!(many[13].contains("env A13 "), "{}", many[13]);
        assert_eq!(
            many[14],
            "and 2 more warnings; llm-billing-webhook review shows them all"
        );

        // 256 bytes fit, 257 do not; a cut never splits a letter.
        let of_length = |name: &str| {
            let container = json!({"name": name, "env": [{"name": "XAI_BASE_URL"}]});
            warnings(&policy, &container).remove(0)
        };
        let rest = of_length("").len();
        let fits = of_length(&"x".repeat(256 - rest));
        assert_eq!((fits.len(), fits.ends_with("the meter")), (256, true));
        let cut = of_length(&"x".repeat(257 - rest));
        assert_eq!((cut.len(), cut.ends_with("the m…")), (256, true), "{cut}");
        assert!(of_length(&"é".repeat(300)).len() <= 256);
    }
}
