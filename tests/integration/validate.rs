//! The guard: `/validate` refuses what `/mutate` would still change, on both operations.

use serde_json::json;

use test_support::load;
use test_support::postgres::Postgres;
use test_support::program::{Start, Webhook};
use test_support::{PROXY, create, patched, pod, recorded_reviews};

const ID: &str = "88888888-8888-8888-8888-888888888888";

fn start() -> (Webhook, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("validate.sqlite");
    let rows = format!(
        "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT); INSERT INTO workspaces VALUES ('{ID}', 'platform_managed')"
    );
    test_support::sqlite(&file, &rows);
    let database_url = &format!("sqlite://{}", file.display());
    (
        Start {
            policy: PROXY,
            database_url,
            ..Start::default()
        }
        .start(),
        folder,
    )
}

#[test]
fn a_vendor_key_that_was_put_back_is_refused_by_container_and_name() {
    let (webhook, _folder) = start();
    let review = create(&pod(ID, &json!([{"name": "KEEP", "value": "1"}])));
    let mut settled = patched(&review, &webhook.mutate(&review));
    let answer = webhook.validate(&settled);
    let annotations = json!({"mode": "platform_managed", "source": "workspace_override", "reason": "override", "workspace": ID});
    let response =
        json!({"uid": review["request"]["uid"], "allowed": true, "auditAnnotations": annotations});
    assert_eq!(answer["response"], response);

    let env = settled["request"]["object"]["spec"]["containers"][0]["env"]
        .as_array_mut()
        .unwrap();
    env.push(json!({"name": "XAI_API_KEY", "value": "sk-put-back"}));
    let answer = webhook.validate(&settled);
    let message = "ENV_NOT_SETTLED: container \"agent\" has not settled XAI_API_KEY; remove what adds or changes these variables \
                   after the llm-billing-webhook (another mutating webhook, perhaps), then create the pod again";
    let status = json!({"code": 403, "reason": "Forbidden", "message": message});
    let response = json!({"uid": review["request"]["uid"], "allowed": false, "status": status, "auditAnnotations": annotations});
    assert_eq!(answer["response"], response);
}

#[test]
fn while_the_database_fails_a_pod_that_may_be_right_is_to_be_sent_again() {
    let postgres = Postgres::with(&load::schema());
    let webhook = Start {
        policy: PROXY,
        database_url: &postgres.url(),
        ..Start::default()
    }
    .start();
    let review = create(&pod(
        load::BYOK,
        &json!([{"name": "XAI_API_KEY", "value": "own"}]),
    ));
    let settled = patched(&review, &webhook.mutate(&review));
    postgres.execute("ALTER TABLE workspaces RENAME TO gone");
    let answer = webhook.validate(&settled);
    let annotations = json!({"mode": "platform_managed", "source": "constant_fallback", "reason": "lookup_error", "workspace": load::BYOK});
    let message = "LOOKUP_FAILED: the workspace's billing mode could not be looked up; try again, and if it stays, \
                   ask the platform's operators";
    let status = json!({"code": 503, "reason": "ServiceUnavailable", "message": message});
    let response = json!({"uid": review["request"]["uid"], "allowed": false, "status": status, "auditAnnotations": annotations});
    assert_eq!(answer["response"], response);
    // One that a fallback made is what the policy asks for.
    let fallen_back = patched(&review, &webhook.mutate(&review));
    assert_eq!(webhook.validate(&fallen_back)["response"]["allowed"], true);
    postgres.execute("ALTER TABLE gone RENAME TO workspaces");
    assert_eq!(webhook.validate(&settled)["response"]["allowed"], true);
}

#[test]
fn absent_annotations_are_no_reason_to_refuse() {
    let (webhook, _folder) = start();
    let review = create(&pod(ID, &json!([])));
    let mut settled = patched(&review, &webhook.mutate(&review));
    settled["request"]["object"]["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("annotations");
    assert_eq!(webhook.validate(&settled)["response"]["allowed"], true);
}

#[test]
fn a_debug_container_is_guarded_and_other_requests_are_let_through() {
    let (webhook, _folder) = start();
    let reviews = recorded_reviews();
    let debug = &reviews["ephemeral-container"];
    assert_eq!(webhook.validate(debug)["response"]["allowed"], false);
    assert_eq!(
        webhook.validate(&patched(debug, &webhook.mutate(debug)))["response"]["allowed"],
        true
    );
    for untouched in ["label-update", "pod-without-workspace-label"] {
        assert_eq!(
            webhook.validate(&reviews[untouched])["response"]["allowed"],
            true,
            "{untouched}"
        );
    }
}
