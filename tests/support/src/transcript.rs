//! The commands in README and docs: reads them with their output from the pages, and runs them.

use std::fs;
use std::os::unix::fs::symlink;

use super::chart::with_tools;
use super::program::{program, program_path};
use super::repository;

/// Returns the first SQL block of a page.
pub fn sql(page: &str) -> String {
    let block = page.split("```sql\n").nth(1).unwrap();
    block.split("```").next().unwrap().to_owned()
}

/// Returns a page by its path in the repository.
pub fn page(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap()
}

/// Returns each `$ command` of a page's console blocks with the output below it. Skips blocks without a `$`.
pub fn transcripts(page: &str) -> Vec<(String, String)> {
    let blocks = page.split("```console\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap());
    let mut transcripts = Vec::new();
    for block in blocks.filter(|block| block.starts_with("$ ")) {
        for line in block.lines() {
            match (line.strip_prefix("$ "), transcripts.last_mut()) {
                (Some(command), _) => transcripts.push((command.to_owned(), String::new())),
                (None, Some((_, output))) => *output += &format!("{line}\n"),
                (None, None) => unreachable!("a block starts with a command"),
            }
        }
    }
    transcripts
}

/// Returns a page's commands without output, one per block: console blocks without a `$`, and indented blocks that
/// start with a command.
pub fn commands(page: &str) -> Vec<String> {
    const FIRST_WORDS: [&str; 8] = [
        "KUBEBUILDER_ASSETS=/path/to/a/folder",
        "cargo",
        "curl",
        "helm",
        "kubectl",
        "llm-billing-webhook",
        "scripts/",
        "while",
    ];
    let mut commands = Vec::new();
    for (index, part) in page.split("```").enumerate() {
        if index % 2 == 1 {
            let block = part.strip_prefix("console\n");
            commands.extend(
                block
                    .filter(|block| !block.starts_with("$ "))
                    .map(str::to_owned),
            );
            continue;
        }
        for block in part.split("\n\n") {
            let lines = block.trim_end().lines();
            let unindented: Option<Vec<&str>> =
                lines.map(|line| line.strip_prefix("    ")).collect();
            let text = unindented.unwrap_or_default().join("\n");
            if FIRST_WORDS.iter().any(|word| text.starts_with(word)) {
                commands.push(text);
            }
        }
    }
    commands
}

/// Runs a command in a shell in the repository's root, with the program on the PATH, also as a kubectl plugin. Returns
/// its output.
pub fn run_in_shell(command: &str, environment: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = program_path();
    for name in ["llm-billing-webhook", "kubectl-llm_billing"] {
        symlink(&path, folder.path().join(name)).unwrap();
    }
    // Remove the program's settings from the environment.
    let clean = program(&[]);
    let mut shell = std::process::Command::new("sh");
    for (name, value) in clean.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let output = with_tools(&mut shell, folder.path())
        .args(["-c", &format!("exec 2>&1; {command}")])
        .current_dir(repository())
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Asserts that a page has this many commands with output, and that each for which `is_run` holds prints what the page
/// says. With UPDATE_DOCS set, rewrites the page instead.
pub fn assert_transcripts(
    path: &str,
    count: usize,
    environment: &[(&str, &str)],
    is_run: impl Fn(&str) -> bool,
) {
    let mut text = page(path);
    let transcripts = transcripts(&text);
    assert_eq!(transcripts.len(), count);
    let is_updated = std::env::var_os("UPDATE_DOCS").is_some();
    for (command, expected) in transcripts.iter().filter(|(command, _)| is_run(command)) {
        let output = run_in_shell(command, environment);
        if is_updated {
            let block = |output: &str| format!("$ {command}\n{output}");
            text = text.replacen(&block(expected), &block(&output), 1);
        } else {
            assert_eq!(output, *expected, "{command}");
        }
    }
    if is_updated {
        fs::write(repository().join(path), text).unwrap();
    }
}
