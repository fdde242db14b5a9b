//! The bodies of the fuzz targets, here so that the tests compile and run them.

use std::sync::LazyLock;

use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::policy_file::PolicyFile;
use llm_billing_webhook::core::resolution::LookupOutcome;
use serde_json::Value;

use crate::in_process::{answer, answer_to, stored};
use crate::{PROXY, patch_of, patched};

const REVIEW: &[u8] =
    include_bytes!("../../fixtures/admission-reviews/claude-code-pod-dry-run.json");

/// Checks any bytes as a request's body: it is refused, or its patch applies and leaves nothing to patch. A leading
/// space changes no answer.
pub fn review(body: &[u8]) {
    static POLICY: LazyLock<Policy> = LazyLock::new(|| Policy::parse(PROXY).unwrap());
    for lookup in [LookupOutcome::NoRow, stored("byok")] {
        let Ok(response) = answer_to(&POLICY, &lookup, body) else {
            return;
        };
        // A body that starts with a space is read by serde_json.
        let with_space = answer_to(&POLICY, &lookup, &[b" ", body].concat());
        assert_eq!(with_space.as_ref(), Ok(&response));
        if response["response"]["allowed"] == false {
            continue;
        }
        // The webhook skips nesting that is too deep for serde_json::Value.
        let Ok(review) = serde_json::from_slice::<Value>(body) else {
            return;
        };
        let again = answer(&POLICY, &lookup, &patched(&review, &response));
        assert_eq!(patch_of(&again), Value::Array(vec![]));
    }
}

/// Checks any text as a policy file: it is refused with a message, or it decides about a recorded review.
pub fn policy(text: &str) {
    match PolicyFile::parse(text) {
        Ok(file) => {
            let _ = file.warnings();
            let result = answer_to(&Policy::from(file), &stored("other"), REVIEW);
            assert!(result.is_ok());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
