//! The lookup on real databases: the same suite on PostgreSQL and on SQLite, then what only one of them
//! has.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use llm_billing_webhook::core::identity::ParameterValue;
use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::resolution::LookupOutcome;
use llm_billing_webhook::database::{Database, UrlSource};
use serde_json::{Value, json};

use test_support::load;
use test_support::postgres::{Cluster, PgBouncer, Postgres};
use test_support::program::{Authority, Start, Webhook, run, shown, wait_for};
use test_support::relay::Relay;
use test_support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";

/// A database of either kind with this schema, and what makes a URL for it.
enum Kind {
    Postgres,
    Sqlite(tempfile::TempDir),
}

impl Kind {
    fn both() -> [Self; 2] {
        [Self::Postgres, Self::Sqlite(tempfile::tempdir().unwrap())]
    }

    fn with(&self, schema: &str) -> String {
        match self {
            Self::Postgres => Postgres::with(schema).url(),
            Self::Sqlite(folder) => {
                let file = folder.path().join("database.sqlite");
                if file.exists() {
                    std::fs::remove_file(&file).unwrap();
                }
                test_support::sqlite(&file, schema);
                format!("sqlite://{}", file.display())
            }
        }
    }

    fn is_postgres(&self) -> bool {
        matches!(self, Self::Postgres)
    }
}

fn start(policy: &str, database_url: &str) -> Webhook {
    Start {
        policy,
        database_url,
        ..Start::default()
    }
    .start()
}

/// Exit code and stderr of a `serve` that must end by itself.
fn start_in_vain(policy: &str, database_url: &str) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = Authority::generate().issue("localhost");
    std::fs::write(folder.path().join("tls.crt"), certificate).unwrap();
    std::fs::write(folder.path().join("tls.key"), key).unwrap();
    let mut command = Start {
        policy,
        database_url,
        ..Start::default()
    }
    .command(folder.path());
    let (code, _, stderr) = shown(&command.output().unwrap());
    (code, stderr)
}

/// Exit code and stdout of `check`.
fn check(policy: &str, database_url: &str) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy).unwrap();
    let (code, stdout, _) = run(&[
        "check",
        "--policy",
        file.to_str().unwrap(),
        "--database-url",
        database_url,
    ]);
    (code, stdout)
}

/// Mode and reason of a pod of this workspace.
fn resolved(webhook: &Webhook, pod: &Value) -> (String, String) {
    let annotations = webhook.mutate(&create(pod))["response"]["auditAnnotations"].clone();
    let text = |field: &str| annotations[field].as_str().unwrap_or_default().to_owned();
    (text("mode"), text("reason"))
}

#[test]
fn what_is_committed_is_what_the_next_pod_gets() {
    let postgres =
        Postgres::with("CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text)");
    let webhook = start(PROXY, &postgres.url());
    let pod = pod(ID, &json!([]));
    let is = |mode: &str, reason: &str| {
        assert_eq!(
            resolved(&webhook, &pod),
            (mode.to_owned(), reason.to_owned())
        )
    };
    is("platform_managed", "workspace_not_found");
    postgres.execute(&format!("INSERT INTO workspaces VALUES ('{ID}', NULL)"));
    is("platform_managed", "no_override");
    for mode in ["byok", "disabled", "platform_managed", "byok"] {
        postgres.execute(&format!(
            "UPDATE workspaces SET llm_billing_mode = '{mode}'"
        ));
        is(mode, "override");
    }
    postgres.execute("DELETE FROM workspaces");
    is("platform_managed", "workspace_not_found");
}

#[test]
fn the_query_and_its_parameters_come_from_the_policy() {
    for kind in Kind::both() {
        let url = kind.with(&format!(
            "CREATE TABLE spaces (tenant text, space text, id uuid, mode text);
             INSERT INTO spaces VALUES ('acme', 'ws-acme', '{ID}', 'disabled'), ('other', 'ws-acme', '{ID}', 'byok');"
        ));
        let webhook = start(
            "lookup:
               query: SELECT mode, id FROM spaces WHERE space = $1 AND tenant = $2 AND id = $3
               parameters: [{field: namespace}, {label: tenant, type: text}, {label: molecule.ai/workspace-id, type: uuid}]",
            &url,
        );
        let mut pod = pod(&ID.to_uppercase(), &json!([]));
        for (tenant, mode) in [("acme", "disabled"), ("other", "byok")] {
            pod["metadata"]["labels"]["tenant"] = tenant.into();
            assert_eq!(
                resolved(&webhook, &pod),
                (mode.to_owned(), "override".to_owned())
            );
        }
    }
}

#[test]
fn a_pod_that_names_a_workspace_of_another_namespace_finds_none() {
    let postgres = Postgres::with(&format!(
        "CREATE TABLE workspaces (id uuid, namespace text, llm_billing_mode text);
         INSERT INTO workspaces VALUES ('{ID}', 'ws-acme', 'byok')"
    ));
    let webhook = start(
        "lookup:
           query: SELECT llm_billing_mode FROM workspaces WHERE id = $1 AND namespace = $2
           parameters: [{label: molecule.ai/workspace-id, type: uuid}, {field: namespace}]",
        &postgres.url(),
    );
    let mut review = create(&pod(ID, &json!([])));
    for (namespace, mode) in [("ws-acme", "byok"), ("ws-other", "platform_managed")] {
        review["request"]["namespace"] = namespace.into();
        review["request"]["object"]["metadata"]["namespace"] = "ws-acme".into();
        let answer = webhook.mutate(&review);
        assert_eq!(answer["response"]["auditAnnotations"]["mode"], mode);
    }
}

#[test]
fn a_query_that_the_database_refuses_fails_check_and_start_in_the_databases_own_words() {
    let two = "parameters: [{label: molecule.ai/workspace-id, type: uuid}, {field: namespace}]";
    let text = "parameters: [{label: molecule.ai/workspace-id, type: text}]";
    for kind in Kind::both() {
        let url =
            kind.with("CREATE TABLE workspaces (id uuid, llm_billing_mode text, price integer)");
        let of = |postgres: &str, sqlite: &str| {
            if kind.is_postgres() {
                postgres.to_owned()
            } else {
                sqlite.to_owned()
            }
        };
        let mut table = vec![
            (
                "query: SELECT mode FROM workspaces WHERE id = $1",
                of("column \"mode\" does not exist", "no such column: mode"),
            ),
            (
                "query: SELECT 1 FROM nowhere WHERE id = $1",
                of(
                    "relation \"nowhere\" does not exist",
                    "no such table: nowhere",
                ),
            ),
            (
                "query: SELEKT $1",
                of(
                    "syntax error at or near \"SELEKT\"",
                    "near \"SELEKT\": syntax error",
                ),
            ),
            (
                "query: SELECT llm_billing_mode FROM workspaces WHERE id = $1 AND price = $2",
                "it takes 2 parameters, and lookup.parameters has 1".to_owned(),
            ),
        ];
        table.push((
            two,
            "it takes 1 parameters, and lookup.parameters has 2".to_owned(),
        ));
        if kind.is_postgres() {
            table.push((text, "operator does not exist: uuid = text".to_owned()));
        }
        for (lookup, words) in table {
            let policy = format!("lookup: {{{lookup}}}");
            let refused = format!("the database refuses the policy's query: {words}");
            let (code, report) = check(&policy, &url);
            assert!(
                code == 2 && report.contains(&format!("error database     {refused}")),
                "{code} {report}"
            );
            let (code, stderr) = start_in_vain(&policy, &url);
            assert!(
                code == 2 && stderr.contains(&format!("error: cannot start: {refused}")),
                "{code} {stderr}"
            );
        }
    }
}

#[test]
fn a_mode_column_that_is_not_text_is_refused_rather_than_guessed_at() {
    for kind in Kind::both() {
        let url = kind.with(&format!(
            "CREATE TABLE workspaces (id uuid, llm_billing_mode integer); INSERT INTO workspaces VALUES ('{ID}', 7)"
        ));
        let webhook = start(PROXY, &url);
        assert_eq!(
            resolved(&webhook, &pod(ID, &json!([]))),
            ("platform_managed".to_owned(), "lookup_error".to_owned())
        );
        let line = webhook.wait_for_log("lookup refused");
        // It has the request's uid, as the admission's own line has.
        let uid = "\"uid\":\"00000000-0000-0000-0000-0000000000aa\"";
        assert!(line.contains(uid), "{line}");
        assert!(
            line.contains("\"ERROR\"")
                && line.contains("the first column that it returns is not text"),
            "{line}"
        );
    }
}

#[test]
fn a_database_that_is_down_at_start_is_waited_for_and_pods_are_answered_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("later.sqlite");
    let webhook = start(PROXY, &format!("sqlite://{}", file.display()));
    let not_ready = "not ready: the database has not answered the policy's query yet\n";
    assert_eq!(webhook.health("/readyz"), (503, not_ready.to_owned()));
    let pod = pod(ID, &json!([]));
    assert_eq!(
        resolved(&webhook, &pod),
        ("platform_managed".to_owned(), "lookup_error".to_owned())
    );
    test_support::sqlite(
        &file,
        &format!(
            "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT); INSERT INTO workspaces VALUES ('{ID}', 'byok')"
        ),
    );
    webhook.wait_until_ready();
    assert_eq!(
        resolved(&webhook, &pod),
        ("byok".to_owned(), "override".to_owned())
    );
    // A later loss does not take the pod out.
    std::fs::remove_file(&file).unwrap();
    assert_eq!(webhook.health("/readyz").0, 200);
}

#[test]
fn on_error_deny_refuses_with_503_while_the_database_is_down() {
    let policy = format!("lookup: {{onError: deny}}\n{PROXY}");
    let webhook = start(&policy, "postgres://reader@localhost/x?host=/nonexistent");
    let response = webhook.mutate(&create(&pod(ID, &json!([]))))["response"].clone();
    assert_eq!(response["allowed"], false);
    assert_eq!(response["status"]["code"], 503);
    let message = response["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("LOOKUP_FAILED: "), "{message}");
    // What needs no lookup is no failure.
    assert_eq!(
        webhook.mutate(&create(&pod("", &json!([]))))["response"]["allowed"],
        true
    );
}

#[test]
fn an_answer_beats_the_deadline_of_the_policy_and_that_of_the_api_server() {
    let postgres = Postgres::with(&format!(
        "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'byok')"
    ));
    let slow = |timeout: &str| {
        format!(
            "lookup: {{timeout: {timeout}, query: 'SELECT CASE WHEN pg_sleep(20) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1'}}\n{PROXY}"
        )
    };
    let review = create(&pod(ID, &json!([]))).to_string();
    let asked = |webhook: &Webhook, path: &str| {
        let started = Instant::now();
        let mut response = webhook.post(path, "application/json", review.as_bytes());
        let answer: Value =
            serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
        assert_eq!(
            answer["response"]["auditAnnotations"]["reason"],
            "lookup_error"
        );
        started.elapsed()
    };
    let of_the_policy = start(&slow("300ms"), &postgres.url());
    let took = asked(&of_the_policy, "/mutate?timeout=30s");
    assert!(took < Duration::from_secs(10), "{took:?}");
    // 16 connections; a hundred lookups that time out one after the other must not use them up.
    for _ in 0..20 {
        asked(&of_the_policy, "/mutate");
    }
    let of_the_api_server = start(&slow("19s"), &postgres.url());
    let took = asked(&of_the_api_server, "/mutate?timeout=2s");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(
        of_the_api_server
            .health("/metrics")
            .1
            .contains(r#"llm_billing_lookup_duration_seconds_count{result="timeout"}"#)
    );
}

#[test]
fn a_lookup_asks_the_database_once() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(
        &cluster,
        &format!(
            "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'byok')"
        ),
    );
    let relay = Relay::to(cluster.port());
    let webhook = start(PROXY, &postgres.url_by(relay.port));
    let pod = pod(ID, &json!([]));
    let ask = || {
        let before = relay.asked();
        assert_eq!(resolved(&webhook, &pod).0, "byok");
        relay.asked() - before
    };
    // The first one prepares the query.
    ask();
    assert_eq!([ask(), ask(), ask()], [1, 1, 1]);
}

#[test]
fn a_connection_that_went_stale_costs_one_silent_retry() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    // By a socket, what is written to a closed connection fails; by TCP, the server's last words are read first.
    survives_stale_connections(&postgres, start(PROXY, &postgres.url()));
    let postgres = Postgres::on(&cluster, &load::schema());
    let url = postgres.url_by(cluster.port());
    survives_stale_connections(&postgres, start(PROXY, &url));
}

fn survives_stale_connections(postgres: &Postgres, webhook: Webhook) {
    let pod = pod(ID, &json!([]));
    let is_right = || {
        let right = ("byok".to_owned(), "override".to_owned());
        assert_eq!(resolved(&webhook, &pod), right);
    };
    is_right();
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database()";
    for fault in [
        terminate,
        "ALTER TABLE workspaces ALTER llm_billing_mode TYPE varchar(20)",
        "ALTER TABLE workspaces ALTER llm_billing_mode TYPE text",
        terminate,
    ] {
        postgres.execute(fault);
        is_right();
        is_right();
    }
    // One that nobody used for so long is closed by the server, which says so to nobody but the next who uses it.
    postgres.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET idle_session_timeout = 200', current_database()); END $$",
    );
    postgres.execute(terminate);
    is_right();
    std::thread::sleep(Duration::from_millis(600));
    is_right();
    let log = webhook.log_to_its_end();
    assert!(!log.contains("lookup failed"), "{log}");
}

/// The webhook's sessions, one a line.
fn sessions(postgres: &Postgres) -> String {
    postgres.query(
        "SELECT pid FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database()",
    )
}

/// A policy whose query takes so many seconds.
fn slow_policy(seconds: &str) -> String {
    format!(
        "lookup: {{timeout: {}, query: 'SELECT llm_billing_mode FROM workspaces, pg_sleep({seconds}) WHERE id = $1'}}\n{PROXY}",
        load::PATIENT
    )
}

/// Waits until so many of the webhook's sessions execute a query.
fn wait_for_queries(postgres: &Postgres, count: u32) {
    wait_for("queries are executed", || {
        let active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database() AND state = 'active'";
        (postgres.query(active) == count.to_string()).then_some(())
    });
}

fn wait_for_idle_connections(webhook: &Webhook) {
    wait_for("no connection is used", || {
        let metrics = webhook.health("/metrics").1;
        let idle = "llm_billing_database_connections{state=\"used\"} 0\n";
        metrics.contains(idle).then_some(())
    });
}

#[test]
fn client_that_goes_away_costs_no_connection() {
    let postgres = Postgres::with(&load::schema());
    let webhook = start(&slow_policy("0.3"), &postgres.url());
    let pod = pod(ID, &json!([]));
    assert_eq!(resolved(&webhook, &pod).0, "byok");
    let before = sessions(&postgres);
    let body = create(&pod).to_string();
    for _ in 0..3 {
        let mut client = webhook.connect();
        let head = format!(
            "POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        client.write_all((head + &body).as_bytes()).unwrap();
        wait_for_queries(&postgres, 1);
        drop(client);
        wait_for_idle_connections(&webhook);
    }
    assert_eq!(resolved(&webhook, &pod).0, "byok");
    assert_eq!(sessions(&postgres), before);
}

#[test]
fn timeout_below_a_second_counts_as_a_second() {
    let postgres = Postgres::with(&load::schema());
    let webhook = start(&slow_policy("0.3"), &postgres.url());
    let review = create(&pod(ID, &json!([]))).to_string();
    let mut response = webhook.post(
        "/mutate?timeout=50ms",
        "application/json",
        review.as_bytes(),
    );
    let answer: Value =
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
    assert_eq!(answer["response"]["auditAnnotations"]["mode"], "byok");
}

#[test]
fn lookup_at_its_deadline_leaves_no_open_transaction() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    let pooler = PgBouncer::with(&cluster, "default_pool_size = 1");
    let webhook = start(
        &slow_policy("2"),
        &(postgres.url_by(pooler.port()) + "?statement-cache-capacity=0"),
    );
    let asker = webhook.asker("platform_managed");
    asker.is_right();
    let review = create(&pod(ID, &json!([]))).to_string();
    std::thread::scope(|scope| {
        scope.spawn(|| asker.is_right());
        wait_for_queries(&postgres, 1);
        // The pooler's only connection is in use, so this lookup waits for its transaction to begin until the deadline.
        webhook.post("/mutate?timeout=1s", "application/json", review.as_bytes());
    });
    wait_for("no transaction is open", || {
        let open =
            "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state <> 'idle'";
        (postgres.query(open) == "0").then_some(())
    });
    asker.is_right();
}

#[test]
fn a_postgresql_enum_is_a_mode_column_too() {
    let postgres = Postgres::with(&format!(
        "CREATE TYPE mode AS ENUM ('platform_managed', 'byok');
         CREATE TABLE workspaces (id uuid, llm_billing_mode mode);
         INSERT INTO workspaces VALUES ('{ID}', 'byok')"
    ));
    let webhook = start(PROXY, &postgres.url());
    assert_eq!(
        resolved(&webhook, &pod(ID, &json!([]))),
        ("byok".to_owned(), "override".to_owned())
    );
    postgres.execute("UPDATE workspaces SET llm_billing_mode = NULL");
    assert_eq!(
        resolved(&webhook, &pod(ID, &json!([]))),
        ("platform_managed".to_owned(), "no_override".to_owned())
    );
}

#[test]
fn a_role_that_may_only_select_is_enough_and_sqlite_is_opened_read_only() {
    // The PostgreSQL tests all use such a role; SQLite has no roles.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("read-only.sqlite");
    test_support::sqlite(
        &file,
        "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)",
    );
    let before = std::fs::read(&file).unwrap();
    let webhook = start(
        "lookup: {query: \"INSERT INTO workspaces VALUES ($1, 'byok') RETURNING llm_billing_mode\"}",
        &format!("sqlite://{}", file.display()),
    );
    resolved(&webhook, &pod(ID, &json!([])));
    assert!(std::fs::read(Path::new(&file)).unwrap() == before);
}

#[test]
fn a_rotated_password_is_taken_from_the_file_without_a_restart_or_a_wrong_answer() {
    let postgres = Postgres::with(&format!(
        "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'byok');
         CREATE ROLE rotated LOGIN PASSWORD 'first'; GRANT SELECT ON workspaces TO rotated"
    ));
    let url = |password: &str| postgres.url_with(password).replace("reader", "rotated");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    std::fs::write(&file, url("first") + "\n").unwrap();
    let webhook = Start {
        policy: PROXY,
        arguments: &["--database-url-file", file.to_str().unwrap()],
        ..Start::default()
    }
    .start();
    let is_right = || {
        let pod = pod(ID, &json!([]));
        assert_eq!(
            resolved(&webhook, &pod),
            ("byok".to_owned(), "override".to_owned())
        );
    };
    is_right();
    for password in ["second", "third", "fourth"] {
        // The file first, as a secret store does it, then the database, which ends what is logged in.
        std::fs::write(&file, url(password)).unwrap();
        postgres.execute(&format!(
            "ALTER ROLE rotated PASSWORD '{password}';
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'"
        ));
        is_right();
    }
    // What is no URL leaves the one in use, and is said without being quoted.
    std::fs::write(
        &file,
        "postgres://rotated:fifth-password@localhost:notaport/x",
    )
    .unwrap();
    let line = webhook.wait_for_log("the old one stays");
    assert!(
        line.contains("cannot use the database URL: it has the wrong shape"),
        "{line}"
    );
    is_right();
    let log = webhook.log_to_its_end();
    assert!(
        !log.contains("-password") && !log.contains("lookup failed"),
        "{log}"
    );
    postgres.execute("DROP OWNED BY rotated; DROP ROLE rotated");
}

#[test]
fn a_changed_file_is_followed_even_while_the_old_database_answers() {
    let database = |mode: &str| {
        Postgres::with(&format!(
            "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', '{mode}')"
        ))
    };
    let (old, new) = (database("byok"), database("disabled"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    std::fs::write(&file, old.url()).unwrap();
    let arguments = &["--database-url-file", file.to_str().unwrap()];
    let webhook = Start {
        policy: PROXY,
        arguments,
        ..Start::default()
    }
    .start();
    let pod = pod(ID, &json!([]));
    assert_eq!(resolved(&webhook, &pod).0, "byok");
    std::fs::write(&file, new.url()).unwrap();
    wait_for("the new database is asked", || {
        (resolved(&webhook, &pod).0 == "disabled").then_some(())
    });
}

#[test]
fn a_url_is_given_once_and_a_file_that_is_missing_is_named() {
    let both = run(&[
        "check",
        "--database-url",
        "sqlite://x",
        "--database-url-file",
        "/nonexistent",
    ]);
    assert_eq!(both.0, 2);
    let sentence =
        "error database     --database-url and --database-url-file are both given; leave one out\n";
    assert!(both.1.ends_with(sentence), "{}", both.1);
    let missing = run(&["resolve", ID, "--database-url-file", "/nonexistent"]);
    assert_eq!(
        missing.2,
        "error: cannot read /nonexistent: No such file or directory (os error 2)\n"
    );
}

#[test]
fn the_databases_certificate_is_checked_against_a_private_ca_and_its_host_name() {
    let authority = Authority::generate();
    let cluster = Cluster::with_certificate(&authority.issue("localhost"));
    let postgres = Postgres::on(
        &cluster,
        "CREATE TABLE workspaces (id uuid, llm_billing_mode text)",
    );
    let folder = tempfile::tempdir().unwrap();
    let ca = |name: &str, authority: &Authority| {
        let file = folder.path().join(name);
        std::fs::write(&file, authority.pem()).unwrap();
        format!("?sslmode=verify-full&sslrootcert={}", file.display())
    };
    let (right, wrong) = (
        ca("ca.crt", &authority),
        ca("other.crt", &Authority::generate()),
    );
    let url = postgres.url_by(cluster.port());
    let by_name = url.replace("127.0.0.1", "localhost");
    let missing = "?sslmode=verify-full&sslrootcert=/nonexistent/ca.crt".to_owned();
    for (url, code, words) in [
        (by_name.clone() + &right, 0, "ok    database"),
        (by_name.clone() + &wrong, 2, "invalid peer certificate: "),
        (
            url + &right,
            2,
            "certificate not valid for name \"127.0.0.1\"",
        ),
        (
            by_name + &missing,
            2,
            "such as sslrootcert or a socket, is missing: No such file",
        ),
    ] {
        let report = check(PROXY, &url);
        assert!(
            report.0 == code && report.1.contains(words),
            "{words}: {report:?}"
        );
    }
}

#[test]
fn a_pooler_in_transaction_mode_is_asked_in_transactions() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(
        &cluster,
        &format!(
            "CREATE TYPE mode AS ENUM ('byok', 'disabled');
             CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode mode);
             INSERT INTO workspaces VALUES ('{ID}', 'byok')"
        ),
    );
    let pooler = PgBouncer::before(&cluster);
    let url = postgres.url_by(pooler.port());
    let report = check(PROXY, &url);
    let remedy = "behind PgBouncer, add statement-cache-capacity=0 to the database URL";
    assert!(report.0 == 2 && report.1.contains(remedy), "{report:?}");
    let url = url + "?statement-cache-capacity=0";
    let report = check(PROXY, &url);
    assert!(report.0 == 0, "{report:?}");
    // Two programs at once, so that connections change hands between statements of the same name.
    let webhooks = [start(PROXY, &url), start(PROXY, &url)];
    let pod = pod(ID, &json!([]));
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (webhook, pod) = (&webhooks[client % 2], &pod);
            scope.spawn(move || {
                for _ in 0..50 {
                    let right = ("byok".to_owned(), "override".to_owned());
                    assert_eq!(resolved(webhook, pod), right);
                }
            });
        }
    });
    postgres.execute("ALTER TABLE workspaces RENAME TO gone");
    assert_eq!(resolved(&webhooks[0], &pod).1, "lookup_error");
    webhooks[0].wait_for_log("relation \\\"workspaces\\\" does not exist");
    postgres.execute("ALTER TABLE gone RENAME TO workspaces");
    assert_eq!(resolved(&webhooks[0], &pod).0, "byok");
    // Many at once, over a connection that does not know the enum yet.
    let policy = Policy::parse(PROXY).unwrap();
    let source = UrlSource::Given(url.as_str().into());
    let database = Database::connect_lazily(source, &policy.lookup).unwrap();
    let many = [ID, "99999999-9999-4999-8999-999999999999"];
    let many = many.map(|id| vec![ParameterValue::Uuid(id.parse().unwrap())]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stored = runtime
        .block_on(database.lookup_batch(many.to_vec()))
        .unwrap();
    let stored: Vec<LookupOutcome> = stored.into_iter().map(Result::unwrap).collect();
    assert_eq!(
        stored,
        [
            LookupOutcome::Row(Some("byok".to_owned())),
            LookupOutcome::NoRow
        ]
    );
}

#[test]
fn a_pooler_that_is_full_or_ends_sessions_is_no_refusal_of_the_query() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    let pooler = PgBouncer::with(&cluster, "max_client_conn = 1\nclient_idle_timeout = 3");
    let url = postgres.url_by(pooler.port()) + "?statement-cache-capacity=0";
    let is_right = |webhook: &Webhook| {
        let right = ("byok".to_owned(), "override".to_owned());
        assert_eq!(resolved(webhook, &pod(ID, &json!([]))), right);
    };
    let first = start(PROXY, &url);
    is_right(&first);
    // It has the only place until it has been idle for long enough.
    let report = check(&format!("lookup: {{timeout: 300ms}}\n{PROXY}"), &url);
    let words = "the database could not be asked: no more connections allowed";
    assert!(report.0 == 2 && report.1.contains(words), "{report:?}");
    is_right(&first);
    let patient = format!("lookup: {{timeout: 8s}}\n{PROXY}");
    assert_eq!(check(&patient, &url).0, 0);
    is_right(&first);
    let webhook = start(PROXY, &url);
    webhook.wait_until_ready();
    drop(first);
    std::thread::sleep(Duration::from_secs(5));
    is_right(&webhook);
    let log = webhook.log_to_its_end();
    assert!(!log.contains("lookup"), "{log}");
}

#[test]
fn a_query_that_casts_text_makes_the_webhook_ready_though_no_sample_fits() {
    let postgres = Postgres::with(
        "CREATE TABLE workspaces (id bigint, llm_billing_mode text); INSERT INTO workspaces VALUES (7, 'byok')",
    );
    let policy = format!(
        "lookup:
  query: SELECT llm_billing_mode FROM workspaces WHERE id = $1::bigint
  parameters: [{{label: molecule.ai/workspace-id, type: text}}]
{PROXY}"
    );
    let report = check(&policy, &postgres.url());
    assert!(report.0 == 0, "{report:?}");
    let webhook = start(&policy, &postgres.url());
    webhook.wait_until_ready();
    assert_eq!(resolved(&webhook, &pod("7", &json!([]))).0, "byok");
    assert_eq!(
        resolved(&webhook, &pod("seven", &json!([]))).1,
        "lookup_error"
    );
    webhook.wait_for_log("cannot use the pod's parameters");
}
