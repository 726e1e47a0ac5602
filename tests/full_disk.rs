//! A store on a file system without room: the old state stays, and the words say what to do.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

use knibfs::store::{Store, atomic};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A small file system in memory. Needs root, as the whole test run does.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount("knibfs-test", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=128k"))
            .expect("mounting a tmpfs needs root: run the tests as root");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn fill(&self) {
        let blocks: Vec<u8> = vec![1; 1 << 20];
        let mut written = 0;
        // As much as fits, down to the last block.
        for size in [65536, 4096] {
            while fs::write(self.path().join(format!("filler{written}")), &blocks[..size]).is_ok() {
                written += 1;
            }
        }
        assert!(written > 0);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_record_on_a_full_disk_stays_what_it_was() {
    let disk = SmallDisk::new();
    let store = Store::init(&disk.path().join("store"), false).unwrap();
    let path = store.root().join("offerings/x");
    atomic::write(&path, b"old", 0o600).unwrap();
    disk.fill();
    let error = atomic::write(&path, &[7; 100_000], 0o600).unwrap_err();
    assert!(error.is_full(), "{error}");
    let said = error.to_string();
    assert!(said.contains("offerings") && said.contains("free space"), "{said}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "something was left beside it");
}

#[test]
fn a_setting_on_a_full_disk_stays_what_it_was() {
    let disk = SmallDisk::new();
    let store = Store::init(&disk.path().join("store"), false).unwrap();
    store.set_setting("backup.chain.size", "5").unwrap();
    disk.fill();
    // Whether one more block fits is the file system's affair; what may never be is something in between.
    if store.set_setting("backup.chain.size", "6").is_err() {
        assert_eq!(store.setting("backup.chain.size").unwrap(), "5");
    }
    assert!(Store::open(store.root()).is_ok());
}
