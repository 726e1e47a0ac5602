//! How new images are laid out, and what moves into them as it is stored.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use common::{Random, checked, content, qemu_img, qemu_io, s, same_as_model, temp};
use knib_qcow::codec::decompress;
use knib_qcow::{
    Chain, ChainSource, Compression, CompressionType, Control, FileStorage, Format, NewImage, NoObserver,
    Observer, Place, PlainPaths, Result, Written, write_image,
};

const CLUSTER: u64 = 65536;

/// Files as they are on disks: most shrink to a third, some do not shrink at all, some are empty.
fn mixed(len: u64, cluster: u64) -> Vec<u8> {
    let mut random = Random(11);
    let mut bytes = vec![0u8; len as usize];
    for part in bytes.chunks_mut(cluster as usize) {
        let noise = match random.below(8) {
            0 => 0,
            1 | 2 => part.len(),
            _ => (random.below(part.len() as u64 / 2)) as usize,
        };
        part[..noise].fill_with(|| random.next() as u8);
    }
    bytes
}

fn write<O: Observer>(chain: &Chain, new: &NewImage, to: &Path, threads: usize, observer: &O) -> Written {
    let cancel = AtomicBool::new(false);
    let control = Control { threads, rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let source = ChainSource::whole(chain, 1 << new.cluster_bits);
    write_image(FileStorage::create_new(to).unwrap(), new, &source, observer, &control).unwrap()
}

fn zstd(size: u64, cluster_bits: u32) -> NewImage {
    let compression = Some(Compression { kind: CompressionType::Zstd, level: 3 });
    NewImage { size, cluster_bits, compression, backing: None }
}

fn raw(path: &Path, bytes: &[u8]) -> Chain {
    std::fs::write(path, bytes).unwrap();
    Chain::open(path, Format::Raw, &PlainPaths).unwrap()
}

/// Where everything was put, and what was taken over.
#[derive(Default)]
struct Places {
    of: Mutex<Vec<(u64, Place)>>,
    metadata: AtomicU64,
    taken: AtomicU64,
}

impl Observer for Places {
    type Digest = ();
    fn keep(&self, _: u64, _: &[u8]) -> bool {
        true
    }
    fn digest(&self, _: u64, _: &[u8], _: &[u8]) {}
    fn digest_stored(&self, _: u64, _: &[u8]) -> Option<()> {
        self.taken.fetch_add(1, Relaxed);
        Some(())
    }
    fn stored(&self, cluster: u64, place: Place, (): ()) -> Result<()> {
        self.of.lock().unwrap().push((cluster, place));
        Ok(())
    }
    fn metadata(&self, _: u64, bytes: &[u8]) -> Result<()> {
        self.metadata.fetch_add(bytes.len() as u64, Relaxed);
        Ok(())
    }
}

#[test]
fn plain_clusters_among_compressed_ones_leave_hardly_a_gap_and_stay_near_their_neighbours() {
    let (_dir, at) = temp();
    let model = mixed(64 << 20, CLUSTER);
    let chain = raw(&at("raw"), &model);
    let places = Places::default();
    let written = write(&chain, &zstd(64 << 20, 16), &at("new"), 2, &places);
    checked(&at("new"));
    same_as_model(&at("new"), &model);
    let of = places.of.into_inner().unwrap();
    assert!(of.is_sorted_by_key(|(cluster, _)| *cluster), "told in guest order");
    let (mut stored, mut plain, mut before, mut end) = (0, 0, 0, 0);
    let mut span = 0;
    for (cluster, place) in &of {
        let (Place::Data { offset, len } | Place::Compressed { offset, len }) = *place else { continue };
        if (cluster * CLUSTER) >> 24 != span {
            (span, before) = ((cluster * CLUSTER) >> 24, end);
        }
        assert!(offset >= before, "cluster {cluster} lies among those of another 16 MiB");
        end = end.max(offset + len);
        stored += len;
        plain += u64::from(matches!(place, Place::Data { .. }));
    }
    assert!(plain > 150, "{plain}");
    let lost = written.file_len - stored - places.metadata.into_inner();
    // Half a cluster for each would be 5 MiB and more.
    assert!(lost < 600 << 10, "{lost} bytes lost before {plain} plain clusters");
}

#[test]
fn mixed_disks_with_clusters_of_any_size_read_back_in_both_compressions() {
    let (_dir, at) = temp();
    for kind in [CompressionType::Zstd, CompressionType::Deflate] {
        for (bits, len) in [(9, 300_000), (12, 3_000_832), (16, 20 << 20), (17, 20 << 20), (21, 40 << 20)] {
            let path = at(&format!("{bits}-{kind:?}"));
            let model = mixed(len / 512 * 512, 1 << bits);
            let chain = raw(&at("raw"), &model);
            let compression = Some(Compression { kind, level: 3 });
            let new = NewImage { compression, ..zstd(model.len() as u64, bits) };
            write(&chain, &new, &path, 3, &NoObserver);
            checked(&path);
            same_as_model(&path, &model);
        }
    }
}

#[test]
fn refcount_blocks_count_themselves_wherever_the_clusters_end() {
    let (_dir, at) = temp();
    // With the tables, around the 512 clusters that two blocks count.
    for clusters in 485..=510 {
        let mut random = Random(3);
        let model: Vec<u8> = (0..clusters * 512).map(|_| random.next() as u8 | 1).collect();
        let chain = raw(&at("raw"), &model);
        let new = NewImage { size: clusters * 512, cluster_bits: 9, compression: None, backing: None };
        let to = at(&format!("new{clusters}"));
        write(&chain, &new, &to, 1, &NoObserver);
        checked(&to);
    }
}

#[test]
fn the_same_disk_becomes_the_same_file_with_any_number_of_threads() {
    let (_dir, at) = temp();
    let model = mixed(24 << 20, CLUSTER);
    let chain = raw(&at("raw"), &model);
    for threads in [1, 2, 7] {
        write(&chain, &zstd(24 << 20, 16), &at(&threads.to_string()), threads, &NoObserver);
    }
    let first = std::fs::read(at("1")).unwrap();
    assert!(first == std::fs::read(at("2")).unwrap());
    assert!(first == std::fs::read(at("7")).unwrap());
}

/// A base with compressed clusters and an overlay that holds some of everything.
fn chain_of_two(at: &impl Fn(&str) -> std::path::PathBuf, options: &str, cluster: u64) -> Vec<u8> {
    for name in ["raw", "base", "top"] {
        let _ = std::fs::remove_file(at(name));
    }
    std::fs::write(at("raw"), mixed(80 * cluster + 512, cluster)).unwrap();
    let options = format!("{options},cluster_size={cluster}");
    let (base, top) = (at("base"), at("top"));
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, s(&at("raw")), s(&base)]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, "-b", s(&base), "-F", "qcow2", s(&top)]);
    let c = cluster;
    qemu_io(
        &top,
        &[
            &format!("write -c -P 3 {} {c}", 5 * c),
            &format!("write -P 4 {} {}", 9 * c, 2 * c),
            &format!("write -P 5 {} 512", 20 * c),
            &format!("write -z {} {}", 30 * c, 4 * c),
        ],
    );
    content(&top, Format::Qcow2)
}

#[test]
fn compressed_clusters_of_the_same_kind_move_as_they_are_from_any_layer() {
    let (_dir, at) = temp();
    for (options, kind) in [
        ("compression_type=zstd", CompressionType::Zstd),
        ("compression_type=zlib", CompressionType::Deflate),
    ] {
        for bits in [12, 16] {
            let model = chain_of_two(&at, options, 1 << bits);
            let chain = Chain::open(&at("top"), Format::Qcow2, &PlainPaths).unwrap();
            let compressed = (0..81).filter(|i| {
                let kind = chain.extent_at(i << bits).unwrap().kind;
                matches!(kind, knib_qcow::ExtentKind::Compressed { .. })
            });
            let compressed = compressed.count() as u64;
            assert!(compressed > 40, "{compressed}");
            let (path, places) = (at(&format!("{kind:?}-{bits}")), Places::default());
            let compression = Some(Compression { kind, level: 3 });
            let new = NewImage { compression, ..zstd(chain.size(), bits) };
            let written = write(&chain, &new, &path, 2, &places);
            assert_eq!(places.taken.into_inner(), compressed);
            checked(&path);
            same_as_model(&path, &model);
            // Not a byte of what follows a cluster is taken along.
            let ours = at(&format!("ours-{kind:?}-{bits}"));
            let anew = write(&raw(&at("flat"), &model), &new, &ours, 2, &NoObserver);
            assert!(written.file_len <= anew.file_len + anew.file_len / 20, "{written:?} {anew:?}");
        }
    }
}

/// Wants to see the guest's bytes of all clusters.
struct Sees(CompressionType, AtomicU64);

impl Observer for Sees {
    type Digest = ();
    fn keep(&self, cluster: u64, _: &[u8]) -> bool {
        cluster != 5
    }
    fn digest(&self, cluster: u64, guest: &[u8], stored: &[u8]) {
        if (1..guest.len()).contains(&stored.len()) {
            let mut out = vec![0; guest.len()];
            decompress(self.0, stored, &mut out).unwrap();
            assert!(out == guest, "cluster {cluster}");
            self.1.fetch_add(1, Relaxed);
        }
    }
    fn stored(&self, cluster: u64, _: Place, (): ()) -> Result<()> {
        assert!(cluster != 5, "it was not to be kept");
        Ok(())
    }
    fn metadata(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

#[test]
fn an_observer_that_needs_the_guests_bytes_gets_them_also_of_what_is_moved() {
    let (_dir, at) = temp();
    let mut model = chain_of_two(&at, "compression_type=zstd", CLUSTER);
    let chain = Chain::open(&at("top"), Format::Qcow2, &PlainPaths).unwrap();
    let sees = Sees(CompressionType::Zstd, AtomicU64::new(0));
    write(&chain, &zstd(chain.size(), 16), &at("new"), 2, &sees);
    assert!(sees.1.into_inner() > 40);
    model[5 * CLUSTER as usize..6 * CLUSTER as usize].fill(0);
    checked(&at("new"));
    same_as_model(&at("new"), &model);
}

#[test]
fn clusters_of_another_kind_or_size_are_compressed_anew() {
    let (_dir, at) = temp();
    let model = chain_of_two(&at, "compression_type=zstd", CLUSTER);
    let chain = Chain::open(&at("top"), Format::Qcow2, &PlainPaths).unwrap();
    let zlib = Some(Compression { kind: CompressionType::Deflate, level: 3 });
    let other_kind = NewImage { compression: zlib, ..zstd(chain.size(), 16) };
    for (name, new) in [("kind", other_kind), ("size", zstd(chain.size(), 15))] {
        let places = Places::default();
        write(&chain, &new, &at(name), 2, &places);
        assert_eq!(places.taken.into_inner(), 0);
        checked(&at(name));
        same_as_model(&at(name), &model);
    }
}
