//! Data written into an image that is there already, or that has options which are not written in one pass.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use knib_qcow::codec::Compressor;
use knib_qcow::{
    Compression, Control, Error, FileStorage, Format, ImageMut, LockedPaths, Result, Source, Storage as _,
};

/// Guest bytes that are read at once.
const STEP: u64 = 2 << 20;

/// An image that is written.
pub enum Sink {
    /// A raw file or block device.
    Raw(Arc<FileStorage>),
    /// A qcow2 image, and how clusters are compressed.
    Qcow2(Box<ImageMut>, Option<Box<Compressor>>),
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

impl Sink {
    /// Over an image that is open for writing.
    pub fn new(file: Arc<FileStorage>, format: Format, compression: Option<Compression>) -> Result<Self> {
        match format {
            Format::Raw => Ok(Sink::Raw(file)),
            Format::Qcow2 => {
                let path = file.path().to_owned();
                let image = ImageMut::open(file, &LockedPaths)?;
                let compressor = compression
                    .map(|c| Compressor::new(Compression { kind: image.header().compression, ..c }))
                    .transpose()
                    .map_err(|why| Error::unsupported(&path, why))?;
                Ok(Sink::Qcow2(Box::new(image), compressor.map(Box::new)))
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

    fn block(&self, sparse: u64) -> u64 {
        match self {
            Sink::Raw(_) => sparse.clamp(512, STEP).next_power_of_two(),
            Sink::Qcow2(image, _) => image.header().cluster_size(),
        }
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        match self {
            Sink::Raw(file) => file
                .write_at(bytes, offset)
                .map_err(|e| Error::io(file.path(), format!("writing {} bytes at {offset}", bytes.len()), e)),
            Sink::Qcow2(image, None) => image.write_at(bytes, offset),
            Sink::Qcow2(image, Some(compressor)) => {
                let (cluster, size) = (image.header().cluster_size(), image.size());
                for (at, part) in (offset..).step_by(cluster as usize).zip(bytes.chunks(cluster as usize)) {
                    let end = at + part.len() as u64;
                    if part.len() as u64 == cluster || end == size {
                        image.write_compressed(compressor, part, at)?;
                    } else {
                        image.write_at(part, at)?;
                    }
                }
                Ok(())
            }
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

    /// Writes `size` bytes of `source`. Durable on return.
    pub fn fill<S: Source>(
        &mut self,
        source: &S,
        size: u64,
        before: Before,
        control: &Control<'_>,
    ) -> Result<()> {
        let block = self.block(before.sparse);
        let begun = Instant::now();
        let (mut at, mut moved) = (0, 0u64);
        let mut buf = Vec::new();
        while at < size {
            let run = source.next(at)?;
            let start = run.map_or(size, |r| r.start.min(size));
            if !before.backed {
                self.leave_out(at, start, before)?;
            }
            at = start;
            let Some(run) = run else { break };
            let end = (run.start + run.len).min(size);
            if run.zero {
                self.clear(at, end - at)?;
                at = end;
            }
            while at < end {
                if control.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                // Up to a multiple of the step, so that blocks begin at multiples of their size.
                let n = ((at / STEP + 1) * STEP).min(end) - at;
                buf.resize(n as usize, 0);
                source.read(at, &mut buf)?;
                self.put(&buf, at, block, before)?;
                at += n;
                moved += n;
                pace(control, begun, moved)?;
                (control.progress)(at);
            }
        }
        (control.progress)(size);
        match self {
            Sink::Raw(file) => file.sync().map_err(|e| Error::io(file.path(), "syncing", e)),
            Sink::Qcow2(image, _) => image.flush(),
        }
    }

    /// A range that the source has nothing in.
    fn leave_out(&mut self, start: u64, end: u64, before: Before) -> Result<()> {
        if before.sparse > 0 {
            return if before.zeros { Ok(()) } else { self.clear(start, end - start) };
        }
        let zeros = vec![0u8; STEP as usize];
        let mut at = start;
        while at < end {
            let n = ((at / STEP + 1) * STEP).min(end) - at;
            self.write(zeros.get(..n as usize).unwrap_or(&zeros), at)?;
            at += n;
        }
        Ok(())
    }

    /// Data, of which blocks of zeros are left out.
    fn put(&mut self, bytes: &[u8], offset: u64, block: u64, before: Before) -> Result<()> {
        if before.sparse == 0 {
            return self.write(bytes, offset);
        }
        let mut from = 0;
        while from < bytes.len() {
            let stop =
                |at: usize| bytes.len().min((((offset + at as u64) / block + 1) * block - offset) as usize);
            let is_zero = |at: usize| bytes.get(at..stop(at)).is_some_and(|b| b.iter().all(|b| *b == 0));
            let zero = is_zero(from);
            let mut to = stop(from);
            while to < bytes.len() && is_zero(to) == zero {
                to = stop(to);
            }
            let part = bytes.get(from..to).unwrap_or(&[]);
            if !zero {
                self.write(part, offset + from as u64)?;
            } else if before.backed || !before.zeros {
                self.clear(offset + from as u64, part.len() as u64)?;
            }
            from = to;
        }
        Ok(())
    }
}

/// Waits until `done` bytes fit the rate.
fn pace(control: &Control<'_>, begun: Instant, done: u64) -> Result<()> {
    let Some(rate) = control.rate_limit.filter(|r| *r > 0) else { return Ok(()) };
    #[allow(clippy::cast_precision_loss)] // a time to wait
    let due = Duration::from_secs_f64(done as f64 / rate as f64);
    while let Some(left) = due.checked_sub(begun.elapsed()) {
        if control.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
    Ok(())
}
