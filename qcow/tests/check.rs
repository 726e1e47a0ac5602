//! Checks of metadata agree with `qemu-img check`, and images that were cut at any write are at worst leaky.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::volatile::Volatile;
use common::{Random, report, report_of, s, tool};

use knib_qcow::{
    Access, Chain, Control, Error, FileStorage, Format, Image, ImageMut, NoImplicit, PlainPaths, Storage,
    check,
};

fn ok(name: &str, args: &[&str]) {
    let (code, text) = tool(name, args);
    assert_eq!(code, 0, "{name} {args:?}: {text}");
}

/// An image with data, zeros, compressed clusters, an internal snapshot and a bitmap, as far as `options` allow.
fn image(path: &Path, options: &str, snapshot: bool, bitmap: bool) {
    ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, s(path), "6M"]);
    ok(
        "qemu-io",
        &["-c", "write -P 1 0 300k", "-c", "write -P 2 1M 9000", "-c", "write -P 3 2900k 50k", s(path)],
    );
    if snapshot {
        ok("qemu-img", &["snapshot", "-c", "one", s(path)]);
        ok("qemu-io", &["-c", "write -P 4 100k 100k", "-c", "discard 2M 1M", s(path)]);
    }
    if !options.contains("data_file") {
        ok("qemu-io", &["-c", "write -c -P 5 4M 2M", s(path)]);
    }
    if bitmap {
        ok("qemu-img", &["bitmap", "--add", s(path), "b"]);
        ok("qemu-io", &["-c", "write -P 6 500k 64k", s(path)]);
    }
}

#[test]
fn sound_images_of_every_kind_are_clean() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let data = format!("data_file={}", s(&dir.path().join("data")));
    for (options, snapshot, bitmap) in [
        ("compat=0.10", true, false),
        ("cluster_size=512", true, true),
        ("cluster_size=2M", true, true),
        ("compat=1.1", true, true),
        ("refcount_bits=1", false, true),
        ("refcount_bits=2,cluster_size=4k", true, true),
        ("refcount_bits=64,cluster_size=4k", true, true),
        ("extended_l2=on", true, false),
        ("extended_l2=on,cluster_size=128k,compression_type=zstd", true, true),
        (data.as_str(), false, false),
    ] {
        image(&path, options, snapshot, bitmap);
        let found = report(&path).unwrap();
        assert!(found.is_clean(), "{options}: {found:?}");
    }
}

/// Offset of the first refcount block.
fn first_block(bytes: &[u8]) -> usize {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    word(word(48))
}

#[test]
fn a_refcount_too_high_is_a_leak_and_one_too_low_is_a_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, "compat=1.1", false, false);
    let sound = std::fs::read(&path).unwrap();
    let block = first_block(&sound);
    let last = sound.len().div_ceil(1 << 16) - 1;
    // A count past the end of the file takes no space.
    for (index, count, leaks, corruptions) in
        [(0usize, 2u8, 1, 0), (0, 0, 0, 1), (last, 40, 1, 0), (last + 1, 1, 0, 0), (30_000, 1, 0, 0)]
    {
        let mut bytes = sound.clone();
        bytes[block + index * 2 + 1] = count;
        std::fs::write(&path, bytes).unwrap();
        let found = report(&path).unwrap();
        assert_eq!((found.leaks, found.corruptions), (leaks, corruptions), "{:?}", found.messages);
        assert_eq!(found.messages.len() as u64, leaks + corruptions);
        let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", s(&path)]);
        assert_eq!(code == 0, found.is_clean(), "{text}");
    }
}

#[test]
fn a_flipped_bit_in_the_tables_is_seen_as_qemu_sees_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, "cluster_size=4k", true, false);
    let sound = std::fs::read(&path).unwrap();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let offset = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let l1 = word(40) as usize;
    let l2 = offset(word(l1));
    let mut random = Random(42);
    let mut damaged = 0;
    for _ in 0..150 {
        // The tables that are in use: refcounts of the first clusters, L1, the first L2 table.
        let (start, len) = [(first_block(&sound), (sound.len() / 4096 - 1) * 2), (l1, 16), (l2, 640)]
            [random.below(3) as usize];
        let mut bytes = sound.clone();
        let (at, bit) = (start + random.below(len as u64) as usize, random.below(8));
        bytes[at] ^= 1 << bit;
        std::fs::write(&path, bytes).unwrap();
        let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", s(&path)]);
        let clean = report(&path).is_ok_and(|r| r.is_clean());
        assert_eq!(clean, code == 0, "bit {bit} of byte {at:#x}: {:?}\nqemu: {text}", report(&path));
        damaged += u32::from(!clean);
    }
    assert!(damaged > 100, "most flips are damage: {damaged}");
}

#[test]
fn a_check_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, "compat=1.1", false, false);
    let image = Image::open(FileStorage::open(&path, Access::Read).unwrap(), &NoImplicit).unwrap();
    let cancel = AtomicBool::new(true);
    let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
    assert!(matches!(check(&image, &control), Err(Error::Cancelled)));
}

/// Changes of every kind; each flushed state is handed to `flushed`.
fn changes(storage: Arc<dyn Storage>, flushed: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
    let mut random = Random(7);
    let chain = Chain::from_storage(storage.clone(), Format::Qcow2, &PlainPaths)?;
    let mut model = vec![0; chain.size() as usize];
    chain.read_at(&mut model, 0)?;
    flushed(&model);
    let mut image = ImageMut::open(storage, &PlainPaths)?;
    for step in 0..40 {
        let start = random.below(image.size() - 5000);
        let len = 1 + random.below(5000);
        let range = start as usize..(start + len) as usize;
        if step == 20 {
            image.grow(600_064)?;
            model.resize(600_064, 0);
            flushed(&model);
        }
        if random.below(3) < 2 {
            model[range.clone()].fill(random.below(255) as u8);
            image.write_at(&model[range], start)?;
        } else {
            model[range].fill(0);
            image.write_zeroes(start, len)?;
        }
        if random.below(3) == 0 {
            image.flush()?;
            flushed(&model);
        }
    }
    image.flush()
}

#[test]
fn a_cut_at_any_write_leaves_at_worst_leaks() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, (0..300_032u32).map(|i| (i / 3000) as u8).collect::<Vec<_>>()).unwrap();
    for options in ["cluster_size=512,refcount_bits=64", "cluster_size=16k,extended_l2=on,refcount_bits=8"] {
        let path = dir.path().join("a.qcow2");
        ok("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, s(&raw), s(&path)]);
        ok("qemu-io", &["-c", "write -P 7 100k 50k", s(&path)]);
        ok("qemu-img", &["snapshot", "-c", "one", s(&path)]);
        every_cut(std::fs::read(&path).unwrap());
    }
}

fn every_cut(start: Vec<u8>) {
    let whole = Volatile::new(start.clone(), u64::MAX);
    changes(whole.clone(), &mut |_| {}).unwrap();
    let ops = whole.power.ops.load(Ordering::Relaxed);
    assert!(ops > 100, "{ops}");
    let mut random = Random(ops);
    let mut cuts = 0;
    for cut in 0..ops {
        let storage = Volatile::new(start.clone(), cut);
        let error = changes(storage.clone(), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("the power failed"), "{error}");
        let found = report_of(Volatile::new(storage.survivor(&mut random), u64::MAX)).unwrap();
        assert_eq!(found.corruptions, 0, "cut before operation {cut}: {:?}", found.messages);
        cuts += 1;
    }
    assert_eq!(cuts, ops);
}

#[test]
fn what_was_flushed_is_read_after_a_cut_where_nothing_wrote_since() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", s(&path), "300032"]);
    let start = std::fs::read(&path).unwrap();
    let whole = Volatile::new(start.clone(), u64::MAX);
    // Each flushed state, with the number of operations that it took.
    let mut states = Vec::new();
    changes(whole.clone(), &mut |model| {
        states.push((whole.power.ops.load(Ordering::Relaxed), model.to_vec()));
    })
    .unwrap();
    assert!(states.len() > 5);
    let mut random = Random(5);
    for (ops, model) in states {
        let storage = Volatile::new(start.clone(), ops);
        changes(storage.clone(), &mut |_| {}).unwrap_err();
        let file = Volatile::new(storage.survivor(&mut random), u64::MAX);
        let chain = Chain::from_storage(file, Format::Qcow2, &PlainPaths).unwrap();
        let mut bytes = vec![0; chain.size() as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == model, "the state after {ops} operations");
    }
}
