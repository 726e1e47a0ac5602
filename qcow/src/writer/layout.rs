//! Where clusters go: data from cluster 1 on, L2 tables behind their clusters (up to a mebibyte of them at once), then L1
//! and refcounts; the header is written last, so that a file cut short is no image.
//!
//! Data lies in guest order, but for plain clusters among compressed ones. A plain cluster has to begin at a host
//! cluster, and what is left before it would be lost: half a cluster each time. So it is held back until the compressed
//! ones that follow have filled a host cluster nearly to its end. It is never held back past [`SPAN`].
//!
//! Memory: a mebibyte of L2 tables, two bytes a host cluster for refcounts, [`HELD_BYTES`] of plain clusters.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::entry::{COPIED, L1_MAX, L2};
use crate::writer::clusters::{Kind, Made, Maker};
use crate::writer::head::header;
use crate::writer::write_behind::WriteBehind;
use crate::writer::{Control, NewImage, Observer, Place, Source, Written, pipeline};
use crate::{Error, Result, Storage};

/// Tables are gathered into writes of about so many bytes.
const WRITE_BYTES: usize = 1 << 20;
/// From one such part of the guest (bytes, aligned) to the next, places ascend.
pub(super) const SPAN: u64 = 16 << 20;
/// Plain clusters held back take at most so many bytes (one cluster, if that is more).
const HELD_BYTES: usize = 2 << 20;
/// So many clusters wait at most for one that is held back.
const HELD_CLUSTERS: usize = 128;

/// Writes a new image into an empty file: every cluster of `source` that `observer` keeps. It is durable when this
/// returns. `NewImage` out of range, I/O errors and the source's errors end it; the file is then to be removed.
pub fn write_image<S: Source, O: Observer>(
    dest: Arc<dyn Storage>,
    new: &NewImage,
    source: &S,
    observer: &O,
    control: &Control,
) -> Result<Written> {
    std::thread::scope(|scope| {
        let mut layout = Layout::new(&*dest, new, WriteBehind::new(scope, &dest))?;
        let maker = Maker { source, observer, new, path: dest.path(), spare: Mutex::default() };
        let bytes = if new.compression.is_some() { pipeline::JOB_BYTES } else { pipeline::COPY_BYTES };
        pipeline::run(
            source,
            pipeline::Jobs { cluster: layout.cluster, bytes },
            control,
            || maker.worker(),
            |worker, run| maker.make(worker, run),
            |mut made| {
                layout.add(&mut made, observer)?;
                maker.recycle(made);
                Ok(())
            },
        )?;
        layout.finish(new, observer)
    })
}

struct Layout<'a, D> {
    dest: &'a dyn Storage,
    cluster: u64,
    cluster_bits: u32,
    l1: Vec<u64>,
    l2: Option<(usize, Vec<u64>)>,
    /// L2 tables without a place, and their numbers.
    tables: Vec<u8>,
    table_numbers: Vec<usize>,
    refcounts: Vec<u16>,
    /// Next free byte of the file.
    at: u64,
    behind: WriteBehind<'a>,
    /// Plain clusters without a place, in guest order.
    held: Vec<u8>,
    /// The first of them and all that follow it: what has its place is told in guest order.
    waiting: VecDeque<(u64, Option<Place>, D)>,
    written: Written,
}

/// Stored bytes of a job that lie in a row, in the job and in the file.
#[derive(Default)]
struct Row {
    host: u64,
    bytes: Range<usize>,
}

impl<'a, D> Layout<'a, D> {
    fn new(dest: &'a dyn Storage, new: &NewImage, behind: WriteBehind<'a>) -> Result<Self> {
        if !(9..=21).contains(&new.cluster_bits) {
            return Err(Error::unsupported(dest.path(), "clusters must be of 512 B to 2 MiB"));
        }
        let cluster = 1u64 << new.cluster_bits;
        let l1 = new.size.div_ceil(cluster).div_ceil(cluster / 8);
        if l1 * 8 > L1_MAX {
            return Err(Error::unsupported(
                dest.path(),
                "the disk is too large for clusters of this size: take larger ones",
            ));
        }
        Ok(Self {
            dest,
            cluster,
            cluster_bits: new.cluster_bits,
            l1: vec![0; l1 as usize],
            l2: None,
            tables: Vec::new(),
            table_numbers: Vec::new(),
            refcounts: vec![1],
            at: cluster,
            behind,
            held: Vec::new(),
            waiting: VecDeque::new(),
            written: Written::default(),
        })
    }

    fn add<O: Observer<Digest = D>>(&mut self, made: &mut Made<D>, observer: &O) -> Result<()> {
        let mut row = Row::default();
        for (index, kind, digest) in made.clusters.drain(..) {
            if self.enters(index) {
                self.end_row(&made.bytes, &mut row)?;
                self.enter(index, observer)?;
            }
            let place = match kind {
                Kind::Zero => Some(Place::Zero),
                Kind::Plain(bytes) if self.held.is_empty() && self.at.is_multiple_of(self.cluster) => {
                    let len = bytes.len() as u64;
                    let offset = self.append(&made.bytes, &mut row, bytes)?;
                    Some(Place::Data { offset, len })
                }
                Kind::Plain(bytes) => {
                    self.held.extend_from_slice(made.bytes.get(bytes).unwrap_or_default());
                    None
                }
                Kind::Compressed(bytes) => {
                    let len = bytes.len() as u64;
                    let offset = self.append(&made.bytes, &mut row, bytes)?;
                    Some(Place::Compressed { offset, len })
                }
            };
            match place {
                Some(place) if self.waiting.is_empty() => self.put(index, place, digest, observer)?,
                place => self.waiting.push_back((index, place, digest)),
            }
            if self.is_time() {
                self.end_row(&made.bytes, &mut row)?;
                self.place_held(observer)?;
            }
        }
        self.end_row(&made.bytes, &mut row)
    }

    /// Writes a job's row before what comes behind it in the file.
    fn end_row(&mut self, all: &[u8], row: &mut Row) -> Result<()> {
        let row = std::mem::take(row);
        self.write(row.host, all.get(row.bytes).unwrap_or_default())
    }

    /// Whether a part of the guest or an L2 table ends before a cluster.
    fn enters(&self, index: u64) -> bool {
        let per_span = (SPAN >> self.cluster_bits).max(1);
        self.waiting.front().is_some_and(|(first, ..)| first / per_span != index / per_span)
            || self.l2.as_ref().is_none_or(|(t, _)| *t != self.table_of(index))
    }

    /// The number of the L2 table over a cluster.
    fn table_of(&self, index: u64) -> usize {
        (index / (self.cluster / 8)) as usize
    }

    /// Before a cluster where one of them ends: nothing may be held back any longer.
    fn enter<O: Observer<Digest = D>>(&mut self, index: u64, observer: &O) -> Result<()> {
        self.place_held(observer)?;
        let table = self.table_of(index);
        if self.l2.as_ref().is_none_or(|(t, _)| *t != table) {
            self.end_l2(observer)?;
            self.l2 = Some((table, vec![0; (self.cluster / 8) as usize]));
        }
        Ok(())
    }

    /// Whether plain clusters have waited long enough, or the place is as good as it gets.
    fn is_time(&self) -> bool {
        let lost = self.at.next_multiple_of(self.cluster) - self.at;
        !self.held.is_empty()
            && (lost <= self.cluster / 32
                || self.held.len() + self.cluster as usize > HELD_BYTES
                || self.waiting.len() >= HELD_CLUSTERS)
    }

    /// Gives those that were held back their places, in a row.
    fn place_held<O: Observer<Digest = D>>(&mut self, observer: &O) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.align();
        let mut held = std::mem::take(&mut self.held);
        self.write(self.at, &held)?;
        held.clear();
        self.held = held;
        let len = self.cluster;
        while let Some((index, place, digest)) = self.waiting.pop_front() {
            let place = match place {
                Some(place) => place,
                None => {
                    let offset = self.at;
                    self.at += len;
                    self.count(offset, len);
                    Place::Data { offset, len }
                }
            };
            self.put(index, place, digest, observer)?;
        }
        Ok(())
    }

    /// A cluster has its place.
    fn put<O: Observer<Digest = D>>(
        &mut self,
        index: u64,
        place: Place,
        digest: D,
        observer: &O,
    ) -> Result<()> {
        let entry = match place {
            Place::Zero => 1,
            Place::Data { offset, .. } => offset | COPIED,
            Place::Compressed { offset, len } => L2::compressed(offset, len, self.cluster_bits),
        };
        match place {
            Place::Zero => self.written.zero_clusters += 1,
            Place::Data { .. } => self.written.clusters += 1,
            Place::Compressed { .. } => {
                self.written.clusters += 1;
                self.written.compressed_clusters += 1;
            }
        }
        if let Some((_, entries)) = &mut self.l2
            && let Some(e) = entries.get_mut((index % (self.cluster / 8)) as usize)
        {
            *e = entry;
        }
        observer.stored(index, place, digest)
    }

    /// Gives bytes of a job the next place and counts the host clusters that they touch. They are written with the rest
    /// of their row.
    fn append(&mut self, all: &[u8], row: &mut Row, bytes: Range<usize>) -> Result<u64> {
        let (offset, len) = (self.at, bytes.len() as u64);
        if row.bytes.end == bytes.start && row.host + row.bytes.len() as u64 == offset {
            row.bytes.end = bytes.end;
        } else {
            self.end_row(all, row)?;
            *row = Row { host: offset, bytes };
        }
        self.at += len;
        self.count(offset, len);
        Ok(offset)
    }

    fn count(&mut self, offset: u64, len: u64) {
        let (first, last) = ((offset / self.cluster) as usize, ((offset + len - 1) / self.cluster) as usize);
        if self.refcounts.len() <= last {
            self.refcounts.resize(last + 1, 0);
        }
        for r in &mut self.refcounts[first..=last] {
            *r = r.saturating_add(1);
        }
    }

    /// Goes on at the next host cluster; what is left out is a hole of the file.
    fn align(&mut self) {
        self.at = self.at.next_multiple_of(self.cluster);
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.behind.write(bytes, offset)
    }

    /// Appends metadata at a cluster of its own.
    fn append_metadata<O: Observer>(&mut self, bytes: &[u8], observer: &O) -> Result<u64> {
        self.align();
        let offset = self.at;
        self.write(offset, bytes)?;
        self.at += bytes.len() as u64;
        self.count(offset, bytes.len() as u64);
        observer.metadata(offset, bytes)?;
        self.align();
        Ok(offset)
    }

    /// Ends an L2 table. Compressed clusters go on where they are, in the midst of a host cluster: their tables are
    /// gathered, so that one such place is lost for many tables.
    fn end_l2<O: Observer>(&mut self, observer: &O) -> Result<()> {
        if let Some((table, entries)) = self.l2.take() {
            self.tables.extend(entries.iter().flat_map(|e| e.to_be_bytes()));
            self.table_numbers.push(table);
            if self.at.is_multiple_of(self.cluster) || self.tables.len() >= WRITE_BYTES {
                self.write_tables(observer)?;
            }
        }
        Ok(())
    }

    fn write_tables<O: Observer>(&mut self, observer: &O) -> Result<()> {
        if self.tables.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.tables);
        let mut offset = self.append_metadata(&bytes, observer)?;
        for table in self.table_numbers.drain(..) {
            if let Some(e) = self.l1.get_mut(table) {
                *e = offset | COPIED;
            }
            offset += self.cluster;
        }
        Ok(())
    }

    fn finish<O: Observer<Digest = D>>(mut self, new: &NewImage, observer: &O) -> Result<Written> {
        self.place_held(observer)?;
        self.end_l2(observer)?;
        self.write_tables(observer)?;
        self.align();
        let l1_bytes: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let l1_offset =
            if l1_bytes.is_empty() { self.cluster } else { self.append_metadata(&l1_bytes, observer)? };
        let (table_offset, tables) = self.refcounts(observer)?;
        let header = header(new, l1_offset, self.l1.len() as u32, table_offset, tables as u32, self.dest)?;
        let mut zero = vec![0u8; self.cluster as usize];
        zero[..header.len()].copy_from_slice(&header);
        // All else must be there before the header says so.
        let sync = |e| Error::io(self.dest.path(), "syncing", e);
        self.behind.flush()?;
        self.dest.sync().map_err(sync)?;
        self.write(0, &zero)?;
        self.behind.flush()?;
        observer.metadata(0, &zero)?;
        self.dest.sync().map_err(sync)?;
        Ok(Written { file_len: self.at, ..self.written })
    }

    /// Writes the refcount blocks and their table; where that lies, and how many clusters it has.
    fn refcounts<O: Observer>(&mut self, observer: &O) -> Result<(u64, u64)> {
        // Refcounts count themselves: find the number of blocks and table clusters that covers all.
        let before = self.at / self.cluster;
        let (per_block, per_table) = (self.cluster / 2, self.cluster / 8);
        let (mut blocks, mut tables) = (1, 1);
        loop {
            let need = (before + blocks + tables).div_ceil(per_block).max(blocks);
            let need = (need, need.div_ceil(per_table).max(tables));
            if need == (blocks, tables) {
                break;
            }
            // More of them count more of themselves.
            (blocks, tables) = need;
        }
        let total = before + blocks + tables;
        self.refcounts.resize(before as usize, 0);
        self.refcounts.resize(total as usize, 1);
        self.refcounts.resize((blocks * per_block) as usize, 0);
        let first_block = self.at;
        let mut bytes: Vec<u8> = self.refcounts.iter().flat_map(|r| r.to_be_bytes()).collect();
        self.refcounts = Vec::new();
        for i in 0..blocks {
            bytes.extend_from_slice(&(first_block + i * self.cluster).to_be_bytes());
        }
        bytes.resize(((blocks + tables) * self.cluster) as usize, 0);
        let most = WRITE_BYTES.max(self.cluster as usize) / self.cluster as usize * self.cluster as usize;
        for part in bytes.chunks(most) {
            observer.metadata(self.at, part)?;
            self.write(self.at, part)?;
            self.at += part.len() as u64;
        }
        Ok((first_block + blocks * self.cluster, tables))
    }
}
