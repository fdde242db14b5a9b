//! One container's env list: required variables, the changes that bring it in sync, the variables that envFrom could
//! set, and `$(NAME)` references. plan.rs decides which variables each container must have.

use std::sync::Arc;

use serde::Serialize;

use super::json::text;
use super::pod::{EnvEntry, EnvFrom, Text, UnknownField, ValueFrom};
use super::policy_file::{EnvSource, Name};

/// A variable's required value, serialized as a field of an env entry. No `Debug`: a literal may be a token.
#[derive(Clone, PartialEq, Serialize)]
pub enum Value {
    /// A literal value.
    #[serde(rename = "value")]
    Literal(String),
    /// A value from a source.
    #[serde(rename = "valueFrom")]
    Source(EnvSource),
}

/// A name and a value. No `Debug`: the value may be a token.
#[derive(Clone)]
pub struct Variable {
    name: String,
    value: Value,
    /// The beginning of its env entry in JSON, with the name.
    name_json: String,
    /// The rest of the entry, with the value.
    value_json: String,
}

impl Variable {
    /// Creates a variable and renders its env entry. An empty value is left out, as the API server leaves it out.
    pub(super) fn new(name: &str, value: Value) -> Self {
        let mut name_json = r#"{"name":"#.to_owned();
        text(&mut name_json, name);
        let value_json = if value.is_empty() {
            "}".to_owned()
        } else {
            // An object without its opening brace.
            let object = serde_json::to_string(&value);
            object
                .unwrap_or_else(|_| unreachable!("all keys are strings"))
                .replacen('{', ",", 1)
        };
        Self {
            name: name.to_owned(),
            value,
            name_json,
            value_json,
        }
    }

    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) const fn value(&self) -> &Value {
        &self.value
    }

    /// Reports whether a pod's entry has the value. An absent value counts as empty.
    fn is_met_by(&self, entry: &EnvEntry<'_>) -> bool {
        let text = entry.value.as_ref().map_or("", Text::as_str);
        match (&self.value, &entry.value_from) {
            (Value::Literal(literal), None) => text == literal,
            (Value::Source(source), Some(from)) => text.is_empty() && source.matches(from),
            (Value::Literal(_), Some(_)) | (Value::Source(_), None) => false,
        }
    }
}

impl Value {
    /// Reports whether the value is an empty literal.
    pub(super) const fn is_empty(&self) -> bool {
        matches!(self, Self::Literal(text) if text.is_empty())
    }
}

impl EnvSource {
    /// Reports whether a pod's entry has this source, as written here or after the API server's defaulting.
    fn matches(&self, entry: &ValueFrom<'_>) -> bool {
        let ValueFrom {
            secret_key_ref,
            config_map_key_ref,
            field_ref,
            resource_field_ref,
            file_key_ref: None,
            unknown: UnknownField(None),
        } = entry
        else {
            return false;
        };
        match (self, secret_key_ref, config_map_key_ref, field_ref, resource_field_ref) {
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

/// An entry that a container must have. It borrows what it can: with envFrom, a container needs hundreds.
#[derive(Clone)]
pub struct Entry<'a> {
    /// The variable whose name it has, if it hides that variable of an envFrom source.
    masked: Option<&'a Variable>,
    /// The variable whose value it has, and otherwise its name.
    variable: Shared<'a>,
}

/// A variable of the policy, or a copy with this pod's values in place of placeholders.
#[derive(Clone)]
enum Shared<'a> {
    Policy(&'a Variable),
    Pod(Arc<Variable>),
}

impl<'a> Entry<'a> {
    /// Creates the entry of a variable that has this pod's values in place of placeholders.
    pub(super) fn filled(variable: Variable) -> Self {
        Self {
            masked: None,
            variable: Shared::Pod(Arc::new(variable)),
        }
    }

    /// Creates an entry that hides `masked` by its own value.
    pub(super) const fn mask(masked: &'a Variable) -> Self {
        Self {
            masked: Some(masked),
            variable: Shared::Policy(masked),
        }
    }

    /// Creates an entry that hides `masked` by the value of this entry.
    pub(super) fn masking(&self, masked: &'a Variable) -> Self {
        Self {
            masked: Some(masked),
            variable: self.variable.clone(),
        }
    }

    fn variable(&self) -> &Variable {
        match &self.variable {
            Shared::Policy(variable) => variable,
            Shared::Pod(variable) => variable,
        }
    }

    fn named(&self) -> &Variable {
        self.masked.unwrap_or_else(|| self.variable())
    }

    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.named().name
    }

    pub(super) fn value(&self) -> &Value {
        &self.variable().value
    }

    /// Reports whether the entry hides an envFrom variable.
    pub(super) const fn is_mask(&self) -> bool {
        self.masked.is_some()
    }

    /// Writes the entry in JSON.
    pub(super) fn write(&self, out: &mut String) {
        out.push_str(&self.named().name_json);
        out.push_str(&self.variable().value_json);
    }
}

impl<'a> From<&'a Variable> for Entry<'a> {
    fn from(variable: &'a Variable) -> Self {
        Self {
            masked: None,
            variable: Shared::Policy(variable),
        }
    }
}

/// The variables that a container must have, each name once.
#[derive(Default)]
pub struct Required<'a> {
    /// The mode and the proxy variables.
    pub variables: Vec<Entry<'a>>,
    /// The masks of what envFrom could set, sorted by name. There can be hundreds.
    pub masks: Vec<Entry<'a>>,
}

impl<'a> Required<'a> {
    fn position(&self, name: &str) -> Option<usize> {
        let variables = self.variables.iter();
        variables
            .map(|one| one.name())
            .position(|one| one == name)
            .or_else(|| {
                let index = self
                    .masks
                    .binary_search_by(|mask| mask.name().cmp(name))
                    .ok()?;
                Some(self.variables.len() + index)
            })
    }

    /// Reports whether a variable of this name is required.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    fn all(&self) -> impl Iterator<Item = &Entry<'a>> {
        self.variables.iter().chain(&self.masks)
    }
}

/// The changes that bring an env list in sync.
#[derive(Clone, Default)]
pub struct Changes<'a> {
    /// Indices of the entries to remove, ascending.
    pub remove: Vec<usize>,
    /// Variables to add before all entries, in this order.
    pub add: Vec<Entry<'a>>,
    /// Indices of the entries that are neither required nor removed, ascending.
    pub others: Vec<usize>,
}

impl Changes<'_> {
    /// Reports whether the list is in sync.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

/// Returns the changes that bring `entries` in sync: each required variable once with its value, and none for which
/// `is_forbidden` holds. The first correct entry of a required variable is not moved; its other entries are removed.
#[must_use]
pub(super) fn reconcile<'a>(
    entries: &[EnvEntry<'_>],
    required: &Required<'a>,
    is_forbidden: impl Fn(&str) -> bool,
) -> Changes<'a> {
    let all: Vec<&Entry<'a>> = required.all().collect();
    let mut met = vec![false; all.len()];
    let mut remove = Vec::new();
    let mut others = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let name = entry.name.as_str();
        let position = required.position(name);
        let requirement =
            position.and_then(|position| all.get(position).zip(met.get_mut(position)));
        let remains = match requirement {
            Some((variable, met)) => {
                let is_first_match = !*met && variable.variable().is_met_by(entry);
                *met |= is_first_match;
                is_first_match
            }
            None if is_forbidden(name) => false,
            None => {
                others.push(index);
                true
            }
        };
        if !remains {
            remove.push(index);
        }
    }
    let unmet = all.into_iter().zip(met).filter(|(_, met)| !met);
    Changes {
        remove,
        add: unmet.map(|(variable, _)| variable.clone()).collect(),
        others,
    }
}

/// Reports whether a source could set a variable of this name. A source with a prefix sets only names that start with
/// it, unless it has an unknown field.
#[must_use]
pub fn could_set(sources: &[EnvFrom<'_>], name: &str) -> bool {
    let prefix_matches = |source: &EnvFrom<'_>| {
        source
            .prefix
            .as_ref()
            .is_none_or(|prefix| name.starts_with(prefix.as_str()))
            || source.unknown.name().is_some()
    };
    sources.iter().any(prefix_matches)
}

/// Returns the names that a text refers to as `$(NAME)`, by Kubernetes' rules. `$$` is an escaped dollar, so
/// `$$(NAME)` is not a reference; an unclosed `$(` is literal text.
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
    fn reconcile_keeps_one_correct_entry_per_required_variable() {
        let source: EnvSource =
            serde_saphyr::from_str("{secretKeyRef: {name: s, key: k}}").unwrap();
        let hidden = literal("B", "");
        let required = Required {
            variables: vec![
                Entry::filled(literal("A", "1")),
                Entry::filled(Variable::new("C", Value::Source(source))),
            ],
            masks: vec![Entry::mask(&hidden)],
        };
        let c = r#"{"name":"C","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}"#;
        // Entries before C's, indices to remove, names to add.
        let table: [(&str, &[usize], &[&str]); 9] = [
            (r#"{"name":"A","value":"1"},{"name":"B","value":""}"#, &[], &[]),
            (r#"{"name":"B"},{"name":"X"},{"name":"A","value":"1"}"#, &[], &[]),
            (r#"{"name":"A","value":"2"},{"name":"B"}"#, &[0], &["A"]),
            (r#"{"name":"A"},{"name":"B","value":"b"}"#, &[0, 1], &["A", "B"]),
            (r#"{"name":"A","value":"1"},{"name":"A","value":"1"},{"name":"B"}"#, &[1], &[]),
            (r#"{"name":"A","value":"0"},{"name":"A","value":"1"},{"name":"B"}"#, &[0], &[]),
            (r#"{"name":"A","value":"1","valueFrom":{}},{"name":"B"}"#, &[0], &["A"]),
            (
                r#"{"name":"REMOVED","value":"g"},{"name":"X"},{"name":"REMOVED"}"#,
                &[0, 2],
                &["A", "B"],
            ),
            (r#"{"name":"","value":"g"},{"name":"a","value":"1"}"#, &[], &["A", "B"]),
        ];
        for (before, remove, add) in table {
            let json = format!("[{before},{c}]");
            let changes = reconcile(&entries(&json), &required, |name| name == "REMOVED");
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
            assert_eq!(changes.is_empty(), remove.is_empty() && add.is_empty(), "{before}");
        }
        for wrong in [
            r#"[{"name":"C","value":"x","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}]"#,
            r#"[{"name":"C","value":""}]"#,
            r#"[{"name":"C","valueFrom":{"fileKeyRef":{"path":"p"}}}]"#,
            r#"[{"name":"C","valueFrom":{"secretKeyRef":{"name":"s","key":"k"},"fileKeyRef":{}}}]"#,
            r#"[{"name":"C","valueFrom":{"secretKeyRef":{"name":"s","key":"k"},"newRef":1}}]"#,
        ] {
            assert_eq!(reconcile(&entries(wrong), &required, |_| false).remove, [0], "{wrong}");
        }
    }

    #[test]
    fn env_from_source_sets_only_prefixed_names() {
        let table = [
            ("[]", "OPENAI_API_KEY", false),
            (r#"[{"secretRef":{"name":"s"}}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":null}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":""}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":"OPENAI_"}]"#, "OPENAI_API_KEY", true),
            (r#"[{"prefix":"OPENAI_"}]"#, "XAI_API_KEY", false),
            (r#"[{"prefix":"APP_"},{"prefix":"XAI"}]"#, "XAI_API_KEY", true),
            (r#"[{"prefix":"APP_","secretRef":{"name":"s"},"newRef":null}]"#, "XAI_API_KEY", false),
            (r#"[{"prefix":"APP_","configMapRef":{"name":"s"},"newRef":{}}]"#, "XAI_API_KEY", true),
        ];
        for (sources, name, expected) in table {
            let sources: Vec<EnvFrom<'_>> = serde_json::from_str(sources).unwrap();
            assert_eq!(could_set(&sources, name), expected, "{name}");
        }
    }

    #[test]
    fn references_follow_kubernetes_rules() {
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
    fn source_matches_itself_after_api_server_defaulting() {
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
            ("{fieldRef: {fieldPath: p}}", r#"{"fieldRef":{"fieldPath":"p"}}"#, true),
            (
                "{fieldRef: {fieldPath: p}}",
                r#"{"fieldRef":{"fieldPath":"p","apiVersion":"v2"}}"#,
                false,
            ),
            ("{fieldRef: {fieldPath: p}}", r#"{"fieldRef":{"fieldPath":"q"}}"#, false),
            (
                "{resourceFieldRef: {resource: r}}",
                r#"{"resourceFieldRef":{"resource":"r","divisor":"0"}}"#,
                true,
            ),
            ("{resourceFieldRef: {resource: r}}", r#"{"resourceFieldRef":{"resource":"r"}}"#, true),
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
            // A source matches itself as written into a pod.
            let written = serde_json::to_string(&source).unwrap();
            assert!(source.matches(&serde_json::from_str(&written).unwrap()), "{written}");
        }
    }
}
