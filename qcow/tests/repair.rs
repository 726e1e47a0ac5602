//! Repairs: leaks are given back, refcounts rebuilt, and a cut leaves nothing worse than it was.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;

use common::volatile::{Volatile, every_cut};
use common::{
    Random, checked, content, qemu_img, qemu_io, quiet, report, report_of, rw, s, same_as_model, shown, temp,
    tool,
};
use knib_qcow::{Access, FileStorage, Format, Image, Repair, Repaired, check, repair};

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
    // Past the end of the file, where it takes no space.
    bytes[block + 2 * 900 + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let done = fix(&path, Repair::Leaks);
    assert_eq!((done.before.leaks, done.before.corruptions), (1, 0));
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
        let mut marked = leaky.clone();
        if sound[7] == 3 {
            marked[79] |= 1;
        }
        let works =
            [(leaky, Repair::Leaks), (marked, Repair::Leaks), (broken, Repair::All), (dirty, Repair::All)];
        for (start, what) in works {
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
            assert!(end[7] == 2 || end[79] & 1 == 0, "{options}: it is still marked dirty");
            let storage = Volatile::new(end, u64::MAX);
            assert!(shown(storage.clone()) == model);
            assert!(report_of(storage).unwrap().is_clean());
        }
    }
}

/// Changes of the header that lose the refcount table: it has no clusters, too many, reaches past the end; it begins
/// askew, past the end, nowhere, at another table.
fn lost_tables(sound: &[u8]) -> Vec<Vec<u8>> {
    let l1 = word(sound, 40);
    let clusters = [0u32, 1 << 20, 12_000].map(|n| (56, n.to_be_bytes().to_vec()));
    let offsets = [word(sound, 48) + 8, 9 << 32, 0, l1].map(|n| (48, n.to_be_bytes().to_vec()));
    let harm = |(at, value): (usize, Vec<u8>)| {
        let mut bytes = sound.to_vec();
        bytes[at..at + value.len()].copy_from_slice(&value);
        bytes
    };
    clusters.into_iter().chain(offsets).map(harm).collect()
}

#[test]
fn a_refcount_table_that_the_header_lost_is_made_anew() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for options in KINDS {
        let model = image(&path, options);
        let sound = std::fs::read(&path).unwrap();
        for (n, bytes) in lost_tables(&sound).into_iter().enumerate() {
            std::fs::write(&path, &bytes).unwrap();
            let tables = Image::open_tables(Volatile::new(bytes.clone(), u64::MAX)).unwrap();
            let before = quiet(|c| check(&tables, c)).unwrap();
            assert!(before.corruptions > 0, "{options}, harm {n}");
            // What gives back leaks only cannot help here, and changes nothing.
            assert!(fix(&path, Repair::Leaks).after.corruptions > 0, "{options}, harm {n}");
            assert!(std::fs::read(&path).unwrap() == bytes, "{options}, harm {n}");
            if n != 6 {
                let error = rw(&path).err().unwrap().to_string();
                assert!(error.contains("check -r all"), "{options}, harm {n}: {error}");
            }
            let done = fix(&path, Repair::All);
            assert!(done.after.is_clean(), "{options}, harm {n}: {:?}", done.after);
            checked(&path);
            same_as_model(&path, &model);
            qemu_img(&["snapshot", "-a", "one", s(&path)]);
            checked(&path);
        }
    }
}

#[test]
fn a_cut_while_a_lost_refcount_table_is_made_anew_leaves_it_lost_or_made() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let model = image(&path, KINDS[1]);
    for (n, bytes) in lost_tables(&std::fs::read(&path).unwrap()).into_iter().enumerate() {
        let work = |storage: std::sync::Arc<dyn knib_qcow::Storage>| {
            quiet(|c| repair(storage, Repair::All, c)).map(|_| ())
        };
        let mut cuts = 0;
        every_cut(&bytes, &work, &mut |cut, survivor| {
            std::fs::write(&path, &survivor).unwrap();
            assert!(fix(&path, Repair::All).after.is_clean(), "harm {n}, cut {cut}");
            checked(&path);
            same_as_model(&path, &model);
            cuts += 1;
        });
        assert!(cuts > 5, "{cuts}");
    }
}

#[test]
fn a_table_that_shares_its_cluster_is_corruption_though_the_refcounts_agree() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", s(&path), "2M"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    qemu_img(&["snapshot", "-c", "one", s(&path)]);
    qemu_img(&["bitmap", "--add", s(&path), "b"]);
    qemu_io(&path, &["write -P 2 32k 32k"]);
    let sound = std::fs::read(&path).unwrap();
    let offset = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let (table, l1, snapshots) =
        (word(&sound, 48) as usize, word(&sound, 40) as usize, word(&sound, 64) as usize);
    let (block, l2) = (word(&sound, table) as usize, offset(word(&sound, l1)));
    let snapshot_l1 = word(&sound, snapshots) as usize;
    for (what, shared) in [
        ("header", 0),
        ("refcount table", table),
        ("refcount block", block),
        ("L1 table", l1),
        ("L2 table", l2),
        ("snapshot table", snapshots),
        ("L1 table of a snapshot", snapshot_l1),
    ] {
        // Guest cluster 100 lies where the table does; both are counted.
        let mut bytes = sound.clone();
        bytes[l2 + 800..l2 + 808].copy_from_slice(&(shared as u64).to_be_bytes());
        let count = block + shared / 4096 * 2;
        bytes[count..count + 2].copy_from_slice(&2u16.to_be_bytes());
        if shared == l2 {
            bytes[l1] &= 0x7f;
        }
        let found = report_of(Volatile::new(bytes.clone(), u64::MAX)).unwrap();
        if shared == 0 {
            // An entry of 0 is none: what differs is the refcount.
            assert_eq!((found.leaks, found.corruptions), (1, 0), "{what}: {:?}", found.messages);
            continue;
        }
        assert_eq!(found.corruptions, 1, "{what}: {:?}", found.messages);
        assert!(found.messages[0].contains("a table, and something else"), "{what}: {:?}", found.messages);
        // Nothing is written into such an image by an operation that changes all tables.
        let storage = Volatile::new(bytes.clone(), u64::MAX);
        let refused = quiet(|c| knib_qcow::snapshot::create(storage.clone(), "two", c)).unwrap_err();
        assert!(refused.to_string().contains("repair it first"), "{what}: {refused}");
        assert!(storage.now() == bytes, "{what}");
    }
    // Snapshots share L2 tables and data with the disk: that is sound.
    assert!(report_of(Volatile::new(sound, u64::MAX)).unwrap().is_clean());
}

#[test]
fn a_snapshot_that_lacks_the_size_of_its_disk_is_damage_and_is_given_it() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let model = image(&path, "cluster_size=4k");
    // Its table is then the last in the file.
    qemu_img(&["snapshot", "-c", "two", s(&path)]);
    let start = std::fs::read(&path).unwrap();
    // The header counts one snapshot more than there are: an entry past the file's end, or one of zeros in it.
    for grow in [0, 4096] {
        let mut bytes = start.clone();
        bytes[63] += 1;
        bytes.resize(bytes.len() + grow, 0);
        std::fs::write(&path, &bytes).unwrap();
        let done = fix(&path, Repair::All);
        assert_eq!(
            (done.before.corruptions, done.after.corruptions),
            (1, 0),
            "{grow}: {:?}",
            done.before.messages
        );
        checked(&path);
        same_as_model(&path, &model);
    }
}
