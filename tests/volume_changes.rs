//! What others do to a domain's volumes between two backups: copied elsewhere, resized, detached, given to another VM.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, tool};
use common::qemu_images::{has_pattern, qemu_img, qemu_io};
use common::sound::{assert_sound, chain};

fn guest(name: &str) -> (Guest, Lab) {
    let guest = Guest::new(name).disk("vda", Disk::qcow2("16M")).disk("vdb", Disk::qcow2("16M")).define();
    for disk in ["vda.qcow2", "vdb.qcow2"] {
        qemu_io(&guest.path(disk), "qcow2", "write -P 1 0 1M");
    }
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    (guest, lab)
}

fn virsh(arguments: &[&str]) -> String {
    tool("virsh", &[&["-q", "-c", uri()], arguments].concat())
}

#[test]
fn one_that_was_copied_elsewhere_is_full_and_its_old_delta_is_merged() {
    let (guest, lab) = guest("copied");
    guest.start();
    lab.backup(&[]);
    let old = chain(&guest, "vda");
    let new = guest.path("copy.qcow2");
    let to = new.to_str().unwrap();
    virsh(&[
        "blockcopy",
        guest.name(),
        "vda",
        to,
        "--format",
        "qcow2",
        "--wait",
        "--pivot",
        "--transient-job",
    ]);
    assert_eq!(chain(&guest, "vda"), std::slice::from_ref(&new));
    // libvirt changes the running definition only.
    guest.destroy();
    let xml = guest.persistent_xml().replace(old[0].to_str().unwrap(), to);
    let path = guest.path("state/copied.xml");
    std::fs::write(&path, xml).unwrap();
    virsh(&["define", path.to_str().unwrap()]);
    guest.start();
    let full = lab.backup(&[]);
    let (kind, why) = lab.kind(&full);
    assert!(kind == "full" && why.contains("migrated"), "{kind}: {why}");
    assert_eq!(lab.manifest(&full)["disks"][1]["kind"], "incremental", "the other one stayed");
    assert!(!old[0].exists() && old[1].exists());
    assert_sound(&lab, &[&guest], "copied");
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
}

#[test]
fn one_that_was_resized_is_full_once() {
    let (guest, lab) = guest("resized");
    guest.start();
    lab.backup(&[]);
    virsh(&["blockresize", guest.name(), "vda", "32M"]);
    let full = lab.backup(&[]);
    let (kind, why) = lab.kind(&full);
    assert!(kind == "full" && why.contains("resized from 16777216 to 33554432"), "{kind}: {why}");
    assert_eq!(lab.manifest(&full)["disks"][0]["virtual_size"], 33_554_432);
    assert!(has_pattern(&full.join("vda.qcow2"), "qcow2", 1, "0", "1M"));
    assert_sound(&lab, &[&guest], "resized");
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
    assert_sound(&lab, &[&guest], "the next one");
}

#[test]
fn the_delta_of_one_that_was_detached_is_merged_once_nobody_uses_it() {
    let (guest, lab) = guest("detached");
    lab.backup(&[]);
    let (live, base) = (chain(&guest, "vdb").remove(0), guest.path("vdb.qcow2"));
    qemu_io(&live, "qcow2", "write -P 2 1M 1M");
    virsh(&["detach-disk", guest.name(), "vdb", "--config"]);
    // Another VM has it now, with its delta.
    let other = Guest::new("detached-to").disk("vda", Disk::Existing(live.clone(), "qcow2")).define();
    let before = std::fs::read(&base).unwrap();
    let said = lab.command(&["backup", "web1"]).output().unwrap();
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && text.contains("was left") && text.contains(other.name()), "{text}");
    assert!(live.exists());
    assert_eq!(std::fs::read(&base).unwrap(), before, "another VM's image is not written");
    drop(other);

    // Nobody has the next one.
    let (live, base) = (chain(&guest, "vda").remove(0), guest.path("vda.qcow2"));
    qemu_io(&live, "qcow2", "write -P 2 1M 1M");
    virsh(&["detach-disk", guest.name(), "vda", "--config"]);
    let new = guest.path("vdc.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", new.to_str().unwrap(), "8M"]).unwrap();
    let path = new.to_str().unwrap();
    virsh(&["attach-disk", guest.name(), path, "vdc", "--subdriver", "qcow2", "--config"]);
    lab.backup(&[]);
    assert!(!live.exists());
    assert!(has_pattern(&base, "qcow2", 1, "0", "1M") && has_pattern(&base, "qcow2", 2, "1M", "1M"));
    qemu_img(&["check", "-q", "-f", "qcow2", base.to_str().unwrap()]).unwrap();
    lab.ok(&["check", "--read-data"]);
}
