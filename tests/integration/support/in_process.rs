//! The core asked in process, with the lookup's outcome given: what the server does, without the server.

use llm_billing_webhook::core::admission::{Answer, BodyError, Decoded, Task, decode};
use llm_billing_webhook::core::mode::{Resolution, Stored, resolve};
use llm_billing_webhook::core::patch::patch;
use llm_billing_webhook::core::plan::plan;
use llm_billing_webhook::core::policy::Policy;
use llm_billing_webhook::core::refusal::Refusal;
use llm_billing_webhook::core::warning::answered;
use llm_billing_webhook::core::workspace::{Identity, identify, workspace_id};
use serde_json::Value;

/// The answer to a review.
pub(crate) fn answer(policy: &Policy, stored: &Stored, review: &Value) -> Value {
    answer_to(policy, stored, &serde_json::to_vec(review).unwrap()).unwrap()
}

/// The answer to a body.
pub(crate) fn answer_to(policy: &Policy, stored: &Stored, body: &[u8]) -> Result<Value, BodyError> {
    let answer = written(policy, stored, body)?;
    Ok(serde_json::from_str(&answer).unwrap())
}

/// The same as it is sent.
pub(crate) fn written(policy: &Policy, stored: &Stored, body: &[u8]) -> Result<String, BodyError> {
    let decoded = decode(body)?;
    let uid = decoded.uid();
    let request = match &decoded {
        Decoded::Request(request) => request,
        Decoded::Unreadable { refusal, .. } => {
            return Ok(Answer::refused(uid, refusal.clone()).written());
        }
    };
    let mut known = None;
    let mut decide = || -> Result<Answer<'_>, Refusal> {
        let Task::Plan(pod, scope) = request.task()? else {
            return Ok(Answer::allowed(uid));
        };
        let resolution = match identify(policy, pod, request.namespace())? {
            Identity::NotAWorkspace => return Ok(Answer::allowed(uid)),
            Identity::Resolved(resolution) => resolution,
            Identity::LookUp(_) => {
                known = Some((Resolution::from_stored(stored), workspace_id(policy, pod)));
                resolve(policy, stored)?
            }
        };
        known = Some((resolution, workspace_id(policy, pod)));
        let plan = plan(policy, resolution, pod, scope)?;
        Ok(Answer::allowed(uid)
            .with_patch(patch(&plan, ""))
            .with_warnings(answered(&plan.warnings)))
    };
    let answer = decide().unwrap_or_else(|refusal| Answer::refused(uid, refusal));
    let answer = match known {
        Some((resolution, workspace)) => answer.with_resolution(resolution, workspace),
        None => answer,
    };
    Ok(answer.written())
}

/// What a lookup finds that finds this mode.
pub(crate) fn stored(mode: &str) -> Stored {
    Stored::Row(Some(mode.to_owned()))
}
