//! The guard: `/validate` rejects pods that `/mutate` would still change, on CREATE and on ephemeral containers.

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
fn restored_vendor_key_is_refused_by_name() {
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
    let message = "ENV_NOT_SETTLED: env of container \"agent\" is out of sync: XAI_API_KEY; another mutating webhook probably \
                   changes these variables after the llm-billing-webhook; stop it from doing so, then create the pod again";
    let status = json!({"code": 403, "reason": "Forbidden", "message": message});
    let response = json!({"uid": review["request"]["uid"], "allowed": false, "status": status, "auditAnnotations": annotations});
    assert_eq!(answer["response"], response);
}

#[test]
fn failed_lookup_refuses_a_possibly_correct_pod() {
    let postgres = Postgres::with(&load::schema());
    let webhook = Start {
        policy: PROXY,
        database_url: &postgres.url(),
        ..Start::default()
    }
    .start();
    let review = create(&pod(load::BYOK, &json!([{"name": "XAI_API_KEY", "value": "own"}])));
    let settled = patched(&review, &webhook.mutate(&review));
    postgres.execute("ALTER TABLE workspaces RENAME TO gone");
    let answer = webhook.validate(&settled);
    let annotations = json!({"mode": "platform_managed", "source": "constant_fallback", "reason": "lookup_error", "workspace": load::BYOK});
    let message = "LOOKUP_FAILED: the workspace's billing mode could not be looked up; try again; if it keeps failing, \
                   contact the platform's operators";
    let status = json!({"code": 503, "reason": "ServiceUnavailable", "message": message});
    let response = json!({"uid": review["request"]["uid"], "allowed": false, "status": status, "auditAnnotations": annotations});
    assert_eq!(answer["response"], response);
    // A pod mutated during the failure matches the fallback, so it is allowed.
    let fallen_back = patched(&review, &webhook.mutate(&review));
    assert_eq!(webhook.validate(&fallen_back)["response"]["allowed"], true);
    postgres.execute("ALTER TABLE gone RENAME TO workspaces");
    assert_eq!(webhook.validate(&settled)["response"]["allowed"], true);
}

#[test]
fn missing_annotations_are_allowed() {
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
fn guard_checks_debug_containers_and_ignores_other_requests() {
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
