//! The `check` command: its report and exit code for valid and invalid setups.

use std::fs;

use test_support::postgres::Postgres;
use test_support::program::{Authority, run};
use test_support::{PROXY, WORKSPACE_LABEL};

#[test]
fn valid_setup_is_reported_line_by_line() {
    let postgres = Postgres::with("CREATE TABLE workspaces (id uuid, llm_billing_mode text)");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = Authority::generate().issue("localhost");
    for (name, text) in [
        ("policy.yaml", PROXY),
        ("tls.crt", &certificate),
        ("tls.key", &key),
    ] {
        fs::write(path(name), text).unwrap();
    }
    let (code, report, stderr) = run(&[
        "check",
        "--policy",
        &path("policy.yaml"),
        "--tls-cert",
        &path("tls.crt"),
        "--tls-key",
        &path("tls.key"),
        "--database-url",
        &postgres.url(),
    ]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{report}");
    let lines: Vec<&str> = report.lines().collect();
    assert_eq!(lines[0], format!("ok    policy       {}", path("policy.yaml")));
    assert!(lines[1].starts_with("ok    certificate  valid for "), "{report}");
    assert!(lines[2].starts_with("ok    database     postgres://localhost:"), "{report}");
    assert!(lines[2].ends_with(" answers the policy's query"), "{report}");
    assert_eq!(lines.len(), 3);
}

#[test]
fn check_without_flags_reports_the_skipped_checks() {
    let (code, report, _) = run(&["check"]);
    assert_eq!(code, 0);
    assert_eq!(
        report,
        "ok    policy       the default one; --policy is not set\n\
         warn  policy       proxy is absent: every platform_managed pod will be refused\n\
         skip  certificate  --tls-cert and --tls-key are not set\n\
         skip  database     --database-url is not set\n"
    );
}

#[test]
fn all_errors_are_reported_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("policy.yaml"), format!("workspaceLabel: {WORKSPACE_LABEL}\nvendorKey: []\n"))
        .unwrap();
    let (code, report, _) = run(&[
        "check",
        "--policy",
        &path("policy.yaml"),
        "--tls-cert",
        &path("missing.crt"),
        "--tls-key",
        &path("missing.key"),
        "--database-url",
        "postgres://nowhere",
    ]);
    assert_eq!(code, 2);
    let expected = format!(
        "error policy       cannot use policy {} (see: llm-billing-webhook policy schema): line 2, column 1: \
         unknown field \"vendorKey\" (did you mean vendorKeys?); expected one of workspaceLabel, runtimeLabel, unlabelled, lookup, variables, vendorKeys, catalogue, allow, envFrom, changedEntries, proxy\n\
         error certificate  cannot read {}: No such file or directory (os error 2)\n\
         skip  database     not queried, because the policy is invalid\n",
        path("policy.yaml"),
        path("missing.crt")
    );
    assert_eq!(report, expected);
    let (code, report, _) = run(&["check", "--database-url", "sqlite:///nonexistent/file"]);
    assert_eq!(code, 2);
    assert!(
        report.contains("error database     cannot query the database at /nonexistent/file: "),
        "{report}"
    );
}

#[test]
fn unreachable_database_is_named_by_host_and_port() {
    for (url, error) in [
        (
            "postgres://u:secret@127.0.0.1:1/d",
            "cannot query the database at 127.0.0.1:1: Connection refused (os error 111)",
        ),
        (
            "postgres:///d?host=/nonexistent&user=u&password=secret",
            "cannot query the database at /nonexistent: a file that the database URL names, such as sslrootcert or a \
             socket, is missing: No such file or directory (os error 2)",
        ),
    ] {
        let (code, report, _) = run(&["check", "--database-url", url]);
        assert_eq!(code, 2);
        let last = format!("error database     {error}\n");
        assert!(report.ends_with(&last), "{report}");
    }
}

#[test]
fn certificate_expiry_is_an_error_or_a_warning() {
    for (seconds, verdict) in [
        (-60, "error certificate  it has expired; renew it"),
        (3600, "warn  certificate  it expires within 7 days"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (certificate, key) = Authority::generate().issue_for("localhost", seconds);
        fs::write(path("tls.crt"), certificate).unwrap();
        fs::write(path("tls.key"), key).unwrap();
        let (code, report, _) = run(&[
            "check",
            "--tls-cert",
            &path("tls.crt"),
            "--tls-key",
            &path("tls.key"),
        ]);
        assert!(report.contains(verdict), "{report}");
        assert_eq!(code, if seconds < 0 { 2 } else { 0 });
    }
}
