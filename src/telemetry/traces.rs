//! Traces: spans of each admission, sent to an OpenTelemetry collector as OTLP over HTTP. They are on where the standard
//! `OTEL_EXPORTER_OTLP_ENDPOINT` is set, and join the trace that the API server's `traceparent` names; where they are
//! off, no span is made. The standard's other variables, such as `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and
//! `OTEL_EXPORTER_OTLP_HEADERS`, are read too. Which spans there are is server/webhook.rs's business.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Bytes;
use axum::http::{HeaderMap, Request, Response};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry::Key;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use tokio::runtime::Handle;
use tracing::{Span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::{Layer, Registry};

use super::chain::chain;

/// Either of them turns traces on.
const ENDPOINTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
];
/// Longest wait for the collector's answer. Spans wait meanwhile, and no admission does.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the last spans, when the program ends.
const LAST_EXPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Traces are asked for, and the standard's variables do not say where to and how. Why not would quote them, and there
/// may be a password in an address.
#[derive(Debug, Error)]
#[error("traces cannot be sent; correct or unset the OTEL_EXPORTER_OTLP_ variables")]
pub struct TracesError;

/// Traces while they go on; dropped, it sends what still waits.
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Starts sending, if the environment says where to.
    ///
    /// # Errors
    /// [`TracesError`]
    pub fn start() -> Result<Option<Self>, TracesError> {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if !ENDPOINTS.into_iter().any(is_set) {
            return Ok(None);
        }
        // Where there are none, collectors can still be reached without TLS.
        let mut authorities = RootCertStore::empty();
        authorities.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| TracesError)?
            .with_root_certificates(authorities)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Sender {
                client: HyperClient::new(connector, EXPORT_TIMEOUT, None),
                runtime: Handle::current(),
            })
            .build()
            .map_err(|_| TracesError)?;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource())
            .build();
        Ok(Some(Self(provider)))
    }

    /// Makes this program's own spans traces. Events are the log's.
    pub fn layer(&self) -> impl Layer<Registry> + use<> {
        let own = filter_fn(|metadata| {
            metadata.is_span() && metadata.target().starts_with(env!("CARGO_CRATE_NAME"))
        });
        tracing_opentelemetry::layer()
            .with_tracer(self.0.tracer(env!("CARGO_PKG_NAME")))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_target(false)
            .with_filter(own)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // The collector may be gone; the program ends all the same.
        let _ = self.0.shutdown_with_timeout(LAST_EXPORT_TIMEOUT);
    }
}

/// What the environment says of this program, and its name if it says none.
fn resource() -> Resource {
    let said = Resource::builder().build();
    let name = said.get(&Key::from_static_str("service.name"));
    // The standard has a program that nobody named be called so.
    if name.is_some_and(|name| !name.as_str().starts_with("unknown_service")) {
        return said;
    }
    Resource::builder()
        .with_service_name(env!("CARGO_PKG_NAME"))
        .build()
}

/// Makes a span part of the trace that a request's `traceparent` names, if it names one.
pub fn join(span: &Span, headers: &HeaderMap) {
    if !span.is_disabled() {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        // A span that has begun can get no parent; this one has not.
        let _ = span.set_parent(parent);
    }
}

/// The trace that a span is part of, in hexadecimal digits; `None` where traces are off.
#[must_use]
pub fn id(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context();
    Some(context.span().span_context().trace_id().to_string())
}

/// Sends from the runtime's threads: spans are exported by a thread that has none of its own.
#[derive(Debug)]
struct Sender {
    client: HyperClient<HttpsConnector<HttpConnector>>,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let sending = self
            .runtime
            .spawn(async move { client.send_bytes(request).await });
        let sent = sending.await?;
        match &sent {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => warn!(status = answer.status().as_u16(), "traces refused"),
            Err(error) => warn!(error = chain(&**error), "traces not sent"),
        }
        sent
    }
}
