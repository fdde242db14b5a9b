//! JSON as API servers write it, read fast: without space between tokens, and nearly without escapes. Whatever is not
//! written so is left to serde_json, and so is to say what is wrong with it; what both read, they read alike. What the
//! values mean is pod.rs's and admission.rs's business.

use std::fmt::Display;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

/// Lists and objects that are skipped may be open so deep, as serde_json has it for what is read.
const MAX_DEPTH: u32 = 128;

/// Reads JSON as serde_json does. Not for types that hold themselves, whose depth serde_json bounds.
///
/// # Errors
/// serde_json's.
pub(super) fn from_str<'de, T: Deserialize<'de>>(text: &'de str) -> serde_json::Result<T> {
    read(text).map_or_else(|| serde_json::from_str(text), Ok)
}

/// Reads a text that is one value in compact JSON, with line feeds at its end or without. `None` says that serde_json is
/// to read it.
pub(super) fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Option<T> {
    let text = text.trim_end_matches('\n');
    let mut reader = Reader { text, at: 0 };
    let value = T::deserialize(&mut reader).ok()?;
    (reader.at == text.len()).then_some(value)
}

/// The text is for serde_json. Nobody is told.
#[derive(Debug, thiserror::Error)]
#[error("declined")]
struct Declined;

impl Error for Declined {
    fn custom<T: Display>(_: T) -> Self {
        Self
    }
}

/// A text, and the place that it is read from next.
struct Reader<'de> {
    text: &'de str,
    at: usize,
}

impl<'de> Reader<'de> {
    /// Passes a byte if it is the next one.
    fn eat(&mut self, byte: u8) -> Option<()> {
        self.at = after(self.text, self.at, byte)?;
        Some(())
    }

    /// Reads a text that has no escapes.
    fn plain_text(&mut self) -> Option<&'de str> {
        let from = after(self.text, self.at, b'"')?;
        let to = special(self.text, from)?;
        self.at = after(self.text, to, b'"')?;
        self.text.get(from..to)
    }

    /// Passes a value.
    fn value(&mut self) -> Result<&'de str, Declined> {
        let end = after_value(self.text, self.at, MAX_DEPTH).ok_or(Declined)?;
        let value = self.text.get(self.at..end).ok_or(Declined)?;
        self.at = end;
        Ok(value)
    }
}

impl<'de> Deserializer<'de> for &mut Reader<'de> {
    type Error = Declined;

    /// What is rare is serde_json's: truth values, numbers, texts with escapes.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        if matches!(byte(self.text, self.at), Some(b'{' | b'[')) {
            return Err(Declined);
        }
        let mut value = serde_json::Deserializer::from_str(self.value()?);
        value.deserialize_any(visitor).map_err(|_| Declined)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        match self.plain_text() {
            Some(text) => visitor.visit_borrowed_str(text),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        if byte(self.text, self.at) != Some(b'n') {
            return visitor.visit_some(self);
        }
        // Nothing but `null` begins so.
        self.value()?;
        visitor.visit_none()
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        self.eat(b'[').ok_or(Declined)?;
        visitor.visit_seq(Items::of(self))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Declined> {
        self.eat(b'{').ok_or(Declined)?;
        visitor.visit_map(Items::of(self))
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
        self.value()?;
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char string bytes byte_buf unit unit_struct newtype_struct
        tuple tuple_struct enum identifier
    }
}

/// A list's items or an object's members, which are read one by one.
struct Items<'r, 'de> {
    reader: &'r mut Reader<'de>,
    is_first: bool,
}

impl<'r, 'de> Items<'r, 'de> {
    fn of(reader: &'r mut Reader<'de>) -> Self {
        Self {
            reader,
            is_first: true,
        }
    }

    /// Whether there is one more.
    fn more(&mut self, end: u8) -> Result<bool, Declined> {
        if self.reader.eat(end).is_some() {
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
        if !self.more(b']')? {
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
        if !self.more(b'}')? {
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

/// The place behind a byte, if that is what stands at `at`.
fn after(text: &str, at: usize, expected: u8) -> Option<usize> {
    (byte(text, at)? == expected).then_some(at + 1)
}

/// The place behind the value at `at`, which is looked at no closer than to be sure that it is one.
fn after_value(text: &str, at: usize, depth: u32) -> Option<usize> {
    let depth = depth.checked_sub(1)?;
    let item = |at| after_value(text, at, depth);
    let member = |at| item(after(text, after_text(text, at)?, b':')?);
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
    end: u8,
    after_item: impl Fn(usize) -> Option<usize>,
) -> Option<usize> {
    let mut at = first;
    loop {
        if let Some(behind) = after(text, at, end) {
            return Some(behind);
        }
        if at != first {
            at = after(text, at, b',')?;
        }
        at = after_item(at)?;
    }
}

fn after_text(text: &str, at: usize) -> Option<usize> {
    let mut at = after(text, at, b'"')?;
    loop {
        at = special(text, at)?;
        if let Some(behind) = after(text, at, b'"') {
            return Some(behind);
        }
        at = after(text, at, b'\\')?;
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

/// The place behind a number, `true`, `false` or `null`; serde_json says whether it is one.
fn after_bare(text: &str, at: usize) -> Option<usize> {
    let rest = text.get(at..)?;
    let length = rest.find([',', ']', '}']).unwrap_or(rest.len());
    serde_json::from_str::<IgnoredAny>(rest.get(..length)?).ok()?;
    Some(at + length)
}

/// The first place from `from` on of what cannot stand in a text as it is.
fn special(text: &str, from: usize) -> Option<usize> {
    let mut rest = text.as_bytes().get(from..)?;
    let mut at = from;
    while let Some((word, behind)) = rest.split_first_chunk() {
        let found = specials(word);
        if found != 0 {
            return Some(at + found.trailing_zeros() as usize / 8);
        }
        (rest, at) = (behind, at + 8);
    }
    let place = rest.iter().position(is_special)?;
    Some(at + place)
}

/// Whether a byte cannot stand in a text as it is: a quote, a backslash, a control character.
const fn is_special(byte: &u8) -> bool {
    matches!(byte, 0..b' ' | b'"' | b'\\')
}

/// The same of eight bytes, told by the high bit of each, the first byte being the lowest: right of all up to the first
/// that is special, and zero if none is.
fn specials(word: &[u8; 8]) -> u64 {
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

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::fmt::Debug;

    use serde_json::{Value, json};

    use super::*;

    /// Something of each kind that a review is made of.
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
    fn compact_json_is_read_here_to_what_serde_json_reads() {
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
    fn what_is_not_compact_is_left_to_serde_json() {
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
    fn whatever_one_byte_changes_is_read_as_serde_json_reads_it_or_left_to_it() {
        const BYTES: &[u8] = b"{}[]\":,\\ tnu09-.eE/\n\x1f\x7f";
        let sample = json!({
            "text": "a\"b",
            "skipped": {"a": [], "b": {}, "c": [[1, -2.5e-7], {"d": "\\ \u{1} é"}, true, null]},
            "truth": false,
            "number": 10,
            "list": [{"text": "12345678", "number": null}, {"truth": null, "skipped": "x"}],
        });
        let whole = sample.to_string();
        let (mut read_here, mut left) = (0, 0);
        let mut check = |edited: Vec<u8>| {
            let Ok(text) = String::from_utf8(edited) else {
                return;
            };
            match read::<Sample<'_>>(&text) {
                Some(sample) => {
                    assert_eq!(Some(sample), by_serde_json(&text), "{text}");
                    read_here += 1;
                }
                None => left += 1,
            }
        };
        for at in 0..whole.len() {
            let (before, from) = whole.as_bytes().split_at(at);
            let behind = &from[1..];
            check([before, behind].concat());
            for byte in BYTES {
                check([before, &[*byte], behind].concat());
                check([before, &[*byte], from].concat());
            }
        }
        assert!(read_here > 1000 && left > 1000, "{read_here} {left}");
    }

    #[test]
    fn what_is_skipped_is_read_here_up_to_a_depth() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(read::<IgnoredAny>(&nested(128)).is_some());
        let deeper = nested(129);
        assert!(read::<IgnoredAny>(&deeper).is_none());
        assert!(from_str::<IgnoredAny>(&deeper).is_ok());
    }
}
