//! JSON as it is written: patches, answers and log lines are nearly nothing but short texts, and serde_json looks at each
//! byte of them by itself. What cannot stand in a text as it is, compact_json.rs is told here too. What JSON there is to write
//! is the business of those who write it: env.rs, patch.rs, admission.rs, telemetry/json.rs.

use std::fmt::{Display, Write};

/// Writes a text, quoted.
pub fn text(out: &mut String, text: &str) {
    out.push('"');
    if needs_escape(text.as_bytes()) {
        escape(out, text);
    } else {
        out.push_str(text);
    }
    out.push('"');
}

/// Nearly no text has anything to escape, which shows at eight bytes a glance.
fn needs_escape(text: &[u8]) -> bool {
    let Some(last) = text.last_chunk() else {
        return text.iter().any(is_special);
    };
    let (words, _) = text.as_chunks();
    let found = |found, word| found | specials(word);
    words.iter().fold(specials(last), found) != 0
}

/// Whether a byte cannot stand in a text as it is: a quote, a backslash, a control character.
pub(super) const fn is_special(byte: &u8) -> bool {
    matches!(byte, 0..b' ' | b'"' | b'\\')
}

/// The same of eight bytes, told by the high bit of each, the first byte being the lowest: right of all up to the first
/// that is special, and zero if none is.
pub(super) fn specials(word: &[u8; 8]) -> u64 {
    const fn each(byte: u8) -> u64 {
        u64::from_le_bytes([byte; 8])
    }
    let word = u64::from_le_bytes(*word);
    // To take more from a byte than it holds sets its high bit. One that is set before is of no ASCII character.
    let quotes = (word ^ each(b'"')).wrapping_sub(each(1));
    let backslashes = (word ^ each(b'\\')).wrapping_sub(each(1));
    let controls = word.wrapping_sub(each(b' '));
    (quotes | backslashes | controls) & !word & each(0x80)
}

/// Escapes as serde_json does (RFC 8259, section 7).
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
                // A string takes whatever it is given.
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            character => out.push(character),
        }
    }
}

/// An object whose members are written one by one.
pub struct Object<'o>(&'o mut String);

impl Object<'_> {
    /// Begins a member; its value is to be written to what is returned. `name` has nothing to escape.
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

    /// A member that is a text.
    pub fn text(&mut self, name: &str, value: &str) {
        text(self.member(name), value);
    }

    /// A member that shows itself as JSON would: a number or a truth value.
    pub fn plain(&mut self, name: &str, value: impl Display) {
        // As above.
        let _ = write!(self.member(name), "{value}");
    }
}

/// Writes an object.
pub fn object(out: &mut String, members: impl FnOnce(&mut Object<'_>)) {
    out.push('{');
    members(&mut Object(out));
    out.push('}');
}

/// Writes a list.
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
    fn a_text_is_escaped_as_json_demands_wherever_it_stands() {
        let plain = "é…🦀\u{7f}sk-123 http://x/{}?a=b&c='d'";
        let special = (0..=0x7f_u8).map(char::from);
        for special in special.chain(['é', '…', '🦀']) {
            for (before, after) in plain.char_indices().map(|(at, _)| plain.split_at(at)) {
                let whole = format!("{before}{special}{after}");
                let expected = serde_json::to_string(&whole).unwrap();
                let mut out = String::new();
                text(&mut out, &whole);
                assert_eq!(out, expected);
                // Otherwise it is written as it should be, but slowly.
                let is_plain = expected.len() == whole.len() + 2;
                assert_eq!(needs_escape(whole.as_bytes()), !is_plain, "{whole:?}");
            }
        }
    }

    #[test]
    fn a_text_of_any_length_is_escaped_wherever_a_quote_stands_in_it() {
        for length in 1..33 {
            for place in 0..length {
                let mut whole = "x".repeat(length);
                whole.replace_range(place..=place, "\"");
                let mut out = String::new();
                text(&mut out, &whole);
                assert_eq!(out, serde_json::to_string(&whole).unwrap());
            }
        }
    }

    #[test]
    fn objects_and_lists_have_a_comma_between_any_two() {
        let mut out = String::new();
        object(&mut out, |outer| {
            object(outer.member("none"), |_| ());
            object(outer.member("three"), |inner| {
                inner.text("a", "{");
                inner.plain("b", true);
                inner.plain("c", -7);
            });
            list(outer.member("empty"), &[] as &[&str], |out, item| {
                text(out, item)
            });
            list(outer.member("list"), &["c", "d"], |out, item| {
                text(out, item)
            });
        });
        assert_eq!(
            out,
            r#"{"none":{},"three":{"a":"{","b":true,"c":-7},"empty":[],"list":["c","d"]}"#
        );
    }
}
