//! Every failpoint of the source is one that a test kills at.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::failpoints::ALL;

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(sources(&path)),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
    found
}

#[test]
fn a_test_kills_the_program_at_every_failpoint_of_its_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut written = BTreeSet::new();
    for path in sources(&root.join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        for call in text.split("failpoint::hit(").skip(1) {
            let name = call.strip_prefix('"').and_then(|rest| rest.split_once('"'));
            let (name, _) =
                name.unwrap_or_else(|| panic!("{}: a failpoint without a literal name", path.display()));
            written.insert(name.to_owned());
        }
    }
    let listed: BTreeSet<String> = ALL.iter().flat_map(|list| list.names()).map(str::to_owned).collect();
    let forgotten: Vec<_> = written.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&written).collect();
    assert!(
        forgotten.is_empty() && gone.is_empty(),
        "no test kills at {forgotten:?}; not in the source: {gone:?}"
    );
    assert!(written.len() > 80, "{} failpoints", written.len());
}

/// A list that no test compares with what it saw would prove nothing.
#[test]
fn every_list_of_failpoints_is_what_a_test_has_seen() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let tests: String = sources(&folder).iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let unused: Vec<_> = ALL
        .iter()
        .map(|list| list.called)
        .filter(|list| !tests.contains(&format!("failpoints::{list}")))
        .collect();
    assert_eq!(unused, Vec::<&str>::new());
}
