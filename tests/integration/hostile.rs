//! Hostile and broken clients: the resources they hold are bounded and released, and well-behaved clients are
//! still served. Malformed requests are in http.rs.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use serde_json::json;

use test_support::program::{Start, TIMEOUT, Webhook, read_to_end, wait_for};
use test_support::{create, pod};

const HEAD: &str = "POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
fn start() -> Webhook {
    Start {
        database_url: "sqlite://nowhere.sqlite",
        ..Start::default()
    }
    .start()
}

/// Asserts that a new client gets an answer.
fn assert_serves(webhook: &Webhook) {
    let url = format!("https://localhost:{}/mutate?timeout=5s", webhook.address.port());
    let review = create(&pod("", &json!([]))).to_string();
    let mut response = webhook
        .authority
        .client()
        .post(url)
        .header("content-type", "application/json")
        .send(review.as_bytes())
        .unwrap();
    let answer = response.body_mut().read_to_string().unwrap();
    assert!(answer.contains("missing_workspace_id"), "{answer}");
}

/// Connects without TLS. Reads wait no longer than a test waits for anything.
fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// Waits until the webhook closes the connection, and returns what it sent before.
fn read_until_closed(mut stream: impl Read) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("not closed: {error}"),
        // A reset is an end too.
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

#[test]
fn slow_handshake_head_or_body_is_cut_off() {
    let webhook = start();
    let silent = connect(webhook.address);
    let mut half_closed = connect(webhook.address);
    half_closed.write_all(b"\x16\x03").unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    let mut slow_head = webhook.connect();
    slow_head.write_all(HEAD.as_bytes()).unwrap();
    let mut slow_body = webhook.connect();
    let body = format!("{HEAD}Content-Length: 100\r\n\r\n{{");
    slow_body.write_all(body.as_bytes()).unwrap();
    assert_serves(&webhook);

    assert_eq!(read_until_closed(half_closed), "");
    assert_eq!(read_until_closed(silent), "");
    assert_eq!(read_until_closed(slow_head), "");
    let answer = read_until_closed(slow_body);
    assert!(
        answer.starts_with("HTTP/1.1 408 ")
            && answer.ends_with("the body took too long; send it again\n"),
        "{answer}"
    );
}

#[test]
fn stuck_log_reader_delays_no_admission() {
    let webhook = start();
    let review = create(&pod("", &json!([])));
    let stuck = webhook.stop_reading_log();
    wait_for("lines are dropped", || {
        for _ in 0..200 {
            webhook.mutate(&review);
        }
        let metrics = webhook.health("/metrics").1;
        (!metrics.contains("llm_billing_log_lines_lost_total 0\n")).then_some(())
    });
    drop(stuck);
    webhook.mutate(&review);
}

#[test]
fn idle_connection_outlives_the_api_servers_keep_alive() {
    // The API server's HTTP client closes connections idle for 90 s. If the webhook closed first, a request could
    // arrive at that moment and be lost.
    let webhook = start();
    let mut idle = webhook.connect();
    let body = create(&pod("", &json!([]))).to_string();
    let request = format!("{HEAD}Content-Length: {}\r\n\r\n{body}", body.len());
    let mut admit = || {
        idle.write_all(request.as_bytes()).unwrap();
        let mut status = [0; 12];
        idle.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
        let mut rest = [0; 4096];
        let _ = idle.read(&mut rest).unwrap();
    };
    admit();
    // A connection that never sends a request is closed earlier.
    read_until_closed(connect(webhook.address));
    admit();
}

#[test]
fn idle_connections_take_little_memory() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let webhook = start();
    let before = webhook.memory();
    let connect = |_| TcpStream::connect(webhook.address).unwrap();
    let idle: Vec<TcpStream> = (0..3000).map(connect).collect();
    assert_serves(&webhook);
    // 20 KiB for each of the 3,000 connections.
    let growth = webhook.memory() - before;
    assert!(growth < 60 * 1024, "{growth} KiB");
    drop(idle);
    assert_serves(&webhook);
}

/// Reports whether a health connection answers a request; `false` means that the server has closed it.
fn answers(connection: &mut TcpStream) -> bool {
    let _ = connection.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut answer = [0; 1024];
    match connection.read(&mut answer) {
        Ok(length) => answer[..length].starts_with(b"HTTP/1.1 200"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
        Err(error) => panic!("neither answered nor closed: {error}"),
    }
}

#[test]
fn connection_over_the_limit_is_closed() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let webhook = start();
    // A used connection stays open for two minutes, so even a slow machine reaches the limit.
    let mut open = Vec::new();
    loop {
        let mut connection = connect(webhook.health);
        if !answers(&mut connection) {
            break;
        }
        open.push(connection);
        assert!(open.len() <= 4096, "there is no limit");
    }
    assert!(open.len() > 4000, "{} connections", open.len());
    assert!(answers(&mut open[0]));
    drop(open);
    wait_for("a new connection is served", || {
        answers(&mut TcpStream::connect(webhook.health).unwrap()).then_some(())
    });
}

#[test]
fn large_bodies_share_bounded_memory() {
    let webhook = start();
    let megabytes_8 = 8 * 1024 * 1024;
    let head = format!("{HEAD}Content-Length: {megabytes_8}\r\n\r\n");
    let large = vec![b' '; megabytes_8 - 1];
    // 64 clients send 512 MiB in all, each without its last byte; the webhook buffers only 8 MiB.
    std::thread::scope(|scope| {
        let send = |_| {
            scope.spawn(|| {
                let mut client = webhook.connect();
                client.sock.set_write_timeout(Some(TIMEOUT)).unwrap();
                client.write_all(head.as_bytes()).unwrap();
                // The webhook may close the connection before it has read everything.
                let _ = client.write_all(&large);
                read_to_end(&mut client);
            })
        };
        let sending: Vec<_> = (0..64).map(send).collect();
        // Small bodies do not wait for the large ones, which take until the body's time-out.
        for _ in 0..5 {
            assert_serves(&webhook);
        }
        assert!(sending.iter().all(|client| !client.is_finished()));
    });
    let memory = webhook.peak_memory();
    assert!(memory < 64 * 1024, "{memory} KiB");
    for sentence in [
        "the body took too long; send it again",
        "there are too many large bodies; send it again",
    ] {
        webhook.wait_for_log(sentence);
    }
    assert_serves(&webhook);
}

#[test]
fn deep_nesting_and_compressed_bodies_are_rejected() {
    let webhook = start();
    let depth = 200_000;
    let lists = "[".repeat(depth) + &"]".repeat(depth);
    let objects = "{\"a\":".repeat(depth) + "0" + &"}".repeat(depth);
    let mut statuses = Vec::new();
    for nested in [lists, objects] {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {"uid": "u", "resource": {"version": "v1", "resource": "pods"}, "operation": "CREATE", "object": "HERE"},
        });
        let review = review.to_string().replace("\"HERE\"", &nested);
        for body in [nested, review] {
            let response = webhook.post("/mutate", "application/json", body.as_bytes());
            statuses.push(response.status().as_u16());
        }
    }
    // Nesting inside an unread field is skipped without recursion.
    assert_eq!(statuses, [422, 200, 422, 200]);
    let mut bomb = webhook.connect();
    let head = format!("{HEAD}Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f");
    bomb.write_all(head.as_bytes()).unwrap();
    let mut status = [0; 12];
    bomb.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 415");
    assert_serves(&webhook);
}
