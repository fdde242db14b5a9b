//! Draining: requests in flight are answered, readiness turns off, and the process exits with code 0.

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
