//! The contract's vectors as a container's env, through the real HTTPS endpoint, on SQLite and PostgreSQL.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook};
use test_support::{assert_expected, defaulted, patch_of, patched, policy_of, review_of, vectors};

const SCHEMA: &str = "CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text);";

/// Returns statements that insert the rows of the vectors.
fn rows(vectors: &[Value]) -> String {
    let quoted = |value: &Value| {
        value
            .as_str()
            .map_or("NULL".to_owned(), |text| format!("'{text}'"))
    };
    let with_row = vectors
        .iter()
        .filter(|vector| vector["stored"]["row"] == true);
    let row = |vector: &Value| {
        let (id, mode) = (quoted(&vector["workspace_id"]), quoted(&vector["stored"]["mode"]));
        format!("INSERT INTO workspaces VALUES ({id}, {mode});")
    };
    with_row.map(row).collect()
}

/// Runs one program for each proxy in the vectors, and one for those whose lookup fails.
fn assert_every_vector_passes(vectors: &[Value], database_url: &str, broken_url: &str) {
    let mut programs: BTreeMap<(String, bool), Webhook> = BTreeMap::new();
    for vector in vectors {
        let fails = vector["stored"]["lookup_error"] == true;
        let policy = policy_of(vector);
        let webhook = programs.entry((policy.clone(), fails)).or_insert_with(|| {
            let database_url = if fails { broken_url } else { database_url };
            Start {
                policy: &policy,
                database_url,
                ..Start::default()
            }
            .start()
        });
        let review = review_of(vector);
        let first = webhook.mutate(&review);
        assert_expected(vector, &first);
        if vector["expect"]["error"].is_null() {
            let again = defaulted(&patched(&review, &first));
            assert_eq!(patch_of(&webhook.mutate(&again)), json!([]), "{}", vector["name"]);
            assert_eq!(webhook.validate(&again)["response"]["allowed"], true, "{}", vector["name"]);
        }
    }
}

#[test]
fn every_vector_passes_on_postgresql() {
    let vectors = vectors();
    let postgres = Postgres::with(&(SCHEMA.to_owned() + &rows(&vectors)));
    let broken_url = "postgres://reader@localhost/nowhere?host=/nonexistent";
    assert_every_vector_passes(&vectors, &postgres.url(), broken_url);
}

#[test]
fn every_vector_passes_on_sqlite() {
    let vectors = vectors();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vectors.sqlite");
    test_support::sqlite(&file, &(SCHEMA.to_owned() + &rows(&vectors)));
    let url = |file: &Path| format!("sqlite://{}", file.display());
    assert_every_vector_passes(&vectors, &url(&file), &url(&folder.path().join("missing.sqlite")));
}
