//! Certificate files over real TLS: reload on change, fallback to the old pair when the new one is unusable, and
//! mutual TLS with a client CA. Self-managed certificates are in secret.rs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;

use test_support::load::{LONG_LOOKUP_TIMEOUT, LoadClient, schema};
use test_support::postgres::Postgres;
use test_support::program::{Authority, Start, Webhook, run, wait_for};
use test_support::{PROXY, create, pod};

/// Reports whether a new connection gets a certificate from this authority.
fn is_trusted(webhook: &Webhook, authority: &Authority) -> bool {
    let url = format!("https://localhost:{}/mutate", webhook.address.port());
    authority.client().get(url).call().is_ok()
}

fn start(arguments: &[&str]) -> Webhook {
    Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments,
        ..Start::default()
    }
    .start()
}

#[test]
fn changed_files_are_served_without_a_restart() {
    let webhook = start(&[]);
    assert!(is_trusted(&webhook, &webhook.authority));
    let next = Authority::generate();
    let (certificate, key) = next.issue("localhost");

    // As a kubelet updates a mounted Secret: it writes a new folder, then replaces a symbolic link.
    let folder = webhook.folder.path();
    let replace = |name: &str, content: &str| {
        fs::create_dir_all(folder.join("next")).unwrap();
        fs::write(folder.join("next").join(name), content).unwrap();
        let link = folder.join("link");
        symlink(folder.join("next").join(name), &link).unwrap();
        fs::rename(link, folder.join(name)).unwrap();
    };
    replace("tls.key", &key);
    replace("tls.crt", &certificate);
    wait_for("the new certificate is served", || is_trusted(&webhook, &next).then_some(()));
    assert!(!is_trusted(&webhook, &webhook.authority));
    webhook.wait_for_log("certificate reloaded");
    assert!(
        webhook
            .health("/metrics")
            .1
            .contains(r#"llm_billing_certificate_reloads_total{result="ok"} 1"#)
    );
}

#[test]
fn certificates_replaced_under_load_fail_no_handshake() {
    let postgres = Postgres::with(&schema());
    let start = Start {
        policy: &format!("lookup: {{timeout: {LONG_LOOKUP_TIMEOUT}}}\n{PROXY}"),
        database_url: &postgres.url(),
        ..Start::default()
    };
    let webhook = start.start();
    let folder = webhook.folder.path();
    let served_certificate = || {
        let mut connection = webhook.connect();
        connection.conn.complete_io(&mut connection.sock).unwrap();
        connection.conn.peer_certificates().unwrap()[0].clone()
    };
    let wait_until_served = |certificate: &str| {
        let expected = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        wait_for("the new certificate is served", || {
            (served_certificate() == expected).then_some(())
        });
    };
    // A kubelet writes a new folder, then points `..data` to it; the files are links through `..data`.
    let mount = |name: &str, (certificate, key): &(String, String)| {
        let next = folder.join(name);
        fs::create_dir(&next).unwrap();
        fs::write(next.join("tls.crt"), certificate).unwrap();
        fs::write(next.join("tls.key"), key).unwrap();
        symlink(&next, folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    };
    let next = || webhook.authority.issue("localhost");
    let load_client = LoadClient {
        client: webhook.authority.client_without_keep_alive(),
        ..webhook.load_client("platform_managed")
    };
    let tally = load_client.run_during("certificates replaced, in place and by link", 4, || {
        // In place, one file after the other: for a moment key and certificate do not match.
        let (certificate, key) = next();
        fs::write(folder.join("tls.key"), key).unwrap();
        fs::write(folder.join("tls.crt"), &certificate).unwrap();
        wait_until_served(&certificate);

        mount("first", &next());
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), folder.join("link")).unwrap();
            fs::rename(folder.join("link"), folder.join(name)).unwrap();
        }
        for name in ["second", "third"] {
            let pair = next();
            mount(name, &pair);
            wait_until_served(&pair.0);
        }
    });
    assert_eq!(tally.per_policy, 0);
}

#[test]
fn unusable_pair_keeps_the_old_one_served() {
    let webhook = start(&[]);
    let (certificate, _) = Authority::generate().issue("localhost");
    fs::write(webhook.folder.path().join("tls.crt"), certificate).unwrap();
    let line = webhook.wait_for_log("the old one stays");
    assert!(line.contains("certificate and key cannot be used together"), "{line}");
    assert!(is_trusted(&webhook, &webhook.authority));
    fs::remove_file(webhook.folder.path().join("tls.crt")).unwrap();
    let line = webhook.wait_for_log("cannot read ");
    assert!(line.contains("tls.crt: No such file"), "{line}");
    assert!(is_trusted(&webhook, &webhook.authority));
    assert!(
        webhook
            .health("/metrics")
            .1
            .contains(r#"llm_billing_certificate_reloads_total{result="failed"} 2"#)
    );
}

#[test]
fn client_ca_admits_only_its_own_clients() {
    let clients = Authority::generate();
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("clients.crt");
    fs::write(&ca, clients.pem()).unwrap();
    let mut webhook = start(&["--client-ca", ca.to_str().unwrap()]);
    let url = format!("https://localhost:{}/mutate", webhook.address.port());
    let call = |own: Option<&(String, String)>| webhook.authority.client_with(own).get(&url).call();
    assert!(call(None).is_err());
    assert!(call(Some(&Authority::generate().issue("api-server"))).is_err());
    assert_eq!(call(Some(&clients.issue("api-server"))).unwrap().status(), 405);

    webhook.client = webhook
        .authority
        .client_with(Some(&clients.issue("api-server")));
    assert_eq!(webhook.mutate(&create(&pod("", &json!([]))))["response"]["allowed"], false);
}

#[test]
fn serve_exits_when_the_certificate_is_unusable() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = Authority::generate().issue("localhost");
    let (_, other_key) = Authority::generate().issue("localhost");
    for (name, content) in [
        ("crt", &certificate),
        ("key", &key),
        ("other.key", &other_key),
    ] {
        fs::write(path(name), content).unwrap();
    }
    fs::write(path("empty"), "").unwrap();
    let table = [
        (
            path("missing"),
            path("key"),
            format!("cannot load the certificate: cannot read {}: No such file", path("missing")),
        ),
        (
            path("empty"),
            path("key"),
            "cannot load the certificate: the certificate file holds no readable PEM".to_owned(),
        ),
        (
            path("crt"),
            path("empty"),
            "cannot load the certificate: the key file holds no readable PEM private key"
                .to_owned(),
        ),
        (
            path("crt"),
            path("other.key"),
            "cannot load the certificate: certificate and key cannot be used together: ".to_owned(),
        ),
    ];
    let serve = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--health-listen",
        "127.0.0.1:0",
        "--database-url",
        "sqlite://x",
    ];
    for (certificate, key, expected) in table {
        let (code, stdout, stderr) =
            run(&[&serve[..], &["--tls-cert", &certificate, "--tls-key", &key]].concat());
        assert_eq!((code, stdout.as_str()), (2, ""));
        assert!(stderr.starts_with(&format!("error: {expected}")), "{stderr}");
    }
    let without_key = run(&[&serve[..], &["--tls-cert", &path("crt")]].concat()).2;
    assert_eq!(without_key, "error: --tls-cert and --tls-key belong together; set both\n");
    let without_certificate = run(&serve).2;
    assert_eq!(
        without_certificate,
        "error: no certificate is given; set --tls-cert and --tls-key, or --tls-secret\n"
    );
}
