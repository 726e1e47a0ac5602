//! `cargo bench -p knib-qcow --bench chain`: random reads of 4 KiB through a chain of 64 images, beside those of one image with the
//! same content, tables and data in memory. Every 64th cluster lies in the same image of the chain.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Instant;

use knib_qcow::{Access, Chain, CreateOptions, FileStorage, Format, ImageMut, PlainPaths, create_with};

const DEPTH: u64 = 64;
const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 256 << 20;
const PIECE: u64 = 4096;
const READS: u64 = 200_000;
const RUNS: usize = 5;

fn bytes_of(cluster: u64) -> Vec<u8> {
    (0..CLUSTER / 8).flat_map(|n| (n ^ (cluster << 20)).to_le_bytes()).collect()
}

/// An image with the clusters that are asked for, on another one.
fn image(path: &Path, backing: Option<String>, wanted: impl Fn(u64) -> bool) {
    let options = CreateOptions {
        size: SIZE,
        backing: backing.map(|name| (name, Format::Qcow2)),
        ..CreateOptions::default()
    };
    create_with(FileStorage::create_new(path).unwrap(), &options).unwrap();
    let storage = FileStorage::open(path, Access::ReadWrite).unwrap();
    let mut image = ImageMut::open(storage, &PlainPaths).unwrap();
    for cluster in (0..SIZE / CLUSTER).filter(|c| wanted(*c)) {
        image.write_at(&bytes_of(cluster), cluster * CLUSTER).unwrap();
    }
    image.flush().unwrap();
}

/// Reads a second, at places that are the same for all.
fn rate(chain: &Chain) -> f64 {
    let mut buf = vec![0; PIECE as usize];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let begun = Instant::now();
    for _ in 0..READS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chain.read_at(&mut buf, state % (SIZE / PIECE) * PIECE).unwrap();
    }
    READS as f64 / begun.elapsed().as_secs_f64()
}

fn main() {
    // `cargo test --benches` only asks whether it runs.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    image(&at("flat"), None, |_| true);
    for layer in 0..DEPTH {
        let below = layer.checked_sub(1).map(|n| n.to_string());
        image(&at(&layer.to_string()), below, |cluster| cluster % DEPTH == layer);
    }
    let open = |name: &str| Chain::open(&at(name), Format::Qcow2, &PlainPaths).unwrap();
    let (flat, deep) = (open("flat"), open(&(DEPTH - 1).to_string()));
    assert_eq!(deep.depth() as u64, DEPTH);
    // The content is compared, and with that everything is in memory.
    for cluster in 0..SIZE / CLUSTER {
        let (mut one, mut other) = (vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]);
        flat.read_at(&mut one, cluster * CLUSTER).unwrap();
        deep.read_at(&mut other, cluster * CLUSTER).unwrap();
        assert!(one == other && one == bytes_of(cluster), "cluster {cluster}");
    }
    let (mut flats, mut deeps) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        flats.push(rate(&flat));
        deeps.push(rate(&deep));
    }
    let median = |all: &mut Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let (one, other) = (median(&mut flats), median(&mut deeps));
    println!("{other:.0} {one:.0}");
    eprintln!(
        "chain of {DEPTH}: {other:.0} reads of 4 KiB a second, one image: {one:.0}, {:.2} of the rate",
        other / one
    );
}
