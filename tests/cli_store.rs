//! The command line over a store: results on standard output, words on standard error, exit codes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

struct Program {
    dir: tempfile::TempDir,
}

impl Program {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn store(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_knibfs"))
            .args(arguments)
            .env("KNIBFS_STORE", self.store())
            .env("KNIBFS_STATE_DIR", self.dir.path().join("state"))
            .output()
            .unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        assert_eq!(errors, "", "{arguments:?} said something");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// What a refused command says: one line, nothing on standard output.
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert_eq!(output.stdout, b"", "{arguments:?}");
        said
    }

    fn initialised() -> Self {
        let program = Self::new();
        program.ok(&["init", program.store().to_str().unwrap()]);
        program
    }
}

#[test]
fn init_prints_where_the_store_is_and_refuses_to_do_it_twice() {
    let program = Program::new();
    let path = program.store();
    let made = program.json(&["init", "--json", "--write-once", path.to_str().unwrap()]);
    assert_eq!(made["write_once"], true);
    assert_eq!(Path::new(made["path"].as_str().unwrap()), path.canonicalize().unwrap());
    let before = std::fs::read(path.join("knibfs.toml")).unwrap();
    assert!(program.refused(1, &["init", path.to_str().unwrap()]).contains("already is a knibfs store"));
    assert_eq!(std::fs::read(path.join("knibfs.toml")).unwrap(), before);
}

#[test]
fn a_store_that_is_not_initialised_is_said_with_the_way_out() {
    let program = Program::new();
    std::fs::create_dir(program.store()).unwrap();
    let said = program.refused(1, &["list"]);
    assert!(said.contains("is not a knibfs store") && said.contains("knibfs init"), "{said}");
    std::fs::remove_dir(program.store()).unwrap();
    assert!(program.refused(1, &["list"]).contains("cannot open the store"));
    std::fs::write(program.store(), "").unwrap();
    assert!(program.refused(1, &["list"]).contains("is not a folder"));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let program = Program::initialised();
    for arguments in [
        &["no-such-command"][..],
        &["show"],
        &["show", "web1"],
        &["list", "../etc"],
        &["setting", "set", "backup.chain.size"],
        &["list", "--no-such-option"],
    ] {
        program.refused(2, arguments);
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_knibfs")).arg("list").env_remove("KNIBFS_STORE").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("-s STORE"));
}

#[test]
fn what_is_not_there_is_exit_code_1() {
    let program = Program::initialised();
    assert!(program.refused(1, &["list", "web1"]).contains("there is no VM \"web1\""));
    assert!(program.refused(1, &["vm", "show", "web1"]).contains("knibfs vm add"));
    assert!(program.refused(1, &["show", "web1/latest"]).contains("there is no VM \"web1\""));
    assert!(program.refused(1, &["offering", "delete", "gold"]).contains("there is no offering \"gold\""));
    assert!(program.refused(1, &["setting", "get", "x"]).contains("knibfs setting list"));
}

#[test]
fn settings_have_defaults_and_keep_what_they_are_set_to() {
    let program = Program::initialised();
    assert_eq!(program.ok(&["setting", "get", "backup.chain.size"]), "8\n");
    assert_eq!(program.ok(&["setting", "set", "backup.chain.size", "-1"]), "");
    assert_eq!(program.ok(&["setting", "get", "backup.chain.size"]), "-1\n");
    assert_eq!(program.json(&["setting", "list", "--json"]).as_array().unwrap().len(), 10);
    assert!(program.refused(1, &["setting", "set", "backup.chain.size", "many"]).contains("whole number"));
}

#[test]
fn an_offering_is_made_listed_and_deleted() {
    let program = Program::initialised();
    let id = program.ok(&["offering", "create", "gold", "--compress", "--chain-size", "3"]);
    let listed = program.json(&["offering", "list", "--json"]);
    assert_eq!(listed[0]["id"], id.trim());
    assert_eq!((&listed[0]["compress"], &listed[0]["compression_library"]), (&true.into(), &"zstd".into()));
    assert!(program.refused(1, &["offering", "create", "gold"]).contains("choose another name"));
    program.ok(&["offering", "delete", id.trim()]);
    assert_eq!(program.json(&["offering", "list", "--json"]), serde_json::json!([]));
}

#[test]
fn an_empty_store_lists_nothing() {
    let program = Program::initialised();
    assert_eq!(program.ok(&["list"]), "");
    assert_eq!(program.json(&["list", "--json"]), serde_json::json!({ "vms": [] }));
    assert_eq!(program.json(&["vm", "list", "--json"]), serde_json::json!([]));
}
