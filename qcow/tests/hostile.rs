//! Images that somebody made to do harm: refused or read, with no panic, no hang, and no file that nobody allowed.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::exercise::{Memory, change, look};
use common::maker::{CLUSTER, DATA, L2, Maker, read};
use common::{Random, content, qemu_img, qemu_io, report_of, s, temp};
use knib_qcow::{
    Access, Chain, Error, FileStorage, Format, Gate, Header, ImageMut, Implicit, Layers, NoImplicit,
    PlainPaths, Storage, bitmap, chain::MAX_DEPTH, snapshot,
};

#[test]
fn the_images_that_the_tests_make_are_sound_before_they_are_harmed() {
    let (_dir, at) = temp();
    Maker::new().save(&at("a"));
    common::checked(&at("a"));
    assert!(report_of(Maker::new().memory()).unwrap().is_clean());
    let bytes = content(&at("a"), Format::Qcow2);
    assert!(bytes[..CLUSTER].iter().all(|b| *b == 0x42) && bytes[CLUSTER..].iter().all(|b| *b == 0));
}

/// Refuses all, and remembers what was asked for.
struct Remember(Mutex<Vec<(Implicit, String)>>);
impl Gate for Remember {
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        name: &str,
        _: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format), Error> {
        self.0.lock().unwrap().push((kind, name.to_owned()));
        Err(Error::refused(from, "no"))
    }
}

#[test]
fn no_file_is_opened_that_the_policy_did_not_allow() {
    let (_dir, at) = temp();
    let path = at("a");
    let names = [
        "/etc/shadow",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "nbd://host/disk",
        "nbd:unix:/run/x",
        "fat:/etc",
        "https://host/x",
        "rbd:pool/image",
    ];
    for name in names {
        for (image, kind) in [
            (Maker::new().backing(name, Some("raw")), Implicit::Backing),
            (Maker::new().data_file(name), Implicit::DataFile),
        ] {
            image.save(&path);
            let gate = Remember(Mutex::default());
            assert!(Chain::open(&path, Format::Qcow2, &gate).is_err());
            assert!(ImageMut::open(image.memory(), &gate).is_err());
            let asked = gate.0.into_inner().unwrap();
            assert_eq!(asked, vec![(kind, name.to_owned()); 2]);
            let refused = Chain::open(&path, Format::Qcow2, &NoImplicit).err().unwrap();
            assert!(matches!(refused, Error::Refused { .. }), "{refused}");
            if !name.starts_with('/') {
                let refused = Chain::open(&path, Format::Qcow2, &PlainPaths).err().unwrap();
                assert!(refused.to_string().contains("not a plain path"), "{refused}");
            }
        }
    }
}

#[test]
fn a_format_is_never_guessed() {
    let (_dir, at) = temp();
    Maker::new().save(&at("base"));
    Maker::new().backing("base", None).save(&at("a"));
    let refused = Chain::open(&at("a"), Format::Qcow2, &PlainPaths).err().unwrap().to_string();
    assert!(refused.contains("without its format"), "{refused}");
    // What is said to be raw is raw, whatever it begins with.
    Maker::new().with(&[(L2, 0)]).backing("base", Some("raw")).save(&at("a"));
    assert!(content(&at("a"), Format::Qcow2)[..4] == [0x51, 0x46, 0x49, 0xfb]);
    Maker::new().backing("base", Some("vmdk")).save(&at("a"));
    assert!(Chain::open(&at("a"), Format::Qcow2, &PlainPaths).is_err());
}

#[test]
fn loops_are_errors_and_chains_end_at_200_images() {
    let (_dir, at) = temp();
    let image = |name: &str, backing: Option<&str>| {
        let image = Maker::new();
        let image = match backing {
            Some(b) => image.with(&[(L2, 0)]).backing(b, Some("qcow2")),
            None => image,
        };
        image.save(&at(name));
    };
    image("a", Some("b"));
    image("b", Some("c"));
    image("c", Some("b"));
    let error = Chain::open(&at("a"), Format::Qcow2, &PlainPaths).err().unwrap().to_string();
    assert!(error.contains("loop"), "{error}");
    image("0", None);
    for n in 1..=MAX_DEPTH {
        image(&n.to_string(), Some(&(n - 1).to_string()));
    }
    let deepest = at(&(MAX_DEPTH - 1).to_string());
    assert_eq!(Chain::open(&deepest, Format::Qcow2, &PlainPaths).unwrap().depth(), MAX_DEPTH);
    assert!(content(&deepest, Format::Qcow2) == content(&at("0"), Format::Qcow2));
    let error = Chain::open(&at(&MAX_DEPTH.to_string()), Format::Qcow2, &PlainPaths).err().unwrap();
    assert!(error.to_string().contains("deeper than"), "{error}");
}

#[test]
fn header_fields_out_of_range_are_refused_by_name() {
    let word = |at: usize, value: u32| (at, value);
    for ((at, value), says) in [
        (word(0, 0), "does not begin"),
        (word(4, 1), "version 1"),
        (word(4, u32::MAX), "version"),
        (word(20, 8), "cluster_bits"),
        (word(20, 22), "cluster_bits"),
        (word(20, u32::MAX), "cluster_bits"),
        (word(24, 0x7fff_ffff), "L1 table"),
        (word(32, 1), "encrypted"),
        (word(32, 2), "LUKS"),
        (word(36, u32::MAX), "L1 table"),
        (word(36, 0), "L1 table"),
        (word(36, 4 << 20), "L1 table"),
        (word(40, 0x7f00_0000), "L1 table"),
        (word(44, 1), "aligned"),
        (word(44, 0), "L1 table"),
        (word(48, 0x7f00_0000), "refcount table"),
        (word(52, 7), "aligned"),
        (word(56, 0), "refcount table"),
        (word(56, u32::MAX), "refcount table"),
        (word(60, u32::MAX), "snapshot"),
        (word(68, 1), "snapshot"),
        (word(72, 0x8000_0000), "incompatible"),
        (word(76, 32), "incompatible"),
        (word(76, 8), "compression type"),
        (word(76, 16), "extended L2"),
        (word(96, 7), "refcount_order"),
        (word(96, u32::MAX), "refcount_order"),
        (word(100, 0), "header_length"),
        (word(100, 105), "header_length"),
        (word(100, 1024), "header_length"),
        (word(16, 1024), "1023"),
    ] {
        let mut image = Maker::new();
        if at == 16 {
            image.put64(8, 200);
        }
        image.put32(at, value);
        let error = Header::parse(&*image.memory()).err();
        let error = error.unwrap_or_else(|| panic!("{value:#x} at {at} was taken")).to_string();
        assert!(error.contains(says), "{value:#x} at {at}: {error}");
        assert!(error.contains("hostile"), "it names the file: {error}");
        look(&image.bytes);
        change(&image.bytes);
    }
}

#[test]
fn extensions_that_lie_about_their_length_are_refused() {
    for (kind, len) in [(0xe279_2acau32, u32::MAX), (0x1234_5678, 401), (0x2385_2875, 0x7fff_fff8)] {
        let mut image = Maker::new();
        image.put32(104, kind);
        image.put32(108, len);
        assert!(Header::parse(&*image.memory()).is_err(), "{kind:#x} {len:#x}");
    }
    // The same twice; a name outside cluster 0; a NUL; no UTF-8.
    let mut twice = Maker::new();
    let at = twice.extension(104, 0xe279_2aca, b"raw");
    twice.extension(at, 0xe279_2aca, b"qcow2");
    assert!(Header::parse(&*twice.memory()).is_err());
    let far = Maker::new().with(&[(8, 1 << 40)]);
    assert!(Header::parse(&*far.memory()).err().unwrap().to_string().contains("cluster 0"));
    // The last name that lies in cluster 0, and one that runs one byte past it.
    for (len, inside) in [(4, true), (5, false)] {
        let mut image = Maker::new().with(&[(8, 508)]);
        image.put32(16, len);
        image.bytes[508..512].copy_from_slice(b"base");
        image.put64(104, 0);
        match Header::parse(&*image.memory()) {
            Ok(header) => assert!(inside && header.backing.as_deref() == Some("base")),
            Err(e) => assert!(!inside && e.to_string().contains("cluster 0"), "{e}"),
        }
    }
    assert!(Header::parse(&*Maker::new().backing("a\0b", None).memory()).is_err());
    let mut bytes = Maker::new().backing("ab", None);
    bytes.bytes[112] = 0xff;
    assert!(Header::parse(&*bytes.memory()).is_err());
}

#[test]
fn a_bitmap_directory_or_a_snapshot_table_that_is_not_there_is_refused_and_not_allocated() {
    let mut image = Maker::new();
    let mut data = [0u8; 24];
    data[..4].copy_from_slice(&65_535u32.to_be_bytes());
    data[8..16].copy_from_slice(&(64u64 << 20).to_be_bytes());
    data[16..].copy_from_slice(&(1u64 << 30).to_be_bytes());
    image.extension(104, 0x2385_2875, &data);
    image.put64(88, 1);
    let error = bitmap::list(&*image.memory()).unwrap_err().to_string();
    assert!(error.contains("bitmap directory"), "{error}");
    assert!(!report_of(image.memory()).unwrap().is_clean());
    let mut image = Maker::new().with(&[(64, 1 << 40)]);
    image.put32(60, 65_536);
    let error = snapshot::list(&*image.memory()).unwrap_err().to_string();
    assert!(error.contains("snapshot table"), "{error}");
    assert!(report_of(image.memory()).unwrap().corruptions > 0);
    look(&image.bytes);
    change(&image.bytes);
}

#[test]
fn a_compressed_cluster_yields_one_cluster_or_an_error() {
    let deflate = |bytes: &[u8]| {
        let mut out = Vec::with_capacity(8192);
        let mut c = flate2::Compress::new_with_window_bits(flate2::Compression::best(), false, 12);
        c.compress_vec(bytes, &mut out, flate2::FlushCompress::Finish).unwrap();
        out
    };
    // Entries of 512-byte clusters: x = 61; one additional sector at most.
    for (stored, want) in [
        (deflate(&[9; 512]), Some(vec![9u8; 512])),
        (deflate(&[9; 511]), None),
        (deflate(&[]), None),
        (vec![0xff; 100], None),
        // A bomb of a megabyte gives its first cluster and no more.
        (deflate(&vec![9; 1 << 20]), Some(vec![9u8; 512])),
    ] {
        let mut image = Maker::new();
        image.bytes[DATA..].fill(0);
        image.bytes.resize(DATA + 4 * CLUSTER, 0);
        image.bytes[DATA..DATA + stored.len()].copy_from_slice(&stored);
        image.put64(L2, 1 << 62 | 1 << 61 | DATA as u64);
        match (read(image.memory()), want) {
            (Ok(got), Some(want)) => assert!(got[..512] == want),
            (Err(e), None) => assert!(e.to_string().contains("compressed cluster"), "{e}"),
            (got, want) => panic!("{got:?}, wanted {want:?}"),
        }
    }
}

#[test]
fn a_zstd_cluster_yields_one_cluster_or_an_error() {
    let frame = |len: usize| zstd::bulk::compress(&vec![9; len], 3).unwrap();
    let split = [frame(100), frame(412)].concat();
    for (stored, fits) in [
        (frame(512), true),
        (split, true),
        (frame(511), false),
        (frame(513), false),
        (frame(64 << 20), false),
        (frame(0), false),
        // A header that promises 2^63 bytes.
        ([&[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..], &(1u64 << 63).to_le_bytes(), &[1, 0, 0]].concat(), false),
    ] {
        let mut image = Maker::new();
        image.put64(72, 8);
        image.put32(100, 112);
        image.put32(104, 1 << 24);
        image.bytes[DATA..].fill(0);
        image.bytes.resize(DATA + 20 * CLUSTER, 0);
        image.bytes[DATA..DATA + stored.len()].copy_from_slice(&stored);
        image.put64(L2, 1 << 62 | 1 << 61 | DATA as u64);
        match read(image.memory()) {
            Ok(bytes) => assert!(fits && bytes[..512] == [9; 512]),
            Err(e) => assert!(!fits && e.to_string().contains("compressed cluster"), "{e}"),
        }
        look(&image.bytes);
        change(&image.bytes);
    }
}

#[test]
fn entries_that_point_where_they_must_not_are_damage() {
    // Not aligned, past the end, over the header; flags that contradict each other.
    for (at, value, reads) in [
        (3 * CLUSTER, (L2 as u64 + 8) | 1 << 63, true),
        (3 * CLUSTER, 1 << 40, false),
        (3 * CLUSTER, (3 * CLUSTER as u64) | (1 << 63), true),
        (L2, 1 << 40 | 1 << 63, false),
        (L2, 1 << 63, true),
        (L2, 0x200 | 1 << 63, true),
        (L2, 1 << 62 | 1 << 50, false),
    ] {
        let image = Maker::new().with(&[(at, value)]);
        assert!(report_of(image.memory()).map_or(true, |r| !r.is_clean()), "{value:#x} at {at:#x}");
        if !reads {
            let error = read(image.memory()).unwrap_err().to_string();
            assert!(error.contains("hostile") && error.contains("0x"), "{error}");
        }
        look(&image.bytes);
        change(&image.bytes);
    }
}

type Work<'a> = &'a dyn Fn(&mut ImageMut) -> Result<(), Error>;

#[test]
fn a_subcluster_that_is_allocated_and_zero_is_damage_to_whoever_comes_to_it() {
    let (_dir, at) = temp();
    let path = at("a");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on", s(&path), "128k"]);
    qemu_io(&path, &["write -P 1 0 48k", "write -c -P 2 64k 16k"]);
    let sound = std::fs::read(&path).unwrap();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // Data, all of it allocated; nothing; compressed, which has no subclusters.
    for (cluster, bitmap, says) in [
        (0u64, 1 << 32 | 0xffff_ffff, "allocated and zero"),
        (5, 1 << 35 | 1 << 3, "allocated and zero"),
        (4, 1 << 32, "subclusters"),
    ] {
        let mut bytes = sound.clone();
        let entry = l2 + cluster as usize * 16 + 8;
        bytes[entry..entry + 8].copy_from_slice(&u64::to_be_bytes(bitmap));
        let start = cluster * 16384;
        let chain = Chain::from_storage(Memory::new(&bytes), Format::Qcow2, &NoImplicit).unwrap();
        let error = chain.read_at(&mut [0; 100], start + 5000).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("hostile"), "{error}");
        let layers = Layers::from_storage(Memory::new(&bytes), Format::Qcow2, &NoImplicit).unwrap();
        let mapped = layers.status_at(start + 5000, start + 16384);
        // QEMU does not look at the bitmap of a compressed cluster when it maps it.
        assert_eq!(mapped.is_err(), cluster != 4, "{mapped:?}");
        let found = report_of(Memory::new(&bytes)).unwrap();
        assert_eq!(found.corruptions, 1, "{:?}", found.messages);
        let works: [Work; 4] = [
            &|image| image.write_at(&[9; 100], start + 5000),
            &|image| image.write_at(&[9; 16384], start),
            &|image| image.write_zeroes(start, 16384),
            &|image| image.discard(start, 16384),
        ];
        for (n, work) in works.into_iter().enumerate() {
            let storage = Memory::new(&bytes);
            let mut image = ImageMut::open(storage.clone(), &NoImplicit).unwrap();
            let error = work(&mut image).expect_err(&format!("work {n} on cluster {cluster}")).to_string();
            assert!(error.contains("subclusters"), "{error}");
            drop(image);
            let mut now = vec![0; bytes.len()];
            storage.read_at(&mut now, 0).unwrap();
            assert!(now == bytes, "work {n} on cluster {cluster}: nothing was written");
        }
    }
}

#[test]
fn guest_data_is_never_written_over_tables() {
    // The guest's cluster is the header's, the refcount block's, the L1 table's, the L2 table's own.
    for target in [0x200u64, 0x400, 0x600, 0x800] {
        let image = Maker::new().with(&[(L2, target | 1 << 63)]);
        let storage = image.memory();
        let mut open = ImageMut::open(storage.clone(), &NoImplicit).unwrap();
        let error = open.write_at(&[1; 100], 10).unwrap_err().to_string();
        assert!(error.contains("metadata"), "{error}");
        drop(open);
        let mut now = vec![0; image.bytes.len()];
        storage.read_at(&mut now, 0).unwrap();
        assert!(now == image.bytes, "nothing was written");
    }
}

#[test]
fn a_refcount_of_zero_does_not_give_a_table_away() {
    // Everything is said to be free: the first allocation would take the refcount table.
    let mut image = Maker::new();
    image.bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let mut open = ImageMut::open(image.memory(), &NoImplicit).unwrap();
    let error = open.write_at(&[1; 512], 4096).unwrap_err().to_string();
    assert!(error.contains("refcount is 0"), "{error}");
}

#[test]
fn mutated_images_are_read_checked_repaired_and_written_without_a_panic() {
    let (_dir, at) = temp();
    let path = at("m.qcow2");
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for options in ["cluster_size=512", "cluster_size=16k,extended_l2=on"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "128k"]);
        qemu_io(&path, &["write -c -P 5 64k 16k", "write -P 3 0 40k"]);
        qemu_img(&["snapshot", "-c", "one", s(&path)]);
        qemu_img(&["bitmap", "--add", "-g", "512", s(&path), "b"]);
        qemu_io(&path, &["write -P 4 8k 8k"]);
        let good = std::fs::read(&path).unwrap();
        look(&good);
        change(&good);
        for _ in 0..500 {
            let mut bytes = good.clone();
            for _ in 0..3 {
                let range = if random.below(2) == 0 { 200 } else { bytes.len() as u64 };
                bytes[random.below(range) as usize] = random.next() as u8;
            }
            look(&bytes);
            change(&bytes);
        }
    }
}

#[test]
fn the_corpus_of_the_fuzz_targets_is_replayed() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/image");
    let mut seen = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        look(&bytes);
        change(&bytes);
        seen += 1;
    }
    assert!(seen >= 6, "{seen} files in {}", folder.display());
    let sound = FileStorage::open(&folder.join("sound"), Access::Read).unwrap();
    assert!(report_of(sound).unwrap().is_clean());
}
