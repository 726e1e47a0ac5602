//! Backups of plain disk files: full, incremental, by scan and by overlay, judged by `qemu-img`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::failpoints::{self, List};
use common::killed::Seen;
use common::lab::{Lab as Program, tool};

struct Lab {
    dir: tempfile::TempDir,
    program: Program,
}

impl Deref for Lab {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl Lab {
    /// A store without a VM.
    fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { program: Program::at(dir.path()).init(), dir }
    }

    /// A store and a VM `web1` with one disk of 16 MiB, the first MiB written.
    fn new(format: &str, track: &str) -> Self {
        let lab = Self::empty();
        tool("qemu-img", &["create", "-q", "-f", format, lab.disk().to_str().unwrap(), "16M"]);
        lab.write(format, "write -P 1 0 1M");
        lab.ok(&["vm", "add", "web1", "--track", track, "--disk", &format!("root={}", lab.disk().display())]);
        lab
    }

    fn disk(&self) -> PathBuf {
        self.path("root.img")
    }

    fn write(&self, format: &str, command: &str) {
        tool("qemu-io", &["-f", format, "-c", command, self.disk().to_str().unwrap()]);
    }

    /// The backup's file is sound and shows what the disk shows.
    fn same(&self, format: &str, backup: &Path) {
        let stored = backup.join("root.qcow2");
        tool("qemu-img", &["check", "-q", "-f", "qcow2", stored.to_str().unwrap()]);
        let disk = self.disk();
        let paths = [disk.to_str().unwrap(), stored.to_str().unwrap()];
        tool("qemu-img", &["compare", "-q", "-f", format, "-F", "qcow2", paths[0], paths[1]]);
    }

    /// A copy of the disk as it is now.
    fn keep(&self, format: &str, name: &str) -> PathBuf {
        let copy = self.path(name);
        let (disk, to) = (self.disk(), copy.to_str().unwrap());
        tool("qemu-img", &["convert", "-f", format, "-O", "raw", disk.to_str().unwrap(), to]);
        copy
    }

    /// The files beside the disk that are neither the store nor the test's own.
    fn left_on_primary(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.contains("knib")).collect()
    }
}

/// The lines that the manual gives for the day when there is no knibfs, each as it stands there.
#[test]
fn a_chain_is_restored_without_knibfs_as_the_manual_says() {
    let lab = Lab::new("qcow2", "scan");
    lab.backup(&[]);
    lab.write("qcow2", "write -P 2 512k 2M");
    let backup = lab.backup(&[]);
    let disk = lab.keep("qcow2", "then.raw");
    lab.write("qcow2", "write -P 3 0 1M");
    lab.backup(&[]);
    let manual = include_str!("../docs/OPERATING.md");
    let chapter = manual.split("## Without knibfs\n").nth(1).unwrap();
    let vms = backup.parent().unwrap().to_str().unwrap();
    let mut lines = chapter.split("```").nth(1).unwrap().to_owned();
    for (example, here) in [
        ("/backups/store/vms/web1", vms),
        ("2026-11-23T22-32-42Z", backup.file_name().unwrap().to_str().unwrap()),
        ("vda.qcow2", "root.qcow2"),
        ("/images/", &format!("{}/", lab.dir.path().display())),
    ] {
        assert!(lines.contains(example), "{example}: {lines}");
        lines = lines.replace(example, here);
    }
    tool("sh", &["-euc", &format!("PATH=/usr/bin:/bin; {lines}")]);
    for made in ["web1.qcow2", "try.qcow2"] {
        let made = lab.path(made);
        tool(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "qcow2", disk.to_str().unwrap(), made.to_str().unwrap()],
        );
    }
}

fn full_then_incremental(format: &str, track: &str) {
    let lab = Lab::new(format, track);
    let full = lab.backup(&[]);
    lab.same(format, &full);
    let first = lab.keep(format, "first.raw");
    assert_eq!(lab.manifest(&full)["disks"][0]["kind"], "full");

    // New data, changed data, and data that becomes zeros.
    lab.write(format, "write -P 2 8M 128k");
    lab.write(format, "write -P 3 64k 64k");
    lab.write(format, "write -P 0 256k 64k");
    let incremental = lab.backup(&[]);
    lab.same(format, &incremental);
    let manifest = lab.manifest(&incremental);
    let disk = &manifest["disks"][0];
    assert_eq!((&disk["kind"], &disk["depth"]), (&"incremental".into(), &2.into()));
    let stored = disk["data_clusters"].as_u64().unwrap() + disk["zero_clusters"].as_u64().unwrap();
    assert_eq!(stored, 4, "just what changed: {disk}");
    let info = tool("qemu-img", &["info", incremental.join("root.qcow2").to_str().unwrap()]);
    let name = full.file_name().unwrap().to_str().unwrap();
    assert!(info.contains(&format!("backing file: ../{name}/root.qcow2")), "{info}");

    // The full one still shows the disk of its time, and a third stands on the second.
    let (first, stored) = (first.to_str().unwrap(), full.join("root.qcow2"));
    tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", first, stored.to_str().unwrap()]);
    lab.write(format, "write -P 4 9M 64k");
    let third = lab.backup(&[]);
    lab.same(format, &third);
    assert_eq!(lab.manifest(&third)["disks"][0]["depth"], 3);
    assert_eq!(lab.left_on_primary().len(), usize::from(track == "overlay"), "{:?}", lab.left_on_primary());
}

#[test]
fn a_scan_stores_just_what_changed_of_a_raw_file() {
    full_then_incremental("raw", "scan");
}

#[test]
fn a_scan_stores_just_what_changed_of_a_qcow2_file() {
    full_then_incremental("qcow2", "scan");
}

#[test]
fn overlays_keep_the_given_path_live_and_leave_one_delta() {
    full_then_incremental("qcow2", "overlay");
}

#[test]
fn an_isolated_backup_leaves_the_chain_and_primary_as_they_were() {
    let lab = Lab::new("qcow2", "overlay");
    let full = lab.backup(&[]);
    let before = lab.left_on_primary();
    lab.write("qcow2", "write -P 7 2M 64k");
    let isolated = lab.backup(&["--isolated"]);
    lab.same("qcow2", &isolated);
    assert_eq!(lab.left_on_primary(), before);
    assert!(lab.manifest(&isolated)["parent"].is_null());
    let next = lab.backup(&[]);
    lab.same("qcow2", &next);
    assert_eq!(lab.manifest(&next)["parent"]["name"], full.file_name().unwrap().to_str().unwrap());
}

#[test]
fn the_end_of_a_chain_leaves_nothing_on_primary() {
    let lab = Lab::new("qcow2", "overlay");
    lab.ok(&["setting", "set", "backup.chain.size", "2"]);
    lab.backup(&[]);
    lab.write("qcow2", "write -P 7 2M 64k");
    let last = lab.backup(&[]);
    lab.same("qcow2", &last);
    assert_eq!(lab.manifest(&last)["end_of_chain"], true);
    assert_eq!(lab.left_on_primary(), Vec::<String>::new());
    assert_eq!(lab.manifest(&lab.backup(&[]))["disks"][0]["kind"], "full");
}

#[test]
fn a_failed_copy_is_undone() {
    let lab = Lab::new("qcow2", "overlay");
    let full = lab.backup(&[]);
    let before = lab.left_on_primary();
    lab.write("qcow2", "write -P 7 2M 4M");
    let copy = lab.keep("qcow2", "copy.raw");
    // Larger than the largest file that the process may write, so that the copy fails.
    let line = format!("trap '' XFSZ; ulimit -f 2048; exec '{}' backup web1", env!("CARGO_BIN_EXE_knibfs"));
    let mut command = Command::new("bash");
    command.args(["-c", &line]);
    lab.environment(&mut command);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("copying the disk root failed"), "{said}");
    assert_eq!(lab.left_on_primary(), before, "{said}");
    let (disk, copy) = (lab.disk(), copy.to_str().unwrap());
    tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", disk.to_str().unwrap(), copy]);
    let stored = std::fs::read_dir(full.parent().unwrap()).unwrap();
    let stored = stored.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".new"));
    assert_eq!(stored.count(), 0);
    let next = lab.backup(&[]);
    lab.same("qcow2", &next);
    assert_eq!(lab.manifest(&next)["disks"][0]["kind"], "incremental");
}

/// Kills a backup at every place where a crash is foreseen; `recover` brings each to an end.
fn killed_anywhere(list: List, format: &str, track: &str) {
    let (mut number, mut seen) = (1, Seen::default());
    loop {
        let lab = Lab::new(format, track);
        lab.backup(&[]);
        lab.write(format, "write -P 9 3M 128k");
        let copy = lab.keep(format, "copy.raw");
        let killed =
            lab.command(&["backup", "web1"]).env("KNIBFS_FAILPOINT", format!("#{number}")).output().unwrap();
        let said = String::from_utf8_lossy(&killed.stderr).into_owned();
        seen.note(&killed);
        lab.ok(&["recover"]);
        let (disk, copy) = (lab.disk(), copy.to_str().unwrap());
        tool("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", disk.to_str().unwrap(), copy]);
        let after = lab.left_on_primary();
        assert_eq!(after.len(), usize::from(track == "overlay"), "#{number}: {after:?}: {said}");
        let next = lab.backup(&[]);
        lab.same(format, &next);
        assert_eq!(lab.manifest(&next)["disks"][0]["kind"], "incremental", "#{number}: {said}");
        if killed.status.success() {
            break;
        }
        number += 1;
    }
    seen.assert_all(list);
}

#[test]
fn a_scan_that_is_killed_anywhere_is_recovered() {
    killed_anywhere(failpoints::BACKUP_SCAN, "raw", "scan");
}

#[test]
fn an_overlay_backup_that_is_killed_anywhere_is_recovered() {
    killed_anywhere(failpoints::BACKUP_OVERLAY, "qcow2", "overlay");
}

#[test]
fn a_backup_is_compressed_before_it_returns_where_the_offering_says_so() {
    let lab = Lab::empty();
    lab.ok(&["offering", "create", "daily", "--compress"]);
    tool("qemu-img", &["create", "-q", "-f", "raw", lab.disk().to_str().unwrap(), "16M"]);
    lab.write("raw", "write -P 1 0 4M");
    let disk = format!("root={}", lab.disk().display());
    lab.ok(&["vm", "add", "web1", "--offering", "daily", "--disk", &disk]);
    let plain = lab.backup(&["--no-wait"]);
    assert_eq!(lab.manifest(&plain)["compression"], "Uncompressed");
    lab.same("raw", &plain);
    lab.write("raw", "write -P 2 8M 4M");
    let packed = lab.backup(&[]);
    assert_eq!(lab.manifest(&packed)["compression"], "Compressed");
    assert!(lab.manifest(&packed)["disks"][0]["file_size"].as_u64().unwrap() < 1 << 20);
    lab.same("raw", &packed);
    lab.ok(&["check", "--read-data"]);
}
