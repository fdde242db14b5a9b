//! Traces: exports spans to an OpenTelemetry collector as OTLP over HTTP. server/webhook.rs defines the spans.
//!
//! `OTEL_EXPORTER_OTLP_ENDPOINT` enables traces; without it no span is created. Spans join the trace of the API
//! server's `traceparent`. Other standard variables apply too, such as `OTEL_SERVICE_NAME` and `OTEL_TRACES_SAMPLER`.

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

/// The variables that enable traces.
const ENDPOINTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
];
/// Limit on the time to export a batch of spans. Admissions do not wait for it.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on the time to export the last spans when the process ends.
const LAST_EXPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The standard variables enable traces, but their settings are invalid. Omits the cause, which quotes them: an address
/// may hold a password.
#[derive(Debug, Error)]
#[error("traces cannot be sent; correct or unset the OTEL_EXPORTER_OTLP_ variables")]
pub struct TracesError;

/// Running traces. On drop, sends the pending spans.
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Starts exporting if the environment configures an endpoint.
    ///
    /// # Errors
    /// [`TracesError`]
    pub fn start() -> Result<Option<Self>, TracesError> {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if !ENDPOINTS.into_iter().any(is_set) {
            return Ok(None);
        }
        // Without any root certificates, collectors can still be reached over plain HTTP.
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| TracesError)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(RuntimeClient {
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

    /// Returns the layer that exports this crate's own spans. Events go to the log only.
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
        // The process exits even if the collector is unreachable.
        let _ = self.0.shutdown_with_timeout(LAST_EXPORT_TIMEOUT);
    }
}

/// Returns the resource from the environment, with the crate's name as the default service name.
fn resource() -> Resource {
    let configured = Resource::builder().build();
    let name = configured.get(&Key::from_static_str("service.name"));
    // The OpenTelemetry standard's default for a service without a name.
    if name.is_some_and(|name| !name.as_str().starts_with("unknown_service")) {
        return configured;
    }
    Resource::builder()
        .with_service_name(env!("CARGO_PKG_NAME"))
        .build()
}

/// Makes a span part of the trace in a request's `traceparent` header, if there is one.
pub fn join(span: &Span, headers: &HeaderMap) {
    if !span.is_disabled() {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        // Fails only for a span that has started; this one has not.
        let _ = span.set_parent(parent);
    }
}

/// Returns a span's trace id in hexadecimal; `None` if traces are disabled.
#[must_use]
pub fn id(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context();
    Some(context.span().span_context().trace_id().to_string())
}

/// An HTTP client that sends on the given runtime: the exporter's own thread has none.
#[derive(Debug)]
struct RuntimeClient {
    client: HyperClient<HttpsConnector<HttpConnector>>,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for RuntimeClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let task = self
            .runtime
            .spawn(async move { client.send_bytes(request).await });
        let result = task.await?;
        match &result {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => warn!(status = response.status().as_u16(), "traces refused"),
            Err(error) => warn!(error = chain(&**error), "traces not sent"),
        }
        result
    }
}
