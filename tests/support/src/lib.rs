//! Support that the test files share: fixtures, pods, reviews, and the real programs and servers.

#![expect(
    clippy::expect_used,
    clippy::print_stderr,
    clippy::unwrap_used,
    missing_docs,
    reason = "a failed expectation fails the test"
)]

pub mod api_server;
pub mod chart;
pub mod control_plane;
pub mod converge;
pub mod fuzz;
pub mod haproxy;
pub mod in_process;
pub mod load;
pub mod postgres;
pub mod process;
pub mod program;
pub mod relay;
pub mod stand_in;
pub mod transcript;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// The default policy's workspace label.
pub const WORKSPACE_LABEL: &str = "molecule.ai/workspace-id";
/// The default policy's runtime label.
pub const RUNTIME_LABEL: &str = "molecule.ai/runtime";

/// A policy whose proxy sets every field, with the token in a Secret.
pub const PROXY: &str = include_str!("../../fixtures/policy.yaml");

/// Returns the repository's root.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub fn fixtures(folder: &str) -> PathBuf {
    repository().join("tests/fixtures").join(folder)
}

/// Returns the recorded reviews by file name without the extension.
pub fn recorded_reviews() -> BTreeMap<String, Value> {
    let entries = fs::read_dir(fixtures("admission-reviews")).unwrap();
    let review = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let review = recorded(&name);
        (name, review)
    };
    entries.map(|entry| review(entry.unwrap().path())).collect()
}

/// Returns one recorded review.
pub fn recorded(name: &str) -> Value {
    let path = fixtures("admission-reviews").join(format!("{name}.json"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns the contract's vectors.
pub fn vectors() -> Vec<Value> {
    serde_json::from_slice(&fs::read(fixtures("contract/vectors.json")).unwrap()).unwrap()
}

/// Returns a review of a pod's creation.
pub fn create(pod: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "00000000-0000-0000-0000-0000000000aa",
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "operation": "CREATE",
            "namespace": "ws-acme",
            "object": pod,
        },
    })
}

/// Returns a pod with one container.
pub fn pod(workspace: &str, env: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "ws", "labels": {WORKSPACE_LABEL: workspace}},
        "spec": {"containers": [{"name": "agent", "image": "busybox", "env": env}]},
    })
}

/// Returns the patch in an answer, or `[]` if there is none.
pub fn patch_of(answer: &Value) -> Value {
    let response = &answer["response"];
    assert_eq!(response.get("patchType").is_some(), response.get("patch").is_some(), "{answer}");
    let Some(patch) = response["patch"].as_str() else {
        return json!([]);
    };
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
    assert_ne!(patch, json!([]), "{answer}");
    patch
}

/// Returns the review with the answer's patch applied to its object.
pub fn patched(review: &Value, answer: &Value) -> Value {
    let patch: json_patch::Patch = serde_json::from_value(patch_of(answer)).unwrap();
    let mut review = review.clone();
    json_patch::patch(&mut review["request"]["object"], &patch).unwrap();
    review
}

/// Returns a review as the API server sends it again. Kubernetes' decoder drops empty values and fills in defaults.
pub fn defaulted(review: &Value) -> Value {
    let mut review = review.clone();
    let lists = ["initContainers", "containers", "ephemeralContainers"];
    for list in lists {
        for container in review["request"]["object"]["spec"][list]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            for entry in container["env"].as_array_mut().into_iter().flatten() {
                if entry["value"] == "" {
                    entry.as_object_mut().unwrap().remove("value");
                }
                if entry["valueFrom"]["fieldRef"].is_object() {
                    entry["valueFrom"]["fieldRef"]["apiVersion"] = "v1".into();
                }
                if entry["valueFrom"]["resourceFieldRef"].is_object() {
                    let divisor = &mut entry["valueFrom"]["resourceFieldRef"]["divisor"];
                    *divisor = divisor.as_str().unwrap_or("0").into();
                }
            }
        }
    }
    // Indexing a missing list above inserted null.
    for list in lists {
        let spec = review["request"]["object"]["spec"].as_object_mut().unwrap();
        if spec[list].is_null() {
            spec.remove(list);
        }
    }
    review
}

/// Returns a container's env as the contract's vectors write it. Panics if a name occurs twice.
pub fn env_map(container: &Value) -> BTreeMap<String, Value> {
    let mut map = BTreeMap::new();
    for entry in container["env"].as_array().into_iter().flatten() {
        let name = entry["name"].as_str().unwrap().to_owned();
        let value = entry
            .get("value")
            .or(entry.get("valueFrom"))
            .cloned()
            .unwrap_or_else(|| "".into());
        assert!(map.insert(name, value).is_none(), "duplicate: {entry}");
    }
    map
}

/// Returns a vector's proxy as a policy file. JSON is valid YAML.
pub fn policy_of(vector: &Value) -> String {
    let proxy = &vector["proxy"];
    if proxy.is_null() {
        return String::new();
    }
    json!({"proxy": {
        "baseUrl": proxy["base_url"],
        "anthropicBaseUrl": proxy["anthropic_base_url"],
        "usageUrl": proxy["usage_url"],
        "usageToken": {"value": proxy["usage_token"]},
    }})
    .to_string()
}

/// Returns a review that creates a pod whose only container has the vector's env.
pub fn review_of(vector: &Value) -> Value {
    let env = vector["env"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| json!({"name": name, "value": value}));
    let mut pod = pod(vector["workspace_id"].as_str().unwrap(), &env.collect());
    if !vector["runtime"].is_null() {
        pod["metadata"]["labels"][RUNTIME_LABEL] = vector["runtime"].clone();
    }
    create(&pod)
}

/// Asserts that an answer is what its vector expects.
pub fn assert_expected(vector: &Value, answer: &Value) {
    let (name, expect, response) = (&vector["name"], &vector["expect"], &answer["response"]);
    assert_eq!(response["auditAnnotations"]["mode"], expect["mode"], "{name}");
    assert_eq!(response["auditAnnotations"]["source"], expect["source"], "{name}");
    if let Some(code) = expect["error"].as_str() {
        assert_eq!(response["allowed"], false, "{name}");
        let message = response["status"]["message"].as_str().unwrap();
        assert!(message.starts_with(&format!("{code}: ")), "{name}: {message}");
        assert_eq!(patch_of(answer), json!([]), "{name}");
        return;
    }
    assert_eq!(response["allowed"], true, "{name}");
    let after = patched(&review_of(vector), answer);
    let env = env_map(&after["request"]["object"]["spec"]["containers"][0]);
    let expected: BTreeMap<String, Value> = serde_json::from_value(expect["env"].clone()).unwrap();
    assert_eq!(env, expected, "{name}");
}

/// Runs statements on an SQLite file, and creates the file if it is missing.
pub fn sqlite(file: &Path, statements: &str) {
    use sqlx::ConnectOptions;
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true);
    let run = async {
        let mut connection = options.connect().await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(statements))
            .execute(&mut connection)
            .await?;
        sqlx::Connection::close(connection).await
    };
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(run)
        .unwrap();
}
