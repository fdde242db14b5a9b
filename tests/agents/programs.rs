//! The SDKs: how each is started with one prompt, and what its image brings. The agent programs are in command_line.rs.

use std::path::PathBuf;
use std::{env, fs};

use test_support::repository;

/// A program or SDK, at the version of tests/agents/locks.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// The value of the pod's runtime label.
    pub(crate) runtime: &'static str,
    pub(crate) command: Vec<String>,
    /// Environment variables of the image.
    pub(crate) image: Vec<(&'static str, String)>,
    /// Files in the home folder, as an image or a ConfigMap brings them, for a managed workspace.
    pub(crate) files: &'static [(&'static str, &'static str)],
}

/// Returns the folder into which scripts/install-agents installed this.
pub(crate) fn installed(name: &str) -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache
        .or(env::home_dir().map(|home| home.join(".cache")))
        .unwrap();
    let folder = cache.join("llm-billing-webhook/agents").join(name);
    let remedy = "scripts/check installs the SDKs, scripts/agents the programs";
    assert!(folder.join("installed-lock").exists(), "{name} is not installed; {remedy}");
    folder
}

fn python(name: &'static str, runtime: &'static str, lock: &str, driver: &str) -> Program {
    let driver = repository().join("tests/agents/drivers").join(driver);
    Program {
        name,
        runtime,
        command: vec!["python3".to_owned(), driver.to_str().unwrap().to_owned()],
        image: vec![("PYTHONPATH", installed(lock).to_str().unwrap().to_owned())],
        files: &[],
    }
}

fn javascript(name: &'static str, runtime: &'static str, package: &str) -> Program {
    let driver = repository().join("tests/agents/drivers/driver.cjs");
    let modules = installed("sdks").join("node_modules");
    Program {
        name,
        runtime,
        command: vec![
            "node".to_owned(),
            driver.to_str().unwrap().to_owned(),
            package.to_owned(),
        ],
        image: vec![("NODE_PATH", modules.to_str().unwrap().to_owned())],
        files: &[],
    }
}

/// Returns the SDKs of Anthropic, each in an old version and the current one.
pub(crate) fn anthropic_sdks() -> Vec<Program> {
    let driver = "anthropic_driver.py";
    vec![
        python("anthropic 0.28.1 (Python)", "claude-code", "python-anthropic-old", driver),
        python("anthropic 2.14.0 (Python)", "claude-code", "python-anthropic-new", driver),
        javascript("anthropic 0.24.0 (JavaScript)", "claude-code", "anthropic-old"),
        javascript("anthropic 1.14.0 (JavaScript)", "claude-code", "anthropic-new"),
    ]
}

/// Returns the SDKs of OpenAI, each in old versions and the current one.
pub(crate) fn openai_sdks() -> Vec<Program> {
    let driver = "openai_driver.py";
    vec![
        python("openai 0.28.1 (Python)", "python", "python-openai-0", driver),
        python("openai 1.14.3 (Python)", "python", "python-openai-old", driver),
        python("openai 3.57.0 (Python)", "python", "python-openai-new", driver),
        javascript("openai 4.47.1 (JavaScript)", "node", "openai-old"),
        javascript("openai 7.59.0 (JavaScript)", "node", "openai-new"),
    ]
}

/// Writes a program's files into a home folder.
pub(crate) fn write_files(program: &Program, home: &std::path::Path) {
    for (path, text) in program.files {
        let path = home.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}
