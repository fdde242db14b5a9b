//! Reads compact JSON, as API servers write it: no whitespace between tokens and few escapes. Other JSON is left to
//! serde_json, which also reports the errors; both read the same values. The decoded types are in pod.rs and
//! admission.rs.

use std::fmt::Display;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

use super::json::is_special;

/// The nesting limit of skipped values; serde_json has the same limit for decoded values.
const MAX_DEPTH: u32 = 128;

/// Reads JSON like serde_json. Not for recursive types: only serde_json limits their depth.
///
/// # Errors
/// serde_json's error.
pub(super) fn from_str<'de, T: Deserialize<'de>>(text: &'de str) -> serde_json::Result<T> {
    read(text).map_or_else(|| serde_json::from_str(text), Ok)
}

/// Reads one value in compact JSON; line feeds may follow it. Returns `None` if serde_json must read the text.
pub(super) fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Option<T> {
    let text = text.trim_end_matches('\n');
    let mut reader = Reader { text, position: 0 };
    let value = T::deserialize(&mut reader).ok()?;
    (reader.position == text.len()).then_some(value)
}

/// The text is left to serde_json. Never reported: serde_json has its own errors.
#[derive(Debug, thiserror::Error)]
#[error("declined")]
struct Declined;

impl Error for Declined {
    fn custom<T: Display>(_: T) -> Self {
        Self
    }
}

/// A text and the position of its next unread byte.
struct Reader<'de> {
    text: &'de str,
    position: usize,
}

impl<'de> Reader<'de> {
    /// Skips the next byte if it is `byte`.
    fn eat(&mut self, byte: u8) -> Option<()> {
        self.position = after_byte(self.text, self.position, byte)?;
        Some(())
    }

    /// Reads a string without escapes.
    fn plain_text(&mut self) -> Option<&'de str> {
        let start = after_byte(self.text, self.position, b'"')?;
        let end = find_special(self.text, start)?;
        self.position = after_byte(self.text, end, b'"')?;
        self.text.get(start..end)
    }

    /// Skips a value and returns its text.
    fn skip_value(&mut self) -> Result<&'de str, Declined> {
        let end = after_value(self.text, self.position, MAX_DEPTH).ok_or(Declined)?;
        let value = self.text.get(self.position..end).ok_or(Declined)?;
        self.position = end;
        Ok(value)
    }
}

impl<'de> Deserializer<'de> for &mut Reader<'de> {
    type Error = Declined;

    /// Leaves rare values to serde_json: booleans, numbers and strings with escapes.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        if matches!(byte(self.text, self.position), Some(b'{' | b'[')) {
            return Err(Declined);
        }
        let mut value = serde_json::Deserializer::from_str(self.skip_value()?);
        value.deserialize_any(visitor).map_err(|_| Declined)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        match self.plain_text() {
            Some(text) => visitor.visit_borrowed_str(text),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        if byte(self.text, self.position) != Some(b'n') {
            return visitor.visit_some(self);
        }
        // Only `null` starts with n.
        self.skip_value()?;
        visitor.visit_none()
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        self.eat(b'[').ok_or(Declined)?;
        visitor.visit_seq(Items::new(self))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        self.eat(b'{').ok_or(Declined)?;
        visitor.visit_map(Items::new(self))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Declined> {
        self.deserialize_map(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        self.skip_value()?;
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char string bytes byte_buf unit unit_struct newtype_struct
        tuple tuple_struct enum identifier
    }
}

/// An array's items or an object's members, read one at a time.
struct Items<'r, 'de> {
    reader: &'r mut Reader<'de>,
    is_first: bool,
}

impl<'r, 'de> Items<'r, 'de> {
    fn new(reader: &'r mut Reader<'de>) -> Self {
        Self {
            reader,
            is_first: true,
        }
    }

    /// Moves to the next item, or past the `closing` byte. Reports whether there is an item.
    fn advance(&mut self, closing: u8) -> Result<bool, Declined> {
        if self.reader.eat(closing).is_some() {
            return Ok(false);
        }
        if !self.is_first {
            self.reader.eat(b',').ok_or(Declined)?;
        }
        self.is_first = false;
        Ok(true)
    }
}

impl<'de> SeqAccess<'de> for Items<'_, 'de> {
    type Error = Declined;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Declined> {
        if !self.advance(b']')? {
            return Ok(None);
        }
        seed.deserialize(&mut *self.reader).map(Some)
    }
}

impl<'de> MapAccess<'de> for Items<'_, 'de> {
    type Error = Declined;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Declined> {
        if !self.advance(b'}')? {
            return Ok(None);
        }
        let key = self.reader.plain_text().ok_or(Declined)?;
        self.reader.eat(b':').ok_or(Declined)?;
        let key = BorrowedStrDeserializer::new(key);
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Declined> {
        seed.deserialize(&mut *self.reader)
    }
}

fn byte(text: &str, at: usize) -> Option<u8> {
    text.as_bytes().get(at).copied()
}

/// Returns the position after the byte at `at`, if that byte is `expected`.
fn after_byte(text: &str, at: usize, expected: u8) -> Option<usize> {
    (byte(text, at)? == expected).then_some(at + 1)
}

/// Returns the position after the value at `at`, if the value is valid.
fn after_value(text: &str, at: usize, depth: u32) -> Option<usize> {
    let depth = depth.checked_sub(1)?;
    let item = |at| after_value(text, at, depth);
    let member = |at| item(after_byte(text, after_text(text, at)?, b':')?);
    match byte(text, at)? {
        b'{' => after_items(text, at + 1, b'}', member),
        b'[' => after_items(text, at + 1, b']', item),
        b'"' => after_text(text, at),
        b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => after_bare(text, at),
        _ => None,
    }
}

fn after_items(
    text: &str,
    first: usize,
    closing: u8,
    after_item: impl Fn(usize) -> Option<usize>,
) -> Option<usize> {
    let mut at = first;
    loop {
        if let Some(end) = after_byte(text, at, closing) {
            return Some(end);
        }
        if at != first {
            at = after_byte(text, at, b',')?;
        }
        at = after_item(at)?;
    }
}

fn after_text(text: &str, at: usize) -> Option<usize> {
    let mut at = after_byte(text, at, b'"')?;
    loop {
        at = find_special(text, at)?;
        if let Some(end) = after_byte(text, at, b'"') {
            return Some(end);
        }
        at = after_byte(text, at, b'\\')?;
        at = match byte(text, at)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => at + 1,
            b'u' => {
                let digits = text.as_bytes().get(at + 1..at + 5)?;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(at + 5)?
            }
            _ => return None,
        };
    }
}

/// Returns the position after a number, `true`, `false` or `null`; serde_json validates it.
fn after_bare(text: &str, at: usize) -> Option<usize> {
    let rest = text.get(at..)?;
    let length = rest.find([',', ']', '}']).unwrap_or(rest.len());
    serde_json::from_str::<IgnoredAny>(rest.get(..length)?).ok()?;
    Some(at + length)
}

/// Returns the position of the first special byte at or after `start`.
fn find_special(text: &str, start: usize) -> Option<usize> {
    let mut rest = text.as_bytes().get(start..)?;
    let mut at = start;
    while let Some((word, tail)) = rest.split_first_chunk() {
        let bits = special_bits(word);
        if bits != 0 {
            return Some(at + bits.trailing_zeros() as usize / 8);
        }
        (rest, at) = (tail, at + 8);
    }
    let offset = rest.iter().position(is_special)?;
    Some(at + offset)
}

/// Sets the high bit of each special byte; the first byte is the lowest. Bits above the first one set may be wrong.
/// Returns zero if no byte is special.
fn special_bits(word: &[u8; 8]) -> u64 {
    const fn splat(byte: u8) -> u64 {
        u64::from_le_bytes([byte; 8])
    }
    let word = u64::from_le_bytes(*word);
    // Subtracting more than a byte's value sets its high bit. Non-ASCII bytes have it set already: mask them out.
    let quotes = (word ^ splat(b'"')).wrapping_sub(splat(1));
    let backslashes = (word ^ splat(b'\\')).wrapping_sub(splat(1));
    let controls = word.wrapping_sub(splat(b' '));
    (quotes | backslashes | controls) & !word & splat(0x80)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::fmt::Debug;

    use serde_json::{Value, json};

    use super::*;

    /// A field of each type that a review has.
    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sample<'a> {
        #[serde(borrow, default)]
        text: Cow<'a, str>,
        truth: Option<bool>,
        number: Option<Value>,
        #[serde(borrow)]
        list: Option<Vec<Sample<'a>>>,
    }

    fn by_serde_json<'de, T: Deserialize<'de>>(text: &'de str) -> Option<T> {
        serde_json::from_str(text).ok()
    }

    #[test]
    fn reader_reads_compact_json_like_serde_json() {
        fn assert_read<'de, T: Deserialize<'de> + Debug + PartialEq>(text: &'de str) {
            let value = read::<T>(text);
            assert!(value.is_some(), "{text}");
            assert_eq!(value, by_serde_json(text), "{text}");
        }
        let samples = [
            "{}",
            "{}\n",
            r#"{"text":"plain, with {}[]: and … é 🦀"}"#,
            r#"{"text":"escaped \" \\ \/ \b\f\n\r\t \u00e9 \ud83e\udd80"}"#,
            r#"{"text":"","truth":true,"number":-1.5e3}"#,
            r#"{"truth":false,"number":"0","list":[]}"#,
            r#"{"truth":null,"number":null,"list":null}"#,
            r#"{"list":[{},{"list":[{"text":"12345678"}]},{"text":"123456789"}]}"#,
            r#"{"skipped":{"a":[],"b":{},"c":[[1,-2.5e-7],{"d":"\" \\ \u00e9"},true,false,null]},"text":"t"}"#,
            r#"{"skipped":"\ud800","list":[]}"#,
        ];
        for text in samples {
            assert_read::<Sample<'_>>(text);
        }
        for text in ["\"text\"", "\"\"", "\"es\\u0063aped\""] {
            assert_read::<Cow<'_, str>>(text);
        }
        assert_read::<Vec<Option<bool>>>("[true,null,false]");
    }

    #[test]
    fn reader_declines_json_that_is_not_compact() {
        let table = [
            " {}",
            "{} ",
            "{}\r\n",
            r#"{ "text":"t"}"#,
            r#"{"text": "t"}"#,
            r#"{"number": null}"#,
            r#"{"list": []}"#,
            r#"{"text":"t" }"#,
            r#"{"te\u0078t":"t"}"#,
            r#"{"list":[{}, {}]}"#,
            "{\"skipped\":[[1],\n[2]]}",
            r#"{"skipped":{"a" :1}}"#,
            r#"{"number":[1]}"#,
            r#"{"number":{}}"#,
            r#"["t",true,1,[]]"#,
        ];
        for text in table {
            assert_eq!(read::<Sample<'_>>(text), None, "{text}");
            let sample = from_str::<Sample<'_>>(text).unwrap();
            assert_eq!(Some(sample), by_serde_json(text), "{text}");
        }
        assert_eq!(from_str::<Sample<'_>>("{").unwrap_err().column(), 1);
    }

    #[test]
    fn reader_agrees_with_serde_json_after_one_byte_edits() {
        const BYTES: &[u8] = b"{}[]\":,\\ tnu09-.eE/\n\x1f\x7f";
        let sample = json!({
            "text": "a\"b",
            "skipped": {"a": [], "b": {}, "c": [[1, -2.5e-7], {"d": "\\ \u{1} é"}, true, null]},
            "truth": false,
            "number": 10,
            "list": [{"text": "12345678", "number": null}, {"truth": null, "skipped": "x"}],
        });
        let whole = sample.to_string();
        let (mut read_count, mut declined_count) = (0, 0);
        let mut check = |edited: Vec<u8>| {
            let Ok(text) = String::from_utf8(edited) else {
                return;
            };
            match read::<Sample<'_>>(&text) {
                Some(sample) => {
                    assert_eq!(Some(sample), by_serde_json(&text), "{text}");
                    read_count += 1;
                }
                None => declined_count += 1,
            }
        };
        for at in 0..whole.len() {
            let (before, rest) = whole.as_bytes().split_at(at);
            let after = &rest[1..];
            check([before, after].concat());
            for byte in BYTES {
                check([before, &[*byte], after].concat());
                check([before, &[*byte], rest].concat());
            }
        }
        assert!(read_count > 1000 && declined_count > 1000, "{read_count} {declined_count}");
    }

    #[test]
    fn reader_declines_ignored_values_nested_too_deep() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(read::<IgnoredAny>(&nested(128)).is_some());
        let deeper = nested(129);
        assert!(read::<IgnoredAny>(&deeper).is_none());
        assert!(from_str::<IgnoredAny>(&deeper).is_ok());
    }
}
