//! The chart, rendered by the real Helm.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::repository;
use serde_json::Value;

/// The release's name and namespace in every test.
pub const RELEASE: &str = "llm-billing-webhook";

pub fn chart() -> PathBuf {
    repository().join("charts/llm-billing-webhook")
}

/// Runs Helm.
pub fn helm(arguments: &[&str]) -> Output {
    let mut command = Command::new("helm");
    with_tools(command.args(arguments), Path::new(""))
        .output()
        .expect("Helm is not installed; scripts/check installs it")
}

/// Puts `folder` first on a command's PATH, and last the folder where scripts/check installs Helm and kubectl.
pub fn with_tools<'c>(command: &'c mut Command, folder: &Path) -> &'c mut Command {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or(std::env::home_dir().map(|home| home.join(".cache")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [folder.to_owned()].into_iter();
    let folders = folders
        .chain(std::env::split_paths(&path))
        .chain(cache.map(|cache| cache.join(RELEASE)));
    command.env("PATH", std::env::join_paths(folders).unwrap())
}

/// Returns the arguments that render the chart with these settings, such as `guard.enabled=true`.
fn template<'a>(chart: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["template", RELEASE, chart, "--namespace", RELEASE];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    arguments
}

/// Returns the objects that the chart renders from these settings, without hooks.
pub fn render(settings: &[&str]) -> Vec<Value> {
    let mut objects = render_with_hooks(settings);
    objects.retain(|object| object["metadata"]["annotations"]["helm.sh/hook"].is_null());
    objects
}

/// Returns the same objects and the hooks of `helm test`.
pub fn render_with_hooks(settings: &[&str]) -> Vec<Value> {
    let chart = chart();
    let output = helm(&template(chart.to_str().unwrap(), settings));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    objects(&String::from_utf8(output.stdout).unwrap())
}

/// Returns Helm's error for settings that the chart refuses.
pub fn render_error(settings: &[&str]) -> String {
    let chart = chart();
    let output = helm(&template(chart.to_str().unwrap(), settings));
    assert!(!output.status.success(), "{settings:?} is accepted");
    String::from_utf8(output.stderr).unwrap()
}

/// Parses a manifest into its objects.
pub fn objects(manifest: &str) -> Vec<Value> {
    // Kubernetes reads 0440 as an octal number.
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let documents: Vec<Value> =
        serde_saphyr::from_multiple_with_options(manifest, options).unwrap();
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect()
}

/// Returns the only object of a kind. Panics if there is none or more than one.
pub fn of_kind<'o>(objects: &'o [Value], kind: &str) -> &'o Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let object = found.next();
    assert!(found.next().is_none(), "more than one {kind}");
    object.unwrap_or_else(|| panic!("no {kind}"))
}
