//! Traces: the real program exports its spans over OTLP to a stand-in collector.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};

use test_support::load::{BYOK, schema};
use test_support::postgres::{Postgres, free_port};
use test_support::program::{Start, Webhook, decode_output, program, wait_for};
use test_support::{PROXY, create, pod};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
const KEY: &str = "sk-own-vendor-key-0123456789";

/// An OTLP collector that stores each export's body.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Bytes>>>);

impl Collector {
    /// Starts a collector on its own thread, which ends with the process, and returns its endpoint too.
    fn start() -> (Self, String) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        let store = async |State(Self(exports)): State<Self>, body: Bytes| {
            exports.lock().unwrap().push(body);
        };
        let routes = Router::new()
            .route("/v1/traces", post(store))
            .with_state(collector.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, routes).await.unwrap();
            });
        });
        (collector, endpoint)
    }

    /// Returns the spans exported so far, each with its resource's attributes.
    fn spans(&self) -> Vec<(BTreeMap<String, String>, Span)> {
        let bodies = self.0.lock().unwrap();
        let exports = bodies
            .iter()
            .map(|body| ExportTraceServiceRequest::decode(body.clone()).unwrap());
        exports
            .flat_map(|export| export.resource_spans)
            .flat_map(|of_resource| {
                let resource = attributes(&of_resource.resource.unwrap().attributes);
                let scopes = of_resource.scope_spans.into_iter();
                let spans = scopes.flat_map(|scope| scope.spans);
                spans.map(move |span| (resource.clone(), span))
            })
            .collect()
    }

    /// Reports whether no export has this secret.
    fn is_free_of(&self, secret: &str) -> bool {
        let bodies = self.0.lock().unwrap();
        let mut windows = bodies.iter().flat_map(|body| body.windows(secret.len()));
        !windows.any(|window| window == secret.as_bytes())
    }
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref()?.value.as_ref()? {
        Attribute::StringValue(text) => Some(text.clone()),
        _ => None,
    };
    let pairs = attributes
        .iter()
        .filter_map(|one| Some((one.key.clone(), text(&one.value)?)));
    pairs.collect()
}

fn hexadecimal(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn start(database_url: &str, environment: &[(&str, &str)]) -> Webhook {
    Start {
        policy: PROXY,
        database_url,
        environment,
        ..Start::default()
    }
    .start()
}

fn review() -> Value {
    create(&pod(BYOK, &json!([{"name": "OPENAI_API_KEY", "value": KEY}])))
}

/// Sends a review with a `traceparent` header, as a tracing API server does.
fn send(webhook: &Webhook, trace: &str, sampled: &str) {
    let url = format!("https://localhost:{}/mutate?timeout=10s", webhook.address.port());
    let response = webhook
        .client
        .post(&url)
        .header("content-type", "application/json")
        .header("traceparent", format!("00-{trace}-{PARENT}-{sampled}"))
        .send(review().to_string())
        .unwrap();
    assert_eq!(response.status(), 200);
}

#[test]
fn admission_span_joins_the_api_servers_trace() {
    let postgres = Postgres::with(&schema());
    let (collector, endpoint) = Collector::start();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let webhook = start(&postgres.url(), &environment);
    // Unsampled traces are not exported.
    send(&webhook, &TRACE.replace('0', "1"), "00");
    send(&webhook, TRACE, "01");
    let spans = wait_for("the collector has the admission", || {
        let spans = collector.spans();
        let mut names = spans.iter().map(|(_, span)| span.name.as_str());
        names.any(|name| name == "admission").then_some(spans)
    });

    let by_id: BTreeMap<String, &str> = spans
        .iter()
        .map(|(_, span)| (hexadecimal(&span.span_id), span.name.as_str()))
        .collect();
    let mut tree: Vec<(&str, String)> = Vec::new();
    for (resource, span) in &spans {
        assert_eq!(hexadecimal(&span.trace_id), TRACE, "{}", span.name);
        assert_eq!(resource["service.name"], "llm-billing-webhook");
        let parent = hexadecimal(&span.parent_span_id);
        let parent = by_id.get(&parent).map_or(parent, |&name| name.to_owned());
        tree.push((&span.name, parent));
    }
    tree.sort();
    let child = |name| (name, "admission".to_owned());
    let expected = [
        ("admission", PARENT.to_owned()),
        child("decode"),
        child("encode"),
        child("lookup"),
        child("plan"),
    ];
    assert_eq!(tree, expected);

    let (_, admission) = spans
        .iter()
        .find(|(_, span)| span.name == "admission")
        .unwrap();
    let expected = [
        ("mode", "byok"),
        ("namespace", "ws-acme"),
        ("outcome", "patched"),
        ("reason", "override"),
        ("uid", "00000000-0000-0000-0000-0000000000aa"),
        ("webhook", "mutate"),
        ("workspace", BYOK),
    ];
    let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut exported = attributes(&admission.attributes);
    exported.retain(|key, _| !key.starts_with("otel.") && !key.starts_with("code."));
    assert_eq!(exported, BTreeMap::from(expected));
    assert!(collector.is_free_of(KEY));

    let line = webhook.wait_for_log(&format!("\"trace_id\":\"{TRACE}\""));
    assert!(line.contains("\"message\":\"admission\""), "{line}");
}

#[test]
fn traces_are_off_without_an_endpoint() {
    let postgres = Postgres::with(&schema());
    let webhook = start(&postgres.url(), &[]);
    send(&webhook, TRACE, "01");
    let line = webhook.wait_for_log("\"message\":\"admission\"");
    assert!(!line.contains("trace_id"), "{line}");
}

#[test]
fn unreachable_collector_delays_neither_admission_nor_exit() {
    let postgres = Postgres::with(&schema());
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str())];
    let mut webhook = start(&postgres.url(), &environment);
    for _ in 0..20 {
        send(&webhook, TRACE, "01");
    }
    webhook.signal("TERM");
    assert!(webhook.wait().success());
    webhook.wait_for_log("\"traces not sent\"");
}

#[test]
fn environment_overrides_the_service_name() {
    let postgres = Postgres::with(&schema());
    for (names, expected) in [
        (vec![("OTEL_SERVICE_NAME", "own")], "own"),
        (vec![("OTEL_RESOURCE_ATTRIBUTES", "service.name=other")], "other"),
        (vec![("OTEL_SERVICE_NAME", "")], "llm-billing-webhook"),
    ] {
        let (collector, endpoint) = Collector::start();
        let mut environment = names;
        environment.push(("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""));
        environment.push(("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()));
        environment.push(("OTEL_BSP_SCHEDULE_DELAY", "100"));
        let webhook = start(&postgres.url(), &environment);
        send(&webhook, TRACE, "01");
        let (resource, _) = wait_for("the collector has a span", || collector.spans().pop());
        assert_eq!(resource["service.name"], expected);
    }
}

#[test]
fn serve_exits_when_the_endpoint_is_invalid() {
    for endpoint in ["not a url", "http://user:sk-secret@collector:4318\n"] {
        let mut command = program(&["serve", "--dev"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        let (code, _, stderr) = decode_output(&command.output().unwrap());
        let expected =
            "error: traces cannot be sent; correct or unset the OTEL_EXPORTER_OTLP_ variables\n";
        assert_eq!((code, stderr.as_str()), (2, expected));
    }
}
