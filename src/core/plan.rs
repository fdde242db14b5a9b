//! The plan: policy, resolution and pod → what each container's env and the pod's annotations must
//! become. Written once, for the webhook, the guard, `review` and `audit`. How the plan is written as a
//! patch is patch.rs's business.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::LazyLock;

use super::env::{Changes, Value, Variable, could_bring, reconcile};
use super::pod::{Container, ContainerList, MODE_ANNOTATION, Pod, SOURCE_ANNOTATION, Text};
use super::policy::Policy;
use super::policy_file::EnvFromRule;
use super::refusal::Refusal;
use super::resolution::{BillingMode, MODE_VARIABLE, RESOLVED_VARIABLE, Reason, Resolution};
use super::vendor_keys::VendorKeys;
use super::warning::{Warning, of_container};

/// Which of a pod's containers are planned.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// A pod at its creation: init containers and containers, and the annotations.
    Pod,
    /// A running pod: its ephemeral containers too.
    Running,
    /// An update of `pods/ephemeralcontainers`: those that the old pod lacks. All others are immutable,
    /// and so is the metadata.
    NewEphemeralContainers(Option<&'a Pod<'a>>),
}

/// What must change in a pod. Empty lists mean that the pod is as it must be.
pub struct Plan<'a> {
    /// The containers that are not settled, in the pod's order.
    pub containers: Vec<ContainerPlan<'a>>,
    /// The annotations that are absent or wrong.
    pub annotations: Vec<AnnotationPlan>,
    /// Where the annotations go.
    pub annotations_parent: AnnotationsParent,
    /// What the user should know, without any value.
    pub warnings: Vec<Warning>,
}

/// What must change in one container's env.
pub struct ContainerPlan<'a> {
    /// The list that it stands in.
    pub list: ContainerList,
    /// Its place in that list.
    pub index: usize,
    /// The container as it is.
    pub container: &'a Container<'a>,
    /// What must change.
    pub changes: Changes<'a>,
}

impl ContainerPlan<'_> {
    /// The variables that are not settled, each once: those that stand there wrong or too often, then those that are
    /// missing.
    #[must_use]
    pub fn variables(&self) -> Vec<&str> {
        let Changes { remove, add, .. } = &self.changes;
        let entries = self.container.entries();
        let removed = remove.iter().filter_map(|&index| entries.get(index));
        let removed = removed.map(|entry| entry.name.as_str());
        let added = add.iter().map(|variable| variable.name());
        let mut names = Vec::new();
        for name in removed.chain(added) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// One annotation to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnotationPlan {
    /// Its key.
    pub key: &'static str,
    /// Its value.
    pub value: &'static str,
}

/// How much of the path to an annotation exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnnotationsParent {
    /// Not even metadata, as in some pod templates.
    NoMetadata,
    /// Metadata without annotations.
    NoAnnotations,
    /// Annotations are there.
    Annotations,
}

impl Plan<'_> {
    /// Whether nothing must change.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.annotations.is_empty()
    }

    /// Returns the containers and variables that must change, as a refusal names them: by name, never by value.
    #[must_use]
    pub fn findings(&self) -> String {
        self.summarize(|summary, name| {
            summary.push_str(&format!("container {name:?} has not settled "));
        })
    }

    /// Which variables change in which container: by name, never by value.
    #[must_use]
    pub fn changed(&self) -> String {
        self.summarize(|summary, name| {
            summary.push_str(name);
            summary.push_str(": ");
        })
    }

    /// Summarizes the containers that must change: all of a few, the first of many.
    fn summarize(&self, begin: impl Fn(&mut String, &str)) -> String {
        const SHOWN: usize = 3;
        let mut summary = String::with_capacity(256);
        for (index, plan) in self.containers.iter().take(SHOWN).enumerate() {
            if index > 0 {
                summary.push_str("; ");
            }
            begin(&mut summary, plan.container.name.as_str());
            summarize_names(&mut summary, &plan.variables());
        }
        let more = self.containers.len().saturating_sub(SHOWN);
        if more > 0 {
            summary.push_str(&format!("; and {more} more containers"));
        }
        summary
    }
}

/// Plans a pod of `workspace`, the id that the pod claims.
///
/// # Errors
/// [`Refusal::MissingPlatformProxy`] and [`Refusal::EnvFromVendorKey`].
pub fn plan<'a>(
    policy: &'a Policy,
    workspace: &str,
    resolution: Resolution,
    pod: &'a Pod<'a>,
    scope: Scope<'_>,
) -> Result<Plan<'a>, Refusal> {
    let rules = Rules::of(policy, workspace, resolution.mode, pod)?;
    let mut warnings = Vec::new();
    if resolution.reason == Reason::LookupError {
        warnings.push(Warning::of_failed_lookup());
    }
    let mut containers = Vec::new();
    for (list, index, container) in scope.containers(pod) {
        let required = rules.required(container)?;
        let keys = rules.vendor_keys;
        let changes = reconcile(container.entries(), &required, |name| keys.contains(name));
        of_container(keys, container, &required, &changes, &mut warnings);
        if !changes.is_empty() {
            containers.push(ContainerPlan {
                list,
                index,
                container,
                changes,
            });
        }
    }
    let (annotations, annotations_parent) = match scope {
        Scope::Pod | Scope::Running => plan_annotations(resolution, pod),
        Scope::NewEphemeralContainers(_) => (Vec::new(), AnnotationsParent::Annotations),
    };
    Ok(Plan {
        containers,
        annotations,
        annotations_parent,
        warnings,
    })
}

impl Scope<'_> {
    fn containers<'p>(
        self,
        pod: &'p Pod<'p>,
    ) -> impl Iterator<Item = (ContainerList, usize, &'p Container<'p>)> {
        use ContainerList::{Ephemeral, Init, Main};
        let lists: &[_] = match self {
            Self::Pod => &[Init, Main],
            Self::Running => &[Init, Main, Ephemeral],
            Self::NewEphemeralContainers(_) => &[Ephemeral],
        };
        let old = match self {
            Self::NewEphemeralContainers(Some(old)) => old.containers(Ephemeral),
            Self::Pod | Self::Running | Self::NewEphemeralContainers(None) => &[],
        };
        let of = |&list| {
            let containers = pod.containers(list).iter().enumerate();
            containers.map(move |(index, container)| (list, index, container))
        };
        let is_new = move |name: &Text<'_>| old.iter().all(|old| old.name != *name);
        let all = lists.iter().flat_map(of);
        all.filter(move |(_, _, container)| is_new(&container.name))
    }

    /// Whether no container is planned, so that the mode need not be known.
    #[must_use]
    pub fn is_empty(self, pod: &Pod<'_>) -> bool {
        match self {
            Self::Pod | Self::Running => false,
            Self::NewEphemeralContainers(_) => self.containers(pod).next().is_none(),
        }
    }
}

fn plan_annotations(
    resolution: Resolution,
    pod: &Pod<'_>,
) -> (Vec<AnnotationPlan>, AnnotationsParent) {
    let present = pod
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.annotations.as_ref());
    let parent = match (&pod.metadata, present) {
        (None, _) => AnnotationsParent::NoMetadata,
        (Some(_), None) => AnnotationsParent::NoAnnotations,
        (Some(_), Some(_)) => AnnotationsParent::Annotations,
    };
    let (mode, source) = present.map_or((None, None), |present| {
        (present.mode.as_ref(), present.source.as_ref())
    });
    let wanted = [
        (MODE_ANNOTATION, mode, resolution.mode.as_str()),
        (SOURCE_ANNOTATION, source, resolution.source.as_str()),
    ];
    let wrong = wanted
        .into_iter()
        .filter(|(_, present, value)| present.map(Text::as_str) != Some(value))
        .map(|(key, _, value)| AnnotationPlan { key, value });
    (wrong.collect(), parent)
}

/// Modes but `platform_managed` take no key away.
static NO_KEYS: VendorKeys = VendorKeys::NONE;

/// What holds for every container of a pod.
struct Rules<'a> {
    /// The variables of the mode, then the proxy's.
    required: Vec<Cow<'a, Variable>>,
    /// Which containers get those of the mode alone.
    excluded: Option<&'a BTreeSet<String>>,
    vendor_keys: &'a VendorKeys,
    env_from: EnvFromRule,
}

/// So many variables carry the mode. Both say the resolver's answer, whatever branch asks.
const OF_MODE: usize = 2;

/// The variables that carry a mode, made once for each, in the order of [`BillingMode::ALL`].
fn of_mode(mode: BillingMode) -> &'static [Variable; OF_MODE] {
    static OF_MODES: LazyLock<[[Variable; OF_MODE]; 3]> = LazyLock::new(|| {
        BillingMode::ALL.map(|mode| {
            let value = Value::Literal(mode.as_str().to_owned());
            [MODE_VARIABLE, RESOLVED_VARIABLE].map(|name| Variable::new(name, value.clone()))
        })
    });
    let [platform_managed, byok, disabled] = &*OF_MODES;
    match mode {
        BillingMode::PlatformManaged => platform_managed,
        BillingMode::Byok => byok,
        BillingMode::Disabled => disabled,
    }
}

impl<'a> Rules<'a> {
    fn of(
        policy: &'a Policy,
        workspace: &str,
        mode: BillingMode,
        pod: &Pod<'_>,
    ) -> Result<Self, Refusal> {
        let mut rules = Self {
            required: of_mode(mode).iter().map(Cow::Borrowed).collect(),
            excluded: None,
            vendor_keys: &NO_KEYS,
            env_from: policy.env_from,
        };
        if mode == BillingMode::PlatformManaged {
            let runtime = pod.label(policy.runtime_label.as_str()).unwrap_or_default();
            let proxy = policy.proxy.as_ref().ok_or(Refusal::MissingPlatformProxy)?;
            let of_proxy = proxy.variables(runtime, workspace);
            rules
                .required
                .extend(of_proxy.ok_or(Refusal::MissingPlatformProxy)?);
            rules.excluded = Some(&proxy.exclude_containers);
            rules.vendor_keys = &policy.vendor_keys;
        }
        Ok(rules)
    }

    /// What is required of a container: the variables of the mode and the proxy, and the masks of vendor keys that its
    /// envFrom could bring.
    fn required(&self, container: &Container<'_>) -> Result<Cow<'_, [Cow<'a, Variable>]>, Refusal> {
        let is_excluded = self
            .excluded
            .is_some_and(|excluded| excluded.contains(container.name.as_str()));
        let required = if is_excluded {
            self.required.get(..OF_MODE).unwrap_or_default()
        } else {
            &self.required
        };
        let sources = container.env_from.as_deref().unwrap_or_default();
        if sources.is_empty() || self.env_from == EnvFromRule::Ignore {
            return Ok(required.into());
        }
        let is_set = |key: &str| required.iter().any(|set| set.name() == key);
        let could_come = |mask: &&Variable| {
            let key = mask.name();
            could_bring(sources, key) && !is_set(key)
        };
        let masks = self.vendor_keys.masks();
        let coming = masks.iter().filter(could_come);
        if self.env_from == EnvFromRule::Deny {
            let could_come: Vec<&str> = coming.map(Variable::name).collect();
            if could_come.is_empty() {
                return Ok(required.into());
            }
            let mut keys = String::new();
            summarize_names(&mut keys, &could_come);
            return Err(Refusal::EnvFromVendorKey {
                container: container.name.as_str().to_owned(),
                keys,
            });
        }
        let coming = coming.map(Cow::Borrowed);
        Ok(required.iter().cloned().chain(coming).collect())
    }
}

/// Adds names to a message: all of a few, the first of many.
fn summarize_names(message: &mut String, names: &[&str]) {
    const SHOWN: usize = 8;
    for (index, name) in names.iter().take(SHOWN).enumerate() {
        if index > 0 {
            message.push_str(", ");
        }
        message.push_str(name);
    }
    let more = names.len().saturating_sub(SHOWN);
    if more > 0 {
        message.push_str(&format!(" and {more} more"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::patch::patch;

    const PROXY: &str = "proxy: {baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}";

    fn policy(fields: &str, proxy_fields: &str) -> Policy {
        Policy::parse(&format!("{fields}\n{PROXY}{proxy_fields}}}")).unwrap()
    }

    fn with_container(container: &Value) -> String {
        json!({"metadata": {"annotations": {}}, "spec": {"containers": [container]}}).to_string()
    }

    /// The container's env as names with values, after the plan is carried out.
    fn env_after(policy: &Policy, container: &Value) -> Result<Vec<String>, Refusal> {
        let text = with_container(container);
        let pod = serde_json::from_str(&text).unwrap();
        let plan = plan(
            policy,
            "",
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )?;
        let patch = patch(&plan, "").json;
        let mut after: Value = serde_json::from_str(&text).unwrap();
        json_patch::patch(
            &mut after,
            &serde_json::from_str::<json_patch::Patch>(&patch).unwrap(),
        )
        .unwrap();
        let entries = after["spec"]["containers"][0]["env"]
            .as_array()
            .unwrap()
            .clone();
        let shown = |entry: &Value| {
            format!(
                "{}={}",
                entry["name"].as_str().unwrap(),
                entry["value"].as_str().unwrap_or_default()
            )
        };
        Ok(entries
            .iter()
            .map(shown)
            .filter(|entry| !entry.starts_with("MOLECULE_LLM_"))
            .collect())
    }

    #[test]
    fn env_from_is_masked_refused_or_left_as_the_policy_says() {
        let policy = |rule: &str| {
            policy(
                &format!("envFrom: {rule}\nvendorKeys: [OPENAI_API_KEY, XAI_API_KEY, XAI_TOKEN]"),
                "",
            )
        };
        let xai =
            json!({"name": "c", "envFrom": [{"prefix": "XAI_A", "secretRef": {"name": "s"}}]});
        let all = json!({"name": "c", "envFrom": [{"secretRef": {"name": "s"}}], "env": [{"name": "XAI_TOKEN", "value": "x"}]});
        let proxy = [
            "OPENAI_API_KEY=t".to_owned(),
            "OPENAI_BASE_URL=u".to_owned(),
        ];
        let and = |more: &[&str]| {
            proxy
                .iter()
                .cloned()
                .chain(more.iter().map(|&one| one.to_owned()))
                .collect()
        };
        assert_eq!(env_after(&policy("mask"), &xai), Ok(and(&["XAI_API_KEY="])));
        assert_eq!(
            env_after(&policy("mask"), &all),
            Ok(and(&["XAI_API_KEY=", "XAI_TOKEN="]))
        );
        assert_eq!(env_after(&policy("ignore"), &xai), Ok(and(&[])));
        assert_eq!(env_after(&policy("ignore"), &all), Ok(and(&[])));
        let refused = |keys: &str| {
            Err(Refusal::EnvFromVendorKey {
                container: "c".into(),
                keys: keys.into(),
            })
        };
        assert_eq!(env_after(&policy("deny"), &xai), refused("XAI_API_KEY"));
        assert_eq!(
            env_after(&policy("deny"), &all),
            refused("XAI_API_KEY, XAI_TOKEN")
        );
        // What the proxy sets hides what comes under the same name.
        let hidden = json!({"name": "c", "envFrom": [{"prefix": "OPENAI_"}]});
        assert_eq!(env_after(&policy("deny"), &hidden), Ok(and(&[])));
    }

    #[test]
    fn an_excluded_container_gets_the_mode_and_loses_vendor_keys_but_gets_no_proxy() {
        let policy = policy("", ", excludeContainers: [c]");
        let env = json!([{"name": "OPENAI_API_KEY", "value": "x"}, {"name": "OPENAI_BASE_URL"}, {"name": "KEEP", "value": "1"}]);
        let after = |name: &str| env_after(&policy, &json!({"name": name, "env": env})).unwrap();
        assert_eq!(after("c"), ["KEEP=1"]);
        let of_proxy = ["OPENAI_API_KEY=t", "OPENAI_BASE_URL=u"];
        assert_eq!(after("d"), [&of_proxy[..], &["KEEP=1"]].concat());
        // Nothing hides there what envFrom could bring under a name that the proxy sets elsewhere.
        let sources = json!([{"prefix": "OPENAI_", "secretRef": {"name": "s"}}]);
        let after =
            |name: &str| env_after(&policy, &json!({"name": name, "envFrom": sources})).unwrap();
        assert_eq!(after("c"), ["OPENAI_API_KEY=", "OPENAI_BASE_URL="]);
        assert_eq!(after("d"), of_proxy);
    }

    #[test]
    fn extra_env_has_the_workspaces_id_as_the_pod_has_it_and_is_settled_by_it() {
        let policy = policy(
            "",
            ", extraEnv: [{name: HEADERS, value: 'say \"{workspace_id}\"'}]",
        );
        let id = r#"a"b\"#;
        let mut pod = json!({
            "metadata": {"labels": {"molecule.ai/workspace-id": id}, "annotations": {}},
            "spec": {"containers": [{"name": "c", "env": []}]},
        });
        let patch_of = |pod: &Value| {
            let text = pod.to_string();
            let pod = serde_json::from_str(&text).unwrap();
            let managed = Resolution::chosen(BillingMode::PlatformManaged);
            let plan = plan(&policy, id, managed, &pod, Scope::Pod).unwrap();
            patch(&plan, "").json
        };
        let patch: json_patch::Patch = serde_json::from_str(&patch_of(&pod)).unwrap();
        json_patch::patch(&mut pod, &patch).unwrap();
        let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        assert_eq!(
            env.last().unwrap(),
            &json!({"name": "HEADERS", "value": r#"say "a"b\""#})
        );
        assert_eq!(patch_of(&pod), "[]");
    }

    #[test]
    fn the_guard_names_containers_and_variables_and_no_values() {
        let policy = policy("", "");
        let env = json!([{"name": "XAI_API_KEY", "value": "sk-secret"}, {"name": "HF_TOKEN"}, {"name": "XAI_API_KEY"}]);
        let findings = |count: usize| {
            let containers: Vec<Value> = (0..count)
                .map(|index| json!({"name": format!("c{index}"), "env": env}))
                .collect();
            let pod = json!({"spec": {"containers": containers}}).to_string();
            let pod = serde_json::from_str(&pod).unwrap();
            let plan = plan(
                &policy,
                "",
                Resolution::chosen(BillingMode::PlatformManaged),
                &pod,
                Scope::Pod,
            )
            .unwrap();
            plan.findings()
        };
        let finding = |container: &str| {
            format!(
                "container \"{container}\" has not settled XAI_API_KEY, HF_TOKEN, \
                 MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED, MOLECULE_LLM_BASE_URL, \
                 MOLECULE_LLM_USAGE_TOKEN, MOLECULE_LLM_ANTHROPIC_BASE_URL, OPENAI_API_KEY and 1 more"
            )
        };
        assert_eq!(findings(0), "");
        assert_eq!(findings(1), finding("c0"));
        let three = [finding("c0"), finding("c1"), finding("c2")].join("; ");
        assert_eq!(findings(3), three);
        assert_eq!(findings(5), format!("{three}; and 2 more containers"));
        // The log tells the same.
        let pod =
            json!({"spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "c"}]}})
                .to_string();
        let pod = serde_json::from_str(&pod).unwrap();
        let byok = Resolution::chosen(BillingMode::Byok);
        let plan = plan(&policy, "", byok, &pod, Scope::Pod).unwrap();
        let modes = "MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED";
        assert_eq!(plan.changed(), format!("i: {modes}; c: {modes}"));
        let listed = |names: &[&str]| {
            let mut message = String::new();
            summarize_names(&mut message, names);
            message
        };
        assert_eq!(
            listed(&["a", "b", "c", "d", "e", "f", "g", "h"]),
            "a, b, c, d, e, f, g, h"
        );
        assert_eq!(
            listed(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]),
            "a, b, c, d, e, f, g, h and 2 more"
        );
    }

    #[test]
    fn only_new_ephemeral_containers_are_planned_and_the_metadata_is_left_alone() {
        let pod = |names: &[&str]| {
            let ephemeral: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
            json!({"metadata": {}, "spec": {"containers": [{"name": "main"}], "ephemeralContainers": ephemeral}}).to_string()
        };
        let (old, new) = (pod(&["a"]), pod(&["a", "b"]));
        let (old, new): (Pod<'_>, Pod<'_>) = (
            serde_json::from_str(&old).unwrap(),
            serde_json::from_str(&new).unwrap(),
        );
        let policy = policy("", "");
        let planned = |old| {
            let scope = Scope::NewEphemeralContainers(old);
            let plan = plan(
                &policy,
                "",
                Resolution::chosen(BillingMode::Byok),
                &new,
                scope,
            )
            .unwrap();
            assert_eq!(plan.annotations, []);
            assert_eq!(plan.is_empty(), scope.is_empty(&new));
            plan.containers
                .iter()
                .map(|container| (container.list.field(), container.index))
                .collect::<Vec<_>>()
        };
        assert_eq!(planned(Some(&old)), [("ephemeralContainers", 1)]);
        assert_eq!(
            planned(None),
            [("ephemeralContainers", 0), ("ephemeralContainers", 1)]
        );
        assert_eq!(planned(Some(&new)), []);
        assert!(!Scope::Pod.is_empty(&Pod::default()));
    }
}
