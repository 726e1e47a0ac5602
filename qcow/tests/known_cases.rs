//! Faults that other programs had, by their numbers: none of them is one here.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::exercise::{Memory, change, look};
use common::maker::{CLUSTER, L2, Maker, read};
use common::{content, quiet, report_of, s, temp};
use knib_qcow::{
    Access, Chain, Error, FileStorage, Format, Gate, Header, ImageMut, Implicit, LockedPaths, NoImplicit,
    PlainPaths, Storage, snapshot,
};

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Everything that the engine does ends by itself.
fn harmless(bytes: &[u8]) {
    look(bytes);
    change(bytes);
}

/// CVE-2014-0142: a field of the header became a divisor of 0.
#[test]
fn cve_2014_0142_a_field_of_zero_divides_nothing() {
    // Each field of the header by itself; those that clusters, entries and blocks are counted with are refused.
    for at in (4..112).step_by(4) {
        let mut image = Maker::new();
        image.put32(at, 0);
        harmless(&image.bytes);
    }
    for at in [20, 100] {
        let mut image = Maker::new();
        image.put32(at, 0);
        Header::parse(&*image.memory()).unwrap_err();
    }
    // A disk of nothing has no clusters, and shares of it are counted all the same.
    let none = Maker::new().with(&[(24, 0)]);
    assert!(read(none.memory()).unwrap().is_empty());
    report_of(none.memory()).unwrap();
}

/// CVE-2014-0143: sizes of tables that overflowed when they were counted in bytes or grown.
#[test]
fn cve_2014_0143_sizes_of_tables_do_not_overflow() {
    for (at, value) in [
        (36usize, 0x2000_0000u32),
        (36, 0x1fff_ffff),
        (36, 0x8000_0001),
        (36, u32::MAX),
        (56, 0x0080_0000),
        (56, 0x0100_0000),
        (56, u32::MAX),
        (60, 0x0800_0000),
        (60, u32::MAX),
    ] {
        let mut image = Maker::new();
        image.put32(at, value);
        Header::parse(&*image.memory()).unwrap_err();
        harmless(&image.bytes);
    }
    // A disk that grows needs a larger table: it is refused before one of an overflown length is made.
    for size in [1 << 50, i64::MAX as u64, u64::MAX - 511] {
        let storage = Maker::new().memory();
        let mut image = ImageMut::open(storage, &NoImplicit).unwrap();
        let error = image.grow(size).unwrap_err().to_string();
        assert!(error.contains("too large"), "{size}: {error}");
    }
}

/// CVE-2014-0144: lengths and offsets in the header that nothing bounded.
#[test]
fn cve_2014_0144_lengths_and_offsets_of_the_header_are_bounded() {
    for (what, at, value) in [
        ("the header's length", 100, 0xffff_fff8u32),
        ("the header's length", 100, 520),
        ("the backing name's offset", 8, 0x7fff_ffff),
        ("the L1 table's offset", 40, 0x7fff_fe00),
        ("the L1 table's offset", 40, u32::MAX),
        ("the refcount table's offset", 48, 0x7fff_fe00),
        ("the refcount table's offset", 48, u32::MAX),
        ("the snapshot table's offset", 68, 7),
        ("an extension's length", 108, u32::MAX),
    ] {
        let mut image = Maker::new();
        image.put32(104, 0x1234_5678);
        image.put32(at, value);
        let error = Header::parse(&*image.memory()).err();
        error.unwrap_or_else(|| panic!("{what}: {value:#x} was taken"));
        harmless(&image.bytes);
    }
}

/// CVE-2014-0145: the L1 table of a snapshot, longer than the disk's own, was read into the memory of that one.
#[test]
fn cve_2014_0145_a_snapshots_l1_table_may_be_longer_than_the_disks() {
    let storage = Maker::new().memory();
    quiet(|c| snapshot::create(storage.clone(), "s", c)).unwrap();
    let bytes = bytes_of(&*storage);
    let table = Header::parse(&*storage).unwrap().snapshots_offset as usize;
    let l1 = bytes.len() as u64;
    // 300 entries, of which only the first is one; the rest of the table is in the file, or is not.
    for (len, there) in [(300 * 8usize, true), (8, false)] {
        let mut image = bytes.clone();
        let first: [u8; 8] = image[3 * CLUSTER..3 * CLUSTER + 8].try_into().unwrap();
        image[table..table + 8].copy_from_slice(&l1.to_be_bytes());
        image[table + 8..table + 12].copy_from_slice(&300u32.to_be_bytes());
        image.extend(first);
        image[l1 as usize] &= 0x7f;
        image.resize((l1 as usize + len).next_multiple_of(CLUSTER), 0);
        let storage = Memory::new(&image);
        let shown = snapshot::list(&*storage).unwrap()[0].view(storage.clone());
        match Chain::from_storage(shown, Format::Qcow2, &NoImplicit) {
            Ok(chain) => {
                let mut bytes = vec![0; chain.size() as usize];
                chain.read_at(&mut bytes, 0).unwrap();
                assert!(there && bytes[..CLUSTER] == [0x42; CLUSTER]);
            }
            Err(e) => assert!(!there && e.to_string().contains("L1 table"), "{e}"),
        }
        harmless(&image);
        assert!(there || quiet(|c| snapshot::apply(storage, "s", c)).is_err());
    }
}

/// CVE-2014-0146: an image whose snapshot table could not be read was let go with a pointer to nowhere.
#[test]
fn cve_2014_0146_a_snapshot_table_that_is_not_there_is_an_error_and_the_disk_is_read() {
    for offset in [0x7fff_ffff_ffff_fe00u64, 1 << 40, 6 * CLUSTER as u64, 0] {
        let mut image = Maker::new().with(&[(64, offset)]);
        image.put32(60, 3);
        if offset != 0 {
            snapshot::list(&*image.memory()).unwrap_err();
        }
        assert!(report_of(image.memory()).unwrap().corruptions > 0, "{offset:#x}");
        quiet(|c| snapshot::create(image.memory(), "x", c)).unwrap_err();
        // What the disk shows does not depend on it.
        assert!(read(image.memory()).unwrap()[..CLUSTER] == [0x42; CLUSTER]);
        harmless(&image.bytes);
    }
}

/// CVE-2014-0147: signed counts of clusters, so that a refcount block was looked for outside its table.
#[test]
fn cve_2014_0147_clusters_that_no_refcount_table_counts_are_not_looked_up_in_it() {
    for place in [1u64 << 31, 1 << 40, 1 << 47, 0x00ff_ffff_ffff_fe00] {
        for entry in [place, place | 1 << 63] {
            let image = Maker::new().with(&[(L2, entry)]);
            assert!(report_of(image.memory()).unwrap().corruptions > 0, "{entry:#x}");
            let mut open = ImageMut::open(image.memory(), &NoImplicit).unwrap();
            open.write_at(&[1; 512], 0).unwrap_err();
            harmless(&image.bytes);
        }
        // A refcount block there, and an L2 table.
        for at in [CLUSTER, CLUSTER + 8, 3 * CLUSTER] {
            let image = Maker::new().with(&[(at, place)]);
            assert!(report_of(image.memory()).unwrap().corruptions > 0, "{place:#x} at {at:#x}");
            harmless(&image.bytes);
        }
    }
}

/// CVE-2014-0222 and -0223: sizes of tables and of the disk in version 1, which is not read at all.
#[test]
fn cve_2014_0222_and_0223_version_1_is_refused_whatever_its_fields_say() {
    let mut image = Maker::new();
    image.put32(4, 1);
    // There: size at 24, cluster_bits and l2_bits at 32 and 33.
    for (size, bits) in
        [(20u64 << 10, [9u8, 6]), (20 << 10, [9, 0xfe]), (u64::MAX, [12, 9]), (1 << 63, [0, 0])]
    {
        image.put64(24, size);
        image.bytes[32..34].copy_from_slice(&bits);
        let error = Header::parse(&*image.memory()).err().unwrap().to_string();
        assert!(error.contains("version 1 is not supported"), "{error}");
        harmless(&image.bytes);
    }
}

/// Counts what an image wants opened, and opens nothing.
struct Asked(Mutex<usize>);
impl Gate for Asked {
    fn open(
        &self,
        from: &Path,
        _: Implicit,
        _: &str,
        _: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format), Error> {
        *self.0.lock().unwrap() += 1;
        Err(Error::refused(from, "no"))
    }
}

/// CVE-2024-4467: a data file whose name was read as options, so that any file could be opened by looking at an image.
#[test]
fn cve_2024_4467_a_data_files_name_is_never_options() {
    let (_dir, at) = temp();
    let secret = at("secret");
    std::fs::write(&secret, vec![0x5e; 64 << 10]).unwrap();
    let json = format!("json:{{\"driver\":\"file\",\"filename\":\"{}\"}}", s(&secret));
    for name in [json.as_str(), "json:{\"file.filename\":\"secret\"}", "driver=raw,file.filename:secret"] {
        Maker::new().data_file(name).with(&[(L2, 1 << 63)]).save(&at("a"));
        for gate in [&PlainPaths as &dyn Gate, &LockedPaths] {
            let error = Chain::open(&at("a"), Format::Qcow2, gate).err().unwrap().to_string();
            assert!(error.contains("not a plain path"), "{error}");
            let storage = FileStorage::open(&at("a"), Access::ReadWrite).unwrap();
            let error = ImageMut::open(storage, gate).err().unwrap().to_string();
            assert!(error.contains("not a plain path"), "{error}");
        }
    }
}

/// LP#2059809: an image that names any file of the host as its data file was taken for a disk of the one who brought it.
#[test]
fn lp_2059809_a_data_file_is_read_only_where_the_policy_follows_names() {
    let (_dir, at) = temp();
    let secret = at("secret");
    std::fs::write(&secret, vec![0x5e; 64 << 10]).unwrap();
    let mut image = Maker::new().data_file(s(&secret));
    image.put64(L2, 1 << 63);
    image.save(&at("a"));
    let refused = Chain::open(&at("a"), Format::Qcow2, &NoImplicit).err().unwrap();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert!(refused.to_string().contains("secret"), "it names what the image asks for: {refused}");
    let storage = FileStorage::open(&at("a"), Access::ReadWrite).unwrap();
    assert!(ImageMut::open(storage, &NoImplicit).is_err());
    // The owner's own policy follows it.
    assert!(content(&at("a"), Format::Qcow2)[..CLUSTER] == [0x5e; CLUSTER]);
    // Neither the flag nor the name does anything without the other.
    for (flag, named) in [(4u64, false), (0, true)] {
        let mut image = if named { Maker::new().data_file(s(&secret)) } else { Maker::new() };
        image.put64(72, flag);
        let gate = Asked(Mutex::new(0));
        match Chain::from_storage(image.memory(), Format::Qcow2, &gate) {
            Ok(chain) => {
                let mut bytes = [0; CLUSTER];
                chain.read_at(&mut bytes, 0).unwrap();
                assert!(flag == 0 && bytes == [0x42; CLUSTER]);
            }
            Err(e) => assert!(flag != 0 && e.to_string().contains("not named"), "{e}"),
        }
        assert_eq!(*gate.0.lock().unwrap(), 0);
    }
}

/// Two Rust crates overflowed their stack where an image was its own backing file.
#[test]
fn a_backing_loop_of_any_length_is_an_error_on_a_small_stack() {
    let (_dir, at) = temp();
    for length in [1usize, 2, 150] {
        for n in 0..length {
            let below = ((n + 1) % length).to_string();
            Maker::new().with(&[(L2, 0)]).backing(&below, Some("qcow2")).save(&at(&n.to_string()));
        }
        let top = at("0");
        let opened = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            let chain = Chain::open(&top, Format::Qcow2, &PlainPaths).err().unwrap().to_string();
            let storage = FileStorage::open(&top, Access::ReadWrite).unwrap();
            (chain, ImageMut::open(storage, &PlainPaths).err().unwrap().to_string())
        });
        let (read, write) = opened.unwrap().join().unwrap();
        assert!(read.contains("loop"), "{length}: {read}");
        assert!(write.contains("loop"), "{length}: {write}");
    }
}

/// One crashed on a refcount table as long as its field can say.
#[test]
fn a_huge_refcount_table_takes_no_memory() {
    let (_dir, at) = temp();
    for clusters in [16_384u32, 16_385, 0x7fff_ffff, u32::MAX] {
        let mut image = Maker::new();
        image.put32(56, clusters);
        let error = Header::parse(&*image.memory()).err().unwrap().to_string();
        assert!(error.contains("refcount table"), "{error}");
        // A check says so too, and a repair makes another one.
        assert!(report_of(image.memory()).is_err());
        image.save(&at("a"));
        let storage = FileStorage::open(&at("a"), Access::ReadWrite).unwrap();
        let done = quiet(|c| knib_qcow::repair(storage, knib_qcow::Repair::All, c)).unwrap();
        assert_eq!(done.after.corruptions, 0, "{:?}", done.after.messages);
        assert!(content(&at("a"), Format::Qcow2)[..CLUSTER] == [0x42; CLUSTER]);
    }
}

/// One hung on clusters of 512 bytes.
#[test]
fn clusters_of_512_bytes_are_read_and_written() {
    let (_dir, at) = temp();
    let image = Maker::new();
    image.save(&at("a"));
    let mut open = common::rw(&at("a")).unwrap();
    open.write_at(&[9; 5000], 700).unwrap();
    open.flush().unwrap();
    drop(open);
    let mut model = vec![0; 20 << 10];
    model[..CLUSTER].fill(0x42);
    model[700..5700].fill(9);
    common::same_as_model(&at("a"), &model);
    common::checked(&at("a"));
}

/// One handed out the ciphertext of an encrypted image as its data.
#[test]
fn the_ciphertext_of_an_encrypted_image_is_no_data() {
    for method in [1u32, 2, 3, u32::MAX] {
        let mut image = Maker::new();
        image.put32(32, method);
        let error = read(image.memory()).unwrap_err().to_string();
        assert!(error.contains("encrypted"), "{error}");
        assert!(ImageMut::open(image.memory(), &NoImplicit).is_err());
    }
}
