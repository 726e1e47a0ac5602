//! The engine and QEMU keep out of each other's way by QEMU's own locks.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;

use knib_qcow::{
    Access, Chain, Control, Error, FileStorage, Format, LockedPaths, Locking, NewImage, PlainPaths,
    check_unused, commit, create, set_backing,
};

fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu_img(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").args(args).output();
    let out = out.unwrap_or_else(|e| panic!("qemu-img (install qemu-utils; scripts/install-deps does): {e}"));
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// A `qemu-io` that holds an image open until it is dropped.
struct Holder(Child);
impl Holder {
    fn new(path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("qemu-io (install qemu-utils; scripts/install-deps does): {e}"));
        // It answers once the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "qemu-io could not open {}", path.display());
        Self(child)
    }
}
impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn image(path: &Path, backing: Option<&str>) {
    let backing = backing.map(|b| (b.to_owned(), Format::Qcow2));
    let new = NewImage { size: 1 << 20, cluster_bits: 16, compression: None, backing };
    create(FileStorage::create_new(path).unwrap(), &new).unwrap();
}

fn in_use<T>(result: Result<T, Error>) {
    let error = result.err().unwrap();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
}

#[test]
fn what_qemu_writes_is_neither_written_nor_read_unless_the_caller_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, None);
    let held = Holder::new(&path, false);
    in_use(FileStorage::open(&path, Access::ReadWrite));
    in_use(FileStorage::open_with(&path, Access::Read, Locking::Reader));
    in_use(check_unused(&path));
    in_use(set_backing(&path, None, None));
    FileStorage::open_with(&path, Access::ReadWrite, Locking::Off).unwrap();
    Chain::open(&path, Format::Qcow2, &PlainPaths).unwrap();
    drop(held);
    check_unused(&path).unwrap();
    FileStorage::open(&path, Access::ReadWrite).unwrap();
}

#[test]
fn what_qemu_reads_is_read_but_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, None);
    let _held = Holder::new(&path, true);
    FileStorage::open_with(&path, Access::Read, Locking::Reader).unwrap();
    check_unused(&path).unwrap();
    in_use(FileStorage::open(&path, Access::ReadWrite));
}

#[test]
fn qemu_keeps_away_from_what_the_engine_has_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, None);
    let writing = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let (done, said) = qemu_img(&["info", s(&path)]);
    assert!(!done && said.contains("lock"), "{said}");
    assert!(qemu_img(&["info", "-U", s(&path)]).0);
    drop(writing);
    let reading = FileStorage::open_with(&path, Access::Read, Locking::Reader).unwrap();
    assert!(qemu_img(&["info", s(&path)]).0);
    let (done, said) = qemu_img(&["resize", s(&path), "2M"]);
    assert!(!done && said.contains("lock"), "{said}");
    drop(reading);
    assert!(qemu_img(&["resize", s(&path), "2M"]).0);
}

#[test]
fn a_commit_locks_the_base_and_every_layer_above_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    image(&at("lowest"), None);
    image(&at("base"), Some("lowest"));
    image(&at("mid"), Some("base"));
    image(&at("top"), Some("mid"));
    let cancel = AtomicBool::new(false);
    let run = || {
        let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
        commit(&at("top"), &at("base"), Format::Qcow2, &control)
    };
    for name in ["lowest", "base", "mid", "top"] {
        let held = FileStorage::open(&at(name), Access::ReadWrite).unwrap();
        in_use(run());
        drop(held);
    }
    run().unwrap();
    let reader = Chain::open(&at("top"), Format::Qcow2, &LockedPaths).unwrap();
    in_use(run());
    drop(reader);
    run().unwrap();
}
