//! One container's env list: what a required variable is and how it stands there, what must change, which variables
//! envFrom could bring, and what a `$(NAME)` refers to. Which variables are required, and of which containers, is
//! plan.rs's business.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::pod::{EnvEntry, EnvFrom, ValueFrom};
use super::policy_file::{EnvSource, Name};

/// What a variable must be, as the field of an env entry. No `Debug`: a literal may be a token.
#[derive(Clone, PartialEq, Serialize)]
pub enum Value {
    /// This text.
    #[serde(rename = "value")]
    Literal(String),
    /// The value of this source.
    #[serde(rename = "valueFrom")]
    Source(EnvSource),
}

/// A variable that a container must have. No `Debug`, as above.
#[derive(Clone)]
pub struct Variable {
    name: String,
    value: Value,
    /// Rendered once, as an entry of a pod's env.
    entry: Box<RawValue>,
}

impl PartialEq for Variable {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.value == other.value
    }
}

impl Variable {
    /// A variable of this name and value.
    pub(super) fn new(name: &str, value: Value) -> Self {
        #[derive(Serialize)]
        struct Entry<'a> {
            name: &'a str,
            #[serde(flatten)]
            value: &'a Value,
        }
        let entry = Entry {
            name,
            value: &value,
        };
        let entry = to_raw_value(&entry).unwrap_or_else(|_| unreachable!("all keys are texts"));
        let name = name.to_owned();
        Self { name, value, entry }
    }

    /// Returns the variable as an env entry of a pod, in JSON.
    pub(super) fn entry(&self) -> &str {
        self.entry.get()
    }

    /// An empty-valued entry, which hides what an envFrom source brings under the same name.
    pub(super) fn mask(name: &str) -> Self {
        Self::new(name, Value::Literal(String::new()))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is an empty-valued entry.
    pub(super) fn is_mask(&self) -> bool {
        matches!(&self.value, Value::Literal(text) if text.is_empty())
    }

    /// Whether an entry of the same name already has the value, an absent one being empty.
    fn is_met_by(&self, entry: &EnvEntry<'_>) -> bool {
        let text = entry.value.as_ref().map_or("", |value| value.text.as_str());
        match (&self.value, &entry.value_from) {
            (Value::Literal(literal), None) => text == literal,
            (Value::Source(source), Some(from)) => text.is_empty() && source.matches(from),
            (Value::Literal(_), Some(_)) | (Value::Source(_), None) => false,
        }
    }
}

impl EnvSource {
    /// Whether a pod's entry has this source, as written here or after the API server's defaulting.
    fn matches(&self, entry: &ValueFrom<'_>) -> bool {
        let ValueFrom {
            secret_key_ref,
            config_map_key_ref,
            field_ref,
            resource_field_ref,
        } = entry;
        match (
            self,
            secret_key_ref,
            config_map_key_ref,
            field_ref,
            resource_field_ref,
        ) {
            (Self::SecretKeyRef(own), Some(key), None, None, None)
            | (Self::ConfigMapKeyRef(own), None, Some(key), None, None) => {
                own.name.as_str() == key.name.as_str()
                    && own.key.as_str() == key.key.as_str()
                    && own.optional.unwrap_or_default() == key.optional.unwrap_or_default()
            }
            (Self::FieldRef(own), None, None, Some(field), None) => {
                own.field_path.as_str() == field.field_path.as_str()
                    && own.api_version.as_ref().map_or("v1", Name::as_str)
                        == field
                            .api_version
                            .as_ref()
                            .map_or("v1", |version| version.as_str())
            }
            (Self::ResourceFieldRef(own), None, None, None, Some(field)) => {
                own.resource.as_str() == field.resource.as_str()
                    && own.container_name.as_ref().map_or("", Name::as_str)
                        == field
                            .container_name
                            .as_ref()
                            .map_or("", |name| name.as_str())
                    && own.divisor.as_ref().map_or("0", Name::as_str)
                        == field
                            .divisor
                            .as_ref()
                            .map_or("0", |divisor| divisor.as_str().unwrap_or_default())
            }
            _ => false,
        }
    }
}

/// What makes an env list settled.
#[derive(Clone, PartialEq, Default)]
pub struct Changes<'a> {
    /// Indices of the entries that go, ascending.
    pub remove: Vec<usize>,
    /// Variables that come before all others, in this order.
    pub add: Vec<Cow<'a, Variable>>,
    /// Indices of the entries that are neither required nor go, ascending.
    pub others: Vec<usize>,
}

impl Changes<'_> {
    /// Whether the list is settled already.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

/// Finds what makes `entries` settled: each required variable once with its value, and none that
/// `goes`. The first right entry of a required variable stays where it is; wrong and surplus ones go.
#[must_use]
pub(super) fn reconcile<'a>(
    entries: &[EnvEntry<'_>],
    required: &[Cow<'a, Variable>],
    goes: impl Fn(&str) -> bool,
) -> Changes<'a> {
    let mut met = vec![false; required.len()];
    let mut remove = Vec::new();
    let mut others = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let name = entry.name.as_str();
        let requirement = required
            .iter()
            .zip(&mut met)
            .find(|(variable, _)| variable.name() == name);
        let stays = match requirement {
            Some((variable, met)) => {
                let first_right = !*met && variable.is_met_by(entry);
                *met |= first_right;
                first_right
            }
            None if goes(name) => false,
            None => {
                others.push(index);
                true
            }
        };
        if !stays {
            remove.push(index);
        }
    }
    let unmet = required.iter().zip(met).filter(|(_, met)| !met);
    Changes {
        remove,
        add: unmet.map(|(variable, _)| variable.clone()).collect(),
        others,
    }
}

/// Whether one of these sources could bring a variable of this name: one with a prefix brings only names
/// that start with it.
#[must_use]
pub fn could_bring(sources: &[EnvFrom<'_>], name: &str) -> bool {
    let prefix = |source: &EnvFrom<'_>| {
        source
            .prefix
            .as_ref()
            .is_none_or(|prefix| name.starts_with(prefix.as_str()))
    };
    sources.iter().any(prefix)
}

/// The names that a text refers to as `$(NAME)`, by Kubernetes' rules: `$$` is an escaped dollar, so
/// `$$(NAME)` refers to nothing, and an unclosed `$(` is text.
pub fn references(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let (_, after_dollar) = rest.split_once('$')?;
            rest = after_dollar;
            if let Some(after_escape) = rest.strip_prefix('$') {
                rest = after_escape;
            } else if let Some((name, after)) = rest
                .strip_prefix('(')
                .and_then(|inner| inner.split_once(')'))
            {
                rest = after;
                return Some(name);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(json: &str) -> Vec<EnvEntry<'_>> {
        serde_json::from_str(json).unwrap()
    }

    fn literal(name: &str, value: &str) -> Variable {
        Variable::new(name, Value::Literal(value.to_owned()))
    }

    #[test]
    fn a_list_is_settled_when_each_required_variable_is_there_once_and_right() {
        let source: EnvSource =
            serde_saphyr::from_str("{secretKeyRef: {name: s, key: k}}").unwrap();
        let required = [
            literal("A", "1"),
            Variable::mask("B"),
            Variable::new("C", Value::Source(source)),
        ]
        .map(Cow::Owned);
        let c = r#"{"name":"C","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}"#;
        // entries before the reference of C; indices that go; names that come
        let table: [(&str, &[usize], &[&str]); 9] = [
            (
                r#"{"name":"A","value":"1"},{"name":"B","value":""}"#,
                &[],
                &[],
            ),
            (
                r#"{"name":"B"},{"name":"X"},{"name":"A","value":"1"}"#,
                &[],
                &[],
            ),
            (r#"{"name":"A","value":"2"},{"name":"B"}"#, &[0], &["A"]),
            (
                r#"{"name":"A"},{"name":"B","value":"b"}"#,
                &[0, 1],
                &["A", "B"],
            ),
            (
                r#"{"name":"A","value":"1"},{"name":"A","value":"1"},{"name":"B"}"#,
                &[1],
                &[],
            ),
            (
                r#"{"name":"A","value":"0"},{"name":"A","value":"1"},{"name":"B"}"#,
                &[0],
                &[],
            ),
            (
                r#"{"name":"A","value":"1","valueFrom":{}},{"name":"B"}"#,
                &[0],
                &["A"],
            ),
            (
                r#"{"name":"GOES","value":"g"},{"name":"X"},{"name":"GOES"}"#,
                &[0, 2],
                &["A", "B"],
            ),
            (
                r#"{"name":"","value":"g"},{"name":"a","value":"1"}"#,
                &[],
                &["A", "B"],
            ),
        ];
        for (before, remove, add) in table {
            let json = format!("[{before},{c}]");
            let changes = reconcile(&entries(&json), &required, |name| name == "GOES");
            assert_eq!(changes.remove, remove, "{before}");
            assert_eq!(
                changes
                    .add
                    .iter()
                    .map(|variable| variable.name())
                    .collect::<Vec<_>>(),
                add,
                "{before}"
            );
            assert_eq!(
                changes.is_empty(),
                remove.is_empty() && add.is_empty(),
                "{before}"
            );
        }
        for wrong in [
            r#"[{"name":"C","value":"x","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}]"#,
            r#"[{"name":"C","value":""}]"#,
            r#"[{"name":"C","valueFrom":{"fileKeyRef":{"path":"p"}}}]"#,
        ] {
            assert_eq!(
                reconcile(&entries(wrong), &required, |_| false).remove,
                [0],
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_source_brings_only_names_that_start_with_its_prefix() {
        let table = [
            ("[]", "OPENAI_API_KEY", false),
            (r#"[{"secretRef":{"name":"s"}}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":null}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":""}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":"OPENAI_"}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":"OPENAI_"}]"#, "XAI_API_KEY", false),
            (
                r#"[{"prefix":"APP_"},{"prefix":"XAI"}]"#,
                "XAI_API_KEY",
                true,
            ),
        ];
        for (sources, name, expected) in table {
            let sources: Vec<EnvFrom<'_>> = serde_json::from_str(sources).unwrap();
            assert_eq!(could_bring(&sources, name), expected, "{name}");
        }
    }

    #[test]
    fn references_are_read_as_kubernetes_reads_them() {
        let table: [(&str, &[&str]); 9] = [
            ("", &[]),
            ("plain", &[]),
            ("a $(B) c $(D)$(E)", &["B", "D", "E"]),
            ("$$(B) $(C)", &["C"]),
            ("$$$(B)", &["B"]),
            ("$B ${C} $ (D)", &[]),
            ("$(open", &[]),
            ("$", &[]),
            ("$()$(A B)", &["", "A B"]),
        ];
        for (text, expected) in table {
            assert_eq!(references(text).collect::<Vec<_>>(), expected, "{text}");
        }
    }

    #[test]
    fn a_source_equals_what_the_api_server_makes_of_it_and_nothing_else() {
        let table = [
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"a","key":"b"}}"#,
                true,
            ),
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"a","key":"b","optional":false}}"#,
                true,
            ),
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"a","key":"b","optional":true}}"#,
                false,
            ),
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"x","key":"b"}}"#,
                false,
            ),
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"a","key":"x"}}"#,
                false,
            ),
            (
                "{secretKeyRef: {name: a, key: b}}",
                r#"{"configMapKeyRef":{"name":"a","key":"b"}}"#,
                false,
            ),
            ("{secretKeyRef: {name: a, key: b}}", "{}", false),
            (
                "{configMapKeyRef: {name: a, key: b, optional: true}}",
                r#"{"configMapKeyRef":{"name":"a","key":"b","optional":true}}"#,
                true,
            ),
            (
                "{configMapKeyRef: {name: a, key: b}}",
                r#"{"secretKeyRef":{"name":"a","key":"b"}}"#,
                false,
            ),
            (
                "{fieldRef: {fieldPath: p}}",
                r#"{"fieldRef":{"fieldPath":"p","apiVersion":"v1"}}"#,
                true,
            ),
            (
                "{fieldRef: {fieldPath: p}}",
                r#"{"fieldRef":{"fieldPath":"p"}}"#,
                true,
            ),
            (
                "{fieldRef: {fieldPath: p}}",
                r#"{"fieldRef":{"fieldPath":"p","apiVersion":"v2"}}"#,
                false,
            ),
            (
                "{fieldRef: {fieldPath: p}}",
                r#"{"fieldRef":{"fieldPath":"q"}}"#,
                false,
            ),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"r","divisor":"0"}}"#,
                true,
            ),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"r"}}"#,
                true,
            ),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"r","divisor":"1Mi"}}"#,
                false,
            ),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"r","containerName":"c"}}"#,
                false,
            ),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"s"}}"#,
                false,
            ),
            (
                "{resourceFieldRef: {resource: r, containerName: c, divisor: 1Mi}}",
                r#"{"resourceFieldRef":{"resource":"r","containerName":"c","divisor":"1Mi"}}"#,
                true,
            ),
        ];
        for (own, entry, expected) in table {
            let source: EnvSource = serde_saphyr::from_str(own).unwrap();
            let parsed: ValueFrom<'_> = serde_json::from_str(entry).unwrap();
            assert_eq!(source.matches(&parsed), expected, "{own} {entry}");
            // What is written into a pod equals itself when it comes back.
            let written = serde_json::to_string(&source).unwrap();
            assert!(
                source.matches(&serde_json::from_str(&written).unwrap()),
                "{written}"
            );
        }
    }
}
