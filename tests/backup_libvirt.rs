//! Backups of a domain of a real libvirt, running and off, through the program.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::guest::{Disk, Guest, uri};
use common::lab::Lab;
use common::qemu_images::{has_pattern, qemu_img, qemu_io};
use common::sound::assert_sound;
use serde_json::Value;

struct Program<'a> {
    guest: &'a Guest,
}

impl Program<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_knibfs"));
        command
            .args(arguments)
            .env("KNIBFS_STORE", self.guest.path("store"))
            .env("KNIBFS_STATE_DIR", self.guest.path("state"));
        command
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn add(&self) {
        self.ok(&["init", self.guest.path("store").to_str().unwrap()]);
        self.ok(&["vm", "add", "web1", "--domain", self.guest.name(), "--uri", uri()]);
    }

    fn backup(&self, more: &[&str]) -> PathBuf {
        let name = self.ok(&[&["backup", "web1"], more].concat());
        self.guest.path("store").join("vms").join(name)
    }

    fn manifest(&self, backup: &Path) -> Value {
        serde_json::from_slice(&std::fs::read(backup.join("manifest.json")).unwrap()).unwrap()
    }

    /// The images of a disk, live first.
    fn chain(&self, target: &str) -> Vec<PathBuf> {
        use knibfs::hypervisor::Hypervisor as _;
        let seen = self.guest.hypervisor().inspect().unwrap();
        let volume = seen.volumes.into_iter().find(|v| v.target == target).unwrap();
        volume.chain.into_iter().map(|i| i.path).collect()
    }

    /// Deltas beside the disks.
    fn deltas(&self) -> usize {
        let names = std::fs::read_dir(self.guest.dir()).unwrap();
        names.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".knib.qcow2")).count()
    }
}

fn check(image: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()]).unwrap();
}

/// A guest that writes: what it wrote before each backup is in it, and one delta a disk is left.
#[test]
fn a_running_guest_is_backed_up_and_leaves_one_delta() {
    let guest = Guest::new("backup")
        .disk("vda", Disk::qcow2("64M"))
        .disk("vdb", Disk::raw("64M"))
        .with_system()
        .start();
    guest.wait_for_agent();
    let program = Program { guest: &guest };
    program.add();
    // Something to freeze.
    guest.mkfs("vdb");
    guest.sh("head -c 1048576 /dev/zero | tr '\\0' A > /dev/vda; sync");
    let full = program.backup(&["--quiesce"]);
    assert_eq!(program.manifest(&full)["quiesced"], true);
    guest.sh("head -c 65536 /dev/zero | tr '\\0' B | dd of=/dev/vda bs=65536 seek=4 conv=notrunc; sync");
    let incremental = program.backup(&[]);
    assert_eq!((program.deltas(), program.chain("vda").len()), (2, 2));
    assert_sound(&Lab::at(guest.dir()), &[&guest], "two backups of a guest that runs");

    for (backup, kind) in [(&full, "full"), (&incremental, "incremental")] {
        assert_eq!(program.manifest(backup)["disks"][0]["kind"], kind);
        assert!(backup.join("domain.xml").exists());
        ["vda", "vdb"].iter().for_each(|t| check(&backup.join(format!("{t}.qcow2"))));
        let vda = backup.join("vda.qcow2");
        assert!(has_pattern(&vda, "qcow2", b'A', "0", "256k"));
        let expected = if kind == "full" { b'A' } else { b'B' };
        assert!(has_pattern(&vda, "qcow2", expected, "256k", "64k"));
        assert!(has_pattern(&vda, "qcow2", b'A', "320k", "704k"));
    }
    let stored = program.manifest(&incremental)["disks"][0]["data_clusters"].as_u64().unwrap();
    assert!((1..16).contains(&stored), "just what changed, not {stored} clusters");
    // The guest runs on, on what is on disk.
    guest.sh("dd if=/dev/vda bs=65536 skip=4 count=1 | tr -d B | wc -c | grep -qx 0");
    assert!(guest.live_xml().contains(program.chain("vda")[0].to_str().unwrap()));
    assert!(guest.persistent_xml().contains(program.chain("vda")[0].to_str().unwrap()));
}

/// A domain that is off, with a chain of two: its end leaves nothing on primary.
#[test]
fn a_domain_that_is_off_is_backed_up() {
    let guest = Guest::new("backup-off").disk("vda", Disk::qcow2("64M")).define();
    let program = Program { guest: &guest };
    program.add();
    program.ok(&["setting", "set", "backup.chain.size", "2"]);
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 5 0 1M");
    let full = program.backup(&[]);
    let live = program.chain("vda").remove(0);
    qemu_io(&live, "qcow2", "write -P 6 128k 64k");
    let last = program.backup(&[]);
    assert_eq!(program.manifest(&last)["disks"][0]["kind"], "incremental");
    for (backup, expected) in [(&full, 5), (&last, 6)] {
        check(&backup.join("vda.qcow2"));
        assert!(has_pattern(&backup.join("vda.qcow2"), "qcow2", expected, "128k", "64k"));
    }
    assert_eq!((program.deltas(), program.chain("vda")), (0, vec![guest.path("vda.qcow2")]));
    assert!(has_pattern(&guest.path("vda.qcow2"), "qcow2", 6, "128k", "64k"));
}

/// Killed while the snapshot is there and nothing is copied, and killed with half of the merging done.
#[test]
fn a_backup_of_a_running_domain_that_was_killed_is_recovered() {
    for place in ["backup-snapshotted", "backup-published", "backup-merged"] {
        let guest = Guest::new("backup-kill").disk("vda", Disk::qcow2("64M")).define();
        qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 5 0 1M");
        guest.start();
        let program = Program { guest: &guest };
        program.add();
        program.backup(&[]);
        let killed = program.command(&["backup", "web1"]).env("KNIBFS_FAILPOINT", place).output().unwrap();
        assert!(!killed.status.success(), "{place} was not reached");
        program.ok(&["recover"]);
        assert_eq!((program.deltas(), program.chain("vda").len()), (1, 2), "{place}");
        assert!(has_pattern(&program.chain("vda")[0], "qcow2", 5, "0", "1M"), "{place}");
        let next = program.backup(&[]);
        assert_eq!(program.manifest(&next)["disks"][0]["kind"], "incremental", "{place}");
        check(&next.join("vda.qcow2"));
        assert!(has_pattern(&next.join("vda.qcow2"), "qcow2", 5, "0", "1M"), "{place}");
    }
}
