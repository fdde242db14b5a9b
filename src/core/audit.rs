//! The findings of an audit in one running pod, derived from the webhook's own decision about it. Listing and evicting
//! pods is outside the core.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::decision::{Decision, Outcome};
use super::plan::{ContainerPlan, Plan};
use super::pod::{Container, ContainerList, Pod, Text};
use super::policy::Policy;
use super::resolution::{BillingMode, MODE_VARIABLE, RESOLVED_VARIABLE, Resolution, Source};
use super::restrictions::Class;

/// A reason why a running pod is out of sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// A container's mode variables do not match the database.
    WrongMode,
    /// A container's other variables of the policy's `variables` do not match the database.
    WrongVariable,
    /// A platform_managed container has a vendor key that the proxy did not set, or its envFrom could set one.
    VendorKey,
    /// The same for another variable that the catalogue's rules remove.
    BypassVariable,
    /// A platform_managed container lacks a proxy variable or has another value for it.
    ProxyVariable,
    /// The pod was created with the fallback mode, and the database now has another mode.
    FallbackInForce,
    /// The pod has none of the webhook's annotations.
    NotSeen,
    /// The pod has one of the webhook's annotations, and no workspace label any more.
    LabelChanged,
    /// The webhook would refuse the pod.
    Refused,
}

impl Finding {
    /// Every finding.
    pub const ALL: [Self; 9] = [
        Self::WrongMode,
        Self::WrongVariable,
        Self::VendorKey,
        Self::BypassVariable,
        Self::ProxyVariable,
        Self::FallbackInForce,
        Self::NotSeen,
        Self::LabelChanged,
        Self::Refused,
    ];

    /// Returns the finding as tables and metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WrongMode => "wrong_mode",
            Self::WrongVariable => "wrong_variable",
            Self::VendorKey => "vendor_key",
            Self::BypassVariable => "bypass_variable",
            Self::ProxyVariable => "proxy_variable",
            Self::FallbackInForce => "fallback_in_force",
            Self::NotSeen => "not_seen",
            Self::LabelChanged => "label_changed",
            Self::Refused => "refused",
        }
    }
}

/// The audit's result for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The mode in the containers' env: `-` if there is none, separated by commas if there are several.
    pub mode_in_env: String,
    /// Empty if the pod is in sync.
    pub findings: BTreeSet<Finding>,
    /// Details of the findings: names only, no values.
    pub details: Vec<String>,
    /// The Secrets that the proxy variables refer to, each as `NAME (key KEY)`.
    pub secrets: BTreeSet<String>,
}

/// Returns the verdict on a running pod, given the webhook's decision about it.
#[must_use]
pub fn audit(policy: &Policy, decision: &Decision<'_>, pod: &Pod<'_>) -> Verdict {
    let mut findings = BTreeSet::new();
    let mut details = Vec::new();
    if let Some(plan) = &decision.plan {
        let mode = decision.resolution.map(|resolution| resolution.mode);
        add_env_findings(plan, policy, mode, &mut findings, &mut details);
    }
    if let Some(refusal) = decision.outcome.refusal() {
        findings.insert(Finding::Refused);
        details.push(refusal.to_string());
    }
    if decision.outcome == Outcome::NotAWorkspace && pod.is_annotated() {
        findings.insert(Finding::LabelChanged);
        details.push(format!("no label {:?}", policy.workspace_label.as_str()));
    }
    if let Some(resolution) = decision.resolution {
        add_annotation_findings(resolution, pod, &mut findings);
    }
    Verdict {
        mode_in_env: mode_in_env(pod),
        findings,
        details,
        secrets: decision
            .plan
            .as_ref()
            .map(Plan::secrets)
            .unwrap_or_default(),
    }
}

fn add_annotation_findings(
    resolution: Resolution,
    pod: &Pod<'_>,
    findings: &mut BTreeSet<Finding>,
) {
    let annotations = pod.annotations();
    let mode = annotations.and_then(|annotations| annotations.mode.as_ref());
    let source = annotations.and_then(|annotations| annotations.source.as_ref());
    match (mode.map(Text::as_str), source.map(Text::as_str)) {
        (None, None) => {
            findings.insert(Finding::NotSeen);
        }
        (mode, Some(source))
            if source == Source::ConstantFallback.as_str()
                && mode != Some(resolution.mode.as_str()) =>
        {
            findings.insert(Finding::FallbackInForce);
        }
        _ => {}
    }
}

fn add_env_findings(
    plan: &Plan<'_>,
    policy: &Policy,
    mode: Option<BillingMode>,
    findings: &mut BTreeSet<Finding>,
    details: &mut Vec<String>,
) {
    for container in &plan.containers {
        let variables: Vec<&str> = container.variables().collect();
        findings.extend(
            variables
                .iter()
                .map(|name| finding(container, name, policy, mode)),
        );
        let name = container.container.name.as_str();
        details.push(format!("container {name:?}: {}", variables.join(", ")));
    }
}

/// Returns the finding for a variable that is out of sync.
fn finding(
    plan: &ContainerPlan<'_>,
    name: &str,
    policy: &Policy,
    mode: Option<BillingMode>,
) -> Finding {
    if [MODE_VARIABLE, RESOLVED_VARIABLE].contains(&name) {
        return Finding::WrongMode;
    }
    if mode.is_some_and(|mode| policy.variables.contains(mode, name)) {
        return Finding::WrongVariable;
    }
    let mut entries = plan.container.entries().iter();
    let is_present = entries.any(|entry| entry.name.as_str() == name);
    let is_masked = plan
        .changes
        .add
        .iter()
        .any(|variable| variable.name() == name && variable.is_mask());
    let restriction = policy.restrictions.find(name);
    let removed = restriction.filter(|(_, restriction)| restriction.is_removed);
    match removed.filter(|_| is_present || is_masked) {
        Some((_, restriction)) if restriction.class == Class::VendorKey => Finding::VendorKey,
        Some(_) => Finding::BypassVariable,
        None => Finding::ProxyVariable,
    }
}

/// Returns the modes in the containers' env. Other values are reported as `other`.
fn mode_in_env(pod: &Pod<'_>) -> String {
    let lists = [
        ContainerList::Init,
        ContainerList::Main,
        ContainerList::Ephemeral,
    ];
    let entries = lists
        .into_iter()
        .flat_map(|list| pod.containers(list))
        .flat_map(Container::entries)
        .filter(|entry| entry.name.as_str() == MODE_VARIABLE);
    let modes: BTreeSet<&str> = entries
        .map(|entry| {
            let value = entry.value.as_ref().map_or("", Text::as_str);
            BillingMode::from_column(value).map_or("other", BillingMode::as_str)
        })
        .collect();
    if modes.is_empty() {
        return "-".to_owned();
    }
    modes.into_iter().collect::<Vec<_>>().join(",")
}

/// The result of a sweep.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The number of pods audited.
    pub audited: usize,
    /// The number of pods with findings.
    pub drifted: usize,
    /// The pods that could not be audited, each with the reason.
    pub not_audited: Vec<String>,
    /// The number of pods by the database's mode and by finding. A pod counts once for each of its findings.
    pub by_finding: BTreeMap<(BillingMode, Finding), usize>,
}

impl Report {
    /// Counts one audited pod.
    pub fn count(&mut self, mode: BillingMode, findings: &[Finding]) {
        self.audited += 1;
        self.drifted += usize::from(!findings.is_empty());
        for finding in findings {
            *self.by_finding.entry((mode, *finding)).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::pod::{MODE_ANNOTATION, SOURCE_ANNOTATION};
    use super::*;
    use crate::core::decision::{PodTarget, begin_pod};
    use crate::core::plan::Scope;
    use crate::core::resolution::LookupOutcome;

    const PROXY: &str = "proxy: {baseUrl: u, usageToken: {value: t}}";

    fn verdict(policy: &str, lookup: &LookupOutcome, pod: &Value) -> Verdict {
        let mut pod = pod.clone();
        let id = "88888888-8888-8888-8888-888888888888";
        pod["metadata"]["labels"] = json!({"molecule.ai/workspace-id": id});
        let text = pod.to_string();
        let pod = serde_json::from_str(&text).unwrap();
        let policy = Policy::parse(policy).unwrap();
        let target = PodTarget {
            pod: &pod,
            namespace: "ws-acme",
            scope: Scope::Running,
        };
        let decision = begin_pod(&policy, target).finish(lookup);
        audit(&policy, &decision, &pod)
    }

    fn row(mode: BillingMode) -> LookupOutcome {
        LookupOutcome::of_mode(Some(mode.as_str()))
    }

    fn variable(name: &str, value: &str) -> Value {
        json!({"name": name, "value": value})
    }

    fn mode(mode: &str) -> Vec<Value> {
        vec![
            variable("MOLECULE_LLM_BILLING_MODE", mode),
            variable("MOLECULE_LLM_BILLING_MODE_RESOLVED", mode),
        ]
    }

    fn managed() -> Vec<Value> {
        let mut env = mode("platform_managed");
        env.extend([
            variable("MOLECULE_LLM_BASE_URL", "u"),
            variable("MOLECULE_LLM_USAGE_TOKEN", "t"),
            variable("OPENAI_API_KEY", "t"),
            variable("OPENAI_BASE_URL", "u"),
        ]);
        env
    }

    fn pod(annotations: (&str, &str), env: &[Value]) -> Value {
        json!({
            "metadata": {"annotations": {MODE_ANNOTATION: annotations.0, SOURCE_ANNOTATION: annotations.1}},
            "spec": {"containers": [{"name": "agent", "env": env}]},
        })
    }

    const CHOSEN: (&str, &str) = ("platform_managed", "workspace_override");
    const FALLBACK: (&str, &str) = ("platform_managed", "constant_fallback");

    #[test]
    fn each_drift_has_its_finding_and_details() {
        let managed_mode = row(BillingMode::PlatformManaged);
        let byok = row(BillingMode::Byok);
        let with = |more: Value| [managed(), vec![more]].concat();
        let without = |name: &str| {
            let mut env = managed();
            env.retain(|entry| entry["name"] != name);
            env
        };
        let mut own_key = managed();
        own_key[4] = variable("OPENAI_API_KEY", "sk-own");
        let mut other_url = managed();
        other_url[2] = variable("MOLECULE_LLM_BASE_URL", "http://other");
        let table: [(&LookupOutcome, Value, &[Finding], &[&str]); 11] = [
            (&managed_mode, pod(CHOSEN, &managed()), &[], &[]),
            (&byok, pod(("byok", "workspace_override"), &mode("byok")), &[], &[]),
            (
                &managed_mode,
                pod(CHOSEN, &with(variable("HF_TOKEN", "x"))),
                &[Finding::VendorKey],
                &[r#"container "agent": HF_TOKEN"#],
            ),
            (
                &managed_mode,
                pod(CHOSEN, &with(variable("CLAUDE_CODE_USE_BEDROCK", "1"))),
                &[Finding::BypassVariable],
                &[r#"container "agent": CLAUDE_CODE_USE_BEDROCK"#],
            ),
            (
                &managed_mode,
                pod(CHOSEN, &own_key),
                &[Finding::VendorKey],
                &[r#"container "agent": OPENAI_API_KEY"#],
            ),
            (
                &managed_mode,
                pod(CHOSEN, &without("OPENAI_API_KEY")),
                &[Finding::ProxyVariable],
                &[r#"container "agent": OPENAI_API_KEY"#],
            ),
            (
                &managed_mode,
                pod(CHOSEN, &other_url),
                &[Finding::ProxyVariable],
                &[r#"container "agent": MOLECULE_LLM_BASE_URL"#],
            ),
            (
                &byok,
                pod(CHOSEN, &managed()),
                &[Finding::WrongMode],
                &[
                    r#"container "agent": MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED"#,
                ],
            ),
            (
                &byok,
                pod(FALLBACK, &managed()),
                &[Finding::WrongMode, Finding::FallbackInForce],
                &[
                    r#"container "agent": MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED"#,
                ],
            ),
            // The database now has the fallback's mode.
            (&managed_mode, pod(FALLBACK, &managed()), &[], &[]),
            (
                &byok,
                json!({"spec": {"containers": [{"name": "agent", "env": mode("byok")}]}}),
                &[Finding::NotSeen],
                &[],
            ),
        ];
        for (lookup, pod, findings, details) in table {
            let verdict = verdict(PROXY, lookup, &pod);
            assert_eq!(verdict.findings, findings.iter().copied().collect(), "{pod}");
            assert_eq!(verdict.details, details, "{pod}");
        }
    }

    #[test]
    fn pod_that_lost_its_label_is_found_by_an_annotation() {
        for (annotations, findings) in [
            (json!({MODE_ANNOTATION: "byok"}), vec![Finding::LabelChanged]),
            (json!({SOURCE_ANNOTATION: "workspace_override"}), vec![Finding::LabelChanged]),
            (json!({"other": "byok"}), vec![]),
        ] {
            let text = json!({"metadata": {"annotations": annotations}}).to_string();
            let pod = serde_json::from_str(&text).unwrap();
            let policy = Policy::parse(PROXY).unwrap();
            let target = PodTarget {
                pod: &pod,
                namespace: "ws-acme",
                scope: Scope::Running,
            };
            let decision = begin_pod(&policy, target).finish(&LookupOutcome::NoRow);
            let verdict = audit(&policy, &decision, &pod);
            assert_eq!(verdict.findings, findings.iter().copied().collect(), "{annotations}");
            let details = findings
                .iter()
                .map(|_| r#"no label "molecule.ai/workspace-id""#);
            assert_eq!(verdict.details, details.collect::<Vec<_>>());
        }
    }

    #[test]
    fn audit_covers_env_from_and_debug_containers() {
        let lookup = row(BillingMode::PlatformManaged);
        let mut running = pod(CHOSEN, &managed());
        for (prefix, finding) in [
            ("HF_TOKE", Finding::VendorKey),
            ("CLAUDE_CODE_USE_B", Finding::BypassVariable),
        ] {
            running["spec"]["containers"][0]["envFrom"] =
                json!([{"prefix": prefix, "secretRef": {"name": "s"}}]);
            let expected = BTreeSet::from([finding]);
            assert_eq!(verdict(PROXY, &lookup, &running).findings, expected);
        }
        let mut running = pod(CHOSEN, &managed());
        running["spec"]["ephemeralContainers"] = json!([{"name": "debugger"}]);
        let verdict = verdict(PROXY, &lookup, &running);
        let expected = BTreeSet::from([Finding::WrongMode, Finding::ProxyVariable]);
        assert_eq!(verdict.findings, expected);
        assert!(verdict.details[0].starts_with(r#"container "debugger": "#));
    }

    #[test]
    fn refused_pod_is_found_with_its_reason() {
        let lookup = LookupOutcome::NoRow;
        let verdict = verdict("", &lookup, &pod(FALLBACK, &managed()));
        assert_eq!(verdict.findings, BTreeSet::from([Finding::Refused]));
        assert!(verdict.details[0].starts_with("MISSING_PLATFORM_PROXY: "));
    }

    #[test]
    fn mode_in_env_lists_modes_and_hides_other_values() {
        let modes = |values: &[Option<&str>]| {
            let containers: Vec<Value> = values
                .iter()
                .map(|value| {
                    let env = value.map(|value| vec![variable("MOLECULE_LLM_BILLING_MODE", value)]);
                    json!({"name": "c", "env": env.unwrap_or_default()})
                })
                .collect();
            let pod = json!({"spec": {"containers": containers}});
            verdict("", &row(BillingMode::Byok), &pod).mode_in_env
        };
        assert_eq!(modes(&[]), "-");
        assert_eq!(modes(&[None]), "-");
        assert_eq!(modes(&[Some("byok"), None, Some("byok")]), "byok");
        assert_eq!(modes(&[Some("disabled"), Some("byok")]), "byok,disabled");
        assert_eq!(modes(&[Some("sk-secret")]), "other");
    }

    #[test]
    fn finding_is_spelt_alike_in_text_and_json() {
        for finding in Finding::ALL {
            let json = serde_json::to_value(finding).unwrap();
            assert_eq!(json, finding.as_str());
        }
    }
}
