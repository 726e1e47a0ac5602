//! `cargo bench` here, with `PEERS_IMAGES=NAME=FILE.qcow2:…`: sequential reads of 1 MiB and random ones of 4 KiB by the engine
//! and by its peers, from the same files, out of the page cache, in one thread. What the libraries read is compared before
//! anything is timed. A peer that cannot open an image is left out, and it is said.
#![allow(missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use knib_qcow::{Chain, ExtentKind, Format, PageBuf, PlainPaths};
use knib_qcow_peers::{Failure, LIBRARIES, Reader};

const MIB: u64 = 1 << 20;
const PIECE: usize = 4096;
/// Sequential: at most so much of what the image holds.
const SEQUENTIAL: usize = 256;
/// Random: so many in a turn.
const READS: usize = 2000;

/// Where the image holds data: offsets of whole MiB (of the guest's disk) that begin with some.
fn data(path: &Path) -> Result<Vec<u64>, Failure> {
    let chain = Chain::open(path, Format::Qcow2, &PlainPaths)?;
    let mut found = Vec::new();
    for at in (0..chain.size() / MIB).map(|n| n * MIB) {
        if matches!(chain.extent_at(at)?.kind, ExtentKind::Data { .. } | ExtentKind::Compressed { .. }) {
            found.push(at);
        }
    }
    Ok(found)
}

/// What each reads at `offsets` is the same. With that, tables and data are in memory.
fn compare(readers: &mut [Box<dyn Reader>], buf: &mut [u8], offsets: &[u64]) -> Result<(), Failure> {
    for offset in offsets {
        let mut first: Option<Vec<u8>> = None;
        for reader in readers.iter_mut() {
            let name = reader.name();
            reader.read(buf, &[*offset], &mut |bytes| match &first {
                Some(first) => assert!(first == bytes, "{name} reads other bytes at {offset}"),
                None => first = Some(bytes.to_vec()),
            })?;
        }
    }
    Ok(())
}

fn image(criterion: &mut Criterion, name: &str, path: &Path) -> Result<(), Failure> {
    let mut readers = Vec::new();
    for (library, open) in LIBRARIES {
        match open(path) {
            Ok(reader) => readers.push(reader),
            Err(e) => eprintln!("{name}: {library} does not open it: {e}"),
        }
    }
    let places = data(path)?;
    let sequential = &places[..places.len().min(SEQUENTIAL)];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let random: Vec<u64> = (0..READS)
        .map(|_| places[next() as usize % places.len()] + next() % (MIB / PIECE as u64) * PIECE as u64)
        .collect();
    for (work, len, offsets) in [("sequential", MIB as usize, sequential), ("random", PIECE, &random)] {
        // The same memory for all: where it lies decides how fast a processor copies into it.
        let mut buf = PageBuf::default();
        buf.set_len(len);
        compare(&mut readers, &mut buf, offsets)?;
        let mut group = criterion.benchmark_group(format!("{name}, {work}"));
        group.throughput(match work {
            "random" => Throughput::Elements(offsets.len() as u64),
            _ => Throughput::Bytes((len * offsets.len()) as u64),
        });
        for reader in &mut readers {
            group.bench_function(reader.name(), |b| {
                b.iter(|| {
                    reader.read(&mut buf, offsets, &mut |bytes| {
                        black_box(bytes);
                    })
                });
            });
        }
        group.finish();
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let Ok(images) = std::env::var("PEERS_IMAGES") else {
        eprintln!(
            "PEERS_IMAGES=NAME=FILE.qcow2:… says which images to read; `scripts/bench engine` makes some"
        );
        return Ok(());
    };
    for word in images.split(':') {
        let (name, path) =
            word.split_once('=').ok_or("PEERS_IMAGES: NAME=FILE.qcow2, separated by colons")?;
        image(&mut criterion, name, Path::new(path))?;
    }
    criterion.final_summary();
    Ok(())
}
