//! The parts of a Pod that decide its env, borrowed from the request's bytes. Everything else (managed
//! fields, volumes, status, fields of later API versions) is skipped, and never written back: the patch
//! names only what changes.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The annotation that records the mode.
pub const MODE_ANNOTATION: &str = "molecule.ai/llm-billing-mode";
/// The annotation that records where the mode comes from.
pub const SOURCE_ANNOTATION: &str = "molecule.ai/llm-billing-source";

/// Text borrowed from the request where it has no escapes. Its `Debug` says nothing: it may be a key.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
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

/// What metadata says that matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata<'a> {
    /// The name's beginning, where the API server chooses the rest.
    #[serde(borrow)]
    pub generate_name: Option<Text<'a>>,
    /// Which workspace and runtime.
    #[serde(borrow)]
    pub labels: Option<Labels<'a>>,
    /// Where the resolution is recorded.
    #[serde(borrow)]
    pub annotations: Option<Annotations<'a>>,
}

/// Labels as they stand. Of a key that stands twice the last one counts, as for the API server.
#[derive(Debug, Default)]
pub struct Labels<'a>(Vec<(Text<'a>, Option<Text<'a>>)>);

/// The annotations that this webhook writes; all others are skipped if they are texts, for they may be long.
#[derive(Debug, Default)]
pub struct Annotations<'a> {
    /// [`MODE_ANNOTATION`]
    pub mode: Option<Text<'a>>,
    /// [`SOURCE_ANNOTATION`]
    pub source: Option<Text<'a>>,
}

/// The lists of containers.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec<'a> {
    /// Native sidecars are among them.
    #[serde(borrow)]
    pub init_containers: Option<Vec<Container<'a>>>,
    /// The pod's main containers.
    #[serde(borrow)]
    pub containers: Option<Vec<Container<'a>>>,
    /// Debug containers of a running pod.
    #[serde(borrow)]
    pub ephemeral_containers: Option<Vec<Container<'a>>>,
}

/// One container of any of the three lists.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container<'a> {
    /// Unique in a valid pod; invalid pods arrive too.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// What of the entry point may refer to env entries.
    #[serde(borrow)]
    pub command: Option<Referring<'a>>,
    /// What of the arguments may refer to env entries.
    #[serde(borrow)]
    pub args: Option<Referring<'a>>,
    /// Secrets and ConfigMaps whose keys become variables.
    #[serde(borrow)]
    pub env_from: Option<Vec<EnvFrom<'a>>>,
    /// The env entries; `None` where the field is absent or null.
    #[serde(borrow)]
    pub env: Option<Vec<EnvEntry<'a>>>,
}

/// The texts of a list in which `$(` stands, each with its place in the list.
#[derive(Debug, Default)]
pub struct Referring<'a>(pub Vec<(usize, Text<'a>)>);

/// One envFrom source, whichever kind it is.
#[derive(Debug, Deserialize)]
pub struct EnvFrom<'a> {
    /// Put before each key to make the variable's name.
    #[serde(borrow)]
    pub prefix: Option<Text<'a>>,
}

/// One env entry as it stands in the pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvEntry<'a> {
    /// The variable.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// Absent means empty unless `valueFrom` is there: the API server drops an empty value.
    #[serde(borrow)]
    pub value: Option<EntryValue<'a>>,
    /// Where the value comes from, if it is no literal. Boxed, for it is large and most entries have none.
    #[serde(borrow)]
    pub value_from: Option<Box<ValueFrom<'a>>>,
}

/// The value of an env entry. Whether it may refer to other entries is looked at as it is read, for values are the most
/// of a large pod.
#[derive(Debug, Deserialize)]
#[serde(from = "Text<'a>", bound = "'de: 'a")]
pub struct EntryValue<'a> {
    /// The value.
    pub text: Text<'a>,
    /// Whether a dollar sign stands in it.
    pub may_refer: bool,
}

impl<'a> From<Text<'a>> for EntryValue<'a> {
    fn from(text: Text<'a>) -> Self {
        // At a glance over many bytes at a time.
        let is_dollar = |found, &byte: &u8| found | (byte == b'$');
        let may_refer = text.as_str().as_bytes().iter().fold(false, is_dollar);
        Self { text, may_refer }
    }
}

/// The sources that this webhook compares with its own or warns about. An entry that has another kind of
/// source has none of these set, and so equals nothing that the policy can set.
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
}

/// A key of a Secret or ConfigMap in the pod's namespace.
#[derive(Debug, Deserialize)]
pub struct KeyRef<'a> {
    /// The object.
    #[serde(borrow, default)]
    pub name: Text<'a>,
    /// The key in it.
    #[serde(borrow, default)]
    pub key: Text<'a>,
    /// Whether the container starts without it.
    pub optional: Option<bool>,
}

/// A field of the pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldRef<'a> {
    /// `v1` where absent.
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
    /// The entry's own container where absent.
    #[serde(borrow)]
    pub container_name: Option<Text<'a>>,
    /// Such as `limits.memory`.
    #[serde(borrow, default)]
    pub resource: Text<'a>,
    /// A quantity, `"0"` where absent; manifests may also write a number.
    pub divisor: Option<serde_json::Value>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Labels<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Labels<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of labels")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut labels = Vec::new();
                while let Some(label) = map.next_entry()? {
                    labels.push(label);
                }
                Ok(Labels(labels))
            }
        }
        deserializer.deserialize_map(Map)
    }
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
                            map.next_value::<Option<AnyText>>()?;
                        }
                    }
                }
                Ok(annotations)
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// A text that nobody asks about.
struct AnyText;

impl<'de> Deserialize<'de> for AnyText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Skip;
        impl Visitor<'_> for Skip {
            type Value = AnyText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, _: &str) -> Result<AnyText, E> {
                Ok(AnyText)
            }
        }
        deserializer.deserialize_str(Skip)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Referring<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Referring<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut referring = Vec::new();
                let mut index = 0;
                while let Some(text) = list.next_element::<Text<'de>>()? {
                    if text.as_str().contains("$(") {
                        referring.push((index, text));
                    }
                    index += 1;
                }
                Ok(Referring(referring))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

impl<'a> Pod<'a> {
    /// The value of one label; `Some("")` for a label without text, `None` where it is absent.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        let Labels(labels) = self.metadata.as_ref()?.labels.as_ref()?;
        let (_, value) = labels.iter().rfind(|(label, _)| label.as_str() == key)?;
        Some(value.as_ref().map_or("", Text::as_str))
    }

    /// One of the three lists; empty where it is absent.
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

impl<'a> Container<'a> {
    /// The env entries; empty where there are none.
    #[must_use]
    pub fn entries(&self) -> &[EnvEntry<'a>] {
        self.env.as_deref().unwrap_or_default()
    }
}

/// Which list of the pod's spec a container stands in.
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
    /// The list's field in the pod's spec.
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
        assert_eq!(
            format!("{entry:?}"),
            "EnvEntry { name: …, value: Some(EntryValue { text: …, may_refer: false }), value_from: None }"
        );
    }
}
