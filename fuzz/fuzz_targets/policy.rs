//! Any text as a policy file: it is refused with a sentence, or it decides about a recorded review.
#![no_main]

#[allow(dead_code, reason = "the other target uses the rest")]
#[path = "../../tests/integration/support/in_process.rs"]
mod in_process;

use libfuzzer_sys::fuzz_target;
use llm_billing_webhook::core::policy::Policy;

const REVIEW: &[u8] =
    include_bytes!("../../tests/fixtures/admission-reviews/claude-code-pod-dry-run.json");

fuzz_target!(|text: &str| {
    match Policy::parse(text) {
        Ok(policy) => {
            let _ = policy.warnings();
            let answered = in_process::answer_to(&policy, &in_process::stored("other"), REVIEW);
            assert!(answered.is_ok());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
