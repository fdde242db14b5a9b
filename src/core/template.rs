//! A variable whose value may have placeholders, and its env entry for one pod. The placeholders are in placeholders.rs;
//! which variables a container gets is in variables.rs and proxy.rs.

use super::env::{Entry, Value, Variable};
use super::placeholders::{Placeholders, columns_in, has_placeholders};
use super::policy_file::{EnvSource, OptionalKey};
use super::refusal::Refusal;

/// A variable, with or without placeholders. No `Debug`: its value may be a token.
#[derive(Clone)]
pub(super) struct Template {
    variable: Variable,
    has_placeholders: bool,
}

/// A template for one pod.
pub(super) enum Filled<'a> {
    /// The entry.
    Entry(Entry<'a>),
    /// The name of a column of the literal value that is NULL, or that the workspace has no row for.
    MissingColumn(&'a str),
}

/// The variables of one pod.
#[derive(Default)]
pub(super) struct Variables<'a> {
    /// The entries that its containers get.
    pub(super) entries: Vec<Entry<'a>>,
    /// The names of the variables that they do not get, since a column is missing.
    pub(super) absent: Vec<&'a str>,
}

impl Template {
    pub(super) fn new(name: &str, value: Value) -> Self {
        let has_placeholders = match &value {
            Value::Literal(text) => has_placeholders(text),
            Value::Source(source) => source.reference().is_some_and(|reference| {
                has_placeholders(&reference.name) || has_placeholders(&reference.key)
            }),
        };
        Self {
            variable: Variable::new(name, value),
            has_placeholders,
        }
    }

    pub(super) fn name(&self) -> &str {
        self.variable.name()
    }

    /// Fills the template for a pod.
    ///
    /// # Errors
    /// [`Refusal::InvalidReference`]
    pub(super) fn fill(&self, placeholders: Placeholders<'_>) -> Result<Filled<'_>, Refusal> {
        if !self.has_placeholders {
            return Ok(Filled::Entry(Entry::from(&self.variable)));
        }
        let value = match self.variable.value() {
            Value::Literal(text) => match placeholders.fill(text) {
                Ok(text) => Value::Literal(text),
                Err(column) => return Ok(Filled::MissingColumn(column)),
            },
            Value::Source(source) => {
                let filled = source.fill(placeholders);
                Value::Source(filled.ok_or_else(|| Refusal::InvalidReference {
                    variable: self.name().to_owned(),
                })?)
            }
        };
        Ok(Filled::Entry(Entry::filled(Variable::new(self.name(), value))))
    }

    /// Fills the template of a variable that a pod cannot do without.
    ///
    /// # Errors
    /// [`Refusal::InvalidReference`], and [`Refusal::MissingColumn`] if a column is missing or all of them are blank.
    pub(super) fn fill_required(
        &self,
        placeholders: Placeholders<'_>,
    ) -> Result<Entry<'_>, Refusal> {
        let column = match self.fill(placeholders)? {
            Filled::MissingColumn(column) => column,
            Filled::Entry(entry) => match (entry.value(), self.variable.value()) {
                (Value::Literal(filled), Value::Literal(text)) if filled.trim().is_empty() => {
                    match columns_in(text).next() {
                        Some(column) => column,
                        None => return Ok(entry),
                    }
                }
                _ => return Ok(entry),
            },
        };
        Err(Refusal::MissingColumn {
            variable: self.name().to_owned(),
            column: column.to_owned(),
        })
    }
}

impl<'a> Variables<'a> {
    /// Adds a variable, unless a column is missing.
    ///
    /// # Errors
    /// [`Refusal::InvalidReference`]
    pub(super) fn add(
        &mut self,
        template: &'a Template,
        placeholders: Placeholders<'_>,
    ) -> Result<(), Refusal> {
        match template.fill(placeholders)? {
            Filled::Entry(entry) => self.entries.push(entry),
            Filled::MissingColumn(_) => self.absent.push(template.name()),
        }
        Ok(())
    }
}

impl EnvSource {
    /// Fills the placeholders of a reference. Returns `None` if the result is not a valid name or key.
    fn fill(&self, placeholders: Placeholders<'_>) -> Option<Self> {
        let fill = |reference: &OptionalKey| {
            let (name, key) = placeholders.fill_reference(&reference.name, &reference.key)?;
            Some(OptionalKey {
                name,
                key,
                optional: reference.optional,
            })
        };
        Some(match self {
            Self::SecretKeyRef(reference) => Self::SecretKeyRef(fill(reference)?),
            Self::ConfigMapKeyRef(reference) => Self::ConfigMapKeyRef(fill(reference)?),
            Self::FieldRef(_) | Self::ResourceFieldRef(_) => self.clone(),
        })
    }
}
