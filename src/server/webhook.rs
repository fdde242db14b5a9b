//! `/mutate` and `/validate`: HTTP around the core. Reads the body, executes the lookup, responds, logs and counts;
//! every decision is core/decision.rs's.

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
use crate::database::{Database, LookupError};
use crate::metrics::Metrics;
use crate::server::readiness::Readiness;
use crate::telemetry::traces;

/// The API server sends a body at once; one that takes longer is nobody's.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on the time to read the rest of a refused body.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// A body of so many bytes is read at once: nearly every pod fits. A larger one waits for its shares of the
/// memory for large bodies, of so many bytes each.
const SMALL_BODY: usize = 64 * 1024;
/// The shares that there are: 4 MiB. A body that is larger than all of them has them to itself.
const SHARES: u32 = 64;

/// The least time-out of an API server: `timeoutSeconds` is a whole number from 1 to 30. A shorter one would let a client
/// make the database look as if it hung.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What every request shares. No `Debug`: the policy may hold a token.
pub struct App {
    /// What the operator decided.
    pub policy: Policy,
    /// Where the modes are.
    pub database: Arc<Database>,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether there should be traffic.
    pub readiness: Readiness,
    /// How long a body may be, and how many there may be.
    pub bodies: Bodies,
}

/// The bound on the memory that requests' bodies take.
#[derive(Debug)]
pub struct Bodies {
    largest: usize,
    shares: Semaphore,
}

impl Bodies {
    /// For bodies of so many bytes at most.
    #[must_use]
    pub const fn up_to(largest: usize) -> Self {
        Self {
            largest,
            shares: Semaphore::const_new(SHARES as usize),
        }
    }
}

/// The routes.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route(
            "/mutate",
            post(async |state, request| serve(Webhook::Mutate, state, request).await),
        )
        .route(
            "/validate",
            post(async |state, request| serve(Webhook::Validate, state, request).await),
        )
        .method_not_allowed_fallback(async |State(app): State<Arc<App>>, request: HttpRequest| {
            let method = request.method().clone();
            discard(request.into_body());
            app.closed_when_draining(refused(
                StatusCode::METHOD_NOT_ALLOWED,
                &format!("{method} is not supported here; use POST"),
            ))
        })
        .fallback(async |State(app): State<Arc<App>>, request: HttpRequest| {
            discard(request.into_body());
            app.closed_when_draining(refused(
                StatusCode::NOT_FOUND,
                "there is nothing here; use POST /mutate or POST /validate",
            ))
        })
        .with_state(app)
}

fn refused(status: StatusCode, sentence: &str) -> Response {
    (status, format!("{sentence}\n")).into_response()
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
    app.closed_when_draining(response)
}

async fn respond(webhook: Webhook, app: &App, request: HttpRequest) -> Response {
    let arrived = Instant::now();
    let _in_flight = app.metrics.in_flight();
    let (head, mut body) = request.into_parts();
    let timeout = Query::<TimeoutQuery>::try_from_uri(&head.uri)
        .ok()
        .and_then(|Query(query)| query.timeout());
    let received = match app.bodies.read(&head.headers, &mut body).await {
        Ok(received) => received,
        Err((status, sentence)) => {
            discard(body);
            return app.bad_request(webhook, arrived, status, &sentence);
        }
    };
    let decoded = match info_span!("decode").in_scope(|| decode(&received.body)) {
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
    let limit = timeout.map(|timeout| lookup_limit(timeout, arrived));
    let decision = app.decide(webhook, &decoded, limit).await;
    let response =
        info_span!("encode").in_scope(|| AdmissionResponse::new(decoded.uid(), &decision));
    app.record(
        webhook,
        &decoded,
        &decision,
        response.patch_operations,
        arrived.elapsed(),
    );
    ([(header::CONTENT_TYPE, "application/json")], response.json).into_response()
}

/// To the microsecond; what is finer would be noise.
fn milliseconds(time: Duration) -> f64 {
    f64::from(u32::try_from(time.as_micros()).unwrap_or(u32::MAX)) / 1000.0
}

/// The query that API servers add to the webhook's URL: how long they wait for the response.
#[derive(serde::Deserialize)]
struct TimeoutQuery {
    timeout: Option<String>,
}

impl TimeoutQuery {
    /// Returns the time-out; API servers wait for at least a second.
    fn timeout(&self) -> Option<Duration> {
        let timeout = humantime::parse_duration(self.timeout.as_deref()?).ok()?;
        Some(timeout.max(MIN_TIMEOUT))
    }
}

/// Returns the time left for the lookup, so that the response arrives before the API server's time-out.
fn lookup_limit(timeout: Duration, arrived: Instant) -> Duration {
    let reserve = (timeout / 5).min(Duration::from_millis(500));
    timeout
        .saturating_sub(reserve)
        .saturating_sub(arrived.elapsed())
}

/// A body, and its share of the memory for large ones.
struct Received<'a> {
    body: Bytes,
    _share: Option<SemaphorePermit<'a>>,
}

impl Bodies {
    async fn read(
        &self,
        headers: &HeaderMap,
        body: &mut Body,
    ) -> Result<Received<'_>, (StatusCode, String)> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let media_type = header(header::CONTENT_TYPE)
            .and_then(|value| value.split(';').next())
            .unwrap_or_default();
        if !media_type.trim().eq_ignore_ascii_case("application/json") {
            let sentence = "the content type is not supported; send application/json".to_owned();
            return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, sentence));
        }
        if header(header::CONTENT_ENCODING)
            .is_some_and(|encoding| !encoding.trim().eq_ignore_ascii_case("identity"))
        {
            let sentence = "compressed bodies are not supported; send the JSON as it is".to_owned();
            return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, sentence));
        }
        let largest = self.largest;
        let too_large = || {
            (
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is larger than {largest} bytes; see --max-body-bytes"),
            )
        };
        let length = header(header::CONTENT_LENGTH).map_or(Ok(largest), str::parse::<usize>);
        let length = length.unwrap_or(usize::MAX);
        if length > largest {
            return Err(too_large());
        }
        let share = self.share(length).await?;
        match timeout(BODY_TIMEOUT, gathered(Limited::new(body, length))).await {
            Ok(Ok(body)) => Ok(Received {
                body,
                _share: share,
            }),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err((
                StatusCode::BAD_REQUEST,
                "the body broke off; send it again".to_owned(),
            )),
            Err(_) => Err((
                StatusCode::REQUEST_TIMEOUT,
                "the body took too long; send it again".to_owned(),
            )),
        }
    }

    /// Waits for a large body's share of the memory; a small one needs none.
    async fn share(
        &self,
        length: usize,
    ) -> Result<Option<SemaphorePermit<'_>>, (StatusCode, String)> {
        if length <= SMALL_BODY {
            return Ok(None);
        }
        let shares = u32::try_from(length.div_ceil(SMALL_BODY)).unwrap_or(SHARES);
        let shares = shares.min(SHARES);
        match timeout(BODY_TIMEOUT, self.shares.acquire_many(shares)).await {
            Ok(Ok(share)) => Ok(Some(share)),
            _ => Err((
                StatusCode::SERVICE_UNAVAILABLE,
                "there are too many large bodies; send it again".to_owned(),
            )),
        }
    }
}

/// All of a body. What comes in one piece, as small bodies do, stays where it is; the pieces of a larger one are let go
/// one by one, so that the connection reads the next one into the same place.
async fn gathered(mut body: Limited<&mut Body>) -> Result<Bytes, axum::BoxError> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame?.into_data() else {
            continue;
        };
        if all.is_empty() {
            if body.is_end_stream() {
                return Ok(piece);
            }
            let rest = usize::try_from(body.size_hint().lower()).unwrap_or_default();
            all.reserve(piece.len().saturating_add(rest));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all.into())
}

/// Reads the rest of a refused body for a while and drops it. A socket that is closed with unread bytes resets the
/// connection, and a client that is still sending would miss the response (RFC 9112, section 9.6).
fn discard(mut body: Body) {
    if !body.is_end_stream() {
        let rest = async move { while let Some(Ok(_)) = body.frame().await {} };
        tokio::spawn(timeout(DISCARD_TIMEOUT, rest));
    }
}

impl App {
    /// Asks the client to open no more requests on a connection that is about to go: then none of them is lost.
    fn closed_when_draining(&self, mut response: Response) -> Response {
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
        let looked_up = self.database.lookup(parameters, limit).await;
        let result = match &looked_up {
            Ok(LookupOutcome::NoRow) => "not_found",
            Ok(_) => "found",
            Err(error) => error.kind(),
        };
        self.metrics.lookup(result, started.elapsed());
        match looked_up {
            Ok(outcome) => {
                self.readiness.set_database_answered();
                outcome
            }
            Err(refused @ LookupError::Refused(_)) => {
                error!(uid, error = %refused, "lookup refused; correct the policy's query, the schema or the role's permissions");
                LookupOutcome::Failed
            }
            Err(failed) => {
                warn!(uid, error = %failed, "lookup failed");
                LookupOutcome::Failed
            }
        }
    }

    /// Writes one log line and one count for each admission, without any value of an env entry.
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
        sentence: &str,
    ) -> Response {
        let took = arrived.elapsed();
        warn!(
            webhook = webhook.as_str(),
            status = status.as_u16(),
            error = sentence,
            "bad request"
        );
        self.metrics.bad_request(webhook, took);
        refused(status, sentence)
    }
}

/// Length of a name in the log, at most. What a request brings may be of any length until the API server has validated
/// it.
const MAX_NAME_BYTES: usize = 253;
/// Length of the summary of changes in the log, at most.
const MAX_CHANGED_BYTES: usize = 1024;

/// Returns a name as it is logged, empty if there is none.
fn name<'a>(text: Option<&'a Text<'_>>) -> &'a str {
    text.map_or("", |text| truncate(text.as_str(), MAX_NAME_BYTES))
}
