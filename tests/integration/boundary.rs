//! The structure of src/: the core mentions no IO or outer module, and no imports form a cycle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// IO, waiting, HTTP, the clock, and the crate's modules outside the core.
const FORBIDDEN: [&str; 28] = [
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "SystemTime",
    "Instant",
    "tokio",
    "tracing",
    "sqlx",
    "axum",
    "hyper",
    "rustls",
    "clap",
    "prometheus_client",
    "async fn",
    "async move",
    ".await",
    "println!",
    "crate::audit",
    "crate::cli",
    "crate::cluster",
    "kube::",
    "crate::database",
    "crate::server",
    "crate::metrics",
    "crate::telemetry",
];

#[test]
fn core_mentions_no_io_or_outer_module() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/core");
    let mut breaches = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let breach = |word: &&&str| code.contains(**word);
            if let Some(word) = FORBIDDEN.iter().find(breach) {
                breaches.push(format!("{}:{}: {word}", path.display(), index + 1));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn source_files_import_without_cycles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = BTreeMap::new();
    read_modules(&root, &mut Vec::new(), &mut sources);
    let imports: BTreeMap<_, _> = sources
        .iter()
        .map(|(module, text)| (module.as_slice(), imported_modules(module, text, &sources)))
        .collect();
    assert!(imports[&path("core::decision")[..]].contains(&path("core::plan")));
    // Repeatedly remove modules without remaining imports or importers: the rest forms cycles.
    let mut remaining = imports;
    loop {
        let modules: BTreeSet<Module> = remaining.keys().map(|module| module.to_vec()).collect();
        let imported: BTreeSet<Module> = remaining.values().flatten().cloned().collect();
        remaining
            .retain(|module, imports| !imports.is_disjoint(&modules) && imported.contains(*module));
        if remaining.len() == modules.len() {
            break;
        }
    }
    let in_cycles: Vec<String> = remaining
        .iter()
        .map(|(module, imported)| {
            let imported = imported
                .iter()
                .filter(|other| remaining.contains_key(&other[..]));
            let imported: Vec<String> = imported.map(|other| other.join("::")).collect();
            format!("{} imports {}", module.join("::"), imported.join(", "))
        })
        .collect();
    assert!(in_cycles.is_empty(), "{in_cycles:#?}");
}

type Module = Vec<String>;

fn path(text: &str) -> Module {
    text.split("::").map(str::to_owned).collect()
}

/// Reads each module's source, without comments and tests.
fn read_modules(folder: &Path, parent: &mut Module, sources: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        if file.is_dir() {
            parent.push(stem);
            read_modules(&file, parent, sources);
            parent.pop();
        } else if file.extension().is_some_and(|extension| extension == "rs") && stem != "main" {
            let own = Some(stem).filter(|stem| !["mod", "lib"].contains(&stem.as_str()));
            let module = parent.iter().cloned().chain(own).collect();
            let text = fs::read_to_string(&file).unwrap();
            let code = text.lines().take_while(|line| *line != "#[cfg(test)]");
            let code = code.map(|line| line.split("//").next().unwrap_or_default());
            sources.insert(module, code.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// Returns the other modules that a module's paths lead to.
fn imported_modules(
    module: &Module,
    text: &str,
    modules: &BTreeMap<Module, String>,
) -> BTreeSet<Module> {
    let is_folder = modules
        .keys()
        .any(|other| other.len() > module.len() && other.starts_with(module));
    let parent = &module[..module.len().saturating_sub(1)];
    // `super` in a folder's root and in a file beside it both mean the module above.
    let roots = [
        ("crate::", &[][..]),
        ("super::", parent),
        ("self::", module),
    ];
    let mut imported = BTreeSet::new();
    for (keyword, root) in roots {
        for (start, _) in text.match_indices(keyword) {
            let before = &text[..start];
            let continues = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            // `pub(in crate::a)` is a visibility, not an import.
            let begins = !before.ends_with(continues) && !before.ends_with("pub(in ");
            if begins && (keyword != "self::" || is_folder) {
                let mut paths = Vec::new();
                read_paths(&mut &text[start + keyword.len()..], root.to_vec(), &mut paths);
                let longest = |path: Module| {
                    (0..=path.len())
                        .rev()
                        .map(|length| path[..length].to_vec())
                        .find(|prefix| modules.contains_key(prefix))
                };
                imported.extend(paths.into_iter().filter_map(longest));
            }
        }
    }
    imported.remove(module);
    imported
}

/// Reads the paths of a tree such as `a::{b, c::D}`.
fn read_paths(rest: &mut &str, mut prefix: Module, paths: &mut Vec<Module>) {
    loop {
        let name = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
        let (name, after) = rest.split_at(name.unwrap_or(rest.len()));
        *rest = after;
        if !name.is_empty() && name != "self" {
            prefix.push(name.to_owned());
        }
        if let Some(after) = rest.strip_prefix('{') {
            *rest = after;
            loop {
                *rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
                if let Some(after) = rest.strip_prefix('}') {
                    *rest = after;
                    return;
                }
                read_paths(rest, prefix.clone(), paths);
            }
        }
        match rest.strip_prefix("::") {
            Some(after) => *rest = after,
            None => return paths.push(prefix),
        }
    }
}
