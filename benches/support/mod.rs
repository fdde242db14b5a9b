//! The reviews and the policy that the in-process benchmarks share.

use std::fs;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use llm_billing_webhook::core::policy::Policy;
use serde_json::Value;

use test_support::in_process::{answer, stored};

/// The recorded pods, from one container to twenty with 200 KB.
pub(crate) const RECORDED: [&str; 3] = [
    "claude-code-pod",
    "hermes-deployment-pod",
    "large-pod-20-containers",
];
/// The first recorded pod, already patched, so that nothing is left to change.
pub(crate) const SETTLED: &str = "claude-code-pod, settled";

/// The first recorded review after a leading space, so that serde_json reads it.
pub(crate) const LEADING_SPACE: &str = "claude-code-pod, read by serde_json";

/// Returns a policy with every field of the proxy set.
pub(crate) fn policy() -> Policy {
    Policy::parse(include_str!("../../tests/fixtures/policy.yaml")).unwrap()
}

/// Returns a review's bytes by name: as recorded, after a leading space, or of the settled pod.
pub(crate) fn body(name: &str) -> Vec<u8> {
    if name == LEADING_SPACE {
        return [b" ", body(RECORDED[0]).as_slice()].concat();
    }
    let settled = name.strip_suffix(", settled");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/admission-reviews");
    let body = fs::read(format!("{folder}/{}.json", settled.unwrap_or(name))).unwrap();
    if settled.is_none() {
        return body;
    }
    let mut review: Value = serde_json::from_slice(&body).unwrap();
    let answer = answer(&policy(), &stored("platform_managed"), &review);
    let patch = answer["response"]["patch"].as_str().unwrap();
    let patch: json_patch::Patch =
        serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
    json_patch::patch(&mut review["request"]["object"], &patch).unwrap();
    serde_json::to_vec(&review).unwrap()
}
