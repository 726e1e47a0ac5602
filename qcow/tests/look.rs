//! What can be asked of images: snapshots and bitmaps, differences, sizes; QEMU answers the same.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{qemu_img, qemu_io, quiet, s, temp, tool};
use knib_qcow::measure::Shape;
use knib_qcow::{
    Access, Chain, Control, Difference, Error, FileStorage, Format, PlainPaths, bitmap, compare, snapshot,
};

fn open(path: &Path) -> std::sync::Arc<FileStorage> {
    FileStorage::open(path, Access::Read).unwrap()
}

fn chain(path: &Path) -> Chain {
    let format = if path.extension().is_some_and(|e| e == "raw") { Format::Raw } else { Format::Qcow2 };
    Chain::open(path, format, &PlainPaths).unwrap()
}

#[test]
fn snapshots_are_listed_as_qemu_lists_them() {
    let (_dir, at) = temp();
    for (compat, cluster) in [("0.10", "64k"), ("1.1", "512")] {
        let path = at(compat);
        let options = format!("compat={compat},cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, s(&path), "1M"]);
        assert_eq!(snapshot::list(&*open(&path)).unwrap(), []);
        let names = ["one", "a name with spaces, ünïcode", "3"];
        for name in names {
            qemu_img(&["snapshot", "-c", name, s(&path)]);
        }
        let found = snapshot::list(&*open(&path)).unwrap();
        assert_eq!(found.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), names);
        let info = qemu_img(&["info", "--output=json", s(&path)]);
        for f in &found {
            assert_eq!((f.disk_size, f.vm_state_size, f.vm_clock), (1 << 20, 0, 0));
            for want in [
                format!("\"id\": \"{}\"", f.id),
                format!("\"date-sec\": {}", f.date.0),
                format!("\"date-nsec\": {}", f.date.1),
            ] {
                assert!(info.contains(&want), "{want}: {info}");
            }
        }
    }
}

#[test]
fn bitmaps_are_listed_as_qemu_lists_them() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "64M"]);
    assert_eq!(bitmap::list(&*open(&path)).unwrap(), []);
    qemu_img(&["bitmap", "--add", s(&path), "first"]);
    qemu_img(&["bitmap", "--add", "--disable", "-g", "512", s(&path), "second, ü"]);
    let found = bitmap::list(&*open(&path)).unwrap();
    let seen: Vec<_> = found.iter().map(|b| (b.name.as_str(), b.granularity, b.auto, b.in_use)).collect();
    assert_eq!(seen, [("first", 65536, true, false), ("second, ü", 512, false, false)]);
    // A writer that knows nothing of bitmaps clears the autoclear bit: they are out of date.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[95] &= !1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(bitmap::list(&*open(&path)).unwrap(), []);
}

#[test]
fn the_first_difference_is_found_wherever_it_lies() {
    let (_dir, at) = temp();
    let (raw, image) = (at("a.raw"), at("a.qcow2"));
    let mut bytes = vec![0u8; 9_000_448];
    bytes[1_000_000..5_000_000].fill(7);
    std::fs::write(&raw, &bytes).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", s(&raw), s(&image)]);
    let find = |allocation| quiet(|c| compare(&chain(&image), &chain(&raw), allocation, c)).unwrap();
    assert_eq!(find(false), None);
    for offset in [0usize, 511, 1_234_567, 4_194_303, 4_194_304, 8_999_999, 9_000_447] {
        let mut other = bytes.clone();
        other[offset] ^= 1;
        other[9_000_447] ^= 2;
        std::fs::write(&raw, &other).unwrap();
        assert_eq!(find(false), Some(Difference::Content { offset: offset as u64 }));
        let (code, text) = tool("qemu-img", &["compare", "-F", "raw", s(&image), s(&raw)]);
        assert!(code == 1 && text.contains("mismatch"), "{text}");
    }
}

#[test]
fn a_longer_disk_differs_only_where_it_is_not_zero() {
    let (_dir, at) = temp();
    let (short, long) = (at("short.raw"), at("long.raw"));
    std::fs::write(&short, vec![5u8; 1 << 20]).unwrap();
    let mut bytes = vec![5u8; 3 << 20];
    bytes[1 << 20..].fill(0);
    std::fs::write(&long, &bytes).unwrap();
    let find = || quiet(|c| compare(&chain(&short), &chain(&long), false, c)).unwrap();
    assert_eq!(find(), None);
    bytes[2_500_000] = 1;
    std::fs::write(&long, &bytes).unwrap();
    assert_eq!(find(), Some(Difference::Content { offset: 2_500_000 }));
}

#[test]
fn allocation_is_a_difference_when_it_is_asked_for() {
    let (_dir, at) = temp();
    let (a, b) = (at("a.qcow2"), at("b.qcow2"));
    for path in [&a, &b] {
        qemu_img(&["create", "-q", "-f", "qcow2", s(path), "8M"]);
    }
    qemu_io(&b, &["write -z 5M 64k"]);
    let find = |allocation| quiet(|c| compare(&chain(&a), &chain(&b), allocation, c)).unwrap();
    assert_eq!(find(false), None);
    assert_eq!(find(true), Some(Difference::Allocation { offset: 5 << 20 }));
}

#[test]
fn a_comparison_can_be_cancelled() {
    let (_dir, at) = temp();
    let base = at("base.raw");
    std::fs::write(&base, vec![1u8; 4 << 20]).unwrap();
    for name in ["a.qcow2", "b.qcow2"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", s(&base), "-F", "raw", s(&at(name))]);
    }
    let (a, b) = (chain(&at("a.qcow2")), chain(&at("b.qcow2")));
    assert_eq!(quiet(|c| compare(&a, &b, true, c)).unwrap(), None);
    let cancel = AtomicBool::new(true);
    let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
    assert!(matches!(compare(&a, &b, false, &control), Err(Error::Cancelled)));
}

fn number(json: &str, key: &str) -> u64 {
    let at = json.find(&format!("\"{key}\": ")).unwrap() + key.len() + 4;
    json[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

#[test]
fn sizes_are_measured_as_qemu_measures_them() {
    let (_dir, at) = temp();
    let raw = at("a.raw");
    qemu_img(&["create", "-q", "-f", "raw", s(&raw), "100M"]);
    let (code, _) = tool(
        "qemu-io",
        &["-f", "raw", "-c", "write 0 5000", "-c", "write 3M 10M", "-c", "write 90M 4k", s(&raw)],
    );
    assert_eq!(code, 0);
    for (bits, width, extended_l2) in [
        (16u32, 16u32, false),
        (9, 16, false),
        (21, 1, false),
        (12, 64, false),
        (16, 16, true),
        (14, 8, true),
    ] {
        let options = format!(
            "cluster_size={},refcount_bits={width},extended_l2={}",
            1u64 << bits,
            if extended_l2 { "on" } else { "off" }
        );
        let shape = |size| Shape { size, cluster_bits: bits, refcount_order: width.ilog2(), extended_l2 };
        let ask = |rest: &[&str]| {
            let args = [&["measure", "-O", "qcow2", "--output=json", "-o", options.as_str()], rest].concat();
            let json = qemu_img(&args);
            (number(&json, "required"), number(&json, "fully-allocated"))
        };
        for size in [0u64, 512, 1 << 20, 1_000_000_000_512] {
            if bits == 9 && size > 1 << 32 {
                continue;
            }
            let ours = shape(size).measure(None, false).unwrap();
            assert_eq!((ours.required, ours.fully_allocated), ask(&["--size", &size.to_string()]), "{size}");
        }
        let ours = shape(100 << 20).measure(Some(&chain(&raw)), false).unwrap();
        assert_eq!((ours.required, ours.fully_allocated), ask(&["-f", "raw", s(&raw)]), "{options}");
    }
}
