//! The commands `workspace`, `resolve`, `policy` and `completions`.

use llm_billing_webhook::core::policy_file::PolicyFile;

use test_support::postgres::Postgres;
use test_support::program::run;

const ID: &str = "88888888-8888-8888-8888-888888888888";

#[test]
fn workspace_mode_is_listed_and_resolved_until_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("new.sqlite").display());
    let call = |arguments: &[&str]| run(&[arguments, &["--database-url", &url]].concat());
    let confirmation = |mode: &str| {
        format!("workspace {ID} is set to {mode}; it applies to pods created from now on\n")
    };
    assert_eq!(call(&["workspace", "list"]), (0, String::new(), String::new()));
    for mode in ["byok", "disabled", "platform_managed"] {
        assert_eq!(call(&["workspace", "set", ID, mode]), (0, String::new(), confirmation(mode)));
        assert_eq!(call(&["workspace", "list"]).1, format!("{ID}  {mode}\n"));
        let answer = format!("mode:   {mode}\nsource: workspace_override\nreason: override\n");
        assert_eq!(call(&["resolve", ID]), (0, answer, String::new()));
    }
    assert_eq!(
        call(&["workspace", "clear", ID]),
        (0, String::new(), confirmation("the platform's default"))
    );
    assert_eq!(call(&["workspace", "list"]).1, format!("{ID}  -\n"));
    let answer = |reason: &str| {
        format!(
            "{{\"mode\":\"platform_managed\",\"source\":\"constant_fallback\",\"reason\":\"{reason}\"}}\n"
        )
    };
    let resolved = |id: &str| call(&["resolve", id, "-o", "json"]);
    assert_eq!(resolved(ID), (0, answer("no_override"), String::new()));
    assert_eq!(resolved("99999999-9999-9999-9999-999999999999").1, answer("workspace_not_found"));
    assert_eq!(resolved("no-uuid").1, answer("invalid_workspace_id"));
    assert_eq!(resolved("").1, answer("missing_workspace_id"));
}

#[test]
fn invalid_arguments_are_reported_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("new.sqlite").display());
    let error = |arguments: &[&str]| {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""));
        stderr
    };
    let mode = error(&["workspace", "set", ID, "managed", "--database-url", &url]);
    assert!(
        mode.contains(
            "invalid value 'managed' for '<MODE>': expected one of platform_managed, byok, disabled"
        ),
        "{mode}"
    );
    let id = error(&[
        "workspace",
        "set",
        "no-uuid",
        "byok",
        "--database-url",
        &url,
    ]);
    assert!(id.contains("invalid value 'no-uuid' for '<ID>'"), "{id}");
    assert_eq!(
        error(&["resolve", ID]),
        "error: no database is given; set --database-url or --database-url-file\n"
    );
    assert_eq!(
        error(&["resolve", ID, "--database-url", "mysql://x"]),
        "error: cannot use the database URL: it must start with postgres:// or sqlite://\n"
    );
    assert_eq!(
        error(&["resolve", ID, "--database-url", &url, "--label", "x"]),
        "error: --label takes KEY=VALUE\n"
    );
}

#[test]
fn workspace_command_refuses_the_platforms_database() {
    let postgres = Postgres::with("CREATE TABLE workspaces (id uuid, llm_billing_mode text)");
    for command in [&["set", ID, "byok"][..], &["clear", ID], &["list"]] {
        let (code, _, stderr) = run(&[
            &["workspace"],
            command,
            &["--database-url", &postgres.url()],
        ]
        .concat());
        let expected = "error: the database is not SQLite; the platform's own database is never written, so change modes through the platform\n";
        assert_eq!((code, stderr.as_str()), (2, expected));
    }
}

#[test]
fn resolve_binds_all_query_parameters_on_postgresql() {
    let postgres = Postgres::with(&format!(
        "CREATE TABLE t (space text, tenant text, id uuid, mode text); INSERT INTO t VALUES ('ns', 'acme', '{ID}', 'byok')"
    ));
    let folder = tempfile::tempdir().unwrap();
    let policy = folder.path().join("policy.yaml");
    let text = "lookup:
  query: SELECT mode FROM t WHERE space = $1 AND tenant = $2 AND id = $3
  parameters: [{field: namespace}, {label: tenant, type: text}, {label: molecule.ai/workspace-id, type: uuid}]";
    std::fs::write(&policy, text).unwrap();
    let policy = policy.to_str().unwrap();
    let answer = run(&[
        "resolve",
        ID,
        "-n",
        "ns",
        "--label",
        "tenant=acme",
        "--policy",
        policy,
        "--database-url",
        &postgres.url(),
        "-o",
        "json",
    ]);
    assert_eq!(
        answer.1,
        "{\"mode\":\"byok\",\"source\":\"workspace_override\",\"reason\":\"override\"}\n"
    );
}

#[test]
fn default_policy_and_schema_are_printed() {
    let (code, default, _) = run(&["policy", "default"]);
    assert_eq!(code, 0);
    assert!(PolicyFile::parse(&default).unwrap() == PolicyFile::default());
    let (code, schema, _) = run(&["policy", "schema"]);
    assert_eq!(code, 0);
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"].as_object().unwrap().len(), 11);
}

#[test]
fn completions_are_printed_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, script, stderr) = run(&["completions", shell]);
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert!(script.contains("llm-billing-webhook") && script.contains("workspace"), "{shell}");
    }
    let mut child = test_support::program::program(&["completions", "zsh"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
