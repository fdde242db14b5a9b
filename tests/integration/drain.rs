//! The end of the process: what is under way is answered, readiness turns off, exit code 0.

use std::time::Duration;

use serde_json::json;

use crate::support::postgres::Postgres;
use crate::support::program::{Start, wait_for};
use crate::support::{PROXY, create, pod};

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
    crate::support::sqlite(
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
    wait_for("it is ready", || {
        (webhook.health("/readyz").0 == 200).then_some(())
    });
    webhook.signal("TERM");
    webhook.wait_for_log("\"draining\"");
    assert_eq!(
        webhook.health("/readyz"),
        (503, "not ready: draining\n".to_owned())
    );
    assert_eq!(webhook.health("/livez").0, 200);
    webhook.client = webhook.authority.client();
    assert_eq!(
        webhook.mutate(&create(&pod(ID, &json!([]))))["response"]["allowed"],
        true
    );
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
