//! The plan: policy, resolution and pod → what each container's env and the pod's annotations must
//! become. Written once, for the webhook, the guard, `review` and `audit`. How the plan is written as a
//! patch is patch.rs's business.

use std::collections::BTreeSet;

use super::env::{Changes, Value, Variable, could_bring, references, settle};
use super::mode::{BillingMode, Reason, Resolution};
use super::pod::{Container, ContainerList, Pod};
use super::policy::{EnvFromRule, MODE_VARIABLE, Name, Policy, RESOLVED_VARIABLE};
use super::proxy;
use super::refusal::Refusal;
use super::workspace::workspace_id;

/// The annotation that records the mode.
pub const MODE_ANNOTATION: &str = "molecule.ai/llm-billing-mode";
/// The annotation that records where the mode comes from.
pub const SOURCE_ANNOTATION: &str = "molecule.ai/llm-billing-source";

/// The API server shows longer warnings shortened, in bytes.
const LONGEST_WARNING: usize = 256;
/// The API server drops all warnings past 4,096 bytes together.
const MOST_WARNINGS: usize = 15;

/// Which of a pod's containers are planned.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// A pod at its creation: init containers and containers, and the annotations.
    Pod,
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
    /// What the user should know; each at most 256 bytes, without any value.
    pub warnings: Vec<String>,
}

/// What must change in one container's env.
pub struct ContainerPlan<'a> {
    /// The list that it stands in.
    pub list: ContainerList,
    /// Its place in that list.
    pub index: usize,
    /// Its name.
    pub name: &'a str,
    /// The names of its env entries now; `None` where env is absent or null.
    pub entries: Option<Vec<&'a str>>,
    /// What must change.
    pub changes: Changes<'a>,
}

impl ContainerPlan<'_> {
    /// The variables that are not settled, by name.
    #[must_use]
    pub fn variables(&self) -> BTreeSet<&str> {
        let entries = self.entries.as_deref().unwrap_or_default();
        let removed = self
            .changes
            .remove
            .iter()
            .filter_map(|&index| entries.get(index).copied());
        removed
            .chain(self.changes.add.iter().map(|variable| variable.name))
            .collect()
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

    /// What the guard says of containers that are not settled: by name, never by value.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        let finding = |container: &ContainerPlan<'_>| {
            format!(
                "container {:?} has not settled {}",
                container.name,
                listed(container.variables())
            )
        };
        if self.containers.is_empty() {
            return None;
        }
        let findings: Vec<String> = self.containers.iter().take(3).map(finding).collect();
        let more = match self.containers.len() - findings.len() {
            0 => String::new(),
            more => format!("; and {more} more containers"),
        };
        Some(Refusal::NotSettled {
            findings: findings.join("; ") + &more,
        })
    }
}

/// Plans a pod.
///
/// # Errors
/// [`Refusal::MissingPlatformProxy`] and [`Refusal::EnvFromVendorKey`].
pub fn plan<'a>(
    policy: &'a Policy,
    resolution: Resolution,
    pod: &'a Pod<'a>,
    scope: Scope<'_>,
) -> Result<Plan<'a>, Refusal> {
    let platform = match resolution.mode {
        BillingMode::PlatformManaged => Some(Platform::of(policy, pod)?),
        BillingMode::Byok | BillingMode::Disabled => None,
    };
    let mut warnings = Vec::new();
    if resolution.reason == Reason::LookupError {
        warnings.push("the workspace's billing mode could not be looked up; the pod is treated as platform_managed".to_owned());
    }
    let mut containers = Vec::new();
    for (list, index, container) in scope.containers(pod) {
        let mut required = mode_variables(resolution.mode);
        let changes = if let Some(platform) = &platform {
            platform.require(container, &mut required)?;
            let changes = settle(entries(container), &required, |name| {
                policy.vendor_keys.contains(name)
            });
            platform.warn(container, &required, &changes, &mut warnings);
            changes
        } else {
            settle(entries(container), &required, |_| false)
        };
        if !changes.is_empty() {
            containers.push(ContainerPlan {
                list,
                index,
                name: container.name.as_str(),
                entries: container
                    .env
                    .as_ref()
                    .map(|env| env.iter().map(|entry| entry.name.as_str()).collect()),
                changes,
            });
        }
    }
    let (annotations, annotations_parent) = match scope {
        Scope::Pod => plan_annotations(resolution, pod),
        Scope::NewEphemeralContainers(_) => (Vec::new(), AnnotationsParent::Annotations),
    };
    Ok(Plan {
        containers,
        annotations,
        annotations_parent,
        warnings: limit(warnings),
    })
}

impl Scope<'_> {
    fn containers<'p>(self, pod: &'p Pod<'p>) -> Vec<(ContainerList, usize, &'p Container<'p>)> {
        let of = |list| {
            pod.containers(list)
                .iter()
                .enumerate()
                .map(move |(index, container)| (list, index, container))
        };
        match self {
            Self::Pod => of(ContainerList::Init)
                .chain(of(ContainerList::Main))
                .collect(),
            Self::NewEphemeralContainers(old) => {
                let old = old.map_or(&[][..], |old| old.containers(ContainerList::Ephemeral));
                of(ContainerList::Ephemeral)
                    .filter(|(_, _, container)| old.iter().all(|old| old.name != container.name))
                    .collect()
            }
        }
    }

    /// Whether no container is planned, so that the mode need not be known.
    #[must_use]
    pub fn is_empty(self, pod: &Pod<'_>) -> bool {
        match self {
            Self::Pod => false,
            Self::NewEphemeralContainers(_) => self.containers(pod).is_empty(),
        }
    }
}

/// Both carry the resolver's answer, whatever branch asks.
fn mode_variables<'a>(mode: BillingMode) -> Vec<Variable<'a>> {
    let value = || Value::Literal(mode.as_str().into());
    vec![
        Variable::new(MODE_VARIABLE, value()),
        Variable::new(RESOLVED_VARIABLE, value()),
    ]
}

fn entries<'a>(container: &'a Container<'a>) -> &'a [super::pod::EnvEntry<'a>] {
    container.env.as_deref().unwrap_or_default()
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
    let wanted = [
        AnnotationPlan {
            key: MODE_ANNOTATION,
            value: resolution.mode.as_str(),
        },
        AnnotationPlan {
            key: SOURCE_ANNOTATION,
            value: resolution.source.as_str(),
        },
    ];
    let is_wrong = |wanted: &AnnotationPlan| {
        let value = present.and_then(|annotations| annotations.get(wanted.key)?.as_ref());
        value.is_none_or(|value| value.as_str() != wanted.value)
    };
    (wanted.into_iter().filter(is_wrong).collect(), parent)
}

/// What holds for every container of a platform_managed pod.
struct Platform<'a> {
    policy: &'a Policy,
    proxy_variables: Vec<Variable<'a>>,
    excluded: &'a BTreeSet<String>,
}

impl<'a> Platform<'a> {
    fn of(policy: &'a Policy, pod: &Pod<'_>) -> Result<Self, Refusal> {
        let runtime = pod.label(policy.runtime_label.as_str()).unwrap_or_default();
        let proxy = policy.proxy.as_ref().ok_or(Refusal::MissingPlatformProxy)?;
        let proxy_variables = proxy::variables(proxy, runtime, workspace_id(policy, pod))
            .ok_or(Refusal::MissingPlatformProxy)?;
        Ok(Self {
            policy,
            proxy_variables,
            excluded: &proxy.exclude_containers,
        })
    }

    /// Adds the proxy variables to what is required of a container, and the masks of vendor keys that its
    /// envFrom could bring.
    fn require(
        &self,
        container: &Container<'_>,
        required: &mut Vec<Variable<'a>>,
    ) -> Result<(), Refusal> {
        if !self.excluded.contains(container.name.as_str()) {
            required.extend(self.proxy_variables.iter().cloned());
        }
        let sources = container.env_from.as_deref().unwrap_or_default();
        let could_come = |key: &&'a Name| {
            could_bring(sources, key.as_str())
                && required
                    .iter()
                    .all(|variable| variable.name != key.as_str())
        };
        let keys: Vec<&str> = self
            .policy
            .vendor_keys
            .iter()
            .filter(could_come)
            .map(Name::as_str)
            .collect();
        match self.policy.env_from {
            EnvFromRule::Ignore => {}
            EnvFromRule::Mask => required.extend(keys.into_iter().map(Variable::mask)),
            EnvFromRule::Deny if keys.is_empty() => {}
            EnvFromRule::Deny => {
                return Err(Refusal::EnvFromVendorKey {
                    container: container.name.as_str().to_owned(),
                    keys: listed(keys),
                });
            }
        }
        Ok(())
    }

    /// Says what loses a vendor key that it refers to, and what stays and could lead past the meter.
    fn warn(
        &self,
        container: &Container<'_>,
        required: &[Variable<'_>],
        changes: &Changes<'_>,
        warnings: &mut Vec<String>,
    ) {
        let vendor_keys = &self.policy.vendor_keys;
        let entries = entries(container);
        let is_required = |name: &str| required.iter().any(|variable| variable.name == name);
        let comes = |name: &str| changes.add.iter().find(|variable| variable.name == name);
        let is_mask = |variable: &Variable<'_>| *variable == Variable::mask(variable.name);
        // A key goes if its entry is removed, or if a new mask hides it; not if it comes with another value.
        let key_goes = |name: &str| {
            vendor_keys.contains(name)
                && match comes(name) {
                    Some(variable) => is_mask(variable),
                    None => {
                        !is_required(name)
                            && entries.iter().any(|entry| entry.name.as_str() == name)
                    }
                }
        };
        let mut warn_of_references = |place: &dyn Fn() -> String, text: &str| {
            let keys: BTreeSet<&str> = references(text).filter(|name| key_goes(name)).collect();
            for key in keys {
                warnings.push(format!(
                    "container {:?}: {} refers to $({key}), which platform_managed takes away",
                    container.name.as_str(),
                    place()
                ));
            }
        };
        let staying = || {
            entries.iter().filter(|entry| {
                let name = entry.name.as_str();
                !is_required(name) && !vendor_keys.contains(name)
            })
        };
        for (field, texts) in [("command", &container.command), ("args", &container.args)] {
            for (index, text) in texts.iter().flatten().enumerate() {
                warn_of_references(&|| format!("{field}[{index}]"), text.as_str());
            }
        }
        for entry in staying() {
            let text = entry.value.as_ref().map_or("", |text| text.as_str());
            warn_of_references(&|| format!("env {}", entry.name.as_str()), text);
        }
        for entry in staying() {
            let name = entry.name.as_str();
            let from = entry.value_from.as_ref();
            let key = from.and_then(|from| {
                from.secret_key_ref
                    .as_ref()
                    .or(from.config_map_key_ref.as_ref())
            });
            if let Some(key) = key
                .map(|key| key.key.as_str())
                .filter(|key| vendor_keys.contains(*key))
            {
                warnings.push(format!(
                    "container {:?}: env {name} brings vendor key {key} under another name, and stays",
                    container.name.as_str()
                ));
            }
            if is_vendor_base_url(vendor_keys, name) {
                warnings.push(format!(
                    "container {:?}: env {name} stays on platform_managed, and can lead calls past the meter",
                    container.name.as_str()
                ));
            }
        }
    }
}

/// Whether a variable tells a vendor's client where to call: `X_BASE_URL` or `X_API_BASE`, where
/// `X_API_KEY` or `X_AUTH_TOKEN` is a vendor key.
fn is_vendor_base_url(vendor_keys: &BTreeSet<Name>, name: &str) -> bool {
    let vendor = name
        .strip_suffix("_BASE_URL")
        .or_else(|| name.strip_suffix("_API_BASE"));
    vendor.is_some_and(|vendor| {
        ["_API_KEY", "_AUTH_TOKEN"]
            .iter()
            .any(|suffix| vendor_keys.contains(format!("{vendor}{suffix}").as_str()))
    })
}

/// Names for a message: all of a few, the first of many.
fn listed<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<&str> = names.into_iter().collect();
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Keeps warnings within what the API server hands on.
fn limit(mut warnings: Vec<String>) -> Vec<String> {
    let more = warnings.len().saturating_sub(MOST_WARNINGS);
    if more > 0 {
        warnings.truncate(MOST_WARNINGS - 1);
        warnings.push(format!(
            "and {} more warnings; llm-billing-webhook review shows them all",
            more + 1
        ));
    }
    for warning in &mut warnings {
        if warning.len() > LONGEST_WARNING {
            warning.truncate(warning.floor_char_boundary(LONGEST_WARNING - "…".len()));
            warning.push('…');
        }
    }
    warnings
}
