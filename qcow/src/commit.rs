//! What overlays hold goes into their base.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::chain::ExtentKind;
use crate::rw::ImageMut;
use crate::{
    Access, Chain, Control, Error, FileStorage, Format, LockedPaths, Locking, PlainPaths, Result, Storage,
};

/// Guest bytes that are copied at once.
const STEP: u64 = 1 << 20;

/// Writes everything that the overlay holds (and the images between it and `base`) into `base`: a raw file, a block
/// device or a qcow2 image, which is grown when it is smaller. Zeros become zeros without space. The overlay stays as
/// it is, so that a commit that was cut or cancelled can be repeated. Durable on return. QEMU's locks are held meanwhile:
/// a writer's on the base, a reader's on all else.
pub fn commit(overlay: &Path, base: &Path, base_format: Format, control: &Control) -> Result<()> {
    let chain = Chain::open(overlay, Format::Qcow2, &PlainPaths)?;
    let storage = FileStorage::open(base, Access::ReadWrite)?;
    let (layers, _locks) = layers_above(&chain, &*storage, overlay)?;
    let mut target = match base_format {
        Format::Raw => Target::Raw(storage),
        Format::Qcow2 => Target::Qcow2(Box::new(ImageMut::open(storage, &LockedPaths)?)),
    };
    target.grow(chain.size())?;
    let copied = copy(&chain, layers, &mut target, control);
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
    let (size, begun) = (chain.size(), Instant::now());
    let (mut at, mut copied) = (0, 0u64);
    let mut buf = Vec::new();
    while at < size {
        if control.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let extent = chain.top_extent_at(layers, at)?;
        match extent.kind {
            ExtentKind::Absent => at += extent.len,
            ExtentKind::Zero { .. } => {
                target.write_zeroes(at, extent.len)?;
                at += extent.len;
            }
            ExtentKind::Data { .. } | ExtentKind::Compressed { .. } => {
                // Neighbouring extents are gathered, so that compressed clusters do not become small writes.
                let mut len = extent.len;
                while len < STEP && at + len < size {
                    let next = chain.top_extent_at(layers, at + len)?;
                    if !matches!(next.kind, ExtentKind::Data { .. } | ExtentKind::Compressed { .. }) {
                        break;
                    }
                    len += next.len;
                }
                len = len.min(STEP);
                buf.resize(len as usize, 0);
                chain.read_at(&mut buf, at)?;
                target.write_at(&buf, at)?;
                at += len;
                copied += len;
                control.pace(begun, copied)?;
            }
        }
        (control.progress)(at.min(size));
    }
    Ok(())
}

enum Target {
    Raw(Arc<FileStorage>),
    Qcow2(Box<ImageMut>),
}

impl Target {
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
