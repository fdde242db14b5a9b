//! The parts of a Pod that affect its env, borrowed from the request's bytes. Everything else (managed fields, volumes,
//! status, fields of later API versions) is skipped and never written back: the patch contains only changes.

use std::borrow::{Borrow, Cow};
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::resolution::{BillingMode, MODE_VARIABLE};

/// The annotation that records the mode.
pub const MODE_ANNOTATION: &str = "molecule.ai/llm-billing-mode";
/// The annotation that records where the mode comes from.
pub const SOURCE_ANNOTATION: &str = "molecule.ai/llm-billing-source";

/// A string, borrowed from the request if it has no escapes. `Debug` hides it: it may be a key.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    /// Returns the string.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Text<'_> {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A pod, or a controller's pod template.
#[derive(Debug, Default, Deserialize)]
pub struct Pod<'a> {
    /// Labels and annotations.
    #[serde(borrow)]
    pub metadata: Option<Metadata<'a>>,
    /// The containers.
    #[serde(borrow)]
    pub spec: Option<Spec<'a>>,
}

/// The metadata that decisions use.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata<'a> {
    /// The prefix of a name that the API server completes.
    #[serde(borrow)]
    pub generate_name: Option<Text<'a>>,
    /// The labels; some name the workspace and the runtime.
    #[serde(borrow)]
    pub labels: Option<BTreeMap<Text<'a>, Option<Text<'a>>>>,
    /// The annotations that record the resolution.
    #[serde(borrow)]
    pub annotations: Option<Annotations<'a>>,
}

/// The annotations that this webhook writes. Others may be long: they must be strings, but their values are skipped.
#[derive(Debug, Default)]
pub struct Annotations<'a> {
    /// [`MODE_ANNOTATION`]
    pub mode: Option<Text<'a>>,
    /// [`SOURCE_ANNOTATION`]
    pub source: Option<Text<'a>>,
}

/// The pod's three container lists.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec<'a> {
    /// The init containers, including native sidecars.
    #[serde(borrow)]
    pub init_containers: Option<Vec<Container<'a>>>,
    /// The pod's main containers.
    #[serde(borrow)]
    pub containers: Option<Vec<Container<'a>>>,
    /// Debug containers of a running pod.
    #[serde(borrow)]
    pub ephemeral_containers: Option<Vec<Container<'a>>>,
    /// The volumes, of any kind.
    #[serde(borrow)]
    pub volumes: Option<Vec<Volume<'a>>>,
}

/// A volume of any kind.
#[derive(Debug, Deserialize)]
pub struct Volume<'a> {
    /// Its name.
    #[serde(borrow, default)]
    pub name: Text<'a>,
}

/// A container of any list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container<'a> {
    /// Unique in a valid pod, but the request is not validated yet.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// The entry point, which may refer to env entries.
    #[serde(borrow)]
    pub command: Option<Vec<Text<'a>>>,
    /// The arguments, which may refer to env entries.
    #[serde(borrow)]
    pub args: Option<Vec<Text<'a>>>,
    /// Secrets and ConfigMaps whose keys become variables.
    #[serde(borrow)]
    pub env_from: Option<Vec<EnvFrom<'a>>>,
    /// The env entries; `None` if the field is absent or null.
    #[serde(borrow)]
    pub env: Option<Vec<EnvEntry<'a>>>,
}

/// An envFrom source of any kind.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvFrom<'a> {
    /// Prepended to each key to form the variable's name.
    #[serde(borrow)]
    pub prefix: Option<Text<'a>>,
    /// A Secret.
    pub secret_ref: Option<IgnoredAny>,
    /// A ConfigMap.
    pub config_map_ref: Option<IgnoredAny>,
    /// A field of a later Kubernetes version, which may have other rules for the names that the source sets.
    #[serde(borrow, flatten)]
    pub unknown: UnknownField<'a>,
}

/// An env entry of the pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvEntry<'a> {
    /// The variable's name.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// Absent means empty without `valueFrom`: the API server drops an empty value.
    #[serde(borrow)]
    pub value: Option<Text<'a>>,
    /// The value's source, if it is not a literal. Boxed: it is large and most entries have none.
    #[serde(borrow)]
    pub value_from: Option<Box<ValueFrom<'a>>>,
}

/// The sources that this webhook compares with the policy's or warns about.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ValueFrom<'a> {
    /// A key of a Secret.
    #[serde(borrow)]
    pub secret_key_ref: Option<KeyRef<'a>>,
    /// A key of a ConfigMap.
    #[serde(borrow)]
    pub config_map_key_ref: Option<KeyRef<'a>>,
    /// A field of the pod.
    #[serde(borrow)]
    pub field_ref: Option<FieldRef<'a>>,
    /// A resource of a container.
    #[serde(borrow)]
    pub resource_field_ref: Option<ResourceFieldRef<'a>>,
    /// A variable of a file in a volume. The policy has no such source.
    #[serde(borrow)]
    pub file_key_ref: Option<FileKeyRef<'a>>,
    /// A source of a later Kubernetes version.
    #[serde(borrow, flatten)]
    pub unknown: UnknownField<'a>,
}

/// The name of the first field that this version does not know, if its value is not null.
#[derive(Debug, Default)]
pub struct UnknownField<'a>(pub Option<Text<'a>>);

/// A variable of a file in a volume.
#[derive(Debug, Deserialize)]
pub struct FileKeyRef<'a> {
    /// The variable's name in the file.
    #[serde(borrow, default)]
    pub key: Text<'a>,
}

/// A key of a Secret or ConfigMap in the pod's namespace.
#[derive(Debug, Deserialize)]
pub struct KeyRef<'a> {
    /// The object's name.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// The key in the object.
    #[serde(borrow, default)]
    pub key: Text<'a>,
    /// Whether the container starts without the key.
    pub optional: Option<bool>,
}

/// A field of the pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldRef<'a> {
    /// `v1` if absent.
    #[serde(borrow)]
    pub api_version: Option<Text<'a>>,
    /// Such as `metadata.name`.
    #[serde(borrow, default)]
    pub field_path: Text<'a>,
}

/// A resource of a container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceFieldRef<'a> {
    /// The entry's own container if absent.
    #[serde(borrow)]
    pub container_name: Option<Text<'a>>,
    /// Such as `limits.memory`.
    #[serde(borrow, default)]
    pub resource: Text<'a>,
    /// A quantity, `"0"` if absent; manifests may also use a number.
    pub divisor: Option<serde_json::Value>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Annotations<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Annotations<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of annotations")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut annotations = Annotations::default();
                while let Some(key) = map.next_key::<Text<'de>>()? {
                    match key.as_str() {
                        MODE_ANNOTATION => annotations.mode = map.next_value()?,
                        SOURCE_ANNOTATION => annotations.source = map.next_value()?,
                        _ => {
                            map.next_value::<Option<IgnoredText>>()?;
                        }
                    }
                }
                Ok(annotations)
            }
        }
        deserializer.deserialize_map(Map)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for UnknownField<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Remaining;
        impl<'de> Visitor<'de> for Remaining {
            type Value = UnknownField<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the other fields of an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut unknown = None;
                while let Some((name, value)) = map.next_entry::<_, Option<IgnoredAny>>()? {
                    if value.is_some() {
                        unknown.get_or_insert(name);
                    }
                }
                Ok(UnknownField(unknown))
            }
        }
        deserializer.deserialize_map(Remaining)
    }
}

/// A string whose content is ignored.
struct IgnoredText;

impl<'de> Deserialize<'de> for IgnoredText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Skip;
        impl Visitor<'_> for Skip {
            type Value = IgnoredText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, _: &str) -> Result<IgnoredText, E> {
                Ok(IgnoredText)
            }
        }
        deserializer.deserialize_str(Skip)
    }
}

impl<'a> Pod<'a> {
    /// Returns the value of a label: `Some("")` if it is null, `None` if it is absent.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        let labels = self.metadata.as_ref()?.labels.as_ref()?;
        let value = labels.get(key)?;
        Some(value.as_ref().map_or("", Text::as_str))
    }

    /// Returns the annotations, if there are any.
    #[must_use]
    pub fn annotations(&self) -> Option<&Annotations<'a>> {
        self.metadata.as_ref()?.annotations.as_ref()
    }

    /// Reports whether the pod has one of the webhook's annotations.
    #[must_use]
    pub fn is_annotated(&self) -> bool {
        let annotations = self.annotations();
        annotations.is_some_and(|all| all.mode.is_some() || all.source.is_some())
    }

    /// Reports whether the pod was created as platform_managed: by its annotation, or by its containers' env, which cannot
    /// change in a running pod.
    #[must_use]
    pub fn was_created_as_platform_managed(&self) -> bool {
        let is_managed = |mode: &Text<'_>| mode.as_str() == BillingMode::PlatformManaged.as_str();
        let annotation = self.annotations().and_then(|all| all.mode.as_ref());
        annotation.is_some_and(is_managed)
            || self.created_containers().any(|container| {
                container.entries().iter().any(|entry| {
                    entry.name.as_str() == MODE_VARIABLE
                        && entry.value.as_ref().is_some_and(is_managed)
                })
            })
    }

    /// Reports whether the pod has a volume other than that of its service account's token.
    #[must_use]
    pub fn has_own_volume(&self) -> bool {
        // The API server's ServiceAccount admission adds a volume of this name to most pods.
        let is_token = |volume: &Volume<'_>| volume.name.as_str().starts_with("kube-api-access-");
        let volumes = self.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
        volumes.is_some_and(|volumes| !volumes.iter().all(is_token))
    }

    /// Returns the containers that the pod is created with: init containers and main ones.
    pub fn created_containers(&self) -> impl Iterator<Item = &Container<'a>> {
        let lists = [ContainerList::Init, ContainerList::Main];
        lists.into_iter().flat_map(|list| self.containers(list))
    }

    /// Returns a container list; empty if it is absent.
    #[must_use]
    pub fn containers(&self, list: ContainerList) -> &[Container<'a>] {
        let Some(spec) = &self.spec else { return &[] };
        match list {
            ContainerList::Init => &spec.init_containers,
            ContainerList::Main => &spec.containers,
            ContainerList::Ephemeral => &spec.ephemeral_containers,
        }
        .as_deref()
        .unwrap_or_default()
    }
}

impl ValueFrom<'_> {
    /// Returns the key of the Secret, ConfigMap or file that the value comes from, if it comes from one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        let file_key = self.file_key_ref.as_ref().map(|file| &file.key);
        let key_ref = self
            .secret_key_ref
            .as_ref()
            .or(self.config_map_key_ref.as_ref());
        key_ref
            .map(|key_ref| &key_ref.key)
            .or(file_key)
            .map(Text::as_str)
    }
}

impl UnknownField<'_> {
    /// Returns the field's name, if there is one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.as_ref().map(Text::as_str)
    }
}

impl<'a> Container<'a> {
    /// Returns the env entries; empty if there are none.
    #[must_use]
    pub fn entries(&self) -> &[EnvEntry<'a>] {
        self.env.as_deref().unwrap_or_default()
    }
}

/// A container list of the pod's spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerList {
    /// `initContainers`
    Init,
    /// `containers`
    Main,
    /// `ephemeralContainers`
    Ephemeral,
}

impl ContainerList {
    /// Returns the list's field name in the pod's spec.
    #[must_use]
    pub const fn field(self) -> &'static str {
        match self {
            Self::Init => "initContainers",
            Self::Main => "containers",
            Self::Ephemeral => "ephemeralContainers",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_not_shown_by_debug() {
        let entry: EnvEntry<'_> =
            serde_json::from_str(r#"{"name": "A", "value": "sk-secret"}"#).unwrap();
        assert_eq!(format!("{entry:?}"), "EnvEntry { name: …, value: Some(…), value_from: None }");
    }
}
