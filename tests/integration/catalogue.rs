//! The catalogue: the build script's checks of its rows, the `catalogue` command, and what one envFrom costs.

use std::collections::BTreeMap;

use llm_billing_webhook::core::catalogue::ROWS;
use llm_billing_webhook::core::policy::Policy;
use serde_json::{Value, json};

use test_support::in_process::{answer, stored};
use test_support::program::run;
use test_support::{PROXY, create, patch_of, recorded};

#[expect(dead_code, reason = "main is the build script's")]
#[path = "../../build.rs"]
mod build_script;

const HEADER: &str = "program,variable,kind,mask,source,version,checked\n";
const ROW: &str = "Tool,TOOL_KEY,credential,,https://tool.example/env,1.0,2026-11-27\n";

#[test]
fn faulty_row_fails_the_build_with_its_line() {
    assert!(build_script::rows(&format!("{HEADER}{ROW}")).is_ok());
    let with = |from: &str, to: &str| format!("{HEADER}{ROW}{}", ROW.replace(from, to));
    let table = [
        (ROW.to_owned(), "line 1: expected program,variable,kind,"),
        (with(",1.0", ""), "line 3: expected 7 fields, found 6"),
        (
            with("credential", "credentail"),
            "line 3: unknown kind \"credentail\"; expected one of credential, endpoint, route, header, config, shared",
        ),
        (with("l,,", "l,empty,"), "line 3: unknown mask \"empty\"; expected one of "),
        (with("https://tool.example/env", ""), "line 3: source: expected a URL with https"),
        (with("Tool,", ","), "line 3: program: expected a name"),
        (
            with("TOOL_KEY", "TOOL KEY"),
            "line 3: variable: expected letters, digits and underscores",
        ),
        (with("1.0", ""), "line 3: version: expected "),
        (with("2026-11-27", "today"), "line 3: checked: expected a date"),
        (with("", ""), "Tool has two rows for TOOL_KEY"),
        (
            with("Tool,TOOL_KEY,credential", "Other,TOOL_KEY,shared"),
            "line 3: TOOL_KEY has another kind or mask in an earlier row",
        ),
        (
            with("Tool,TOOL_KEY,credential,", "Other,TOOL_KEY,credential,=x"),
            "line 3: TOOL_KEY has another kind or mask in an earlier row",
        ),
    ];
    for (text, expected) in table {
        let error = build_script::rows(&text).err().unwrap_or_default();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn command_filters_by_program_and_kind() {
    let (code, json, _) = run(&["catalogue", "-o", "json"]);
    assert_eq!(code, 0);
    let all: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(all.len(), ROWS.len());
    let first = &ROWS[0];
    let expected = json!({
        "program": first.program, "variable": first.variable, "kind": first.kind.as_str(),
        "source": first.source, "version": first.version, "checked": first.checked,
    });
    assert_eq!(all[0], expected);

    let (code, table, _) = run(&["catalogue", "--program", "CODEX", "--kind", "credential"]);
    assert_eq!(code, 0);
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("VARIABLE "));
    let expected = ROWS.iter().filter(|row| row.program == "Codex");
    let expected = expected.filter(|row| row.kind.as_str() == "credential");
    let expected: Vec<&str> = expected.map(|row| row.variable).collect();
    let variables = lines.map(|line| line.split_whitespace().next().unwrap());
    assert_eq!(variables.collect::<Vec<_>>(), expected);
    assert!(expected.contains(&"CODEX_API_KEY"));

    for arguments in [["--kind", "credentail"], ["--program", "Codexx"]] {
        let (code, _, stderr) = run(&[&["catalogue"], &arguments[..]].concat());
        assert_eq!(code, 2);
        assert!(stderr.contains("tip: a similar value exists"), "{stderr}");
    }
}

/// Each env entry is listed in `kubectl describe`, and the API server writes each patch to its audit log.
#[test]
fn env_from_costs_one_short_entry_per_removed_variable() {
    let policy = Policy::parse(PROXY).unwrap();
    let restrictions = policy.restrictions.all().iter();
    let removed = restrictions
        .filter(|restriction| restriction.is_removed)
        .count();
    let env_from = json!([{"secretRef": {"name": "s"}}]);
    let entries = |env_from: &Value| {
        let pod = json!({"spec": {"containers": [{"name": "c", "envFrom": env_from}]}});
        let mut pod = pod;
        pod["metadata"]["labels"] =
            json!({"molecule.ai/workspace-id": "88888888-8888-8888-8888-888888888888"});
        let patch = patch_of(&answer(&policy, &stored("platform_managed"), &create(&pod)));
        let env = patch[0]["value"].as_array().unwrap().clone();
        let named = env
            .into_iter()
            .map(|entry| (entry["name"].to_string(), entry));
        named.collect::<BTreeMap<_, _>>()
    };
    let (without, with) = (entries(&json!([])), entries(&env_from));
    // The proxy sets OPENAI_API_KEY and OPENAI_BASE_URL, which need no mask.
    assert_eq!(with.len() - without.len(), removed - 2);

    let review = recorded("hermes-deployment-pod");
    let answer = answer(&policy, &stored("platform_managed"), &review).to_string();
    assert!(answer.len() < 16_000, "{} bytes", answer.len());
}
