//! `converge` on the API server's stand-in, or on a real one where there is one: drift, permissions and eviction. Rollouts,
//! which need controllers, are in tests/e2e/converge.rs; the decisions are tested in `src/core/converge.rs`.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::audit::{FLIPPED, NAMESPACE, Platform, pod};
use crate::metrics::{documented_of_converge, exposed};
use test_support::PROXY;
use test_support::api_server::write_kubeconfig;
use test_support::chart::{RELEASE, of_kind, render};
use test_support::converge::{comparisons, start, wait_for_metric};
use test_support::postgres::Postgres;
use test_support::process::memory_of;
use test_support::program::{Running, decode_output, health, program, wait_for};

/// Creates the account that the chart gives to `converge`, and returns its kubeconfig and the program's arguments.
fn install(platform: &Platform, settings: &[&str]) -> (String, Vec<String>) {
    let name = format!("{RELEASE}-converge");
    let settings = [
        &["database.existingSecret=db", "converge.enabled=true"],
        settings,
    ]
    .concat();
    let mut objects = render(&settings);
    objects.retain(|object| object["metadata"]["name"] == name.as_str());
    let is_permission = |object: &&Value| object["kind"] != "Deployment";
    platform
        .api
        .create_all(objects.iter().filter(is_permission));
    let container = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    let arguments: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
    let own = |argument: &String| argument != "converge" && !argument.contains("/etc/llm-billing/");
    let user = format!("system:serviceaccount:{RELEASE}:{name}");
    let kubeconfig = platform.api.kubeconfig(platform.folder.path(), Some(&user));
    let kubeconfig = kubeconfig.to_str().unwrap().to_owned();
    (kubeconfig, arguments.into_iter().filter(own).collect())
}

#[test]
fn drift_is_reported_and_follows_the_database() {
    let platform = Platform::start();
    platform.create_drift();
    let (kubeconfig, arguments) = install(&platform, &["converge.interval=1s"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (converge, address) = start(&platform.policy, &platform.postgres, &kubeconfig, &arguments);
    wait_for_metric(address, "llm_billing_drift_pods{mode=\"disabled\",finding=\"wrong_mode\"} 1");
    wait_for_metric(address, "llm_billing_audited_pods 4");
    converge.wait_for_log("would be recreated (--apply is not set)");
    platform.set(FLIPPED, "byok");
    wait_for_metric(address, "llm_billing_drift_pods{mode=\"disabled\",finding=\"wrong_mode\"} 0");
    wait_for_metric(address, "llm_billing_switches_total 1");
    // A comparison that fails leaves the results of the last one.
    platform
        .postgres
        .execute("ALTER TABLE workspaces RENAME TO gone");
    wait_for("a comparison fails", || {
        let metrics = health(address, "/metrics").1;
        metrics
            .contains("llm_billing_audits_total{result=\"failed\"} ")
            .then_some(())
    });
    wait_for_metric(address, "llm_billing_audited_pods 4");
    converge.wait_for_log("nothing is recreated meanwhile");
}

#[test]
fn interval_of_zero_is_refused() {
    for flag in ["--interval", "--recreation-timeout"] {
        let (code, _, stderr) =
            decode_output(&program(&["converge", flag, "0s"]).output().unwrap());
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("expected a duration above zero"), "{stderr}");
    }
}

#[test]
fn namespace_selector_needs_permission_to_list_namespaces() {
    let platform = Platform::start();
    platform.create_without_label();
    let settings = [
        "scope=namespace",
        "namespaceSelector.matchLabels.workspaces=yes",
    ];
    let (kubeconfig, arguments) = install(&platform, &settings);
    let policy = platform.folder.path().join("policy.yaml");
    fs::write(&policy, format!("unlabelled: platform_managed\n{PROXY}")).unwrap();
    let policy = policy.to_str().unwrap();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (_converge, address) = start(policy, &platform.postgres, &kubeconfig, &arguments);
    wait_for_metric(address, "llm_billing_audited_pods 1");
    let role = format!("/apis/rbac.authorization.k8s.io/v1/clusterroles/{RELEASE}-converge");
    platform.api.change(&role, |role| {
        let rules = role["rules"].as_array_mut().unwrap();
        rules.retain(|rule| rule["resources"] != json!(["namespaces"]));
    });
    let (converge, _) = start(policy, &platform.postgres, &kubeconfig, &arguments);
    let line = converge.wait_for_log("cannot list the namespaces");
    assert!(line.contains("is forbidden"), "{line}");

    // If pods without the label are in scope, the namespaces must be selected.
    let mut command = program(&["converge", "--policy", policy]);
    command.args(["--database-url", &platform.postgres.url()]);
    let (code, _, stderr) = decode_output(&command.output().unwrap());
    assert_eq!(code, 2);
    assert!(stderr.starts_with("error: see --namespace-selector: "), "{stderr}");
}

#[test]
fn replica_that_loses_the_lease_reports_no_work() {
    let platform = Platform::start();
    platform.create_drift();
    let arguments = ["--lease", "converge", "--lease-namespace", "default"];
    let (_converge, address) =
        start(&platform.policy, &platform.postgres, &platform.kubeconfig, &arguments);
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 3");
    let path = "/apis/coordination.k8s.io/v1/namespaces/default/leases/converge";
    platform
        .api
        .change(path, |lease| lease["spec"]["holderIdentity"] = "another".into());
    wait_for_metric(address, "llm_billing_converge_active 0");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 0");
    wait_for_metric(address, "llm_billing_audited_pods 4");
}

#[test]
fn evicted_pod_is_awaited_until_its_successor_is_ready() {
    let platform = Platform::start();
    platform.register_webhook();
    let create = || {
        let flipped = pod("flipped", FLIPPED, Some("ReplicaSet/flipped"));
        platform.api.create_all([&flipped]);
    };
    create();
    let (converge, address) = start(
        &platform.policy,
        &platform.postgres,
        &platform.kubeconfig,
        &["--apply", "--interval", "1s"],
    );
    wait_for_metric(address, "llm_billing_audited_pods 1");
    platform.set(FLIPPED, "disabled");
    wait_for("the pod is evicted", || platform.pod_names().is_empty().then_some(()));
    // The stand-in has no controllers.
    create();
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 1");
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/flipped");
    let mut ready = platform.api.get(&path).unwrap();
    ready["status"] =
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    let (status, _) = platform
        .api
        .request("PUT", &format!("{path}/status"), Some(&ready));
    assert_eq!(status, 200);
    converge.wait_for_log("\"recreated\"");
    let text = health(address, "/metrics").1;
    let series = exposed(&text);
    for (name, (kind, labels)) in documented_of_converge() {
        assert_eq!(series.get(&name), Some(&(kind, labels)), "{name}");
    }
}

/// Starts `converge` with an API server at this URL and a table without rows. Both are there as long as what is returned.
fn start_with(url: &str) -> (Running, SocketAddr, (Postgres, TempDir)) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (kubeconfig, policy) = (path("kubeconfig"), path("policy.yaml"));
    write_kubeconfig(Path::new(&kubeconfig), &json!({"server": url}), &json!({"token": "t"}));
    fs::write(&policy, PROXY).unwrap();
    let postgres =
        Postgres::with("CREATE TABLE workspaces (id uuid PRIMARY KEY, llm_billing_mode text)");
    let (converge, address) = start(&policy, &postgres, &kubeconfig, &[]);
    (converge, address, (postgres, folder))
}

/// Reads one request from a connection. Returns its first line, or `None` at the end.
fn read_request(stream: &TcpStream) -> Option<String> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next()?.ok()?;
    while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
    Some(first)
}

/// Serves these answers to lists and watches in their order, leaves further ones unanswered, and disconnects others. Returns the
/// URL, and a receiver of the first line of each list and watch.
fn serve_answers(answers: Vec<String>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let (send, requests) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answers) = (stream.unwrap(), Arc::clone(&answers));
            let send = send.clone();
            thread::spawn(move || {
                while let Some(first) = read_request(&stream) {
                    if !first.starts_with("GET ") {
                        return;
                    }
                    // The test may have ended.
                    let _ = send.send(first);
                    let Some(answer) = answers.lock().unwrap().pop_front() else {
                        continue;
                    };
                    let head =
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length";
                    write!(stream, "{head}: {}\r\n\r\n{answer}", answer.len()).unwrap();
                }
            });
        }
    });
    (url, requests)
}

#[test]
fn pods_are_listed_again_when_the_watch_has_expired() {
    let page = |count: usize| {
        let items: Vec<Value> = (0..count)
            .map(|index| {
                let mut pod = pod(&format!("ws-{index}"), "no-uuid", None);
                pod["metadata"]["uid"] = format!("uid-{index}").into();
                pod
            })
            .collect();
        json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}).to_string()
    };
    let expired = json!({"type": "ERROR", "object": {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410, "reason": "Expired",
        "message": "too old resource version: 1 (2)",
    }});
    let (url, requests) = serve_answers(vec![page(1), format!("{expired}\n"), page(2)]);
    let (_converge, address, _kept) = start_with(&url);
    wait_for_metric(address, "llm_billing_audited_pods 2");
    let limit = Duration::from_secs(30);
    for is_watch in [false, true, false, true] {
        let request = requests.recv_timeout(limit).unwrap();
        assert_eq!(request.contains("watch=true"), is_watch, "{request}");
        // An idle watch ends before the client gives up.
        assert_eq!(request.contains("timeoutSeconds=50"), is_watch, "{request}");
    }
}

#[test]
fn comparison_queries_once_per_batch_in_bounded_memory() {
    let platform = Platform::start();
    let pods = platform.create_many();
    let (converge, address) =
        start(&platform.policy, &platform.postgres, &platform.kubeconfig, &["--interval", "3s"]);
    let started = Instant::now();
    wait_for_metric(address, &format!("llm_billing_audited_pods {pods}"));
    let elapsed = started.elapsed();
    let (before, compared) = (platform.transactions(), comparisons(address));
    wait_for("three more comparisons", || (comparisons(address) >= compared + 3).then_some(()));
    let (after, ended) = (platform.transactions(), comparisons(address));
    let each = (after - before) / (ended - compared);
    let size = |field: &str| memory_of(converge.id(), field);
    println!(
        "{pods} pods of {} workspaces: compared after {elapsed:.1?}, {} KiB at rest, {} KiB at most, {each} transactions a comparison",
        pods / 2,
        size("VmRSS"),
        size("VmHWM")
    );
    // The counting psql is among them.
    assert!(each <= pods.div_ceil(500) + 3, "{each}");
    // What is kept of a pod has a few KiB.
    assert!(size("VmHWM") < 64 * 1024 + pods as u64 * 8, "{} KiB", size("VmHWM"));
}

/// Serves one list of pods over HTTP. It sends the last byte when the returned sender is used.
fn serve_page_in_two_steps(page: String) -> (String, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (signal_written, written) = mpsc::channel();
    let (resume, resumed) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&stream);
        let length = page.len();
        let (body, last) = page.split_at(length - 1);
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length";
        write!(stream, "{head}: {length}\r\n\r\n{body}").unwrap();
        signal_written.send(()).unwrap();
        resumed.recv().unwrap();
        stream.write_all(last.as_bytes()).unwrap();
        // Keep the connection open until the test ends.
        let _ = resumed.recv();
    });
    (url, written, resume)
}

#[test]
fn probe_is_answered_while_large_pods_are_compared() {
    let env: Vec<Value> = (0..600)
        .map(|index| json!({"name": format!("VARIABLE_{index}"), "value": "x".repeat(64)}))
        .collect();
    let mut large = pod("ws", "no-uuid", None);
    large["spec"]["containers"][0]["env"] = json!(env);
    let mut of_uid = |uid: usize| {
        large["metadata"]["uid"] = format!("uid-{uid}").into();
        large.to_string()
    };
    let items = (0..500).map(&mut of_uid).collect::<Vec<_>>().join(",");
    let page = format!(
        r#"{{"kind":"PodList","apiVersion":"v1","metadata":{{"resourceVersion":"1"}},"items":[{items}]}}"#
    );
    let (url, written, resume) = serve_page_in_two_steps(page);
    let (_converge, address, _kept) = start_with(&url);
    written.recv().unwrap();
    let is_compared = || {
        let metrics = health(address, "/metrics").1;
        metrics.contains("llm_billing_audits_total{result=\"ok\"} 1")
    };
    // Between these answers, `converge` reads what it has received of the page.
    for _ in 0..200 {
        assert!(!is_compared());
    }
    resume.send(()).unwrap();
    let mut answers = 0;
    wait_for("the comparison ends", || {
        answers += 1;
        is_compared().then_some(())
    });
    assert!(answers > 10, "{answers} answers during the comparison");
    let drift = health(address, "/metrics").1;
    assert!(drift.contains("llm_billing_audited_pods 500\n"), "{drift}");
}
