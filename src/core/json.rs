//! Writes JSON strings, objects and arrays directly into a string. serde_json takes several times as many instructions
//! for patches, responses and log lines (docs/decisions.md). Their content is in patch.rs, response.rs and
//! telemetry/json.rs.

use std::fmt::{Display, Write};

/// Writes a string with quotes and escapes.
pub fn text(out: &mut String, text: &str) {
    out.push('"');
    // Few strings need escapes. A loop without an early exit is vectorized.
    let find = |found, byte: &u8| found | is_special(byte);
    let needs_escape = text.as_bytes().iter().fold(false, find);
    if needs_escape {
        escape(out, text);
    } else {
        out.push_str(text);
    }
    out.push('"');
}

/// Reports whether a byte ends the unescaped part of a string: a quote, a backslash or a control character.
pub(super) const fn is_special(byte: &u8) -> bool {
    matches!(byte, 0..b' ' | b'"' | b'\\')
}

/// Escapes like serde_json (RFC 8259, section 7).
fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            '\0'..' ' => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            character => out.push(character),
        }
    }
}

/// An object whose members are written one at a time.
pub struct Object<'o>(&'o mut String);

impl Object<'_> {
    /// Writes a member's name and returns the output for its value. `name` must not need escapes.
    pub fn member(&mut self, name: &str) -> &mut String {
        let Self(out) = self;
        if !out.ends_with('{') {
            out.push(',');
        }
        out.push('"');
        out.push_str(name);
        out.push_str("\":");
        out
    }

    /// Writes a member that is a string.
    pub fn text(&mut self, name: &str, value: &str) {
        text(self.member(name), value);
    }

    /// Writes a member whose `Display` is JSON: a number or a boolean.
    pub fn plain(&mut self, name: &str, value: impl Display) {
        // Writing to a string cannot fail.
        let _ = write!(self.member(name), "{value}");
    }
}

/// Writes an object.
pub fn object(out: &mut String, members: impl FnOnce(&mut Object<'_>)) {
    out.push('{');
    members(&mut Object(out));
    out.push('}');
}

/// Writes an array.
pub fn list<T>(out: &mut String, items: &[T], write: impl Fn(&mut String, &T)) {
    out.push('[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        write(out, item);
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_like_serde_json() {
        let plain = "é…🦀\u{7f}sk-123 http://x/{}?a=b&c='d'";
        let special = (0..=0x7f_u8).map(char::from);
        for special in special.chain(['é', '…', '🦀']) {
            for (before, after) in plain.char_indices().map(|(at, _)| plain.split_at(at)) {
                let whole = format!("{before}{special}{after}");
                let expected = serde_json::to_string(&whole).unwrap();
                let mut out = String::new();
                text(&mut out, &whole);
                assert_eq!(out, expected);
            }
        }
    }

    #[test]
    fn objects_and_lists_have_commas_between_items() {
        let mut out = String::new();
        object(&mut out, |outer| {
            object(outer.member("none"), |_| ());
            object(outer.member("three"), |inner| {
                inner.text("a", "{");
                inner.plain("b", true);
                inner.plain("c", -7);
            });
            list(outer.member("empty"), &[] as &[&str], |out, item| text(out, item));
            list(outer.member("list"), &["c", "d"], |out, item| text(out, item));
        });
        assert_eq!(
            out,
            r#"{"none":{},"three":{"a":"{","b":true,"c":-7},"empty":[],"list":["c","d"]}"#
        );
    }
}
