//! Writes a [`Decision`] as the JSON response to an admission review. The decision is made in decision.rs; its patch is
//! written in patch.rs.

use base64_simd::STANDARD;

use super::admission::{API_VERSION, KIND};
use super::decision::Decision;
use super::json::{Object, list, object, text};
use super::patch::{Patch, patch};
use super::warning::within_limits;

/// The capacity for a response without its patch.
const BYTES_WITHOUT_PATCH: usize = 512;
/// Kubernetes limits a label value to 63 bytes, but the request has not been validated yet.
const MAX_WORKSPACE_BYTES: usize = 63;

/// A response to send.
pub struct Response {
    /// The admission review, as JSON.
    pub json: String,
    /// The number of operations in its patch.
    pub patch_operations: usize,
}

impl Response {
    /// Writes the response to the request with this uid.
    #[must_use]
    pub fn new(uid: &str, decision: &Decision<'_>) -> Self {
        let patch = decision.plan.as_ref().map(|plan| patch(plan, ""));
        let patch = patch.filter(|patch| patch.operations > 0);
        let encoded = patch
            .as_ref()
            .map_or(0, |patch| STANDARD.encoded_length(patch.json.len()));
        let mut json = String::with_capacity(BYTES_WITHOUT_PATCH + encoded);
        object(&mut json, |review| {
            review.text("apiVersion", API_VERSION);
            review.text("kind", KIND);
            object(review.member("response"), |response| {
                write(response, uid, decision, patch.as_ref());
            });
        });
        Self {
            json,
            patch_operations: patch.map_or(0, |patch| patch.operations),
        }
    }
}

fn write(response: &mut Object<'_>, uid: &str, decision: &Decision<'_>, patch: Option<&Patch>) {
    let refusal = decision.outcome.refusal();
    response.text("uid", uid);
    response.plain("allowed", refusal.is_none());
    if let Some(refusal) = refusal {
        object(response.member("status"), |status| {
            let (code, reason) = refusal.status();
            status.plain("code", code);
            status.text("reason", reason);
            status.text("message", &refusal.to_string());
        });
    }
    let warnings = within_limits(decision.warnings());
    if !warnings.is_empty() {
        list(response.member("warnings"), &warnings, |out, warning| {
            text(out, warning);
        });
    }
    if let Some(resolution) = &decision.resolution {
        object(response.member("auditAnnotations"), |annotations| {
            annotations.text("mode", resolution.mode.as_str());
            annotations.text("reason", resolution.reason.as_str());
            annotations.text("source", resolution.source.as_str());
            annotations.text("workspace", recorded_workspace(decision));
        });
    }
    if let Some(patch) = patch {
        response.text("patchType", "JSONPatch");
        // Base64 needs no escapes.
        let out = response.member("patch");
        out.push('"');
        STANDARD.encode_append(&patch.json, out);
        out.push('"');
    }
}

/// Returns the workspace id for the API server's audit log, the webhook's log and traces, cut to 63 bytes.
#[must_use]
pub fn recorded_workspace<'a>(decision: &Decision<'a>) -> &'a str {
    truncate(decision.workspace, MAX_WORKSPACE_BYTES)
}

/// Truncates a text to at most `max_bytes` bytes, between two characters.
#[must_use]
pub fn truncate(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::decision::Outcome;
    use crate::core::refusal::Refusal;

    #[test]
    fn truncate_cuts_between_characters() {
        assert_eq!(truncate("short", 63), "short");
        assert_eq!(truncate(&"x".repeat(64), 63), "x".repeat(63));
        assert_eq!(truncate(&"é".repeat(40), 63), "é".repeat(31));
    }

    #[test]
    fn refusal_has_status_and_reason_and_no_patch() {
        let response = |refusal| -> Value {
            let decision = Decision::without_workspace(Outcome::Refused(refusal));
            serde_json::from_str(&Response::new("u", &decision).json).unwrap()
        };
        let status = |code: u16, reason: &str, refusal: &Refusal| {
            json!({
                "apiVersion": API_VERSION,
                "kind": KIND,
                "response": {"uid": "u", "allowed": false, "status": {"code": code, "reason": reason, "message": refusal.to_string()}},
            })
        };
        let env_from = Refusal::EnvFromVendorKey {
            container: "c".into(),
            keys: "k".into(),
        };
        let label = Refusal::MissingWorkspaceLabel { label: "l".into() };
        let findings = Refusal::NotSettled {
            findings: "f".into(),
        };
        let unreadable = Refusal::Unreadable { place: "p".into() };
        for (code, reason, refusal) in [
            (403, "Forbidden", Refusal::MissingPlatformProxy),
            (403, "Forbidden", env_from),
            (403, "Forbidden", label),
            (403, "Forbidden", findings),
            (503, "ServiceUnavailable", Refusal::LookupFailed),
            (400, "BadRequest", Refusal::NoObject),
            (400, "BadRequest", unreadable),
        ] {
            assert_eq!(response(refusal.clone()), status(code, reason, &refusal));
            let start = format!("{}: ", refusal.code());
            assert!(refusal.to_string().starts_with(&start));
        }
    }
}
