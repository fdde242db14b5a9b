//! A webhook as in tutorials: `AdmissionReview<Pod>` with Kubernetes' own types, a changed copy of the pod, and
//! `json_patch::diff` of the two. It uses sqlx's pool and tracing's JSON.

use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod};
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use sqlx::PgPool;
use tracing::info;

use crate::lookup;
use crate::rules::{
    MODE_ANNOTATION, RUNTIME_LABEL, SOURCE, SOURCE_ANNOTATION, WORKSPACE_LABEL, is_removed, masks,
    required,
};

pub(crate) fn routes(pool: PgPool) -> Router {
    let routes = Router::new().route("/mutate", post(mutate));
    routes.with_state(pool)
}

async fn mutate(
    State(pool): State<PgPool>,
    body: Bytes,
) -> ([(HeaderName, &'static str); 1], String) {
    let started = Instant::now();
    let review: AdmissionReview<Pod> = serde_json::from_slice(&body).expect("a review");
    let request: AdmissionRequest<Pod> = review.try_into().expect("it has a request");
    let pod = request.object.as_ref().expect("it has a pod");
    let labels = pod.metadata.labels.as_ref().expect("it has labels");
    let workspace = &labels[WORKSPACE_LABEL];
    let id = workspace.parse().expect("an id");
    let mode = lookup(&pool, id).await;
    let mode = mode.filter(|mode| mode == "platform_managed");
    let mode = mode.expect("all are platform_managed");

    let mut changed = pod.clone();
    let runtime = labels.get(RUNTIME_LABEL).map_or("", String::as_str);
    let required = required(runtime).into_iter();
    let variable = |entry| serde_json::from_value(entry).expect("an env entry");
    let required: Vec<EnvVar> = required.map(variable).collect();
    let masks: Vec<EnvVar> = masks(runtime).into_iter().map(variable).collect();
    let spec = changed.spec.as_mut().expect("it has a spec");
    let init_containers = spec.init_containers.iter_mut().flatten();
    for container in init_containers.chain(&mut spec.containers) {
        change(container, &required, &masks);
    }
    let annotations = changed.metadata.annotations.get_or_insert_default();
    annotations.insert(MODE_ANNOTATION.to_owned(), mode.clone());
    annotations.insert(SOURCE_ANNOTATION.to_owned(), SOURCE.to_owned());

    let [before, after] = [pod, &changed].map(|pod| serde_json::to_value(pod).expect("it is JSON"));
    let patch = json_patch::diff(&before, &after);
    let patch_operations = patch.0.len();
    let mut response = AdmissionResponse::from(&request)
        .with_patch(patch)
        .expect("it is JSON");
    response.audit_annotations = [
        ("mode", mode.as_str()),
        ("reason", "override"),
        ("source", SOURCE),
        ("workspace", workspace),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    // kube serializes a patch as a list of numbers (kube-rs/kube#1781), which no API server takes.
    let patch = response.patch.take().map(|patch| STANDARD.encode(patch));
    let mut review = serde_json::to_value(response.into_review()).expect("it is JSON");
    review["response"]["patch"] = patch.into();
    let response = review.to_string();
    info!(
        uid = request.uid,
        operation = ?request.operation,
        namespace = request.namespace,
        name = request.name,
        workspace,
        mode,
        source = SOURCE,
        reason = "override",
        outcome = "patched",
        patch_operations,
        duration_ms = started.elapsed().as_secs_f64() * 1e3,
        "admission"
    );
    ([(header::CONTENT_TYPE, "application/json")], response)
}

fn change(container: &mut Container, required: &[EnvVar], masks: &[EnvVar]) {
    let is_required = |name: &str| required.iter().any(|variable| variable.name == name);
    let may_come_from_source = |name: &str| {
        let mut sources = container.env_from.iter().flatten();
        sources.any(|source| name.starts_with(source.prefix.as_deref().unwrap_or_default()))
    };
    let is_needed = |mask: &&EnvVar| may_come_from_source(&mask.name) && !is_required(&mask.name);
    let masks: Vec<EnvVar> = masks.iter().filter(is_needed).cloned().collect();
    let env = container.env.get_or_insert_default();
    env.retain(|entry| !is_removed(&entry.name) && !is_required(&entry.name));
    env.splice(0..0, required.iter().cloned().chain(masks));
}
