//! Operating an installation: Helm, the chart's service account, rollouts, audits and the commands in the docs.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::world::{BYOK, MANAGED, NAMESPACE, SetOnDrop, World, assert_env_matches, pod, policy};
use test_support::WORKSPACE_LABEL;
use test_support::chart::{RELEASE, chart, of_kind, render};
use test_support::haproxy::{Haproxy, Slot};
use test_support::load::LONG_LOOKUP_TIMEOUT;
use test_support::postgres::{Postgres, free_port};
use test_support::program::{Authority, Start, Webhook, decode_output, program, wait_for};
use test_support::transcript::{commands, page};

#[test]
fn rolling_both_instances_over_fails_no_create() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let (authority, slots) = (Authority::generate(), [Slot::free(), Slot::free()]);
    // The guard refuses a pod whose lookup misses its deadline, which a busy machine may cause.
    let policy = policy(&format!("lookup: {{timeout: {LONG_LOOKUP_TIMEOUT}}}"));
    let start = |slot: Slot| slot.start(&authority, &policy, &postgres.url());
    let mut instances = slots.map(start);
    let proxy = Haproxy::start(&slots);
    world.configure(&["guard.enabled=true"], proxy.port, &authority.pem());

    let started = Instant::now();
    create_during(&world, true, || {
        for (instance, slot) in instances.iter_mut().zip(slots) {
            std::thread::sleep(Duration::from_secs(1));
            instance.signal("TERM");
            assert_eq!(instance.wait().code(), Some(0));
            *instance = start(slot);
            instance.wait_until_ready();
        }
    });
    let (created, seconds) = (world.pods().len(), started.elapsed().as_secs_f64());
    println!("{created} pods in {seconds:.1} s, {:.0} a second", created as f64 / seconds);
    assert!(created > 100, "{created}");
}

/// Creates 50 byok pods a second while the closure runs. Panics if one is refused or, if `are_changed`, unchanged.
fn create_during(world: &World, are_changed: bool, work: impl FnOnce()) {
    // A create starts every 20 ms, independent of the others' progress.
    const CREATE_INTERVAL: Duration = Duration::from_millis(20);
    const CREATORS: usize = 10;
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let started = Instant::now();
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    std::thread::scope(|scope| {
        for _ in 0..CREATORS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let offset = CREATE_INTERVAL * u32::try_from(number).unwrap();
                    std::thread::sleep(offset.saturating_sub(started.elapsed()));
                    let mut pod = pod("", BYOK, &json!([]));
                    pod["metadata"]["name"].take();
                    pod["metadata"]["generateName"] = "p-".into();
                    let (status, created) = world.api.request("POST", &path, Some(&pod));
                    assert_eq!(status, 201, "{number}: {created}");
                    if are_changed {
                        assert_env_matches(&created["spec"]["containers"][0], "byok");
                    }
                }
            });
        }
        // Ends the creators even after a panic; creates in progress finish.
        let _guard = SetOnDrop(&is_over);
        work();
    });
}

#[test]
fn audit_finds_changed_mode_and_eviction_recreates_pods() {
    let Some(mut world) = World::start() else {
        return;
    };
    let postgres = World::workspaces();
    let webhook = world.install(&postgres, &policy(""), &[]);
    if !world.start_controllers() {
        return;
    }
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ws", "namespace": NAMESPACE},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": "ws"}},
            "template": {
                "metadata": {"labels": {"app": "ws", WORKSPACE_LABEL: BYOK}},
                "spec": {"containers": [{"name": "agent", "image": "busybox"}]},
            },
        },
    });
    world.api.create_all([&deployment]);
    let wait_for_pods = |mode: &str| {
        wait_for("both pods exist", || {
            let pods = world.pods();
            let in_mode = pods.iter().filter(|pod| {
                pod["metadata"]["annotations"]["molecule.ai/llm-billing-mode"] == mode
            });
            (in_mode.count() == 2 && pods.len() == 2).then_some(())
        });
    };
    wait_for_pods("byok");
    let policy = webhook.folder.path().join("policy.yaml");
    let audit = |more: &[&str]| {
        let mut command = program(&["audit", "-A", "--only-drift", "-o", "csv"]);
        command
            .args([
                "--policy",
                policy.to_str().unwrap(),
                "--database-url",
                &postgres.url(),
            ])
            .args(more)
            .env("KUBECONFIG", world.kubeconfig());
        decode_output(&command.output().unwrap())
    };
    assert_eq!(audit(&[]).0, 0);
    postgres.execute(&format!(
        "UPDATE workspaces SET llm_billing_mode = 'platform_managed' WHERE id = '{BYOK}'"
    ));
    let (code, stdout, _) = audit(&[]);
    assert_eq!(code, 1);
    assert_eq!(stdout.matches("platform_managed,byok,").count(), 2, "{stdout}");
    let (code, _, stderr) = audit(&["--evict", "--yes", "--evictions-per-minute", "600"]);
    assert_eq!(code, 1);
    assert_eq!(stderr.matches("evicted ws-acme/ws-").count(), 2, "{stderr}");
    wait_for_pods("platform_managed");
    let (code, _, stderr) = audit(&[]);
    assert_eq!((code, stderr.as_str()), (0, "2 pods audited, all in sync\n"));
}

/// Runs a page's kubectl and helm commands on a new cluster. Commands that need a running pod or a user's file are
/// skipped with a message.
fn run_commands_of(name: &str, is_installed: bool) {
    let Some(world) = World::start() else { return };
    let install = page("docs/install.md");
    let values = install.split("```yaml\n# values.yaml\n").nth(1).unwrap();
    let values = world.write("values.yaml", values.split("```").next().unwrap());
    let shell = |script: &str| world.tool("bash", &["-c", script]);
    let helm_install =
        format!("helm install {RELEASE} {} -n {RELEASE} -f {values}", chart().display());
    let authority = Authority::generate();
    let ca = world.write("ca.crt", &authority.pem());
    let certificate = world.write("tls.crt", &authority.issue("localhost").0);
    let make_certificate = format!(
        "kubectl -n {RELEASE} create secret generic {RELEASE}-certificate \
         --from-file=ca.crt={ca} --from-literal=ca.key=x --from-file=tls.crt={certificate}"
    );
    let mut has_release = is_installed;
    if is_installed {
        let prepare = format!(
            "set -e; kubectl create namespace {RELEASE}; {helm_install} --set converge.enabled=true; {make_certificate}"
        );
        assert_eq!(shell(&prepare).0, 0);
    }
    for block in commands(&page(name)) {
        let script = block.replace("\\\n", "").replace("|\n", "| ");
        // A block with a substitution runs as one script, since its lines share variables.
        let steps: Vec<&str> = match script.contains("$(") {
            true => vec![&script],
            false => script.lines().map(str::trim).collect(),
        };
        for step in steps {
            if !step.contains("kubectl ") && !step.contains("helm ") {
                continue;
            }
            let needs_more = [
                " logs ",
                " exec ",
                " top ",
                "port-forward",
                "test llm-billing",
                "apply -k",
            ];
            if needs_more.iter().any(|part| step.contains(part)) {
                eprintln!("skipped, needs a kubelet, a metrics server or a user's file: {step}");
                continue;
            }
            if step.contains("delete validatingwebhookconfiguration llm") {
                // An earlier command of the page uninstalled it.
                shell(&helm_install);
            }
            if step.contains("/data/ca.key") {
                shell(&make_certificate);
            }
            let mut command = step.replace("values.yaml", &values).replace("--wait", "");
            if step.starts_with("helm install") && std::mem::replace(&mut has_release, true) {
                command = command.replace("--create-namespace", "") + " --dry-run=server";
            }
            let (code, _, stderr) = shell(&format!("set -o pipefail; {command}"));
            let is_ok = code == 0
                // grep may find nothing.
                || code == 1 && command.contains("| grep") && !stderr.contains("rror")
                // Without a kubelet the webhook does not run, but the API server calls it.
                || stderr.contains("failed calling webhook");
            assert!(is_ok, "{name}: {step}: {code} {stderr}");
        }
    }
}

#[test]
fn commands_of_the_install_page_work() {
    run_commands_of("docs/install.md", false);
}

#[test]
fn commands_of_runbook_and_readme_work() {
    run_commands_of("docs/runbook.md", true);
    run_commands_of("README.md", true);
}

/// Runs the program with the Deployment's arguments and its service account's token, since there is no kubelet, and points
/// the Service to it.
fn run_release(world: &World, settings: &[&str], port: u16, postgres: &Postgres) -> Webhook {
    let service = json!({"spec": {"type": "ExternalName", "externalName": "localhost", "clusterIP": null, "clusterIPs": null, "selector": null}});
    world.kubectl_ok(&[
        "-n",
        RELEASE,
        "patch",
        "service",
        RELEASE,
        "--type=merge",
        "-p",
        &service.to_string(),
    ]);
    let token = world.kubectl_ok(&["-n", RELEASE, "create", "token", RELEASE]);
    let kubeconfig = world
        .api
        .kubeconfig_with_token(world.folder.path(), token.trim());
    let objects = render(settings);
    let container = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    let chart_arguments: Vec<&str> = container["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one.as_str().unwrap())
        .collect();
    let address = format!("127.0.0.1:{port}");
    let is_used = |argument: &&str| argument.starts_with("--tls-");
    let mut program_arguments: Vec<&str> = chart_arguments.into_iter().filter(is_used).collect();
    program_arguments.extend(["--listen", &address, "--health-listen", "127.0.0.1:0"]);
    Start {
        policy: &policy(""),
        database_url: &postgres.url(),
        arguments: &program_arguments,
        environment: &[("KUBECONFIG", kubeconfig.to_str().unwrap())],
        manages_certificate: true,
        ..Start::default()
    }
    .start()
}

#[test]
fn upgrade_with_the_guard_refuses_no_pod() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let port = free_port();
    let service_port = format!("webhook.servicePort={port}");
    let settings = ["database.existingSecret=db", &service_port];
    let chart = chart();
    let release = |command: &str, more: &[&str]| {
        let mut arguments = vec![command, RELEASE, chart.to_str().unwrap(), "-n", RELEASE];
        let settings = settings.iter().chain(more);
        arguments.extend(settings.flat_map(|setting| ["--set", setting]));
        if command == "install" {
            arguments.push("--create-namespace");
        }
        let (code, _, stderr) = world.tool("helm", &arguments);
        assert_eq!(code, 0, "{command} {more:?}: {stderr}");
    };
    let ca_bundle = |kind: &str| {
        let path = "jsonpath={.webhooks[0].clientConfig.caBundle}";
        let (code, bundle, _) = world.kubectl(&["get", kind, RELEASE, "-o", path]);
        (code == 0 && !bundle.is_empty()).then_some(())
    };
    let (mutating, validating) = ("mutatingwebhookconfiguration", "validatingwebhookconfiguration");

    let more_pods = || {
        let before = world.pods().len();
        wait_for("100 more pods exist", || (world.pods().len() >= before + 100).then_some(()));
    };

    // The first install: pods are admitted, unchanged until the first replica is ready.
    let mut webhook = None;
    create_during(&world, false, || {
        release("install", &[]);
        webhook = Some(run_release(&world, &settings, port, &postgres));
        wait_for("the webhook is written", || ca_bundle(mutating));
        world.wait_until_called(NAMESPACE);
    });
    // No replica of the new revision ever runs, as with an image that cannot be pulled.
    create_during(&world, true, || {
        release("upgrade", &["guard.enabled=true", "image.tag=missing"]);
        wait_for("the guard is written", || ca_bundle(validating));
        more_pods();
        let (code, _, stderr) = world.tool("helm", &["rollback", RELEASE, "1", "-n", RELEASE]);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(ca_bundle(validating), None);
        release("upgrade", &["guard.enabled=true"]);
        wait_for("the guard is written", || ca_bundle(validating));
        more_pods();
    });
    // The configurations are deleted in an emergency, and an upgrade brings them back.
    world.kubectl_ok(&["delete", validating, RELEASE]);
    world.kubectl_ok(&["delete", mutating, RELEASE]);
    create_during(&world, false, || {
        release("upgrade", &["guard.enabled=true"]);
        wait_for("the webhook is written", || ca_bundle(mutating));
        wait_for("the guard is written", || ca_bundle(validating));
        world.wait_until_called(NAMESPACE);
    });
    let webhook = webhook.unwrap();
    assert!(!webhook.log().contains("\"ERROR\""), "{}", webhook.log());
}

#[test]
fn helm_release_works_and_uninstalls_cleanly() {
    let Some(world) = World::start() else { return };
    let postgres = World::workspaces();
    let port = free_port();
    let service_port = format!("webhook.servicePort={port}");
    let settings = [
        "database.existingSecret=db",
        "guard.enabled=true",
        &service_port,
    ];
    let mut arguments = vec!["-n", RELEASE];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let chart = chart();
    let chart = chart.to_str().unwrap();
    let helm = |command: &[&str]| {
        let (code, stdout, stderr) = world.tool("helm", command);
        assert_eq!(code, 0, "{command:?}: {stderr}");
        stdout
    };
    let notes = helm(
        &[
            &["install", RELEASE, chart, "--create-namespace"],
            &arguments[..],
        ]
        .concat(),
    );
    assert!(notes.contains("WARNING: policy.proxy is not set"), "{notes}");

    let webhook = run_release(&world, &settings, port, &postgres);
    world.wait_until_called(NAMESPACE);
    world.api.create_all([&pod("first", BYOK, &json!([]))]);
    assert_env_matches(&world.stored("first").unwrap()["spec"]["containers"][0], "byok");

    // An upgrade keeps caBundle.
    helm(
        &[
            &["upgrade", RELEASE, chart],
            &arguments[..],
            &["--set", "replicas=3"],
        ]
        .concat(),
    );
    for kind in [
        "mutatingwebhookconfiguration",
        "validatingwebhookconfiguration",
    ] {
        let bundle = world.kubectl_ok(&[
            "get",
            kind,
            RELEASE,
            "-o",
            "jsonpath={.webhooks[0].clientConfig.caBundle}",
        ]);
        assert!(bundle.len() > 100, "{kind}: {bundle}");
    }

    drop(webhook);
    helm(&["uninstall", RELEASE, "-n", RELEASE]);
    wait_for("pods are created unchanged", || {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All");
        let (status, created) =
            world
                .api
                .request("POST", &path, Some(&pod("after", MANAGED, &json!([]))));
        (status == 201 && created["spec"]["containers"][0].get("env").is_none()).then_some(())
    });
    let left: Value = serde_json::from_str(&world.kubectl_ok(&[
        "get",
        "all,secrets,configmaps,roles,rolebindings,mutatingwebhookconfigurations,validatingwebhookconfigurations,clusterroles,clusterrolebindings",
        "-n",
        RELEASE,
        "-o",
        "json",
    ]))
    .unwrap();
    let names = left["items"].as_array().unwrap().iter();
    let left: Vec<&str> = names
        .map(|object| object["metadata"]["name"].as_str().unwrap())
        .filter(|name| name.contains(RELEASE))
        .collect();
    // The program created it, so Helm does not delete it.
    assert_eq!(left, ["llm-billing-webhook-certificate"]);
}
