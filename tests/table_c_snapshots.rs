//! Table C of the requirements, its rows with snapshots, on a guest with two disks: backups and snapshots live together.
//! Rows 1-5 and 17-21 are in `table_c.rs`.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::qemu_images::qemu_img;
use common::table::{DISKS, Table};

/// Kind and reason of each disk of a backup.
fn kinds(table: &Table, backup: &str) -> Vec<(String, String)> {
    let manifest = table.lab.manifest(&table.lab.store().join("vms").join(backup));
    let text = |disk: &serde_json::Value, key: &str| disk[key].as_str().unwrap().to_owned();
    manifest["disks"].as_array().unwrap().iter().map(|d| (text(d, "kind"), text(d, "reason"))).collect()
}

fn are(table: &Table, backup: &str, kind: &str, row: &str) {
    let kinds = kinds(table, backup);
    assert!(kinds.iter().all(|(k, _)| k == kind), "{row}: {kinds:?}");
}

fn deltas(table: &Table) -> Vec<PathBuf> {
    let names = std::fs::read_dir(table.guest.dir()).unwrap().map(|e| e.unwrap().path());
    names.filter(|p| p.to_str().unwrap().ends_with(".knib.qcow2")).collect()
}

#[test]
fn rows_6_to_16() {
    let table = Table::new("table-c6");
    let disks = table.chains();
    let backup = || table.lab.ok(&["backup", "web1"]);

    table.write("f1");
    let b1 = backup();
    are(&table, &b1, "full", "row 6");
    table.sound("row 6");

    table.write("f2");
    table.snapshot("create", "s1");
    let s1 = table.below();
    table.sound("row 7");

    table.write("f3");
    table.snapshot("create", "s2");
    let s2 = table.below();
    table.sound("row 8");

    table.write("f4");
    let b2 = backup();
    are(&table, &b2, "incremental", "row 9");
    assert!(s1.iter().chain(&s2).all(|chain| chain[0].exists()), "row 9: the snapshots keep their images");
    table.sound("row 9");

    table.write("f5");
    let b3 = backup();
    are(&table, &b3, "incremental", "row 10");
    table.has(&["f1", "f2", "f3", "f4", "f5"], "row 10");
    table.sound("row 10");

    table.guest.shutdown();
    table.snapshot("revert", "s1");
    table.start();
    table.has(&["f1", "f2"], "row 11");
    table.sound("row 11");

    table.write("lost");
    table.guest.shutdown();
    table.snapshot("revert", "s2");
    table.start();
    table.has(&["f1", "f2", "f3"], "row 12");
    table.sound("row 12");

    // A restore would take images from the snapshots: refused, naming them.
    table.guest.shutdown();
    let before = table.lab.seen();
    table.lab.refused(&["restore", &b1], &["has snapshots (s1, s2)", "remove them first"]);
    before.assert_same(&table.lab.seen(), "a refused restore");
    table.snapshot("remove", "s1");
    table.sound("row 13: s1");
    table.snapshot("remove", "s2");
    assert_eq!((table.listed(), table.chains()), (Vec::new(), disks), "row 13: nothing of them is left");
    assert_eq!(deltas(&table), Vec::<PathBuf>::new(), "row 13");
    table.sound("row 13");

    let rows: [(&str, &str, &[&str]); 3] = [
        ("row 14", &b1, &["f1"]),
        ("row 15", &b2, &["f1", "f2", "f3", "f4"]),
        ("row 16", &b3, &["f1", "f2", "f3", "f4", "f5"]),
    ];
    for (row, backup, files) in rows {
        table.lab.ok(&["restore", backup]);
        table.start();
        table.has(files, row);
        table.sound(row);
        table.guest.shutdown();
    }
}

#[test]
fn rows_22_and_23() {
    let table = Table::new("table-c22");
    let disks = table.chains();
    table.write("f1");
    table.lab.ok(&["backup", "web1"]);
    let left = table.chains();
    table.sound("row 21");

    let [vda, vdb] = DISKS;
    let of = |command: &str, disk: &str, name: &str| {
        table.lab.ok(&["volume-snapshot", command, "web1", disk, name]);
    };
    table.write("f2");
    of("create", vda, "v1");
    assert_eq!(table.below()[0], left[0], "row 22: it stands on the delta of the backup");
    assert_eq!(table.chains()[1], left[1], "row 22: the other disk is as it was");
    table.sound("row 22");

    table.write("f3");
    table.guest.shutdown();
    of("revert", vda, "v1");
    assert!(!left[0][0].exists(), "row 23: the delta on primary that the last backup left is gone");
    assert_eq!(table.below()[0], disks[0], "row 23");
    assert_eq!(table.chains()[1], left[1], "row 23: the other disk is as it was");
    table.start();
    let listed = |disk: &str| table.guest.sh(&format!("ls /mnt/{disk}"));
    assert!(!listed(vda).contains("f3") && listed(vda).contains("f2"), "row 23: {}", listed(vda));
    assert!(listed(vdb).contains("f3"), "row 23: {}", listed(vdb));
    table.sound("row 23");

    // What was reverted is full, what was not is incremental, and says so.
    let next = table.lab.ok(&["backup", "web1"]);
    let kinds = kinds(&table, &next);
    assert_eq!(kinds[0], ("full".into(), "the volume was reverted to the snapshot v1".into()));
    assert_eq!(kinds[1].0, "incremental");
    table.sound("a backup after row 23");
    of("remove", vda, "v1");
    table.sound("its removal");
    let after = table.lab.ok(&["backup", "web1"]);
    are(&table, &after, "incremental", "the removal of a snapshot ends no chain");
    table.sound("a backup after its removal");
}

/// A revert of the VM ends the chain: the next backup is full, and says to which snapshot.
#[test]
fn a_backup_after_a_revert_is_full() {
    let table = Table::new("table-revert");
    table.write("f1");
    table.lab.ok(&["backup", "web1"]);
    table.write("f2");
    table.snapshot("create", "s1");
    table.write("f3");
    table.guest.shutdown();
    table.snapshot("revert", "s1");
    table.sound("the revert");
    let full = table.lab.ok(&["backup", "web1"]);
    for (kind, reason) in kinds(&table, &full) {
        assert_eq!((kind.as_str(), reason.as_str()), ("full", "the volume was reverted to the snapshot s1"));
    }
    table.sound("the backup");
    // It holds what the snapshot holds, and a backup of which a snapshot stands can be removed.
    table.start();
    table.has(&["f1", "f2"], "the revert");
    table.lab.ok(&["remove", &full]);
    table.sound("the removal of the backup");
    table.has(&["f1", "f2"], "the removal of the backup");
}

/// What `virsh` took is kept: nothing is merged into it or taken away under it, and backups hold all layers.
#[test]
fn snapshots_of_virsh_are_left_alone() {
    let table = Table::new("table-virsh");
    table.write("f1");
    table.lab.ok(&["backup", "web1"]);
    table.write("f2");
    let virsh = |arguments: &[&str]| {
        let out = std::process::Command::new("virsh")
            .args(["-q", "-c", table.guest.uri()])
            .args(arguments)
            .output()
            .unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let shown = table.chains();
    virsh(&["snapshot-create-as", table.guest.name(), "theirs", "--disk-only", "--atomic"]);
    let names = |chains: &[Vec<PathBuf>]| chains.iter().map(|c| c[0].clone()).collect::<Vec<_>>();
    table.write("f3");
    table.snapshot("create", "ours");
    table.write("f4");
    for step in ["the first backup", "the second backup"] {
        table.lab.ok(&["backup", "web1"]);
        assert!(
            names(&shown).iter().all(|image| image.exists()),
            "{step}: what virsh's snapshot shows is there"
        );
        table.has(&["f1", "f2", "f3", "f4"], step);
    }
    table.snapshot("remove", "ours");
    assert!(names(&shown).iter().all(|image| image.exists()), "what virsh's snapshot shows is there");
    table.sound("the removal of ours");
    table.guest.shutdown();
    let last = table.lab.ok(&["backup", "web1"]);
    are(&table, &last, "incremental", "the last backup");
    for (disk, chain) in DISKS.iter().zip(table.chains()) {
        let out = table.guest.path(&format!("{disk}.out"));
        table.lab.ok(&["export", &format!("{last}/{disk}"), out.to_str().unwrap(), "-O", "raw"]);
        let (out, live) = (out.to_str().unwrap(), chain[0].to_str().unwrap());
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", out, live]).unwrap();
    }
    assert!(names(&shown).iter().all(|image| image.exists()), "what virsh's snapshot shows is there");
    virsh(&["snapshot-delete", table.guest.name(), "theirs", "--metadata"]);
}
