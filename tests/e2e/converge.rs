//! `converge`: running pods follow a switch in the database, under faults too. There is no kubelet, so the tests mark pods
//! as ready themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::creation::workload;
use crate::world::{BYOK, NAMESPACE, SetOnDrop, World, pod, policy};
use test_support::chart::{RELEASE, render};
use test_support::converge::{self, comparisons, wait_for_metric};
use test_support::postgres::Postgres;
use test_support::program::{Running, Webhook, health, wait_for};
use test_support::transcript::{page, sql};

/// The arguments of several replicas.
const REPLICA: [&str; 5] = [
    "--apply",
    "--lease",
    "converge",
    "--lease-namespace",
    "default",
];

/// A cluster with controllers, the webhook and its database.
struct Platform {
    world: World,
    postgres: Postgres,
    _webhook: Webhook,
    policy: String,
}

impl Platform {
    fn start() -> Option<Self> {
        let mut world = World::start()?;
        let postgres = World::workspaces();
        postgres.execute(&sql(&page("docs/audit.md")));
        let webhook = world.install(&postgres, &policy(""), &[]);
        if !world.start_controllers() {
            return None;
        }
        let policy = world.write("policy.yaml", &policy("lookup: {channel: llm_billing_modes}"));
        Some(Self {
            world,
            postgres,
            _webhook: webhook,
            policy,
        })
    }

    /// Starts a platform with these workloads of one pod each, and waits until their pods exist.
    fn with(workloads: &[&Value]) -> Option<Self> {
        let platform = Self::start()?;
        platform.world.api.create_all(workloads.iter().copied());
        wait_for("the pods exist", || (platform.modes().len() == workloads.len()).then_some(()));
        platform.mark_ready();
        Some(platform)
    }

    /// Waits until there is this number of pods, all with this mode.
    fn wait_for_modes(&self, count: usize, mode: &str) {
        wait_for(&format!("{count} pods are {mode}"), || {
            let modes = self.modes();
            (modes.len() == count && modes.values().all(|own| own == mode)).then_some(())
        });
    }

    /// Starts `converge`, waits until it has compared the pods, and returns it with the address of its health endpoint.
    fn converge(&self, arguments: &[&str]) -> (Running, SocketAddr) {
        let (running, address) = self.start_converge(arguments, self.world.kubeconfig());
        wait_for("the pods are compared", || (health(address, "/readyz").0 == 200).then_some(()));
        (running, address)
    }

    fn start_converge(&self, arguments: &[&str], kubeconfig: &str) -> (Running, SocketAddr) {
        converge::start(&self.policy, &self.postgres, kubeconfig, arguments)
    }

    fn set(&self, mode: &str) {
        set_mode(&self.postgres, mode);
    }

    /// Deletes the webhook configuration, so that new pods are no longer mutated.
    fn stop_mutating(&self) {
        self.world.kubectl_ok(&[
            "delete",
            "mutatingwebhookconfiguration",
            "llm-billing-webhook",
        ]);
        let probe = pod("probe", BYOK, &json!([]));
        wait_for("the webhook is not called any more", || {
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All");
            let created = self.world.api.request("POST", &path, Some(&probe)).1;
            created["metadata"]
                .get("annotations")
                .is_none()
                .then_some(())
        });
    }

    /// Returns the mode of each pod that is not terminating, by its name.
    fn modes(&self) -> BTreeMap<String, String> {
        let pods = self.world.pods().into_iter();
        let living = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let mode =
            |pod: &Value| pod["metadata"]["annotations"]["molecule.ai/llm-billing-mode"].clone();
        let text = |value: Value| value.as_str().unwrap_or("-").to_owned();
        living
            .map(|pod| (text(pod["metadata"]["name"].clone()), text(mode(&pod))))
            .collect()
    }

    /// Runs the closure while all pods are marked as ready.
    fn with_kubelet(&self, work: impl FnOnce()) {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    self.mark_ready();
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
            let guard = SetOnDrop(&is_over);
            work();
            drop(guard);
        });
    }

    fn mark_ready(&self) {
        for pod in self.world.pods() {
            if pod["status"]["phase"] == "Running" {
                continue;
            }
            let name = pod["metadata"]["name"].as_str().unwrap();
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}/status");
            let mut ready = pod.clone();
            ready["status"] = json!({"phase": "Running", "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ]});
            // The pod may be gone, or may have changed.
            self.world.api.request("PUT", &path, Some(&ready));
        }
    }
}

fn set_mode(postgres: &Postgres, mode: &str) {
    postgres
        .execute(&format!("UPDATE workspaces SET llm_billing_mode = '{mode}' WHERE id = '{BYOK}'"));
}

/// Returns a ReplicaSet that belongs to no Deployment.
fn replica_set() -> Value {
    let mut replica_set = workload(1, "Deployment", BYOK);
    replica_set["kind"] = "ReplicaSet".into();
    replica_set["metadata"]["name"] = "replicaset-1".into();
    for field in ["selector", "template"] {
        let labels = ["/matchLabels/of", "/metadata/labels/of"];
        for label in labels {
            if let Some(of) = replica_set["spec"][field].pointer_mut(label) {
                *of = "ReplicaSet".into();
            }
        }
    }
    replica_set
}

#[test]
fn each_kind_of_owner_follows_a_switch() {
    let Some(platform) = Platform::start() else {
        return;
    };
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}});
    platform.world.api.create_all([&node, &replica_set()]);
    for kind in ["Deployment", "StatefulSet", "DaemonSet", "Job"] {
        platform.world.api.create_all([&workload(1, kind, BYOK)]);
    }
    platform
        .world
        .api
        .create_all([&pod("bare", BYOK, &json!([]))]);
    platform.with_kubelet(|| {
        wait_for("all pods exist", || (platform.modes().len() == 6).then_some(()));
        assert!(platform.modes().values().all(|mode| mode == "byok"));
        let before: BTreeSet<String> = platform.modes().into_keys().collect();
        let (converge, address) = platform.converge(&["--apply"]);
        converge.wait_for_log("listening for changed rows");
        platform.set("platform_managed");
        let switched = Instant::now();
        let mut followed = BTreeSet::new();
        wait_for("all pods but the bare one have the new mode", || {
            let modes = platform.modes();
            let managed: BTreeSet<String> = modes
                .iter()
                .filter(|(_, mode)| *mode == "platform_managed")
                .filter_map(|(name, _)| Some(name.split_once('-')?.0.to_owned()))
                .collect();
            for kind in managed.difference(&followed) {
                println!("{kind}: a new pod {:.1?} after the switch", switched.elapsed());
            }
            followed.extend(managed);
            (modes.len() == 6 && followed.len() == 5).then_some(())
        });
        assert_eq!(platform.modes()["bare"], "byok");
        for kind in [
            "Deployment",
            "StatefulSet",
            "DaemonSet",
            "Job",
            "ReplicaSet",
        ] {
            for result in ["begun", "succeeded"] {
                let line = format!(
                    "llm_billing_recreations_total{{kind=\"{kind}\",result=\"{result}\"}} 1"
                );
                wait_for_metric(address, &line);
            }
        }
        wait_for_metric(address, "llm_billing_switches_total 1");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"bare\"} 1");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 0");
        let after: BTreeSet<String> = platform.modes().into_keys().collect();
        // A StatefulSet's pod has its name again.
        let same: Vec<&String> = before.intersection(&after).collect();
        assert_eq!(same, ["bare", "statefulset-1-0"]);
    });
}

#[test]
fn switch_is_followed_without_notifications() {
    let workloads = ["Deployment", "StatefulSet"].map(|kind| workload(1, kind, BYOK));
    let Some(mut platform) = Platform::with(&workloads.each_ref()) else {
        return;
    };
    platform.policy = platform.world.write("policy.yaml", &policy(""));
    let (converge, _) = platform.converge(&["--apply", "--interval", "2s"]);
    platform.with_kubelet(|| {
        platform.set("disabled");
        let switched = Instant::now();
        platform.wait_for_modes(2, "disabled");
        println!("the last of two {:.1?} after the switch", switched.elapsed());
    });
    assert!(!converge.log().contains("listening for changed rows"), "{}", converge.log());
}

#[test]
fn nothing_is_recreated_without_apply() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    platform.with_kubelet(|| {
        let before = platform.modes();
        let (converge, address) = platform.converge(&[]);
        platform.set("disabled");
        converge.wait_for_log("would be recreated (--apply is not set)");
        assert_eq!(platform.modes(), before);
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 1");
        let line = "llm_billing_drift_pods{mode=\"disabled\",finding=\"wrong_mode\"} 1";
        wait_for_metric(address, line);
        let path = format!("/api/v1/namespaces/{NAMESPACE}/events");
        let events = wait_for("the event is written", || {
            let events = platform.world.api.get(&path).unwrap()["items"].clone();
            let events = events.as_array().unwrap().clone();
            let mut drift = events
                .into_iter()
                .filter(|event| event["reason"] == "LlmBillingDrift");
            drift.next()
        });
        let message = events["message"].as_str().unwrap();
        let expected = format!(
            "the env of this pod does not match the billing mode (wrong_mode): container \"init\": \
             MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED; container \"agent\": \
             MOLECULE_LLM_BILLING_MODE, MOLECULE_LLM_BILLING_MODE_RESOLVED; \
             {NAMESPACE}/Deployment/deployment-1 would be recreated (--apply is not set)"
        );
        assert_eq!(message, expected);
    });
}

#[test]
fn nothing_is_recreated_at_the_start_or_out_of_scope() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    let label = |label: &str| {
        platform
            .world
            .kubectl_ok(&["label", "namespace", NAMESPACE, label]);
    };
    label("team=a");
    let before = platform.modes();
    let arguments = [
        "--apply",
        "--start-delay",
        "1h",
        "--namespace-selector",
        "team=a",
    ];
    let (_converge, address) = platform.converge(&[&arguments[..], &["--interval", "1s"]].concat());
    platform.set("disabled");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 1");
    assert_eq!(platform.modes(), before);
    label("team-");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 0");
    assert_eq!(platform.modes(), before);
}

#[test]
fn paused_workload_is_left_alone() {
    let annotations = json!({"molecule.ai/llm-billing-converge": "paused"});
    // By an annotation of its own, and of its pods.
    let mut deployment = workload(1, "Deployment", BYOK);
    deployment["metadata"]["annotations"] = annotations.clone();
    let mut replica_set = replica_set();
    replica_set["spec"]["template"]["metadata"]["annotations"] = annotations;
    let Some(platform) = Platform::with(&[&deployment, &replica_set]) else {
        return;
    };
    platform.with_kubelet(|| {
        let before = platform.modes();
        let (_converge, address) = platform.converge(&["--apply"]);
        platform.set("disabled");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"paused\"} 2");
        assert_eq!(platform.modes(), before);
        // The annotation is read again.
        let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/deployment-1");
        platform
            .world
            .api
            .change(&path, |deployment| drop(deployment["metadata"]["annotations"].take()));
        wait_for_metric(
            address,
            "llm_billing_recreations_total{kind=\"Deployment\",result=\"succeeded\"} 1",
        );
        let still = platform.modes();
        let kept = before.keys().filter(|name| name.starts_with("replicaset"));
        assert!(
            kept.clone().count() == 1 && kept.clone().all(|name| still.contains_key(name)),
            "{still:?}"
        );
    });
}

#[test]
fn pod_that_stays_out_of_sync_is_recreated_once() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    platform.with_kubelet(|| {
        let (converge, address) = platform.converge(&["--apply"]);
        platform.stop_mutating();
        platform.set("disabled");
        converge.wait_for_log("recreation failed; it is not repeated for this mode");
        let line = "llm_billing_recreations_total{kind=\"Deployment\",result=\"failed\"} 1";
        wait_for_metric(address, line);
        wait_for_metric(
            address,
            "llm_billing_recreations_total{kind=\"Deployment\",result=\"begun\"} 1",
        );
        platform.wait_for_modes(1, "-");
        let stays = platform.modes();
        // A notification that changes nothing.
        let compared = comparisons(address);
        platform.set("disabled");
        wait_for("one more comparison", || (comparisons(address) > compared).then_some(()));
        assert_eq!(platform.modes(), stays);
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 1");
    });
}

#[test]
fn deployment_that_cannot_come_up_is_recreated_once() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    // Nothing marks the new pod as ready, as if its image were gone.
    let (converge, address) = platform.converge(&["--apply", "--recreation-timeout", "2s"]);
    platform.set("disabled");
    let failed = converge.wait_for_log("recreation failed; it is not repeated for this mode");
    assert!(failed.contains("timed_out"), "{failed}");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 1");
    let compared = comparisons(address);
    platform.set("disabled");
    wait_for("one more comparison", || (comparisons(address) > compared).then_some(()));
    assert_eq!(converge.log().matches("\"recreating\"").count(), 1, "{}", converge.log());
    platform.with_kubelet(|| {
        platform.wait_for_modes(1, "disabled");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 0");
    });
}

#[test]
fn nothing_is_recreated_outside_the_window() {
    let Some(platform) = Platform::with(&[&workload(1, "StatefulSet", BYOK)]) else {
        return;
    };
    let window = |from: i64, to: i64| {
        let at = |hours| OffsetDateTime::now_utc() + time::Duration::hours(hours);
        format!("{:02}:00-{:02}:00", at(from).hour(), at(to).hour())
    };
    let before = platform.modes();
    let (closed, address) = platform.converge(&["--apply", "--window", &window(2, 4)]);
    platform.set("disabled");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"waiting\"} 1");
    assert!(!closed.log().contains("\"recreating\""), "{}", closed.log());
    assert_eq!(platform.modes(), before);
    drop(closed);
    let (_open, _) = platform.converge(&["--apply", "--window", &window(-1, 2)]);
    platform.with_kubelet(|| platform.wait_for_modes(1, "disabled"));
}

#[test]
fn switches_back_and_forth_end_in_sync() {
    let workloads = ["Deployment", "StatefulSet"].map(|kind| {
        let mut workload = workload(1, kind, BYOK);
        workload["spec"]["replicas"] = 3.into();
        workload
    });
    let Some(platform) = Platform::start() else {
        return;
    };
    platform.world.api.create_all(&workloads);
    platform.with_kubelet(|| {
        platform.wait_for_modes(6, "byok");
        let (converge, address) = platform.converge(&["--apply"]);
        for mode in ["disabled", "byok", "disabled", "byok", "disabled"] {
            platform.set(mode);
            wait_for("a pod has the mode", || {
                let mut modes = platform.modes().into_values();
                modes.any(|own| own == mode).then_some(())
            });
        }
        platform.wait_for_modes(6, "disabled");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 0");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 0");
        let log = converge.log();
        assert!(!log.contains("recreation failed"), "{log}");
        // At most once for each workload and switch.
        assert!(log.matches("\"recreating\"").count() <= 10, "{log}");
    });
}

#[test]
fn second_replica_takes_over() {
    let Some(platform) = Platform::with(&[&workload(1, "StatefulSet", BYOK)]) else {
        return;
    };
    platform.with_kubelet(|| {
        let (first, address) = platform.converge(&REPLICA);
        first.wait_for_log("\"is_active\":true");
        let (second, other) = platform.converge(&REPLICA);
        wait_for_metric(address, "llm_billing_converge_active 1");
        wait_for_metric(other, "llm_billing_converge_active 0");
        platform.set("disabled");
        platform.wait_for_modes(1, "disabled");
        assert!(!second.log().contains("recreating"), "{}", second.log());
        // The first replica cannot give the Lease up.
        first.signal("KILL");
        let killed = Instant::now();
        second.wait_for_log("\"is_active\":true");
        println!(
            "the second replica is active {:.1?} after the end of the first",
            killed.elapsed()
        );
        platform.set("byok");
        platform.wait_for_modes(1, "byok");
        second.wait_for_log("recreated");
        assert_eq!(second.log().matches("\"recreating\"").count(), 1, "{}", second.log());
        // A replica that ends gives it up.
        let (third, _) = platform.converge(&REPLICA);
        second.signal("TERM");
        third.wait_for_log("\"is_active\":true");
    });
}

#[test]
fn switch_is_followed_once_the_api_server_is_back() {
    let Some(mut platform) = Platform::with(&[&workload(1, "StatefulSet", BYOK)]) else {
        return;
    };
    let (converge, _) = platform.converge(&REPLICA);
    converge.wait_for_log("\"is_active\":true");
    let plane = platform.world.api.control_plane.as_mut().unwrap();
    plane.without_api_server(|| {
        set_mode(&platform.postgres, "disabled");
        converge.wait_for_log("\"is_active\":false");
    });
    platform.with_kubelet(|| {
        platform.wait_for_modes(1, "disabled");
        converge.wait_for_log("\"recreated\"");
    });
    assert_eq!(converge.log().matches("\"recreating\"").count(), 1, "{}", converge.log());
}

#[test]
fn failure_outlasts_a_lapse_of_the_lease() {
    let Some(mut platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    let (converge, address) = platform.converge(&REPLICA);
    converge.wait_for_log("\"is_active\":true");
    platform.stop_mutating();
    platform.with_kubelet(|| {
        platform.set("disabled");
        wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 1");
        platform.wait_for_modes(1, "-");
    });
    let plane = platform.world.api.control_plane.as_mut().unwrap();
    plane.without_api_server(|| {
        converge.wait_for_log("\"is_active\":false");
    });
    wait_for_metric(address, "llm_billing_converge_active 1");
    let compared = comparisons(address);
    platform.set("disabled");
    wait_for("one more comparison", || (comparisons(address) > compared).then_some(()));
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"failed\"} 1");
    assert_eq!(converge.log().matches("\"recreating\"").count(), 1, "{}", converge.log());
}

#[test]
fn pod_that_a_budget_keeps_delays_no_other() {
    let Some(platform) = Platform::with(&[&workload(1, "StatefulSet", BYOK), &replica_set()])
    else {
        return;
    };
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": "keep", "namespace": NAMESPACE},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"of": "ReplicaSet"}}},
    });
    platform.world.api.create_all([&budget]);
    let path = format!("/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/keep");
    wait_for("the budget is counted", || {
        let status = platform.world.api.get(&path).unwrap()["status"].clone();
        (status["currentHealthy"] == 1).then_some(())
    });
    let kept = || {
        let modes = platform.modes();
        let mut of_replica_set = modes
            .into_iter()
            .filter(|(name, _)| name.starts_with("replicaset"));
        of_replica_set.next()
    };
    let before = kept();
    platform.with_kubelet(|| {
        let (converge, address) = platform.converge(&["--apply"]);
        platform.set("disabled");
        converge.wait_for_log("a pod cannot be evicted yet");
        let succeeded = |kind: &str| {
            let line =
                format!("llm_billing_recreations_total{{kind=\"{kind}\",result=\"succeeded\"}} 1");
            wait_for_metric(address, &line);
        };
        succeeded("StatefulSet");
        assert_eq!(kept(), before);
        platform.world.api.delete(&path);
        succeeded("ReplicaSet");
        platform.wait_for_modes(2, "disabled");
        // The attempt went on.
        assert_eq!(converge.log().matches("\"recreating\"").count(), 2, "{}", converge.log());
    });
}

#[test]
fn recreation_lasts_until_the_new_pod_is_ready() {
    let Some(platform) = Platform::with(&[&workload(1, "StatefulSet", BYOK)]) else {
        return;
    };
    let (_converge, address) = platform.converge(&["--apply"]);
    platform.set("disabled");
    platform.wait_for_modes(1, "disabled");
    let compared = comparisons(address);
    platform.set("disabled");
    wait_for("one more comparison", || (comparisons(address) > compared).then_some(()));
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 1");
    platform.mark_ready();
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 0");
    wait_for_metric(
        address,
        "llm_billing_recreations_total{kind=\"StatefulSet\",result=\"succeeded\"} 1",
    );
}

#[test]
fn rollout_goes_on_under_the_next_replica() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    let (first, _) = platform.converge(&REPLICA);
    first.wait_for_log("\"is_active\":true");
    platform.set("disabled");
    // The new pod is not ready, so that the old one stays.
    wait_for("the new pod exists", || (platform.modes().len() == 2).then_some(()));
    let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/deployment-1");
    let template = || platform.world.api.get(&path).unwrap()["spec"]["template"].clone();
    let restarted = template();
    first.signal("KILL");
    let (second, _) = platform.converge(&REPLICA);
    second.wait_for_log("a rollout is in progress");
    platform.with_kubelet(|| {
        second.wait_for_log("\"recreated\"");
        let modes = platform.modes();
        assert!(modes.len() == 1 && modes.values().all(|mode| mode == "disabled"), "{modes:?}");
    });
    assert_eq!(template(), restarted);
}

#[test]
fn nothing_is_recreated_while_the_database_is_away() {
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK)]) else {
        return;
    };
    platform.with_kubelet(|| {
        let before = platform.modes();
        let (converge, _) = platform.converge(&["--apply", "--interval", "1s"]);
        platform
            .postgres
            .execute("ALTER TABLE workspaces RENAME TO gone");
        converge.wait_for_log("cannot compare the pods with the database");
        platform
            .postgres
            .execute(&format!("UPDATE gone SET llm_billing_mode = 'disabled' WHERE id = '{BYOK}'"));
        assert_eq!(platform.modes(), before);
        platform
            .postgres
            .execute("ALTER TABLE gone RENAME TO workspaces");
        converge.wait_for_log("pods are compared again");
        platform.wait_for_modes(1, "disabled");
        converge.wait_for_log("\"recreated\"");
        assert_eq!(converge.log().matches("\"recreating\"").count(), 1, "{}", converge.log());
    });
}

#[test]
fn converge_needs_each_permission_of_the_chart() {
    const NAME: &str = "llm-billing-webhook-converge";
    let Some(platform) = Platform::with(&[&workload(1, "Deployment", BYOK), &replica_set()]) else {
        return;
    };
    let objects = render(&[
        "database.existingSecret=db",
        "converge.enabled=true",
        "converge.apply=true",
    ]);
    let own: Vec<&Value> = objects
        .iter()
        .filter(|object| object["metadata"]["name"] == NAME)
        .collect();
    platform.world.create_namespace(RELEASE, &json!({}));
    let permissions = own
        .iter()
        .copied()
        .filter(|object| object["kind"] != "Deployment");
    platform.world.api.create_all(permissions);
    let deployment = own
        .iter()
        .find(|object| object["kind"] == "Deployment")
        .unwrap();
    let arguments = &deployment["spec"]["template"]["spec"]["containers"][0]["args"];
    let arguments: Vec<&str> = arguments
        .as_array()
        .unwrap()
        .iter()
        .map(|argument| argument.as_str().unwrap())
        .filter(|argument| *argument != "converge" && !argument.contains("/etc/llm-billing/"))
        .collect();
    let token = platform
        .world
        .kubectl_ok(&["-n", RELEASE, "create", "token", NAME]);
    let folder = platform.world.folder.path().join("token");
    std::fs::create_dir(&folder).unwrap();
    let kubeconfig = platform
        .world
        .api
        .kubeconfig_with_token(&folder, token.trim());
    let kubeconfig = kubeconfig.to_str().unwrap();
    platform.with_kubelet(|| {
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let cluster_role = format!("{rbac}/clusterroles/{NAME}");
        let role = format!("{rbac}/namespaces/{RELEASE}/roles/{NAME}");
        let rules = |path: &str| platform.world.api.get(path).unwrap()["rules"].clone();
        let all = [&cluster_role, &role].map(|path| (path, rules(path)));
        let mut is_byok = true;
        let mut switch = || {
            is_byok = !is_byok;
            let mode = if is_byok { "byok" } else { "disabled" };
            platform.set(mode);
            mode
        };
        for (path, rules) in &all {
            for (index, rule) in rules.as_array().unwrap().iter().enumerate() {
                for verb in rule["verbs"].as_array().unwrap() {
                    let mut reduced = rules.as_array().unwrap().clone();
                    reduced[index]["verbs"]
                        .as_array_mut()
                        .unwrap()
                        .retain(|own| own != verb);
                    reduced.retain(|rule| rule["verbs"] != json!([]));
                    // The create of the Lease needs one that is not there.
                    if *verb == "create" && rule["resources"] == json!(["leases"]) {
                        let path = format!(
                            "/apis/coordination.k8s.io/v1/namespaces/{RELEASE}/leases/{NAME}"
                        );
                        platform.world.api.request("DELETE", &path, None);
                    }
                    platform
                        .world
                        .api
                        .change(path, |role| role["rules"] = reduced.clone().into());
                    let (mut converge, _) = platform.start_converge(&arguments, kubeconfig);
                    let mode = switch();
                    let resource = rule["resources"][0].as_str().unwrap();
                    let message = format!("cannot {} resource", verb.as_str().unwrap());
                    wait_for(&format!("{verb} of {resource} is missed"), || {
                        let log = converge.log();
                        let mut lines = log.lines();
                        lines.any(|line| line.contains(&message)).then_some(())
                    });
                    platform
                        .world
                        .api
                        .change(path, |role| role["rules"] = rules.clone());
                    // It goes on without a restart.
                    platform.wait_for_modes(2, mode);
                    converge.signal("TERM");
                    assert_eq!(converge.wait().code(), Some(0));
                }
            }
        }
        // With all of them, nothing is forbidden.
        let (converge, _) = platform.start_converge(&arguments, kubeconfig);
        converge.wait_for_log("\"is_active\":true");
        platform.wait_for_modes(2, switch());
        assert!(!converge.log().contains("forbidden"), "{}", converge.log());
    });
}

#[test]
fn storm_of_switches_stays_within_the_budget() {
    const WORKSPACES: usize = 1000;
    let Some(platform) = Platform::start() else {
        return;
    };
    let id = |index: usize| format!("00000000-0000-4000-8000-{index:012}");
    platform.postgres.execute(&format!(
        "INSERT INTO workspaces SELECT ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, 'byok'
         FROM generate_series(1, {WORKSPACES}) i"
    ));
    // A pod of its own for each, which an eviction deletes.
    for index in 1..=WORKSPACES {
        platform
            .world
            .api
            .create_all([&pod(&format!("p-{index}"), &id(index), &json!([]))]);
    }
    let (converge, address) = platform.converge(&[
        "--apply",
        "--evict-bare",
        "--max-unavailable",
        "4",
        "--rate",
        "7",
    ]);
    converge.wait_for_log("listening for changed rows");
    platform.postgres.execute(
        "UPDATE workspaces SET llm_billing_mode = 'disabled' WHERE id::text LIKE '00000000%'",
    );
    wait_for_metric(address, &format!("llm_billing_switches_total {WORKSPACES}"));
    wait_for_metric(address, "llm_billing_recreations_total{kind=\"Pod\",result=\"begun\"} 4");
    wait_for_metric(address, "llm_billing_drifted_workloads{state=\"running\"} 4");
    let waiting = WORKSPACES - 4;
    wait_for_metric(
        address,
        &format!("llm_billing_drifted_workloads{{state=\"waiting\"}} {waiting}"),
    );
    // No replacement comes, so that the four keep their places.
    assert_eq!(platform.modes().len(), WORKSPACES - 4);
}
