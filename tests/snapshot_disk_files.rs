//! Snapshots of disk files that no domain owns: with `--track overlay` the given path stays the live image.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::lab::Lab;
use common::qemu_images::{has_pattern, qemu_img, qemu_io};
use common::sound::chain_on_disk;
use common::{failpoints, killed};

struct World {
    _dir: tempfile::TempDir,
    lab: Lab,
    disks: [PathBuf; 2],
}

impl World {
    fn new(track: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Lab::at(dir.path()).init();
        let disks = ["root", "data"].map(|name| {
            let path = dir.path().join(format!("{name}.qcow2"));
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8M"]).unwrap();
            path
        });
        let [root, data] = [0, 1].map(|i| format!("{}={}", ["root", "data"][i], disks[i].display()));
        lab.ok(&["vm", "add", "web1", "--disk", &root, "--disk", &data, "--track", track]);
        Self { _dir: dir, lab, disks }
    }

    fn write(&self, byte: u8) {
        self.disks.iter().for_each(|disk| qemu_io(disk, "qcow2", &format!("write -P {byte} 0 256k")));
    }

    fn shows(&self, byte: u8) -> bool {
        let [root, data] = [0, 1].map(|i| has_pattern(&self.disks[i], "qcow2", byte, "0", "256k"));
        assert_eq!(root, data, "the disks are of different times");
        root
    }

    fn snapshot(&self, command: &str, name: &str) -> String {
        self.lab.ok(&["vm-snapshot", command, "web1", name])
    }

    fn listed(&self) -> Vec<serde_json::Value> {
        self.lab.json(&["vm-snapshot", "list", "web1"]).as_array().unwrap().clone()
    }

    /// Every image is sound and needed, the store can be read, nothing is in the journal.
    fn sound(&self, step: &str) {
        let mut used: Vec<PathBuf> =
            self.disks.iter().flat_map(|disk| chain_on_disk(disk, "qcow2", step)).collect();
        for snapshot in self.listed() {
            for volume in snapshot["volumes"].as_array().unwrap() {
                used.extend(chain_on_disk(volume["path"].as_str().unwrap().as_ref(), "qcow2", step));
            }
        }
        for entry in std::fs::read_dir(self.disks[0].parent().unwrap()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let path = path.canonicalize().unwrap();
                assert!(used.contains(&path), "{step}: nothing needs {}", path.display());
                qemu_img(&["check", "-q", "-f", "qcow2", path.to_str().unwrap()])
                    .unwrap_or_else(|e| panic!("{step}: {e}"));
            }
        }
        self.lab.ok(&["check", "--read-data"]);
        assert_eq!(self.lab.ok(&["recover"]), "nothing was interrupted", "{step}");
    }

    fn is_bare(&self) {
        for disk in &self.disks {
            assert_eq!(chain_on_disk(disk, "qcow2", "at the end").len(), 1, "{}", disk.display());
        }
    }
}

/// Table A, without a guest.
#[test]
fn branches_are_taken_reverted_to_and_removed() {
    let world = World::new("overlay");
    world.write(1);
    world.snapshot("create", "s1");
    world.write(2);
    world.snapshot("create", "s2");
    world.write(3);
    world.snapshot("revert", "s2");
    assert!(world.shows(2), "row 3");
    world.sound("row 3");
    world.snapshot("revert", "s1");
    assert!(world.shows(1), "row 4");
    world.write(4);
    let backup = world.lab.backup(&[]);
    assert_eq!(world.lab.kind(&backup).0, "full");
    world.snapshot("create", "s3");
    world.write(5);
    assert_eq!(world.lab.kind(&world.lab.backup(&[])).0, "incremental");
    world.sound("row 5");
    world.snapshot("remove", "s1");
    assert_eq!(world.listed()[0]["removed"], true, "row 6");
    assert!(world.shows(5), "row 6");
    world.sound("row 6");
    world.snapshot("remove", "s3");
    assert!(world.shows(5), "row 7");
    world.sound("row 7");
    world.write(6);
    assert_eq!(world.lab.kind(&world.lab.backup(&[])).0, "incremental", "it was knibfs that merged");
    world.snapshot("revert", "s2");
    assert!(world.shows(2), "s2 is what it was");
    world.snapshot("remove", "s2");
    assert!(world.shows(2), "row 8");
    assert_eq!(world.listed(), Vec::<serde_json::Value>::new(), "row 8");
    world.sound("row 8");
    world.is_bare();
}

#[test]
fn killed_anywhere_each_is_done_or_undone() {
    let world = World::new("overlay");
    world.write(1);
    world.lab.backup(&[]);
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_CREATE_FILES,
        |_| {},
        |n| format!("vm-snapshot create web1 c{n}"),
        |n| {
            assert!(world.shows(1), "{n}");
            world.sound(&format!("create killed at #{n}"));
            if world.listed().iter().any(|s| s["name"] == format!("c{n}")) {
                world.snapshot("remove", &format!("c{n}"));
            }
        },
    );
    assert_eq!(world.lab.kind(&world.lab.backup(&[])).0, "incremental");
    world.snapshot("create", "s1");
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_REVERT_FILES,
        |_| world.write(2),
        |_| "vm-snapshot revert web1 s1".into(),
        |n| {
            assert!(world.shows(1) || world.shows(2), "{n}");
            world.sound(&format!("revert killed at #{n}"));
        },
    );
    killed::everywhere(
        &world.lab,
        failpoints::SNAPSHOT_REMOVE_FILES,
        |n| {
            world.snapshot("revert", "s1");
            world.write(2);
            world.snapshot("create", &format!("r{n}"));
            world.write(3);
        },
        |n| format!("vm-snapshot remove web1 r{n}"),
        |n| {
            assert!(world.shows(3), "{n}");
            world.sound(&format!("remove killed at #{n}"));
            if world.listed().iter().any(|s| s["name"] == format!("r{n}") && s["removed"] == false) {
                world.snapshot("remove", &format!("r{n}"));
            }
        },
    );
    world.snapshot("revert", "s1");
    assert!(world.shows(1));
    world.snapshot("remove", "s1");
    world.is_bare();
}

/// Why: a scan leaves everything on primary as it is, and a raw file's path would become qcow2.
#[test]
fn those_that_cannot_have_any_are_refused() {
    let world = World::new("scan");
    let before = world.lab.seen();
    let words = &["tracked by scan", "--track overlay"];
    world.lab.refused(&["vm-snapshot", "create", "web1", "s1"], words);
    world.lab.refused(&["volume-snapshot", "create", "web1", "root", "s1"], words);
    before.assert_same(&world.lab.seen(), "refused snapshots");
}
