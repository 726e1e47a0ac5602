//! What surrounds a backup: states that others see, time limits, firmware and TPM, kinds of domains and disks, merges
//! that are refused.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, Running, SmallDisk, tool};
use common::qemu_images::{has_pattern, qemu_img, qemu_io};
use knibfs::hypervisor::Hypervisor as _;

/// A store that knows the guest as `web1`.
fn lab(guest: &Guest, more: &[&str]) -> Lab {
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&[&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()], more].concat());
    lab
}

/// A plain disk of 64 MiB of noise, as `web1`.
fn noisy() -> (tempfile::TempDir, Lab) {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::at(dir.path()).init();
    let mut state = 1u64;
    let noise: Vec<u8> = (0..8 << 20)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 8).to_le_bytes()
        })
        .collect();
    fs::write(lab.path("root.raw"), noise).unwrap();
    lab.ok(&["vm", "add", "web1", "--disk", "root=root.raw"]);
    (dir, lab)
}

/// The images of a disk, live first.
fn chain(guest: &Guest, target: &str) -> Vec<PathBuf> {
    let seen = guest.hypervisor().inspect().unwrap();
    let volume = seen.volumes.into_iter().find(|v| v.target == target).unwrap();
    volume.chain.into_iter().map(|i| i.path).collect()
}

fn check(image: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()]).unwrap();
}

#[test]
fn a_vm_that_is_being_backed_up_is_seen_so_until_recover_has_cleaned_up_after_a_crash() {
    let (_dir, lab) = noisy();
    let running = Running::start(&lab, &["backup", "web1"], Some("backup-copied"));
    let now = lab.json(&["vm", "show", "web1"]);
    assert_eq!((&now["state"], &now["interrupted"]), (&"BackingUp".into(), &false.into()));
    assert_eq!(lab.json(&["vm", "list"])[0]["state"], "BackingUp");
    assert!(
        lab.ok(&["vm", "list"]).contains("BackingUp")
            && lab.ok(&["vm", "show", "web1"]).contains("BackingUp")
    );
    lab.refused(&["backup", "web1"], &["in use: `knibfs backup web1`", "wait for it to end"]);
    // Nothing was interrupted, and that it cannot tell is no success.
    lab.refused(&["recover"], &["in use: `knibfs backup web1`"]);
    running.go_on();
    assert!(running.end().0);
    assert_eq!(lab.json(&["vm", "show", "web1"])["state"], "Ready");

    let killed = lab.command(&["backup", "web1"]).env("KNIBFS_FAILPOINT", "backup-copied").output().unwrap();
    assert!(!killed.status.success());
    let now = lab.json(&["vm", "show", "web1"]);
    assert_eq!((&now["state"], &now["interrupted"]), (&"BackingUp".into(), &true.into()));
    assert!(lab.ok(&["vm", "list"]).contains("interrupted: run `knibfs recover`"));
    lab.refused(&["backup", "web1"], &["run `knibfs recover` first"]);
    lab.ok(&["recover"]);
    assert_eq!(lab.json(&["vm", "show", "web1"])["state"], "Ready");
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
}

#[test]
fn a_backup_that_takes_too_long_is_undone() {
    let (_dir, lab) = noisy();
    lab.ok(&["setting", "set", "knib.timeout", "1"]);
    let before = lab.seen();
    let began = Instant::now();
    let running = Running::start(&lab, &["backup", "web1"], Some("backup-snapshotted"));
    while began.elapsed() < Duration::from_millis(1100) {
        std::thread::yield_now();
    }
    running.go_on();
    let (done, out, said) = running.end();
    assert!(!done && out.is_empty(), "{said}");
    assert!(said.contains("took longer than 1 s") && said.contains("knib.timeout"), "{said}");
    before.assert_same(&lab.seen(), "a backup that took too long");
    lab.ok(&["setting", "set", "knib.timeout", "43200"]);
    lab.backup(&[]);
}

#[test]
fn firmware_variables_are_in_the_backup_and_nobody_else_may_read_them() {
    let guest = Guest::new("firmware").disk("vda", Disk::qcow2("16M"));
    let dir = guest.dir().display().to_string();
    fs::write(guest.dir().join("vars.fd"), vec![7; 131_072]).unwrap();
    fs::write(guest.dir().join("code.fd"), vec![0; 65536]).unwrap();
    let guest = guest
        .firmware(&format!(
            "<loader readonly='yes' type='pflash'>{dir}/code.fd</loader><nvram>{dir}/vars.fd</nvram>"
        ))
        .define();
    let lab = lab(&guest, &[]);
    let backup = lab.backup(&[]);
    assert_eq!(fs::read(backup.join("nvram.fd")).unwrap(), vec![7; 131_072]);
    for name in ["nvram.fd", "domain.xml"] {
        let mode = fs::metadata(backup.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn a_paused_domain_is_backed_up_and_stays_paused() {
    let guest = Guest::new("paused").disk("vda", Disk::qcow2("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 5 0 1M");
    guest.start();
    let lab = lab(&guest, &[]);
    let suspend = |what: &str| tool("virsh", &["-q", "-c", uri(), what, guest.name()]);
    suspend("suspend");
    let full = lab.backup(&[]);
    let incremental = lab.backup(&[]);
    assert_eq!((lab.kind(&full).0, lab.kind(&incremental).0), ("full".into(), "incremental".into()));
    assert!(has_pattern(&incremental.join("vda.qcow2"), "qcow2", 5, "0", "1M"));
    assert_eq!(suspend("domstate").trim(), "paused");
    assert_eq!(chain(&guest, "vda").len(), 2);
    lab.refused(&["backup", "web1", "--quiesce"], &["it is paused; resume it first", "nothing was changed"]);
    suspend("resume");
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
}

#[test]
fn a_block_device_is_backed_up_with_its_deltas_in_a_folder() {
    let guest = Guest::new("block").disk("vda", Disk::block("16M")).define();
    let device = chain(&guest, "vda").remove(0);
    qemu_io(&device, "raw", "write -P 5 0 1M");
    let lab = lab(&guest, &[]);
    let before = lab.seen();
    let xml = guest.persistent_xml();
    lab.refused(&["backup", "web1"], &["is a block device", "--delta-dir"]);
    before.assert_same(&lab.seen(), "a backup of a block device without a folder for its delta");
    assert_eq!(guest.persistent_xml(), xml);

    let deltas = guest.path("deltas");
    fs::create_dir(&deltas).unwrap();
    let lab = lab.clone().with_store(guest.path("store2")).init();
    let delta_dir = ["--delta-dir", deltas.to_str().unwrap()];
    lab.ok(&[&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()], &delta_dir[..]].concat());
    lab.ok(&["setting", "set", "backup.chain.size", "3"]);
    guest.start();
    let full = lab.backup(&[]);
    assert_eq!(chain(&guest, "vda")[1..], *std::slice::from_ref(&device));
    assert_eq!(chain(&guest, "vda")[0].parent().unwrap(), deltas);
    guest.destroy();
    qemu_io(&chain(&guest, "vda")[0], "qcow2", "write -P 6 512k 1M");
    let off = lab.backup(&[]);
    guest.start();
    let last = lab.backup(&[]);
    assert_eq!(lab.manifest(&last)["end_of_chain"], true);
    for (backup, kind, second) in [(&full, "full", 5), (&off, "incremental", 6), (&last, "incremental", 6)] {
        let image = backup.join("vda.qcow2");
        check(&image);
        assert_eq!(lab.kind(backup).0, kind);
        assert!(
            has_pattern(&image, "qcow2", 5, "0", "512k")
                && has_pattern(&image, "qcow2", second, "512k", "512k")
        );
    }
    // At the end of the chain the device holds everything, and both definitions name it.
    assert_eq!(chain(&guest, "vda"), *std::slice::from_ref(&device));
    assert_eq!(fs::read_dir(&deltas).unwrap().count(), 0);
    assert!(has_pattern(&device, "raw", 6, "512k", "1M"));
    for xml in [guest.live_xml(), guest.persistent_xml()] {
        assert!(xml.contains(&format!("<source dev='{}'", device.display())), "{xml}");
    }
}

#[test]
fn of_several_disks_none_is_backed_up_where_one_fails() {
    // Off, and the second one cannot be read.
    let guest =
        Guest::new("several").disk("vda", Disk::qcow2("16M")).disk("vdb", Disk::qcow2("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 5 0 1M");
    qemu_io(&guest.path("vdb.qcow2"), "qcow2", "write -P 5 0 4M");
    let whole = fs::read(guest.path("vdb.qcow2")).unwrap();
    fs::write(guest.path("vdb.qcow2"), &whole[..whole.len() / 2]).unwrap();
    let lab = lab(&guest, &[]);
    let failed = |words: &str| {
        let (before, xml) = (lab.seen(), guest.persistent_xml());
        let output = lab.command(&["backup", "web1"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("copying the disk vdb failed") && said.contains(words), "{said}");
        before.assert_same(&lab.seen(), "a backup of which one disk failed");
        assert_eq!(guest.persistent_xml(), xml);
        assert_eq!(chain(&guest, "vda"), [guest.path("vda.qcow2")]);
    };
    failed("past the end");
    // Running, and while the second one is copied.
    fs::write(guest.path("vdb.qcow2"), &whole).unwrap();
    guest.start();
    let small = SmallDisk::new(guest.path("small"), "4M");
    let lab = lab.clone().with_store(small.path().join("store")).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    let before = lab.seen();
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("copying the disk vdb failed") && said.contains("free space"), "{said}");
    before.assert_same(&lab.seen(), "a backup of which one disk failed");
    assert_eq!(chain(&guest, "vda"), [guest.path("vda.qcow2")]);
    assert!(guest.is_running());
    tool("mount", &["-o", "remount,size=64M", small.path().to_str().unwrap()]);
    lab.backup(&[]);
}

#[test]
fn a_merge_that_is_refused_keeps_the_delta_and_the_next_backup_merges_it() {
    let guest = Guest::new("kept").disk("vda", Disk::qcow2("16M")).define();
    let base = guest.path("vda.qcow2");
    qemu_io(&base, "qcow2", "write -P 5 0 1M");
    let lab = lab(&guest, &[]);
    lab.backup(&[]);
    qemu_io(&chain(&guest, "vda")[0], "qcow2", "write -P 6 64k 64k");
    // Another VM stands on the base now: a linked clone.
    let linked = Guest::new("kept-clone");
    let clone = linked.dir().join("clone.qcow2");
    let (base_text, clone_text) = (base.to_str().unwrap(), clone.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", base_text, "-F", "qcow2", clone_text]).unwrap();
    let linked = linked.disk("vda", Disk::Existing(clone.clone(), "qcow2")).define();
    let untouched = fs::read(&base).unwrap();
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("was kept, the next backup merges it") && said.contains(linked.name()), "{said}");
    assert_eq!(fs::read(&base).unwrap(), untouched);
    assert_eq!(chain(&guest, "vda").len(), 3);
    qemu_io(&chain(&guest, "vda")[0], "qcow2", "write -P 7 128k 64k");
    let second = lab.backup(&[]);
    assert_eq!(lab.kind(&second).0, "incremental");
    drop(linked);
    qemu_io(&chain(&guest, "vda")[0], "qcow2", "write -P 8 192k 64k");
    let last = lab.backup(&[]);
    assert_eq!(lab.kind(&last).0, "incremental");
    assert_eq!(lab.manifest(&last)["disks"][0]["data_clusters"], 1, "just what changed since");
    assert_eq!(chain(&guest, "vda").len(), 2, "all that was kept is merged");
    assert_eq!(chain(&guest, "vda")[1], base);
    check(&base);
    for (pattern, at) in [(5, "0"), (6, "64k"), (7, "128k"), (8, "192k")] {
        assert!(has_pattern(&last.join("vda.qcow2"), "qcow2", pattern, at, "64k"), "{at}");
        assert!(has_pattern(&chain(&guest, "vda")[0], "qcow2", pattern, at, "64k"), "{at}");
    }
    assert!(has_pattern(&last.join("vda.qcow2"), "qcow2", 5, "256k", "768k"));
}
