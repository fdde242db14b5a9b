//! The recorded admission reviews in each mode, in process: snapshots of the answers, and the patched objects.
//! `recorded.rs` runs them over HTTPS.

use k8s_openapi::api::core::v1::Pod;
use kube::core::admission::{AdmissionRequest, AdmissionReview};
use llm_billing_webhook::core::admission::{Decoded, decode};
use llm_billing_webhook::core::pod::{ContainerList, Text};
use llm_billing_webhook::core::policy::Policy;
use serde_json::{Value, json};

use test_support::fuzz;
use test_support::in_process::{answer, stored};
use test_support::{PROXY, defaulted, fixtures, patch_of, patched, recorded_reviews};

const MODES: [&str; 3] = ["platform_managed", "byok", "disabled"];

/// Returns an answer as readable text, with one patch operation per line.
fn render(answer: &Value) -> String {
    let mut response = answer["response"].clone();
    let fields = response.as_object_mut().unwrap();
    let patch = patch_of(answer);
    fields.remove("patch");
    let mut text = serde_json::to_string_pretty(&response).unwrap();
    text.push_str("\npatch:\n");
    for operation in patch.as_array().unwrap() {
        text.push_str(&format!("{operation}\n"));
    }
    text
}

#[test]
fn recorded_reviews_match_their_answer_snapshots() {
    let policy = Policy::parse(PROXY).unwrap();
    let reviews = recorded_reviews();
    assert_eq!(reviews.len(), 14);
    insta::with_settings!({snapshot_path => fixtures("snapshots"), prepend_module_to_snapshot => false, omit_expression => true}, {
        for (name, review) in &reviews {
            for mode in MODES {
                let answer = answer(&policy, &stored(mode), review);
                assert_eq!(answer["response"]["uid"], review["request"]["uid"]);
                insta::assert_snapshot!(format!("{name}.{mode}"), render(&answer));
            }
        }
    });
}

#[test]
fn patched_object_is_a_pod_and_stays_unpatched() {
    let policy = Policy::parse(PROXY).unwrap();
    for (name, review) in &recorded_reviews() {
        for mode in MODES {
            let first = answer(&policy, &stored(mode), review);
            let after = patched(review, &first);
            let pod: Result<Pod, _> = serde_json::from_value(after["request"]["object"].clone());
            pod.unwrap_or_else(|error| panic!("{name}: {error}"));
            for again in [&after, &defaulted(&after)] {
                assert_eq!(
                    patch_of(&answer(&policy, &stored(mode), again)),
                    json!([]),
                    "{name} {mode}"
                );
            }
        }
    }
}

#[test]
fn dry_run_gets_the_same_answer() {
    let policy = Policy::parse(PROXY).unwrap();
    for (name, review) in &recorded_reviews() {
        let mut dry_run = review.clone();
        dry_run["request"]["dryRun"] = true.into();
        for mode in MODES {
            let answer = |review| answer(&policy, &stored(mode), review);
            assert_eq!(answer(review), answer(&dry_run), "{name}");
        }
    }
}

#[test]
fn mode_change_updates_a_patched_pod() {
    let policy = Policy::parse(PROXY).unwrap();
    let review = &recorded_reviews()["claude-code-pod"];
    let managed = patched(review, &answer(&policy, &stored("platform_managed"), review));
    let byok = patched(&managed, &answer(&policy, &stored("byok"), &managed));
    let object = &byok["request"]["object"];
    let env = test_support::env_map(&object["spec"]["containers"][0]);
    assert_eq!(env["MOLECULE_LLM_BILLING_MODE"], "byok");
    assert_eq!(env["MOLECULE_LLM_BILLING_MODE_RESOLVED"], "byok");
    assert_eq!(object["metadata"]["annotations"]["molecule.ai/llm-billing-mode"], "byok");
    // By the contract, byok does not remove the proxy's variables.
    assert!(env.contains_key("MOLECULE_LLM_BASE_URL"));
}

#[test]
fn decoded_review_matches_kubes_own_types() {
    for (name, review) in &recorded_reviews() {
        let body = review.to_string().into_bytes();
        let Ok(Decoded::Request(own)) = decode(&body) else {
            panic!("{name}")
        };
        let review: AdmissionReview<Pod> = serde_json::from_slice(&body).unwrap();
        let kubes: AdmissionRequest<Pod> = review.try_into().unwrap();
        let text = |text: &Option<Text<'_>>| text.as_ref().map_or("", Text::as_str).to_owned();
        assert_eq!(own.uid.as_str(), kubes.uid, "{name}");
        assert_eq!(own.namespace(), kubes.namespace.unwrap(), "{name}");
        assert_eq!(text(&own.name), kubes.name, "{name}");
        assert_eq!(text(&own.sub_resource), kubes.sub_resource.unwrap_or_default());
        assert_eq!(own.dry_run, Some(kubes.dry_run), "{name}");
        let operation = format!("{:?}", kubes.operation).to_uppercase();
        assert_eq!(own.operation.as_str(), operation, "{name}");

        let (own, spec) = (own.object.unwrap(), kubes.object.unwrap().spec.unwrap());
        let mut names = Vec::new();
        for container in spec.containers {
            names.extend(container.env.into_iter().flatten().map(|entry| entry.name));
        }
        let mut own_names = Vec::new();
        for container in own.containers(ContainerList::Main) {
            let entries = container.env.iter().flatten();
            own_names.extend(entries.map(|entry| entry.name.as_str().to_owned()));
        }
        assert_eq!(own_names, names, "{name}");
    }
}

#[test]
fn fuzz_targets_accept_recorded_inputs() {
    for review in recorded_reviews().values() {
        fuzz::review(review.to_string().as_bytes());
    }
    let default = include_str!("../../src/core/policy.default.yaml");
    for policy in [PROXY, default, "vendorKey: []"] {
        fuzz::policy(policy);
    }
}
