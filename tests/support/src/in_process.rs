//! The core in process, with a given lookup outcome.

use llm_billing_webhook::core::admission::{BodyError, decode};
use llm_billing_webhook::core::decision::{Webhook, begin};
use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::resolution::LookupOutcome;
use llm_billing_webhook::core::response::Response;
use serde_json::Value;

/// Returns the answer to a review.
pub fn answer(policy: &Policy, lookup: &LookupOutcome, review: &Value) -> Value {
    answer_to(policy, lookup, &serde_json::to_vec(review).unwrap()).unwrap()
}

/// Returns the answer to a body.
pub fn answer_to(policy: &Policy, lookup: &LookupOutcome, body: &[u8]) -> Result<Value, BodyError> {
    let answer = answer_json(policy, lookup, body)?;
    Ok(serde_json::from_str(&answer).unwrap())
}

/// Returns the answer to a body as the JSON text that is sent.
pub fn answer_json(
    policy: &Policy,
    lookup: &LookupOutcome,
    body: &[u8],
) -> Result<String, BodyError> {
    let review = decode(body)?;
    let decision = begin(policy, Webhook::Mutate, &review).finish(lookup);
    Ok(Response::new(review.uid(), &decision).json)
}

/// Returns the outcome of a lookup that finds this mode.
pub fn stored(mode: &str) -> LookupOutcome {
    LookupOutcome::of_mode(Some(mode))
}
