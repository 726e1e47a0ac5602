//! Internal snapshots: made, applied and deleted as QEMU does it, and by one write.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::volatile::{Volatile, every_cut};
use common::{
    checked, content, history, qemu_img, qemu_io, quiet, report, report_of, rw, s, same_as_model, shown,
    temp, tool,
};
use knib_qcow::{Access, Error, FileStorage, Format, Storage, snapshot};

fn open(path: &Path) -> Arc<dyn Storage> {
    FileStorage::open(path, Access::ReadWrite).unwrap()
}
fn make(path: &Path, name: &str) -> snapshot::Snapshot {
    quiet(|c| snapshot::create(open(path), name, c)).unwrap()
}
fn apply(path: &Path, name: &str) {
    quiet(|c| snapshot::apply(open(path), name, c)).unwrap();
}
fn delete(path: &Path, name: &str) {
    quiet(|c| snapshot::delete(open(path), name, c)).unwrap();
}
fn clean(path: &Path) {
    checked(path);
    assert!(report(path).unwrap().is_clean());
}

const KINDS: [&str; 6] = [
    "compat=0.10",
    "cluster_size=512,refcount_bits=32",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=64k,lazy_refcounts=on",
    "cluster_size=2M,refcount_bits=2",
    "extended_l2=on,cluster_size=16k,refcount_bits=32",
];

#[test]
fn what_a_snapshot_holds_comes_back_whoever_made_it() {
    let (_dir, at) = temp();
    for (n, options) in KINDS.iter().enumerate() {
        let path = at(&format!("{n}.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "1000448"]);
        let version = if options.contains("0.10") { 2 } else { 3 };
        if n != 4 {
            qemu_io(&path, &["write -c -P 3 128k 64k"]);
        }
        history(&path, 3 + n as u64, 40, version);
        let first = content(&path, Format::Qcow2);
        assert_eq!(make(&path, "first").id, "1");
        clean(&path);
        history(&path, 33 + n as u64, 40, version);
        let second = content(&path, Format::Qcow2);
        qemu_img(&["snapshot", "-c", "second", s(&path)]);
        history(&path, 55 + n as u64, 40, version);
        clean(&path);
        if n == 4 {
            // A refcount of two bits holds no more.
            delete(&path, "second");
            qemu_img(&["snapshot", "-a", "first", s(&path)]);
            same_as_model(&path, &first);
            clean(&path);
            continue;
        }
        assert_eq!(make(&path, "third").id, "3");
        clean(&path);
        apply(&path, "first");
        same_as_model(&path, &first);
        clean(&path);
        history(&path, 77 + n as u64, 40, version);
        apply(&path, "2");
        same_as_model(&path, &second);
        clean(&path);
        qemu_img(&["snapshot", "-a", "first", s(&path)]);
        same_as_model(&path, &first);
        delete(&path, "second");
        clean(&path);
        qemu_img(&["snapshot", "-d", "third", s(&path)]);
        clean(&path);
        delete(&path, "1");
        assert_eq!(snapshot::list(&*open(&path)).unwrap(), []);
        same_as_model(&path, &first);
        clean(&path);
    }
}

#[test]
fn qemu_lists_and_opens_the_snapshots_that_are_made_here() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "3M"]);
    qemu_io(&path, &["write -P 1 0 3M"]);
    let made = make(&path, "before the ünlucky change");
    assert_eq!(snapshot::list(&*open(&path)).unwrap(), [made]);
    qemu_io(&path, &["write -P 2 1M 1M"]);
    let text = qemu_img(&["snapshot", "-l", s(&path)]);
    assert!(text.contains("before the ünlucky change"), "{text}");
    let raw = at("a.raw");
    qemu_img(&["convert", "-l", "snapshot.id=1", "-O", "raw", s(&path), s(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == vec![1; 3 << 20]);
}

#[test]
fn a_snapshot_brings_the_disks_size_back() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", s(&path), "40k"]);
    qemu_io(&path, &["write -P 1 0 40k"]);
    make(&path, "small");
    let mut image = rw(&path).unwrap();
    image.grow(3 << 20).unwrap();
    image.write_at(&[2; 5000], 2 << 20).unwrap();
    image.flush().unwrap();
    drop(image);
    make(&path, "large");
    let large = content(&path, Format::Qcow2);
    apply(&path, "small");
    same_as_model(&path, &[1; 40 << 10]);
    clean(&path);
    apply(&path, "large");
    same_as_model(&path, &large);
    clean(&path);
}

#[test]
fn bitmaps_are_not_trusted_after_a_snapshot_was_applied() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "1M"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    make(&path, "one");
    qemu_img(&["bitmap", "--add", s(&path), "b"]);
    clean(&path);
    make(&path, "two");
    assert!(!qemu_img(&["info", s(&path)]).contains("in-use"));
    apply(&path, "one");
    assert!(qemu_img(&["info", s(&path)]).contains("in-use"));
    clean(&path);
}

#[test]
fn what_cannot_be_done_is_said_and_nothing_changes() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let unchanged = |work: &dyn Fn() -> Result<(), Error>, says: &str| {
        let before = std::fs::read(&path).unwrap();
        let error = work().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(report(&path).unwrap().is_clean());
        assert!(std::fs::read(&path).unwrap()[..1024] == before[..1024]);
    };
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", s(&path), "1M"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    let create = |name: &str| quiet(|c| snapshot::create(open(&path), name, c)).map(|_| ());
    unchanged(&|| create("a"), "refcounts of 1 bits");
    unchanged(&|| create(""), "name");
    unchanged(&|| quiet(|c| snapshot::apply(open(&path), "x", c)), "no snapshot");
    unchanged(&|| quiet(|c| snapshot::delete(open(&path), "x", c)), "no snapshot");
    std::fs::remove_file(&path).unwrap();
    let options = format!("data_file={}", s(&at("data")));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, s(&path), "1M"]);
    unchanged(&|| create("a"), "external file");
}

#[test]
fn a_cut_leaves_the_image_with_or_without_the_change() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for options in ["cluster_size=512", "cluster_size=16k,extended_l2=on", "compat=0.10,cluster_size=4k"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "200k"]);
        qemu_io(&path, &["write -P 1 0 100k", "write -z 20k 16k"]);
        make(&path, "one");
        let one = content(&path, Format::Qcow2);
        qemu_io(&path, &["write -P 2 50k 100k"]);
        make(&path, "two");
        qemu_io(&path, &["write -P 3 120k 50k"]);
        let now = content(&path, Format::Qcow2);
        let start = std::fs::read(&path).unwrap();
        type Work = Box<dyn Fn(Arc<dyn Storage>) -> Result<(), Error>>;
        let works: Vec<(Work, &[u8])> = vec![
            (Box::new(|s| quiet(|c| snapshot::create(s, "three", c)).map(|_| ())), &now),
            (Box::new(|s| quiet(|c| snapshot::apply(s, "one", c))), &one),
            (Box::new(|s| quiet(|c| snapshot::delete(s, "two", c))), &now),
        ];
        for (work, want) in works {
            let mut seen = 0;
            let file = at("cut.qcow2");
            let end = every_cut(&start, &work, &mut |cut, survivor| {
                seen += 1;
                let storage = Volatile::new(survivor.clone(), u64::MAX);
                let found = report_of(storage.clone()).unwrap();
                assert_eq!(found.corruptions, 0, "{options}, cut {cut}: {:?}", found.messages);
                let shows = shown(storage.clone());
                assert!(shows == now || shows == want, "{options}, cut {cut}");
                assert!(snapshot::list(&*storage).unwrap().len().abs_diff(2) <= 1);
                if cut % 5 == 0 {
                    std::fs::write(&file, survivor).unwrap();
                    let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", s(&file)]);
                    assert!(code == 0 || code == 3, "{options}, cut {cut}: {text}");
                }
            });
            assert!(seen > 8, "{seen}");
            let storage = Volatile::new(end, u64::MAX);
            assert!(shown(storage.clone()) == want);
            assert!(report_of(storage).unwrap().is_clean());
        }
    }
}
