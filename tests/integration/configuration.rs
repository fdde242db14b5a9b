//! Checks that docs/configuration.md and the man pages match the program.

use std::fs;
use std::path::Path;

use serde_json::Value;

use test_support::fixtures;
use test_support::program::run;
use test_support::transcript::page;

const HEAD: &str = "\
<!-- Written by scripts/configuration. -->

# Configuration

Every field of the policy file, and every command with its flags. The chart's values are described in
[values.yaml](../charts/llm-billing-webhook/values.yaml).

## The policy file

The policy file is YAML. An empty file is the default policy; an unknown field is an error that names its line.
`policy default` prints the default policy with comments, and `policy schema` prints a JSON schema for editors.

| field | values | default | meaning |
|---|---|---|---|
";

/// Returns a schema with its `$ref` resolved.
fn resolved<'s>(root: &'s Value, schema: &'s Value) -> &'s Value {
    let alternatives = schema["anyOf"].as_array().into_iter().flatten();
    let mut alternatives = alternatives.filter(|schema| schema["type"] != "null");
    let schema = alternatives.next().unwrap_or(schema);
    match schema["$ref"].as_str() {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

/// Returns a field's type or its possible values.
fn values(root: &Value, schema: &Value) -> String {
    let schema = resolved(root, schema);
    let constants: Vec<String> = schema["oneOf"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|value| Some(format!("`{}`", value["const"].as_str()?)))
        .collect();
    if !constants.is_empty() {
        return constants.join(", ");
    }
    match kind(schema) {
        Some("array") => format!("list of {}", values(root, &schema["items"])),
        Some("object") => "fields".to_owned(),
        Some(kind) => kind.to_owned(),
        None => "one of its fields".to_owned(),
    }
}

/// Returns a field's type, whether it is optional or not.
fn kind(schema: &Value) -> Option<&str> {
    match &schema["type"] {
        Value::Array(kinds) => kinds[0].as_str(),
        kind => kind.as_str(),
    }
}

/// Returns a field's description and the meaning of each of its values.
fn meaning(root: &Value, alternative: &Value, field: &Value) -> String {
    let target = resolved(root, field);
    let descriptions = [field, alternative, target].map(|schema| schema["description"].as_str());
    let mut meaning = descriptions
        .into_iter()
        .flatten()
        .next()
        .unwrap_or_default()
        .to_owned();
    for schema in target["oneOf"].as_array().into_iter().flatten() {
        if let (Some(value), Some(text)) =
            (schema["const"].as_str(), schema["description"].as_str())
        {
            meaning += &format!(" `{value}`: {text}");
        }
    }
    meaning.replace('\n', " ").replace('|', "\\|")
}

fn rows(root: &Value, defaults: &Value, schema: &Value, path: &str, text: &mut String) {
    let schema = resolved(root, schema);
    let alternatives = schema["oneOf"].as_array().into_iter().flatten();
    let alternatives = alternatives.map(|schema| (schema, schema));
    for (object, alternative) in [(schema, &Value::Null)].into_iter().chain(alternatives) {
        for (name, field) in object["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}{name}");
            let default = match defaults.pointer(&format!("/{}", path.replace('.', "/"))) {
                None | Some(Value::Null | Value::Object(_)) => String::new(),
                Some(Value::Array(list)) if list.len() > 3 => "see `policy default`".to_owned(),
                Some(default) => format!("`{default}`"),
            };
            let meaning = meaning(root, alternative, field);
            *text += &format!("| `{path}` | {} | {default} | {meaning} |\n", values(root, field));
            let items = resolved(root, field);
            if kind(items) == Some("array") {
                rows(root, defaults, &items["items"], &format!("{path}[]."), text);
            } else {
                rows(root, defaults, field, &format!("{path}."), text);
            }
        }
    }
}

/// Returns the subcommands that the program's help lists for the command at `path`.
fn commands(path: &[&str]) -> Vec<String> {
    let (_, help, _) = run(&[&["help"], path].concat());
    let Some((_, list)) = help.split_once("Commands:\n") else {
        return Vec::new();
    };
    let names = list.lines().take_while(|line| line.starts_with("  "));
    let names = names.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names
        .filter(|name| !name.is_empty() && *name != "help")
        .map(str::to_owned)
        .collect()
}

fn generated() -> String {
    let schema: Value = serde_json::from_str(&run(&["policy", "schema"]).1).unwrap();
    let mut text = HEAD.to_owned();
    let defaults = serde_saphyr::from_str(&run(&["policy", "default"]).1).unwrap();
    rows(&schema, &defaults, &schema, "", &mut text);
    text += "\n## A schema of your own\n\nThe query maps any schema to a mode, and its further columns to variables. Each example is a schema and the policy for\nit; `tests/integration/columns.rs` runs both on PostgreSQL and SQLite.\n\n";
    for (title, name) in [
        ("The contract's column", "mode"),
        ("A mode derived from a provider, with variables of its own", "provider"),
    ] {
        let read = |extension: &str| {
            fs::read_to_string(fixtures("schemas").join(format!("{name}.{extension}"))).unwrap()
        };
        text += &format!(
            "### {title}\n\n```sql\n{}```\n\n```yaml\n{}```\n\n",
            read("sql"),
            read("yaml")
        );
    }
    text += "An answer that is not as the policy needs it is a failed lookup, and `check` and `serve` report a column that is missing\nor not text before any pod does: several rows, a first column that is not text, a value of more than 4,096 bytes.\n";
    text += "\n## The command line\n\nEvery flag can also be set by the environment variable that its help names. Errors go to\nstderr, or into the report of `check`, and the exit code is then 2.\n";
    for name in commands(&[]) {
        for path in [vec![name.as_str()]].into_iter().chain(
            commands(&[&name])
                .iter()
                .map(|sub| vec![name.as_str(), sub.as_str()]),
        ) {
            let (code, help, _) = run(&[&["help"], &path[..]].concat());
            assert_eq!(code, 0);
            let help: Vec<&str> = help.lines().map(str::trim_end).collect();
            text += &format!(
                "\n### `{}`\n\n```text\n{}\n```\n",
                path.join(" "),
                help.join("\n").trim_end()
            );
        }
    }
    text
}

#[test]
fn configuration_page_matches_the_program() {
    let generated = generated();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        fs::write(file, &generated).unwrap();
    }
    assert!(
        page("docs/configuration.md") == generated,
        "docs/configuration.md is stale; run scripts/configuration"
    );
}

#[test]
fn program_and_each_command_have_a_man_page() {
    let (code, page, _) = run(&["man"]);
    assert_eq!(code, 0);
    assert!(page.contains(".TH llm-billing-webhook 1"), "{page}");
    for name in commands(&[]) {
        let (code, page, _) = run(&["man", &name]);
        assert_eq!(code, 0, "{name}");
        assert!(page.contains(&format!(".TH llm-billing-webhook-{name} 1")), "{page}");
    }
    let (code, _, stderr) = run(&["man", "none"]);
    assert_eq!(
        (code, stderr.as_str()),
        (2, "error: there is no command \"none\"; see: llm-billing-webhook help\n")
    );
}
