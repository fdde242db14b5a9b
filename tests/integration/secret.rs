//! The certificate that replicas make, share, publish and renew themselves, with the identity and the permissions
//! that the chart gives them, while an API server asks them about pods by the `caBundle` that it has.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, Issuer, KeyPair};
use serde_json::{Value, json};

use test_support::api_server::ApiServer;
use test_support::chart::{RELEASE, of_kind, render, render_with_hooks};
use test_support::pod;
use test_support::postgres::free_port;
use test_support::program::{Start, Webhook, program, shown, wait_for};

const DATABASE: &str = "database.existingSecret=db";
const SECRET: &str =
    "/api/v1/namespaces/llm-billing-webhook/secrets/llm-billing-webhook-certificate";
const CONFIGURATION: &str =
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/llm-billing-webhook";
const GUARD: &str =
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/llm-billing-webhook";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// A cluster with what the chart installs, but for the pods: the tests run the program themselves.
struct Cluster {
    api: ApiServer,
    folder: tempfile::TempDir,
    objects: Vec<Value>,
    /// Where the webhook configurations send admissions.
    port: u16,
}

impl Cluster {
    /// Installs the chart, with the guard.
    fn install() -> Self {
        let objects = render(&[DATABASE, "guard.enabled=true"]);
        let cluster = Self {
            api: ApiServer::start(),
            folder: tempfile::tempdir().unwrap(),
            objects,
            port: free_port(),
        };
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": RELEASE}});
        cluster.api.create_all([&namespace]);
        let kinds = [
            "ServiceAccount",
            "Role",
            "RoleBinding",
            "ClusterRole",
            "ClusterRoleBinding",
        ];
        let of_kinds = cluster
            .objects
            .iter()
            .filter(|object| kinds.iter().any(|kind| object["kind"] == *kind));
        cluster.api.create_all(of_kinds);
        cluster.configure();
        cluster
    }

    /// Creates the webhook configurations, which lead to this port of loopback in place of the Service.
    fn configure(&self) {
        for kind in [
            "MutatingWebhookConfiguration",
            "ValidatingWebhookConfiguration",
        ] {
            let mut configuration = of_kind(&self.objects, kind).clone();
            for webhook in configuration["webhooks"].as_array_mut().unwrap() {
                let path = webhook["clientConfig"]["service"]["path"].take();
                let url = format!("https://localhost:{}{}", self.port, path.as_str().unwrap());
                webhook["clientConfig"] = json!({ "url": url });
            }
            self.api.create_all([&configuration]);
        }
    }

    fn kubeconfig(&self) -> String {
        let user = format!("system:serviceaccount:{RELEASE}:{RELEASE}");
        let file = self.api.kubeconfig(self.folder.path(), Some(&user));
        file.to_str().unwrap().to_owned()
    }

    /// Starts a replica with the Deployment's own arguments for its certificate, but for names and life times.
    fn start(&self, address: &str, lifetime: &str, ca_lifetime: &str) -> Webhook {
        let kubeconfig = self.kubeconfig();
        let arguments = self.arguments(address, lifetime, ca_lifetime);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let start = Start {
            policy: test_support::PROXY,
            database_url: "sqlite://nowhere.sqlite",
            arguments: &arguments,
            environment: &[("KUBECONFIG", &kubeconfig)],
            keeps_certificate: true,
            ..Start::default()
        };
        start.start()
    }

    fn arguments(&self, address: &str, lifetime: &str, ca_lifetime: &str) -> Vec<String> {
        let container =
            &of_kind(&self.objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
        let arguments = container["args"].as_array().unwrap().iter();
        let of_chart = arguments
            .map(|argument| argument.as_str().unwrap())
            .filter(|argument| argument.starts_with("--tls-") && !argument.contains("lifetime="));
        let own = [
            "--tls-dns-name=localhost",
            &format!("--tls-lifetime={lifetime}"),
            &format!("--tls-ca-lifetime={ca_lifetime}"),
            "--drain-delay=1s",
            "--listen",
            address,
            "--health-listen",
            "127.0.0.1:0",
        ]
        .map(str::to_owned);
        of_chart.map(str::to_owned).chain(own).collect()
    }

    fn at_the_port(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn secret(&self, field: &str) -> Option<String> {
        let text = self.api.get(SECRET)?["data"][field].as_str()?.to_owned();
        Some(String::from_utf8(STANDARD.decode(text).unwrap()).unwrap())
    }

    fn ca_bundle(&self, configuration: &str) -> Option<String> {
        let bundle = &self.api.get(configuration)?["webhooks"][0]["clientConfig"]["caBundle"];
        Some(String::from_utf8(STANDARD.decode(bundle.as_str()?).unwrap()).unwrap())
    }

    /// Creates a pod by dry-run, as the API server does: by its `caBundle`.
    fn create_a_pod(&self) -> Result<(), Value> {
        let path = format!("{PODS}?dryRun=All");
        let (status, created) = self.api.request("POST", &path, Some(&pod("", &json!([]))));
        let env = &created["spec"]["containers"][0]["env"];
        let is_settled = env[0]["value"] == "platform_managed";
        if status == 201 && is_settled {
            Ok(())
        } else {
            Err(created)
        }
    }

    /// Creates pods without a break while something goes on; how many, and each that failed.
    fn create_during(&self, goes_on: impl FnOnce()) -> usize {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let creator = scope.spawn(|| {
                let mut created = 0;
                while !over.load(Ordering::Relaxed) {
                    self.create_a_pod().unwrap();
                    created += 1;
                }
                created
            });
            let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(goes_on));
            over.store(true, Ordering::Relaxed);
            let created = creator.join().unwrap();
            end.unwrap();
            created
        })
    }
}

fn count(authorities: &str) -> usize {
    authorities.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn three_replicas_that_start_at_once_with_nothing_there_end_with_one_authority() {
    let cluster = Cluster::install();
    let replicas: Vec<Webhook> = std::thread::scope(|scope| {
        let start = || cluster.start("127.0.0.1:0", "90d", "365d");
        let starting: Vec<_> = (0..3).map(|_| scope.spawn(start)).collect();
        starting
            .into_iter()
            .map(|one| one.join().unwrap())
            .collect()
    });
    let authorities = cluster.secret("ca.crt").unwrap();
    assert_eq!(count(&authorities), 1);
    for configuration in [CONFIGURATION, GUARD] {
        assert_eq!(
            cluster.ca_bundle(configuration).as_ref(),
            Some(&authorities)
        );
    }
    for replica in &replicas {
        assert!(replica.is_trusted_by(&authorities));
        let metrics = replica.health("/metrics").1;
        assert!(
            metrics.contains("llm_billing_certificate_expiry_timestamp_seconds "),
            "{metrics}"
        );
    }
}

#[test]
fn through_whole_rotations_every_pod_is_created() {
    let cluster = Cluster::install();
    let first = cluster.start(&cluster.at_the_port(), "12s", "24s");
    let second = cluster.start("127.0.0.1:0", "12s", "24s");
    let started = Instant::now();
    let (mut authorities, mut certificates) = (Vec::new(), Vec::new());
    let created = cluster.create_during(|| {
        // Three authorities one after the other, each of which has signed.
        while authorities.len() < 3 || certificates.len() < 4 {
            assert!(
                started.elapsed() < Duration::from_secs(120),
                "{authorities:?}"
            );
            let (Some(bundle), Some(certificate)) =
                (cluster.secret("ca.crt"), cluster.secret("tls.crt"))
            else {
                continue;
            };
            let newest = bundle.split_inclusive("-----END CERTIFICATE-----").next();
            let newest = newest.unwrap().to_owned();
            if !authorities.contains(&newest) {
                authorities.push(newest);
            }
            if !certificates.contains(&certificate) {
                certificates.push(certificate);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert!(created > 100, "{created}");
    let bundle = cluster.secret("ca.crt").unwrap();
    assert!(first.is_trusted_by(&bundle) && second.is_trusted_by(&bundle));
    for replica in [first, second] {
        replica.wait_for_log("\"certificate reloaded\"");
    }
}

#[test]
fn what_is_deleted_or_damaged_heals_by_itself_and_pods_are_created_meanwhile() {
    let cluster = Cluster::install();
    let _replicas = [
        cluster.start(&cluster.at_the_port(), "10s", "1h"),
        cluster.start("127.0.0.1:0", "10s", "1h"),
    ];
    let authorities = cluster.secret("ca.crt").unwrap();
    let heals = |what: &str, is_healed: &dyn Fn(&str) -> bool| {
        wait_for(what, || {
            let bundle = cluster.secret("ca.crt")?;
            let published = cluster.ca_bundle(CONFIGURATION)? == bundle;
            (published && is_healed(&bundle)).then_some(())
        });
    };
    let created = cluster.create_during(|| {
        cluster.api.delete(SECRET);
        heals("the Secret is back", &|bundle| bundle == authorities);
        cluster
            .api
            .change(SECRET, |secret| secret["data"] = json!({"ours": "eA=="}));
        heals("its content is back", &|bundle| {
            bundle.contains(authorities.trim())
        });
        cluster.api.change(SECRET, |secret| {
            secret["data"]["tls.crt"] = "bm9uZQ==".into()
        });
        heals("the certificate is back", &|_| {
            cluster
                .secret("tls.crt")
                .unwrap()
                .contains("BEGIN CERTIFICATE")
        });
        // What somebody else put there is nobody's business.
        assert_eq!(cluster.secret("ours").as_deref(), Some("x"));
        // How one asks for a new authority.
        let before = count(&cluster.secret("ca.crt").unwrap());
        cluster.api.change(SECRET, |secret| {
            secret["data"].as_object_mut().unwrap().remove("ca.key");
        });
        heals("there is a new authority", &|bundle| count(bundle) > before);
    });
    assert!(created > 0);
    // No pod is created without it, and none without the configuration is asked about.
    for configuration in [CONFIGURATION, GUARD] {
        cluster.api.change(configuration, |configuration| {
            let client = &mut configuration["webhooks"][0]["clientConfig"];
            client.as_object_mut().unwrap().remove("caBundle");
        });
        wait_for("the caBundle is back", || {
            (cluster.ca_bundle(configuration) == cluster.secret("ca.crt")).then_some(())
        });
        cluster.api.delete(configuration);
    }
    cluster.configure();
    wait_for("the caBundle is there again", || {
        (cluster.ca_bundle(GUARD).is_some() && cluster.ca_bundle(CONFIGURATION).is_some())
            .then_some(())
    });
    cluster.create_a_pod().unwrap();
}

#[test]
fn a_replica_that_starts_after_the_secret_was_deleted_cuts_off_none_that_runs() {
    let cluster = Cluster::install();
    // It looks every ten seconds, and has not noticed yet.
    let old = cluster.start(&cluster.at_the_port(), "90d", "365d");
    let authority = cluster.secret("ca.crt").unwrap();
    let created = cluster.create_during(|| {
        cluster.api.delete(SECRET);
        let new = cluster.start("127.0.0.1:0", "90d", "365d");
        let authorities = cluster.secret("ca.crt").unwrap();
        assert_eq!(count(&authorities), 2);
        assert!(authorities.ends_with(&authority));
        wait_for("the old one serves the new certificate", || {
            let newest = authorities.strip_suffix(&authority)?;
            (new.is_trusted_by(newest) && old.is_trusted_by(newest)).then_some(())
        });
    });
    assert!(created > 0);
}

#[test]
fn a_certificate_that_others_made_stays_trusted_when_the_replicas_take_over() {
    let cluster = Cluster::install();
    let address = cluster.at_the_port();
    let provided = Start {
        policy: test_support::PROXY,
        database_url: "sqlite://nowhere.sqlite",
        arguments: &["--listen", &address, "--health-listen", "127.0.0.1:0"],
        ..Start::default()
    }
    .start();
    let foreign = provided.authority.pem();
    for configuration in [CONFIGURATION, GUARD] {
        cluster.api.change(configuration, |configuration| {
            configuration["webhooks"][0]["clientConfig"]["caBundle"] =
                STANDARD.encode(&foreign).into();
        });
    }
    wait_for("the API server knows it", || cluster.create_a_pod().ok());
    let created = cluster.create_during(|| {
        let replica = cluster.start("127.0.0.1:0", "90d", "365d");
        let bundle = cluster.ca_bundle(CONFIGURATION).unwrap();
        assert!(bundle.contains(foreign.trim()), "{bundle}");
        assert!(replica.is_trusted_by(&bundle));
        std::thread::sleep(Duration::from_secs(1));
    });
    assert!(created > 0);
}

#[test]
fn a_configuration_that_cannot_be_written_stops_neither_renewal_nor_serving() {
    let cluster = Cluster::install();
    let replica = cluster.start(&cluster.at_the_port(), "9s", "1h");
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/llm-billing-webhook";
    let authority = cluster.secret("ca.crt").unwrap();
    let created = cluster.create_during(|| {
        cluster.api.change(role, |role| {
            role["rules"]
                .as_array_mut()
                .unwrap()
                .retain(|rule| rule["resources"][0] != "validatingwebhookconfigurations");
        });
        wait_for("it tells", || {
            replica.log().contains("cannot publish").then_some(())
        });
        // Another replica, which can write it, renews the certificate.
        let key = KeyPair::from_pem(&cluster.secret("ca.key").unwrap()).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&authority, key).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = of_chart_and_localhost(&cluster);
        let certificate = CertificateParams::new(names).unwrap();
        let certificate = certificate.signed_by(&key, &issuer).unwrap().pem();
        cluster.api.change(SECRET, |secret| {
            secret["data"]["tls.crt"] = STANDARD.encode(&certificate).into();
            secret["data"]["tls.key"] = STANDARD.encode(key.serialize_pem()).into();
        });
        replica.wait_for_log("\"certificate reloaded\"");
    });
    assert!(created > 0);
    let metrics = replica.health("/metrics").1;
    let failed = "llm_billing_certificate_reloads_total{result=\"failed\"} ";
    let failed = metrics.lines().find_map(|line| line.strip_prefix(failed));
    let failed: u32 = failed.unwrap().parse().unwrap();
    assert!(failed > 1, "each look is counted: {failed}");
    assert!(replica.is_trusted_by(&authority));
}

/// The names that a replica's certificate has here.
fn of_chart_and_localhost(cluster: &Cluster) -> Vec<String> {
    let arguments = cluster.arguments("127.0.0.1:0", "9s", "1h");
    let names = arguments
        .iter()
        .filter_map(|argument| argument.strip_prefix("--tls-dns-name="));
    names.map(str::to_owned).collect()
}

#[test]
fn an_answer_that_cannot_be_read_is_not_quoted_for_it_may_hold_keys() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Threads end with the process.
    std::thread::spawn(move || {
        for (number, mut client) in listener.incoming().map_while(Result::ok).enumerate() {
            let mut request = [0; 4096];
            let _ = client.read(&mut request);
            let body = [r#"{"data": "key-0123456789"}"#, "key-0123456789"][number % 2];
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = client.write_all((head + body).as_bytes());
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [],
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": ""}}],
    });
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let mut child = program(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--health-listen",
        "127.0.0.1:0",
    ])
    .args([
        "--database-url",
        "sqlite://nowhere.sqlite",
        "--tls-secret",
        "s",
        "--tls-dns-name",
        "w.ns.svc",
    ])
    .env("KUBECONFIG", kubeconfig)
    .env("RUST_LOG", "trace")
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    std::thread::sleep(Duration::from_secs(3));
    child.kill().unwrap();
    let log = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    assert!(log.contains("no certificate yet"), "{log}");
    assert!(log.contains("its answer cannot be read"), "{log}");
    assert!(!log.contains("key-0123456789"), "{log}");
}

#[test]
fn each_permission_that_the_chart_gives_is_needed() {
    let roles = [
        (
            "Role",
            "/apis/rbac.authorization.k8s.io/v1/namespaces/llm-billing-webhook/roles/llm-billing-webhook",
        ),
        (
            "ClusterRole",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/llm-billing-webhook",
        ),
    ];
    let cluster = Cluster::install();
    let mut tried = 0;
    for (kind, path) in roles {
        let rules = of_kind(&cluster.objects, kind)["rules"].as_array().unwrap();
        for (index, rule) in rules.iter().enumerate() {
            assert_eq!(rule["resourceNames"].as_array().unwrap().len(), 1, "{rule}");
            for verb in rule["verbs"].as_array().unwrap() {
                // From nothing there to a certificate that is due at once.
                if cluster.api.get(SECRET).is_some() {
                    cluster.api.delete(SECRET);
                }
                for configuration in [CONFIGURATION, GUARD] {
                    cluster.api.delete(configuration);
                }
                cluster.configure();
                cluster.api.change(path, |role| {
                    let verbs = role["rules"][index]["verbs"].as_array_mut().unwrap();
                    verbs.retain(|one| one != verb);
                });
                let lacking = cluster.run_until_refused(verb.as_str().unwrap());
                let verb = verb.as_str().unwrap();
                assert!(
                    lacking.contains("is forbidden"),
                    "{rule} without {verb}: {lacking}"
                );
                assert!(
                    lacking.contains(rule["resources"][0].as_str().unwrap()),
                    "{lacking}"
                );
                cluster
                    .api
                    .change(path, |role| role["rules"] = rules.clone().into());
                tried += 1;
            }
        }
    }
    assert_eq!(tried, 8);
}

impl Cluster {
    /// What the program says of a permission that it lacks: at its start, or when it renews.
    fn run_until_refused(&self, verb: &str) -> String {
        if verb == "update" && self.api.get(SECRET).is_none() {
            // A Secret that is there, but holds nothing, is written by an update.
            let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "llm-billing-webhook-certificate", "namespace": RELEASE}});
            self.api.create_all([&secret]);
        }
        let arguments = self.arguments("127.0.0.1:0", "90d", "365d");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let kubeconfig = self.kubeconfig();
        let start = Start {
            database_url: "sqlite://nowhere.sqlite",
            arguments: &arguments,
            environment: &[("KUBECONFIG", &kubeconfig)],
            keeps_certificate: true,
            ..Start::default()
        };
        let mut command = start.command(self.folder.path());
        let (code, stdout, stderr) = shown(&command.stdin(Stdio::null()).output().unwrap());
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        let last = stderr.lines().last().unwrap().to_owned();
        assert!(last.starts_with("error: cannot "), "{last}");
        last
    }
}

#[test]
fn the_charts_own_test_sees_whether_the_webhook_acts_with_the_identity_that_the_chart_gives_it() {
    let cluster = Cluster::install();
    let hooks = render_with_hooks(&[DATABASE]);
    let of_hook = |object: &&Value| {
        object["metadata"]["name"] == "llm-billing-webhook-test" && object["kind"] != "Pod"
    };
    let container = &of_kind(&hooks, "Pod")["spec"]["containers"][0];
    let arguments: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
    let check = || {
        let user = format!("system:serviceaccount:{RELEASE}:{RELEASE}-test");
        let kubeconfig = cluster.api.kubeconfig(cluster.folder.path(), Some(&user));
        let mut command = program(&[]);
        let mounted = |argument: &&String| !argument.starts_with("--policy=");
        command
            .args(arguments.iter().filter(mounted))
            .env("KUBECONFIG", kubeconfig);
        let (code, stdout, stderr) = shown(&command.output().unwrap());
        assert_eq!(stderr, "");
        (code, stdout.lines().last().unwrap().to_owned())
    };
    let (code, said) = check();
    assert_eq!(code, 2);
    assert!(
        said.starts_with("error cluster      the API server refuses: pods")
            && said.contains("is forbidden"),
        "{said}"
    );
    cluster.api.create_all(hooks.iter().filter(of_hook));
    let (code, said) = check();
    assert_eq!(code, 2);
    assert!(said.contains("failed calling webhook"), "{said}");
    let replica = cluster.start(&cluster.at_the_port(), "90d", "365d");
    let expected =
        "ok    cluster      a new pod in default has MOLECULE_LLM_BILLING_MODE=platform_managed";
    assert_eq!(check(), (0, expected.to_owned()));
    drop(replica);
    cluster.api.delete(CONFIGURATION);
    cluster.api.delete(GUARD);
    let (code, said) = check();
    assert_eq!(code, 2);
    let expected = "error cluster      a new pod in default has no MOLECULE_LLM_BILLING_MODE; see the webhook configuration";
    assert!(said.starts_with(expected), "{said}");
}

#[test]
fn no_key_is_logged_at_the_most_verbose_level() {
    let cluster = Cluster::install();
    let kubeconfig = cluster.kubeconfig();
    let arguments = cluster.arguments("127.0.0.1:0", "10s", "20s");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments: &arguments,
        environment: &[("KUBECONFIG", &kubeconfig)],
        keeps_certificate: true,
        log: "trace",
        ..Start::default()
    };
    let webhook = start.start();
    let mut keys = Vec::new();
    for field in ["ca.key", "tls.key"] {
        let pem = cluster.secret(field).unwrap();
        keys.push(pem.lines().nth(1).unwrap().to_owned());
        // As the API server sends it.
        keys.push(STANDARD.encode(&pem)[40..80].to_owned());
    }
    webhook.wait_for_log("\"certificate reloaded\"");
    let log = webhook.log();
    for key in keys {
        assert!(!log.contains(&key), "{log}");
    }
}

#[test]
fn flags_that_contradict_each_other_or_a_cluster_that_is_not_there_are_named() {
    let run = |arguments: &[&str]| {
        let mut command = program(&[]);
        command
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--health-listen",
                "127.0.0.1:0",
            ])
            .args(["--database-url", "sqlite://nowhere.sqlite"])
            .args(arguments)
            .env("KUBECONFIG", "/nonexistent");
        shown(&command.output().unwrap())
    };
    let shared = &["--tls-secret", "s", "--tls-dns-name", "w.ns.svc"];
    let table: [(&[&str], &str); 4] = [
        (
            &["--tls-secret", "s"],
            "error: no DNS name is given; set --tls-dns-name",
        ),
        (
            &[
                shared,
                &["--tls-lifetime", "1h", "--tls-ca-lifetime", "1h"][..],
            ]
            .concat(),
            "error: --tls-ca-lifetime must be at least twice",
        ),
        (
            &[shared, &["--tls-cert", "c", "--tls-key", "k"][..]].concat(),
            "error: --tls-secret takes the place of --tls-cert",
        ),
        (
            shared,
            "error: no cluster is known here; mount a service account's token, or set KUBECONFIG",
        ),
    ];
    for (arguments, expected) in table {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, 2);
        assert!(stderr.starts_with(expected), "{stderr}");
    }
    let (code, _, stderr) = run(&["--tls-dns-name", "w.ns.svc"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--tls-secret"), "{stderr}");
}
