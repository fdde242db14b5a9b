//! The contract's vectors, in process. `contract.rs` runs them over HTTPS with real databases.

use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::resolution::LookupOutcome;
use serde_json::{Value, json};

use test_support::in_process::answer;
use test_support::{assert_expected, defaulted, patch_of, patched, policy_of, review_of, vectors};

/// Returns the lookup outcome of a vector.
fn stored(vector: &Value) -> LookupOutcome {
    let stored = &vector["stored"];
    match (stored["lookup_error"].as_bool(), stored["row"].as_bool()) {
        (Some(true), _) => LookupOutcome::Failed,
        (_, Some(true)) => LookupOutcome::of_mode(stored["mode"].as_str()),
        _ => LookupOutcome::NoRow,
    }
}

#[test]
fn every_vector_yields_its_env_in_one_pass() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 36);
    for vector in &vectors {
        let policy = Policy::parse(&policy_of(vector)).unwrap();
        let review = review_of(vector);
        let first = answer(&policy, &stored(vector), &review);
        assert_expected(vector, &first);
        if vector["expect"]["error"].is_null() {
            let again = defaulted(&patched(&review, &first));
            assert_eq!(
                patch_of(&answer(&policy, &stored(vector), &again)),
                json!([]),
                "{}",
                vector["name"]
            );
        }
    }
}

#[test]
fn reason_names_the_lookup_outcome() {
    let policy = Policy::parse("unlabelled: platform_managed").unwrap();
    let reason = |workspace: &Value, stored: &LookupOutcome| {
        let pod = json!({"metadata": {"labels": {"molecule.ai/workspace-id": workspace}}});
        let answer = answer(&policy, stored, &test_support::create(&pod));
        answer["response"]["auditAnnotations"]["reason"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let id = json!("88888888-8888-8888-8888-888888888888");
    let row = |mode: &str| LookupOutcome::of_mode(Some(mode));
    let table = [
        (&id, row("byok"), "override"),
        (&id, LookupOutcome::of_mode(None), "no_override"),
        (&id, row("x"), "unknown_mode"),
        (&id, LookupOutcome::NoRow, "workspace_not_found"),
        (&id, LookupOutcome::Failed, "lookup_error"),
        (&json!("x"), row("byok"), "invalid_workspace_id"),
        (&json!(""), row("byok"), "missing_workspace_id"),
        (&json!(null), row("byok"), "missing_workspace_id"),
    ];
    for (workspace, stored, expected) in table {
        assert_eq!(reason(workspace, &stored), expected);
    }
}
