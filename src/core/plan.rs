//! The plan: how each container's env and the pod's annotations must change. Both webhooks, `review` and `audit` use
//! it. patch.rs writes a plan as a JSON patch.

use std::collections::BTreeSet;

use super::catalogue::{self, Mask};
use super::env::{Changes, Entry, Required, Value, could_set, reconcile};
use super::placeholders::{Placeholders, Workspace};
use super::pod::{
    Container, ContainerList, EnvEntry, MODE_ANNOTATION, Pod, SOURCE_ANNOTATION, Text,
};
use super::policy::Policy;
use super::policy_file::{ChangedEntriesRule, EnvFromRule, EnvSource};
use super::refusal::Refusal;
use super::resolution::{BillingMode, Reason, Resolution};
use super::restrictions::{Class, Restriction, Restrictions};
use super::template::Variables;
use super::warning::{ChangedEntries, Warning, summarize_names, warn_about_container};

/// How many variables of a container a refusal and a log line name.
const MAX_NAMES: usize = 8;

/// The containers that a plan covers.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// A pod at creation: init containers, containers and annotations.
    Pod,
    /// A running pod: the same, and its ephemeral containers.
    Running,
    /// An update of `pods/ephemeralcontainers`: the ephemeral containers that the old pod lacks. All other containers
    /// and the metadata are immutable.
    NewEphemeralContainers(Option<&'a Pod<'a>>),
}

/// The changes that a pod needs. A pod is in sync if it needs no changes.
pub struct Plan<'a> {
    /// The containers whose env is out of sync, in the pod's order.
    pub containers: Vec<ContainerPlan<'a>>,
    /// The annotations that are absent or wrong.
    pub annotations: Vec<AnnotationPlan>,
    /// How much of the path to the annotations exists.
    pub annotations_parent: AnnotationsParent,
    /// Warnings for the user, without env values.
    pub warnings: Vec<Warning>,
    /// The proxy variables that the containers need; empty if no container needs them.
    proxy: Vec<Entry<'a>>,
    restrictions: &'a Restrictions,
}

/// The changes that one container's env needs.
pub struct ContainerPlan<'a> {
    /// The list that contains the container.
    pub list: ContainerList,
    /// Its index in that list.
    pub index: usize,
    /// The container before the changes.
    pub container: &'a Container<'a>,
    /// The changes.
    pub changes: Changes<'a>,
}

impl ContainerPlan<'_> {
    /// Returns the variables that are out of sync, each once: wrong or duplicate ones first, then missing ones.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        let Changes { remove, add, .. } = &self.changes;
        let entries = self.container.entries();
        let mut removed = Vec::new();
        for entry in remove.iter().filter_map(|&index| entries.get(index)) {
            let name = entry.name.as_str();
            if !removed.contains(&name) {
                removed.push(name);
            }
        }
        // Each variable is added once, and there can be hundreds.
        let distinct = removed.clone();
        let added = add
            .iter()
            .map(Entry::name)
            .filter(move |name| !distinct.contains(name));
        removed.into_iter().chain(added)
    }
}

/// An annotation to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnotationPlan {
    /// Its key.
    pub key: &'static str,
    /// Its value.
    pub value: &'static str,
}

/// How much of the path to the annotations exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnnotationsParent {
    /// No metadata, as in some pod templates.
    NoMetadata,
    /// Metadata without annotations.
    NoAnnotations,
    /// Metadata with annotations.
    Annotations,
}

impl Plan<'_> {
    /// Reports whether the pod is in sync.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.annotations.is_empty()
    }

    /// Returns the Secrets that the proxy variables refer to, each as `NAME (key KEY)`.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<String> {
        let secret = |variable: &Entry<'_>| match variable.value() {
            Value::Source(EnvSource::SecretKeyRef(reference)) => {
                Some(format!("{} (key {})", reference.name.as_str(), reference.key.as_str()))
            }
            Value::Source(_) | Value::Literal(_) => None,
        };
        self.proxy.iter().filter_map(secret).collect()
    }

    /// Returns the class of each restricted entry that is removed or replaced.
    pub fn removed(&self) -> impl Iterator<Item = Class> {
        let containers = self.containers.iter();
        let removed = containers.flat_map(|plan| {
            let entries = plan.container.entries();
            plan.changes
                .remove
                .iter()
                .filter_map(|&index| entries.get(index))
        });
        removed.filter_map(|entry| {
            let (_, restriction) = self.restrictions.find(entry.name.as_str())?;
            restriction.is_removed.then_some(restriction.class)
        })
    }

    /// Returns the containers and variables that are out of sync, for a refusal: names only, no values.
    #[must_use]
    pub fn findings(&self) -> String {
        self.summarize(|summary, name| {
            summary.push_str(&format!("env of container {name:?} is out of sync: "));
        })
    }

    /// Returns the variables that change in each container: names only, no values.
    #[must_use]
    pub fn changed(&self) -> String {
        self.summarize(|summary, name| {
            summary.push_str(name);
            summary.push_str(": ");
        })
    }

    /// Lists the first containers that change and counts the others.
    fn summarize(&self, write_prefix: impl Fn(&mut String, &str)) -> String {
        const MAX_CONTAINERS: usize = 3;
        let mut summary = String::with_capacity(256);
        for (index, plan) in self.containers.iter().take(MAX_CONTAINERS).enumerate() {
            if index > 0 {
                summary.push_str("; ");
            }
            write_prefix(&mut summary, plan.container.name.as_str());
            summarize_names(&mut summary, MAX_NAMES, plan.variables());
        }
        let more = self.containers.len().saturating_sub(MAX_CONTAINERS);
        if more > 0 {
            summary.push_str(&format!("; and {more} more containers"));
        }
        summary
    }
}

/// Plans the changes to a pod of this workspace.
///
/// # Errors
/// Returns [`Refusal::MissingPlatformProxy`], [`Refusal::InvalidReference`], [`Refusal::MissingColumn`] or
/// [`Refusal::EnvFromVendorKey`].
pub fn plan<'a>(
    policy: &'a Policy,
    workspace: Workspace<'_>,
    resolution: Resolution,
    pod: &'a Pod<'a>,
    scope: Scope<'_>,
) -> Result<Plan<'a>, Refusal> {
    let placeholders = Placeholders {
        workspace,
        resolution,
    };
    let rules = Rules::new(policy, placeholders, pod)?;
    let mut warnings = Vec::new();
    if resolution.reason == Reason::LookupError {
        warnings.push(Warning::lookup_failed());
    }
    if resolution.reason == Reason::CreatedAs {
        warnings.push(Warning::created_as());
    }
    let is_new_pod = matches!(scope, Scope::Pod);
    if is_new_pod && resolution.mode == BillingMode::Byok && !could_have_credential(policy, pod) {
        warnings.push(Warning::missing_byok_credential());
    }
    let warns_about_changes =
        policy.changed_entries == ChangedEntriesRule::Warn && !matches!(scope, Scope::Running);
    let mut changed = ChangedEntries::default();
    let mut needs_proxy = false;
    let mut containers = Vec::new();
    let mut container_warnings = Vec::new();
    for (list, index, container) in scope.containers(pod) {
        let required = rules.variables_for(container)?;
        needs_proxy |= !rules.excludes(container);
        let restrictions = rules.restrictions;
        let changes = reconcile(container.entries(), &required, |name| {
            restrictions.removes(name) || rules.is_absent(container, name)
        });
        warn_about_container(restrictions, container, &required, &changes, &mut container_warnings);
        if warns_about_changes {
            changed.add(container, &required, &changes);
        }
        if !changes.is_empty() {
            containers.push(ContainerPlan {
                list,
                index,
                container,
                changes,
            });
        }
    }
    warnings.extend(changed.warning(resolution.mode));
    warnings.append(&mut container_warnings);
    let (annotations, annotations_parent) = match scope {
        Scope::Pod | Scope::Running => plan_annotations(resolution, pod),
        Scope::NewEphemeralContainers(_) => (Vec::new(), AnnotationsParent::Annotations),
    };
    Ok(Plan {
        containers,
        annotations,
        annotations_parent,
        warnings,
        proxy: if needs_proxy {
            rules.proxy.entries
        } else {
            Vec::new()
        },
        restrictions: rules.restrictions,
    })
}

/// Reports whether a pod has a recognizable source of a vendor's credential: a variable of the policy's vendor keys or of the
/// catalogue, a variable of a Secret or ConfigMap, envFrom, or a volume.
fn could_have_credential(policy: &Policy, pod: &Pod<'_>) -> bool {
    let is_credential = |entry: &EnvEntry<'_>| {
        let name = entry.name.as_str();
        let is_known = policy.restrictions.find(name).is_some() || catalogue::find(name).is_some();
        let from = entry.value_from.as_ref();
        is_known
            || from
                .is_some_and(|from| from.field_ref.is_none() && from.resource_field_ref.is_none())
    };
    pod.has_own_volume()
        || pod.created_containers().any(|container| {
            container
                .env_from
                .as_ref()
                .is_some_and(|sources| !sources.is_empty())
                || container.entries().iter().any(is_credential)
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
        let indexed = |&list| {
            let containers = pod.containers(list).iter().enumerate();
            containers.map(move |(index, container)| (list, index, container))
        };
        let is_new = move |name: &Text<'_>| old.iter().all(|old| old.name != *name);
        let all = lists.iter().flat_map(indexed);
        all.filter(move |(_, _, container)| is_new(&container.name))
    }

    /// Reports whether no container is planned, so that no mode is needed.
    #[must_use]
    pub fn needs_no_mode(self, pod: &Pod<'_>) -> bool {
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
    let present = pod.annotations();
    let parent = match (&pod.metadata, present) {
        (None, _) => AnnotationsParent::NoMetadata,
        (Some(_), None) => AnnotationsParent::NoAnnotations,
        (Some(_), Some(_)) => AnnotationsParent::Annotations,
    };
    let (mode, source) =
        present.map_or((None, None), |present| (present.mode.as_ref(), present.source.as_ref()));
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

/// Only `platform_managed` restricts variables.
static NO_RESTRICTIONS: Restrictions = Restrictions::NONE;

/// The rules for every container of a pod.
struct Rules<'a> {
    /// The variables of every container.
    variables: Variables<'a>,
    proxy: Variables<'a>,
    /// The containers that get no proxy variables.
    excluded: Option<&'a BTreeSet<String>>,
    restrictions: &'a Restrictions,
    env_from: EnvFromRule,
}

impl<'a> Rules<'a> {
    fn new(
        policy: &'a Policy,
        placeholders: Placeholders<'_>,
        pod: &Pod<'_>,
    ) -> Result<Self, Refusal> {
        let mut rules = Self {
            variables: policy.variables.fill(placeholders)?,
            proxy: Variables::default(),
            excluded: None,
            restrictions: &NO_RESTRICTIONS,
            env_from: policy.env_from,
        };
        if placeholders.resolution.mode == BillingMode::PlatformManaged {
            let runtime = pod.label(policy.runtime_label.as_str()).unwrap_or_default();
            let proxy = policy.proxy.as_ref().ok_or(Refusal::MissingPlatformProxy)?;
            let variables = proxy.variables(runtime, placeholders)?;
            rules.proxy = variables.ok_or(Refusal::MissingPlatformProxy)?;
            rules.excluded = Some(&proxy.exclude_containers);
            rules.restrictions = &policy.restrictions;
        }
        Ok(rules)
    }

    fn excludes(&self, container: &Container<'_>) -> bool {
        self.excluded
            .is_some_and(|excluded| excluded.contains(container.name.as_str()))
    }

    /// Reports whether a container must not have a variable, since a column is missing for it.
    fn is_absent(&self, container: &Container<'_>, name: &str) -> bool {
        self.variables.absent.contains(&name)
            || self.proxy.absent.contains(&name) && !self.excludes(container)
    }

    /// Returns the variables that a container must have: those of every container, the proxy's, and masks of removed
    /// variables that envFrom could set.
    fn variables_for(&self, container: &Container<'_>) -> Result<Required<'a>, Refusal> {
        let mut variables = self.variables.entries.clone();
        if !self.excludes(container) {
            variables.extend_from_slice(&self.proxy.entries);
        }
        let mut required = Required {
            variables,
            masks: Vec::new(),
        };
        let sources = container.env_from.as_deref().unwrap_or_default();
        if self.env_from == EnvFromRule::Ignore || sources.is_empty() {
            return Ok(required);
        }
        let variables = required.variables.iter();
        let set: Vec<usize> = variables
            .filter_map(|variable| self.restrictions.find(variable.name()))
            .map(|(index, _)| index)
            .collect();
        let all = self.restrictions.all().iter().enumerate();
        let hidden = all.filter(|(index, restriction)| {
            restriction.is_removed && !set.contains(index) && could_set(sources, restriction.name())
        });
        let mut hidden = hidden.map(|(_, restriction)| restriction).peekable();
        if self.env_from == EnvFromRule::Deny && hidden.peek().is_some() {
            let mut keys = String::new();
            summarize_names(&mut keys, MAX_NAMES, hidden.map(Restriction::name));
            return Err(Refusal::EnvFromVendorKey {
                container: container.name.as_str().to_owned(),
                keys,
            });
        }
        required.masks = hidden
            .map(|restriction| mask(restriction, &required.variables))
            .collect();
        Ok(required)
    }
}

/// Returns the entry that hides a variable. Programs that reject an empty value get the value that the container's proxy
/// variables have for that vendor. The token is used only in a container whose Anthropic clients call the proxy.
fn mask<'a>(restriction: &'a Restriction, variables: &[Entry<'a>]) -> Entry<'a> {
    let value = |name: &str| variables.iter().find(|variable| variable.name() == name);
    let value = match restriction.mask {
        Mask::Literal(_) => None,
        Mask::OpenAiBaseUrl => value("OPENAI_BASE_URL").or_else(|| value("MOLECULE_LLM_BASE_URL")),
        Mask::AnthropicBaseUrl => {
            value("ANTHROPIC_BASE_URL").or_else(|| value("MOLECULE_LLM_ANTHROPIC_BASE_URL"))
        }
        Mask::AnthropicToken => value("ANTHROPIC_BASE_URL").and(value("ANTHROPIC_API_KEY")),
    };
    let masked = &restriction.literal;
    value.map_or_else(|| Entry::mask(masked), |value| value.masking(masked))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::patch::patch;

    const PROXY: &str = "proxy: {baseUrl: u, anthropicBaseUrl: a, usageToken: {value: t}";

    const NO_CATALOGUE: &str = "catalogue: {credential: ignore, endpoint: ignore, route: ignore, \
                                header: ignore, config: ignore, shared: ignore}";

    fn policy(fields: &str, proxy_fields: &str) -> Policy {
        Policy::parse(&format!("{fields}\n{PROXY}{proxy_fields}}}")).unwrap()
    }

    fn with_container(container: &Value) -> String {
        json!({"metadata": {"annotations": {}}, "spec": {"containers": [container]}}).to_string()
    }

    /// Returns the container's env after the patch as `NAME=value`, without `MOLECULE_LLM_` variables.
    fn env_after(policy: &Policy, container: &Value) -> Result<Vec<String>, Refusal> {
        let text = with_container(container);
        let pod = serde_json::from_str(&text).unwrap();
        let plan = plan(
            policy,
            Workspace::default(),
            Resolution::chosen(BillingMode::PlatformManaged),
            &pod,
            Scope::Pod,
        )?;
        let patch = patch(&plan, "").json;
        let mut after: Value = serde_json::from_str(&text).unwrap();
        json_patch::patch(&mut after, &serde_json::from_str::<json_patch::Patch>(&patch).unwrap())
            .unwrap();
        let entries = after["spec"]["containers"][0]["env"]
            .as_array()
            .unwrap()
            .clone();
        let render = |entry: &Value| {
            format!(
                "{}={}",
                entry["name"].as_str().unwrap(),
                entry["value"].as_str().unwrap_or_default()
            )
        };
        Ok(entries
            .iter()
            .map(render)
            .filter(|entry| !entry.starts_with("MOLECULE_LLM_"))
            .collect())
    }

    #[test]
    fn env_from_rule_masks_denies_or_ignores_keys() {
        let policy = |rule: &str| {
            policy(
                &format!(
                    "{NO_CATALOGUE}\nenvFrom: {rule}\nvendorKeys: [OPENAI_API_KEY, XAI_API_KEY, XAI_TOKEN]"
                ),
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
        let proxy_and = |more: &[&str]| {
            proxy
                .iter()
                .cloned()
                .chain(more.iter().map(|&one| one.to_owned()))
                .collect()
        };
        assert_eq!(env_after(&policy("mask"), &xai), Ok(proxy_and(&["XAI_API_KEY="])));
        assert_eq!(
            env_after(&policy("mask"), &all),
            Ok(proxy_and(&["XAI_API_KEY=", "XAI_TOKEN="]))
        );
        assert_eq!(env_after(&policy("ignore"), &xai), Ok(proxy_and(&[])));
        assert_eq!(env_after(&policy("ignore"), &all), Ok(proxy_and(&[])));
        let refused = |keys: &str| {
            Err(Refusal::EnvFromVendorKey {
                container: "c".into(),
                keys: keys.into(),
            })
        };
        assert_eq!(env_after(&policy("deny"), &xai), refused("XAI_API_KEY"));
        assert_eq!(env_after(&policy("deny"), &all), refused("XAI_API_KEY, XAI_TOKEN"));
        // A variable that the proxy sets needs no mask.
        let hidden = json!({"name": "c", "envFrom": [{"prefix": "OPENAI_"}]});
        assert_eq!(env_after(&policy("deny"), &hidden), Ok(proxy_and(&[])));
    }

    #[test]
    fn excluded_container_gets_no_proxy_variables() {
        let policy = policy(NO_CATALOGUE, ", excludeContainers: [c]");
        let env = json!([{"name": "OPENAI_API_KEY", "value": "x"}, {"name": "OPENAI_BASE_URL"}, {"name": "KEEP", "value": "1"}]);
        let after = |name: &str| env_after(&policy, &json!({"name": name, "env": env})).unwrap();
        assert_eq!(after("c"), ["KEEP=1"]);
        let proxy = ["OPENAI_API_KEY=t", "OPENAI_BASE_URL=u"];
        assert_eq!(after("d"), [&proxy[..], &["KEEP=1"]].concat());
        // Without the proxy variables, their names need masks too.
        let sources = json!([{"prefix": "OPENAI_", "secretRef": {"name": "s"}}]);
        let after =
            |name: &str| env_after(&policy, &json!({"name": name, "envFrom": sources})).unwrap();
        assert_eq!(after("c"), ["OPENAI_API_KEY=", "OPENAI_BASE_URL="]);
        assert_eq!(after("d"), proxy);
    }

    #[test]
    fn mask_has_the_proxys_value_where_programs_reject_an_empty_one() {
        let fields = "vendorKeys: [ANTHROPIC_AUTH_TOKEN, OPENAI_API_KEY]\n\
                      catalogue: {credential: ignore, route: ignore, header: ignore, config: ignore}";
        let policy = policy(fields, ", excludeContainers: [excluded]");
        let masks = |container: &str, runtime: &str| {
            let pod = json!({
                "metadata": {"labels": {"molecule.ai/runtime": runtime}},
                "spec": {"containers": [{"name": container, "envFrom": [{"secretRef": {"name": "s"}}]}]},
            });
            let text = pod.to_string();
            let pod = serde_json::from_str(&text).unwrap();
            let managed = Resolution::chosen(BillingMode::PlatformManaged);
            let plan = plan(&policy, Workspace::default(), managed, &pod, Scope::Pod).unwrap();
            let names = ["ANTHROPIC_AUTH_TOKEN", "OPENAI_API_BASE", "OPENAI_API_KEY"];
            let entry = |name: &&str| {
                let mut added = plan.containers[0].changes.add.iter();
                let mut entry = String::new();
                added
                    .find(|variable| variable.name() == *name)
                    .unwrap()
                    .write(&mut entry);
                entry
            };
            names.iter().map(entry).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            masks("c", "claude-code"),
            r#"{"name":"ANTHROPIC_AUTH_TOKEN","value":"t"} {"name":"OPENAI_API_BASE","value":"u"} {"name":"OPENAI_API_KEY"}"#
        );
        // Anthropic clients of another runtime do not call the proxy, so they get no token.
        assert_eq!(
            masks("c", "codex"),
            r#"{"name":"ANTHROPIC_AUTH_TOKEN"} {"name":"OPENAI_API_BASE","value":"u"} {"name":"OPENAI_API_KEY","value":"t"}"#
        );
        assert_eq!(
            masks("excluded", "claude-code"),
            r#"{"name":"ANTHROPIC_AUTH_TOKEN"} {"name":"OPENAI_API_BASE"} {"name":"OPENAI_API_KEY"}"#
        );
    }

    #[test]
    fn removed_entries_and_secrets_are_listed() {
        let policy = Policy::parse(
            "proxy: {baseUrl: u, usageToken: {secretKeyRef: {name: 'llm-{workspace_id}', key: k}}, excludeContainers: [x]}",
        )
        .unwrap();
        let listed = |container: &str, mode| {
            let env = json!([
                {"name": "XAI_API_KEY"}, {"name": "CLAUDE_CODE_USE_BEDROCK"}, {"name": "AWS_ACCESS_KEY_ID"},
                {"name": "OPENAI_API_KEY", "value": "x"}, {"name": "KEEP"},
            ]);
            let pod = with_container(&json!({"name": container, "env": env}));
            let pod = serde_json::from_str(&pod).unwrap();
            let workspace = Workspace {
                id: "w",
                ..Workspace::default()
            };
            let plan =
                plan(&policy, workspace, Resolution::chosen(mode), &pod, Scope::Pod).unwrap();
            let classes: Vec<&str> = plan.removed().map(Class::as_str).collect();
            (classes, plan.secrets().into_iter().collect::<Vec<_>>())
        };
        let removed = vec!["vendor_key", "route", "vendor_key"];
        let secret = vec!["llm-w (key k)".to_owned()];
        assert_eq!(listed("c", BillingMode::PlatformManaged), (removed.clone(), secret));
        assert_eq!(listed("x", BillingMode::PlatformManaged), (removed, vec![]));
        assert_eq!(listed("c", BillingMode::Byok), (vec![], vec![]));
    }

    #[test]
    fn byok_pod_without_any_credential_gets_a_warning() {
        let policy = policy("vendorKeys: [ACME_KEY]", "");
        let is_warned = |spec: &Value, mode, scope| {
            let pod = json!({"spec": spec}).to_string();
            let pod = serde_json::from_str(&pod).unwrap();
            let plan =
                plan(&policy, Workspace::default(), Resolution::chosen(mode), &pod, scope).unwrap();
            let kinds: Vec<&str> = plan
                .warnings
                .iter()
                .map(|warning| warning.kind.as_str())
                .collect();
            kinds.contains(&"missing_byok_credential")
        };
        let with_env =
            |entry: Value| json!({"containers": [{"env": [{"name": "A", "value": "a"}, entry]}]});
        let from = |source: &str| json!({"name": "B", "valueFrom": {source: {}}});
        let containers = json!([{"env": [{"name": "A", "value": "a"}], "envFrom": []}]);
        let table = [
            (json!({}), true),
            (json!({"containers": containers, "initContainers": [{}]}), true),
            (json!({"volumes": [{"name": "kube-api-access-x"}], "containers": containers}), true),
            (with_env(from("fieldRef")), true),
            (with_env(from("resourceFieldRef")), true),
            (json!({"volumes": [{"name": "kube-api-access-x"}, {"name": "home"}]}), false),
            (json!({"initContainers": [{"envFrom": [{}]}]}), false),
            (with_env(json!({"name": "ACME_KEY"})), false),
            (with_env(json!({"name": "AWS_BEARER_TOKEN_BEDROCK"})), false),
            (with_env(from("secretKeyRef")), false),
            (with_env(from("configMapKeyRef")), false),
            (with_env(from("fileKeyRef")), false),
        ];
        for (spec, expected) in table {
            assert_eq!(is_warned(&spec, BillingMode::Byok, Scope::Pod), expected, "{spec}");
        }
        let spec = json!({});
        assert!(!is_warned(&spec, BillingMode::Disabled, Scope::Pod));
        assert!(!is_warned(&spec, BillingMode::PlatformManaged, Scope::Pod));
        assert!(!is_warned(&spec, BillingMode::Byok, Scope::NewEphemeralContainers(None)));
    }

    #[test]
    fn extra_env_contains_workspace_id_after_one_patch() {
        let policy = policy("", ", extraEnv: [{name: HEADERS, value: 'say \"{workspace_id}\"'}]");
        let id = r#"a"b\"#;
        let mut pod = json!({
            "metadata": {"labels": {"molecule.ai/workspace-id": id}, "annotations": {}},
            "spec": {"containers": [{"name": "c", "env": []}]},
        });
        let patch_of = |pod: &Value| {
            let text = pod.to_string();
            let pod = serde_json::from_str(&text).unwrap();
            let managed = Resolution::chosen(BillingMode::PlatformManaged);
            let workspace = Workspace {
                id,
                ..Workspace::default()
            };
            let plan = plan(&policy, workspace, managed, &pod, Scope::Pod).unwrap();
            patch(&plan, "").json
        };
        let patch: json_patch::Patch = serde_json::from_str(&patch_of(&pod)).unwrap();
        json_patch::patch(&mut pod, &patch).unwrap();
        let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        assert_eq!(env.last().unwrap(), &json!({"name": "HEADERS", "value": r#"say "a"b\""#}));
        assert_eq!(patch_of(&pod), "[]");
    }

    #[test]
    fn findings_name_containers_and_variables_without_values() {
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
                Workspace::default(),
                Resolution::chosen(BillingMode::PlatformManaged),
                &pod,
                Scope::Pod,
            )
            .unwrap();
            plan.findings()
        };
        let finding = |container: &str| {
            format!(
                "env of container \"{container}\" is out of sync: XAI_API_KEY, HF_TOKEN, \
                 MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED, MOLECULE_LLM_BASE_URL, \
                 MOLECULE_LLM_USAGE_TOKEN, MOLECULE_LLM_ANTHROPIC_BASE_URL, OPENAI_API_KEY and 1 more"
            )
        };
        assert_eq!(findings(0), "");
        assert_eq!(findings(1), finding("c0"));
        let three = [finding("c0"), finding("c1"), finding("c2")].join("; ");
        assert_eq!(findings(3), three);
        assert_eq!(findings(5), format!("{three}; and 2 more containers"));
        let pod =
            json!({"spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "c"}]}})
                .to_string();
        let pod = serde_json::from_str(&pod).unwrap();
        let byok = Resolution::chosen(BillingMode::Byok);
        let plan = plan(&policy, Workspace::default(), byok, &pod, Scope::Pod).unwrap();
        let modes = "MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED";
        assert_eq!(plan.changed(), format!("i: {modes}; c: {modes}"));
        let listed = |names: &[&str]| {
            let mut message = String::new();
            summarize_names(&mut message, MAX_NAMES, names.iter().copied());
            message
        };
        assert_eq!(listed(&["a", "b", "c", "d", "e", "f", "g", "h"]), "a, b, c, d, e, f, g, h");
        assert_eq!(
            listed(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]),
            "a, b, c, d, e, f, g, h and 2 more"
        );
    }

    #[test]
    fn update_plans_only_new_ephemeral_containers() {
        let pod = |names: &[&str]| {
            let ephemeral: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
            json!({"metadata": {}, "spec": {"containers": [{"name": "main"}], "ephemeralContainers": ephemeral}}).to_string()
        };
        let (old, new) = (pod(&["a"]), pod(&["a", "b"]));
        let (old, new): (Pod<'_>, Pod<'_>) =
            (serde_json::from_str(&old).unwrap(), serde_json::from_str(&new).unwrap());
        let policy = policy("", "");
        let planned = |old| {
            let scope = Scope::NewEphemeralContainers(old);
            let plan = plan(
                &policy,
                Workspace::default(),
                Resolution::chosen(BillingMode::Byok),
                &new,
                scope,
            )
            .unwrap();
            assert_eq!(plan.annotations, []);
            assert_eq!(plan.is_empty(), scope.needs_no_mode(&new));
            plan.containers
                .iter()
                .map(|container| (container.list.field(), container.index))
                .collect::<Vec<_>>()
        };
        assert_eq!(planned(Some(&old)), [("ephemeralContainers", 1)]);
        assert_eq!(planned(None), [("ephemeralContainers", 0), ("ephemeralContainers", 1)]);
        assert_eq!(planned(Some(&new)), []);
        assert!(!Scope::Pod.needs_no_mode(&Pod::default()));
    }
}
