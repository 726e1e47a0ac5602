//! Repairs: leaks are given back, refcounts rebuilt, and a cut leaves nothing worse than it was.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;

use common::volatile::{Volatile, every_cut};
use common::{
    Random, checked, content, qemu_img, qemu_io, quiet, report, report_of, rw, s, same_as_model, shown, temp,
    tool,
};
use knib_qcow::{Access, FileStorage, Format, Repair, Repaired, repair};

fn fix(path: &Path, what: Repair) -> Repaired {
    quiet(|c| repair(FileStorage::open(path, Access::ReadWrite).unwrap(), what, c)).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// An image with data, zeros, compressed clusters and a snapshot.
fn image(path: &Path, options: &str) -> Vec<u8> {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(path), "2M"]);
    qemu_io(path, &["write -c -P 5 1M 64k", "write -P 1 0 300k", "write -z 100k 64k"]);
    qemu_img(&["snapshot", "-c", "one", s(path)]);
    qemu_io(path, &["write -P 4 200k 100k"]);
    content(path, Format::Qcow2)
}

const KINDS: [&str; 4] = [
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=64",
    "extended_l2=on,cluster_size=16k,refcount_bits=8",
    "compat=0.10,cluster_size=64k",
];

#[test]
fn leaks_are_given_back_and_nothing_else_changes() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let model = image(&path, "cluster_size=4k");
    let mut bytes = std::fs::read(&path).unwrap();
    let block = word(&bytes, word(&bytes, 48) as usize) as usize;
    bytes[block + 1] += 3;
    bytes[block + 2 * 900 + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let done = fix(&path, Repair::Leaks);
    assert_eq!((done.before.leaks, done.before.corruptions), (2, 0));
    assert!(done.after.is_clean());
    checked(&path);
    same_as_model(&path, &model);
    // A refcount that is too low is left alone by a repair of leaks.
    bytes[block + 5] = 0;
    std::fs::write(&path, &bytes).unwrap();
    let done = fix(&path, Repair::Leaks);
    assert_eq!((done.after.leaks, done.after.corruptions), (0, 1), "{:?}", done.after);
}

#[test]
fn refcounts_are_rebuilt_from_nothing() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for options in KINDS {
        let model = image(&path, options);
        let sound = std::fs::read(&path).unwrap();
        let (table, cluster) = (word(&sound, 48) as usize, 1usize << sound[23]);
        let block = word(&sound, table) as usize;
        // The blocks are zeros; there are none; they are noise; the table points at them twice, askew, past the end.
        type Harm = Box<dyn Fn(&mut Vec<u8>)>;
        let harms: Vec<Harm> = vec![
            Box::new(move |b| b[block..block + cluster].fill(0)),
            Box::new(move |b| b[table..table + cluster].fill(0)),
            Box::new(move |b| {
                let mut random = Random(9);
                b[block..block + cluster].fill_with(|| random.next() as u8);
            }),
            Box::new(move |b| b.copy_within(table..table + 8, table + 8)),
            Box::new(move |b| b[table + 6] ^= 1 << (cluster.ilog2() - 9)),
            Box::new(move |b| b[table + 2] = 0x10),
        ];
        for (n, harm) in harms.iter().enumerate() {
            let mut bytes = sound.clone();
            harm(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            let done = fix(&path, Repair::All);
            assert!(!done.before.is_clean(), "{options}, harm {n}");
            assert!(done.after.is_clean(), "{options}, harm {n}");
            checked(&path);
            same_as_model(&path, &model);
            qemu_img(&["snapshot", "-a", "one", s(&path)]);
            checked(&path);
        }
    }
}

#[test]
fn random_flips_in_refcounts_and_flags_are_repaired_where_qemu_repairs_them() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let model = image(&path, "cluster_size=4k");
    let sound = std::fs::read(&path).unwrap();
    let offset = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let (block, l1) = (word(&sound, word(&sound, 48) as usize) as usize, word(&sound, 40) as usize);
    let l2 = offset(word(&sound, l1));
    let mut random = Random(77);
    for round in 0..40 {
        let mut bytes = sound.clone();
        for _ in 0..5 {
            match random.below(3) {
                0 => bytes[block + random.below(250) as usize] ^= 1 << random.below(8),
                1 => bytes[l1] ^= 0x80,
                _ => bytes[l2 + random.below(70) as usize * 8] ^= 0x80,
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let done = fix(&path, Repair::All);
        assert!(done.after.is_clean(), "round {round}: {:?}", done.before);
        checked(&path);
        same_as_model(&path, &model);
    }
}

#[test]
fn a_dirty_image_is_read_as_it_is_and_repaired_before_it_is_written() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", s(&path), "2M"]);
    // A writer that is killed leaves refcounts behind.
    tool("qemu-io", &["-c", "write -P 6 0 1M", "-c", "abort", s(&path)]);
    let dirty = std::fs::read(&path).unwrap();
    assert_eq!(dirty[79] & 1, 1, "qemu-io left it dirty");
    assert!(report(&path).unwrap().corruptions > 0);
    assert!(content(&path, Format::Qcow2)[..1 << 20].iter().all(|b| *b == 6));
    assert!(std::fs::read(&path).unwrap() == dirty, "reading changes nothing");
    let mut image = rw(&path).unwrap();
    image.write_at(&[7; 100_000], 900_000).unwrap();
    image.flush().unwrap();
    drop(image);
    assert_eq!(std::fs::read(&path).unwrap()[79] & 1, 0);
    checked(&path);
    let mut model = vec![0; 2 << 20];
    model[..1 << 20].fill(6);
    model[900_000..1_000_000].fill(7);
    same_as_model(&path, &model);
}

#[test]
fn a_repaired_image_loses_its_mark_of_being_corrupt_and_a_damaged_one_keeps_it() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let model = image(&path, "cluster_size=4k");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    assert!(rw(&path).err().unwrap().to_string().contains("marked corrupt"));
    assert!(fix(&path, Repair::All).after.is_clean());
    rw(&path).unwrap();
    same_as_model(&path, &model);
    // An L2 table outside the file cannot be repaired by counting.
    let l1 = word(&bytes, 40) as usize;
    bytes[l1 + 2] = 0x70;
    std::fs::write(&path, &bytes).unwrap();
    let done = fix(&path, Repair::All);
    assert!(done.after.corruptions > 0);
    assert_eq!(std::fs::read(&path).unwrap()[79] & 2, 2);
}

#[test]
fn a_cut_of_a_repair_makes_nothing_worse() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for options in KINDS {
        let model = image(&path, options);
        let sound = std::fs::read(&path).unwrap();
        let table = word(&sound, 48) as usize;
        let block = word(&sound, table) as usize;
        let cluster = 1usize << sound[23];
        let width = if sound[7] == 3 { 1usize << sound[99] } else { 16 };
        let mut leaky = sound.clone();
        leaky[block + width / 8 - 1] += 1;
        let mut broken = sound.clone();
        broken[block..block + cluster].fill(0);
        let mut dirty = broken.clone();
        if sound[7] == 3 {
            dirty[79] |= 1;
        }
        for (start, what) in [(leaky, Repair::Leaks), (broken, Repair::All), (dirty, Repair::All)] {
            let before = report_of(Volatile::new(start.clone(), u64::MAX)).unwrap();
            let work = |s| quiet(|c| repair(s, what, c)).map(|_| ());
            let end = every_cut(&start, &work, &mut |cut, survivor| {
                let storage = Volatile::new(survivor, u64::MAX);
                let found = report_of(storage.clone()).unwrap();
                assert!(found.corruptions <= before.corruptions, "{options} {cut}: {:?}", found.messages);
                assert!(shown(storage.clone()) == model, "{options}, cut {cut}");
                let again = quiet(|c| repair(storage.clone(), what, c)).unwrap();
                assert!(again.after.is_clean(), "{options}, cut {cut}");
            });
            let storage = Volatile::new(end, u64::MAX);
            assert!(shown(storage.clone()) == model);
            assert!(report_of(storage).unwrap().is_clean());
        }
    }
}
