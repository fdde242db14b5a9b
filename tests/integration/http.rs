//! Malformed requests: the right status and a one-sentence body, never a panic or a hang. Also the health and
//! metrics endpoints and the admission log line. Hostile clients are in hostile.rs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use test_support::program::{Start, Webhook, read_to_end};
use test_support::{PROXY, create, pod};

const ID: &str = "88888888-8888-8888-8888-888888888888";
/// The start of a request's head, without Content-Length and the final blank line.
const HEAD: &str = "POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";

fn start(arguments: &[&str]) -> (Webhook, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("http.sqlite");
    test_support::sqlite(
        &file,
        "CREATE TABLE workspaces (id TEXT PRIMARY KEY, llm_billing_mode TEXT)",
    );
    let database_url = &format!("sqlite://{}", file.display());
    (
        Start {
            policy: PROXY,
            database_url,
            arguments,
            ..Start::default()
        }
        .start(),
        folder,
    )
}

/// Sends raw bytes, and returns the status and the last line of the answer.
fn send(webhook: &Webhook, request: &[u8]) -> (String, String) {
    let mut stream = webhook.connect();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        answer.extend_from_slice(&buffer[..read]);
        if answer.ends_with(b"\n") && !answer.ends_with(b"\r\n") {
            break;
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).unwrap_or_default().to_owned();
    (status, answer.lines().last().unwrap_or_default().to_owned())
}

fn posted(webhook: &Webhook, path: &str, content_type: &str, body: &[u8]) -> (u16, String) {
    let mut response = webhook.post(path, content_type, body);
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}

/// Asserts that a well-formed request still gets an answer.
fn assert_serves(webhook: &Webhook) {
    let small = create(&json!({"metadata": {}})).to_string();
    assert_eq!(posted(webhook, "/mutate", "application/json", small.as_bytes()).0, 200);
}

#[test]
fn malformed_body_gets_a_status_and_a_sentence() {
    let (webhook, _folder) = start(&["--max-body-bytes", "100000"]);
    let review = |api_version: &str, kind: &str| {
        json!({"apiVersion": api_version, "kind": kind, "request": {"uid": "u"}}).to_string()
    };
    let not_json =
        |at: &str| format!("the body is not JSON ({at}); send an AdmissionReview as JSON\n");
    let not_a_review = "the body is not an AdmissionReview; send kind AdmissionReview of apiVersion admission.k8s.io/v1\n";
    let version = "this version of AdmissionReview is not supported; set admissionReviewVersions: [v1] in the webhook configuration\n";
    let no_uid = "the AdmissionReview has no request.uid; set it to a non-empty string\n";
    let deep = "[".repeat(50_000);
    let table: [(Vec<u8>, u16, String); 10] = [
        (Vec::new(), 400, not_json("line 1, column 0")),
        (b"not json".to_vec(), 400, not_json("line 1, column 2")),
        (b"{\"kind\": \"\xff\xfe\"}".to_vec(), 400, not_json("line 1, column 11")),
        (deep.into_bytes(), 422, not_a_review.to_owned()),
        (b"null".to_vec(), 422, not_a_review.to_owned()),
        (b"[]".to_vec(), 422, not_a_review.to_owned()),
        (review("v1", "Pod").into_bytes(), 422, not_a_review.to_owned()),
        (
            review("admission.k8s.io/v1beta1", "AdmissionReview").into_bytes(),
            422,
            version.to_owned(),
        ),
        (
            json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"})
                .to_string()
                .into_bytes(),
            422,
            no_uid.to_owned(),
        ),
        (vec![b' '; 100_000], 400, not_json("line 1, column 100000")),
    ];
    for (body, status, sentence) in table {
        for path in ["/mutate", "/validate"] {
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
            assert_eq!(
                posted(&webhook, path, "application/json", &body),
                (status, sentence.clone()),
                "{shown}"
            );
        }
    }
}

#[test]
fn wrong_method_path_or_content_type_is_rejected() {
    let (webhook, _folder) = start(&[]);
    let url = |path: &str| format!("https://localhost:{}{path}", webhook.address.port());
    let text = |mut response: ureq::http::Response<ureq::Body>| {
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    };
    let media_type = "the content type is not supported; send application/json\n".to_owned();
    let body = create(&pod(ID, &json!([]))).to_string().into_bytes();
    for content_type in ["text/plain", "application/yaml", "application/jsonx", ""] {
        assert_eq!(
            posted(&webhook, "/mutate", content_type, &body),
            (415, media_type.clone()),
            "{content_type}"
        );
    }
    for content_type in ["application/json", "Application/JSON; charset=utf-8"] {
        assert_eq!(posted(&webhook, "/mutate", content_type, &body).0, 200, "{content_type}");
    }
    let compressed = webhook
        .client
        .post(url("/mutate"))
        .header("content-type", "application/json")
        .header("content-encoding", "gzip");
    let sentence = "compressed bodies are not supported; send the JSON as it is\n".to_owned();
    assert_eq!(text(compressed.send(&body[..]).unwrap()), (415, sentence));

    let get = webhook.client.get(url("/mutate")).call().unwrap();
    assert_eq!(get.headers()["allow"], "POST");
    assert_eq!(text(get), (405, "GET is not supported here; use POST\n".to_owned()));
    let not_found = "not found; use POST /mutate or POST /validate\n".to_owned();
    for path in ["/", "/metrics", "/readyz", "/mutate/", "/mutate/x"] {
        assert_eq!(
            posted(&webhook, path, "application/json", &body),
            (404, not_found.clone()),
            "{path}"
        );
    }
    assert_eq!(webhook.health("/mutate").0, 404);
}

#[test]
fn unusable_request_with_uid_gets_an_admission_response() {
    let (webhook, _folder) = start(&[]);
    let refused = |request: Value, message: &str| {
        let answer = webhook.mutate(&json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}));
        let status = json!({"code": 400, "reason": "BadRequest", "message": message});
        let response = json!({"uid": "u", "allowed": false, "status": status});
        assert_eq!(
            answer,
            json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
        );
    };
    let pods = json!({"group": "", "resource": "pods"});
    refused(
        json!({"uid": "u", "resource": pods, "operation": "CREATE"}),
        "NO_OBJECT: the admission request has no object; send the pod in request.object",
    );
    refused(
        json!({"uid": "u", "resource": pods, "operation": "CREATE", "object": {"spec": {"containers": [{"env": [{"value": 7}]}]}}}),
        "UNREADABLE_REQUEST: request.object.spec.containers[0].env[0].value is missing or has the wrong type; \
         correct it and send the pod again",
    );
}

#[test]
fn invalid_http_gets_answer_or_closed_connection() {
    let (webhook, _folder) = start(&["--max-body-bytes", "1000"]);
    // A Content-Length over the limit is rejected before the body is sent.
    let too_long = send(&webhook, format!("{HEAD}Content-Length: 99999999999\r\n\r\n").as_bytes());
    assert_eq!(
        too_long,
        ("413".to_owned(), "the body is larger than 1000 bytes; see --max-body-bytes".to_owned())
    );
    // A chunked body is rejected once it exceeds the limit.
    let chunk = format!("400\r\n{}\r\n", " ".repeat(0x400));
    let chunked = send(
        &webhook,
        format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n{chunk}{chunk}").as_bytes(),
    );
    assert_eq!(
        chunked,
        ("413".to_owned(), "the body is larger than 1000 bytes; see --max-body-bytes".to_owned())
    );
    assert_eq!(send(&webhook, b"garbage\r\n\r\n").0, "400");
    // The server stops reading an oversized head, so a client that is still sending may miss the answer.
    let head = format!("{HEAD}X: {}\r\n\r\n", "x".repeat(1_000_000));
    let status = send(&webhook, head.as_bytes()).0;
    assert!(["431", ""].contains(&status.as_str()), "{status}");

    // Plain HTTP on the TLS port.
    let mut plain = TcpStream::connect(webhook.address).unwrap();
    plain
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let answer = read_to_end(&plain);
    assert!(!answer.starts_with(b"HTTP"));
    // A client that closes its side mid-request.
    let mut half = webhook.connect();
    half.write_all(format!("{HEAD}Content-Length: 100\r\n\r\n{{").as_bytes())
        .unwrap();
    half.conn.send_close_notify();
    let _ = half.flush();
    half.sock.shutdown(std::net::Shutdown::Write).unwrap();
    read_to_end(&mut half);

    assert_serves(&webhook);
}

#[test]
fn client_still_sending_gets_its_answer_first() {
    let (webhook, _folder) = start(&["--max-body-bytes", "1000"]);
    let sentence = "the body is larger than 1000 bytes; see --max-body-bytes\n".to_owned();
    let nowhere = "not found; use POST /mutate or POST /validate\n".to_owned();
    for _ in 0..20 {
        let posted = |path| posted(&webhook, path, "application/json", &[b' '; 3_000_000]);
        assert_eq!(posted("/mutate"), (413, sentence.clone()));
        assert_eq!(posted("/nowhere"), (404, nowhere.clone()));
    }
    // A client that never stops sending is disconnected.
    let mut endless = webhook.connect();
    endless
        .write_all(format!("{HEAD}Content-Length: 99999999\r\n\r\n").as_bytes())
        .unwrap();
    read_to_end(&mut endless);
    let started = Instant::now();
    while endless.sock.write_all(b"more").is_ok() {
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_serves(&webhook);
}

#[test]
fn unusual_pods_keep_everything_outside_the_plan() {
    let (webhook, _folder) = start(&[]);
    let many_containers: Vec<Value> = (0..300)
        .map(|index| json!({"name": format!("c{index}"), "env": [{"name": "A"}]}))
        .collect();
    let many_entries: Vec<Value> = (0..500)
        .map(|index| json!({"name": format!("V{index}"), "value": "v", "future": {"a": [1]}}))
        .collect();
    let labels = json!({"molecule.ai/workspace-id": ID});
    let specs = [
        json!(null),
        json!({}),
        json!({"containers": null}),
        json!({"containers": []}),
        json!({"containers": [{}]}),
        json!({"containers": many_containers}),
        json!({"containers": [{"name": "c", "env": many_entries}], "future": {"a": {"b": null}}}),
        json!({"containers": [{"name": "c", "env": [{"name": "A"}, {"name": "A"}, {"name": ""}, {}]}]}),
    ];
    for spec in specs {
        let review = create(&json!({"metadata": {"labels": labels}, "spec": spec}));
        let answer = webhook.mutate(&review);
        assert_eq!(answer["response"]["allowed"], true);
        let after = test_support::patched(&review, &answer)["request"]["object"].clone();
        assert_eq!(after["metadata"]["labels"], labels);
        let is_unmanaged = |entry: &&Value| {
            !entry["name"]
                .as_str()
                .is_some_and(|name| name.starts_with("MOLECULE_") || name.starts_with("OPENAI_"))
        };
        for (index, container) in spec["containers"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let unmanaged: Vec<Value> = after["spec"]["containers"][index]["env"]
                .as_array()
                .unwrap()
                .iter()
                .filter(is_unmanaged)
                .cloned()
                .collect();
            assert_eq!(json!(unmanaged), container.get("env").cloned().unwrap_or(json!([])));
        }
    }
}

#[test]
fn health_and_metrics_report_each_admission() {
    let (webhook, _folder) = start(&[]);
    webhook.wait_until_ready();
    assert_eq!(webhook.health("/livez"), (200, "ok\n".to_owned()));
    assert_eq!(webhook.health("/readyz"), (200, "ok\n".to_owned()));
    webhook.mutate(&create(&pod(ID, &json!([]))));
    webhook.mutate(&create(&json!({})));
    webhook.validate(&create(&pod("", &json!([]))));
    posted(&webhook, "/mutate", "application/json", b"x");
    let (status, metrics) = webhook.health("/metrics");
    assert_eq!(status, 200);
    let count = |labels: &str| format!("llm_billing_admissions_total{{{labels}}} 1");
    for line in [
        count(
            r#"webhook="mutate",operation="create",mode="platform_managed",source="constant_fallback",reason="workspace_not_found",outcome="patched""#,
        ),
        count(
            r#"webhook="mutate",operation="create",mode="none",source="none",reason="none",outcome="untouched""#,
        ),
        count(
            r#"webhook="validate",operation="create",mode="platform_managed",source="constant_fallback",reason="missing_workspace_id",outcome="refused""#,
        ),
        count(
            r#"webhook="mutate",operation="other",mode="none",source="none",reason="none",outcome="bad_request""#,
        ),
        r#"llm_billing_admission_duration_seconds_count{webhook="mutate"} 3"#.to_owned(),
        r#"llm_billing_lookup_duration_seconds_count{result="not_found"} 1"#.to_owned(),
        "# EOF".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
}

#[test]
fn each_admission_logs_one_line() {
    let webhook = Start {
        policy: PROXY,
        database_url: "sqlite://nowhere.sqlite",
        ..Start::default()
    }
    .start();
    let env = json!([{"name": "HF_TOKEN", "value": "own"}, {"name": "KEEP", "value": "1"}]);
    let review = create(&pod("not-a-uuid", &env));
    webhook.mutate(&review);
    webhook.validate(&review);
    let line = |webhook_name: &str| -> Value {
        let line = webhook.wait_for_log(&format!("\"webhook\":\"{webhook_name}\""));
        let mut line: Value = serde_json::from_str(&line).unwrap();
        let fields = line.as_object_mut().unwrap();
        assert!(fields.remove("timestamp").is_some());
        let duration = fields.remove("duration_ms").unwrap().to_string();
        let microseconds = duration
            .split_once('.')
            .map_or("", |(_, decimals)| decimals);
        assert!(microseconds.len() <= 3, "{duration}");
        line
    };
    let names = "HF_TOKEN, MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED, MOLECULE_LLM_BASE_URL, \
        MOLECULE_LLM_USAGE_TOKEN, MOLECULE_LLM_ANTHROPIC_BASE_URL, MOLECULE_LLM_USAGE_URL, OPENAI_API_KEY and 1 more";
    let expected = json!({
        "level": "INFO",
        "message": "admission",
        "target": "llm_billing_webhook::server::webhook",
        "uid": "00000000-0000-0000-0000-0000000000aa",
        "webhook": "mutate",
        "operation": "CREATE",
        "namespace": "ws-acme",
        "name": "",
        "generate_name": "",
        "dry_run": false,
        "workspace": "not-a-uuid",
        "mode": "platform_managed",
        "source": "constant_fallback",
        "reason": "invalid_workspace_id",
        "outcome": "patched",
        "code": "",
        "changed": format!("agent: {names}"),
        "patch_operations": 9,
    });
    assert_eq!(line("mutate"), expected);
    let refused = line("validate");
    assert_eq!(
        [&refused["outcome"], &refused["code"], &refused["changed"]],
        ["refused", "ENV_NOT_SETTLED", ""]
    );
}
