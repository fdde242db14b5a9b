//! The fuzz targets' bodies. They stand here so that they are compiled and run with the tests.

use std::sync::LazyLock;

use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::policy_file::PolicyFile;
use llm_billing_webhook::core::resolution::LookupOutcome;
use serde_json::Value;

use crate::in_process::{answer, answer_to, stored};
use crate::{PROXY, patch_of, patched};

const REVIEW: &[u8] =
    include_bytes!("../../fixtures/admission-reviews/claude-code-pod-dry-run.json");

/// Takes any bytes as the body of a request: it is refused, or answered with a patch that applies to it and leaves
/// nothing to patch. A space in front changes no answer.
pub fn review(body: &[u8]) {
    static POLICY: LazyLock<Policy> = LazyLock::new(|| Policy::parse(PROXY).unwrap());
    for lookup in [LookupOutcome::NoRow, stored("byok")] {
        let Ok(response) = answer_to(&POLICY, &lookup, body) else {
            return;
        };
        // serde_json reads what starts with a space.
        let behind_space = answer_to(&POLICY, &lookup, &[b" ", body].concat());
        assert_eq!(behind_space.as_ref(), Ok(&response));
        if response["response"]["allowed"] == false {
            continue;
        }
        // Nesting that the webhook skips can be too deep for serde_json's own value.
        let Ok(review) = serde_json::from_slice::<Value>(body) else {
            return;
        };
        let again = answer(&POLICY, &lookup, &patched(&review, &response));
        assert_eq!(patch_of(&again), Value::Array(vec![]));
    }
}

/// Takes any text as a policy file: it is refused with a sentence, or it decides about a recorded review.
pub fn policy(text: &str) {
    match PolicyFile::parse(text) {
        Ok(file) => {
            let _ = file.warnings();
            let answered = answer_to(&Policy::from(file), &stored("other"), REVIEW);
            assert!(answered.is_ok());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
