//! What workers do: clusters are read, compressed and digested; or taken over as they are stored.

use std::ops::Range;
use std::path::Path;

use parking_lot::Mutex;

use crate::codec::{Compressor, decompress};
use crate::writer::raw::is_zero;
use crate::writer::{NewImage, Observer, Run, Source, pipeline};
use crate::{Error, PageBuf, Result};

/// How a cluster will be stored, and where its job has the bytes.
#[derive(Clone)]
pub(super) enum Kind {
    Zero,
    Plain(Range<usize>),
    Compressed(Range<usize>),
}

/// The clusters of one job in guest order, and their stored bytes in the same order.
pub(super) struct Made<D> {
    pub(super) clusters: Vec<(u64, Kind, D)>,
    pub(super) bytes: PageBuf,
}

/// Makes clusters of a source.
pub(super) struct Maker<'a, S, O> {
    pub(super) source: &'a S,
    pub(super) observer: &'a O,
    pub(super) new: &'a NewImage,
    pub(super) path: &'a Path,
    /// Buffers of jobs that are done with: fresh memory costs more than the copy into it.
    pub(super) spare: Mutex<Vec<PageBuf>>,
}

/// What one thread keeps from job to job.
pub(super) struct Worker {
    compressor: Option<Compressor>,
    guest: PageBuf,
    taken: Vec<u8>,
}

impl<S: Source, O: Observer> Maker<'_, S, O> {
    pub(super) fn worker(&self) -> Result<Worker> {
        let compressor = self.new.compression.map(Compressor::new).transpose();
        let compressor =
            compressor.map_err(|why| Error::unsupported(self.path, format!("cannot compress: {why}")))?;
        Ok(Worker { compressor, guest: PageBuf::default(), taken: Vec::new() })
    }

    pub(super) fn make(&self, worker: &mut Worker, run: Run) -> Result<Made<O::Digest>> {
        let cluster = 1u64 << self.new.cluster_bits;
        let (first, count) = (run.start / cluster, run.len.div_ceil(cluster));
        let mut made = Made { clusters: Vec::new(), bytes: PageBuf::default() };
        if run.zero {
            self.zeros(worker, &mut made, first..first + count);
            return Ok(made);
        }
        made.bytes = self.spare.lock().pop().unwrap_or_default();
        grow(&mut made.bytes, count * cluster);
        if let Some(compressor) = &mut worker.compressor {
            grow(&mut worker.guest, count * cluster);
            // What it has learnt depends on which jobs it was given: the same disk makes the same file.
            compressor.forget();
        }
        let lens = self.take(worker, run)?;
        // Where nothing is compressed, the guest's bytes stay where they were read.
        let in_place = worker.compressor.is_none();
        let (mut used, mut taken) = (0, 0);
        let mut read_to = 0;
        for (i, len) in lens.iter().enumerate() {
            let at = i * cluster as usize;
            let index = first + i as u64;
            if let Some(len) = *len {
                let stored = worker.taken.get(taken..taken + len).unwrap_or_default();
                taken += len;
                let guest = &mut worker.guest[at..at + cluster as usize];
                let digest = match self.observer.digest_stored(index, stored) {
                    Some(digest) => digest,
                    None => {
                        self.decompress(stored, index, guest)?;
                        if !self.observer.keep(index, guest) {
                            continue;
                        }
                        self.observer.digest(index, guest, stored)
                    }
                };
                made.bytes[used..used + len].copy_from_slice(stored);
                used += len;
                made.clusters.push((index, Kind::Compressed(used - len..used), digest));
                continue;
            }
            if at >= read_to {
                // One read for those up to the next that is taken over; no more than stay in the processor's cache.
                let most = (pipeline::COPY_BYTES / cluster).max(1) as usize;
                let more = lens[i..].iter().take(most).take_while(|len| len.is_none()).count();
                let (from, to) = (at as u64, (at as u64 + more as u64 * cluster).min(run.len));
                read_to = at + more * cluster as usize;
                let buffer = if in_place { &mut made.bytes } else { &mut worker.guest };
                let (data, tail) = buffer[at..read_to].split_at_mut((to - from) as usize);
                self.source.read(run.start + from, data)?;
                tail.fill(0);
            }
            let buffer = if in_place { &made.bytes } else { &worker.guest };
            let guest = &buffer[at..at + cluster as usize];
            if !self.observer.keep(index, guest) {
                continue;
            }
            if is_zero(guest) {
                if self.new.backing.is_some() {
                    made.clusters.push((index, Kind::Zero, self.observer.digest(index, guest, &[])));
                }
                continue;
            }
            let Some(compressor) = &mut worker.compressor else {
                let digest = self.observer.digest(index, guest, guest);
                made.clusters.push((index, Kind::Plain(at..at + guest.len()), digest));
                continue;
            };
            let guest = &worker.guest[at..at + cluster as usize];
            let room = &mut made.bytes[used..used + guest.len()];
            let shorter = compressor.compress_into(guest, room);
            let kind = match shorter.map_err(|why| Error::unsupported(self.path, why))? {
                Some(len) => Kind::Compressed(used..used + len),
                None => {
                    room.copy_from_slice(guest);
                    Kind::Plain(used..used + guest.len())
                }
            };
            let (Kind::Compressed(stored) | Kind::Plain(stored)) = kind.clone() else { continue };
            let digest = self.observer.digest(index, guest, &made.bytes[stored.clone()]);
            used = stored.end;
            made.clusters.push((index, kind, digest));
        }
        Ok(made)
    }

    /// Gives back the buffer of a job that is laid out.
    pub(super) fn recycle(&self, made: Made<O::Digest>) {
        if !made.bytes.is_empty() {
            self.spare.lock().push(made.bytes);
        }
    }

    /// Zeros that hide a backing file's bytes; where there is none, they need not be said.
    fn zeros(&self, worker: &mut Worker, made: &mut Made<O::Digest>, clusters: Range<u64>) {
        if self.new.backing.is_none() {
            return;
        }
        grow(&mut worker.guest, 1 << self.new.cluster_bits);
        let guest = &mut worker.guest[..1 << self.new.cluster_bits];
        guest.fill(0);
        for index in clusters {
            if self.observer.keep(index, guest) {
                made.clusters.push((index, Kind::Zero, self.observer.digest(index, guest, &[])));
            }
        }
    }

    /// Has the source hand over what it stores as the new image would: the length of each such cluster.
    fn take(&self, worker: &mut Worker, run: Run) -> Result<Vec<Option<usize>>> {
        let cluster = 1u64 << self.new.cluster_bits;
        let count = run.len.div_ceil(cluster);
        let Some(how) = self.new.compression else { return Ok(vec![None; count as usize]) };
        worker.taken.clear();
        let mut lens = Vec::with_capacity(count as usize);
        for i in 0..count {
            let before = worker.taken.len();
            let start = run.start + i * cluster;
            let took = self.source.take_stored(start, cluster, how.kind, &mut worker.taken)?;
            let len = worker.taken.len() - before;
            let fits = took && len > 0 && (len as u64) < cluster;
            worker.taken.truncate(if fits { before + len } else { before });
            lens.push(fits.then_some(len));
        }
        Ok(lens)
    }

    fn decompress(&self, stored: &[u8], index: u64, guest: &mut [u8]) -> Result<()> {
        let kind = self.new.compression.map_or(crate::CompressionType::Deflate, |c| c.kind);
        decompress(kind, stored, guest).map_err(|why| {
            Error::damaged(self.path, format!("what was taken over as cluster {index}: {why}"))
        })
    }
}

fn grow(buffer: &mut PageBuf, len: u64) {
    if (buffer.len() as u64) < len {
        buffer.set_len(len as usize);
    }
}
