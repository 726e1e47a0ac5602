//! Every promise of `docs/SEMANTICS.md` names a test that is there.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

/// All Rust code below a folder.
fn code(dir: &Path, all: &mut String) {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            code(&entry, all);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            all.push_str(&fs::read_to_string(entry).unwrap());
        }
    }
}

#[test]
fn every_claim_names_tests_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = String::new();
    ["src", "tests", "fuse/src", "fuse/tests"].iter().for_each(|dir| code(&root.join(dir), &mut all));
    let text = fs::read_to_string(root.join("docs/SEMANTICS.md")).unwrap();
    let mut named = 0;
    for row in text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| claim |")) {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<_> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty() || tests.starts_with("the same"), "no test: {row}");
        for name in names.iter().filter(|n| !n.starts_with("cargo ")) {
            named += 1;
            let there = if name.contains('/') {
                root.join(name).exists()
            } else {
                all.contains(&format!("fn {name}("))
            };
            assert!(there, "{name} is not there: {row}");
        }
    }
    assert!(named > 60, "the tables are not read as they are: {named} names");
}
