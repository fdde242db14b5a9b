//! The commands in README and docs. `readme.rs`, `audit.rs` and `configuration.rs` run those with output, and
//! `tests/e2e/operation.rs` those for a cluster. This file checks where each kind occurs, and the syntax of the rest.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use test_support::program::run;
use test_support::transcript::{commands, page, transcripts};

/// Pages whose commands with output are run by a test.
const WITH_OUTPUT: [&str; 2] = ["README.md", "docs/audit.md"];
/// Pages whose cluster commands are run by tests/e2e/operation.rs.
const FOR_A_CLUSTER: [&str; 3] = ["README.md", "docs/install.md", "docs/runbook.md"];

fn pages() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap();
    let docs = docs.map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()));
    let mut pages: Vec<String> = docs.filter(|name| name.ends_with(".md")).collect();
    pages.extend(["README.md".to_owned(), "CONTRIBUTING.md".to_owned()]);
    pages
}

#[test]
fn commands_with_output_are_on_tested_pages() {
    for name in pages() {
        let is_run = WITH_OUTPUT.contains(&name.as_str());
        assert_eq!(!transcripts(&page(&name)).is_empty(), is_run, "{name}");
    }
}

#[test]
fn cluster_commands_are_on_pages_run_by_e2e() {
    for name in pages() {
        let commands = commands(&page(&name));
        let needs_cluster = commands
            .iter()
            .any(|command| command.contains("kubectl ") || command.contains("helm "));
        let is_run = FOR_A_CLUSTER.contains(&name.as_str());
        assert_eq!(needs_cluster, is_run, "{name}");
    }
}

#[test]
fn other_commands_have_valid_syntax_paths_and_flags() {
    let mut count = 0;
    for name in pages() {
        for command in commands(&page(&name)) {
            count += 1;
            let status = Command::new("bash").args(["-n", "-c", &command]).status();
            assert!(status.unwrap().success(), "{name}: {command}");
            for word in command.split_whitespace() {
                let word = word.trim_matches(|c| "\"'@;".contains(c));
                let is_own = ["scripts/", "charts/", "tests/"]
                    .iter()
                    .any(|folder| word.starts_with(folder));
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(word);
                let exists = path.exists() || word.contains('*');
                assert!(!is_own || exists, "{name}: {word} does not exist");
            }
            assert_flags_are_known(&name, &command);
        }
    }
    assert!(count > 15, "only {count} commands were found");
}

/// Asserts that each flag in a command is a flag of its subcommand.
fn assert_flags_are_known(name: &str, command: &str) {
    let joined = command.replace("\\\n", " ");
    for line in joined.lines() {
        let line = line.replace("cargo run --release --", "llm-billing-webhook");
        let Some((_, arguments)) = line.rsplit_once("llm-billing-webhook ") else {
            continue;
        };
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let is_plain = |word: &&&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
        let Some(subcommand) = words
            .first()
            .filter(is_plain)
            .filter(|word| !word.starts_with('-'))
        else {
            continue;
        };
        if line.contains("helm ") || line.contains("kubectl ") && !line.contains(" -- /") {
            continue;
        }
        let nested = words.get(1).filter(|_| *subcommand == "workspace");
        let path: Vec<&str> = [*subcommand].into_iter().chain(nested.copied()).collect();
        let (code, help, _) = run(&[&path[..], &["--help"]].concat());
        assert_eq!(code, 0, "{name}: {line}");
        let known: BTreeSet<&str> = help
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .collect();
        for flag in words.iter().filter(|word| word.starts_with("--")) {
            let flag = flag.split('=').next().unwrap();
            assert!(known.contains(flag), "{name}: {line}: {flag}");
        }
    }
}
