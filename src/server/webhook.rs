//! `/mutate` and `/validate`: reads the body, executes the lookup, responds, logs and counts. The decisions are made in
//! core/decision.rs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Query, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tracing::{Instrument, Span, error, field, info, info_span, warn};

use crate::core::admission::{AdmissionTarget, BodyError, Decoded, Request, decode};
use crate::core::decision::{Decision, Labels, Step, Webhook, begin};
use crate::core::identity::ParameterValue;
use crate::core::plan::Plan;
use crate::core::pod::Text;
use crate::core::policy::Policy;
use crate::core::refusal::Refusal;
use crate::core::resolution::LookupOutcome;
use crate::core::response::{Response as AdmissionResponse, recorded_workspace, truncate};
use crate::database::Database;
use crate::metrics::Metrics;
use crate::server::health::Health;
use crate::server::readiness::Readiness;
use crate::telemetry::traces;

/// Limit on the time to receive a body. The API server sends it in one piece.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on the time to read the rest of a rejected body.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// Limit on the size of a body that needs no permit; nearly every pod fits. A larger body acquires one permit for each
/// block of this size.
const MAX_SMALL_BODY_BYTES: usize = 64 * 1024;
/// Limit on the permits held by large bodies, 4 MiB in all. A body larger than that acquires all of them.
const MAX_LARGE_BODY_PERMITS: u32 = 64;

/// The API server's shortest time-out: `timeoutSeconds` is an integer from 1 to 30. Lookups that
/// fail at a shorter one would mark a healthy database as degraded.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The state shared by all requests. No `Debug`: the policy may hold a token.
pub struct App {
    /// The operator's policy.
    pub policy: Policy,
    /// The database with the billing modes.
    pub database: Arc<Database>,
    /// The metrics of this server.
    pub metrics: Metrics,
    /// The readiness state.
    pub readiness: Readiness,
    /// Limits on request bodies.
    pub body_limits: BodyLimits,
}

/// Limits on the size of a request body and on the memory for all large bodies.
#[derive(Debug)]
pub struct BodyLimits {
    max_bytes: usize,
    large_bodies: Semaphore,
}

impl BodyLimits {
    /// Accepts bodies of up to `max_bytes`.
    #[must_use]
    pub const fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            large_bodies: Semaphore::const_new(MAX_LARGE_BODY_PERMITS as usize),
        }
    }
}

/// Returns the routes.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/mutate", post(async |state, request| serve(Webhook::Mutate, state, request).await))
        .route(
            "/validate",
            post(async |state, request| serve(Webhook::Validate, state, request).await),
        )
        .method_not_allowed_fallback(async |State(app): State<Arc<App>>, request: HttpRequest| {
            let method = request.method().clone();
            discard(request.into_body());
            app.close_when_draining(error_response(
                StatusCode::METHOD_NOT_ALLOWED,
                &format!("{method} is not supported here; use POST"),
            ))
        })
        .fallback(async |State(app): State<Arc<App>>, request: HttpRequest| {
            discard(request.into_body());
            app.close_when_draining(error_response(
                StatusCode::NOT_FOUND,
                "not found; use POST /mutate or POST /validate",
            ))
        })
        .with_state(app)
}

fn error_response(status: StatusCode, message: &str) -> Response {
    (status, format!("{message}\n")).into_response()
}

async fn serve(webhook: Webhook, State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    let span = info_span!(
        "admission",
        otel.kind = "server",
        webhook = webhook.as_str(),
        uid = field::Empty,
        namespace = field::Empty,
        workspace = field::Empty,
        mode = field::Empty,
        reason = field::Empty,
        outcome = field::Empty,
    );
    traces::join(&span, request.headers());
    let response = respond(webhook, &app, request).instrument(span).await;
    app.close_when_draining(response)
}

async fn respond(webhook: Webhook, app: &App, request: HttpRequest) -> Response {
    let arrived = Instant::now();
    let _in_flight = app.metrics.in_flight();
    let (head, mut body) = request.into_parts();
    let timeout = Query::<TimeoutQuery>::try_from_uri(&head.uri)
        .ok()
        .and_then(|Query(query)| query.timeout());
    let received = match app.body_limits.read(&head.headers, &mut body).await {
        Ok(received) => received,
        Err((status, message)) => {
            discard(body);
            return app.bad_request(webhook, arrived, status, &message);
        }
    };
    let decoded = match info_span!("decode").in_scope(|| decode(&received.bytes)) {
        Ok(decoded) => decoded,
        Err(error) => {
            let status = match error {
                BodyError::NotJson { .. } => StatusCode::BAD_REQUEST,
                BodyError::NotAdmissionReview | BodyError::OtherVersion | BodyError::NoUid => {
                    StatusCode::UNPROCESSABLE_ENTITY
                }
            };
            return app.bad_request(webhook, arrived, status, &error.to_string());
        }
    };
    let limit = timeout.map(|timeout| lookup_limit(timeout, arrived.elapsed()));
    let decision = app.decide(webhook, &decoded, limit).await;
    let response =
        info_span!("encode").in_scope(|| AdmissionResponse::new(decoded.uid(), &decision));
    app.record(webhook, &decoded, &decision, response.patch_operations, arrived.elapsed());
    ([(header::CONTENT_TYPE, "application/json")], response.json).into_response()
}

/// Converts to milliseconds, with microsecond precision.
fn milliseconds(time: Duration) -> f64 {
    f64::from(u32::try_from(time.as_micros()).unwrap_or(u32::MAX)) / 1000.0
}

/// The query that API servers add to the webhook's URL: the time they wait for the response.
#[derive(serde::Deserialize)]
struct TimeoutQuery {
    timeout: Option<String>,
}

impl TimeoutQuery {
    /// Returns the time-out, at least [`MIN_TIMEOUT`].
    fn timeout(&self) -> Option<Duration> {
        let timeout = humantime::parse_duration(self.timeout.as_deref()?).ok()?;
        Some(timeout.max(MIN_TIMEOUT))
    }
}

/// Time that a response may take after its lookup: a fifth of the API server's time-out, and no more than this.
const MAX_RESPONSE_RESERVE: Duration = Duration::from_millis(500);

/// Returns the time left for the lookup if the response is to arrive before the API server's time-out.
fn lookup_limit(timeout: Duration, elapsed: Duration) -> Duration {
    let reserve = (timeout / 5).min(MAX_RESPONSE_RESERVE);
    timeout.saturating_sub(reserve).saturating_sub(elapsed)
}

/// A request body, with its permit if it is large.
struct ReceivedBody<'a> {
    bytes: Bytes,
    _permit: Option<SemaphorePermit<'a>>,
}

impl BodyLimits {
    async fn read(
        &self,
        headers: &HeaderMap,
        body: &mut Body,
    ) -> Result<ReceivedBody<'_>, (StatusCode, String)> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let media_type = header(header::CONTENT_TYPE)
            .and_then(|value| value.split(';').next())
            .unwrap_or_default();
        if !media_type.trim().eq_ignore_ascii_case("application/json") {
            let message = "the content type is not supported; send application/json".to_owned();
            return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        if header(header::CONTENT_ENCODING)
            .is_some_and(|encoding| !encoding.trim().eq_ignore_ascii_case("identity"))
        {
            let message = "compressed bodies are not supported; send the JSON as it is".to_owned();
            return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let max_bytes = self.max_bytes;
        let too_large = || {
            (
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is larger than {max_bytes} bytes; see --max-body-bytes"),
            )
        };
        let length = header(header::CONTENT_LENGTH).map_or(Ok(max_bytes), str::parse::<usize>);
        let length = length.unwrap_or(usize::MAX);
        if length > max_bytes {
            return Err(too_large());
        }
        let permit = self.acquire(length).await?;
        match timeout(BODY_TIMEOUT, collect(Limited::new(body, length))).await {
            Ok(Ok(bytes)) => Ok(ReceivedBody {
                bytes,
                _permit: permit,
            }),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => {
                Err((StatusCode::BAD_REQUEST, "the body ended early; send it again".to_owned()))
            }
            Err(_) => Err((
                StatusCode::REQUEST_TIMEOUT,
                "the body took too long; send it again".to_owned(),
            )),
        }
    }

    /// Waits for a large body's permit; a small body needs none.
    async fn acquire(
        &self,
        length: usize,
    ) -> Result<Option<SemaphorePermit<'_>>, (StatusCode, String)> {
        if length <= MAX_SMALL_BODY_BYTES {
            return Ok(None);
        }
        let count = u32::try_from(length.div_ceil(MAX_SMALL_BODY_BYTES))
            .unwrap_or(MAX_LARGE_BODY_PERMITS)
            .min(MAX_LARGE_BODY_PERMITS);
        match timeout(BODY_TIMEOUT, self.large_bodies.acquire_many(count)).await {
            Ok(Ok(permit)) => Ok(Some(permit)),
            _ => Err((
                StatusCode::SERVICE_UNAVAILABLE,
                "there are too many large bodies; send it again".to_owned(),
            )),
        }
    }
}

/// Collects a body. A single frame, as of a small body, is returned without a copy. Further frames are copied and
/// dropped one by one, so that the connection reuses its read buffer.
async fn collect(mut body: Limited<&mut Body>) -> Result<Bytes, axum::BoxError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if bytes.is_empty() {
            if body.is_end_stream() {
                return Ok(data);
            }
            let rest = usize::try_from(body.size_hint().lower()).unwrap_or_default();
            bytes.reserve(data.len().saturating_add(rest));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
}

/// Reads and drops the rest of a rejected body in the background. Closing a socket with unread bytes resets the
/// connection, and a client that is still sending would miss the response (RFC 9112, section 9.6).
fn discard(mut body: Body) {
    if !body.is_end_stream() {
        let rest = async move { while let Some(Ok(_)) = body.frame().await {} };
        tokio::spawn(timeout(DISCARD_TIMEOUT, rest));
    }
}

impl Health for App {
    fn not_ready_reason(&self) -> Option<&'static str> {
        self.readiness.not_ready_reason()
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.encode(self.database.connections())
    }
}

impl App {
    /// Asks the client to close the connection while the server drains, so that no further request on it fails.
    fn close_when_draining(&self, mut response: Response) -> Response {
        if self.readiness.is_draining() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    async fn decide<'a>(
        &'a self,
        webhook: Webhook,
        review: &'a Decoded<'a>,
        limit: Option<Duration>,
    ) -> Decision<'a> {
        match begin(&self.policy, webhook, review) {
            Step::Done(decision) => decision,
            Step::Lookup(parameters, pending) => {
                let lookup = self.look_up(review.uid(), parameters, limit);
                let outcome = lookup.instrument(info_span!("lookup")).await;
                info_span!("plan").in_scope(|| pending.finish(&outcome))
            }
        }
    }

    async fn look_up(
        &self,
        uid: &str,
        parameters: Vec<ParameterValue>,
        limit: Option<Duration>,
    ) -> LookupOutcome {
        let uid = truncate(uid, MAX_NAME_BYTES);
        let started = Instant::now();
        let result = self.database.lookup(parameters, limit).await;
        let label = match &result {
            Ok(LookupOutcome::NoRow) => "not_found",
            Ok(_) => "found",
            Err(error) => error.kind(),
        };
        self.metrics.lookup(label, started.elapsed());
        match result {
            Ok(outcome) => {
                self.readiness.set_database_answered();
                outcome
            }
            Err(error) if error.is_refused() => {
                error!(uid, %error, "lookup refused; correct the policy's query, the schema or the role's permissions");
                LookupOutcome::Failed
            }
            Err(error) => {
                warn!(uid, %error, "lookup failed");
                LookupOutcome::Failed
            }
        }
    }

    /// Logs and counts an admission, without any value of an env entry.
    fn record(
        &self,
        webhook: Webhook,
        review: &Decoded<'_>,
        decision: &Decision<'_>,
        patch_operations: usize,
        took: Duration,
    ) {
        let request = review.request();
        let Labels {
            mode,
            source,
            reason,
            outcome,
        } = decision.labels();
        let workspace = recorded_workspace(decision);
        let operation = request.map_or("", |request| request.operation.as_str());
        let metadata = request.and_then(|request| request.object.as_ref()?.metadata.as_ref());
        let uid = truncate(review.uid(), MAX_NAME_BYTES);
        let namespace = name(request.and_then(|request| request.namespace.as_ref()));
        let changed = decision.plan.as_ref().map(Plan::changed);
        let span = Span::current();
        span.record("uid", uid)
            .record("namespace", namespace)
            .record("workspace", workspace)
            .record("mode", mode)
            .record("reason", reason)
            .record("outcome", outcome);
        info!(
            uid,
            trace_id = traces::id(&span),
            webhook = webhook.as_str(),
            operation = truncate(operation, MAX_NAME_BYTES),
            namespace,
            name = name(request.and_then(|request| request.name.as_ref())),
            generate_name = name(metadata.and_then(|metadata| metadata.generate_name.as_ref())),
            dry_run = request
                .and_then(|request| request.dry_run)
                .unwrap_or_default(),
            workspace,
            mode,
            source,
            reason,
            outcome,
            code = decision.outcome.refusal().map_or("", Refusal::code),
            changed = truncate(changed.as_deref().unwrap_or_default(), MAX_CHANGED_BYTES),
            patch_operations,
            duration_ms = milliseconds(took),
            "admission"
        );
        let target = request.map_or(AdmissionTarget::NotApplicable, Request::target);
        self.metrics.admission(webhook, target, decision, took);
    }

    fn bad_request(
        &self,
        webhook: Webhook,
        arrived: Instant,
        status: StatusCode,
        message: &str,
    ) -> Response {
        let took = arrived.elapsed();
        warn!(webhook = webhook.as_str(), status = status.as_u16(), error = message, "bad request");
        self.metrics.bad_request(webhook, took);
        error_response(status, message)
    }
}

/// Limit on the length of a logged name. Mutating webhooks run before validation, so a request's names may be of any
/// length.
const MAX_NAME_BYTES: usize = 253;
/// Limit on the length of the logged summary of changes.
const MAX_CHANGED_BYTES: usize = 1024;

/// Returns a name for the log, empty if there is none.
fn name<'a>(text: Option<&'a Text<'_>>) -> &'a str {
    text.map_or("", |text| truncate(text.as_str(), MAX_NAME_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_limit_leaves_time_for_the_response() {
        for (timeout, elapsed, limit) in [
            (1_000, 0, 800),
            (2_000, 0, 1_600),
            (10_000, 0, 9_500),
            (10_000, 3_000, 6_500),
            (1_000, 900, 0),
        ] {
            let [timeout, elapsed, limit] = [timeout, elapsed, limit].map(Duration::from_millis);
            assert_eq!(lookup_limit(timeout, elapsed), limit, "{timeout:?} {elapsed:?}");
        }
    }
}
