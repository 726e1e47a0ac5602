//! What overlays hold goes into their base.

use std::path::Path;
use std::sync::{Arc, mpsc};

use parking_lot::Mutex;

use crate::chain::ExtentKind;
use crate::rw::{Content as _, ImageMut, Shown};
use crate::writer::pipeline::{self, Jobs};
use crate::{
    Access, Chain, Control, Error, FileStorage, Format, Gate, LockedPaths, Locking, PageBuf, PlainPaths,
    Result, Run, Source, Storage,
};

/// Guest bytes that are copied at once.
const STEP: u64 = 1 << 20;
/// New data is synced beside the copying whenever there are about so many bytes of it.
const SYNC_EVERY: u64 = 64 << 20;

/// Writes everything that the overlay holds (and the images between it and `base`) into `base`: a raw file, a block
/// device or a qcow2 image, which is grown when it is smaller. Zeros become zeros without space. The overlay stays as
/// it is, so that a commit that was cut or cancelled can be repeated. Durable on return. QEMU's locks are held meanwhile:
/// a writer's on the base, a reader's on all else.
pub fn commit(overlay: &Path, base: &Path, base_format: Format, control: &Control) -> Result<()> {
    let chain = Chain::open(overlay, Format::Qcow2, &PlainPaths)?;
    let storage = FileStorage::open(base, Access::ReadWrite)?;
    let (layers, _locks) = layers_above(&chain, &*storage, overlay)?;
    commit_layers(&chain, layers, storage, base_format, &LockedPaths, control)
}

/// The same with the newest `layers` of a chain, into the image below them, which is open for writing in `base`. At any
/// cut the chain shows what it showed. Locks are the caller's.
pub fn commit_layers(
    chain: &Chain,
    layers: usize,
    base: Arc<dyn Storage>,
    base_format: Format,
    gate: &dyn Gate,
    control: &Control,
) -> Result<()> {
    let mut target = match base_format {
        Format::Raw => Target::Raw(base),
        Format::Qcow2 => Target::Qcow2(Box::new(ImageMut::open(base, gate)?)),
    };
    target.grow(chain.size())?;
    let copied = copy(chain, layers, &mut target, control);
    if matches!(copied, Ok(()) | Err(Error::Cancelled)) {
        target.flush()?;
    }
    copied
}

/// How many of the chain's newest layers stand on `base`, and those layers, locked.
fn layers_above(chain: &Chain, base: &dyn Storage, overlay: &Path) -> Result<(usize, Vec<Arc<FileStorage>>)> {
    let mut locked = Vec::new();
    for (n, path) in chain.paths().iter().enumerate() {
        let same = FileStorage::open(path, Access::Read)?.identity();
        if n > 0 && same.is_some() && same == base.identity() {
            return Ok((n, locked));
        }
        locked.push(FileStorage::open_with(path, Access::Read, Locking::Reader)?);
    }
    Err(Error::refused(
        overlay,
        format!("{} is not among its backing files, so nothing is committed into it", base.path().display()),
    ))
}

fn copy(chain: &Chain, layers: usize, target: &mut Target, control: &Control) -> Result<()> {
    let data = target.data();
    let source = Top { chain, layers };
    let spare = Mutex::new(Vec::<PageBuf>::new());
    let read = |(): &mut (), run: Run| {
        // The system copies plain data by itself, when its turn comes; what is compressed is unpacked here.
        let copy = run.zero || source.is_plain(run)?;
        let mut bytes = None;
        if !copy {
            let mut buf = spare.lock().pop().unwrap_or_default();
            buf.set_len(run.len as usize);
            source.read(run.start, &mut buf)?;
            bytes = Some(buf);
        }
        Ok((run, bytes))
    };
    std::thread::scope(|scope| {
        // What lies on the device already is not waited for at the end. The order of writes stays what it is: nothing
        // points to the new data before the flush.
        let (tick, ticks) = mpsc::sync_channel::<()>(1);
        let ahead = scope.spawn(move || {
            let sync = |()| data.sync().map_err(|e| Error::io(data.path(), "syncing", e));
            ticks.into_iter().try_for_each(sync)
        });
        let mut fresh = 0;
        let copied = pipeline::run(
            &source,
            Jobs { cluster: 512, bytes: STEP },
            control,
            || Ok(()),
            read,
            |(run, bytes)| {
                if run.zero {
                    return target.write_zeroes(run.start, run.len);
                }
                match bytes {
                    Some(bytes) => {
                        target.write_at(&bytes, run.start)?;
                        spare.lock().push(bytes);
                    }
                    None => target.copy_at(chain, run.start, run.len)?,
                }
                fresh += run.len;
                // Where the last one is not through yet, it takes this along.
                if fresh >= SYNC_EVERY && tick.try_send(()).is_ok() {
                    fresh = 0;
                }
                Ok(())
            },
        );
        drop(tick);
        let synced = ahead.join().unwrap_or(Err(Error::Cancelled));
        // A sync that failed is not repeated by the next one: what it lost is lost.
        synced.and(copied)
    })
}

/// What the newest layers of a chain say, and not a byte more.
struct Top<'a> {
    chain: &'a Chain,
    layers: usize,
}

impl Top<'_> {
    /// Whether all of a run is plain data in files.
    fn is_plain(&self, run: Run) -> Result<bool> {
        let (mut at, end) = (run.start, run.start + run.len);
        while at < end {
            let extent = self.chain.top_extent_at(self.layers, at)?;
            if !matches!(extent.kind, ExtentKind::Data { .. }) {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }
}

impl Source for Top<'_> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        let size = self.chain.size();
        let mut at = from;
        while at < size {
            let extent = self.chain.top_extent_at(self.layers, at)?;
            match extent.kind {
                ExtentKind::Absent => at += extent.len,
                ExtentKind::Zero { .. } => {
                    return Ok(Some(Run { start: at, len: extent.len, zero: true }));
                }
                ExtentKind::Data { .. } | ExtentKind::Compressed { .. } => {
                    // Neighbouring extents are gathered, so that compressed clusters do not become small writes.
                    let mut len = extent.len;
                    while len < STEP && at + len < size {
                        let next = self.chain.top_extent_at(self.layers, at + len)?;
                        if !matches!(next.kind, ExtentKind::Data { .. } | ExtentKind::Compressed { .. }) {
                            break;
                        }
                        len += next.len;
                    }
                    return Ok(Some(Run { start: at, len: len.min(STEP), zero: false }));
                }
            }
        }
        Ok(None)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read_at(buf, offset)
    }
}

enum Target {
    Raw(Arc<dyn Storage>),
    Qcow2(Box<ImageMut>),
}

impl Target {
    /// The file that the guest's bytes go to.
    fn data(&self) -> Arc<dyn Storage> {
        match self {
            Target::Raw(raw) => raw.clone(),
            Target::Qcow2(image) => image.data_storage().clone(),
        }
    }

    fn grow(&mut self, size: u64) -> Result<()> {
        match self {
            Target::Raw(raw) => {
                let io = |e| Error::io(raw.path(), format!("growing to {size} bytes"), e);
                if raw.len().map_err(io)? < size { raw.set_len(size).map_err(io) } else { Ok(()) }
            }
            Target::Qcow2(image) if image.size() < size => image.grow(size),
            Target::Qcow2(_) => Ok(()),
        }
    }

    fn write_at(&mut self, buf: &[u8], offset: u64) -> Result<()> {
        match self {
            Target::Raw(raw) => raw
                .write_at(buf, offset)
                .map_err(|e| Error::io(raw.path(), format!("writing {} bytes at {offset}", buf.len()), e)),
            Target::Qcow2(image) => image.write_at(buf, offset),
        }
    }

    fn copy_at(&mut self, chain: &Chain, offset: u64, len: u64) -> Result<()> {
        match self {
            Target::Raw(raw) => Shown { chain, offset }.put(&**raw, 0..len, offset),
            Target::Qcow2(image) => image.copy_at(chain, offset, len),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        match self {
            Target::Raw(raw) => raw
                .punch(offset, len)
                .map_err(|e| Error::io(raw.path(), format!("clearing {len} bytes at {offset}"), e)),
            Target::Qcow2(image) => image.write_zeroes(offset, len),
        }
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Target::Raw(raw) => raw.sync().map_err(|e| Error::io(raw.path(), "syncing", e)),
            Target::Qcow2(image) => image.flush(),
        }
    }
}
