//! What the tests share: QEMU's tools as oracles, a source of chance, a disk that loses power.
#![allow(dead_code, missing_docs)]

pub mod exercise;
pub mod maker;
pub mod volatile;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use knib_qcow::{
    Access, Chain, Control, Error, FileStorage, Format, Image, ImageMut, PlainPaths, Report, Storage, check,
};

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Exit code, and what was printed.
pub fn tool(name: &str, args: &[&str]) -> (i32, String) {
    let out = Command::new(name).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{name}: {e}; install qemu-utils (scripts/install-deps does)"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), text)
}

pub fn qemu_img(args: &[&str]) -> String {
    let (code, text) = tool("qemu-img", args);
    assert_eq!(code, 0, "qemu-img {args:?}: {text}");
    text
}

pub fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = Vec::new();
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(s(path));
    let (code, text) = tool("qemu-io", &args);
    assert!(code == 0 && !text.contains("failed"), "qemu-io {args:?}: {text}");
}

/// QEMU finds nothing wrong with it, leaks included.
pub fn checked(path: &Path) {
    qemu_img(&["check", "-f", "qcow2", s(path)]);
}

pub struct Random(pub u64);
impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub fn temp() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_owned();
    (dir, move |name: &str| at.join(name))
}

pub fn content(path: &Path, format: Format) -> Vec<u8> {
    let chain = Chain::open(path, format, &PlainPaths).unwrap();
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// QEMU and our reader see `model`.
pub fn same_as_model(path: &Path, model: &[u8]) {
    let raw = path.with_extension("model");
    std::fs::write(&raw, model).unwrap();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", s(path), s(&raw)]);
    assert!(content(path, Format::Qcow2) == model, "{}: our reader disagrees", path.display());
}

pub fn quiet<T>(work: impl FnOnce(&Control) -> T) -> T {
    let cancel = AtomicBool::new(false);
    work(&Control { threads: 2, rate_limit: None, cancel: &cancel, progress: &|_| {} })
}

pub fn rw(path: &Path) -> Result<ImageMut, Error> {
    ImageMut::open(FileStorage::open(path, Access::ReadWrite).unwrap(), &PlainPaths)
}

/// Random writes, zeroes, discards and flushes against a model in memory.
pub fn history(path: &Path, seed: u64, steps: u64, version: u32) {
    let mut model = content(path, Format::Qcow2);
    let size = model.len() as u64;
    let mut random = Random(seed | 1);
    let mut image = rw(path).unwrap();
    let cluster = image.header().cluster_size();
    let overlay = image.header().backing.is_some();
    for _ in 0..steps {
        let mut start = random.below(size);
        let mut len = (1 + random.below(3 * cluster)).min(size - start);
        if random.below(2) == 0 {
            start = start / cluster * cluster;
            len = len.next_multiple_of(cluster).min(size - start);
        }
        let range = start as usize..(start + len) as usize;
        match random.below(8) {
            0..=3 => {
                let byte = random.next() as u8;
                model[range.clone()].fill(byte);
                image.write_at(&model[range], start).unwrap();
            }
            4 | 5 => {
                model[range].fill(0);
                image.write_zeroes(start, len).unwrap();
            }
            6 if version > 2 || !overlay => {
                image.discard(start, len).unwrap();
                let whole_start = start.next_multiple_of(cluster);
                let end = start + len;
                let whole_end = if end == size { end } else { end / cluster * cluster };
                if whole_start < whole_end {
                    model[whole_start as usize..whole_end as usize].fill(0);
                }
            }
            _ => image.flush().unwrap(),
        }
    }
    image.flush().unwrap();
    drop(image);
    same_as_model(path, &model);
    checked(path);
}

/// What the guest sees of an image in any storage, up to 64 MiB.
pub fn shown(storage: Arc<dyn Storage>) -> Vec<u8> {
    let chain = Chain::from_storage(storage, Format::Qcow2, &PlainPaths).unwrap();
    let mut bytes = vec![0; chain.size().min(64 << 20) as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

pub fn report_of(storage: Arc<dyn Storage>) -> Result<Report, Error> {
    quiet(|control| check(&Image::open(storage, &PlainPaths)?, control))
}

pub fn report(path: &Path) -> Result<Report, Error> {
    report_of(FileStorage::open(path, Access::Read).unwrap())
}
