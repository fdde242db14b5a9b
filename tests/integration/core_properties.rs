//! Properties that hold for every pod, in process, on pods that proptest generates.

use std::collections::BTreeSet;

use llm_billing_webhook::core::policy::Policy;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::sample::{Index, select};
use proptest::{collection, option};
use serde_json::{Value, json};

use test_support::in_process::{answer, answer_to, stored};
use test_support::{
    PROXY, RUNTIME_LABEL, WORKSPACE_LABEL, create, defaulted, patch_of, patched, recorded,
};

const MODE: &str = "MOLECULE_LLM_BILLING_MODE";
const RESOLVED: &str = "MOLECULE_LLM_BILLING_MODE_RESOLVED";
/// The variables that the proxy can set.
const PROXY_VARIABLES: [&str; 8] = [
    "MOLECULE_LLM_BASE_URL",
    "MOLECULE_LLM_USAGE_TOKEN",
    "MOLECULE_LLM_ANTHROPIC_BASE_URL",
    "MOLECULE_LLM_USAGE_URL",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
];

/// Returns the variables that the default policy removes.
fn removed() -> Vec<String> {
    let policy = Policy::parse("").unwrap();
    let restrictions = policy.restrictions.all().iter();
    let removed = restrictions.filter(|restriction| restriction.is_removed);
    removed
        .map(|restriction| restriction.name().to_owned())
        .collect()
}

fn name() -> impl Strategy<Value = String> {
    let managed = [MODE, RESOLVED]
        .into_iter()
        .chain(PROXY_VARIABLES)
        .map(str::to_owned)
        .collect::<Vec<_>>();
    prop_oneof![select(removed()), select(managed), "[A-E]", any::<String>()]
}

fn value() -> impl Strategy<Value = Value> {
    let modes = [
        "platform_managed",
        "byok",
        "disabled",
        "",
        "$(OPENAI_API_KEY)",
        "$$(X) $(",
    ];
    prop_oneof![
        select(modes.to_vec()).prop_map(|value| json!({"value": value})),
        any::<String>().prop_map(|value| json!({"value": value})),
        select(removed())
            .prop_map(|key| json!({"valueFrom": {"secretKeyRef": {"name": "s", "key": key}}})),
        Just(
            json!({"valueFrom": {"secretKeyRef": {"name": "molecule-llm-proxy", "key": "usage-token"}}})
        ),
        Just(json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})),
        Just(json!({"value": null, "valueFrom": null, "unknown": {"kept": [1.5e300, true]}})),
        Just(json!({})),
    ]
}

fn entry() -> impl Strategy<Value = Value> {
    (name(), value()).prop_map(|(name, mut entry)| {
        entry["name"] = name.into();
        entry
    })
}

fn container() -> impl Strategy<Value = Value> {
    let env = prop_oneof![
        Just(json!(null)),
        collection::vec(entry(), 0..12).prop_map(Value::from)
    ];
    let prefix = option::of(select(vec!["", "OPENAI_", "APP_", "HF"]));
    let source = prefix.prop_map(|prefix| json!({"prefix": prefix, "secretRef": {"name": "s"}}));
    let env_from = collection::vec(source, 0..3);
    (env, env_from, any::<bool>()).prop_map(|(env, env_from, has_env)| {
        let mut container =
            json!({"name": "c", "envFrom": env_from, "ports": [{"containerPort": 80}]});
        if has_env {
            container["env"] = env;
        }
        container
    })
}

fn pod() -> impl Strategy<Value = Value> {
    let containers = || collection::vec(container(), 0..3);
    let runtime = select(vec!["claude-code", "codex"]);
    let annotations = prop_oneof![
        Just(json!(null)),
        Just(json!({"a/b": "x~y"})),
        Just(json!({"molecule.ai/llm-billing-mode": "byok"}))
    ];
    (containers(), containers(), runtime, annotations).prop_map(|(init, main, runtime, annotations)| {
        let labels = json!({WORKSPACE_LABEL: "88888888-8888-8888-8888-888888888888", RUNTIME_LABEL: runtime});
        json!({
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": {"initContainers": init, "containers": main, "unknown": {"kept": [1, null]}},
        })
    })
}

fn entries(container: &Value) -> Vec<Value> {
    container["env"].as_array().cloned().unwrap_or_default()
}

fn containers(review: &Value) -> Vec<Value> {
    let spec = &review["request"]["object"]["spec"];
    ["initContainers", "containers"]
        .iter()
        .flat_map(|list| spec[list].as_array().cloned().unwrap_or_default())
        .collect()
}

/// Returns the review without the parts that a plan may change.
fn without_env_and_annotations(review: &Value) -> Value {
    let mut review = review.clone();
    let object = &mut review["request"]["object"];
    object["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("annotations");
    for list in ["initContainers", "containers"] {
        for container in object["spec"][list].as_array_mut().unwrap() {
            container.as_object_mut().unwrap().remove("env");
        }
    }
    review
}

/// Returns the env entries with other names as JSON, in their order.
fn others(container: &Value, owned: &BTreeSet<&str>) -> Vec<String> {
    let is_other = |entry: &&Value| !owned.contains(entry["name"].as_str().unwrap());
    entries(container)
        .iter()
        .filter(is_other)
        .map(Value::to_string)
        .collect()
}

fn count(container: &Value, name: &str) -> usize {
    entries(container)
        .iter()
        .filter(|entry| entry["name"] == name)
        .count()
}

/// Asserts that a container has no removed variable, by an entry or by envFrom, unless it has the proxy's value.
fn assert_nothing_removed_is_left(container: &Value, removed: &[String]) {
    let entries = entries(container);
    let proxy_values: Vec<&Value> = entries
        .iter()
        .filter(|entry| PROXY_VARIABLES.contains(&entry["name"].as_str().unwrap()))
        .collect();
    let is_harmless = |entry: &Value| {
        // A few programs reject an empty value, so their masks are literals.
        let masks = ["", "MASKED=masked", "open_ai"];
        let value = entry["value"].as_str().unwrap_or_default();
        let is_mask = entry["valueFrom"].is_null() && masks.contains(&value);
        let same = |proxy: &&Value| {
            proxy["value"] == entry["value"] && proxy["valueFrom"] == entry["valueFrom"]
        };
        is_mask || proxy_values.iter().any(same)
    };
    let sources = container["envFrom"].as_array().unwrap();
    for name in removed {
        let own = entries.iter().rfind(|entry| entry["name"] == *name);
        assert!(own.is_none_or(is_harmless), "{own:?}");
        let is_brought = sources
            .iter()
            .any(|source| name.starts_with(source["prefix"].as_str().unwrap_or_default()));
        assert!(own.is_some() || !is_brought, "{name} comes from envFrom");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plan_is_idempotent_and_changes_only_owned_variables(
        pod in pod(),
        mode in select(vec!["platform_managed", "byok", "disabled"]),
    ) {
        let policy = Policy::parse(PROXY).unwrap();
        let removed = removed();
        let review = create(&pod);
        let first = answer(&policy, &stored(mode), &review);
        let after = patched(&review, &first);

        assert_eq!(without_env_and_annotations(&after), without_env_and_annotations(&review));
        for again in [&after, &defaulted(&after)] {
            assert_eq!(patch_of(&answer(&policy, &stored(mode), again)), json!([]));
        }
        let mut owned = BTreeSet::from([MODE, RESOLVED]);
        if mode == "platform_managed" {
            owned.extend(removed.iter().map(String::as_str));
            let claude_code = pod["metadata"]["labels"][RUNTIME_LABEL] == "claude-code";
            owned.extend(PROXY_VARIABLES.iter().filter(|name| claude_code || **name != "ANTHROPIC_BASE_URL"));
        }
        for (before, after) in containers(&review).iter().zip(containers(&after)) {
            assert_eq!(others(before, &owned), others(&after, &owned));
            for name in [MODE, RESOLVED] {
                let matches = |entry: &Value| entry["name"] == name && entry["value"] == mode;
                assert_eq!((count(&after, name), entries(&after).iter().filter(|entry| matches(entry)).count()), (1, 1));
            }
            if mode == "platform_managed" {
                assert_nothing_removed_is_left(&after, &removed);
            }
        }
    }

    #[test]
    fn patch_repeats_no_unchanged_value(pod in pod(), mode in select(vec!["platform_managed", "byok"])) {
        let policy = Policy::parse(PROXY).unwrap();
        // A value that no plan produces.
        let mut pod = pod;
        for list in ["initContainers", "containers"] {
            for container in pod["spec"][list].as_array_mut().unwrap() {
                if let Some(env) = container["env"].as_array_mut() {
                    env.push(json!({"name": "KEPT", "value": "left-alone"}));
                }
            }
        }
        let patch = patch_of(&answer(&policy, &stored(mode), &create(&pod)));
        assert!(!patch.to_string().contains("left-alone"), "{patch}");
    }

    #[test]
    fn whitespace_between_tokens_changes_no_answer(pod in pod(), mode in select(vec!["platform_managed", "byok"])) {
        let policy = Policy::parse(PROXY).unwrap();
        let review = create(&pod);
        let with_space = serde_json::to_vec_pretty(&review).unwrap();
        let expected = answer(&policy, &stored(mode), &review);
        assert_eq!(answer_to(&policy, &stored(mode), &with_space), Ok(expected));
    }

    #[test]
    fn both_readers_agree_on_a_corrupted_review(index in any::<Index>(), byte in any::<u8>()) {
        let policy = Policy::parse(PROXY).unwrap();
        let mut body = recorded("claude-code-pod").to_string().into_bytes();
        let index = index.index(body.len());
        body[index] = byte;
        let answer = |body: &[u8]| answer_to(&policy, &stored("byok"), body).ok();
        // A body that starts with a space is read by serde_json.
        assert_eq!(answer(&body), answer(&[b" ", body.as_slice()].concat()));
    }
}
