//! The end of the process: what is under way is answered, readiness turns off, exit code 0.

use std::time::Duration;

use serde_json::json;

use test_support::haproxy::{Haproxy, Slot};
use test_support::load::{Asker, PATIENT, Tally, schema};
use test_support::postgres::Postgres;
use test_support::program::{Authority, Start, Webhook, wait_for};
use test_support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";

#[test]
fn a_request_under_way_at_sigterm_is_answered_and_the_exit_code_is_0() {
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
        let asked = scope.spawn(|| webhook.mutate(&create(&pod(ID, &json!([])))));
        std::thread::sleep(Duration::from_millis(500));
        webhook.signal("TERM");
        asked.join().unwrap()
    });
    assert_eq!(answer["response"]["auditAnnotations"]["mode"], "byok");
    assert_eq!(webhook.wait().code(), Some(0));
    let log = webhook.log();
    let place = |text: &str| {
        log.find(text)
            .unwrap_or_else(|| panic!("{text} is not in {log}"))
    };
    assert!(place("\"draining\"") < place("\"admission\""));
    assert!(place("\"admission\"") < place("\"stopped\""));
}

#[test]
fn readiness_turns_off_at_once_and_new_requests_are_answered_until_the_delay_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("drain.sqlite");
    test_support::sqlite(
        &file,
        "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)",
    );
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
    assert_eq!(
        webhook.health("/readyz"),
        (503, "not ready: draining\n".to_owned())
    );
    assert_eq!(webhook.health("/livez").0, 200);
    webhook.client = webhook.authority.client();
    let review = create(&pod(ID, &json!([])));
    assert_eq!(webhook.mutate(&review)["response"]["allowed"], true);
    // The client is told to take its next request elsewhere, whatever this one was.
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
fn a_second_signal_ends_it_at_once() {
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
fn rolling_both_of_two_instances_over_under_load_fails_no_admission() {
    let postgres = Postgres::with(&schema());
    let (authority, slots) = (Authority::generate(), [Slot::free(), Slot::free()]);
    let policy = format!("lookup: {{timeout: {PATIENT}}}\n{PROXY}");
    let start = |slot: Slot| slot.start(&authority, &policy, &postgres.url());
    let mut instances = slots.map(start);
    let proxy = Haproxy::before(&slots);
    let ask = || Asker {
        client: authority.client(),
        port: proxy.port,
        on_error: "platform_managed",
    };
    // A connection stays where it went, so each try is a new one.
    let gets_traffic = |instance: &Webhook| {
        wait_for("the proxy has seen that it is ready", || {
            ask().ask(&mut Tally::default());
            instance.log().contains("\"admission\"").then_some(())
        });
    };
    instances.iter().for_each(gets_traffic);
    let tally = ask().ask_during("two instances rolled over", 8, || {
        for (instance, slot) in instances.iter_mut().zip(slots) {
            instance.signal("TERM");
            assert_eq!(instance.wait().code(), Some(0));
            *instance = start(slot);
            gets_traffic(instance);
        }
    });
    assert_eq!(tally.as_the_policy_says, 0, "{tally:?}");
}
