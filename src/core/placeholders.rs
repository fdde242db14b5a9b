//! The placeholders of the policy's templates, and the rules for names of Secrets and ConfigMaps. template.rs decides
//! where they are filled in.

use std::borrow::Cow;

use super::resolution::Resolution;

/// A pod's workspace, as far as templates use it.
#[derive(Clone, Copy, Default)]
pub struct Workspace<'a> {
    /// The workspace id in the pod's label; empty if there is none.
    pub id: &'a str,
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The columns of its row in the platform's database.
    pub columns: Columns<'a>,
}

/// The columns of a workspace's row that the policy's templates name.
#[derive(Clone, Copy, Default)]
pub struct Columns<'a> {
    /// Their names.
    pub names: &'a [String],
    /// Their values in the same order; `None` is NULL. Empty if the workspace has no row.
    pub values: &'a [Option<String>],
}

impl<'a> Columns<'a> {
    fn get(&self, name: &str) -> Option<&'a str> {
        let position = self.names.iter().position(|own| own == name)?;
        self.values.get(position)?.as_deref()
    }
}

/// A part of a template.
#[derive(Clone, Copy)]
enum Piece<'t> {
    /// Text without placeholders.
    Text(&'t str),
    /// `{mode}`
    Mode,
    /// `{source}`
    Source,
    /// `{workspace_id}`
    WorkspaceId,
    /// `{namespace}`
    Namespace,
    /// `{column NAME}`
    Column(&'t str),
}

/// Splits a template. A brace that begins no placeholder is text.
fn pieces(template: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = template;
    std::iter::from_fn(move || {
        if let Some((piece, after)) = placeholder(rest) {
            rest = after;
            return Some(piece);
        }
        if rest.is_empty() {
            return None;
        }
        let next = rest.char_indices().skip(1).find(|(_, char)| *char == '{');
        let (text, after) = rest.split_at(next.map_or(rest.len(), |(at, _)| at));
        rest = after;
        Some(Piece::Text(text))
    })
}

/// Returns the placeholder at the start of a text, and the text after it.
fn placeholder(text: &str) -> Option<(Piece<'_>, &str)> {
    let (name, after) = text.strip_prefix('{')?.split_once('}')?;
    let piece = match name {
        "mode" => Piece::Mode,
        "source" => Piece::Source,
        "workspace_id" => Piece::WorkspaceId,
        "namespace" => Piece::Namespace,
        "column" => Piece::Column(""),
        name => Piece::Column(name.strip_prefix("column ")?.trim()),
    };
    Some((piece, after))
}

/// Reports whether a template has a placeholder.
pub(super) fn has_placeholders(template: &str) -> bool {
    pieces(template).any(|piece| !matches!(piece, Piece::Text(_)))
}

/// Returns the names of the columns in a template; empty for a placeholder without a name.
pub(super) fn columns_in(template: &str) -> impl Iterator<Item = &str> {
    pieces(template).filter_map(|piece| match piece {
        Piece::Column(name) => Some(name),
        _ => None,
    })
}

/// Replaces `{mode}`, so that a template can be filled for a mode once.
pub(super) fn fill_mode(template: &str, mode: &str) -> String {
    template.replace("{mode}", mode)
}

/// Reports whether a reference has a valid name and key for some workspace.
pub(super) fn is_valid_reference(name: &str, key: &str) -> bool {
    let sample = |template| -> String {
        let sample = |piece| match piece {
            Piece::Text(text) => text,
            _ => "a",
        };
        pieces(template).map(sample).collect()
    };
    is_object_name(&sample(name)) && is_object_key(&sample(key))
}

/// What the placeholders stand for in the templates of one pod.
#[derive(Clone, Copy)]
pub(super) struct Placeholders<'a> {
    pub(super) workspace: Workspace<'a>,
    pub(super) resolution: Resolution,
}

impl<'a> Placeholders<'a> {
    /// Returns the text that a piece stands for; `None` if it is a column that is NULL or absent.
    fn value<'v>(&self, piece: Piece<'v>) -> Option<&'v str>
    where
        'a: 'v,
    {
        Some(match piece {
            Piece::Text(text) => text,
            Piece::Mode => self.resolution.mode.as_str(),
            Piece::Source => self.resolution.source.as_str(),
            Piece::WorkspaceId => self.workspace.id,
            Piece::Namespace => self.workspace.namespace,
            Piece::Column(name) => self.workspace.columns.get(name)?,
        })
    }

    /// Fills the template of a literal value. The kubelet reads `$(NAME)` in it as a reference, which a column's value
    /// must not make.
    ///
    /// # Errors
    /// The name of the first column that is NULL or absent.
    pub(super) fn fill<'t>(&self, template: &'t str) -> Result<String, &'t str> {
        let mut filled = String::with_capacity(template.len());
        for piece in pieces(template) {
            match (piece, self.value(piece)) {
                (Piece::Column(name), None) => return Err(name),
                (Piece::Column(_), Some(value)) => {
                    let dollars = filled.bytes().rev().take_while(|byte| *byte == b'$');
                    // With the template's own dollar, "(NAME)" would be a reference.
                    if dollars.count() % 2 == 1 {
                        filled.push('$');
                    }
                    filled.push_str(&escape(value));
                }
                (_, value) => filled.push_str(value.unwrap_or_default()),
            }
        }
        Ok(filled)
    }

    /// Fills the name and the key of a reference to a Secret or ConfigMap. Returns `None` if the result is not valid, or
    /// if a placeholder has no value: the result could then name another workspace's Secret.
    pub(super) fn fill_reference(&self, name: &str, key: &str) -> Option<(String, String)> {
        let fill = |template| -> Option<String> {
            let mut values = pieces(template).map(|piece| self.value(piece));
            values.try_fold(String::new(), |filled, value| {
                let value = value.filter(|value| !value.is_empty())?;
                Some(filled + value)
            })
        };
        let (name, key) = (fill(name)?, fill(key)?);
        (is_object_name(&name) && is_object_key(&key)).then_some((name, key))
    }
}

/// Escapes dollars: the kubelet reads `$$` as a dollar and `$(NAME)` as a reference.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    if text.contains('$') {
        text.replace('$', "$$").into()
    } else {
        text.into()
    }
}

/// Kubernetes' limit on the name of a Secret or ConfigMap, and on a key in it.
const MAX_NAME_BYTES: usize = 253;

/// Reports whether a Secret or ConfigMap can have the name: a DNS subdomain (RFC 1123).
fn is_object_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(is_valid)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_NAME_BYTES && name.split('.').all(is_label)
}

/// Reports whether a Secret or ConfigMap can have the key.
fn is_object_key(key: &str) -> bool {
    let is_valid = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !key.is_empty()
        && key.len() <= MAX_NAME_BYTES
        && key.bytes().all(is_valid)
        && key != "."
        && !key.starts_with("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::core::resolution::BillingMode;

    fn placeholders<'a>(id: &'a str, namespace: &'a str) -> Placeholders<'a> {
        Placeholders {
            workspace: Workspace {
                id,
                namespace,
                columns: Columns::default(),
            },
            resolution: Resolution::chosen(BillingMode::Byok),
        }
    }

    #[test]
    fn each_placeholder_is_replaced_once() {
        let table = [
            ("{workspace_id}/{namespace}/{workspace_id}", "w/n/w"),
            ("{workspace}{{namespace}}{", "{workspace}{n}{"),
            ("é{namespace}é", "éné"),
            ("", ""),
        ];
        for (text, expected) in table {
            assert_eq!(placeholders("w", "n").fill(text), Ok(expected.to_owned()), "{text}");
        }
        let filled = placeholders("{namespace}", "n").fill("{workspace_id}");
        assert_eq!(filled, Ok("{namespace}".to_owned()));
    }

    #[test]
    fn columns_are_filled_by_name() {
        let names = ["org", "plan", "team name", "home"].map(str::to_owned);
        let own = |value: &str| Some(value.to_owned());
        let values = [own("$(HOME)/$x"), None, own("t"), own("(HOME)")];
        let columns = Columns {
            names: &names,
            values: &values,
        };
        let with = |columns| {
            let mut placeholders = placeholders("w", "n");
            placeholders.workspace.columns = columns;
            placeholders
        };
        let table = [
            ("{mode} {source}", Ok("byok workspace_override")),
            ("{column org}/$(A)", Ok("$$(HOME)/$$x/$(A)")),
            ("{column  team name }", Ok("t")),
            ("${column home} $${column home}", Ok("$$(HOME) $$(HOME)")),
            ("$$${column home}${namespace}", Ok("$$$$(HOME)$n")),
            ("{columns}{column org", Ok("{columns}{column org")),
            ("a{column plan}{column other}", Err("plan")),
            ("{column other}", Err("other")),
            ("{column}", Err("")),
        ];
        for (template, expected) in table {
            let filled = with(columns).fill(template);
            assert_eq!(filled, expected.map(str::to_owned), "{template}");
        }
        assert_eq!(with(Columns::default()).fill("{column org}"), Err("org"));
        let reference = |name, key| with(columns).fill_reference(name, key);
        let valid = Some(("llm-t".to_owned(), "k".to_owned()));
        assert_eq!(reference("llm-{column team name}", "k"), valid);
        assert_eq!(reference("llm-{column plan}", "k"), None);
        assert_eq!(reference("llm-{column org}", "k"), None);
        assert_eq!(columns_in("{column a}{mode}{column b}").collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn reference_is_filled_only_with_a_valid_name() {
        let long = "a".repeat(253);
        let table = [
            ("llm-{workspace_id}", "k", Some("llm-w-1")),
            ("llm.{namespace}", "usage-{workspace_id}", Some("llm.ns")),
            ("{namespace}-{workspace_id}", "k", Some("ns-w-1")),
            ("fixed", "k", Some("fixed")),
            ("Llm-{workspace_id}", "k", None),
            ("llm_{workspace_id}", "k", None),
            ("llm-{workspace}", "k", None),
            ("-{workspace_id}", "k", None),
            ("llm-.{workspace_id}", "k", None),
            ("llm..{workspace_id}", "k", None),
            ("llm", "..{workspace_id}", None),
            ("llm", ".", None),
            ("llm", "a/{workspace_id}", None),
            (&long, "k", Some(&long)),
            (&format!("{long}{{workspace_id}}"), "k", None),
        ];
        for (name, key, expected) in table {
            let filled = placeholders("w-1", "ns").fill_reference(name, key);
            assert_eq!(filled.map(|(name, _)| name).as_deref(), expected, "{name} {key}");
        }
        // Valid in a label, but not in the name of a Secret.
        for workspace_id in ["W-1", "w_1", "w.", ""] {
            let filled = placeholders(workspace_id, "ns").fill_reference("a{workspace_id}", "k");
            assert_eq!(filled, None, "{workspace_id}");
        }
        assert_eq!(placeholders("", "ns").fill_reference("a{workspace_id}b", "k"), None);
        assert_eq!(placeholders("", "ns").fill_reference("a", "k{workspace_id}"), None);
    }
}
