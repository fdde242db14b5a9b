//! Decodes an admission review and classifies its request. The response is written in response.rs; HTTP is handled in
//! server/webhook.rs.

use serde::Deserialize;
use thiserror::Error;

use super::compact_json;
use super::pod::{Pod, Text};
use super::refusal::Refusal;

/// The only supported API version; API servers have sent it since Kubernetes 1.16.
pub(super) const API_VERSION: &str = "admission.k8s.io/v1";
pub(super) const KIND: &str = "AdmissionReview";

/// Why a body gets no admission response.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum BodyError {
    /// The body is not JSON.
    #[error("the body is not JSON (line {line}, column {column}); send an AdmissionReview as JSON")]
    NotJson {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// The body is JSON, but not an admission review.
    #[error(
        "the body is not an AdmissionReview; send kind AdmissionReview of apiVersion {API_VERSION}"
    )]
    NotAdmissionReview,
    /// The body is an admission review of another version.
    #[error(
        "this version of AdmissionReview is not supported; set admissionReviewVersions: [v1] in the webhook configuration"
    )]
    OtherVersion,
    /// The response must echo the uid.
    #[error("the AdmissionReview has no request.uid; set it to a non-empty string")]
    NoUid,
}

/// The request in an admission review, borrowed from the body.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request<'a> {
    /// Echoed in the response.
    #[serde(borrow, default)]
    pub uid: Text<'a>,
    /// The resource that is created or updated.
    #[serde(borrow)]
    pub resource: Option<Resource<'a>>,
    /// Such as `ephemeralcontainers`; absent or empty for the pod itself.
    #[serde(borrow)]
    pub sub_resource: Option<Text<'a>>,
    /// Such as `CREATE`.
    #[serde(borrow, default)]
    pub operation: Text<'a>,
    /// The pod's name; absent under `generateName`.
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    /// The pod's namespace.
    #[serde(borrow)]
    pub namespace: Option<Text<'a>>,
    /// Whether nothing will be stored; the response is the same.
    pub dry_run: Option<bool>,
    /// The new pod.
    #[serde(borrow)]
    pub object: Option<Pod<'a>>,
    /// The stored pod, on updates.
    #[serde(borrow)]
    pub old_object: Option<Pod<'a>>,
}

/// A resource by its API group and plural name.
#[derive(Debug, Deserialize)]
pub struct Resource<'a> {
    /// Empty for the core API.
    #[serde(borrow, default)]
    pub group: Text<'a>,
    /// Such as `pods`.
    #[serde(borrow, default)]
    pub resource: Text<'a>,
}

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdmissionTarget {
    /// A pod is created.
    PodCreation,
    /// A running pod gets ephemeral containers.
    NewEphemeralContainers,
    /// Another resource, or an update that cannot change env.
    NotApplicable,
}

impl AdmissionTarget {
    pub(super) fn of(group: &str, resource: &str, sub_resource: &str, operation: &str) -> Self {
        match (group, resource, sub_resource, operation) {
            ("", "pods", "", "CREATE") => Self::PodCreation,
            ("", "pods", "ephemeralcontainers", "UPDATE") => Self::NewEphemeralContainers,
            _ => Self::NotApplicable,
        }
    }

    /// Returns the label value in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PodCreation => "create",
            Self::NewEphemeralContainers => "ephemeralcontainers",
            Self::NotApplicable => "other",
        }
    }
}

impl Request<'_> {
    /// Returns what the request is about.
    #[must_use]
    pub fn target(&self) -> AdmissionTarget {
        let Some(Resource { group, resource }) = &self.resource else {
            return AdmissionTarget::NotApplicable;
        };
        let sub_resource = self.sub_resource.as_ref().map_or("", Text::as_str);
        let operation = self.operation.as_str();
        AdmissionTarget::of(group.as_str(), resource.as_str(), sub_resource, operation)
    }

    /// Returns the pod's namespace; empty if the request has none.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.namespace.as_ref().map_or("", Text::as_str)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope<'a, R> {
    #[serde(borrow)]
    api_version: Option<Text<'a>>,
    #[serde(borrow)]
    kind: Option<Text<'a>>,
    request: Option<R>,
}

/// The part of a request that a refusal needs, if the rest has the wrong shape.
#[derive(Deserialize)]
struct Identifier<'a> {
    #[serde(borrow, default)]
    uid: Text<'a>,
}

impl<R> Envelope<'_, R> {
    /// Returns the request of a v1 review with a uid.
    fn into_request(self, uid: impl Fn(&R) -> &str) -> Result<R, BodyError> {
        let equals = |text: &Option<Text<'_>>, expected| {
            text.as_ref().is_some_and(|text| text.as_str() == expected)
        };
        let is_admission_group = self
            .api_version
            .as_ref()
            .is_some_and(|version| version.as_str().starts_with("admission.k8s.io/"));
        if !equals(&self.kind, KIND) || !is_admission_group {
            return Err(BodyError::NotAdmissionReview);
        }
        if !equals(&self.api_version, API_VERSION) {
            return Err(BodyError::OtherVersion);
        }
        self.request
            .filter(|request| !uid(request).is_empty())
            .ok_or(BodyError::NoUid)
    }
}

/// A request that gets an admission response.
#[derive(Debug)]
pub enum Decoded<'a> {
    /// The request was decoded.
    Request(Box<Request<'a>>),
    /// A part has the wrong shape; the request is refused.
    Unreadable {
        /// Echoed in the response.
        uid: String,
        /// The refusal, which names the part.
        refusal: Refusal,
    },
}

impl Decoded<'_> {
    /// Returns the request, if it was decoded.
    #[must_use]
    pub fn request(&self) -> Option<&Request<'_>> {
        match self {
            Self::Request(request) => Some(request),
            Self::Unreadable { .. } => None,
        }
    }

    /// Returns the uid that the response must echo.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Request(request) => request.uid.as_str(),
            Self::Unreadable { uid, .. } => uid,
        }
    }
}

/// Decodes a body. Errors contain paths, never values; serde's own messages quote values.
///
/// # Errors
/// [`BodyError`] if no admission response is possible.
pub fn decode(body: &[u8]) -> Result<Decoded<'_>, BodyError> {
    // Checks UTF-8 once instead of per string. If it is invalid, serde_json reports the position.
    let review = match str::from_utf8(body) {
        Ok(text) => compact_json::from_str::<Envelope<'_, Box<Request<'_>>>>(text),
        Err(_) => serde_json::from_slice(body),
    };
    let error = match review {
        Ok(envelope) => {
            return envelope
                .into_request(|request| request.uid.as_str())
                .map(Decoded::Request);
        }
        Err(error) => error,
    };
    if error.is_syntax() || error.is_eof() {
        return Err(BodyError::NotJson {
            line: error.line(),
            column: error.column(),
        });
    }
    let envelope: Envelope<'_, Identifier<'_>> =
        serde_json::from_slice(body).map_err(|_| BodyError::NotAdmissionReview)?;
    let uid = envelope
        .into_request(|request| request.uid.as_str())?
        .uid
        .as_str()
        .to_owned();
    let place =
        mismatch_path::<Envelope<'_, Request<'_>>>(&mut serde_json::Deserializer::from_slice(body));
    Ok(Decoded::Unreadable {
        uid,
        refusal: Refusal::Unreadable { place },
    })
}

/// Returns the path of the value that does not match `T`, such as `spec.containers[0].env[2].value`.
pub(super) fn mismatch_path<'de, T: Deserialize<'de>>(
    deserializer: impl serde::Deserializer<'de>,
) -> String {
    let error = serde_path_to_error::deserialize::<_, T>(deserializer).err();
    let path = error
        .map(|error| error.path().to_string())
        .filter(|path| path != ".");
    path.unwrap_or_else(|| "the object".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn review(request: &Value) -> Vec<u8> {
        json!({"apiVersion": API_VERSION, "kind": KIND, "request": request})
            .to_string()
            .into_bytes()
    }

    #[test]
    fn duplicate_field_is_refused() {
        // Another JSON reader may use the other value.
        let body = br#"{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request":
            {"uid": "u", "object": {"metadata": {}}, "object": {"spec": {}}}}"#;
        let Decoded::Unreadable { uid, refusal } = decode(body).unwrap() else {
            panic!("decoded");
        };
        assert_eq!(
            (uid, refusal),
            (
                "u".to_owned(),
                Refusal::Unreadable {
                    place: "request".to_owned()
                }
            )
        );
    }

    #[test]
    fn recorded_reviews_are_read_as_compact_json() {
        let reviews = [
            include_str!("../../tests/fixtures/admission-reviews/claude-code-pod.json"),
            include_str!("../../tests/fixtures/admission-reviews/hermes-deployment-pod.json"),
            include_str!("../../tests/fixtures/admission-reviews/large-pod-20-containers.json"),
            include_str!("../../tests/fixtures/admission-reviews/ephemeral-container.json"),
        ];
        for review in reviews {
            assert!(compact_json::read::<Envelope<'_, Request<'_>>>(review).is_some());
        }
    }

    #[test]
    fn decode_rejects_bodies_that_are_not_v1_reviews() {
        let request = json!({"uid": "u"});
        let other = |api_version: &str, kind: &str| {
            json!({"apiVersion": api_version, "kind": kind, "request": request}).to_string()
        };
        let table = [
            (String::new(), BodyError::NotJson { line: 1, column: 0 }),
            ("{\n\"a\": x}".to_owned(), BodyError::NotJson { line: 2, column: 6 }),
            (
                review(&request)
                    .iter()
                    .map(|&byte| char::from(byte))
                    .collect::<String>()
                    + "x",
                BodyError::NotJson {
                    line: 1,
                    column: 84,
                },
            ),
            ("[]".to_owned(), BodyError::NotAdmissionReview),
            ("{}".to_owned(), BodyError::NotAdmissionReview),
            ("\"text\"".to_owned(), BodyError::NotAdmissionReview),
            (r#"{"kind": 7}"#.to_owned(), BodyError::NotAdmissionReview),
            (other(API_VERSION, "Pod"), BodyError::NotAdmissionReview),
            (other("v1", KIND), BodyError::NotAdmissionReview),
            (other("admission.k8s.io/v1beta1", KIND), BodyError::OtherVersion),
            (json!({"apiVersion": API_VERSION, "kind": KIND}).to_string(), BodyError::NoUid),
            (String::from_utf8(review(&json!({"uid": ""}))).unwrap(), BodyError::NoUid),
            (String::from_utf8(review(&json!({}))).unwrap(), BodyError::NoUid),
        ];
        for (body, expected) in table {
            assert_eq!(decode(body.as_bytes()).err(), Some(expected), "{body}");
        }
    }

    #[test]
    fn wrong_type_is_refused_by_path_without_value() {
        let with_pod = |pod: Value| json!({"uid": "u", "operation": "CREATE", "object": pod});
        let with_env = |env: Value| with_pod(json!({"spec": {"containers": [{}, {"env": env}]}}));
        let table = [
            (
                with_env(json!([{}, {"value": 77}])),
                "request.object.spec.containers[1].env[1].value",
            ),
            (with_env(json!("sk-secret")), "request.object.spec.containers[1].env"),
            (with_pod(json!("sk-secret")), "request.object"),
            (
                with_pod(json!({"metadata": {"labels": {"a": 77}}})),
                "request.object.metadata.labels.a",
            ),
            (json!({"uid": "u", "dryRun": "sk-secret"}), "request.dryRun"),
        ];
        for (request, expected) in table {
            let Ok(Decoded::Unreadable { uid, refusal }) = decode(&review(&request)) else {
                panic!("decoded: {request}")
            };
            assert_eq!(uid, "u");
            assert_eq!(
                refusal,
                Refusal::Unreadable {
                    place: expected.to_owned()
                }
            );
            assert_eq!(refusal.status().0, 400);
        }
        assert_eq!(decode(&review(&json!({"uid": 7}))).err(), Some(BodyError::NotAdmissionReview));
    }

    #[test]
    fn request_returns_its_namespace() {
        for (request, expected) in [
            (json!({"uid": "u", "namespace": "ws-acme"}), Some("ws-acme")),
            (json!({"uid": "u"}), Some("")),
            (json!({"uid": "u", "object": 7}), None),
        ] {
            let body = review(&request);
            let decoded = decode(&body).unwrap();
            assert_eq!(decoded.request().map(Request::namespace), expected);
        }
    }
}
