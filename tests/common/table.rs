//! What the tables of the requirements are played on: a guest with two disks that a store knows as `web1`.

use std::path::PathBuf;

use super::guest::{Disk, Guest, uri};
use super::lab::Lab;
use super::sound::{assert_sound, chain};

/// Its disks: the first is qcow2, the second raw.
pub const DISKS: [&str; 2] = ["vda", "vdb"];

#[derive(Debug)]
pub struct Table {
    pub guest: Guest,
    pub lab: Lab,
}

impl Table {
    /// It runs, with a file system on each disk.
    pub fn new(test: &str) -> Self {
        Self::with(test, "")
    }

    /// The same with devices of its own besides, in libvirt's XML.
    pub fn with(test: &str, devices: &str) -> Self {
        let guest = Guest::new(test)
            .disk("vda", Disk::qcow2("64M"))
            .disk("vdb", Disk::raw("64M"))
            .devices(devices)
            .with_system()
            .start();
        let lab = Lab::at(guest.dir()).init();
        lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
        guest.wait_for_agent();
        DISKS.iter().for_each(|disk| guest.mkfs(disk));
        Self { guest, lab }
    }

    pub fn write(&self, file: &str) {
        DISKS.iter().for_each(|disk| self.guest.write(&format!("/mnt/{disk}/{file}"), file.as_bytes()));
    }

    /// Starts it, and mounts its disks.
    pub fn start(&self) {
        self.guest.start();
        self.guest.wait_for_agent();
        // The small system mounts what it finds.
        for disk in DISKS {
            self.guest.sh(&format!(
                "grep -q ' /mnt/{disk} ' /proc/mounts || mount -t ext4 /dev/{disk} /mnt/{disk}"
            ));
        }
    }

    /// Both disks have just these files.
    pub fn has(&self, files: &[&str], row: &str) {
        for disk in DISKS {
            let listed = self.guest.sh(&format!("ls /mnt/{disk}"));
            let found: Vec<&str> = listed.split_whitespace().filter(|f| *f != "lost+found").collect();
            assert_eq!(found, files, "{row}: {disk}");
            for file in files {
                assert_eq!(self.guest.read(&format!("/mnt/{disk}/{file}")), file.as_bytes(), "{row}: {disk}");
            }
        }
    }

    pub fn chains(&self) -> Vec<Vec<PathBuf>> {
        DISKS.iter().map(|disk| chain(&self.guest, disk)).collect()
    }

    /// The images below the live ones.
    pub fn below(&self) -> Vec<Vec<PathBuf>> {
        self.chains().into_iter().map(|chain| chain[1..].to_vec()).collect()
    }

    pub fn snapshot(&self, command: &str, name: &str) -> String {
        self.lab.ok(&["vm-snapshot", command, "web1", name])
    }

    /// Names of the snapshots, removed ones with a minus.
    pub fn listed(&self) -> Vec<String> {
        let all = self.lab.json(&["vm-snapshot", "list", "web1"]);
        let name = |s: &serde_json::Value| {
            let removed = if s["removed"] == true { "-" } else { "" };
            format!("{removed}{}", s["name"].as_str().unwrap())
        };
        all.as_array().unwrap().iter().map(name).collect()
    }

    pub fn sound(&self, row: &str) {
        assert_sound(&self.lab, &[&self.guest], row);
    }
}
