//! Where clusters go: data from cluster 1 on in guest order, each L2 table after its clusters, then L1 and refcounts;
//! the header is written last, so that a file cut short is no image.
//! Memory: one L2 table, two bytes a host cluster for refcounts, one write of [`WRITE_BYTES`].

use std::sync::Arc;

use crate::codec::Compressor;
use crate::entry::{COPIED, L2};
use crate::header::{EXT_BACKING_FORMAT, MAGIC, incompatible};
use crate::writer::raw::is_zero;
use crate::writer::{Control, NewImage, Observer, Place, Run, Source, Written, pipeline};
use crate::{CompressionType, Error, Result, Storage};

/// Clusters are gathered into writes of about so many bytes.
const WRITE_BYTES: usize = 4 << 20;

enum Kind {
    Zero,
    Plain(usize),
    Compressed(usize),
}

struct Made<D> {
    clusters: Vec<(u64, Kind, D)>,
    bytes: Vec<u8>,
}

struct Worker {
    compressor: Option<Compressor>,
    guest: Vec<u8>,
}

/// Writes a new image into an empty file: every cluster of `source` that `observer` keeps. It is durable when this
/// returns. `NewImage` out of range, I/O errors and the source's errors end it; the file is then to be removed.
pub fn write_image<S: Source, O: Observer>(
    dest: Arc<dyn Storage>,
    new: &NewImage,
    source: &S,
    observer: &O,
    control: &Control,
) -> Result<Written> {
    let mut layout = Layout::new(&*dest, new)?;
    let cluster = layout.cluster;
    let path = dest.path();
    let new_worker = || {
        let compressor = new.compression.map(Compressor::new).transpose();
        let compressor =
            compressor.map_err(|why| Error::unsupported(path, format!("cannot compress: {why}")))?;
        Ok(Worker { compressor, guest: Vec::new() })
    };
    let backed = new.backing.is_some();
    let make = |worker: &mut Worker, run: Run| {
        let first = run.start / cluster;
        let count = run.len.div_ceil(cluster);
        let mut made = Made { clusters: Vec::new(), bytes: Vec::new() };
        if run.zero && !backed {
            return Ok(made);
        }
        let whole = if run.zero { cluster } else { count * cluster };
        worker.guest.resize(whole as usize, 0);
        if run.zero {
            worker.guest.fill(0);
        } else {
            let (data, tail) = worker.guest.split_at_mut(run.len as usize);
            source.read(run.start, data)?;
            tail.fill(0);
        }
        for i in 0..count {
            let at = if run.zero { 0 } else { (i * cluster) as usize };
            let guest = &worker.guest[at..at + cluster as usize];
            let index = first + i;
            if !observer.keep(index, guest) {
                continue;
            }
            if run.zero || is_zero(guest) {
                if backed {
                    made.clusters.push((index, Kind::Zero, observer.digest(index, guest, &[])));
                }
                continue;
            }
            let from = made.bytes.len();
            let shorter = match &mut worker.compressor {
                Some(c) => c.compress(guest, &mut made.bytes).map_err(|why| Error::unsupported(path, why))?,
                None => None,
            };
            let kind = match shorter {
                Some(len) => Kind::Compressed(len),
                None => {
                    made.bytes.extend_from_slice(guest);
                    Kind::Plain(guest.len())
                }
            };
            let digest = observer.digest(index, guest, &made.bytes[from..]);
            made.clusters.push((index, kind, digest));
        }
        Ok(made)
    };
    pipeline::run(source, cluster, control, new_worker, make, |made| layout.add(made, observer))?;
    layout.finish(new, observer)
}

struct Layout<'a> {
    dest: &'a dyn Storage,
    cluster: u64,
    cluster_bits: u32,
    l1: Vec<u64>,
    l2: Option<(usize, Vec<u64>)>,
    refcounts: Vec<u16>,
    /// Next free byte of the file; what lies before it and is not on disk yet is in `pending`.
    at: u64,
    pending: Vec<u8>,
    written: Written,
}

impl<'a> Layout<'a> {
    fn new(dest: &'a dyn Storage, new: &NewImage) -> Result<Self> {
        if !(9..=21).contains(&new.cluster_bits) {
            return Err(Error::unsupported(dest.path(), "clusters must be of 512 B to 2 MiB"));
        }
        let cluster = 1u64 << new.cluster_bits;
        let l1 = new.size.div_ceil(cluster).div_ceil(cluster / 8);
        if l1 * 8 > 32 << 20 {
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
            refcounts: vec![1],
            at: cluster,
            pending: Vec::with_capacity(WRITE_BYTES + (2 << 20)),
            written: Written::default(),
        })
    }

    fn add<O: Observer>(&mut self, made: Made<O::Digest>, observer: &O) -> Result<()> {
        let mut bytes = made.bytes.as_slice();
        for (index, kind, digest) in made.clusters {
            let table = (index / (self.cluster / 8)) as usize;
            if self.l2.as_ref().is_none_or(|(t, _)| *t != table) {
                self.flush_l2(observer)?;
                self.l2 = Some((table, vec![0; (self.cluster / 8) as usize]));
            }
            let (place, entry) = match kind {
                Kind::Zero => {
                    self.written.zero_clusters += 1;
                    (Place::Zero, 1)
                }
                Kind::Plain(len) => {
                    self.align();
                    let offset = self.append(&mut bytes, len);
                    (Place::Data { offset, len: len as u64 }, offset | COPIED)
                }
                Kind::Compressed(len) => {
                    let offset = self.append(&mut bytes, len);
                    let len = len as u64;
                    (Place::Compressed { offset, len }, L2::compressed(offset, len, self.cluster_bits))
                }
            };
            if !matches!(place, Place::Zero) {
                self.written.clusters += 1;
            }
            if let Some((_, entries)) = &mut self.l2
                && let Some(e) = entries.get_mut((index % (self.cluster / 8)) as usize)
            {
                *e = entry;
            }
            observer.stored(index, place, digest)?;
            if self.pending.len() >= WRITE_BYTES {
                self.write_pending()?;
            }
        }
        Ok(())
    }

    /// Appends `len` bytes of `bytes` and counts the host clusters that they touch.
    fn append(&mut self, bytes: &mut &[u8], len: usize) -> u64 {
        let offset = self.at;
        let (now, rest) = bytes.split_at(len.min(bytes.len()));
        *bytes = rest;
        self.pending.extend_from_slice(now);
        self.at += len as u64;
        self.count(offset, len as u64);
        offset
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

    fn align(&mut self) {
        let pad = (self.at.next_multiple_of(self.cluster) - self.at) as usize;
        self.pending.resize(self.pending.len() + pad, 0);
        self.at += pad as u64;
    }

    fn write_pending(&mut self) -> Result<()> {
        if !self.pending.is_empty() {
            let offset = self.at - self.pending.len() as u64;
            self.write(offset, &self.pending)?;
            self.pending.clear();
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let doing = || format!("writing {} bytes at {offset}", bytes.len());
        self.dest.write_at(bytes, offset).map_err(|e| Error::io(self.dest.path(), doing(), e))
    }

    /// Appends metadata at a cluster of its own.
    fn append_metadata<O: Observer>(&mut self, bytes: &[u8], observer: &O) -> Result<u64> {
        self.align();
        let offset = self.at;
        self.pending.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        self.count(offset, bytes.len() as u64);
        observer.metadata(offset, bytes)?;
        self.align();
        Ok(offset)
    }

    fn flush_l2<O: Observer>(&mut self, observer: &O) -> Result<()> {
        if let Some((table, entries)) = self.l2.take() {
            let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            let offset = self.append_metadata(&bytes, observer)?;
            if let Some(e) = self.l1.get_mut(table) {
                *e = offset | COPIED;
            }
        }
        Ok(())
    }

    fn finish<O: Observer>(mut self, new: &NewImage, observer: &O) -> Result<Written> {
        self.flush_l2(observer)?;
        self.align();
        let l1_bytes: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let l1_offset =
            if l1_bytes.is_empty() { self.cluster } else { self.append_metadata(&l1_bytes, observer)? };
        // Refcounts count themselves: find the number of blocks and table clusters that covers all.
        let before = self.at / self.cluster;
        let (per_block, per_table) = (self.cluster / 2, self.cluster / 8);
        let (mut blocks, mut tables) = (1, 1);
        loop {
            let total = before + blocks + tables;
            let need = (total.div_ceil(per_block), total.div_ceil(per_block).div_ceil(per_table));
            if need == (blocks, tables) {
                break;
            }
            (blocks, tables) = (need.0.max(blocks), need.1.max(tables));
            if total.div_ceil(per_block) <= blocks && blocks.div_ceil(per_table) <= tables {
                break;
            }
        }
        let total = before + blocks + tables;
        self.refcounts.resize(before as usize, 0);
        self.refcounts.resize(total as usize, 1);
        self.refcounts.resize((blocks * per_block) as usize, 0);
        let first_block = self.at;
        let bytes: Vec<u8> = self.refcounts.iter().flat_map(|r| r.to_be_bytes()).collect();
        self.refcounts = Vec::new();
        for block in bytes.chunks(self.cluster as usize) {
            self.put_table(block, observer)?;
        }
        let mut table = vec![0u8; (tables * self.cluster) as usize];
        for (i, slot) in table.as_chunks_mut::<8>().0.iter_mut().take(blocks as usize).enumerate() {
            *slot = (first_block + i as u64 * self.cluster).to_be_bytes();
        }
        let table_offset = self.at;
        self.put_table(&table, observer)?;
        self.write_pending()?;
        let header = header(new, l1_offset, self.l1.len() as u32, table_offset, tables as u32, self.dest)?;
        let mut zero = vec![0u8; self.cluster as usize];
        zero[..header.len()].copy_from_slice(&header);
        // All else must be there before the header says so.
        let sync = |e| Error::io(self.dest.path(), "syncing", e);
        self.dest.sync().map_err(sync)?;
        self.write(0, &zero)?;
        observer.metadata(0, &zero)?;
        self.dest.sync().map_err(sync)?;
        Ok(Written { file_len: self.at, ..self.written })
    }

    fn put_table<O: Observer>(&mut self, bytes: &[u8], observer: &O) -> Result<()> {
        observer.metadata(self.at, bytes)?;
        self.pending.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        if self.pending.len() >= WRITE_BYTES {
            self.write_pending()?;
        }
        Ok(())
    }
}

/// The bytes of a version 3 header with its extensions and the backing file's name.
pub(crate) fn header(
    new: &NewImage,
    l1_offset: u64,
    l1_size: u32,
    table_offset: u64,
    table_clusters: u32,
    dest: &dyn Storage,
) -> Result<Vec<u8>> {
    let zstd = new.compression.is_some_and(|c| c.kind == CompressionType::Zstd);
    let mut h = Vec::with_capacity(1024);
    let put32 = |h: &mut Vec<u8>, v: u32| h.extend_from_slice(&v.to_be_bytes());
    let put64 = |h: &mut Vec<u8>, v: u64| h.extend_from_slice(&v.to_be_bytes());
    put32(&mut h, MAGIC);
    put32(&mut h, 3);
    put64(&mut h, 0);
    put32(&mut h, 0);
    put32(&mut h, new.cluster_bits);
    put64(&mut h, new.size);
    put32(&mut h, 0);
    put32(&mut h, l1_size);
    put64(&mut h, l1_offset);
    put64(&mut h, table_offset);
    put32(&mut h, table_clusters);
    put32(&mut h, 0);
    put64(&mut h, 0);
    put64(&mut h, if zstd { incompatible::COMPRESSION } else { 0 });
    put64(&mut h, 0);
    put64(&mut h, 0);
    put32(&mut h, 4);
    put32(&mut h, 112);
    h.extend_from_slice(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    if let Some((_, format)) = &new.backing {
        let name = format.name().as_bytes();
        put32(&mut h, EXT_BACKING_FORMAT);
        put32(&mut h, name.len() as u32);
        h.extend_from_slice(name);
        h.resize(h.len().next_multiple_of(8), 0);
    }
    put64(&mut h, 0);
    if let Some((name, _)) = &new.backing {
        let (offset, len) = (h.len() as u64, name.len() as u32);
        if len > 1023 || name.contains('\0') {
            return Err(Error::unsupported(
                dest.path(),
                "the backing file's name is longer than 1023 bytes or holds a NUL byte",
            ));
        }
        h[8..16].copy_from_slice(&offset.to_be_bytes());
        h[16..20].copy_from_slice(&len.to_be_bytes());
        h.extend_from_slice(name.as_bytes());
    }
    if h.len() as u64 > 1 << new.cluster_bits {
        return Err(Error::unsupported(
            dest.path(),
            "the backing file's name does not fit the first cluster: take larger clusters",
        ));
    }
    Ok(h)
}
