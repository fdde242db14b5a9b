//! Any bytes as the body of a request: they are refused, or answered with a patch that applies to them and
//! leaves nothing to patch. Space in front of them changes no answer.
#![no_main]

#[path = "../../tests/integration/support/in_process.rs"]
mod in_process;

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use libfuzzer_sys::fuzz_target;
use llm_billing_webhook::core::resolution::LookupOutcome;
use llm_billing_webhook::core::policy::Policy;
use serde_json::Value;

static POLICY: LazyLock<Policy> =
    LazyLock::new(|| Policy::parse(include_str!("../../tests/fixtures/policy.yaml")).unwrap());

fuzz_target!(|body: &[u8]| {
    for stored in [LookupOutcome::NoRow, in_process::stored("byok")] {
        let Ok(answer) = in_process::answer_to(&POLICY, &stored, body) else {
            return;
        };
        // Behind a space it is read another way.
        let behind_space = in_process::answer_to(&POLICY, &stored, &[b" ", body].concat());
        assert_eq!(behind_space.as_ref(), Ok(&answer));
        if answer["response"]["allowed"] == false {
            continue;
        }
        // Nesting that the webhook skips over can be too deep for this one.
        let Ok(mut review) = serde_json::from_slice::<Value>(body) else {
            return;
        };
        if let Some(patch) = answer["response"]["patch"].as_str() {
            let patch: json_patch::Patch =
                serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
            json_patch::patch(&mut review["request"]["object"], &patch).unwrap();
        }
        let settled = in_process::answer(&POLICY, &stored, &review);
        assert_eq!(settled["response"]["patch"], Value::Null);
    }
});
