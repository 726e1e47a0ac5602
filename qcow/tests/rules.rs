//! What the format allows and forbids, field by field, where no other file of tests shows it.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;

use common::exercise::{Memory, change, look};
use common::maker::{CLUSTER, DATA, L2, Maker, read};
use common::{checked, content, qemu_img, qemu_io, quiet, report_of, rw, s, temp, tool};
use knib_qcow::{
    Access, Amend, FileStorage, Format, Header, ImageMut, Layers, NoImplicit, Storage, amend, bitmap,
    set_backing, snapshot,
};

const BITMAPS: u32 = 0x2385_2875;
/// The whole disk, in bytes.
const ALL: std::ops::Range<u64> = 0..20 << 10;

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// `sound` with `value` at `place`, in which QEMU and our check find something wrong.
fn damaged_for_both(file: &Path, sound: &[u8], what: &str, place: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    bytes[place..place + value.len()].copy_from_slice(value);
    std::fs::write(file, &bytes).unwrap();
    let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", s(file)]);
    assert_ne!(code, 0, "{what}: {text}");
    let found = report_of(Memory::new(&bytes)).unwrap();
    assert!(found.corruptions > 0, "{what}");
    bytes
}

#[test]
fn tables_longer_than_allowed_are_refused_though_the_file_has_room_for_them() {
    let (_dir, at) = temp();
    // 32 MiB of L1 table, 8 MiB of refcount table: one entry or cluster more is refused for its length.
    for (at_field, most, says) in [(36usize, 4u32 << 20, "above 32 MiB"), (56, 16384, "refcount table has")] {
        for (value, fits) in [(most, true), (most + 1, false)] {
            let mut image = Maker::new();
            image.put32(at_field, value);
            image.save(&at("a"));
            let file = std::fs::File::options().write(true).open(at("a")).unwrap();
            file.set_len(64 << 20).unwrap();
            let storage = FileStorage::open(&at("a"), Access::Read).unwrap();
            match Header::parse(&*storage) {
                Ok(_) => assert!(fits, "{value} at {at_field}"),
                Err(e) => assert!(!fits && e.to_string().contains(says), "{value} at {at_field}: {e}"),
            }
        }
    }
}

#[test]
fn a_snapshot_table_is_at_most_64_mib_long() {
    let (_dir, at) = temp();
    let mut image = Maker::new();
    image.put64(64, 6 * CLUSTER as u64);
    // Names and ids of 64 KiB each, all of them holes.
    let entry = (40 + 2 * 65_535u64 + 16).next_multiple_of(8);
    let most = (64 << 20) / entry;
    for (count, fits) in [(most, true), (most + 1, false)] {
        image.put32(60, count as u32);
        image.save(&at("a"));
        let file = FileStorage::open(&at("a"), Access::ReadWrite).unwrap();
        let table = 6 * CLUSTER as u64;
        file.set_len(table + (count + 1) * entry).unwrap();
        for n in 0..count {
            file.write_at(&[0xff; 4], table + n * entry + 12).unwrap();
            file.write_at(&16u32.to_be_bytes(), table + n * entry + 36).unwrap();
        }
        match snapshot::list(&*file) {
            Ok(all) => assert!(fits && all.len() as u64 == count),
            Err(e) => assert!(!fits && e.to_string().contains("longer than 64 MiB"), "{e}"),
        }
        // The refcounts of its clusters are 0, so that these are told too.
        let messages = report_of(file).unwrap().messages;
        assert_eq!(messages.iter().any(|m| m.contains("longer than 64 MiB")), !fits, "{messages:?}");
    }
}

#[test]
fn a_snapshots_entry_out_of_range_is_refused_and_found_by_a_check() {
    let (_dir, at) = temp();
    let sound = Maker::new().memory();
    quiet(|c| snapshot::create(sound.clone(), "s", c)).unwrap();
    let sound = bytes_of(&*sound);
    let table = Header::parse(&*Memory::new(&sound)).unwrap().snapshots_offset as usize;
    for (what, place, value, listed) in [
        ("an L1 table that lies askew", table + 7, &[8u8][..], false),
        ("an L1 table past the end", table + 3, &[1], true),
        ("an L1 table of more than 32 MiB", table + 8, &[0, 0x40, 0, 1], false),
        ("extra data of more than 1 KiB", table + 36, &[0, 0, 4, 8], false),
        ("extra data without the disk's size", table + 36, &[0, 0, 0, 8], true),
        ("an id and a name past the end", table + 12, &[0xff, 0xff, 0xff, 0xff], false),
    ] {
        let bytes = damaged_for_both(&at("a"), &sound, what, place, value);
        let list = snapshot::list(&*Memory::new(&bytes));
        assert_eq!(list.is_ok(), listed, "{what}: {list:?}");
        let error = quiet(|c| snapshot::apply(Memory::new(&bytes), "s", c)).unwrap_err().to_string();
        assert!(error.contains("snapshot"), "{what}: {error}");
        look(&bytes);
        change(&bytes);
    }
}

#[test]
fn a_snapshots_disk_larger_than_an_image_can_have_is_refused_before_memory_is_taken_for_it() {
    let sound = Maker::new().memory();
    quiet(|c| snapshot::create(sound.clone(), "s", c)).unwrap();
    let mut bytes = bytes_of(&*sound);
    let table = Header::parse(&*sound).unwrap().snapshots_offset as usize;
    // 128 GiB is what an L1 table of 32 MiB covers with clusters of 512 bytes.
    for size in [(128 << 30) + 512, i64::MAX as u64, u64::MAX] {
        bytes[table + 48..table + 56].copy_from_slice(&u64::to_be_bytes(size));
        let storage = Memory::new(&bytes);
        let error = quiet(|c| snapshot::apply(storage.clone(), "s", c)).unwrap_err().to_string();
        assert!(error.contains("a disk of"), "{error}");
        assert!(bytes_of(&*storage) == bytes, "nothing was written");
        let shown = snapshot::list(&*storage).unwrap()[0].view(storage);
        let error = Header::parse(&*shown).err().unwrap().to_string();
        assert!(error.contains("L1 table"), "{error}");
    }
}

#[test]
fn compatible_bits_are_ignored_and_unknown_autoclear_bits_cleared_by_the_first_write() {
    let (_dir, at) = temp();
    let image = Maker::new().with(&[(80, 0xff00_0000_0000_00fe), (88, 0x8000_0000_0000_0000)]);
    image.save(&at("a"));
    assert!(content(&at("a"), Format::Qcow2)[..CLUSTER] == [0x42; CLUSTER]);
    let open = rw(&at("a")).unwrap();
    drop(open);
    assert!(std::fs::read(at("a")).unwrap() == image.bytes, "opening alone clears nothing");
    let mut open = rw(&at("a")).unwrap();
    open.write_at(&[7], 0).unwrap();
    // Before the flush: a reader must not take for true what the write makes wrong.
    let now = std::fs::read(at("a")).unwrap();
    assert_eq!(now[80..88], 0xff00_0000_0000_00fe_u64.to_be_bytes());
    assert_eq!(now[88..96], [0; 8]);
    open.flush().unwrap();
    drop(open);
    checked(&at("a"));
    // The bits that are known stay.
    let image = image.with(&[(88, 0x8000_0000_0000_0002)]);
    for work in [0, 1, 2] {
        let storage = image.memory();
        match work {
            0 => drop(quiet(|c| snapshot::create(storage.clone(), "x", c)).unwrap()),
            1 => quiet(|c| bitmap::add(storage.clone(), "x", 512, false, c)).unwrap(),
            _ => {
                let order = Amend { refcount_order: Some(5), ..Amend::default() };
                quiet(|c| amend(storage.clone(), &NoImplicit, &order, c)).unwrap();
            }
        }
        let now = Header::parse(&*storage).unwrap();
        assert_eq!((now.autoclear & !1, now.compatible), (2, 0xff00_0000_0000_00fe), "{work}");
    }
}

#[test]
fn a_header_of_version_2_ends_at_72_and_has_refcounts_of_16_bits() {
    let (_dir, at) = temp();
    let mut image = Maker::new();
    image.put32(4, 2);
    // In version 3 all this would be fields, most of them wrong.
    image.bytes[72..104].fill(0);
    let end = image.extension(72, 0x1234_5678, &[0xff; 24]);
    image.put64(end, 0);
    image.save(&at("a"));
    let header = Header::parse(&*image.memory()).unwrap();
    assert_eq!((header.header_length, header.refcount_order), (72, 4));
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
    checked(&at("a"));
    assert!(report_of(image.memory()).unwrap().is_clean());
    assert!(content(&at("a"), Format::Qcow2)[..CLUSTER] == [0x42; CLUSTER]);
}

#[test]
fn what_a_longer_header_and_unknown_extensions_say_is_kept() {
    let (_dir, at) = temp();
    let mut image = Maker::new();
    image.put32(100, 128);
    image.bytes[105..128].copy_from_slice(b"fields of a later QEMU\0");
    let end = image.extension(128, 0x7777_0001, b"of a later QEMU");
    image.extension(end, 0x7777_0002, b"too");
    std::fs::write(at("base"), [1; 100]).unwrap();
    let kept = |now: &[u8], what: &str| {
        assert_eq!(now[100..104], 128u32.to_be_bytes(), "{what}");
        assert_eq!(&now[105..128], b"fields of a later QEMU\0", "{what}");
        for text in [&b"\x77\x77\0\x01\0\0\0\x0fof a later QEMU\0"[..], b"\x77\x77\0\x02\0\0\0\x03too\0"] {
            assert!(now[..CLUSTER].windows(text.len()).any(|w| w == text), "{what}: {text:?}");
        }
    };
    let open = || {
        image.save(&at("a"));
        FileStorage::open(&at("a"), Access::ReadWrite).unwrap()
    };
    let done = |what: &str| {
        let now = std::fs::read(at("a")).unwrap();
        assert!(now != image.bytes, "{what} changed something");
        kept(&now, what);
        checked(&at("a"));
    };
    drop(open());
    set_backing(&at("a"), Some("base"), Some(Format::Raw)).unwrap();
    done("another backing file");
    quiet(|c| bitmap::add(open(), "b", 512, false, c)).unwrap();
    done("a bitmap");
    quiet(|c| snapshot::create(open(), "s", c)).unwrap();
    done("a snapshot");
    let order = Amend { refcount_order: Some(5), ..Amend::default() };
    quiet(|c| amend(open(), &NoImplicit, &order, c)).unwrap();
    done("wider refcounts");
    drop(open());
    let mut writer = rw(&at("a")).unwrap();
    writer.write_at(&[1; 20 << 10], 0).unwrap();
    writer.grow(1 << 20).unwrap();
    drop(writer);
    done("writes");
}

#[test]
fn the_luks_extension_alone_is_refused_as_encryption() {
    let mut image = Maker::new();
    image.extension(104, 0x0537_be77, &[0; 16]);
    let error = Header::parse(&*image.memory()).err().unwrap().to_string();
    assert!(error.contains("LUKS"), "{error}");
}

/// An image with one bitmap, whose extension's data, directory entry and table are at the offsets returned.
fn with_bitmap() -> (Vec<u8>, usize, usize, usize) {
    let storage = Maker::new().memory();
    quiet(|c| bitmap::add(storage.clone(), "b", 512, false, c)).unwrap();
    let mut writer = bytes_of(&*storage);
    // Every bit is set by the table's entry alone.
    let at = (104..400).step_by(8).find(|at| writer[*at..*at + 4] == BITMAPS.to_be_bytes()).unwrap() + 8;
    let word = |at: usize| u64::from_be_bytes(writer[at..at + 8].try_into().unwrap()) as usize;
    let directory = word(at + 16);
    let table = word(directory);
    writer[table + 7] = 1;
    assert!(report_of(Memory::new(&writer)).unwrap().is_clean());
    assert_eq!(bitmap::dirty(&*Memory::new(&writer), "b").unwrap(), vec![ALL]);
    (writer, at, directory, table)
}

#[test]
fn fields_of_bitmaps_out_of_range_are_refused_and_found_by_a_check() {
    let (_dir, at) = temp();
    let (sound, extension, directory, table) = with_bitmap();
    std::fs::write(at("a"), &sound).unwrap();
    checked(&at("a"));
    for (what, place, value) in [
        ("more than 65535 bitmaps", extension, &[0u8, 1, 0, 0][..]),
        ("no bitmaps", extension, &[0, 0, 0, 0]),
        ("no bitmaps in a directory of nothing", extension, &[0; 16]),
        ("more bitmaps than the directory has", extension, &[0, 0, 0, 2]),
        ("reserved bits in the extension", extension + 4, &[0, 0, 0, 1]),
        ("a directory that lies askew", extension + 23, &[8]),
        ("a directory longer than its entries", extension + 15, &[64]),
        ("a table that lies askew", directory + 7, &[8]),
        ("a table past the end", directory + 4, &[1]),
        ("another table's length", directory + 11, &[2]),
        ("unknown flags", directory + 12, &[0x80]),
        ("type 0", directory + 16, &[0]),
        ("type 2", directory + 16, &[2]),
        ("granularity 2^8", directory + 17, &[8]),
        ("granularity 2^32", directory + 17, &[32]),
        ("no name", directory + 18, &[0, 0]),
        ("extra data in the place of the name", directory + 15, &[6, 1, 9, 0, 0, 0, 0, 0, 8]),
        ("a name past the directory", directory + 18, &[0xff, 0xff]),
        ("bits that a place and a flag say", table + 6, &[6, 1]),
        ("a reserved bit beside the offset", table + 6, &[6, 0x10]),
        ("reserved bits of the table", table, &[0x80]),
        ("bits past the end", table + 4, &[1]),
    ] {
        // QEMU opens none of them.
        let bytes = damaged_for_both(&at("a"), &sound, what, place, value);
        let error = bitmap::dirty(&*Memory::new(&bytes), "b").unwrap_err().to_string();
        assert!(error.contains("bitmap"), "{what}: {error}");
        look(&bytes);
        change(&bytes);
    }
}

#[test]
fn a_bitmap_with_data_of_a_newer_program_is_used_only_where_that_program_allows_it() {
    let (sound, extension, directory, _) = with_bitmap();
    // The name moves behind eight bytes of extra data; the directory's cluster has room for it.
    for (flags, used) in [(2u8, false), (6, true)] {
        let mut bytes = sound.clone();
        bytes[extension + 15] = 40;
        bytes[directory + 15] = flags;
        bytes[directory + 23] = 8;
        bytes[directory + 24..directory + 40].copy_from_slice(b"newdata\0b\0\0\0\0\0\0\0");
        assert!(report_of(Memory::new(&bytes)).unwrap().is_clean());
        let storage = Memory::new(&bytes);
        match bitmap::dirty(&*storage, "b") {
            Ok(ranges) => assert!(used && ranges == vec![ALL]),
            Err(e) => assert!(!used && e.to_string().contains("newer program"), "{e}"),
        }
        let copied = quiet(|c| bitmap::copy(Maker::new().memory(), &*storage, true, c)).unwrap();
        assert_eq!(copied.copied.len(), usize::from(used));
        assert_eq!(quiet(|c| bitmap::copy(Maker::new().memory(), &*storage, false, c)).is_ok(), used);
        // Another change of the image's bitmaps keeps it as it is.
        quiet(|c| bitmap::add(storage.clone(), "c", 512, false, c)).unwrap();
        let now = bytes_of(&*storage);
        assert!(now.windows(9).any(|w| w == b"newdata\0b"));
        assert!(report_of(storage.clone()).unwrap().is_clean());
        quiet(|c| bitmap::remove(storage.clone(), "b", c)).unwrap();
    }
}

#[test]
fn a_zero_flag_in_version_2_is_damage() {
    let mut image = Maker::new();
    image.put32(4, 2);
    image.bytes[72..104].fill(0);
    image.put64(L2 + 8, 1);
    let error = read(image.memory()).unwrap_err().to_string();
    assert!(error.contains("zero flag in a version 2 image"), "{error}");
    let found = report_of(image.memory()).unwrap();
    assert_eq!(found.corruptions, 1, "{:?}", found.messages);
    let mut open = ImageMut::open(image.memory(), &NoImplicit).unwrap();
    open.write_at(&[1; 100], 600).unwrap_err();
    // In version 3 it is what it says.
    let image = Maker::new().with(&[(L2 + 8, 1)]);
    assert!(report_of(image.memory()).unwrap().is_clean());
    assert!(read(image.memory()).unwrap()[CLUSTER..].iter().all(|b| *b == 0));
}

#[test]
fn a_cluster_past_the_end_of_the_file_is_damage_to_everyone() {
    for past in [6 * CLUSTER as u64, 1 << 40] {
        let image = Maker::new().with(&[(L2, past | 1 << 63)]);
        let error = read(image.memory()).unwrap_err().to_string();
        assert!(error.contains("past the end"), "{error}");
        let layers = Layers::from_storage(image.memory(), Format::Qcow2, &NoImplicit).unwrap();
        let error = layers.status_at(0, 512).unwrap_err().to_string();
        assert!(error.contains("past the end"), "{error}");
        assert!(report_of(image.memory()).unwrap().corruptions > 0);
        for whole in [false, true] {
            let storage = image.memory();
            let mut open = ImageMut::open(storage.clone(), &NoImplicit).unwrap();
            let error = open.write_at(&vec![1; if whole { 512 } else { 100 }], 0).unwrap_err().to_string();
            assert!(error.contains("past the end"), "{error}");
            drop(open);
            assert!(bytes_of(&*storage) == image.bytes);
        }
    }
    // The last cluster may be cut short where it begins inside.
    let mut image = Maker::new();
    image.bytes.truncate(DATA + 100);
    let bytes = read(image.memory()).unwrap();
    assert!(bytes[..100] == [0x42; 100] && bytes[100..].iter().all(|b| *b == 0));
}

#[test]
fn the_sectors_of_a_compressed_cluster_may_reach_past_the_end_and_are_all_counted() {
    let (_dir, at) = temp();
    std::fs::write(at("raw"), vec![7u8; 64 << 10]).unwrap();
    let options = "cluster_size=4k,compat=0.10";
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, s(&at("raw")), s(&at("a"))]);
    let model = content(&at("a"), Format::Qcow2);
    let mut sound = std::fs::read(at("a")).unwrap();
    sound.resize(sound.len().next_multiple_of(4096), 0);
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let block = word(word(48) as usize) as usize;
    let end = sound.len() as u64 / 4096;
    // The last cluster that was packed; x = 58 here. It lies in the file's last cluster.
    let last = l2 + 15 * 8;
    let offset = word(last) & ((1 << 58) - 1);
    assert_eq!(offset >> 12, end - 1);
    // Sectors up to the file's end, and one more.
    let within = 7 - ((offset >> 9) & 7);
    // Sectors, whether the cluster past the end is counted, flags; what is found.
    for (sectors, counted, flags, clean) in [
        (within, false, 0, true),
        (within + 1, false, 0, false),
        (within + 1, true, 0, true),
        (within + 8, true, 0, false),
        (within, false, 1u64 << 63, false),
    ] {
        let what = format!("{sectors} {counted} {flags:#x}");
        let mut bytes = sound.clone();
        bytes[last..last + 8].copy_from_slice(&(1 << 62 | sectors << 58 | offset | flags).to_be_bytes());
        bytes[block + end as usize * 2 + 1] = u8::from(counted);
        std::fs::write(at("a"), &bytes).unwrap();
        let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", s(&at("a"))]);
        assert_eq!(code == 0, clean, "{what}: {text}");
        let found = report_of(Memory::new(&bytes)).unwrap();
        assert_eq!(found.corruptions == 0, clean, "{what}: {:?}", found.messages);
        assert!(content(&at("a"), Format::Qcow2) == model, "{what}: it is read all the same");
        if !clean {
            continue;
        }
        // It can be shared, given up and written over.
        let storage = || FileStorage::open(&at("a"), Access::ReadWrite).unwrap();
        quiet(|c| snapshot::create(storage(), "s", c)).unwrap();
        checked(&at("a"));
        let mut open = rw(&at("a")).unwrap();
        open.write_at(&[9; 4096], 15 << 12).unwrap();
        open.flush().unwrap();
        drop(open);
        checked(&at("a"));
        quiet(|c| snapshot::delete(storage(), "s", c)).unwrap();
        checked(&at("a"));
    }
}

#[test]
fn data_past_the_end_of_an_external_file_reads_as_zeros() {
    let (_dir, at) = temp();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={}", s(&at("d"))),
        s(&at("a")),
        "1M",
    ]);
    qemu_io(&at("a"), &["write -P 5 0 1M"]);
    std::fs::File::options().write(true).open(at("d")).unwrap().set_len(1000).unwrap();
    let bytes = content(&at("a"), Format::Qcow2);
    assert!(bytes[..1000] == [5; 1000] && bytes[1000..].iter().all(|b| *b == 0));
    checked(&at("a"));
    assert!(common::report(&at("a")).unwrap().is_clean());
}
