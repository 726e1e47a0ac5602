//! A store and a VM of plain disk files, worked on by the real program, and by its library where only the state matters.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;

use knibfs::ops::backup::{self, Options};
use knibfs::ops::control::OpControl;
use knibfs::ops::{check, recover, remove};
use knibfs::store::manifest::BackupState;
use knibfs::store::{Manifest, Store, VmName, VmRecord};

use super::lab::{Lab, tool};

pub struct DiskLab {
    pub dir: tempfile::TempDir,
    lab: Lab,
    format: &'static str,
}

impl Deref for DiskLab {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl DiskLab {
    /// A VM `web1` with one disk of 16 MiB, the first MiB written: qcow2 for `overlay`, raw for `scan`.
    pub fn new(track: &str) -> Self {
        let lab = Self::empty(if track == "overlay" { "qcow2" } else { "raw" });
        lab.ok(&["init", lab.path("store").to_str().unwrap()]);
        lab.add_vm("web1", track);
        lab
    }

    fn empty(format: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix("knibfs-lab").tempdir().unwrap();
        Self { lab: Lab::at(dir.path()), dir, format }
    }

    /// The store once more; its VMs' disks are the same.
    pub fn copy(&self) -> Self {
        let copy = Self::empty(self.format);
        let status =
            Command::new("cp").arg("-a").arg(self.path("store")).arg(copy.dir.path()).status().unwrap();
        assert!(status.success(), "cp failed");
        copy
    }

    pub fn add_vm(&self, vm: &str, track: &str) {
        let disk = self.disk(vm);
        tool("qemu-img", &["create", "-q", "-f", self.format, disk.to_str().unwrap(), "16M"]);
        self.write(vm, "write -P 1 0 1M");
        self.ok(&["vm", "add", vm, "--track", track, "--disk", &format!("root={}", disk.display())]);
    }

    pub fn disk(&self, vm: &str) -> PathBuf {
        self.path(&format!("{vm}.img"))
    }

    pub fn write(&self, vm: &str, command: &str) {
        tool("qemu-io", &["-f", self.format, "-c", command, self.disk(vm).to_str().unwrap()]);
    }

    pub fn store(&self) -> Store {
        Store::open(&self.path("store")).unwrap().with_state_dir(self.path("state"))
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Standard error of a command that must fail.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
        errors
    }

    /// Changes the disk and takes a backup; `web1/BACKUP`.
    pub fn backup(&self) -> String {
        self.backup_of("web1", Options::default())
    }

    pub fn backup_of(&self, vm: &str, options: Options) -> String {
        let (store, name) = (self.store(), vm.parse().unwrap());
        let number = store.backup_names(&name).unwrap().len() + 2;
        let commands =
            [format!("write -P {number} {number}M 192k"), format!("write -P {} 0 64k", number + 100)];
        let disk = self.disk(vm);
        let arguments = ["-f", self.format, "-c", &commands[0], "-c", &commands[1], disk.to_str().unwrap()];
        tool("qemu-io", &arguments);
        // In this process: starting the program takes longer than the backup.
        let made = quietly(|control| backup::run(&store, &name, options, control)).unwrap();
        format!("{vm}/{}", made.name)
    }

    pub fn isolated(&self) -> String {
        self.backup_of("web1", Options { isolated: true, quiesce: false })
    }

    pub fn remove(&self, backups: &[&str]) {
        let targets: Vec<_> = backups.iter().map(|b| b.parse().unwrap()).collect();
        quietly(|control| remove::run(&self.store(), &targets, false, control)).unwrap();
    }

    pub fn recover(&self) {
        quietly(|control| recover::run(&self.store(), control)).unwrap();
    }

    /// `count` backups, one after the other.
    pub fn backups(&self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.backup()).collect()
    }

    pub fn record(&self, vm: &str) -> VmRecord {
        self.store().vm(&vm.parse::<VmName>().unwrap()).unwrap()
    }

    /// The manifest of `VM/BACKUP`, where it is there.
    pub fn manifest(&self, backup: &str) -> Option<Manifest> {
        self.store().resolve(&backup.parse().unwrap()).ok()
    }

    pub fn state(&self, backup: &str) -> Option<BackupState> {
        self.manifest(backup).map(|m| m.state)
    }

    /// The backups of a VM that are listed, the oldest first.
    pub fn listed(&self, vm: &str) -> Vec<String> {
        let found = self.store().backups(&vm.parse().unwrap()).unwrap().manifests;
        found.iter().filter(|m| m.is_listed()).map(|m| format!("{vm}/{}", m.name)).collect()
    }

    pub fn folder(&self, backup: &str) -> PathBuf {
        self.path("store/vms").join(backup)
    }

    /// Everything in the VM's folder, hidden names too, but for its own files.
    pub fn folders(&self, vm: &str) -> Vec<String> {
        let names = std::fs::read_dir(self.path("store/vms").join(vm)).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| n != "vm.json" && n != ".lock" && !n.ends_with(".tmp"));
        names.sort();
        names
    }

    /// A flat copy of the disk as it is now.
    pub fn keep(&self, name: &str) -> PathBuf {
        let (disk, copy) = (self.disk("web1"), self.path(name));
        let to = copy.to_str().unwrap();
        tool("qemu-img", &["convert", "-f", self.format, "-O", "raw", disk.to_str().unwrap(), to]);
        copy
    }

    /// The stored image is sound and shows what `raw` holds.
    pub fn shows(&self, backup: &str, raw: &Path) {
        let stored = self.folder(backup).join("root.qcow2");
        tool("qemu-img", &["check", "-q", "-f", "qcow2", stored.to_str().unwrap()]);
        let paths = [raw.to_str().unwrap(), stored.to_str().unwrap()];
        tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", paths[0], paths[1]]);
    }

    /// The disk shows what `raw` holds.
    pub fn disk_shows(&self, raw: &Path) {
        let disk = self.disk("web1");
        let paths = [disk.to_str().unwrap(), raw.to_str().unwrap()];
        tool("qemu-img", &["compare", "-q", "-f", self.format, "-F", "raw", paths[0], paths[1]]);
    }

    /// Deltas of knibfs beside the disks.
    pub fn deltas(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.contains("knib")).collect()
    }

    /// The next backup's kind and reason.
    pub fn next_kind(&self) -> (String, String) {
        let made = self.manifest(&self.backup()).unwrap();
        (made.disks[0].kind.to_string(), made.disks[0].reason.clone())
    }

    /// The whole store is sound.
    pub fn check(&self) {
        let found = quietly(|control| check::run(&self.store(), None, None, true, control)).unwrap();
        assert_eq!(found.damage, Vec::<String>::new());
    }
}

/// Runs an operation of the library without a terminal.
pub fn quietly<T>(run: impl FnOnce(&OpControl<'_>) -> T) -> T {
    let cancel = AtomicBool::new(false);
    run(&OpControl { cancel: &cancel, progress: &|_| {} })
}
