//! Imports point one way: a module uses only modules below it.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// The layers, lowest first. A module may use those before it and those in its own layer.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["dtype"],
    &["format"],
    &["pack"],
    &["quant"],
    &["tensor"],
    &["backend"],
    &["checkpoint"],
    &["python"],
];

fn layer_of(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|layer| layer.contains(&module))
        .unwrap_or_else(|| panic!("src/{module} is in no layer; name it in tests/layers.rs"))
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The modules that a file names as `crate::module`.
fn uses(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let mut modules = Vec::new();
    for rest in text.split("crate::").skip(1) {
        let names = rest.strip_prefix('{').map_or_else(
            || vec![rest],
            |group| group.split('}').next().unwrap_or_default().split(',').collect(),
        );
        for name in names {
            let name: String = name
                .trim()
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            modules.push(name);
        }
    }
    modules
}

#[test]
fn a_module_uses_only_modules_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for path in sources(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let own = layer_of(module);
        for used in uses(&fs::read_to_string(&path).unwrap()) {
            // Macros and re-exports of the crate root name no module.
            if used == "with_element" || used.is_empty() {
                continue;
            }
            checked += 1;
            if layer_of(&used) > own {
                wrong.push(format!("{} uses {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports that point upward: {wrong:#?}");
    assert!(checked > 20, "only {checked} imports were found: the test no longer sees them");
}

#[test]
fn no_source_file_is_longer_than_five_hundred_lines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for directory in ["src", "tests", "benches"] {
        for path in sources(&root.join(directory)) {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines <= 500, "{} has {lines} lines: split it by idea", path.display());
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_may_be() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&src) {
        let inside = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        let allowed = ["backend/cpu/", "backend/cuda/", "python/memory.rs"];
        let text = fs::read_to_string(&path).unwrap();
        let has = text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(
            !has || allowed.iter().any(|place| inside.starts_with(place)),
            "{inside} has unsafe code"
        );
    }
}
