//! Operations on domains, killed at every failpoint that they pass: `recover` brings each to an end, and after each
//! everything is looked at. The guests have nothing to boot, so that a kill takes a second.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::failpoints::{self, List};
use common::guest::{Disk, Guest, other_uri, uri};
use common::killed::{Times, at_each_name, kill};
use common::lab::{Lab, tool};
use common::qemu_images::{has_pattern, qemu_io};
use common::server;
use common::sound::{assert_sound, chain, disks};

/// A guest of two disks that the store knows as `web1`.
struct World {
    guest: Guest,
    lab: Lab,
}

impl World {
    fn new(name: &str) -> Self {
        let guest = Guest::new(name).disk("vda", Disk::qcow2("16M")).disk("vdb", Disk::raw("16M")).define();
        let lab = Lab::at(guest.dir()).init();
        lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
        let world = Self { guest, lab };
        world.write(1);
        world
    }

    fn running(name: &str) -> Self {
        let world = Self::new(name);
        world.guest.start();
        world
    }

    /// Live images with their formats, wherever the guest is.
    fn live(&self) -> Vec<(PathBuf, String)> {
        let xml = if self.guest.is_running() { self.guest.live_xml() } else { self.guest.persistent_xml() };
        disks(&xml).into_iter().map(|mut d| (d.images.remove(0), d.format)).collect()
    }

    /// Writes to a guest that is off.
    fn write(&self, byte: u8) {
        for (path, format) in self.live() {
            qemu_io(&path, &format, &format!("write -P {byte} 0 1M"));
        }
    }

    /// Whether both disks show it; either both do or none.
    fn shows(&self, byte: u8, step: &str) -> bool {
        let shown: Vec<bool> =
            self.live().iter().map(|(path, format)| has_pattern(path, format, byte, "0", "1M")).collect();
        assert!(shown.iter().all(|s| *s == shown[0]), "the disks are of different times: {step}");
        shown[0]
    }

    fn layers(&self) -> [usize; 2] {
        ["vda", "vdb"].map(|target| chain(&self.guest, target).len())
    }

    fn sound(&self, step: &str) {
        assert_sound(&self.lab, &[&self.guest], step);
        assert!(!self.lab.is_mounted(), "the mount is left: {step}");
    }

    /// As the operator left it: it runs, or not, with what it had on its disks.
    fn is_unharmed(&self, running: bool, step: &str) {
        assert_eq!(self.guest.is_running(), running, "{step}");
        assert!(self.shows(1, step), "{step}");
        self.sound(step);
    }

    /// Removes all backups but the last: what the store keeps is looked at after each kill.
    fn forget_old_backups(&self) {
        let folders = std::fs::read_dir(self.lab.store().join("vms/web1")).unwrap();
        if folders.filter(|f| f.as_ref().unwrap().path().is_dir()).count() > 4 {
            self.lab.ok(&["prune", "web1", "--keep-last", "1"]);
        }
    }

    fn has_current(&self) -> bool {
        !self.lab.json(&["vm", "show", "web1"])["tracking"]["current"].is_null()
    }

    fn switch_off(&self) {
        if self.guest.is_running() {
            self.guest.destroy();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for uri in [uri(), self.guest.uri()] {
            let _ = virsh(uri, &["destroy", self.guest.name()]);
        }
        self.lab.unmount();
    }
}

fn virsh(uri: &str, arguments: &[&str]) -> bool {
    Command::new("virsh").args(["-q", "-c", uri]).args(arguments).output().unwrap().status.success()
}

/// The last one of a chain: it merges what the one before left, in the middle of the chain, and its own, at the top.
fn backups_that_are_killed(world: &World, times: Times, list: List, running: bool) {
    world.lab.ok(&["setting", "set", "backup.chain.size", "2"]);
    at_each_name(
        times,
        list,
        |_| {
            world.forget_old_backups();
            if !world.has_current() {
                world.lab.ok(&["backup", "web1"]);
            }
            &world.lab
        },
        |_, _| "backup web1".into(),
        |_, step| {
            let layers = world.layers();
            assert_eq!(layers, if world.has_current() { [2, 2] } else { [1, 1] }, "{step}");
            world.is_unharmed(running, step);
        },
    );
}

#[test]
fn backups_of_a_running_domain() {
    let world = World::running("killed-backup");
    // One disk after the other is as it is with one that is off.
    backups_that_are_killed(&world, Times::First, failpoints::DOMAIN_BACKUP_RUNNING, true);
}

#[test]
fn backups_of_a_domain_that_is_off() {
    let world = World::new("killed-backup-off");
    backups_that_are_killed(&world, Times::Few, failpoints::DOMAIN_BACKUP_OFF, false);
}

#[test]
fn undoing_a_backup_of_a_running_domain() {
    let world = World::running("killed-undo");
    at_each_name(
        Times::First,
        failpoints::DOMAIN_BACKUP_UNDONE,
        |_| {
            kill(&world.lab, "backup web1", "backup-copied");
            &world.lab
        },
        |_, _| "recover".into(),
        |_, step| {
            assert_eq!(world.layers(), [1, 1], "{step}");
            world.is_unharmed(true, step);
        },
    );
}

#[test]
fn a_backup_after_a_disk_was_detached() {
    let world = World::new("killed-detached");
    let (name, raw) = (world.guest.name(), world.guest.path("vdb.raw"));
    at_each_name(
        Times::FewBut(failpoints::DOMAIN_BACKUP_OFF),
        failpoints::DOMAIN_DETACHED,
        |_| {
            world.forget_old_backups();
            if disks(&world.guest.persistent_xml()).len() == 1 {
                tool(
                    "virsh",
                    &["-q", "-c", uri(), "attach-disk", name, raw.to_str().unwrap(), "vdb", "--config"],
                );
            }
            world.lab.ok(&["backup", "web1"]);
            tool("virsh", &["-q", "-c", uri(), "detach-disk", name, "vdb", "--config"]);
            &world.lab
        },
        |_, _| "backup web1".into(),
        |_, step| {
            // Undone, it is merged by the next one: what was detached is nowhere else.
            if world.guest.dir().read_dir().unwrap().any(|e| is_delta_of(&e.unwrap().path(), "vdb")) {
                world.lab.ok(&["backup", "web1"]);
            }
            assert!(has_pattern(&raw, "raw", 1, "0", "1M"), "{step}");
            world.is_unharmed(false, step);
        },
    );
}

fn is_delta_of(path: &Path, disk: &str) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.contains(disk) && name.contains("knib")
}

#[test]
fn the_removal_of_the_current_backup_of_a_running_domain() {
    let world = World::running("killed-remove");
    at_each_name(
        Times::First,
        failpoints::DOMAIN_REMOVE,
        |_| {
            world.forget_old_backups();
            world.lab.ok(&["backup", "web1"]);
            &world.lab
        },
        |_, _| "remove web1/latest".into(),
        |_, step| {
            assert_eq!(world.layers(), if world.has_current() { [2, 2] } else { [1, 1] }, "{step}");
            world.is_unharmed(true, step);
        },
    );
}

#[test]
fn taking_a_running_domain_off_its_offering() {
    let world = World::running("killed-unassign");
    world.lab.ok(&["offering", "create", "gold"]);
    at_each_name(
        Times::First,
        failpoints::DOMAIN_UNASSIGN,
        |_| {
            world.forget_old_backups();
            world.lab.ok(&["vm", "assign", "web1", "gold"]);
            world.lab.ok(&["backup", "web1"]);
            &world.lab
        },
        |_, _| "vm unassign web1".into(),
        |_, step| {
            assert_eq!(world.layers(), if world.has_current() { [2, 2] } else { [1, 1] }, "{step}");
            world.is_unharmed(true, step);
        },
    );
}

#[test]
fn taking_a_running_domain_out_of_care() {
    let world = World::running("killed-vm-remove");
    let known = || !world.lab.ok(&["vm", "list"]).is_empty();
    at_each_name(
        Times::First,
        failpoints::DOMAIN_VM_REMOVE,
        |_| {
            if !known() {
                world.lab.ok(&["vm", "add", "web1", "--domain", world.guest.name(), "--uri", uri()]);
            }
            world.lab.ok(&["backup", "web1"]);
            &world.lab
        },
        |_, _| "vm remove web1".into(),
        |_, step| {
            assert_eq!(world.layers(), if known() { [2, 2] } else { [1, 1] }, "{step}");
            world.is_unharmed(true, step);
        },
    );
}

/// A guest that is off, with 1 in its one backup and 2 on its disks.
fn to_be_restored(world: &World) -> &Lab {
    world.switch_off();
    world.write(1);
    world.lab.ok(&["backup", "web1"]);
    world.write(2);
    world.forget_old_backups();
    &world.lab
}

#[test]
fn restores_of_a_domain() {
    let world = World::new("killed-restore");
    at_each_name(
        Times::Few,
        failpoints::DOMAIN_RESTORE,
        |_| to_be_restored(&world),
        |_, _| "restore web1/latest".into(),
        |_, step| {
            let done = world.shows(1, step);
            assert!(done || world.shows(2, step), "{step}");
            assert_eq!(world.layers(), if done { [1, 1] } else { [2, 2] }, "{step}");
            world.sound(step);
        },
    );
}

/// Restored, and running unless nothing was begun or the kill came before it was started.
fn is_restored(world: &World, step: &str) {
    world.switch_off();
    let done = world.shows(1, step);
    assert!(done || world.shows(2, step), "{step}");
    assert_eq!(world.layers(), if done { [1, 1] } else { [2, 2] }, "{step}");
    world.sound(step);
}

#[test]
fn quick_restores_of_a_domain() {
    let world = World::new("killed-quick");
    at_each_name(
        Times::First,
        failpoints::DOMAIN_RESTORE_QUICK,
        |_| to_be_restored(&world),
        |_, _| "restore web1/latest --quick".into(),
        |_, step| is_restored(&world, step),
    );
}

/// There and back again: it is on one of both hosts, never on none or on both.
#[test]
fn quick_restores_of_a_domain_to_another_host() {
    let world = Hosted::new("killed-host");
    let there = |uri: &str| virsh(uri, &["domid", world.name.as_str()]);
    at_each_name(
        Times::FewBut(failpoints::DOMAIN_RESTORE_QUICK),
        failpoints::DOMAIN_RESTORE_HOST,
        |_| {
            to_be_restored(&world.world.borrow());
            &world.lab
        },
        |_, _| format!("restore web1/latest --quick --host {}", if there(uri()) { "b" } else { "a" }),
        |_, step| {
            assert!(there(uri()) != there(other_uri()), "{step}");
            let mut world = world.world.borrow_mut();
            world.guest.follow(if there(uri()) { uri() } else { other_uri() });
            is_restored(&world, step);
        },
    );
}

/// A guest that moves.
struct Hosted {
    name: String,
    lab: Lab,
    world: RefCell<World>,
}

impl Hosted {
    fn new(name: &str) -> Self {
        let world = World::new(name);
        world.lab.ok(&["host", "add", "a", "--uri", uri()]);
        world.lab.ok(&["host", "add", "b", "--uri", other_uri()]);
        Self { name: world.guest.name().to_owned(), lab: world.lab.clone(), world: RefCell::new(world) }
    }
}

/// The guest is gone before its data is pulled: it is copied from the store.
#[test]
fn pulling_the_data_of_a_domain_that_is_off() {
    let world = World::new("killed-offline");
    at_each_name(
        Times::FewBut(failpoints::DOMAIN_RESTORE_QUICK),
        failpoints::DOMAIN_PULL_OFF,
        |_| {
            let lab = to_be_restored(&world);
            kill(lab, "restore web1/latest --quick", "pull-started");
            world.guest.destroy();
            lab
        },
        |_, _| "recover".into(),
        |_, step| {
            assert!(!world.guest.is_running(), "{step}");
            assert!(world.shows(1, step), "{step}");
            world.sound(step);
        },
    );
}

/// The mount that the guest runs on is gone: its memory is saved, and it starts again on another one.
#[test]
fn mounting_again_under_a_running_domain() {
    let world = World::new("killed-reopen");
    at_each_name(
        Times::FewBut(failpoints::DOMAIN_RESTORE_QUICK),
        failpoints::DOMAIN_REOPEN,
        |_| {
            let lab = to_be_restored(&world);
            kill(lab, "restore web1/latest --quick", "restore-started");
            let place = world.lab.mount_point().unwrap();
            let serving = server::pid(&place);
            server::kill(server::parent(serving));
            server::kill(serving);
            lab
        },
        |_, _| "recover".into(),
        |_, step| {
            assert!(world.guest.is_running(), "{step}");
            assert!(world.shows(1, step), "{step}");
            world.sound(step);
        },
    );
}

/// Room for a disk that is added while it runs.
fn ports() -> String {
    let root = "<controller type='pci' index='0' model='pcie-root'/>";
    let port = |n: u32| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>");
    (1..=8).fold(root.to_owned(), |all, n| all + &port(n))
}

#[test]
fn new_volumes_of_a_running_domain() {
    let guest = Guest::new("killed-volume").disk("vda", Disk::qcow2("16M")).devices(&ports()).define();
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    let world = World { guest, lab };
    world.write(1);
    world.lab.ok(&["backup", "web1"]);
    let targets =
        || -> Vec<String> { disks(&world.guest.persistent_xml()).into_iter().map(|d| d.target).collect() };
    for (more, times, list) in [
        ("", Times::First, failpoints::DOMAIN_NEW_VOLUME),
        (" --quick", Times::FewBut(failpoints::DOMAIN_NEW_VOLUME), failpoints::DOMAIN_NEW_VOLUME_QUICK),
    ] {
        at_each_name(
            times,
            list,
            |_| {
                world.switch_off();
                if let Some(new) = targets().get(1) {
                    tool("virsh", &["-q", "-c", uri(), "detach-disk", world.guest.name(), new, "--config"]);
                }
                world.guest.start();
                &world.lab
            },
            |_, _| format!("restore-volume web1/latest/vda --to web1{more}"),
            |_, step| {
                let live: Vec<String> =
                    disks(&world.guest.live_xml()).into_iter().map(|d| d.target).collect();
                assert_eq!(live, targets(), "{step}");
                if let Some(new) = live.get(1) {
                    assert_eq!(chain(&world.guest, new).len(), 1, "{step}");
                }
                world.is_unharmed(true, step);
            },
        );
    }
}

#[test]
fn new_domains() {
    let world = World::new("killed-new");
    world.lab.ok(&["backup", "web1"]);
    let name = |n: u32| format!("{}-{n}", world.guest.name());
    let (storage, made) = (world.guest.path("new"), Cell::new(0));
    std::fs::create_dir(&storage).unwrap();
    for (more, times, list) in [
        ("", Times::Few, failpoints::DOMAIN_NEW_VM),
        (" --quick", Times::FewBut(failpoints::DOMAIN_NEW_VM), failpoints::DOMAIN_NEW_VM_QUICK),
    ] {
        at_each_name(
            times,
            list,
            |n| {
                made.set(n);
                &world.lab
            },
            |_, n| format!("create-vm web1/latest --name {} --storage {}{more}", name(n), storage.display()),
            |_, step| {
                let name = name(made.get());
                let images: Vec<PathBuf> = storage.read_dir().unwrap().map(|e| e.unwrap().path()).collect();
                let known = world.lab.store().join("vms").join(&name).exists();
                let defined = virsh(uri(), &["domuuid", &name]);
                assert_eq!((defined, images.len()), (known, if known { 2 } else { 0 }), "{step}");
                let _ = virsh(uri(), &["destroy", &name]);
                for image in &images {
                    let format = if image.extension().unwrap() == "raw" { "raw" } else { "qcow2" };
                    assert!(has_pattern(image, format, 1, "0", "1M"), "{}: {step}", image.display());
                }
                if known {
                    let record = world.lab.json(&["vm", "show", &name]);
                    assert_eq!(record["state"], "Ready", "{step}");
                    world.lab.ok(&["vm", "remove", &name]);
                    assert!(virsh(uri(), &["undefine", &name]), "{step}");
                }
                images.iter().for_each(|image| std::fs::remove_file(image).unwrap());
                assert_eq!(world.lab.ok(&["recover"]), "nothing was interrupted", "{step}");
                world.lab.ok(&["check", "--read-data"]);
                assert!(!world.lab.is_mounted(), "the mount is left: {step}");
            },
        );
    }
    world.is_unharmed(false, "all are gone again");
}

/// What is overwritten in place can only be finished.
#[test]
fn restores_of_a_block_device() {
    let builder = Guest::new("killed-block").disk("vda", Disk::block("16M"));
    let deltas = builder.dir().join("deltas");
    std::fs::create_dir(&deltas).unwrap();
    let guest = builder.define();
    let lab = Lab::at(guest.dir()).init();
    let add = ["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()];
    lab.ok(&[&add[..], &["--delta-dir", deltas.to_str().unwrap()]].concat());
    let world = World { guest, lab };
    at_each_name(
        Times::FewBut(failpoints::DOMAIN_RESTORE),
        failpoints::DOMAIN_RESTORE_DEVICE,
        |_| to_be_restored(&world),
        |_, _| "restore web1/latest".into(),
        |_, step| is_restored_or_not_begun(&world, step),
    );
}

fn is_restored_or_not_begun(world: &World, step: &str) {
    let done = world.shows(1, step);
    assert!(done || world.shows(2, step), "{step}");
    assert_eq!(chain(&world.guest, "vda").len(), if done { 1 } else { 2 }, "{step}");
    world.sound(step);
}
