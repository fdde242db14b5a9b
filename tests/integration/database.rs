//! Lookups on real databases: behaviour common to PostgreSQL and SQLite, then that of only one of them.

use std::io::Write;
use std::path::Path;

use llm_billing_webhook::core::identity::ParameterValue;
use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::resolution::LookupOutcome;
use llm_billing_webhook::database::{Database, UrlSource};
use serde_json::{Value, json};

use test_support::load;
use test_support::postgres::{Cluster, PgBouncer, Postgres};
use test_support::process::is_closed_by_peer;
use test_support::program::{Authority, Start, Webhook, decode_output, run, wait_for};
use test_support::relay::Relay;
use test_support::transcript::{page, sql};
use test_support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";

/// A kind of database, which `with` creates.
enum Kind {
    Postgres,
    Sqlite(tempfile::TempDir),
}

impl Kind {
    fn both() -> [Self; 2] {
        [Self::Postgres, Self::Sqlite(tempfile::tempdir().unwrap())]
    }

    /// Creates a database with this schema and returns its URL.
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

/// Returns exit code and stderr of a `serve` that fails to start.
pub(crate) fn fail_to_start(policy: &str, database_url: &str) -> (i32, String) {
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
    let (code, _, stderr) = decode_output(&command.output().unwrap());
    (code, stderr)
}

/// Returns exit code and stdout of `check`.
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

/// Returns the mode and reason in the answer for this pod.
fn resolved(webhook: &Webhook, pod: &Value) -> (String, String) {
    let annotations = webhook.mutate(&create(pod))["response"]["auditAnnotations"].clone();
    let text = |field: &str| annotations[field].as_str().unwrap_or_default().to_owned();
    (text("mode"), text("reason"))
}

#[test]
fn next_pod_gets_the_committed_mode() {
    let postgres =
        Postgres::with("CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text)");
    let webhook = start(PROXY, &postgres.url());
    let pod = pod(ID, &json!([]));
    let assert_resolved = |mode: &str, reason: &str| {
        assert_eq!(resolved(&webhook, &pod), (mode.to_owned(), reason.to_owned()))
    };
    assert_resolved("platform_managed", "workspace_not_found");
    postgres.execute(&format!("INSERT INTO workspaces VALUES ('{ID}', NULL)"));
    assert_resolved("platform_managed", "no_override");
    for mode in ["byok", "disabled", "platform_managed", "byok"] {
        postgres.execute(&format!("UPDATE workspaces SET llm_billing_mode = '{mode}'"));
        assert_resolved(mode, "override");
    }
    postgres.execute("DELETE FROM workspaces");
    assert_resolved("platform_managed", "workspace_not_found");
}

#[test]
fn query_and_parameters_come_from_the_policy() {
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
            assert_eq!(resolved(&webhook, &pod), (mode.to_owned(), "override".to_owned()));
        }
    }
}

#[test]
fn workspace_of_another_namespace_is_not_found() {
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
fn refused_query_fails_check_and_start() {
    let two = "parameters: [{label: molecule.ai/workspace-id, type: uuid}, {field: namespace}]";
    let text = "parameters: [{label: molecule.ai/workspace-id, type: text}]";
    for kind in Kind::both() {
        let url =
            kind.with("CREATE TABLE workspaces (id uuid, llm_billing_mode text, price integer)");
        let either = |postgres: &str, sqlite: &str| {
            if kind.is_postgres() {
                postgres.to_owned()
            } else {
                sqlite.to_owned()
            }
        };
        let mut table = vec![
            (
                "query: SELECT mode FROM workspaces WHERE id = $1",
                either("column \"mode\" does not exist", "no such column: mode"),
            ),
            (
                "query: SELECT 1 FROM nowhere WHERE id = $1",
                either("relation \"nowhere\" does not exist", "no such table: nowhere"),
            ),
            (
                "query: SELEKT $1",
                either("syntax error at or near \"SELEKT\"", "near \"SELEKT\": syntax error"),
            ),
            (
                "query: SELECT llm_billing_mode FROM workspaces WHERE id = $1 AND price = $2",
                "it takes 2 parameters, and lookup.parameters has 1".to_owned(),
            ),
        ];
        table.push((two, "it takes 1 parameters, and lookup.parameters has 2".to_owned()));
        if kind.is_postgres() {
            table.push((text, "operator does not exist: uuid = text".to_owned()));
        }
        for (lookup, error) in table {
            let policy = format!("lookup: {{{lookup}}}");
            let refused = format!("the database refuses the policy's query: {error}");
            let (code, report) = check(&policy, &url);
            assert!(
                code == 2 && report.contains(&format!("error database     {refused}")),
                "{code} {report}"
            );
            let (code, stderr) = fail_to_start(&policy, &url);
            assert!(
                code == 2 && stderr.contains(&format!("error: cannot start: {refused}")),
                "{code} {stderr}"
            );
        }
    }
}

#[test]
fn several_rows_for_one_workspace_are_no_answer() {
    const OTHER: &str = "99999999-9999-4999-8999-999999999999";
    const ERROR: &str = "the policy's query returns more than one row for one workspace";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for kind in Kind::both() {
        let url = kind.with(&format!(
            "CREATE TABLE modes (id uuid, mode text);
             INSERT INTO modes VALUES ('{ID}', 'byok'), ('{ID}', 'byok'), ('{OTHER}', 'byok');"
        ));
        let policy = |condition: &str| {
            format!("lookup: {{query: SELECT mode FROM modes WHERE {condition}}}\n{PROXY}")
        };
        let webhook = start(&policy("id = $1"), &url);
        let resolved = |id: &str| resolved(&webhook, &pod(id, &json!([])));
        assert_eq!(resolved(ID), ("platform_managed".to_owned(), "lookup_error".to_owned()));
        let line = webhook.wait_for_log("lookup refused");
        assert!(line.contains("\"ERROR\"") && line.contains(ERROR), "{line}");
        assert_eq!(resolved(OTHER), ("byok".to_owned(), "override".to_owned()));

        // In one query for both workspaces, and, because of the comment, in one for each.
        for condition in ["id = $1", "id = $1 /* one */"] {
            let policy = Policy::parse(&policy(condition)).unwrap();
            let source = UrlSource::Given(url.as_str().into());
            let database = Database::connect_lazily(source, &policy).unwrap();
            let keys = [ID, OTHER].map(|id| vec![ParameterValue::Uuid(id.parse().unwrap())]);
            let outcomes = runtime
                .block_on(database.lookup_batch(keys.to_vec()))
                .unwrap();
            let [several, one] = outcomes.try_into().unwrap();
            assert!(several.unwrap_err().to_string().starts_with(ERROR));
            assert_eq!(one.unwrap(), LookupOutcome::of_mode(Some("byok")));
        }

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        std::fs::write(&file, policy("id = $1")).unwrap();
        let file = file.to_str().unwrap();
        let (code, _, stderr) = run(&["resolve", ID, "--policy", file, "--database-url", &url]);
        assert!(code == 2 && stderr.contains(ERROR), "{code} {stderr}");

        // A query that ignores the workspace shows it with any id.
        let (code, stderr) = fail_to_start(&policy("$1 = $1"), &url);
        assert!(code == 2 && stderr.contains(&format!("cannot start: {ERROR}")), "{stderr}");
        let (code, stdout) = check(&policy("$1 = $1"), &url);
        assert!(code == 2 && stdout.contains(ERROR), "{code} {stdout}");
    }
}

#[test]
fn padded_mode_column_is_refused_by_check() {
    let postgres =
        Postgres::with("CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode char(20))");
    let expected =
        "returns a first column of type char(n), which pads modes with blanks; cast it to text";
    let (code, stdout) = check(PROXY, &postgres.url());
    assert!(code == 2 && stdout.contains(expected), "{code} {stdout}");
    let (code, stderr) = fail_to_start(PROXY, &postgres.url());
    assert!(code == 2 && stderr.contains(expected), "{code} {stderr}");
    let cast = "SELECT llm_billing_mode::text FROM workspaces WHERE id = $1";
    let (code, stdout) = check(&format!("lookup: {{query: '{cast}'}}\n{PROXY}"), &postgres.url());
    assert_eq!(code, 0, "{stdout}");
}

#[test]
fn mode_column_that_is_not_text_is_refused() {
    const ERROR: &str =
        "the policy's query returns a first column that is not text; cast it to text";
    let schema = format!(
        "CREATE TABLE workspaces (id uuid, llm_billing_mode integer); INSERT INTO workspaces VALUES ('{ID}', 7)"
    );
    let postgres = Postgres::with(&schema);
    let (code, stderr) = fail_to_start(PROXY, &postgres.url());
    assert!(code == 2 && stderr.contains(ERROR), "{stderr}");
    // A column of SQLite has no type, its values have.
    let sqlite = Kind::Sqlite(tempfile::tempdir().unwrap());
    let webhook = start(PROXY, &sqlite.with(&schema));
    let answer = resolved(&webhook, &pod(ID, &json!([])));
    assert_eq!(answer, ("platform_managed".to_owned(), "lookup_error".to_owned()));
    let line = webhook.wait_for_log("lookup refused");
    // The line has the request's uid, like the admission's line.
    let uid = "\"uid\":\"00000000-0000-0000-0000-0000000000aa\"";
    assert!(line.contains(uid) && line.contains("\"ERROR\"") && line.contains(ERROR), "{line}");
}

#[test]
fn pods_are_answered_before_the_database_is_up() {
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
    assert_eq!(resolved(&webhook, &pod), ("byok".to_owned(), "override".to_owned()));
    // A later database failure does not make the pod unready.
    std::fs::remove_file(&file).unwrap();
    assert_eq!(webhook.health("/readyz").0, 200);
}

#[test]
fn on_error_deny_refuses_with_503_during_outage() {
    let policy = format!("lookup: {{onError: deny}}\n{PROXY}");
    let webhook = start(&policy, "postgres://reader@localhost/x?host=/nonexistent");
    let response = webhook.mutate(&create(&pod(ID, &json!([]))))["response"].clone();
    assert_eq!(response["allowed"], false);
    assert_eq!(response["status"]["code"], 503);
    let message = response["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("LOOKUP_FAILED: "), "{message}");
    // A pod that needs no lookup is admitted.
    assert_eq!(webhook.mutate(&create(&pod("", &json!([]))))["response"]["allowed"], true);
}

#[test]
fn lookup_respects_policy_and_api_server_timeouts() {
    let postgres = Postgres::with(&format!(
        "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'byok')"
    ));
    let slow = |timeout: &str| {
        format!(
            "lookup: {{timeout: {timeout}, query: 'SELECT CASE WHEN pg_sleep(20) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1'}}\n{PROXY}"
        )
    };
    let review = create(&pod(ID, &json!([]))).to_string();
    let admit = |webhook: &Webhook, path: &str| {
        let mut response = webhook.post(path, "application/json", review.as_bytes());
        let answer: Value =
            serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
        // Without the time-out, the query would return byok.
        assert_eq!(answer["response"]["auditAnnotations"]["reason"], "lookup_error");
    };
    let policy_limited = start(&slow("300ms"), &postgres.url());
    admit(&policy_limited, "/mutate?timeout=30s");
    // More consecutive timeouts than the pool's 16 connections must not exhaust it.
    for _ in 0..20 {
        admit(&policy_limited, "/mutate");
    }
    let api_server_limited = start(&slow("30s"), &postgres.url());
    admit(&api_server_limited, "/mutate?timeout=2s");
    assert!(
        api_server_limited
            .health("/metrics")
            .1
            .contains(r#"llm_billing_lookup_duration_seconds_count{result="timeout"}"#)
    );
}

#[test]
fn lookup_sends_one_request() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(
        &cluster,
        &format!(
            "CREATE TABLE workspaces (id uuid, llm_billing_mode text); INSERT INTO workspaces VALUES ('{ID}', 'byok')"
        ),
    );
    let relay = Relay::to(cluster.port());
    let webhook = start(PROXY, &postgres.url_via(relay.port));
    let pod = pod(ID, &json!([]));
    let requests = || {
        let before = relay.request_count();
        assert_eq!(resolved(&webhook, &pod).0, "byok");
        relay.request_count() - before
    };
    // The check at the start has then returned its connection, which each lookup takes. The first prepares the query.
    webhook.wait_until_ready();
    requests();
    assert_eq!([requests(), requests(), requests()], [1, 1, 1]);
}

#[test]
fn stale_connection_costs_one_silent_retry() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    // On a closed Unix socket, writing fails; on TCP, the server's final error is read first.
    assert_survives_stale_connections(&postgres, start(PROXY, &postgres.url()));
    let postgres = Postgres::on(&cluster, &load::schema());
    let url = postgres.url_via(cluster.port());
    assert_survives_stale_connections(&postgres, start(PROXY, &url));
}

fn assert_survives_stale_connections(postgres: &Postgres, webhook: Webhook) {
    let pod = pod(ID, &json!([]));
    let assert_byok = || {
        let expected = ("byok".to_owned(), "override".to_owned());
        assert_eq!(resolved(&webhook, &pod), expected);
    };
    assert_byok();
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database()";
    for fault in [
        terminate,
        "ALTER TABLE workspaces ALTER llm_billing_mode TYPE varchar(20)",
        "ALTER TABLE workspaces ALTER llm_billing_mode TYPE text",
        terminate,
    ] {
        postgres.execute(fault);
        assert_byok();
        assert_byok();
    }
    // The server closes an idle session; the webhook learns of that only when it uses the connection again.
    postgres.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET idle_session_timeout = 200', current_database()); END $$",
    );
    postgres.execute(terminate);
    assert_byok();
    wait_for("the server ends the idle session", || sessions(postgres).is_empty().then_some(()));
    assert_byok();
    let log = webhook.stop_and_read_log();
    assert!(!log.contains("lookup failed"), "{log}");
}

/// Returns the process ids of the webhook's sessions, one per line.
fn sessions(postgres: &Postgres) -> String {
    postgres.query(
        "SELECT pid FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database()",
    )
}

/// Returns a policy whose query takes this many seconds.
fn slow_policy(seconds: &str) -> String {
    format!(
        "lookup: {{timeout: {}, query: 'SELECT llm_billing_mode FROM workspaces, pg_sleep({seconds}) WHERE id = $1'}}\n{PROXY}",
        load::LONG_LOOKUP_TIMEOUT
    )
}

fn wait_for_idle_connections(webhook: &Webhook) {
    wait_for("no connection is in use", || {
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
        postgres.wait_for_queries(1);
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
    let mut response = webhook.post("/mutate?timeout=50ms", "application/json", review.as_bytes());
    let answer: Value =
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
    assert_eq!(answer["response"]["auditAnnotations"]["mode"], "byok");
}

#[test]
fn lookup_at_its_deadline_leaves_no_open_transaction() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    let pooler = PgBouncer::start_with(&cluster, "default_pool_size = 1");
    let webhook = start(
        &slow_policy("2"),
        &(postgres.url_via(pooler.port()) + "?statement-cache-capacity=0"),
    );
    let load_client = webhook.load_client("platform_managed");
    load_client.assert_correct();
    let review = create(&pod(ID, &json!([]))).to_string();
    std::thread::scope(|scope| {
        scope.spawn(|| load_client.assert_correct());
        postgres.wait_for_queries(1);
        // The pooler's only connection is in use, so this lookup waits until its deadline for a transaction to begin.
        webhook.post("/mutate?timeout=1s", "application/json", review.as_bytes());
    });
    wait_for("no transaction is open", || {
        let open =
            "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state <> 'idle'";
        (postgres.query(open) == "0").then_some(())
    });
    load_client.assert_correct();
}

#[test]
fn postgresql_enum_is_a_valid_mode_column() {
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
fn sqlite_is_opened_read_only() {
    // The PostgreSQL tests use a role that may only SELECT; SQLite has no roles.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("read-only.sqlite");
    test_support::sqlite(&file, "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)");
    let before = std::fs::read(&file).unwrap();
    let webhook = start(
        "lookup: {query: \"INSERT INTO workspaces VALUES ($1, 'byok') RETURNING llm_billing_mode\"}",
        &format!("sqlite://{}", file.display()),
    );
    resolved(&webhook, &pod(ID, &json!([])));
    assert!(std::fs::read(Path::new(&file)).unwrap() == before);
}

#[test]
fn rotated_password_is_read_from_the_file() {
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
    let assert_byok = || {
        let pod = pod(ID, &json!([]));
        assert_eq!(resolved(&webhook, &pod), ("byok".to_owned(), "override".to_owned()));
    };
    assert_byok();
    // In one query for many workspaces, too, and without a task that reloads the file.
    let policy = Policy::parse(PROXY).unwrap();
    let database = Database::connect_lazily(UrlSource::File(file.clone()), &policy).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let assert_batch = || {
        let key = vec![ParameterValue::Uuid(ID.parse().unwrap())];
        let outcomes = runtime.block_on(database.lookup_batch(vec![key])).unwrap();
        let outcomes: Vec<LookupOutcome> = outcomes.into_iter().map(Result::unwrap).collect();
        assert_eq!(outcomes, [LookupOutcome::of_mode(Some("byok"))]);
    };
    assert_batch();
    for password in ["second", "third", "fourth"] {
        // A secret store changes the file first, then the password; existing sessions are terminated.
        std::fs::write(&file, url(password)).unwrap();
        postgres.execute(&format!(
            "ALTER ROLE rotated PASSWORD '{password}';
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'"
        ));
        assert_byok();
        assert_batch();
    }
    // An invalid URL is logged without its content, and the URL in use stays.
    std::fs::write(&file, "postgres://rotated:fifth-password@localhost:notaport/x").unwrap();
    let line = webhook.wait_for_log("the old one stays");
    assert!(line.contains("cannot use the database URL: it is malformed"), "{line}");
    assert_byok();
    let log = webhook.stop_and_read_log();
    assert!(!log.contains("-password") && !log.contains("lookup failed"), "{log}");
    postgres.execute("DROP OWNED BY rotated; DROP ROLE rotated");
}

#[test]
fn changed_url_file_switches_the_database() {
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
    wait_for("the new database is queried", || {
        (resolved(&webhook, &pod).0 == "disabled").then_some(())
    });
}

#[test]
fn conflicting_url_flags_and_missing_file_are_errors() {
    let both = run(&[
        "check",
        "--database-url",
        "sqlite://x",
        "--database-url-file",
        "/nonexistent",
    ]);
    assert_eq!(both.0, 2);
    let error =
        "error database     --database-url and --database-url-file are both given; leave one out\n";
    assert!(both.1.ends_with(error), "{}", both.1);
    let missing = run(&["resolve", ID, "--database-url-file", "/nonexistent"]);
    assert_eq!(
        missing.2,
        "error: cannot read /nonexistent: No such file or directory (os error 2)\n"
    );
}

#[test]
fn database_certificate_is_verified_by_ca_and_name() {
    let authority = Authority::generate();
    let cluster = Cluster::with_certificate(&authority.issue("localhost"));
    let postgres =
        Postgres::on(&cluster, "CREATE TABLE workspaces (id uuid, llm_billing_mode text)");
    let folder = tempfile::tempdir().unwrap();
    let ca = |name: &str, authority: &Authority| {
        let file = folder.path().join(name);
        std::fs::write(&file, authority.pem()).unwrap();
        format!("?sslmode=verify-full&sslrootcert={}", file.display())
    };
    let (valid, invalid) = (ca("ca.crt", &authority), ca("other.crt", &Authority::generate()));
    let url = postgres.url_via(cluster.port());
    let by_name = url.replace("127.0.0.1", "localhost");
    let missing = "?sslmode=verify-full&sslrootcert=/nonexistent/ca.crt".to_owned();
    for (url, code, expected) in [
        (by_name.clone() + &valid, 0, "ok    database"),
        (by_name.clone() + &invalid, 2, "invalid peer certificate: "),
        (url + &valid, 2, "certificate not valid for name \"127.0.0.1\""),
        (by_name + &missing, 2, "such as sslrootcert or a socket, is missing: No such file"),
    ] {
        let report = check(PROXY, &url);
        assert!(report.0 == code && report.1.contains(expected), "{expected}: {report:?}");
    }
}

#[test]
fn lookups_work_through_pgbouncer_in_transaction_mode() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(
        &cluster,
        &format!(
            "CREATE TYPE mode AS ENUM ('byok', 'disabled');
             CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode mode);
             INSERT INTO workspaces VALUES ('{ID}', 'byok')"
        ),
    );
    let pooler = PgBouncer::start(&cluster);
    let url = postgres.url_via(pooler.port());
    let report = check(PROXY, &url);
    let remedy = "behind PgBouncer, add statement-cache-capacity=0 to the database URL";
    assert!(report.0 == 2 && report.1.contains(remedy), "{report:?}");
    let url = url + "?statement-cache-capacity=0";
    let report = check(PROXY, &url);
    assert!(report.0 == 0, "{report:?}");
    // With two programs, the pooler's connections alternate between statements of the same name.
    let webhooks = [start(PROXY, &url), start(PROXY, &url)];
    let pod = pod(ID, &json!([]));
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (webhook, pod) = (&webhooks[client % 2], &pod);
            scope.spawn(move || {
                for _ in 0..50 {
                    let expected = ("byok".to_owned(), "override".to_owned());
                    assert_eq!(resolved(webhook, pod), expected);
                }
            });
        }
    });
    postgres.execute("ALTER TABLE workspaces RENAME TO gone");
    assert_eq!(resolved(&webhooks[0], &pod).1, "lookup_error");
    webhooks[0].wait_for_log("relation \\\"workspaces\\\" does not exist");
    postgres.execute("ALTER TABLE gone RENAME TO workspaces");
    assert_eq!(resolved(&webhooks[0], &pod).0, "byok");
    // A batch lookup on a connection that has not loaded the enum's type yet.
    let policy = Policy::parse(PROXY).unwrap();
    let source = UrlSource::Given(url.as_str().into());
    let database = Database::connect_lazily(source, &policy).unwrap();
    let keys = [ID, "99999999-9999-4999-8999-999999999999"];
    let keys = keys.map(|id| vec![ParameterValue::Uuid(id.parse().unwrap())]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let outcomes = runtime
        .block_on(database.lookup_batch(keys.to_vec()))
        .unwrap();
    let outcomes: Vec<LookupOutcome> = outcomes.into_iter().map(Result::unwrap).collect();
    assert_eq!(outcomes, [LookupOutcome::of_mode(Some("byok")), LookupOutcome::NoRow]);
}

#[test]
fn check_tells_whether_notifications_arrive() {
    let policy = format!("lookup: {{channel: llm_billing_modes}}\n{PROXY}");
    let remark = |url: &str| {
        let (code, report) = check(&policy, url);
        assert_eq!(code, 0, "{report}");
        let line = report.lines().find(|line| line[6..].starts_with("channel"));
        line.unwrap().to_owned()
    };
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    assert_eq!(
        remark(&postgres.url()),
        "warn  channel      no trigger's function names llm_billing_modes, so no changed row is notified of; see docs/audit.md"
    );
    postgres.execute(&sql(&page("docs/audit.md")));
    assert_eq!(
        remark(&postgres.url()),
        "ok    channel      a notification on llm_billing_modes arrives, and a trigger's function names it"
    );
    let pooler = PgBouncer::start(&cluster);
    let pooled = postgres.url_via(pooler.port()) + "?statement-cache-capacity=0";
    let lost = remark(&pooled);
    assert!(
        lost.starts_with("warn  channel      no notification on llm_billing_modes arrives: "),
        "{lost}"
    );
    let sqlite = Kind::Sqlite(tempfile::tempdir().unwrap());
    let unsupported = remark(&sqlite.with(&load::schema()));
    assert!(
        unsupported.starts_with("warn  channel      SQLite has no notifications"),
        "{unsupported}"
    );
}

/// The benchmarks rely on it: a backend that ended between two readings made their difference negative.
#[test]
fn cpu_of_a_server_includes_ended_backends() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, "");
    let before = cluster.cpu();
    // A tenth of a second of CPU at least, by a backend that ends with the query.
    let work = "DO $$ DECLARE start timestamptz := clock_timestamp(); BEGIN
                    WHILE clock_timestamp() < start + interval '1 second' LOOP END LOOP; END $$";
    postgres.execute(work);
    wait_for("the backend's CPU is counted", || {
        (cluster.cpu() >= before + std::time::Duration::from_millis(100)).then_some(())
    });
    for _ in 0..20 {
        let before = cluster.cpu();
        postgres.execute("SELECT 1");
        assert!(cluster.cpu() >= before);
    }
}

#[test]
fn full_pooler_or_ended_session_is_transient() {
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &load::schema());
    let pooler = PgBouncer::start_with(&cluster, "max_client_conn = 1\nclient_idle_timeout = 3");
    let url = postgres.url_via(pooler.port()) + "?statement-cache-capacity=0";
    let assert_byok = |webhook: &Webhook| {
        let expected = ("byok".to_owned(), "override".to_owned());
        assert_eq!(resolved(webhook, &pod(ID, &json!([]))), expected);
    };
    let first = start(PROXY, &url);
    assert_byok(&first);
    // The first webhook holds the only client connection until it has been idle for 3 s.
    let report = check(&format!("lookup: {{timeout: 300ms}}\n{PROXY}"), &url);
    let error = format!(
        "cannot query the database at 127.0.0.1:{}: no more connections allowed",
        pooler.port()
    );
    assert!(report.0 == 2 && report.1.contains(&error), "{report:?}");
    assert_byok(&first);
    let long_timeout = format!("lookup: {{timeout: 8s}}\n{PROXY}");
    assert_eq!(check(&long_timeout, &url).0, 0);
    assert_byok(&first);
    let webhook = start(PROXY, &url);
    webhook.wait_until_ready();
    drop(first);
    assert_byok(&webhook);
    wait_for("the pooler ends the idle session", || is_closed_by_peer(pooler.port()).then_some(()));
    assert_byok(&webhook);
    let log = webhook.stop_and_read_log();
    assert!(!log.contains("lookup"), "{log}");
}

#[test]
fn query_that_casts_text_does_not_block_readiness() {
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
    assert_eq!(resolved(&webhook, &pod("seven", &json!([]))).1, "lookup_error");
    webhook.wait_for_log("cannot use the pod's parameters");
}
