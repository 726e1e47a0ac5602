//! The power fails before each write of each change in place that no other test here cuts: the image holds together, at
//! worst leaks, and each byte of the disk is what it was or what it was to be.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::volatile::{Volatile, every_cut};
use common::{content, qemu_img, qemu_io, quiet, report_of, s, shown, temp};
use knib_qcow::codec::Compressor;
use knib_qcow::{
    Compression, CompressionType, Error, Format, Gate, Header, ImageMut, Implicit, PlainPaths, Preallocation,
    Storage, rebase,
};

const KINDS: [&str; 4] = [
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compression_type=zstd,lazy_refcounts=on",
];
const SIZE: u64 = 600 << 10;

/// Bytes of a disk with a snapshot, data that only the disk has, compressed clusters, zeros and holes.
fn image(path: &Path, options: &str) -> Vec<u8> {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(path), "600k"]);
    qemu_io(path, &["write -P 1 0 64k", "write -c -P 2 64k 64k", "write -z 128k 32k"]);
    qemu_img(&["snapshot", "-c", "one", s(path)]);
    qemu_io(path, &["write -P 3 32k 16k", "write -P 4 200k 70k", "write -c -P 5 288k 64k"]);
    std::fs::read(path).unwrap()
}

type Work<'a> = &'a dyn Fn(&mut ImageMut) -> Result<(), Error>;

/// Each cut of `work` on an image of each kind.
fn cut_everywhere(what: &str, work: Work) {
    let (_dir, at) = temp();
    for options in KINDS {
        let start = image(&at("a.qcow2"), options);
        let old = shown(Volatile::new(start.clone(), u64::MAX));
        let whole = Volatile::new(start.clone(), u64::MAX);
        let mut open = ImageMut::open(whole.clone(), &PlainPaths).unwrap();
        work(&mut open).and_then(|()| open.flush()).unwrap();
        drop(open);
        let new = shown(whole.clone());
        assert!(report_of(whole).unwrap().corruptions == 0, "{what}, {options}");
        let run = |storage: Arc<dyn Storage>| {
            let mut open = ImageMut::open(storage, &PlainPaths)?;
            work(&mut open)?;
            open.flush()
        };
        let mut cuts = 0;
        let end = every_cut(&start, &run, &mut |cut, survivor| {
            let storage = Volatile::new(survivor, u64::MAX);
            let found = report_of(storage.clone()).unwrap();
            assert_eq!(found.corruptions, 0, "{what}, {options}, cut {cut}: {:?}", found.messages);
            let bytes = shown(storage);
            let zero = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
            let odd = (0..bytes.len()).find(|i| bytes[*i] != zero(&old, *i) && bytes[*i] != zero(&new, *i));
            assert_eq!(odd, None, "{what}, {options}, cut {cut}: a byte that was never there");
            cuts += 1;
        });
        assert!(cuts > 0, "{what}, {options}");
        let end = Volatile::new(end, u64::MAX);
        assert!(report_of(end.clone()).unwrap().is_clean(), "{what}, {options}: a leak at the end");
        assert!(shown(end) == new, "{what}, {options}: something was not durable at the end");
    }
}

fn bytes(with: u8, len: u64) -> Vec<u8> {
    vec![with; len as usize]
}

#[test]
fn compressed_writes_over_holes_data_and_compressed_clusters() {
    cut_everywhere("compressed writes", &|image| {
        let (kind, cluster) = (image.header().compression, image.header().cluster_size());
        let mut compressor = Compressor::new(Compression { kind, level: 3 }).unwrap();
        for start in [32 << 10, 64 << 10, 208 << 10, 288 << 10, 400 << 10] {
            let start = start / cluster * cluster;
            for n in 0..3 {
                image.write_compressed(&mut compressor, &bytes(9, cluster), start + n * cluster)?;
            }
        }
        Ok(())
    });
}

#[test]
fn discards_and_what_is_written_into_the_space() {
    cut_everywhere("discards", &|image| {
        image.discard(0, 100 << 10)?;
        image.discard(208 << 10, 64 << 10)?;
        image.flush()?;
        // The space that the discards gave back is written at other places.
        image.write_at(&bytes(8, 64 << 10), 400 << 10)?;
        image.discard(288 << 10, 32 << 10)?;
        image.write_at(&bytes(7, 64 << 10), 500 << 10)
    });
}

#[test]
fn zeros_over_everything() {
    cut_everywhere("zeros", &|image| {
        image.write_zeroes(1000, 300 << 10)?;
        image.flush()?;
        image.write_at(&bytes(6, 40_000), 450 << 10)
    });
}

#[test]
fn writes_over_parts_of_clusters_of_every_sort() {
    cut_everywhere("writes", &|image| {
        for start in [100, 40_000, 70_000, 135_000, 210_000, 290_000, 410_000, 610_000] {
            image.write_at(&bytes(6, 4_000), start)?;
        }
        image.flush()?;
        image.write_at(&bytes(6, 4_000), 75_000)
    });
}

#[test]
fn space_that_is_allocated_ahead() {
    for how in [Preallocation::Metadata, Preallocation::Full] {
        cut_everywhere("preallocation", &|image| image.preallocate(0..SIZE, how));
        // It is there on return, with no flush by the caller.
        let (_dir, at) = temp();
        let storage = Volatile::new(image(&at("a.qcow2"), KINDS[0]), u64::MAX);
        ImageMut::open(storage.clone(), &PlainPaths).unwrap().preallocate(0..SIZE, how).unwrap();
        let found = report_of(Volatile::new(storage.durable(), u64::MAX)).unwrap();
        assert!(found.is_clean());
        // All but the 32 KiB that read as zeros by a flag.
        assert_eq!(found.usage.allocated, found.usage.total - (32 << 10) / 512);
    }
}

#[test]
fn a_disk_that_grows_and_is_written_there() {
    cut_everywhere("growth", &|image| {
        // An L2 table that a snapshot shares is copied for this, and must be there before an L1 table that moves names it.
        image.write_at(&bytes(4, 5_000), 10 << 10)?;
        // Of version 2 a disk with snapshots grows too: they know their own size by their L1 tables.
        image.grow(40 << 20)?;
        image.write_at(&bytes(5, 20_000), SIZE - 5_000)
    });
}

#[test]
fn refcount_blocks_and_their_table_that_grow() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    // 64 refcounts of 64 bits a block, and 64 blocks in the table's one cluster: those are 2 MiB.
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", s(&path), "8M"]);
    qemu_io(&path, &["write -P 1 0 1960k"]);
    let start = std::fs::read(&path).unwrap();
    let old = shown(Volatile::new(start.clone(), u64::MAX));
    let mut new = old.clone();
    new[1950 << 10..2050 << 10].fill(2);
    new.resize(9 << 20, 0);
    let work = |storage: Arc<dyn Storage>| {
        let mut image = ImageMut::open(storage, &PlainPaths)?;
        image.write_at(&bytes(2, 100 << 10), 1950 << 10)?;
        image.flush()?;
        image.grow(9 << 20)
    };
    let table = |file: &[u8]| file[48..60].to_vec();
    let mut moved = 0;
    let end = every_cut(&start, &work, &mut |cut, survivor| {
        moved += u64::from(table(&survivor) != table(&start));
        let storage = Volatile::new(survivor, u64::MAX);
        let found = report_of(storage.clone()).unwrap();
        assert_eq!(found.corruptions, 0, "cut {cut}: {:?}", found.messages);
        let bytes = shown(storage);
        let odd =
            (0..bytes.len()).find(|i| bytes[*i] != new[*i] && bytes[*i] != old.get(*i).copied().unwrap_or(0));
        assert_eq!(odd, None, "cut {cut}: a byte that was never there");
    });
    assert!(moved > 10, "the refcount table did not move");
    let end = Volatile::new(end, u64::MAX);
    assert!(report_of(end.clone()).unwrap().is_clean());
    assert!(shown(end) == new);
}

#[test]
fn an_image_that_is_emptied() {
    cut_everywhere("emptying", &|image| image.make_empty());
}

/// Backing files in memory, by name.
struct Shelf(Vec<(&'static str, Vec<u8>)>);

impl Gate for Shelf {
    fn open(
        &self,
        from: &Path,
        _: Implicit,
        named: &str,
        _: Option<&str>,
    ) -> knib_qcow::Result<(Arc<dyn Storage>, Format)> {
        let found = self.0.iter().find(|(name, _)| *name == named);
        let (_, bytes) = found.unwrap_or_else(|| panic!("{} named {named}", from.display()));
        Ok((Volatile::new(bytes.clone(), u64::MAX), Format::Qcow2))
    }
}

#[test]
fn a_safe_rebase_shows_the_same_at_every_cut() {
    let (_dir, at) = temp();
    for options in KINDS {
        let base = image(&at("base"), options);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&at("other")), "500k"]);
        qemu_io(&at("other"), &["write -P 1 0 48k", "write -P 9 100k 300k"]);
        let other = std::fs::read(at("other")).unwrap();
        let top = at("top");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-b",
            s(&at("base")),
            "-F",
            "qcow2",
            s(&top),
        ]);
        qemu_io(&top, &["write -P 7 16k 32k", "write -c -P 8 256k 64k"]);
        qemu_img(&["snapshot", "-c", "one", s(&top)]);
        let model = content(&top, Format::Qcow2);
        qemu_img(&["rebase", "-u", "-b", "base", "-F", "qcow2", s(&top)]);
        let start = std::fs::read(&top).unwrap();
        let shelf = Shelf(vec![("base", base), ("other", other)]);
        // The image's own codec is taken, whatever is asked for.
        let compressed = Compression { kind: CompressionType::Deflate, level: 1 };
        for (to, compression) in [(None, None), (Some("other"), None), (Some("other"), Some(compressed))] {
            let work = |storage: Arc<dyn Storage>| {
                quiet(|c| rebase(storage, to.map(|n| (n, Format::Qcow2)), compression, &shelf, c))
            };
            let shows = |bytes: Vec<u8>| {
                let storage = Volatile::new(bytes, u64::MAX);
                let report = report_of(storage.clone()).unwrap();
                assert_eq!(report.corruptions, 0, "{options} onto {to:?}: {:?}", report.messages);
                let chain = knib_qcow::Chain::from_storage(storage, Format::Qcow2, &shelf).unwrap();
                let mut bytes = vec![0; chain.size() as usize];
                chain.read_at(&mut bytes, 0).unwrap();
                bytes
            };
            let what = format!("{options} onto {to:?}, {compression:?}");
            let end = every_cut(&start, &work, &mut |cut, survivor| {
                assert!(shows(survivor) == model, "{what}, cut {cut}");
            });
            assert!(Header::parse(&*Volatile::new(end.clone(), u64::MAX)).unwrap().backing.as_deref() == to);
            assert!(shows(end) == model, "{what}");
        }
    }
}
