//! The cases: what a pod's author writes besides, and the env that the kubelet makes of a container.

use std::collections::BTreeMap;

use llm_billing_webhook::core::env::references;
use serde_json::{Value, json};

/// The workspace's Secret with its usage token.
pub(crate) const TOKEN_SECRET: &str = "llm-88888888-8888-8888-8888-888888888888";
/// The author's Secret, for envFrom.
const AUTHORS_SECRET: &str = "ws-secrets";
/// A host that is neither the proxy nor a vendor.
const ELSEWHERE: &str = "https://elsewhere.example";

/// An env that a pod's author writes.
pub(crate) struct Case {
    pub(crate) name: String,
    entries: Vec<(&'static str, String)>,
    /// The content of a Secret that envFrom brings, if there is one.
    env_from: Option<BTreeMap<String, String>>,
}

/// Returns every case. All credentials in them start with `own-`.
pub(crate) fn cases() -> Vec<Case> {
    let anthropic = format!("{ELSEWHERE}/anthropic");
    let openai = format!("{ELSEWHERE}/v1");
    let opencode =
        json!({"provider": {"openai": {"options": {"baseURL": openai, "apiKey": "own-key"}}}});
    let set_env = format!("OPENAI_API_BASE={openai}");
    let table: &[(&str, &[(&'static str, &str)])] = &[
        ("nothing", &[]),
        ("Anthropic key", &[("ANTHROPIC_API_KEY", "own-key")]),
        ("Anthropic token", &[("ANTHROPIC_AUTH_TOKEN", "own-token")]),
        ("Claude Code login", &[("CLAUDE_CODE_OAUTH_TOKEN", "own-token")]),
        (
            "Anthropic URL and key",
            &[
                ("ANTHROPIC_BASE_URL", &anthropic),
                ("ANTHROPIC_API_KEY", "own-key"),
            ],
        ),
        ("Anthropic headers", &[("ANTHROPIC_CUSTOM_HEADERS", "x-api-key: own-key")]),
        ("OpenAI key", &[("OPENAI_API_KEY", "own-key")]),
        ("OpenAI URL and key", &[("OPENAI_BASE_URL", &openai), ("OPENAI_API_KEY", "own-key")]),
        ("OpenAI API base", &[("OPENAI_API_BASE", &openai), ("OPENAI_API_KEY", "own-key")]),
        ("OpenAI headers", &[("OPENAI_CUSTOM_HEADERS", "authorization: Bearer own-key")]),
        (
            "Bedrock",
            &[
                ("CLAUDE_CODE_USE_BEDROCK", "1"),
                ("AWS_BEARER_TOKEN_BEDROCK", "own-token"),
                ("AWS_REGION", "us-east-1"),
            ],
        ),
        (
            "Vertex",
            &[
                ("CLAUDE_CODE_USE_VERTEX", "1"),
                ("CLAUDE_CODE_SKIP_VERTEX_AUTH", "1"),
                ("ANTHROPIC_VERTEX_PROJECT_ID", "own-project"),
                ("CLOUD_ML_REGION", "us-east5"),
            ],
        ),
        (
            "Foundry",
            &[
                ("CLAUDE_CODE_USE_FOUNDRY", "1"),
                ("ANTHROPIC_FOUNDRY_RESOURCE", "acme"),
                ("ANTHROPIC_FOUNDRY_API_KEY", "own-key"),
            ],
        ),
        ("Codex key", &[("CODEX_API_KEY", "own-key")]),
        ("Codex token", &[("CODEX_ACCESS_TOKEN", "own-token")]),
        ("OpenRouter key", &[("OPENROUTER_API_KEY", "own-key")]),
        ("OpenCode configuration", &[("OPENCODE_CONFIG_CONTENT", &opencode.to_string())]),
        ("Gemini key", &[("GEMINI_API_KEY", "own-key")]),
        (
            "Gemini URL and key",
            &[
                ("GOOGLE_GEMINI_BASE_URL", ELSEWHERE),
                ("GEMINI_API_KEY", "own-key"),
            ],
        ),
        (
            "Google Vertex",
            &[
                ("GOOGLE_GENAI_USE_VERTEXAI", "true"),
                ("GOOGLE_API_KEY", "own-key"),
            ],
        ),
        (
            "Google sign-in",
            &[
                ("GOOGLE_GENAI_USE_GCA", "true"),
                ("GOOGLE_CLOUD_ACCESS_TOKEN", "own-token"),
            ],
        ),
        (
            "aider's own",
            &[
                ("AIDER_SET_ENV", &set_env),
                ("AIDER_OPENAI_API_KEY", "own-key"),
            ],
        ),
        (
            "Hermes provider",
            &[
                ("HERMES_INFERENCE_PROVIDER", "openrouter"),
                ("OPENROUTER_API_KEY", "own-key"),
            ],
        ),
    ];
    let mut cases: Vec<Case> = table
        .iter()
        .map(|(name, entries)| Case {
            name: (*name).to_owned(),
            entries: entries
                .iter()
                .map(|(name, value)| (*name, (*value).to_owned()))
                .collect(),
            env_from: None,
        })
        .collect();
    let all = cases.iter().flat_map(|case| &case.entries);
    let all = all
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    let harmless = BTreeMap::from([("TEAM".to_owned(), "acme".to_owned())]);
    for (name, content) in [
        ("harmless envFrom", harmless),
        ("all of it by envFrom", all),
    ] {
        cases.push(Case {
            name: name.to_owned(),
            entries: Vec::new(),
            env_from: Some(content),
        });
    }
    cases
}

impl Case {
    /// Returns the container as the author writes it.
    pub(crate) fn container(&self) -> Value {
        let entry = |(name, value): &(&str, String)| json!({"name": name, "value": value});
        let mut container =
            json!({"name": "agent", "env": self.entries.iter().map(entry).collect::<Vec<_>>()});
        if self.env_from.is_some() {
            container["envFrom"] = json!([{"secretRef": {"name": AUTHORS_SECRET}}]);
        }
        container
    }

    /// Returns the environment that the kubelet gives a container of this case.
    pub(crate) fn environment(&self, container: &Value, token: &str) -> BTreeMap<String, String> {
        let mut environment = BTreeMap::new();
        if container["envFrom"].is_array() {
            environment.extend(self.env_from.clone().unwrap_or_default());
        }
        for entry in container["env"].as_array().into_iter().flatten() {
            let value = match &entry["valueFrom"] {
                Value::Null => expand(entry["value"].as_str().unwrap_or_default(), &environment),
                from => {
                    let reference = &from["secretKeyRef"];
                    assert_eq!(*reference, json!({"name": TOKEN_SECRET, "key": "usage-token"}));
                    token.to_owned()
                }
            };
            environment.insert(entry["name"].as_str().unwrap().to_owned(), value);
        }
        environment
    }
}

/// Replaces references to earlier variables. No case has a `$$`.
fn expand(value: &str, environment: &BTreeMap<String, String>) -> String {
    let mut expanded = value.to_owned();
    for name in references(value) {
        if let Some(value) = environment.get(name) {
            expanded = expanded.replace(&format!("$({name})"), value);
        }
    }
    expanded
}
