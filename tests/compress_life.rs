//! Compression beside everything else: the VM stays free, the swap waits, the settings act.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::lab::{Lab, Running};
use common::qemu_images::qemu_io;

/// A VM `web1` with a disk of 16 MiB, and its full backup.
fn lab() -> (tempfile::TempDir, Lab) {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::at(dir.path()).init();
    let mut text: Vec<u8> = (0..1u64 << 20).flat_map(|n| (n * n).to_le_bytes()).collect();
    text.resize(16 << 20, 0);
    fs::write(lab.path("root.raw"), text).unwrap();
    lab.ok(&["vm", "add", "web1", "--disk", "root=root.raw"]);
    (dir, lab)
}

fn state(lab: &Lab, backup: &Path) -> String {
    lab.manifest(backup)["compression"].as_str().unwrap().to_owned()
}

fn name(backup: &Path) -> String {
    format!("web1/{}", backup.file_name().unwrap().to_str().unwrap())
}

#[test]
fn a_vm_is_backed_up_while_its_last_backup_is_compressed() {
    let (_dir, lab) = lab();
    let full = lab.backup(&[]);
    let compression = Running::start(&lab, &["compress", &name(&full)], Some("compress.begun"));
    assert_eq!(state(&lab, &full), "Compressing");
    assert_eq!(lab.json(&["vm", "show", "web1"])["state"], "Ready");
    lab.refused(&["compress", &name(&full)], &["does it already"]);
    assert_eq!(lab.ok(&["recover"]), "nothing was interrupted");
    qemu_io(&lab.path("root.raw"), "raw", "write -P 3 8M 64k");
    let next = lab.backup(&[]);
    assert_eq!(lab.kind(&next).0, "incremental");
    compression.go_on();
    let (done, _, said) = compression.end();
    assert!(done, "{said}");
    assert_eq!(state(&lab, &full), "Compressed");
    lab.ok(&["check", "--read-data"]);
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental", "its child stands on it as before");
}

#[test]
fn the_swap_waits_for_the_vms_lock() {
    let (_dir, lab) = lab();
    let full = lab.backup(&[]);
    let compression = Running::start(&lab, &["compress", &name(&full)], Some("compress.begun"));
    let backup = Running::start(&lab, &["backup", "web1"], Some("backup-copied"));
    compression.go_on();
    let mut compression = compression;
    compression.wait("the lock", |c| c.said().contains("is swapped later: the VM web1 is in use"));
    assert_eq!(state(&lab, &full), "Compressing");
    backup.go_on();
    assert!(backup.end().0);
    assert!(compression.end().0);
    assert_eq!(state(&lab, &full), "Compressed");
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn the_swap_waits_for_handles_on_the_stored_file_but_not_on_flat_disks() {
    let (_dir, lab) = lab();
    let full = lab.backup(&[]);
    let (mnt, log) = (lab.path("mnt"), lab.path("log"));
    fs::create_dir(&mnt).unwrap();
    lab.ok(&["mount", "--log-dir", log.to_str().unwrap(), mnt.to_str().unwrap()]);
    let folder = mnt.join("vms").join(name(&full));
    let flat = fs::File::open(folder.join("root.raw")).unwrap();
    let stored = fs::File::open(folder.join("root.qcow2")).unwrap();
    let before = fs::read(full.join("root.qcow2")).unwrap();
    let mut compression = Running::start(&lab, &["compress", &name(&full)], None);
    compression.wait("the handle", |c| c.said().contains("is swapped later: stored file open in the mount"));
    assert_eq!(fs::read(full.join("root.qcow2")).unwrap(), before);
    // The VM is free meanwhile.
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
    drop(stored);
    let (done, _, said) = compression.end();
    assert!(done, "{said}");
    assert_eq!(state(&lab, &full), "Compressed");
    // The flat disk that was open reads on.
    let mut first = vec![0; 1 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&flat, &mut first, 1 << 20).unwrap();
    assert_eq!(first, fs::read(lab.path("root.raw")).unwrap()[1 << 20..2 << 20]);
    drop(flat);
    lab.ok(&["umount", mnt.to_str().unwrap()]);
}

#[test]
fn so_many_run_at_once_as_the_setting_says_and_a_change_acts_at_once() {
    const LIMIT: &str = "backup.compression.max.concurrent.compressions.per.host";
    let (_dir, lab) = lab();
    lab.ok(&["setting", "set", LIMIT, "1"]);
    let (first, second) = (lab.backup(&[]), lab.backup(&[]));
    let holder = Running::start(&lab, &["compress", &name(&first)], Some("compress.begun"));
    let mut waiting = Running::start(&lab, &["compress", &name(&second)], None);
    waiting.wait("its turn", |c| c.said().contains("waiting: 1 compressions run on this host already"));
    assert_eq!(state(&lab, &second), "Uncompressed");
    lab.ok(&["setting", "set", LIMIT, "-1"]);
    assert!(waiting.end().0);
    assert_eq!((state(&lab, &first), state(&lab, &second)), ("Compressing".into(), "Compressed".into()));
    holder.go_on();
    assert!(holder.end().0);
    assert_eq!(state(&lab, &first), "Compressed");
    lab.ok(&["check", "--read-data"]);
}

/// A backup of a VM whose offering compresses; what it said.
fn backup_with(settings: &[(&str, &str)]) -> (tempfile::TempDir, Lab, String) {
    let (dir, lab) = lab();
    lab.ok(&["offering", "create", "daily", "--compress"]);
    lab.ok(&["vm", "assign", "web1", "daily"]);
    for (name, value) in settings {
        lab.ok(&["setting", "set", &format!("backup.compression.{name}"), value]);
    }
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "the backup stands whatever happens: {said}");
    let name = String::from_utf8(output.stdout).unwrap();
    let backup = lab.store().join("vms").join(name.trim());
    let state = state(&lab, &backup);
    lab.ok(&["check", "--read-data"]);
    assert_eq!(fs::read_dir(&backup).unwrap().count(), 3, "nothing half done is left");
    (dir, lab, format!("{state}\n{said}"))
}

#[test]
fn nothing_is_compressed_while_that_is_disabled() {
    let (_dir, lab, said) = backup_with(&[("task.enabled", "false")]);
    assert!(said.starts_with("Uncompressed") && said.contains("task.enabled is false"), "{said}");
    lab.ok(&["setting", "set", "backup.compression.task.enabled", "true"]);
    let next = lab.backup(&[]);
    assert_eq!(state(&lab, &next), "Compressed");
}

#[test]
fn nothing_is_compressed_without_room() {
    let (_dir, lab, said) = backup_with(&[("minimum.free.storage", "1000000000")]);
    assert!(said.starts_with("Uncompressed") && said.contains("minimum.free.storage"), "{said}");
    lab.ok(&["setting", "set", "backup.compression.minimum.free.storage", "1"]);
    lab.ok(&["compress", "web1/latest"]);
}

#[test]
fn a_compression_is_stopped_when_its_time_is_up_and_tried_so_often_as_the_setting_says() {
    let slow = [("timeout", "1"), ("rate.limit", "1"), ("max.job.retries", "3"), ("retry.interval", "0")];
    let (_dir, lab, said) = backup_with(&slow);
    assert!(said.contains("was not compressed within 1 s"), "{said}");
    let attempts: Vec<_> = said.lines().filter(|l| l.starts_with("attempt ")).collect();
    assert_eq!(attempts.len(), 2, "{said}");
    assert!(attempts[1].starts_with("attempt 3 of 3 in 0 minutes"), "{said}");
    lab.ok(&["setting", "set", "backup.compression.rate.limit", "0"]);
    lab.ok(&["compress", "web1/latest"]);
}
