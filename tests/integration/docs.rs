//! The pages say what is so: every command on them is run by a test, or is at least one that can be run. Those that
//! show what they print are run by readme.rs, audit.rs and configuration.rs; those that need a cluster by
//! tests/e2e/operation.rs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use test_support::program::run;
use test_support::transcript::{commands, page, transcripts};

/// Pages whose commands with output a test runs.
const WITH_OUTPUT: [&str; 2] = ["README.md", "docs/audit.md"];
/// Pages whose commands for a cluster tests/e2e/operation.rs runs.
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
fn commands_that_show_what_they_print_are_on_pages_whose_commands_are_run() {
    for name in pages() {
        let is_run = WITH_OUTPUT.contains(&name.as_str());
        assert_eq!(!transcripts(&page(&name)).is_empty(), is_run, "{name}");
    }
}

#[test]
fn commands_for_a_cluster_are_on_pages_whose_commands_are_run_on_one() {
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
fn all_other_commands_are_ones_that_a_shell_the_repository_and_the_program_know() {
    let mut seen = 0;
    for name in pages() {
        for command in commands(&page(&name)) {
            seen += 1;
            let status = Command::new("bash").args(["-n", "-c", &command]).status();
            assert!(status.unwrap().success(), "{name}: {command}");
            for word in command.split_whitespace() {
                let word = word.trim_matches(|c| "\"'@;".contains(c));
                let is_own = ["scripts/", "charts/", "tests/"]
                    .iter()
                    .any(|folder| word.starts_with(folder));
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(word);
                let there = path.exists() || word.contains('*');
                assert!(!is_own || there, "{name}: {word} is not there");
            }
            knows_flags(&name, &command);
        }
    }
    assert!(seen > 15, "only {seen} commands were found");
}

/// Each flag that a command gives the program is one of its subcommand's.
fn knows_flags(name: &str, command: &str) {
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
        let asked: Vec<&str> = [*subcommand].into_iter().chain(nested.copied()).collect();
        let (code, help, _) = run(&[&asked[..], &["--help"]].concat());
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
