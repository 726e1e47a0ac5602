//! A store of many backups, made by the product's own code, quickly: in memory, each disk with next to nothing on it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use knibfs::store::{Manifest, Store, VmRecord};

use crate::mounted_store::{CLUSTER, Shape, command, take, vm_record};
use crate::served::ServedMount;

pub const VMS: usize = 200;
pub const BACKUPS: usize = 10_000;
/// As `backup.chain.size` is when nobody sets it.
const CHAIN: usize = 8;

/// The store, in a file system in memory that is gone when dropped.
pub struct ManyBackups {
    dir: tempfile::TempDir,
    store: Store,
    vms: BTreeMap<String, VmRecord>,
}

impl ManyBackups {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("knibfs-many").tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2g", "knibfs-test"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success(), "a file system in memory: run this as root");
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let store = Store::init(&dir.path().join("store"), false).unwrap();
        let mut vms = BTreeMap::new();
        for n in 0..VMS {
            let vm = vm_record(&format!("vm{n:03}"));
            store.create_vm(&vm).unwrap();
            vms.insert(vm.name.to_string(), vm);
        }
        let many = Self { dir, store, vms };
        let all: Vec<_> = many.vms.values().collect();
        std::thread::scope(|scope| {
            for part in all.chunks(VMS / 2) {
                let store = &many.store;
                scope.spawn(move || part.iter().for_each(|vm| chains(store, vm)));
            }
        });
        many
    }

    /// One more backup of a VM; its name.
    pub fn take(&self, vm: &str) -> String {
        one(&self.store, &self.vms[vm], BACKUPS / VMS, None).name.to_string()
    }

    pub fn store(&self) -> &Path {
        self.store.root()
    }

    /// Mounts it with the real program, which is waited for.
    pub fn mount(&self, options: &[&str]) -> ServedMount {
        let mut command = command(self.store.root(), &self.dir.path().join("state"));
        command.args(["mount", "-f"]).args(options).stderr(Stdio::null());
        ServedMount::new(command, &self.dir.path().join("mnt"))
    }
}

impl Drop for ManyBackups {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

fn chains(store: &Store, vm: &VmRecord) {
    let mut parent = None;
    for number in 0..BACKUPS / VMS {
        let below = parent.as_ref().filter(|_| !number.is_multiple_of(CHAIN));
        parent = Some(one(store, vm, number, below));
    }
}

fn one(store: &Store, vm: &VmRecord, number: usize, parent: Option<&Manifest>) -> Manifest {
    let layer = [(number as u64 % 8, Shape::Compressed)].into();
    take(store, vm, number, parent, &layer, 16 * CLUSTER, true)
}
