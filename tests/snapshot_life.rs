//! Snapshots killed at every failpoint, and what is refused; on domains with nothing to boot, so that it takes seconds.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::guest::{Disk, Guest, uri};
use common::killed::Times;
use common::lab::{Lab, Running, SmallDisk, tool};
use common::qemu_images::{has_pattern, qemu_io};
use common::sound::{assert_sound, chain_on_disk, disks};
use common::{failpoints, killed};

struct World {
    guest: Guest,
    lab: Lab,
}

impl World {
    /// Off, with a qcow2 disk `vda` and perhaps a raw one, `vdb`.
    fn new(test: &str, disks: usize, more: &[&str]) -> Self {
        let guest = Guest::new(test).disk("vda", Disk::qcow2("16M"));
        let guest = if disks == 2 { guest.disk("vdb", Disk::raw("16M")) } else { guest }.define();
        let lab = Lab::at(guest.dir()).init();
        let add = ["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()];
        lab.ok(&[&add, more].concat());
        Self { guest, lab }
    }

    /// Live images with their formats.
    fn live(&self) -> Vec<(PathBuf, String)> {
        let disks = disks(&self.guest.persistent_xml());
        disks.into_iter().map(|mut d| (d.images.remove(0), d.format)).collect()
    }

    fn write(&self, byte: u8) {
        for (path, format) in self.live() {
            qemu_io(&path, &format, &format!("write -P {byte} 0 256k"));
        }
    }

    fn shows(&self, byte: u8) -> bool {
        let shown: Vec<bool> =
            self.live().iter().map(|(path, format)| has_pattern(path, format, byte, "0", "256k")).collect();
        assert!(shown.iter().all(|s| *s == shown[0]), "the disks are of different times");
        shown[0]
    }

    /// Nothing but the disks is left.
    fn is_bare(&self) {
        for (path, format) in self.live() {
            assert_eq!(chain_on_disk(&path, &format, "at the end").len(), 1, "{} is left", path.display());
        }
    }

    fn snapshot(&self, command: &str, name: &str) -> String {
        self.lab.ok(&["vm-snapshot", command, "web1", name])
    }

    /// Whether it is there and not removed.
    fn has(&self, name: &str) -> bool {
        let all = self.lab.json(&["vm-snapshot", "list", "web1"]);
        all.as_array().unwrap().iter().any(|s| s["name"] == name && s["removed"] == false)
    }

    fn sound(&self, step: &str) {
        assert_sound(&self.lab, &[&self.guest], step);
    }
}

#[test]
fn taking_one_that_is_killed_anywhere_is_done_or_undone() {
    for (running, list) in
        [(false, failpoints::SNAPSHOT_CREATE_OFF), (true, failpoints::SNAPSHOT_CREATE_RUNNING)]
    {
        let world = World::new("snap-kill-create", 2, &[]);
        world.write(1);
        world.lab.ok(&["backup", "web1"]);
        world.write(2);
        if running {
            world.guest.start();
        }
        killed::everywhere(
            &world.lab,
            list,
            |_| {},
            |n| format!("vm-snapshot create web1 s{n}"),
            |n| {
                world.sound(&format!("killed at #{n}"));
                assert!(world.shows(2), "{n}");
                if world.has(&format!("s{n}")) {
                    world.snapshot("remove", &format!("s{n}"));
                }
            },
        );
        world.sound("all are removed");
        let kind = world.lab.kind(&world.lab.backup(&[]));
        assert_eq!(kind.0, "incremental", "taking and removing snapshots ends no chain: {}", kind.1);
    }
}

#[test]
fn going_back_that_is_killed_anywhere_is_done_or_undone() {
    let world = World::new("snap-kill-revert", 2, &[]);
    world.write(1);
    world.snapshot("create", "s1");
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_REVERT,
        |n| {
            world.write(2);
            // A branch of its own to be kept, and a delta to be merged.
            world.lab.ok(&["backup", "web1"]);
            if n % 2 == 0 {
                world.snapshot("create", &format!("b{n}"));
            }
            world.write(3);
        },
        |_| "vm-snapshot revert web1 s1".into(),
        |n| {
            world.sound(&format!("killed at #{n}"));
            assert!(world.shows(1) || world.shows(3), "{n}: neither done nor undone");
            if world.has(&format!("b{n}")) {
                world.snapshot("revert", &format!("b{n}"));
                assert!(world.shows(2), "{n}: the snapshot beside it");
                world.snapshot("remove", &format!("b{n}"));
            }
            world.snapshot("revert", "s1");
            assert!(world.shows(1), "{n}");
            world.lab.ok(&["remove", "web1/latest"]);
            world.sound(&format!("{n}: at rest"));
        },
    );
    world.snapshot("remove", "s1");
    world.is_bare();
}

#[test]
fn removing_one_that_is_killed_anywhere_is_done() {
    let world = World::new("snap-kill-remove", 1, &[]);
    world.write(1);
    world.snapshot("create", "base");
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_REMOVE_OFF,
        |n| {
            // Two branches on `r`: without `side`, one is deleted, the other merged into what both stood on.
            world.write(2);
            world.snapshot("create", &format!("r{n}"));
            world.write(3);
            world.lab.ok(&["backup", "web1"]);
            world.snapshot("create", &format!("side{n}"));
            world.snapshot("revert", &format!("r{n}"));
            world.write(4);
            world.snapshot("remove", &format!("r{n}"));
        },
        |n| format!("vm-snapshot remove web1 side{n}"),
        |n| {
            world.sound(&format!("killed at #{n}"));
            let name = format!("side{n}");
            if world.has(&name) {
                world.snapshot("remove", &name);
            }
            assert!(world.shows(4), "{n}");
            world.lab.ok(&["remove", "web1/latest"]);
        },
    );
    world.snapshot("revert", "base");
    assert!(world.shows(1), "base is what it was");
    world.snapshot("remove", "base");
    world.is_bare();
}

/// A layer in the middle of a branch that the disk does not stand on: what stood on it stands on what it was merged into.
#[test]
fn removing_one_on_another_branch_that_is_killed_anywhere_is_done() {
    let world = World::new("snap-kill-branch", 1, &[]);
    world.write(1);
    world.snapshot("create", "base");
    killed::at_each_name(
        Times::FewBut(failpoints::SNAPSHOT_REMOVE_OFF),
        failpoints::SNAPSHOT_REMOVE_BRANCH,
        |n| {
            for (byte, name) in [(2, "first"), (3, "middle"), (4, "tip")] {
                world.write(byte);
                world.snapshot("create", &format!("{name}{n}"));
            }
            world.snapshot("revert", "base");
            &world.lab
        },
        |_, n| format!("vm-snapshot remove web1 first{n}"),
        |_, step| {
            world.sound(step);
            let (_, n) = step.split_once("first").unwrap();
            let n: String = n.chars().take_while(char::is_ascii_digit).collect();
            assert!(!world.has(&format!("first{n}")), "{step}");
            for (byte, name) in [(4, format!("tip{n}")), (3, format!("middle{n}")), (1, "base".into())] {
                world.snapshot("revert", &name);
                assert!(world.shows(byte), "{name}: {step}");
            }
            world.snapshot("remove", &format!("middle{n}"));
            world.snapshot("remove", &format!("tip{n}"));
        },
    );
    world.snapshot("remove", "base");
    world.is_bare();
}

/// While the guest runs the live image is merged by QEMU.
#[test]
fn removing_one_while_the_guest_runs_that_is_killed_anywhere_is_done() {
    let world = World::new("snap-kill-running", 1, &[]);
    world.write(1);
    world.snapshot("create", "base");
    world.write(2);
    world.guest.start();
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_REMOVE_RUNNING,
        |n| {
            world.snapshot("create", &format!("r{n}"));
        },
        |n| format!("vm-snapshot remove web1 r{n}"),
        |n| {
            world.sound(&format!("killed at #{n}"));
            let name = format!("r{n}");
            if world.has(&name) {
                world.snapshot("remove", &name);
            }
            assert!(world.shows(2), "{n}");
        },
    );
    world.snapshot("remove", "base");
    assert!(world.shows(2));
    world.is_bare();
}

#[test]
fn what_makes_no_sense_changes_nothing() {
    let world = World::new("snap-wrong", 2, &[]);
    world.write(1);
    world.snapshot("create", "s1");
    let seen = || (world.lab.seen(), world.guest.persistent_xml());
    let before = seen();
    let refused = |arguments: &[&str], words: &[&str]| {
        world.lab.refused(arguments, words);
        let after = seen();
        before.0.assert_same(&after.0, &format!("{arguments:?}"));
        assert_eq!(before.1, after.1, "{arguments:?}");
    };
    refused(&["vm-snapshot", "create", "web1", "s1"], &["there is one of that name"]);
    refused(&["vm-snapshot", "revert", "web1", "s2"], &["no snapshot \"s2\" of web1", "it has s1"]);
    refused(&["vm-snapshot", "remove", "web1", "s2"], &["no snapshot \"s2\" of web1", "it has s1"]);
    refused(&["vm-snapshot", "create", "web2"], &["web2"]);
    refused(&["volume-snapshot", "create", "web1", "vdz"], &["no disk \"vdz\" of web1", "it has vda, vdb"]);
    refused(
        &["volume-snapshot", "revert", "web1", "vda", "s1"],
        &["no snapshot \"s1\" of the disk vda", "none"],
    );
    for name in ["../s", "a/b", "-x", "a:b", "a\nb", "", "x,y"] {
        let out = world.lab.command(&["vm-snapshot", "create", "web1", "--", name]).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{name:?}");
    }
    before.0.assert_same(&world.lab.seen(), "hostile names");

    // Another operation is under way.
    let mut backup = Running::start(&world.lab, &["backup", "web1"], Some("backup-snapshotted"));
    world.lab.refused(&["vm-snapshot", "create", "web1", "s2"], &["in use", "backup web1"]);
    backup.wait("it is there", |_| true);
    backup.go_on();
    assert!(backup.end().0);

    // It runs.
    world.guest.start();
    let before = (world.lab.seen(), world.guest.persistent_xml());
    world.lab.refused(&["vm-snapshot", "revert", "web1", "s1"], &["the VM is running: shut it down first"]);
    world.guest.pause();
    world.lab.refused(&["vm-snapshot", "revert", "web1", "s1"], &["the VM is paused"]);
    world.lab.refused(&["vm-snapshot", "create", "web1", "s2", "--quiesce"], &["paused"]);
    world.guest.resume();
    before.0.assert_same(&world.lab.seen(), "refused while it runs");
    world.guest.destroy();

    // Its image is gone.
    let (live, format) = world.live().remove(0);
    let image = chain_on_disk(&live, &format, "before").pop().unwrap();
    let aside = image.with_extension("aside");
    std::fs::rename(&image, &aside).unwrap();
    world.lab.refused(&["vm-snapshot", "revert", "web1", "s1"], &["cannot be used", "put back"]);
    std::fs::rename(&aside, &image).unwrap();
    world.sound("all refused");
}

/// An image that is away for now may stand on what would be merged.
#[test]
fn nothing_is_merged_while_a_snapshot_is_away() {
    let world = World::new("snap-away", 2, &[]);
    world.write(1);
    world.snapshot("create", "s1");
    world.write(2);
    world.snapshot("create", "s2");
    world.snapshot("revert", "s1");
    world.write(3);
    let all = world.lab.json(&["vm-snapshot", "list", "web1"]);
    let images: Vec<PathBuf> = all[1]["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| PathBuf::from(v["path"].as_str().unwrap()))
        .collect();
    let away = |image: &PathBuf| image.with_extension("away");
    images.iter().for_each(|image| std::fs::rename(image, away(image)).unwrap());
    let out = world.lab.command(&["vm-snapshot", "remove", "web1", "s1"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("the image of the snapshot s2 of vda, is gone"), "{said}");
    assert!(world.shows(3));
    images.iter().for_each(|image| std::fs::rename(away(image), image).unwrap());
    world.sound("it is back");
    world.snapshot("revert", "s2");
    assert!(world.shows(2), "it is what it was");
    world.snapshot("remove", "s2");
    world.is_bare();
}

#[test]
fn without_room_nothing_is_changed() {
    let guest = Guest::new("snap-full").disk("vda", Disk::qcow2("16M")).define();
    let lab = Lab::at(guest.dir()).init();
    let world = World { guest, lab };
    let small = SmallDisk::new(world.guest.path("small"), "1M");
    let deltas = small.path().to_str().unwrap();
    let add = ["vm", "add", "web1", "--domain", world.guest.name(), "--uri", uri(), "--delta-dir", deltas];
    world.lab.ok(&add);
    world.write(1);
    let is_refused = |arguments: &[&str]| {
        small.fill();
        let before = world.guest.persistent_xml();
        let out = world.lab.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains("small") && said.contains("No space left"), "{said}");
        assert_eq!(world.guest.persistent_xml(), before);
        world.sound("a full disk");
        assert!(world.shows(1));
        tool("rm", &[small.path().join("filler").to_str().unwrap()]);
    };
    is_refused(&["vm-snapshot", "create", "web1", "s1"]);
    world.snapshot("create", "s1");
    is_refused(&["vm-snapshot", "revert", "web1", "s1"]);
    world.snapshot("remove", "s1");
    assert!(world.shows(1));
    world.is_bare();
}
