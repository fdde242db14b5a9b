//! Draining: requests in flight are answered, readiness turns off, and the process exits with code 0.

use std::io::{Read, Write};

use serde_json::json;

use test_support::haproxy::{Haproxy, Slot};
use test_support::load::{LONG_LOOKUP_TIMEOUT, LoadClient, Tally, schema};
use test_support::postgres::Postgres;
use test_support::program::{Authority, Start, Webhook, wait_for};
use test_support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";

#[test]
fn request_in_flight_at_sigterm_is_answered() {
    let postgres = Postgres::with("CREATE TABLE workspaces (id uuid, llm_billing_mode text)");
    postgres.execute(&format!("INSERT INTO workspaces VALUES ('{ID}', 'byok')"));
    let slow = "lookup: {timeout: 8s, query: 'SELECT CASE WHEN pg_sleep(1.5) IS NOT NULL THEN llm_billing_mode END FROM workspaces WHERE id = $1'}";
    let mut webhook = Start {
        policy: slow,
        database_url: &postgres.url(),
        ..Start::default()
    }
    .start();
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| webhook.mutate(&create(&pod(ID, &json!([])))));
        postgres.wait_for_queries(1);
        webhook.signal("TERM");
        request.join().unwrap()
    });
    assert_eq!(answer["response"]["auditAnnotations"]["mode"], "byok");
    assert_eq!(webhook.wait().code(), Some(0));
    let log = webhook.log();
    let position = |text: &str| {
        log.find(text)
            .unwrap_or_else(|| panic!("{text} is not in {log}"))
    };
    assert!(position("\"draining\"") < position("\"admission\""));
    assert!(position("\"admission\"") < position("\"stopped\""));
}

#[test]
fn draining_webhook_answers_until_the_delay_ends() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("drain.sqlite");
    test_support::sqlite(&file, "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)");
    let database_url = &format!("sqlite://{}", file.display());
    let arguments = &["--drain-delay", "2s"];
    let mut webhook = Start {
        policy: PROXY,
        database_url,
        arguments,
        ..Start::default()
    }
    .start();
    webhook.wait_until_ready();
    webhook.signal("TERM");
    webhook.wait_for_log("\"draining\"");
    assert_eq!(webhook.health("/readyz"), (503, "not ready: draining\n".to_owned()));
    assert_eq!(webhook.health("/livez").0, 200);
    webhook.client = webhook.authority.client();
    let review = create(&pod(ID, &json!([])));
    assert_eq!(webhook.mutate(&review)["response"]["allowed"], true);
    // Every response asks the client to close the connection.
    let review = review.to_string();
    let post = |path| webhook.post(path, "application/json", review.as_bytes());
    let url = format!("https://localhost:{}/mutate", webhook.address.port());
    let get = webhook.client.get(url).call().unwrap();
    for response in [post("/mutate"), post("/nothing"), get] {
        assert_eq!(response.headers()["connection"], "close");
    }
    assert_eq!(webhook.wait().code(), Some(0));
}

/// Stops and continues the server, so that requests arrive while it reads nothing.
#[test]
fn requests_that_arrived_before_the_close_are_answered() {
    const CONNECTIONS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("drain.sqlite");
    test_support::sqlite(&file, "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)");
    let mut webhook = Start {
        policy: PROXY,
        database_url: &format!("sqlite://{}", file.display()),
        arguments: &["--drain-delay", "0s"],
        ..Start::default()
    }
    .start();
    webhook.wait_until_ready();
    let review = create(&pod(ID, &json!([]))).to_string();
    let request = format!(
        "POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{review}",
        review.len()
    );
    let mut kept_alive: Vec<_> = (0..CONNECTIONS).map(|_| webhook.connect()).collect();
    for connection in &mut kept_alive {
        connection.write_all(request.as_bytes()).unwrap();
        assert!(read_response(connection).starts_with("HTTP/1.1 200"));
    }
    webhook.signal("STOP");
    let mut new: Vec<_> = (0..CONNECTIONS).map(|_| webhook.connect()).collect();
    for connection in &mut kept_alive {
        connection.write_all(request.as_bytes()).unwrap();
    }
    for connection in &mut new {
        // The server still has to accept the connection and do its part of the handshake.
        connection.conn.write_tls(&mut connection.sock).unwrap();
    }
    webhook.signal("TERM");
    webhook.signal("CONT");
    for connection in kept_alive.iter_mut().chain(&mut new) {
        // A new connection sends its request now.
        if connection.conn.is_handshaking() {
            connection.write_all(request.as_bytes()).unwrap();
        }
        let response = read_response(connection);
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }
    assert_eq!(webhook.wait().code(), Some(0));
}

/// Reads one response, or as much of it as the server sent.
fn read_response(connection: &mut impl Read) -> String {
    let mut response = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = connection.read(&mut buffer).unwrap();
        response.extend(&buffer[..count]);
        let text = String::from_utf8_lossy(&response);
        let length = text.split_once("\r\n\r\n").and_then(|(head, body)| {
            let (_, rest) = head.split_once("content-length: ")?;
            let length: usize = rest.lines().next()?.parse().ok()?;
            (body.len() >= length).then_some(())
        });
        if count == 0 || length.is_some() {
            return text.into_owned();
        }
    }
}

#[test]
fn idle_connection_is_closed_when_the_delay_ends() {
    let mut webhook = Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments: &["--drain-delay", "0s"],
        ..Start::default()
    }
    .start();
    let mut connection = webhook.connect();
    connection
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert!(read_response(&mut connection).starts_with("HTTP/1.1 404"));
    webhook.signal("TERM");
    // The end of the stream comes with TLS' close_notify: without it, the read fails.
    assert_eq!(read_response(&mut connection), "");
    assert_eq!(webhook.wait().code(), Some(0));
}

#[test]
fn second_signal_ends_the_drain_at_once() {
    let arguments = &["--drain-delay", "1h"];
    let mut webhook = Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments,
        ..Start::default()
    }
    .start();
    webhook.signal("TERM");
    webhook.wait_for_log("\"draining\"");
    webhook.signal("INT");
    assert_eq!(webhook.wait().code(), Some(0));
}

#[test]
fn rolling_restart_under_load_fails_no_admission() {
    let postgres = Postgres::with(&schema());
    let (authority, slots) = (Authority::generate(), [Slot::free(), Slot::free()]);
    let policy = format!("lookup: {{timeout: {LONG_LOOKUP_TIMEOUT}}}\n{PROXY}");
    let start = |slot: Slot| slot.start(&authority, &policy, &postgres.url());
    let mut instances = slots.map(start);
    let proxy = Haproxy::start(&slots);
    let load_client = || LoadClient {
        client: authority.client(),
        port: proxy.port,
        on_error: "platform_managed",
    };
    // A connection stays on one instance, so each attempt opens a new one.
    let wait_for_traffic = |instance: &Webhook| {
        wait_for("the proxy detects that the instance is ready", || {
            load_client().admit(&mut Tally::default());
            instance.log().contains("\"admission\"").then_some(())
        });
    };
    instances.iter().for_each(wait_for_traffic);
    let tally = load_client().run_during("two instances rolled over", 8, || {
        for (instance, slot) in instances.iter_mut().zip(slots) {
            instance.signal("TERM");
            assert_eq!(instance.wait().code(), Some(0));
            *instance = start(slot);
            wait_for_traffic(instance);
        }
    });
    assert_eq!(tally.per_policy, 0, "{tally:?}");
}
