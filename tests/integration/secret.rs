//! Self-managed certificates: replicas create, share, publish and renew them under the chart's service account and
//! RBAC, while an API server calls the webhook and trusts its current `caBundle`. Certificate files are in tls.rs.

use std::io::{BufRead, BufReader, Read, Write};
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
use test_support::program::{Start, Webhook, decode_output, program, wait_for};

const DATABASE: &str = "database.existingSecret=db";
const SECRET: &str =
    "/api/v1/namespaces/llm-billing-webhook/secrets/llm-billing-webhook-certificate";
const CONFIGURATION: &str =
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/llm-billing-webhook";
const GUARD: &str =
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/llm-billing-webhook";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// A cluster with the chart's objects except its pods: the tests run the program themselves.
const KINDS: [&str; 2] = [
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
];
const DATABASE_FILE: &str = "workspaces.sqlite";
/// The annotation in which the chart declares a configuration's webhooks.
const DECLARED: &str = "molecule.ai/llm-billing-webhooks";

struct Cluster {
    api: ApiServer,
    folder: tempfile::TempDir,
    objects: Vec<Value>,
    /// The port of loopback that the webhook configurations point to.
    port: u16,
}

impl Cluster {
    /// Installs the chart with `guard.enabled=true`.
    fn install() -> Self {
        let objects = render(&[DATABASE, "guard.enabled=true"]);
        let cluster = Self {
            api: ApiServer::start(),
            folder: tempfile::tempdir().unwrap(),
            objects,
            port: free_port(),
        };
        let file = cluster.folder.path().join(DATABASE_FILE);
        test_support::sqlite(&file, "CREATE TABLE workspaces (id TEXT, llm_billing_mode TEXT)");
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

    /// Creates the webhook configurations with webhooks that have no CA, so that they are written at once.
    fn configure(&self) {
        for kind in KINDS {
            let mut configuration = self.configuration(kind);
            configuration["webhooks"] = serde_json::from_str(
                configuration["metadata"]["annotations"][DECLARED]
                    .as_str()
                    .unwrap(),
            )
            .unwrap();
            self.api.create_all([&configuration]);
        }
    }

    /// Returns the chart's webhook configuration, with a URL on loopback in place of the Service.
    fn configuration(&self, kind: &str) -> Value {
        let mut configuration = of_kind(&self.objects, kind).clone();
        assert_eq!(configuration.get("webhooks"), None);
        let declared = configuration["metadata"]["annotations"][DECLARED]
            .as_str()
            .unwrap();
        let mut webhooks: Value = serde_json::from_str(declared).unwrap();
        for webhook in webhooks.as_array_mut().unwrap() {
            let path = webhook["clientConfig"]["service"]["path"].take();
            let url = format!("https://localhost:{}{}", self.port, path.as_str().unwrap());
            webhook["clientConfig"] = json!({ "url": url });
        }
        configuration["metadata"]["annotations"][DECLARED] = webhooks.to_string().into();
        configuration
    }

    fn kubeconfig(&self) -> String {
        let user = format!("system:serviceaccount:{RELEASE}:{RELEASE}");
        let file = self.api.kubeconfig(self.folder.path(), Some(&user));
        file.to_str().unwrap().to_owned()
    }

    /// Starts a replica with the Deployment's `--tls-` arguments, except for these lifetimes.
    fn start(&self, address: &str, lifetime: &str, ca_lifetime: &str) -> Webhook {
        self.start_with(test_support::PROXY, address, lifetime, ca_lifetime)
    }

    fn start_with(
        &self,
        policy: &str,
        address: &str,
        lifetime: &str,
        ca_lifetime: &str,
    ) -> Webhook {
        let kubeconfig = self.kubeconfig();
        let arguments = self.arguments(address, lifetime, ca_lifetime);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let start = Start {
            policy,
            database_url: &self.database_url(),
            arguments: &arguments,
            environment: &[("KUBECONFIG", &kubeconfig)],
            manages_certificate: true,
            ..Start::default()
        };
        start.start()
    }

    /// Returns the URL of a database without workspaces.
    fn database_url(&self) -> String {
        format!("sqlite://{}", self.folder.path().join(DATABASE_FILE).display())
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

    fn address(&self) -> String {
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

    /// Creates a pod by dry run, so that the API server calls the webhook and verifies it against `caBundle`.
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

    /// Creates pods continuously while the closure runs, and returns how many. Panics if one is refused or unchanged.
    fn create_during(&self, disruption: impl FnOnce()) -> usize {
        self.repeat_during(|| self.create_a_pod().unwrap(), disruption)
            .0
    }

    /// Creates pods continuously while the closure runs. Panics if one is refused; some may be unchanged.
    fn admit_during<T>(&self, disruption: impl FnOnce() -> T) -> T {
        let admit = || {
            if let Err(answer) = self.create_a_pod() {
                assert_eq!(answer["kind"], "Pod", "{answer}");
            }
        };
        self.repeat_during(admit, disruption).1
    }

    fn repeat_during<T>(
        &self,
        create: impl Fn() + Sync,
        disruption: impl FnOnce() -> T,
    ) -> (usize, T) {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let creator = scope.spawn(|| {
                let mut created = 0;
                while !is_over.load(Ordering::Relaxed) {
                    create();
                    created += 1;
                }
                created
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(disruption));
            is_over.store(true, Ordering::Relaxed);
            let created = creator.join().unwrap();
            (created, result.unwrap())
        })
    }
}

fn count_certificates(authorities: &str) -> usize {
    authorities.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn replicas_starting_at_once_agree_on_one_authority() {
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
    assert_eq!(count_certificates(&authorities), 1);
    for configuration in [CONFIGURATION, GUARD] {
        assert_eq!(cluster.ca_bundle(configuration).as_ref(), Some(&authorities));
    }
    for replica in &replicas {
        assert!(replica.is_trusted_by(&authorities));
        let metrics = replica.health("/metrics").1;
        assert!(metrics.contains("llm_billing_certificate_expiry_timestamp_seconds "), "{metrics}");
    }
}

#[test]
fn pods_are_created_throughout_ca_rotations() {
    let cluster = Cluster::install();
    let first = cluster.start(&cluster.address(), "12s", "24s");
    let second = cluster.start("127.0.0.1:0", "12s", "24s");
    let started = Instant::now();
    let (mut authorities, mut certificates) = (Vec::new(), Vec::new());
    let created = cluster.create_during(|| {
        // Three successive authorities, each of which has signed a certificate.
        while authorities.len() < 3 || certificates.len() < 4 {
            assert!(started.elapsed() < Duration::from_secs(120), "{authorities:?}");
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
fn deleted_or_damaged_objects_are_restored_without_downtime() {
    let cluster = Cluster::install();
    let _replicas = [
        cluster.start(&cluster.address(), "10s", "1h"),
        cluster.start("127.0.0.1:0", "10s", "1h"),
    ];
    let authorities = cluster.secret("ca.crt").unwrap();
    let wait_until_restored = |what: &str, is_restored: &dyn Fn(&str) -> bool| {
        wait_for(what, || {
            let bundle = cluster.secret("ca.crt")?;
            let published = cluster.ca_bundle(CONFIGURATION)? == bundle;
            (published && is_restored(&bundle)).then_some(())
        });
    };
    let created = cluster.create_during(|| {
        cluster.api.delete(SECRET);
        wait_until_restored("the Secret is back", &|bundle| bundle == authorities);
        cluster
            .api
            .change(SECRET, |secret| secret["data"] = json!({"ours": "eA=="}));
        wait_until_restored("its content is back", &|bundle| bundle.contains(authorities.trim()));
        cluster
            .api
            .change(SECRET, |secret| secret["data"]["tls.crt"] = "bm9uZQ==".into());
        wait_until_restored("the certificate is back", &|_| {
            cluster
                .secret("tls.crt")
                .unwrap()
                .contains("BEGIN CERTIFICATE")
        });
        // Keys that the webhook does not manage are kept.
        assert_eq!(cluster.secret("ours").as_deref(), Some("x"));
        // Removing ca.key requests a new authority.
        let before = count_certificates(&cluster.secret("ca.crt").unwrap());
        cluster.api.change(SECRET, |secret| {
            secret["data"].as_object_mut().unwrap().remove("ca.key");
        });
        wait_until_restored("there is a new authority", &|bundle| {
            count_certificates(bundle) > before
        });
    });
    assert!(created > 0);
    // Without caBundle pods are rejected; without the configuration the webhook is not called.
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
    wait_for("the caBundle is published", || {
        (cluster.ca_bundle(GUARD).is_some() && cluster.ca_bundle(CONFIGURATION).is_some())
            .then_some(())
    });
    cluster.create_a_pod().unwrap();
}

#[test]
fn webhooks_are_written_once_a_replica_is_ready() {
    let cluster = Cluster::install();
    cluster.api.delete(CONFIGURATION);
    cluster.api.delete(GUARD);
    let first_install = || {
        cluster.api.create_all([&cluster.configuration(KINDS[0])]);
        let replica = cluster.start(&cluster.address(), "90d", "365d");
        wait_for("the webhooks are written", || cluster.ca_bundle(CONFIGURATION));
        wait_for("the webhook is called", || cluster.create_a_pod().ok());
        replica
    };
    let replica = cluster.admit_during(first_install);
    let created = cluster.create_during(|| {
        // guard.enabled=true, and no new replica comes up.
        cluster.api.create_all([&cluster.configuration(KINDS[1])]);
        wait_for("the guard is written", || cluster.ca_bundle(GUARD));
        for _ in 0..100 {
            cluster.create_a_pod().unwrap();
        }
        // A change of values.
        cluster.api.change(GUARD, |guard| {
            let declared = &mut guard["metadata"]["annotations"][DECLARED];
            let changed = declared
                .as_str()
                .unwrap()
                .replace("\"timeoutSeconds\":5", "\"timeoutSeconds\":9");
            *declared = changed.into();
        });
        wait_for("the change is written", || {
            let guard = cluster.api.get(GUARD)?;
            (guard["webhooks"][0]["timeoutSeconds"] == 9).then_some(())
        });
        cluster.api.delete(GUARD);
    });
    assert!(created > 100, "{created}");
    // After the glass was broken: the configuration is deleted, and comes back by an upgrade.
    cluster.api.delete(CONFIGURATION);
    cluster.admit_during(|| {
        cluster.api.create_all([&cluster.configuration(KINDS[0])]);
        wait_for("the webhooks are back", || cluster.ca_bundle(CONFIGURATION));
        wait_for("the webhook is called", || cluster.create_a_pod().ok());
    });
    drop(replica);
}

#[test]
fn replica_starting_after_secret_deletion_disrupts_none() {
    let cluster = Cluster::install();
    // It polls every ten seconds, so it has not noticed the deletion yet.
    let old = cluster.start(&cluster.address(), "90d", "365d");
    let authority = cluster.secret("ca.crt").unwrap();
    let created = cluster.create_during(|| {
        cluster.api.delete(SECRET);
        let new = cluster.start("127.0.0.1:0", "90d", "365d");
        let authorities = cluster.secret("ca.crt").unwrap();
        assert_eq!(count_certificates(&authorities), 2);
        assert!(authorities.ends_with(&authority));
        wait_for("the old one serves the new certificate", || {
            let newest = authorities.strip_suffix(&authority)?;
            (new.is_trusted_by(newest) && old.is_trusted_by(newest)).then_some(())
        });
    });
    assert!(created > 0);
}

#[test]
fn provided_certificate_stays_trusted_after_the_takeover() {
    let cluster = Cluster::install();
    let address = cluster.address();
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
    wait_for("the API server trusts it", || cluster.create_a_pod().ok());
    let created = cluster.create_during(|| {
        let replica = cluster.start("127.0.0.1:0", "90d", "365d");
        let bundle = cluster.ca_bundle(CONFIGURATION).unwrap();
        assert!(bundle.contains(foreign.trim()), "{bundle}");
        assert!(replica.is_trusted_by(&bundle));
        for _ in 0..20 {
            cluster.create_a_pod().unwrap();
        }
    });
    assert!(created > 0);
}

#[test]
fn unwritable_configuration_stops_neither_renewal_nor_serving() {
    let cluster = Cluster::install();
    let replica = cluster.start(&cluster.address(), "9s", "1h");
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/llm-billing-webhook";
    let authority = cluster.secret("ca.crt").unwrap();
    let created = cluster.create_during(|| {
        cluster.api.change(role, |role| {
            role["rules"]
                .as_array_mut()
                .unwrap()
                .retain(|rule| rule["resources"][0] != "validatingwebhookconfigurations");
        });
        wait_for("the failure is logged", || {
            replica.log().contains("cannot publish").then_some(())
        });
        // A replica that can write the configuration renews the certificate.
        let key = KeyPair::from_pem(&cluster.secret("ca.key").unwrap()).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&authority, key).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = dns_names(&cluster);
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
    assert!(failed > 1, "each poll is counted: {failed}");
    assert!(replica.is_trusted_by(&authority));
    let rules = of_kind(&cluster.objects, "ClusterRole")["rules"].clone();
    cluster
        .api
        .change(role, |role| role["rules"] = rules.clone());
    replica.wait_for_log("\"the certificate is reconciled again\"");
}

#[test]
fn absent_api_server_is_logged_with_its_cause_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": format!("http://127.0.0.1:{}", free_port())}}],
        "users": [{"name": "x", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    });
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let start = Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments: &[
            "--tls-secret=s",
            "--tls-secret-namespace=n",
            "--tls-dns-name=localhost",
        ],
        environment: &[("KUBECONFIG", kubeconfig.to_str().unwrap())],
        manages_certificate: true,
        ..Start::default()
    };
    let mut command = start.command(folder.path());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    for _ in 0..3 {
        let line = lines.find(|line| !line.contains("\"INFO\"")).unwrap();
        assert!(
            line.contains("no certificate yet") && line.contains("Connection refused"),
            "{line}"
        );
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Returns the DNS names in a replica's certificate: the chart's and localhost.
fn dns_names(cluster: &Cluster) -> Vec<String> {
    let arguments = cluster.arguments("127.0.0.1:0", "9s", "1h");
    let names = arguments
        .iter()
        .filter_map(|argument| argument.strip_prefix("--tls-dns-name="));
    names.map(str::to_owned).collect()
}

#[test]
fn unreadable_answer_is_not_quoted() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // The thread ends with the process.
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
    let mut log = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    // The program gives up after 30 s, so the log ends if the line does not come.
    while !log.contains("its answer cannot be read") {
        assert_ne!(stderr.read_line(&mut log).unwrap(), 0, "{log}");
    }
    child.kill().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    child.wait().unwrap();
    assert!(log.contains("no certificate yet"), "{log}");
    assert!(!log.contains("key-0123456789"), "{log}");
}

#[test]
fn each_permission_of_the_chart_is_needed() {
    let roles = [
        (
            "Role",
            "/apis/rbac.authorization.k8s.io/v1/namespaces/llm-billing-webhook/roles/llm-billing-webhook",
        ),
        ("ClusterRole", "/apis/rbac.authorization.k8s.io/v1/clusterroles/llm-billing-webhook"),
    ];
    let cluster = Cluster::install();
    let mut permission_count = 0;
    for (kind, path) in roles {
        let rules = of_kind(&cluster.objects, kind)["rules"].as_array().unwrap();
        for (index, rule) in rules.iter().enumerate() {
            assert_eq!(rule["resourceNames"].as_array().unwrap().len(), 1, "{rule}");
            for verb in rule["verbs"].as_array().unwrap() {
                // No Secret and no configuration, then a certificate that is due for renewal at once.
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
                let error = cluster.run_until_forbidden(verb.as_str().unwrap());
                let verb = verb.as_str().unwrap();
                assert!(error.contains("is forbidden"), "{rule} without {verb}: {error}");
                assert!(error.contains(rule["resources"][0].as_str().unwrap()), "{error}");
                cluster
                    .api
                    .change(path, |role| role["rules"] = rules.clone().into());
                permission_count += 1;
            }
        }
    }
    assert_eq!(permission_count, 8);
}

impl Cluster {
    /// Runs the program without one permission, and returns the error that ends it.
    fn run_until_forbidden(&self, verb: &str) -> String {
        if verb == "update" && self.api.get(SECRET).is_none() {
            // An existing, empty Secret is written by an update.
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
            manages_certificate: true,
            ..Start::default()
        };
        let mut command = start.command(self.folder.path());
        let (code, stdout, stderr) = decode_output(&command.stdin(Stdio::null()).output().unwrap());
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        let last = stderr.lines().last().unwrap().to_owned();
        assert!(last.starts_with("error: cannot "), "{last}");
        last
    }
}

#[test]
fn helm_test_reports_whether_the_webhook_acts() {
    let cluster = Cluster::install();
    let hooks = render_with_hooks(&[DATABASE]);
    let is_rbac = |object: &&Value| {
        object["metadata"]["name"] == "llm-billing-webhook-test" && object["kind"] != "Pod"
    };
    let container = &of_kind(&hooks, "Pod")["spec"]["containers"][0];
    let arguments: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
    let check = || {
        let user = format!("system:serviceaccount:{RELEASE}:{RELEASE}-test");
        let kubeconfig = cluster.api.kubeconfig(cluster.folder.path(), Some(&user));
        let mut command = program(&[]);
        let is_not_mounted = |argument: &&String| !argument.starts_with("--policy=");
        command
            .args(arguments.iter().filter(is_not_mounted))
            .env("KUBECONFIG", kubeconfig);
        let (code, stdout, stderr) = decode_output(&command.output().unwrap());
        assert_eq!(stderr, "");
        (code, stdout.lines().last().unwrap().to_owned())
    };
    let (code, message) = check();
    assert_eq!(code, 2);
    assert!(
        message.starts_with("error cluster      the API server refused the request: pods")
            && message.contains("is forbidden"),
        "{message}"
    );
    cluster.api.create_all(hooks.iter().filter(is_rbac));
    let (code, message) = check();
    assert_eq!(code, 2);
    assert!(message.contains("failed calling webhook"), "{message}");
    let replica = cluster.start(&cluster.address(), "90d", "365d");
    let expected =
        "ok    cluster      a new pod in default has MOLECULE_LLM_BILLING_MODE=platform_managed";
    assert_eq!(check(), (0, expected.to_owned()));
    drop(replica);
    // The test's policy has no proxy here, because it is not mounted.
    let replica = cluster.start_with("", &cluster.address(), "90d", "365d");
    let expected = "warn  cluster      the webhook refuses a new platform_managed pod in default, because the policy has no complete proxy";
    assert_eq!(check(), (0, expected.to_owned()));
    drop(replica);
    cluster.api.delete(CONFIGURATION);
    cluster.api.delete(GUARD);
    let (code, message) = check();
    assert_eq!(code, 2);
    let expected = "error cluster      a new pod in default has no MOLECULE_LLM_BILLING_MODE; see the webhook configuration";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn no_key_is_logged_at_trace_level() {
    let cluster = Cluster::install();
    let kubeconfig = cluster.kubeconfig();
    let arguments = cluster.arguments("127.0.0.1:0", "10s", "20s");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = Start {
        database_url: "sqlite://nowhere.sqlite",
        arguments: &arguments,
        environment: &[("KUBECONFIG", &kubeconfig)],
        manages_certificate: true,
        log: "trace",
        ..Start::default()
    };
    let webhook = start.start();
    let mut keys = Vec::new();
    for field in ["ca.key", "tls.key"] {
        let pem = cluster.secret(field).unwrap();
        keys.push(pem.lines().nth(1).unwrap().to_owned());
        // The encoding in the API server's answer.
        keys.push(STANDARD.encode(&pem)[40..80].to_owned());
    }
    webhook.wait_for_log("\"certificate reloaded\"");
    let log = webhook.log();
    for key in keys {
        assert!(!log.contains(&key), "{log}");
    }
}

#[test]
fn contradictory_flags_and_missing_cluster_are_reported() {
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
        decode_output(&command.output().unwrap())
    };
    let shared = &["--tls-secret", "s", "--tls-dns-name", "w.ns.svc"];
    let table: [(&[&str], &str); 4] = [
        (&["--tls-secret", "s"], "error: no DNS name is given; set --tls-dns-name"),
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
            "error: --tls-secret replaces --tls-cert and --tls-key",
        ),
        (
            shared,
            "error: no cluster configured: set KUBECONFIG, or run in a pod with a service account token",
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
