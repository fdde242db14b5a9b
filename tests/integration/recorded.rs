//! The recorded admission reviews, sent to the real HTTPS endpoint, get the same answers as in process.

use llm_billing_webhook::core::policy::Policy;
use serde_json::json;

use test_support::in_process::{answer, stored};
use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook};
use test_support::{PROXY, WORKSPACE_LABEL, defaulted, patch_of, patched, recorded_reviews};

/// Returns SQL that stores this mode for every workspace of the recorded reviews.
fn rows(mode: &str) -> String {
    let reviews = recorded_reviews();
    let labels = |review: &serde_json::Value| {
        review["request"]["object"]["metadata"]["labels"][WORKSPACE_LABEL].clone()
    };
    let mut ids: Vec<_> = reviews
        .values()
        .filter_map(|review| labels(review).as_str().map(str::to_owned))
        .collect();
    ids.sort();
    ids.dedup();
    ids.retain(|id| id != "not-a-uuid");
    ids.iter()
        .map(|id| format!("INSERT INTO workspaces VALUES ('{id}', '{mode}');"))
        .collect()
}

fn assert_same_answers_as_in_process(webhook: &Webhook, mode: &str) {
    let policy = Policy::parse(PROXY).unwrap();
    for (name, review) in &recorded_reviews() {
        let first = webhook.mutate(review);
        assert_eq!(first, answer(&policy, &stored(mode), review), "{name}");
        let again = defaulted(&patched(review, &first));
        assert_eq!(patch_of(&webhook.mutate(&again)), json!([]), "{name}");
        assert_eq!(webhook.validate(&again)["response"]["allowed"], true, "{name}");
    }
}

const SCHEMA: &str = "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);";

#[test]
fn recorded_reviews_get_their_answers_on_sqlite() {
    for mode in ["platform_managed", "byok", "disabled"] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("recorded.sqlite");
        test_support::sqlite(&file, &(SCHEMA.to_owned() + &rows(mode)));
        let database_url = &format!("sqlite://{}", file.display());
        let webhook = Start {
            policy: PROXY,
            database_url,
            ..Start::default()
        }
        .start();
        assert_same_answers_as_in_process(&webhook, mode);
    }
}

#[test]
fn recorded_reviews_get_their_answers_on_postgresql() {
    for mode in ["platform_managed", "byok", "disabled"] {
        let postgres = Postgres::with(&(SCHEMA.to_owned() + &rows(mode)));
        let webhook = Start {
            policy: PROXY,
            database_url: &postgres.url(),
            ..Start::default()
        }
        .start();
        assert_same_answers_as_in_process(&webhook, mode);
    }
}
