//! The same as main.rs with the agent programs besides, for scripts/agents, which installs them. Writes the matrix into
//! docs/agents.md. `cargo test` alone does not run it: the programs are large, and it takes twenty minutes.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed expectation fails the test"
)]

mod cases;
mod matrix;
mod programs;
mod world;

use std::fs;

use test_support::repository;
use test_support::transcript::page;

use cases::cases;
use matrix::{Matrix, Row, assert_metered, matrix};
use programs::{Program, anthropic_sdks, installed, openai_sdks};
use world::{World, in_namespace};

#[test]
fn agents_stay_on_the_meter() {
    in_namespace("agents_stay_on_the_meter", || {
        let world = World::start();
        let agents = matrix(&world, &agents());
        let mut sdks = matrix(&world, &anthropic_sdks());
        sdks.extend(matrix(&world, &openai_sdks()));
        write_page(&[("Programs", &agents), ("SDKs", &sdks)]);
        assert_metered(&agents);
        assert_metered(&sdks);
    });
}

/// Codex reads its base URL from a file only.
const CODEX_CONFIG: &str = include_str!("files/codex.toml");
const GEMINI_SETTINGS: &str = include_str!("files/gemini.json");

/// Returns the command-line programs.
fn agents() -> Vec<Program> {
    let binary = |name: &str, arguments: &str| {
        let path = installed("programs").join("node_modules/.bin").join(name);
        [
            vec![path.to_str().unwrap().to_owned()],
            words(arguments),
            vec!["say hello".to_owned()],
        ]
        .concat()
    };
    let script = |lock: &str, arguments: &str| {
        let folder = installed(lock);
        let path = folder.join("bin").join(lock).to_str().unwrap().to_owned();
        let command = [
            vec!["python3".to_owned(), path],
            words(arguments),
            vec!["say hello".to_owned()],
        ];
        (command.concat(), ("PYTHONPATH", folder.to_str().unwrap().to_owned()))
    };
    let set = |name, value: &str| (name, value.to_owned());
    let (aider, aider_path) = script(
        "aider",
        "--model openai/gpt-4o --no-git --yes-always --no-check-update --analytics-disable \
         --no-show-model-warnings --no-pretty --no-stream --exit --message",
    );
    let (hermes, hermes_path) = script("hermes", "-z");
    vec![
        Program {
            name: "Claude Code 2.1.197",
            runtime: "claude-code",
            command: binary("claude", "-p"),
            image: vec![set("CLAUDE_CODE_MAX_RETRIES", "0")],
            files: &[],
        },
        Program {
            name: "Codex 0.171.0",
            runtime: "codex",
            command: binary("codex", "exec --skip-git-repo-check"),
            image: vec![],
            files: &[(".codex/config.toml", CODEX_CONFIG)],
        },
        Program {
            name: "Gemini CLI 0.61.0",
            runtime: "gemini-cli",
            command: binary("gemini", "-p"),
            image: vec![
                set("GEMINI_CLI_TRUST_WORKSPACE", "true"),
                set("GEMINI_MODEL", "gemini-2.5-flash"),
            ],
            files: &[(".gemini/settings.json", GEMINI_SETTINGS)],
        },
        Program {
            name: "OpenCode 1.18.33",
            runtime: "opencode",
            command: binary("opencode", "run -m openai/gpt-4o"),
            image: vec![
                set("OPENCODE_DISABLE_MODELS_FETCH", "1"),
                set("OPENCODE_DISABLE_AUTOUPDATE", "1"),
            ],
            files: &[],
        },
        Program {
            name: "aider 0.86.2",
            runtime: "aider",
            command: aider,
            image: vec![aider_path, set("LITELLM_LOCAL_MODEL_COST_MAP", "True")],
            files: &[],
        },
        Program {
            name: "Hermes agent 0.19.0",
            runtime: "hermes",
            command: hermes,
            image: vec![hermes_path, set("HERMES_DISABLE_LAZY_INSTALLS", "1")],
            files: &[],
        },
    ]
}

fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}

/// Writes the matrix into docs/agents.md.
fn write_page(tables: &[(&str, &Matrix)]) {
    const BEGIN: &str = "<!-- The tables are written by scripts/agents. -->\n";
    const END: &str = "<!-- End of the tables. -->";
    let path = "docs/agents.md";
    let text = page(path);
    let (before, rest) = text
        .split_once(BEGIN)
        .expect("the page has the mark of the tables");
    let (_, after) = rest
        .split_once(END)
        .expect("the page has the end of the tables");
    let mut page = [before, BEGIN].concat();
    for (title, matrix) in tables {
        let programs: Vec<&str> = matrix.keys().copied().collect();
        page += &format!(
            "\n| {title} | {} |\n|---|{}\n",
            programs.join(" | "),
            "---|".repeat(programs.len())
        );
        for (index, case) in cases().iter().enumerate() {
            let cell =
                |rows: &Vec<Row>| format!("{} / {}", rows[index].managed, rows[index].control);
            let cells: Vec<String> = matrix.values().map(cell).collect();
            page += &format!("| {} | {} |\n", case.name, cells.join(" | "));
        }
    }
    page += "\n";
    page += END;
    page += after;
    fs::write(repository().join(path), page).unwrap();
}
