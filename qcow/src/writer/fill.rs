//! Data written into an image that is there already, or that has options which are not written in one pass. Workers read
//! and compress; one at a time writes, in guest order.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::codec::Compressor;
use crate::rw::{ImageMut, compress_cluster};
use crate::writer::pipeline::{self, COPY_BYTES, JOB_BYTES, Jobs};
use crate::writer::raw::is_zero;
use crate::writer::{Control, Run, Source};
use crate::{Compression, Error, Format, Gate, PageBuf, Result, Storage};

/// An image that is written in place.
pub enum Sink {
    /// A raw file or block device.
    Raw(Arc<dyn Storage>),
    /// A qcow2 image, and how clusters are compressed.
    Qcow2(Box<ImageMut>, Option<Compression>),
}

/// What is known of the image before.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    /// It reads as zeros.
    pub zeros: bool,
    /// It stands on another image, and what the source leaves out shows from there.
    pub backed: bool,
    /// So many zeros in a row, in bytes, are left out; 0 writes all of them.
    pub sparse: u64,
}

/// What becomes of a part of a run, and where the job has its bytes.
enum Part {
    Zeros(Range<u64>),
    Plain(Range<u64>, Range<usize>),
    /// One cluster, compressed.
    Stored(Range<u64>, Range<usize>),
}

/// A run that is ready to be written.
struct Made {
    run: Run,
    parts: Vec<Part>,
    guest: PageBuf,
    stored: Vec<u8>,
}

impl Sink {
    /// Over an image that is open for writing; what its header names is opened through `gate`. Of `compression` the level
    /// counts: the codec is the image's.
    pub fn new(
        file: Arc<dyn Storage>,
        format: Format,
        compression: Option<Compression>,
        gate: &dyn Gate,
    ) -> Result<Self> {
        match format {
            Format::Raw => Ok(Sink::Raw(file)),
            Format::Qcow2 => {
                let image = ImageMut::open(file, gate)?;
                let compression = compression.map(|c| Compression { kind: image.header().compression, ..c });
                Ok(Sink::Qcow2(Box::new(image), compression))
            }
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> Result<u64> {
        match self {
            Sink::Raw(file) => file.len().map_err(|e| Error::io(file.path(), "asking for the length", e)),
            Sink::Qcow2(image, _) => Ok(image.size()),
        }
    }

    /// Size of the image's clusters in bytes, if it has such: a source's runs should begin at multiples of it.
    pub fn cluster_size(&self) -> Option<u64> {
        match self {
            Sink::Raw(_) => None,
            Sink::Qcow2(image, _) => Some(image.header().cluster_size()),
        }
    }

    /// Writes `size` bytes of `source`. Durable on return.
    pub fn fill<S: Source>(
        &mut self,
        source: &S,
        size: u64,
        before: Before,
        control: &Control<'_>,
    ) -> Result<()> {
        let compression = match self {
            Sink::Qcow2(_, compression) => *compression,
            Sink::Raw(_) => None,
        };
        let block = self.cluster_size().unwrap_or_else(|| before.sparse.clamp(512, JOB_BYTES));
        let block = block.next_power_of_two();
        let path = self.path().to_owned();
        let disk = self.size()?;
        let maker = Maker { source, disk, before, block, path: &path, spare: Mutex::default() };
        let bytes = if compression.is_some() { JOB_BYTES } else { COPY_BYTES };
        let mut at = 0;
        pipeline::run(
            &Until { source, size },
            Jobs { cluster: block, bytes },
            control,
            || {
                let compressor = compression.map(Compressor::new).transpose();
                compressor.map_err(|why| Error::unsupported(&path, format!("cannot compress: {why}")))
            },
            |compressor, run| maker.make(compressor.as_mut(), run),
            |made| {
                if !before.backed {
                    self.leave_out(at, made.run.start, before)?;
                }
                at = made.run.start + made.run.len;
                self.put(&made, before, compression)?;
                maker.recycle(made);
                Ok(())
            },
        )?;
        if !before.backed {
            self.leave_out(at, size, before)?;
        }
        (control.progress)(size);
        match self {
            Sink::Raw(file) => file.sync().map_err(|e| Error::io(file.path(), "syncing", e)),
            Sink::Qcow2(image, _) => image.flush(),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Sink::Raw(file) => file.path(),
            Sink::Qcow2(image, _) => image.path(),
        }
    }

    fn put(&mut self, made: &Made, before: Before, compression: Option<Compression>) -> Result<()> {
        for part in &made.parts {
            match part {
                Part::Zeros(range) => {
                    if made.run.zero || before.backed || !before.zeros {
                        self.clear(range.start, range.end - range.start)?;
                    }
                }
                Part::Plain(range, bytes) => {
                    self.write(made.guest.get(bytes.clone()).unwrap_or_default(), range.start)?;
                }
                Part::Stored(range, bytes) => {
                    let (Sink::Qcow2(image, _), Some(how)) = (&mut *self, compression) else { continue };
                    let stored = made.stored.get(bytes.clone()).unwrap_or_default();
                    image.write_stored(how.kind, stored, range.start, range.end - range.start)?;
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        match self {
            Sink::Raw(file) => file
                .write_at(bytes, offset)
                .map_err(|e| Error::io(file.path(), format!("writing {} bytes at {offset}", bytes.len()), e)),
            Sink::Qcow2(image, _) => image.write_at(bytes, offset),
        }
    }

    fn clear(&mut self, offset: u64, len: u64) -> Result<()> {
        match self {
            _ if len == 0 => Ok(()),
            Sink::Raw(file) => file
                .punch(offset, len)
                .map_err(|e| Error::io(file.path(), format!("clearing {len} bytes at {offset}"), e)),
            Sink::Qcow2(image, _) => image.write_zeroes(offset, len),
        }
    }

    /// A range that the source has nothing in.
    fn leave_out(&mut self, start: u64, end: u64, before: Before) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        if before.sparse > 0 {
            return if before.zeros { Ok(()) } else { self.clear(start, end - start) };
        }
        let zeros = vec![0u8; JOB_BYTES as usize];
        let mut at = start;
        while at < end {
            let n = ((at / JOB_BYTES + 1) * JOB_BYTES).min(end) - at;
            self.write(zeros.get(..n as usize).unwrap_or(&zeros), at)?;
            at += n;
        }
        Ok(())
    }
}

/// What workers do.
struct Maker<'a, S> {
    source: &'a S,
    /// Size of the disk that is written.
    disk: u64,
    before: Before,
    block: u64,
    path: &'a Path,
    /// Buffers of jobs that are done with.
    spare: Mutex<Vec<(PageBuf, Vec<u8>)>>,
}

impl<S: Source> Maker<'_, S> {
    fn make(&self, mut compressor: Option<&mut Compressor>, run: Run) -> Result<Made> {
        let (mut guest, mut stored) = self.spare.lock().pop().unwrap_or_default();
        let mut parts = Vec::new();
        let end = run.start + run.len;
        if run.zero {
            parts.push(Part::Zeros(run.start..end));
            return Ok(Made { run, parts, guest, stored });
        }
        guest.set_len(run.len as usize);
        stored.clear();
        self.source.read(run.start, &mut guest)?;
        let mut at = run.start;
        while at < end {
            // Blocks begin at multiples of their size, wherever the run does.
            let stop = end.min((at / self.block + 1) * self.block);
            let bytes = (at - run.start) as usize..(stop - run.start) as usize;
            let block = guest.get(bytes.clone()).unwrap_or_default();
            let whole = at.is_multiple_of(self.block) && (stop - at == self.block || stop == self.disk);
            let from = stored.len();
            let part = if self.before.sparse > 0 && is_zero(block) {
                Part::Zeros(at..stop)
            } else if let (Some(compressor), true) = (&mut compressor, whole)
                && compress_cluster(compressor, block, self.block, &mut stored)
                    .map_err(|why| Error::unsupported(self.path, why))?
            {
                Part::Stored(at..stop, from..stored.len())
            } else {
                Part::Plain(at..stop, bytes)
            };
            match (parts.last_mut(), part) {
                (Some(Part::Zeros(last)), Part::Zeros(next)) => last.end = next.end,
                (Some(Part::Plain(last, data)), Part::Plain(next, more)) => {
                    last.end = next.end;
                    data.end = more.end;
                }
                (_, part) => parts.push(part),
            }
            at = stop;
        }
        Ok(Made { run, parts, guest, stored })
    }

    fn recycle(&self, made: Made) {
        self.spare.lock().push((made.guest, made.stored));
    }
}

/// The beginning of a source.
struct Until<'a, S> {
    source: &'a S,
    size: u64,
}

impl<S: Source> Source for Until<'_, S> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        if from >= self.size {
            return Ok(None);
        }
        let run = self.source.next(from)?.filter(|run| run.start < self.size);
        Ok(run.map(|run| Run { len: run.len.min(self.size - run.start), ..run }))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.source.read(offset, buf)
    }
}
