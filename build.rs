//! Compiles the catalogue, src/core/catalogue.csv, into the rows of core/catalogue.rs. A faulty row fails the build.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::{env, fs, io};

const CATALOGUE: &str = "src/core/catalogue.csv";
const HEADER: &str = "program,variable,kind,mask,source,version,checked";
/// The names in the file and the variants of `core::catalogue::Kind`.
const KINDS: [(&str, &str); 6] = [
    ("credential", "Credential"),
    ("endpoint", "Endpoint"),
    ("route", "Route"),
    ("header", "Header"),
    ("config", "Config"),
    ("shared", "Shared"),
];
/// The names in the file and the variants of `core::catalogue::Mask`. `=VALUE` is a literal.
const MASKS: [(&str, &str); 4] = [
    ("", "Literal(\"\")"),
    ("openai_base_url", "OpenAiBaseUrl"),
    ("anthropic_base_url", "AnthropicBaseUrl"),
    ("anthropic_token", "AnthropicToken"),
];

fn main() -> Result<(), String> {
    writeln!(io::stdout(), "cargo::rerun-if-changed={CATALOGUE}\ncargo::rerun-if-changed=build.rs")
        .map_err(|error| format!("cannot write to stdout: {error}"))?;
    let text = fs::read_to_string(CATALOGUE)
        .map_err(|error| format!("cannot read {CATALOGUE}: {error}"))?;
    let folder = env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?;
    let rows = rows(&text).map_err(|error| format!("{CATALOGUE}: {error}"))?;
    let path = Path::new(&folder).join("catalogue.rs");
    fs::write(&path, rows).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Returns the rows as a Rust array, sorted by variable.
pub(crate) fn rows(text: &str) -> Result<String, String> {
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err(format!("line 1: expected {HEADER}"));
    }
    let mut rows = Vec::new();
    let mut meanings = HashMap::new();
    for (index, line) in lines.enumerate() {
        let number = index + 2;
        let row = row(line).map_err(|problem| format!("line {number}: {problem}"))?;
        let meaning = (row.kind.clone(), row.mask.clone());
        if *meanings.entry(row.variable).or_insert(meaning.clone()) != meaning {
            let problem = "has another kind or mask in an earlier row";
            return Err(format!("line {number}: {} {problem}", row.variable));
        }
        rows.push(row);
    }
    rows.sort_by_key(|row| (row.variable, row.program));
    if let Some([row, _]) = rows
        .array_windows()
        .find(|[a, b]| (a.variable, a.program) == (b.variable, b.program))
    {
        return Err(format!("{} has two rows for {}", row.program, row.variable));
    }
    Ok(format!("[{}]", rows.iter().map(Row::to_rust).collect::<String>()))
}

struct Row<'a> {
    program: &'a str,
    variable: &'a str,
    kind: String,
    mask: String,
    source: &'a str,
    version: &'a str,
    checked: &'a str,
}

/// Reads a row. Its fields have neither commas nor quotes.
fn row(line: &str) -> Result<Row<'_>, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let &[program, variable, kind, mask, source, version, checked] = fields.as_slice() else {
        return Err(format!("expected 7 fields, found {}", fields.len()));
    };
    let variant = |names: &[(&str, &'static str)], field: &str, name: &str| {
        let known = names.iter().find(|(known, _)| *known == name);
        known.map(|(_, variant)| *variant).ok_or_else(|| {
            let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
            format!("unknown {field} {name:?}; expected one of {}", names.join(", "))
        })
    };
    let is_name = |name: &str| {
        let is_name_char = |c: char| c.is_ascii_alphanumeric() || c == '_';
        !name.is_empty() && name.chars().all(is_name_char)
    };
    let is_date = |date: &str| {
        let parts: Vec<&str> = date.split('-').collect();
        parts.iter().map(|part| part.len()).eq([4, 2, 2])
            && parts.concat().chars().all(|c| c.is_ascii_digit())
    };
    for (is_valid, field, expected) in [
        (!program.trim().is_empty(), "program", "a name"),
        (is_name(variable), "variable", "letters, digits and underscores"),
        (source.starts_with("https://"), "source", "a URL with https"),
        (!version.trim().is_empty(), "version", "the version that was read"),
        (is_date(checked), "checked", "a date such as 2026-11-27"),
    ] {
        if !is_valid {
            return Err(format!("{field}: expected {expected}"));
        }
    }
    let kind = variant(&KINDS, "kind", kind)?.to_owned();
    let mask = match mask.strip_prefix('=') {
        Some(literal) => format!("Literal({literal:?})"),
        None => variant(&MASKS, "mask", mask)?.to_owned(),
    };
    Ok(Row {
        program,
        variable,
        kind,
        mask,
        source,
        version,
        checked,
    })
}

impl Row<'_> {
    fn to_rust(&self) -> String {
        let Self {
            program,
            variable,
            kind,
            mask,
            source,
            version,
            checked,
        } = self;
        format!(
            "Row {{ program: {program:?}, variable: {variable:?}, kind: Kind::{kind}, mask: Mask::{mask}, \
             source: {source:?}, version: {version:?}, checked: {checked:?} }},\n"
        )
    }
}
