//! Texts as JSON, written fast: patches and log lines are nearly nothing else. What JSON there is to write is
//! patch.rs's and telemetry/json.rs's business.

/// Whether it could be written.
pub type Written = Result<(), serde_json::Error>;

/// Writes a text as JSON. Nearly none has anything to escape, and that shows at a glance over many bytes at a time,
/// where serde_json looks at one after the other.
///
/// # Errors
/// None in practice: there is no text that JSON cannot say.
pub fn text(out: &mut String, text: &str) -> Written {
    let needs_escape = |found, &byte: &u8| found | matches!(byte, 0..b' ' | b'"' | b'\\');
    if text.as_bytes().iter().fold(false, needs_escape) {
        out.push_str(&serde_json::to_string(text)?);
        return Ok(());
    }
    out.push('"');
    out.push_str(text);
    out.push('"');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_must_escape_is_escaped() {
        for plain in ["", "sk-123", "http://x/{}?a=b&c='d'", "é…🦀\u{7f}"] {
            assert_eq!(text_written(plain), format!("\"{plain}\""));
        }
        for special in [
            "\"",
            "\\",
            "\n",
            "\0",
            "\u{1f}",
            "a long text that ends with \"",
        ] {
            let written = text_written(special);
            assert_eq!(written, serde_json::to_string(special).unwrap());
            assert_ne!(written, format!("\"{special}\""));
        }
    }

    fn text_written(special: &str) -> String {
        let mut out = String::new();
        text(&mut out, special).unwrap();
        out
    }
}
