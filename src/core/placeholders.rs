//! The placeholders of the policy's proxy settings, and the rules for names of Secrets and ConfigMaps. proxy.rs decides
//! where they are filled in.

/// What the placeholders `{workspace_id}` and `{namespace}` in the proxy's settings stand for.
#[derive(Clone, Copy)]
pub struct Placeholders<'a> {
    /// The workspace id in the pod's label; empty if there is none.
    pub workspace_id: &'a str,
    /// The pod's namespace.
    pub namespace: &'a str,
}

impl Placeholders<'_> {
    fn named(&self) -> [(&'static str, &str); 2] {
        [
            ("{workspace_id}", self.workspace_id),
            ("{namespace}", self.namespace),
        ]
    }

    /// Reports whether the text has a placeholder.
    pub(super) fn are_in(text: &str) -> bool {
        let none = Placeholders {
            workspace_id: "",
            namespace: "",
        };
        none.named()
            .iter()
            .any(|(placeholder, _)| text.contains(placeholder))
    }

    /// Replaces each placeholder once: a workspace id that looks like a placeholder is not replaced again.
    pub(super) fn fill(&self, text: &str) -> String {
        let mut filled = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('{') {
            let (before, from_brace) = rest.split_at(at);
            filled.push_str(before);
            let placeholder = self
                .named()
                .into_iter()
                .find(|(name, _)| from_brace.starts_with(name));
            let (value, length) = placeholder.map_or(("{", 1), |(name, value)| (value, name.len()));
            filled.push_str(value);
            rest = from_brace.get(length..).unwrap_or_default();
        }
        filled.push_str(rest);
        filled
    }

    /// Fills the name and the key of a reference to a Secret or ConfigMap. Returns `None` if the result is not valid, or
    /// if a placeholder has no value: the result could then name another workspace's Secret.
    pub(super) fn fill_reference(&self, name: &str, key: &str) -> Option<(String, String)> {
        let has_value = |text: &str| {
            let mut named = self.named().into_iter();
            named.all(|(placeholder, value)| !value.is_empty() || !text.contains(placeholder))
        };
        let (filled_name, filled_key) = (self.fill(name), self.fill(key));
        let is_valid = has_value(name)
            && has_value(key)
            && is_object_name(&filled_name)
            && is_object_key(&filled_key);
        is_valid.then_some((filled_name, filled_key))
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

    fn placeholders<'a>(workspace_id: &'a str, namespace: &'a str) -> Placeholders<'a> {
        Placeholders {
            workspace_id,
            namespace,
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
            assert_eq!(placeholders("w", "n").fill(text), expected, "{text}");
        }
        assert_eq!(placeholders("{namespace}", "n").fill("{workspace_id}"), "{namespace}");
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
