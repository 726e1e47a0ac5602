//! A domain that is removed from knibfs's care while it runs, that moves to another host, that is gone.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use common::guest::{Disk, Guest, other_uri, uri};
use common::lab::{Lab, tool};
use common::qemu_images::{has_pattern, qemu_io};
use common::sound::assert_sound;
use knibfs::hypervisor::Hypervisor as _;
use knibfs::store::Store;
use knibfs::store::vm::Source;

fn lab(guest: &Guest) -> Lab {
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    lab
}

/// Two disks, of which the second is raw; the first MiB of each is written.
fn guest(name: &str) -> Guest {
    let guest = Guest::new(name).disk("vda", Disk::qcow2("16M")).disk("vdb", Disk::raw("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 1 0 1M");
    qemu_io(&guest.path("vdb.raw"), "raw", "write -P 1 0 1M");
    guest
}

fn layers(guest: &Guest) -> Vec<usize> {
    guest.hypervisor().inspect().unwrap().volumes.iter().map(|v| v.chain.len()).collect()
}

/// Defines the guest on the second host, and forgets it on the first.
fn move_it(guest: &mut Guest) {
    let text = tool("virsh", &["-q", "-c", uri(), "dumpxml", "--inactive", "--security-info", guest.name()]);
    std::fs::create_dir_all(guest.path("log")).unwrap();
    let path = guest.path("log/domain.xml");
    std::fs::write(&path, text).unwrap();
    tool("virsh", &["-q", "-c", other_uri(), "define", path.to_str().unwrap()]);
    tool("virsh", &["-q", "-c", uri(), "undefine", guest.name()]);
    guest.follow(other_uri());
}

#[test]
fn a_running_domain_that_is_removed_runs_on_without_deltas_and_can_be_taken_back() {
    let guest = guest("removed");
    let lab = lab(&guest);
    guest.start();
    let backup = lab.backup(&[]);
    assert_eq!(layers(&guest), [2, 2]);
    assert_eq!(lab.ok(&["vm", "remove", "web1"]), "web1 was removed; its backup is kept");
    assert!(guest.is_running());
    assert_eq!(layers(&guest), [1, 1]);
    assert_sound(&lab, &[&guest], "removed");

    let add = |name: &str| ["vm", "add", name, "--domain", guest.name(), "--uri", uri()].map(String::from);
    let other = add("web2");
    lab.refused(&other.each_ref().map(String::as_str), &["from before it was removed: add it as web1"]);
    lab.ok(&add("web1").each_ref().map(String::as_str));
    let next = lab.backup(&[]);
    assert_eq!(lab.kind(&next).0, "full");
    let volumes = |b: &std::path::Path| lab.manifest(b)["disks"][0]["volume"].clone();
    assert_eq!(volumes(&backup), volumes(&next), "it is the same volume as before");
    guest.destroy();
    // A backup from before it was removed is restored to its own volumes.
    qemu_io(&lab_live(&guest), "qcow2", "write -P 9 0 1M");
    let name = format!("web1/{}", backup.file_name().unwrap().to_str().unwrap());
    lab.ok(&["restore", &name]);
    assert!(has_pattern(&guest.path("vda.qcow2"), "qcow2", 1, "0", "1M"));
    assert_sound(&lab, &[&guest], "taken back and restored");
}

fn lab_live(guest: &Guest) -> std::path::PathBuf {
    guest.hypervisor().inspect().unwrap().volumes[0].chain[0].path.clone()
}

#[test]
fn a_domain_that_has_moved_is_found_on_another_host_that_is_known() {
    let mut guest = guest("moved");
    let lab = lab(&guest);
    lab.backup(&[]);
    move_it(&mut guest);
    // Nobody knows of the other host yet.
    assert!(lab.ok(&["vm", "list"]).contains("gone: no known host has its domain"));
    assert_eq!(lab.json(&["vm", "show", "web1"])["presence"]["is"], "gone");
    let before = lab.seen();
    lab.refused(&["backup", "web1"], &["is gone", "knibfs host add", "knibfs vm remove web1"]);
    before.assert_same(&lab.seen(), "a backup of a domain that is gone");

    lab.ok(&["host", "add", "b", "--uri", other_uri()]);
    lab.ok(&["host", "add", "down", "--uri", "qemu+unix:///system?socket=/nonexistent/sock"]);
    assert!(lab.ok(&["vm", "list"]).contains("moved to the host b"));
    let next = lab.backup(&[]);
    assert_eq!(lab.kind(&next).0, "incremental", "its images are the same");
    let now = lab.json(&["vm", "show", "web1"]);
    assert_eq!((&now["presence"]["is"], &now["source"]["uri"]), (&"here".into(), &other_uri().into()));
    assert_sound(&lab, &[&guest], "moved");
    // It is off on both and runs on one: that is where it is.
    let text = guest.persistent_xml();
    std::fs::write(guest.path("log/domain.xml"), text).unwrap();
    tool("virsh", &["-q", "-c", uri(), "define", guest.path("log/domain.xml").to_str().unwrap()]);
    let _left = Left(guest.name().to_owned());
    assert_eq!(lab.json(&["vm", "show", "web1"])["presence"]["is"], "here");
    tool("virsh", &["-q", "-c", uri(), "start", guest.name()]);
    lab.ok(&["host", "add", "a", "--uri", uri()]);
    assert_eq!(lab.json(&["vm", "show", "web1"])["presence"]["host"], "a");
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
    assert_eq!(lab.json(&["vm", "show", "web1"])["source"]["uri"], uri());
}

/// A definition left at the first host.
struct Left(String);

impl Drop for Left {
    fn drop(&mut self) {
        for what in ["destroy", "undefine"] {
            let _ = Command::new("virsh").args(["-q", "-c", uri(), what, &self.0]).output();
        }
    }
}

#[test]
fn a_domain_that_is_gone_can_be_removed_and_its_backups_restored_to_a_new_one() {
    let guest = guest("gone");
    let lab = lab(&guest);
    let backup = lab.backup(&[]);
    let spec = format!("web1/{}", backup.file_name().unwrap().to_str().unwrap());
    tool("virsh", &["-q", "-c", uri(), "undefine", guest.name()]);
    lab.ok(&["host", "add", "down", "--uri", "qemu+unix:///system?socket=/nonexistent/sock"]);
    let before = lab.seen();
    lab.refused(&["vm", "remove", "web1"], &["is gone", "no answer: down"]);
    before.assert_same(&lab.seen(), "a removal that was refused");
    assert!(lab.ok(&["vm", "show", "web1"]).contains("no answer: down"));
    lab.ok(&["host", "remove", "down"]);

    let output = lab.command(&["vm", "remove", "web1", "--json"]).output().unwrap();
    assert!(output.status.success());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((said["backups"].as_u64(), said["left"].as_array().unwrap().len()), (Some(1), 2), "{said}");
    assert!(said["notes"][0].as_str().unwrap().contains("is gone from every host"), "{said}");
    let new = format!("{}-new", guest.name());
    let _made = Left(new.clone());
    lab.ok(&["create-vm", &spec, "--name", &new, "--storage", guest.dir().to_str().unwrap()]);
    assert!(has_pattern(&guest.path(&format!("{new}-vda.qcow2")), "qcow2", 1, "0", "1M"));
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn a_vm_whose_host_is_down_is_only_removed_by_force() {
    let guest = guest("host-down");
    let lab = lab(&guest);
    lab.backup(&[]);
    let store = Store::open(lab.store()).unwrap();
    let mut record = store.vm(&"web1".parse().unwrap()).unwrap();
    let Source::Domain { uri: own, .. } = &mut record.source else { panic!("no domain") };
    *own = "qemu+unix:///system?socket=/nonexistent/sock".into();
    store.save_vm(&record).unwrap();
    let before = lab.seen();
    assert!(lab.ok(&["vm", "list"]).contains("its host does not answer"));
    for command in [&["vm", "remove", "web1"][..], &["backup", "web1"]] {
        lab.refused(command, &["cannot reach libvirt at qemu+unix:///system?socket=/nonexistent/sock"]);
    }
    before.assert_same(&lab.seen(), "a VM whose host is down");
    assert!(lab.ok(&["vm", "remove", "web1", "--force"]).contains("its backup is kept"));
    // Its deltas are its domain's still, and merged once it is taken back.
    assert_eq!(layers(&guest), [2, 2]);
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    assert_eq!(lab.kind(&lab.backup(&[])).0, "full");
    assert_eq!(layers(&guest), [2, 2]);
    assert_sound(&lab, &[&guest], "taken back");
}
