//! What a guest reads while it boots from a mounted disk, noted and decoded ahead the next time. Needs root and /dev/fuse.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::{Duration, Instant};

use knibfs::store::boot_trace::{BootTrace, Parts};
use mounted_store::{CLUSTER, Fixture, Layer, Shape};

const SIZE: u64 = 40 << 20;

/// The clusters that the guest reads when it boots, in order. None is among those that the second backup changed.
fn boot_order() -> Vec<u32> {
    (0..60).map(|n| n * 37 % 601).filter(|cluster| cluster % 10 != 3).collect()
}

fn fixture() -> Fixture {
    let full: Layer = (0..620).map(|n| (n, Shape::Compressed)).collect();
    let changed: Layer = (0..62).map(|n| (n * 10 + 3, Shape::Plain)).collect();
    Fixture::chain(SIZE, true, &[full, changed])
}

/// Past the page cache, so that the mount sees just these reads.
fn open(f: &Fixture, of: usize) -> File {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().read(true).custom_flags(direct).open(f.in_mount(of, "root.raw")).unwrap()
}

fn read(f: &Fixture, of: usize, disk: &File, clusters: &[u32]) {
    for cluster in clusters {
        let at = u64::from(*cluster) * CLUSTER + 8192;
        let mut seen = [0; 4096];
        disk.read_exact_at(&mut seen, at).unwrap();
        assert!(seen[..] == f.expected(of, at, 4096), "cluster {cluster}");
    }
}

fn status(f: &Fixture, name: &str) -> u64 {
    let text = fs::read_to_string(f.mnt().join(".knibfs/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name}: {text}")).parse().unwrap()
}

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !there() {
        assert!(Instant::now() < limit, "{what}: not within a minute");
        std::thread::yield_now();
    }
}

fn trace(f: &Fixture) -> Option<Vec<u32>> {
    f.store.boot_trace(&f.vm.name, f.vm.volumes[0].id).map(|trace| trace.parts.0)
}

fn keep(f: &Fixture, parts: Vec<u32>) {
    let trace = BootTrace { volume: f.vm.volumes[0].id, part_bits: 16, parts: Parts(parts) };
    f.store.keep_boot_trace(&f.vm.name, &trace).unwrap();
}

#[test]
fn what_a_boot_reads_is_noted_and_decoded_before_it_is_asked_for_at_the_next_from_any_backup() {
    let f = fixture();
    let order = boot_order();
    {
        let _mount = f.mount(&[]);
        read(&f, 0, &open(&f, 0), &order);
        wait_until("the trace", || trace(&f).is_some());
    }
    assert_eq!(trace(&f).unwrap(), order);
    let _mount = f.mount(&[]);
    let disk = open(&f, 1);
    assert_eq!(status(&f, "knibfs_mount_cache_bytes"), 0, "opening alone brings nothing in");
    read(&f, 1, &disk, &order[..3]);
    // The third read showed that it is a boot. Each cluster that is asked for and not there counts once, whoever asks.
    let misses = order.len() as u64;
    wait_until("what is ahead", || status(&f, "knibfs_mount_cache_misses_total") >= misses);
    read(&f, 1, &disk, &order[3..]);
    assert_eq!(status(&f, "knibfs_mount_cache_misses_total"), misses, "all was there already");
}

#[test]
fn copying_a_disk_or_looking_at_it_leaves_no_trace() {
    let f = fixture();
    let _mount = f.mount(&[]);
    assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize));
    read(&f, 1, &open(&f, 1), &[0, 610, 1]);
    wait_until("closing", || status(&f, "knibfs_mount_open_files") == 0);
    assert_eq!(trace(&f), None);
}

#[test]
fn a_trace_that_names_what_is_not_there_or_is_damaged_changes_no_byte() {
    let f = fixture();
    let mut image = fs::read(f.stored(0)).unwrap();
    image[CLUSTER as usize + 10] ^= 1; // cluster 0, compressed
    fs::write(f.stored(0), &image).unwrap();
    keep(&f, vec![5, u32::MAX, 0, 7, 0, 639, 640, 100_000, 9, 610, 5, 11]);
    let _mount = f.mount(&[]);
    let disk = open(&f, 0);
    read(&f, 0, &disk, &[5, 7, 9]);
    wait_until("what is ahead", || status(&f, "knibfs_mount_cache_bytes") >= 2 * CLUSTER);
    read(&f, 0, &disk, &[610, 11, 639]);
    assert!(disk.read_exact_at(&mut [0; 4096], 0).is_err());
    read(&f, 0, &disk, &boot_order()[1..]);
}
