//! Wrong input to restores and to backups of domains, the list of the life of a backup: each a sentence, and nothing on
//! primary, in the definition or in the store has changed.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, Running, SmallDisk, tool};
use common::qemu_images::qemu_io;
use knibfs::store::Store;
use knibfs::store::manifest::ValidationState;

fn guest(name: &str) -> (Guest, Lab) {
    let guest = Guest::new(name).disk("vda", Disk::qcow2("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 1 0 4M");
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    (guest, lab)
}

fn spec(backup: &Path) -> String {
    format!("web1/{}", backup.file_name().unwrap().to_str().unwrap())
}

/// Refused in one sentence; store, primary and definition are as they were.
fn refused(guest: &Guest, lab: &Lab, arguments: &[&str], words: &[&str]) {
    let (before, xml) = (lab.seen(), guest.persistent_xml());
    lab.refused(arguments, words);
    before.assert_same(&lab.seen(), &format!("{arguments:?}"));
    assert_eq!(guest.persistent_xml(), xml, "{arguments:?}");
}

/// All ways to restore it are refused.
fn no_way(guest: &Guest, lab: &Lab, backup: &str, words: &[&str]) {
    refused(guest, lab, &["restore", backup], words);
    refused(guest, lab, &["restore", backup, "--quick"], words);
    refused(guest, lab, &["restore-volume", &format!("{backup}/vda"), "--to", "web1"], words);
    refused(guest, lab, &["create-vm", backup, "--name", "another"], words);
}

#[test]
fn restoring_over_a_running_vm() {
    let (guest, lab) = guest("wrong-running");
    let backup = spec(&lab.backup(&[]));
    guest.start();
    refused(&guest, &lab, &["restore", &backup], &["is running: shut it down"]);
}

#[test]
fn restoring_a_backup_that_is_not_valid() {
    let (guest, lab) = guest("wrong-notvalid");
    let backup = lab.backup(&[]);
    let store = Store::open(lab.store()).unwrap();
    let mut manifest = store.resolve(&spec(&backup).parse().unwrap()).unwrap();
    manifest.validation = ValidationState::NotValid;
    store.save_manifest(&manifest).unwrap();
    no_way(&guest, &lab, &spec(&backup), &["is NotValid", "choose another backup"]);
}

#[test]
fn restoring_a_backup_that_was_removed_or_stands_on_one_that_is_missing() {
    let (guest, lab) = guest("wrong-removed");
    let first = lab.backup(&[]);
    let second = lab.backup(&[]);
    lab.ok(&["remove", &spec(&first)]);
    no_way(&guest, &lab, &spec(&first), &["emoved"]);
    std::fs::rename(first.join("vda.qcow2"), lab.path("log")).unwrap();
    no_way(&guest, &lab, &spec(&second), &["vda.qcow2"]);
}

#[test]
fn restoring_a_backup_that_is_being_compressed() {
    let (guest, lab) = guest("wrong-compressing");
    let backup = spec(&lab.backup(&[]));
    let running = Running::start(&lab, &["compress", &backup], Some("compress.swap"));
    no_way(&guest, &lab, &backup, &["in use"]);
    running.go_on();
    assert!(running.end().0);
    lab.ok(&["restore", &backup]);
}

#[test]
fn restoring_as_the_offering_or_the_hosts_do_not_allow() {
    let (guest, lab) = guest("wrong-host");
    let backup = spec(&lab.backup(&[]));
    let volume = format!("{backup}/vda");
    lab.ok(&["host", "add", "down", "--uri", "qemu+unix:///system?socket=/nonexistent/sock"]);
    lab.ok(&["host", "add", "far", "--uri", "qemu+ssh://far.example/system"]);
    for command in [&["restore", &backup][..], &["restore-volume", &volume, "--to", "web1"]] {
        let refused = |more: &[&str], words: &[&str]| refused(&guest, &lab, &[command, more].concat(), words);
        refused(&["--host", "down"], &["--host is only for quick restores"]);
        refused(&["--quick", "--host", "nix"], &["there is no host \"nix\""]);
        refused(&["--quick", "--host", "down"], &["the host down cannot be used", "/nonexistent/sock"]);
        refused(&["--quick", "--host", "far"], &["is another machine"]);
    }
    refused(
        &guest,
        &lab,
        &["create-vm", &backup, "--name", "another", "--host", "nix"],
        &["there is no host"],
    );
    refused(
        &guest,
        &lab,
        &["create-vm", &backup, "--name", "another", "--host", "down"],
        &["cannot be used"],
    );

    lab.ok(&["offering", "create", "gold"]);
    lab.ok(&["vm", "assign", "web1", "gold"]);
    let words = &["\"gold\"", "quick"];
    refused(&guest, &lab, &["restore", &backup, "--quick"], words);
    refused(&guest, &lab, &["restore-volume", &volume, "--to", "web1", "--quick"], words);
    refused(&guest, &lab, &["create-vm", &backup, "--name", "another", "--quick"], words);
}

#[test]
fn restoring_while_another_operation_runs() {
    let (guest, lab) = guest("wrong-busy");
    let backup = spec(&lab.backup(&[]));
    let running = Running::start(&lab, &["backup", "web1"], Some("backup-copied"));
    no_way(&guest, &lab, &backup, &["in use", "`knibfs backup web1`"]);
    running.go_on();
    assert!(running.end().0);
    let running = Running::start(&lab, &["restore", &backup], Some("restore-written"));
    no_way(&guest, &lab, &backup, &["in use", "`knibfs restore"]);
    refused(&guest, &lab, &["backup", "web1"], &["in use"]);
    running.go_on();
    assert!(running.end().0);
}

#[test]
fn restoring_to_a_target_that_is_too_small() {
    let small = Guest::new("wrong-small").disk("vda", Disk::block("16M"));
    let deltas = small.dir().join("deltas");
    std::fs::create_dir(&deltas).unwrap();
    let guest = small.define();
    let lab = Lab::at(guest.dir()).init();
    let add = ["vm", "add", "web1", "--domain", guest.name(), "--uri", uri(), "--delta-dir"];
    lab.ok(&[&add[..], &[deltas.to_str().unwrap()]].concat());
    let backup = spec(&lab.backup(&[]));
    let volume = format!("{backup}/vda");
    let words = &["a smaller disk would lose data"];
    refused(&guest, &lab, &["restore", &backup, "--size", "8M"], words);
    refused(&guest, &lab, &["restore-volume", &volume, "--to", "web1", "--size", "8M"], words);
    refused(&guest, &lab, &["create-vm", &backup, "--name", "another", "--size", "8M"], words);
    // The device itself became smaller since.
    let device = common::sound::chain(&guest, "vda").pop().unwrap();
    let image = std::fs::File::options().write(true).open(guest.path("vda.raw")).unwrap();
    image.set_len(8 << 20).unwrap();
    tool("losetup", &["-c", device.to_str().unwrap()]);
    refused(&guest, &lab, &["restore", &backup], &["use a larger one"]);
}

#[test]
fn restoring_a_volume_that_another_vm_uses() {
    let (guest, lab) = guest("wrong-used");
    let backup = spec(&lab.backup(&[]));
    let live = common::sound::chain(&guest, "vda").remove(0);
    let other = Guest::new("wrong-user").disk("vda", Disk::Existing(live, "qcow2")).define();
    let words = &["in use by another VM", other.name()];
    refused(&guest, &lab, &["restore", &backup], words);
    refused(&guest, &lab, &["restore", &backup, "--quick"], words);
    other.start();
    refused(&guest, &lab, &["restore", &backup], &["is in use"]);
    drop(other);
    lab.ok(&["restore", &backup]);
}

/// A disk of a bus that knows no hotplug: libvirt says so when all is written.
#[test]
fn a_volume_that_libvirt_does_not_attach_leaves_nothing_behind() {
    let builder = Guest::new("wrong-bus");
    let image = builder.dir().join("sda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "16M"]);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='sda' bus='sata'/></disk>",
        image.display()
    );
    let guest = builder.disk("sda", Disk::Xml(disk)).start();
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    let backup = spec(&lab.backup(&[]));
    let live = guest.live_xml();
    for more in [&[][..], &["--quick"]] {
        let volume = format!("{backup}/sda");
        let command = [&["restore-volume", &volume, "--to", "web1"], more].concat();
        let (before, xml) = (lab.seen(), guest.persistent_xml());
        let output = lab.command(&command).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{said}");
        assert!(said.contains("cannot attach a disk") && said.contains("removed again"), "{said}");
        before.assert_same(&lab.seen(), "a volume that cannot be attached");
        let names = || -> std::collections::BTreeSet<_> {
            guest.dir().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect()
        };
        let there = names();
        let killed = lab.command(&command).env("KNIBFS_FAILPOINT", "restore-swap").output().unwrap();
        assert!(!killed.status.success());
        let said = lab.ok(&["recover"]);
        assert!(said.contains("was undone") && said.contains("attach a disk"), "{said}");
        assert_eq!(names(), there);
        assert_eq!((guest.persistent_xml(), guest.live_xml()), (xml, live.clone()));
        assert_eq!(lab.json(&["vm", "show", "web1"])["state"], "Ready");
        assert_eq!(lab.ok(&["recover"]), "nothing was interrupted");
    }
}

#[test]
fn no_space_on_primary_for_what_is_restored() {
    let builder = Guest::new("wrong-room").disk("vda", Disk::qcow2("16M"));
    let primary = SmallDisk::new(builder.dir().join("primary"), "8M");
    let guest = builder.define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 1 0 4M");
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    let backup = spec(&lab.backup(&[]));
    let (volume, folder) = (format!("{backup}/vda"), primary.path().to_str().unwrap());
    primary.fill();
    for quick in [&[][..], &["--quick"]] {
        let to = |command: &[&str]| {
            let command = [command, quick, &["--storage", folder]].concat();
            let (before, xml) = (lab.seen(), guest.persistent_xml());
            let output = lab.command(&command).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{command:?}: {said}");
            let last = said.trim_end().lines().last().unwrap();
            assert!(last.contains("not enough room") && last.contains(folder), "{command:?}: {said}");
            before.assert_same(&lab.seen(), &format!("{command:?}"));
            assert_eq!(guest.persistent_xml(), xml, "{command:?}");
        };
        to(&["restore", &backup]);
        to(&["restore-volume", &volume, "--to", "web1"]);
        to(&["create-vm", &backup, "--name", "another"]);
    }
}

#[test]
fn no_space_on_primary_for_the_deltas() {
    let builder = Guest::new("wrong-space").disk("vda", Disk::qcow2("16M"));
    let deltas = SmallDisk::new(builder.dir().join("deltas"), "1M");
    let guest = builder.define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 1 0 4M");
    let lab = Lab::at(guest.dir()).init();
    let folder = deltas.path().to_str().unwrap();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri(), "--delta-dir", folder]);
    deltas.fill();
    for running in [false, true] {
        if running {
            guest.start();
        }
        // It is found out while the overlays are made, and undone.
        let (before, xml) = (lab.seen(), guest.persistent_xml());
        let output = lab.command(&["backup", "web1"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{said}");
        assert!(said.trim_end().lines().last().unwrap().contains("No space left on device"), "{said}");
        before.assert_same(&lab.seen(), "a backup without room for its deltas");
        assert_eq!(guest.persistent_xml(), xml);
    }
    tool("mount", &["-o", "remount,size=16M", folder]);
    lab.backup(&[]);
}
