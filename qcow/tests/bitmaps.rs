//! Persistent bitmaps: added, cleared, merged, removed as QEMU does it; and other options for images.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use common::volatile::{Volatile, every_cut};
use common::{
    checked, content, history, qemu_img, qemu_io, quiet, report, report_of, s, same_as_model, shown, temp,
    tool,
};
use knib_qcow::{
    Access, Amend, Error, FileStorage, Format, PlainPaths, Preallocation, Storage, amend, bitmap, snapshot,
};

fn open(path: &Path) -> Arc<dyn Storage> {
    FileStorage::open(path, Access::ReadWrite).unwrap()
}

fn clean(path: &Path) {
    checked(path);
    assert!(report(path).unwrap().is_clean());
}

fn marked(path: &Path, name: &str) -> Vec<Range<u64>> {
    bitmap::dirty(&*FileStorage::open(path, Access::Read).unwrap(), name).unwrap()
}

#[test]
fn bitmaps_of_both_makers_record_what_qemu_writes() {
    let (_dir, at) = temp();
    for options in ["cluster_size=64k", "cluster_size=512,refcount_bits=1", "extended_l2=on,cluster_size=16k"]
    {
        let path = at("a.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "40M"]);
        quiet(|c| bitmap::add(open(&path), "fine", 512, false, c)).unwrap();
        quiet(|c| bitmap::add(open(&path), "coarse", 1 << 20, false, c)).unwrap();
        quiet(|c| bitmap::add(open(&path), "off", 65536, true, c)).unwrap();
        qemu_img(&["bitmap", "--add", "-g", "65536", s(&path), "qemus"]);
        clean(&path);
        qemu_io(&path, &["write -P 1 1000 3000", "write -P 2 33M 64k"]);
        clean(&path);
        assert_eq!(marked(&path, "fine"), [512..4096, 33 << 20..(33 << 20) + 65536]);
        assert_eq!(marked(&path, "coarse"), [0..1 << 20, 33 << 20..34 << 20]);
        assert_eq!(marked(&path, "qemus"), [0..65536, 33 << 20..(33 << 20) + 65536]);
        assert_eq!(marked(&path, "off"), []);
        // Merged into another granularity, by either program.
        let source = FileStorage::open(&path, Access::Read).unwrap();
        quiet(|c| bitmap::merge(open(&path), "off", &*source, "fine", c)).unwrap();
        drop(source);
        qemu_img(&["bitmap", "--add", "--merge", "fine", "--disable", "-g", "65536", s(&path), "theirs"]);
        assert_eq!(marked(&path, "off"), marked(&path, "theirs"));
        clean(&path);
        quiet(|c| bitmap::clear(open(&path), "fine", c)).unwrap();
        quiet(|c| bitmap::set_enabled(open(&path), "coarse", false, c)).unwrap();
        qemu_io(&path, &["write -P 3 20M 1000"]);
        assert_eq!(marked(&path, "fine"), vec![Range { start: 20 << 20, end: (20 << 20) + 1024 }]);
        assert_eq!(marked(&path, "coarse"), [0..1 << 20, 33 << 20..34 << 20]);
        quiet(|c| bitmap::set_enabled(open(&path), "coarse", true, c)).unwrap();
        qemu_img(&["bitmap", "--clear", s(&path), "coarse"]);
        for name in ["fine", "coarse", "off", "theirs"] {
            quiet(|c| bitmap::remove(open(&path), name, c)).unwrap();
            clean(&path);
        }
        qemu_img(&["bitmap", "--remove", s(&path), "qemus"]);
        clean(&path);
        assert_eq!(bitmap::list(&*open(&path)).unwrap(), []);
        quiet(|c| bitmap::add(open(&path), "again", 65536, false, c)).unwrap();
        quiet(|c| bitmap::remove(open(&path), "again", c)).unwrap();
        assert!(!qemu_img(&["info", s(&path)]).contains("bitmaps"));
        clean(&path);
    }
}

#[test]
fn a_bitmap_that_cannot_be_trusted_can_only_be_removed() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "1M"]);
    quiet(|c| bitmap::add(open(&path), "b", 65536, false, c)).unwrap();
    history(&path, 3, 10, 3);
    assert!(bitmap::list(&*open(&path)).unwrap()[0].in_use);
    let says = |result: Result<(), Error>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(quiet(|c| bitmap::clear(open(&path), "b", c)), "cannot be trusted");
    says(quiet(|c| bitmap::set_enabled(open(&path), "b", false, c)), "cannot be trusted");
    says(bitmap::dirty(&*open(&path), "b").map(|_| ()), "cannot be trusted");
    says(bitmap::dirty(&*open(&path), "x").map(|_| ()), "no bitmap named");
    says(quiet(|c| bitmap::remove(open(&path), "x", c)), "no bitmap named");
    says(quiet(|c| bitmap::add(open(&path), "b", 65536, false, c)), "already");
    says(quiet(|c| bitmap::add(open(&path), "c", 1000, false, c)), "power of two");
    says(quiet(|c| bitmap::add(open(&path), "", 65536, false, c)), "name");
    quiet(|c| bitmap::remove(open(&path), "b", c)).unwrap();
    clean(&path);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", s(&path), "1M"]);
    says(quiet(|c| bitmap::add(open(&path), "b", 65536, false, c)), "version 2");
}

#[test]
fn a_cut_while_bitmaps_change_leaves_the_old_ones_or_the_new_ones() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", s(&path), "1M"]);
    qemu_img(&["bitmap", "--add", "-g", "512", s(&path), "one"]);
    qemu_io(&path, &["write -P 1 10k 90k"]);
    let start = std::fs::read(&path).unwrap();
    let now = content(&path, Format::Qcow2);
    type Work = Box<dyn Fn(Arc<dyn Storage>) -> Result<(), Error>>;
    let source = std::fs::read(&path).unwrap();
    qemu_img(&["bitmap", "--remove", s(&path), "one"]);
    qemu_img(&["bitmap", "--add", "-g", "4096", s(&path), "other"]);
    qemu_io(&path, &["write -P 1 200k 90k"]);
    let other = std::fs::read(&path).unwrap();
    let works: [Work; 6] = [
        Box::new(|s| quiet(|c| bitmap::add(s, "two", 512, false, c))),
        Box::new(|s| quiet(|c| bitmap::remove(s, "one", c))),
        Box::new(|s| quiet(|c| bitmap::clear(s, "one", c))),
        Box::new(move |s| {
            let source = Volatile::new(source.clone(), u64::MAX);
            quiet(|c| bitmap::merge(s, "one", &*source, "one", c))
        }),
        Box::new(move |s| {
            let source = Volatile::new(other.clone(), u64::MAX);
            quiet(|c| bitmap::copy(s, &*source, false, c)).map(|_| ())
        }),
        Box::new(|s| quiet(|c| bitmap::set_enabled(s, "one", false, c))),
    ];
    for work in works {
        let before = bitmap::list(&*Volatile::new(start.clone(), u64::MAX)).unwrap();
        let whole = Volatile::new(start.clone(), u64::MAX);
        work(whole.clone()).unwrap();
        let after = bitmap::list(&*whole).unwrap();
        assert!(report_of(whole).unwrap().is_clean());
        let end = every_cut(&start, &work, &mut |cut, survivor| {
            let storage = Volatile::new(survivor, u64::MAX);
            let found = report_of(storage.clone()).unwrap();
            assert_eq!(found.corruptions, 0, "cut {cut}: {:?}", found.messages);
            let list = bitmap::list(&*storage).unwrap();
            assert!(list == before || list == after, "cut {cut}: {list:?}");
            assert!(shown(storage) == now);
        });
        let end = Volatile::new(end, u64::MAX);
        assert!(report_of(end.clone()).unwrap().is_clean());
        assert!(bitmap::list(&*end).unwrap() == after);
    }
}

#[test]
fn options_of_an_image_are_amended_as_qemu_amends_them() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let change = |what: Amend| quiet(|c| amend(open(&path), &PlainPaths, &what, c));
    for backing in [false, true] {
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
        std::fs::write(at("base"), vec![9; 1 << 20]).unwrap();
        let base = at("base");
        if backing {
            args.extend(["-b", s(&base), "-F", "raw"]);
        }
        args.extend([s(&path), "2M"]);
        qemu_img(&args);
        history(&path, 8, 60, 3);
        qemu_io(&path, &["write -z 100k 300k", "write -c -P 3 1536k 4k"]);
        let model = content(&path, Format::Qcow2);
        for width in [64u32, 1, 2, 4, 32, 8, 16] {
            let many = change(Amend { refcount_order: Some(width.ilog2()), ..Amend::default() });
            many.unwrap();
            let info = qemu_img(&["info", s(&path)]);
            assert!(info.contains(&format!("refcount bits: {width}\n")), "{info}");
            clean(&path);
            same_as_model(&path, &model);
        }
        change(Amend { lazy_refcounts: Some(true), ..Amend::default() }).unwrap();
        assert!(qemu_img(&["info", s(&path)]).contains("lazy refcounts: true"));
        let error = change(Amend { version: Some(2), ..Amend::default() }).err();
        assert!(error.is_none(), "lazy refcounts go with the version: {error:?}");
        assert!(qemu_img(&["info", s(&path)]).contains("compat: 0.10"));
        clean(&path);
        same_as_model(&path, &model);
        qemu_img(&["snapshot", "-c", "old", s(&path)]);
        change(Amend { version: Some(3), lazy_refcounts: Some(true), refcount_order: Some(5) }).unwrap();
        let info = qemu_img(&["info", s(&path)]);
        assert!(info.contains("compat: 1.1") && info.contains("lazy refcounts: true"), "{info}");
        clean(&path);
        same_as_model(&path, &model);
        assert_eq!(snapshot::list(&*open(&path)).unwrap()[0].disk_size, 2 << 20);
        quiet(|c| knib_qcow::resize(open(&path), &PlainPaths, 3 << 20, false, Preallocation::Off, c))
            .unwrap();
        let error = change(Amend { version: Some(2), refcount_order: Some(4), ..Amend::default() });
        assert!(error.unwrap_err().to_string().contains("internal snapshots"));
        let (code, text) = tool("qemu-io", &["-c", "write -P 4 0 64k", s(&path)]);
        assert_eq!(code, 0, "{text}");
        clean(&path);
    }
}

#[test]
fn a_cut_of_an_amendment_leaves_a_sound_image_with_the_same_disk() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for (options, what) in [
        ("cluster_size=512", Amend { refcount_order: Some(6), ..Amend::default() }),
        ("cluster_size=512,compat=0.10", Amend { version: Some(3), ..Amend::default() }),
        ("cluster_size=512", Amend { version: Some(2), ..Amend::default() }),
        ("cluster_size=512", Amend { lazy_refcounts: Some(true), ..Amend::default() }),
    ] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "200k"]);
        qemu_io(&path, &["write -P 1 0 100k", "write -z 20k 16k"]);
        qemu_img(&["snapshot", "-c", "old", s(&path)]);
        qemu_io(&path, &["write -P 2 30k 3k"]);
        if !options.contains("0.10") {
            qemu_img(&["bitmap", "--add", s(&path), "b"]);
        }
        let now = content(&path, Format::Qcow2);
        let start = std::fs::read(&path).unwrap();
        let work = |s: Arc<dyn Storage>| quiet(|c| amend(s, &PlainPaths, &what, c));
        let end = every_cut(&start, &work, &mut |cut, survivor| {
            let storage = Volatile::new(survivor, u64::MAX);
            let found = report_of(storage.clone()).unwrap();
            assert_eq!(found.corruptions, 0, "{what:?}, cut {cut}: {:?}", found.messages);
            assert!(shown(storage) == now, "{what:?}, cut {cut}");
        });
        assert_eq!(end[87] & 1 == 1, what.lazy_refcounts == Some(true));
        assert!(shown(Volatile::new(end, u64::MAX)) == now);
    }
}

#[test]
fn a_bitmap_is_marked_before_the_disk_changes() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", s(&path), "1M"]);
    qemu_io(&path, &["write -P 1 0 100k"]);
    qemu_img(&["bitmap", "--add", "-g", "512", s(&path), "one"]);
    let start = std::fs::read(&path).unwrap();
    let now = content(&path, Format::Qcow2);
    let work = |storage: Arc<dyn Storage>| {
        // Over data that is there, so that one write is all it takes.
        knib_qcow::ImageMut::open(storage, &PlainPaths)?.write_at(&[7; 512], 0)
    };
    let mut changed = 0;
    let end = every_cut(&start, &work, &mut |cut, survivor| {
        let storage = Volatile::new(survivor, u64::MAX);
        let trusted = bitmap::list(&*storage).unwrap().iter().any(|b| !b.in_use);
        assert!(!trusted || shown(storage) == now, "cut {cut}: it is trusted, and does not know of a write");
        changed += 1;
    });
    assert!(changed > 1 && bitmap::list(&*Volatile::new(end, u64::MAX)).unwrap()[0].in_use);
}
