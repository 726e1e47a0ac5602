//! `vm remove`: deltas are merged, backups stay, a domain that has moved or is gone is told apart; and what may be done
//! with the backups of a VM that was removed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::process::ExitStatusExt as _;

use common::disk_lab::DiskLab as Lab;
use common::failpoints::{self, List};
use common::killed::Seen;

#[test]
fn its_deltas_are_merged_and_its_backups_stay_until_the_last_one_is_removed() {
    let lab = Lab::new("overlay");
    let backups = lab.backups(2);
    lab.write("web1", "write -P 77 9M 64k");
    let disk = lab.keep("disk.raw");
    assert_eq!(lab.deltas().len(), 1);
    assert_eq!(lab.ok(&["vm", "remove", "web1"]), "web1 was removed; its 2 backups are kept");
    assert_eq!(lab.deltas(), Vec::<String>::new());
    lab.disk_shows(&disk);
    assert_eq!(lab.listed("web1"), backups);
    lab.check();

    // It is in nobody's care any more.
    assert_eq!(lab.ok(&["vm", "list"]), "");
    assert!(lab.ok(&["vm", "list", "--show-removed"]).contains("removed; its backups are kept"));
    assert!(lab.ok(&["vm", "show", "web1"]).contains("removed; its backups are kept"));
    lab.ok(&["offering", "create", "gold"]);
    for command in [
        &["backup", "web1"][..],
        &["restore", &backups[1]],
        &["vm", "assign", "web1", "gold"],
        &["vm", "unassign", "web1"],
        &["restore-volume", &format!("{}/root", backups[1]), "--to", "web1"],
    ] {
        assert!(lab.fails(command).contains("was removed from knibfs's care"), "{command:?}");
    }
    assert!(lab.fails(&["vm", "remove", "web1"]).contains("was removed already"));
    // Its disk is free for another VM, its name is not.
    let disk_of_new = format!("root={}", lab.disk("web1").display());
    let said = lab.fails(&["vm", "add", "web1", "--track", "overlay", "--disk", &disk_of_new]);
    assert!(said.contains("whose backups are kept: choose another"), "{said}");
    lab.ok(&["vm", "add", "web2", "--track", "overlay", "--disk", &disk_of_new]);

    // Its backups are worth what they were.
    lab.ok(&["create-vm", &backups[1], "--name", "again", "--storage", lab.dir.path().to_str().unwrap()]);
    lab.ok(&["prune", "web1", "--keep-last", "1"]);
    assert_eq!(lab.listed("web1"), backups[1..]);
    lab.check();
    lab.ok(&["remove", &backups[1]]);
    assert!(!lab.path("store/vms/web1").exists(), "nothing is left of it");
    assert!(lab.fails(&["vm", "show", "web1"]).contains("there is no VM \"web1\""));
    lab.check();
}

#[test]
fn one_without_backups_is_forgotten_at_once() {
    let lab = Lab::new("scan");
    assert_eq!(lab.ok(&["vm", "remove", "web1"]), "web1 was removed; it had no backups");
    assert!(!lab.path("store/vms/web1").exists());
    assert!(lab.fails(&["vm", "remove", "web1"]).contains("there is no VM \"web1\""));
    let disk = format!("root={}", lab.disk("web1").display());
    lab.ok(&["vm", "add", "web1", "--disk", &disk]);
}

/// Killed wherever a crash is foreseen, `recover` finishes it, unless nothing was begun.
fn killed_anywhere(list: List, backups: usize, least: usize) {
    let (mut undone, mut finished, mut seen) = (0, 0, Seen::default());
    for place in 1..200 {
        let lab = Lab::new("overlay");
        let backups = lab.backups(backups);
        lab.write("web1", "write -P 77 9M 64k");
        let disk = lab.keep("disk.raw");
        let (deltas, record) = (lab.deltas(), lab.record("web1"));
        let mut command = lab.command(&["vm", "remove", "web1"]);
        let killed = command.env("KNIBFS_FAILPOINT", format!("#{place}")).output().unwrap();
        let said = format!("#{place}: {}", String::from_utf8_lossy(&killed.stderr));
        assert!(killed.status.success() || killed.status.signal() == Some(9), "{said}");
        seen.note(&killed);
        // By the program: the copy of the journal that lies on this host may be the only one.
        lab.ok(&["recover"]);
        assert_eq!(lab.ok(&["recover"]), "nothing was interrupted", "{said}");
        lab.disk_shows(&disk);
        lab.check();
        if !lab.ok(&["vm", "list"]).is_empty() {
            assert_eq!((lab.deltas(), lab.record("web1")), (deltas, record), "{said}");
            undone += 1;
            continue;
        }
        finished += 1;
        assert_eq!(lab.deltas(), Vec::<String>::new(), "{said}");
        // Whole or gone, and nothing hidden beside it.
        let left: Vec<_> = std::fs::read_dir(lab.path("store/vms")).unwrap().collect();
        assert_eq!(left.len(), usize::from(!backups.is_empty()), "{said}: {left:?}");
        if !backups.is_empty() {
            assert_eq!(lab.listed("web1"), backups, "{said}");
        }
        if killed.status.success() {
            assert!(undone > 0 && finished > least, "{undone} undone, {finished} finished");
            seen.assert_all(list);
            return;
        }
    }
    panic!("it never ends by itself");
}

#[test]
fn a_removal_that_is_killed_anywhere_is_finished_by_recover() {
    killed_anywhere(failpoints::VM_REMOVE, 2, 10);
}

#[test]
fn the_removal_of_one_without_backups_that_is_killed_anywhere_is_finished_by_recover() {
    killed_anywhere(failpoints::VM_REMOVE_BARE, 0, 4);
}
