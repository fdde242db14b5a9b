//! A careful webhook on ordinary parts: serde derives for the relevant fields, borrowed from the body, sqlx's pool and
//! tracing's JSON. The env entries to add are rendered at the start.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use sqlx::PgPool;
use tracing::info;

use crate::lookup;
use crate::rules::{
    MODE_ANNOTATION, RUNTIME_LABEL, SOURCE, SOURCE_ANNOTATION, WORKSPACE_LABEL, is_removed, masks,
    required,
};

struct Careful {
    pool: PgPool,
    claude_code: Runtime,
    others: Runtime,
}

/// The entries that a container of one runtime must have, and those that hide what envFrom could set.
struct Runtime {
    required: Vec<Variable>,
    masks: Vec<Variable>,
}

struct Variable {
    name: String,
    entry: Box<RawValue>,
}

#[derive(Deserialize)]
struct Review<'a> {
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    operation: Cow<'a, str>,
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    object: Pod<'a>,
}

#[derive(Deserialize)]
struct Pod<'a> {
    #[serde(borrow)]
    metadata: Metadata<'a>,
    #[serde(borrow)]
    spec: Spec<'a>,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    labels: BTreeMap<&'a str, Cow<'a, str>>,
    annotations: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec<'a> {
    #[serde(borrow, default)]
    init_containers: Vec<Container<'a>>,
    #[serde(borrow)]
    containers: Vec<Container<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container<'a> {
    #[serde(borrow)]
    env: Option<Vec<Entry<'a>>>,
    #[serde(borrow, default)]
    env_from: Vec<EnvFrom<'a>>,
}

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

#[derive(Deserialize)]
struct EnvFrom<'a> {
    #[serde(borrow, default)]
    prefix: Cow<'a, str>,
}

#[derive(Serialize)]
struct Operation<'a> {
    op: &'static str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Added<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Added<'a> {
    Entry(&'a RawValue),
    Entries(Vec<&'a RawValue>),
    Text(&'a str),
    Annotations(BTreeMap<&'a str, &'a str>),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReviewResponse<'a> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    audit_annotations: BTreeMap<&'a str, &'a str>,
    patch_type: &'static str,
    patch: String,
}

pub(crate) fn routes(pool: PgPool) -> Router {
    let variable = |entry: &serde_json::Value| Variable {
        name: entry["name"].as_str().expect("it has a name").to_owned(),
        entry: to_raw_value(entry).expect("it is JSON"),
    };
    let variables = |entries: Vec<_>| entries.iter().map(variable).collect();
    let runtime = |runtime| Runtime {
        required: variables(required(runtime)),
        masks: variables(masks(runtime)),
    };
    let careful = Careful {
        pool,
        claude_code: runtime("claude-code"),
        others: runtime(""),
    };
    let routes = Router::new().route("/mutate", post(mutate));
    routes.with_state(Arc::new(careful))
}

async fn mutate(
    State(careful): State<Arc<Careful>>,
    body: Bytes,
) -> ([(HeaderName, &'static str); 1], String) {
    let started = Instant::now();
    let Review { request } = serde_json::from_slice(&body).expect("a review");
    let labels = &request.object.metadata.labels;
    let workspace = &labels[WORKSPACE_LABEL];
    let id = workspace.parse().expect("an id");
    let mode = lookup(&careful.pool, id).await;
    let mode = mode.filter(|mode| mode == "platform_managed");
    let mode = mode.expect("all are platform_managed");

    let mut operations = Vec::new();
    let runtime = match labels.get(RUNTIME_LABEL).map(Cow::as_ref) {
        Some("claude-code") => &careful.claude_code,
        _ => &careful.others,
    };
    let spec = &request.object.spec;
    for (list, containers) in [
        ("initContainers", &spec.init_containers),
        ("containers", &spec.containers),
    ] {
        for (index, container) in containers.iter().enumerate() {
            let path = format!("/spec/{list}/{index}/env");
            plan(container, &path, runtime, &mut operations);
        }
    }
    let annotations = [
        (MODE_ANNOTATION, mode.as_str()),
        (SOURCE_ANNOTATION, SOURCE),
    ];
    let add = |path: &str, value| Operation {
        op: "add",
        path: path.to_owned(),
        value: Some(value),
    };
    if request.object.metadata.annotations.is_none() {
        let all = Added::Annotations(annotations.into());
        operations.push(add("/metadata/annotations", all));
    } else {
        operations.extend(annotations.map(|(key, value)| {
            let path = format!("/metadata/annotations/{}", key.replace('/', "~1"));
            add(&path, Added::Text(value))
        }));
    }

    let patch = serde_json::to_vec(&operations).expect("it is JSON");
    let response = ReviewResponse {
        api_version: "admission.k8s.io/v1",
        kind: "AdmissionReview",
        response: Response {
            uid: &request.uid,
            allowed: true,
            audit_annotations: [
                ("mode", mode.as_str()),
                ("reason", "override"),
                ("source", SOURCE),
                ("workspace", workspace.as_ref()),
            ]
            .into(),
            patch_type: "JSONPatch",
            patch: STANDARD.encode(patch),
        },
    };
    let response = serde_json::to_string(&response).expect("it is JSON");
    info!(
        uid = request.uid.as_ref(),
        operation = request.operation.as_ref(),
        namespace = request.namespace.as_ref(),
        name = request.name.as_deref(),
        workspace = workspace.as_ref(),
        mode,
        source = SOURCE,
        reason = "override",
        outcome = "patched",
        patch_operations = operations.len(),
        duration_ms = started.elapsed().as_secs_f64() * 1e3,
        "admission"
    );
    ([(header::CONTENT_TYPE, "application/json")], response)
}

fn plan<'a>(
    container: &Container<'_>,
    path: &str,
    Runtime { required, masks }: &'a Runtime,
    operations: &mut Vec<Operation<'a>>,
) {
    let may_come_from_source = |name: &str| {
        let mut sources = container.env_from.iter();
        sources.any(|source| name.starts_with(source.prefix.as_ref()))
            && required.iter().all(|variable| variable.name != name)
    };
    let added: Vec<&RawValue> = required
        .iter()
        .chain(masks.iter().filter(|mask| may_come_from_source(&mask.name)))
        .map(|variable| &*variable.entry)
        .collect();
    let Some(entries) = &container.env else {
        operations.push(Operation {
            op: "add",
            path: path.to_owned(),
            value: Some(Added::Entries(added)),
        });
        return;
    };
    for (index, entry) in entries.iter().enumerate().rev() {
        if is_removed(&entry.name) || required.iter().any(|variable| variable.name == entry.name) {
            operations.push(Operation {
                op: "remove",
                path: format!("{path}/{index}"),
                value: None,
            });
        }
    }
    operations.extend(
        added
            .into_iter()
            .enumerate()
            .map(|(index, entry)| Operation {
                op: "add",
                path: format!("{path}/{index}"),
                value: Some(Added::Entry(entry)),
            }),
    );
}
