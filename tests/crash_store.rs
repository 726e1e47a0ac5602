//! The real program, killed at every place where the store changes: what is left is the state before or after.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};

fn knibfs(store: &Path, kill_at: u32, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_knibfs"))
        .args(arguments)
        .env("KNIBFS_STORE", store)
        .env("KNIBFS_STATE_DIR", store.with_file_name("state"))
        .env("KNIBFS_FAILPOINT", format!("#{kill_at}"))
        .output()
        .unwrap()
}

/// Runs a command (`STORE` in it is the store's path) killed at its first, second, … place, each time with a new store
/// that `prepare` makes; `check` gets the store and whether the command ended by itself.
fn at_every_place(prepare: &[&str], command: &[&str], check: impl Fn(&Path, bool)) {
    for kill_at in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let named = |command: &[&str]| -> Vec<String> {
            command
                .iter()
                .map(|a| if *a == "STORE" { store.display().to_string() } else { (*a).to_owned() })
                .collect()
        };
        if !prepare.is_empty() {
            assert!(knibfs(&store, 0, &named(prepare)).status.success());
        }
        let output = knibfs(&store, kill_at, &named(command));
        let killed = output.status.signal() == Some(9);
        assert!(killed || output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        check(&store, !killed);
        if !killed {
            assert!(kill_at > 3, "no place was tried");
            return;
        }
    }
}

#[test]
fn a_store_is_made_whole_or_can_be_told_from_one() {
    at_every_place(&[], &["init", "STORE"], |store, ended| {
        let listed = knibfs(store, 0, &["list"]);
        let said = String::from_utf8_lossy(&listed.stderr).into_owned();
        let refused = said.contains("is not a knibfs store") || said.contains("cannot open the store");
        assert!(listed.status.success() || (!ended && refused), "{said}");
    });
}

#[test]
fn a_setting_is_the_old_or_the_new_one() {
    at_every_place(&["init", "STORE"], &["setting", "set", "backup.chain.size", "3"], |store, ended| {
        let value =
            String::from_utf8(knibfs(store, 0, &["setting", "get", "backup.chain.size"]).stdout).unwrap();
        assert!(value == "3\n" || (!ended && value == "8\n"), "{value}");
    });
}

#[test]
fn an_offering_is_there_or_not() {
    at_every_place(&["init", "STORE"], &["offering", "create", "gold"], |store, ended| {
        let listed = knibfs(store, 0, &["offering", "list"]);
        assert!(listed.status.success());
        let found = String::from_utf8(listed.stdout).unwrap();
        assert!(found.starts_with("gold") || (!ended && found.is_empty()), "{found}");
    });
}
