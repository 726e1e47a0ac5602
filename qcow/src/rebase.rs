//! Another backing file under an image that goes on to show what it showed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::chain::ExtentKind;
use crate::codec::Compressor;
use crate::create::set_backing_in;
use crate::rw::{Backing, ImageMut};
use crate::{Chain, Compression, Control, Error, Format, Gate, Implicit, Result, Storage};

/// Guest bytes that are compared at once.
const STEP: u64 = 2 << 20;

/// Gives the image in `storage` (open for writing) another backing file, or none. Where the image says nothing itself
/// and the two backing chains differ, what it showed is copied into it first, compressed if asked for; a cut leaves
/// the image on one or the other, showing the same. `name` is read as the header's would be, through `gate`.
pub fn rebase(
    storage: Arc<dyn Storage>,
    name: Option<(&str, Format)>,
    compression: Option<Compression>,
    gate: &dyn Gate,
    control: &Control,
) -> Result<()> {
    let path = storage.path().to_owned();
    let old = Chain::from_storage(storage.clone(), Format::Qcow2, gate)?;
    let new = match name {
        None => None,
        Some((name, format)) => {
            let (below, format) = gate.open(&path, Implicit::Backing, name, Some(format.name()))?;
            if below.identity().is_some() && below.identity() == storage.identity() {
                return Err(Error::refused(&path, "it cannot be its own backing file"));
            }
            Some(Chain::from_storage(below, format, gate)?)
        }
    };
    let mut image = if old.depth() > 1 {
        ImageMut::open(storage.clone(), gate)?
    } else {
        // Zeros must be said where something will lie below.
        ImageMut::open_over(storage.clone(), gate, Some(Box::new(Zeros(old.size()))))?
    };
    let compressor = compression
        .map(|c| Compressor::new(Compression { kind: image.header().compression, ..c }))
        .transpose()
        .map_err(|why| Error::unsupported(&path, why))?;
    Rebase { old: &old, new: new.as_ref(), image: &mut image, compressor, control }.run()?;
    drop(image);
    set_backing_in(&*storage, name.map(|(name, _)| name), name.map(|(_, format)| format))
}

/// What an image without backing file shows where it says nothing.
struct Zeros(u64);

impl Backing for Zeros {
    fn read(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
    fn size(&self) -> u64 {
        self.0
    }
}

struct Rebase<'a, 'c> {
    old: &'a Chain,
    new: Option<&'a Chain>,
    image: &'a mut ImageMut,
    compressor: Option<Compressor>,
    control: &'a Control<'c>,
}

impl Rebase<'_, '_> {
    fn run(mut self) -> Result<()> {
        let (size, begun) = (self.old.size(), Instant::now());
        let (mut at, mut read) = (0, 0u64);
        let (mut shown, mut below) = (Vec::new(), Vec::new());
        while at < size {
            if self.control.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let own = self.old.top_extent_at(1, at)?;
            // Without a backing file the chain itself says that nobody says anything.
            if !matches!(own.kind, ExtentKind::Absent | ExtentKind::Zero { layer: None }) {
                at += own.len;
                continue;
            }
            let len = own.len.min((at / STEP + 1) * STEP - at);
            let (len, same) = self.same(at, len)?;
            if !same {
                shown.resize(len as usize, 0);
                below.resize(len as usize, 0);
                self.old.read_at(&mut shown, at)?;
                match self.new {
                    Some(new) => new.read(&mut below, at)?,
                    None => below.fill(0),
                }
                self.copy(at, &shown, &below)?;
                read += len;
                self.control.pace(begun, read)?;
            }
            at += len;
            (self.control.progress)(at);
        }
        self.image.flush()
    }

    /// Whether both chains show the same from `at` on without being read, and up to where that is known.
    fn same(&self, at: u64, len: u64) -> Result<(u64, bool)> {
        let zero = |k: ExtentKind| matches!(k, ExtentKind::Zero { .. } | ExtentKind::Absent);
        let shown = self.old.extent_at(at)?;
        let len = len.min(shown.len);
        match self.new.filter(|new| at < Chain::size(new)) {
            None => Ok((len, zero(shown.kind))),
            Some(new) => {
                let below = new.extent_at(at)?;
                let place = self.old.place(&shown);
                let same =
                    zero(shown.kind) && zero(below.kind) || place.is_some() && place == new.place(&below);
                Ok((len.min(below.len), same))
            }
        }
    }

    /// Writes the clusters of `shown` that differ from `below`.
    fn copy(&mut self, offset: u64, shown: &[u8], below: &[u8]) -> Result<()> {
        let cluster = self.image.header().cluster_size();
        let mut from = 0;
        while from < shown.len() {
            let at = offset + from as u64;
            let to = shown.len().min(((at / cluster + 1) * cluster - offset) as usize);
            let part = &shown[from..to];
            if part != &below[from..to] {
                let whole = at.is_multiple_of(cluster)
                    && (part.len() as u64 == cluster || at + part.len() as u64 == self.image.size());
                if part.iter().all(|b| *b == 0) {
                    self.image.write_zeroes(at, part.len() as u64)?;
                } else if let (Some(compressor), true) = (&mut self.compressor, whole) {
                    self.image.write_compressed(compressor, part, at)?;
                } else {
                    self.image.write_at(part, at)?;
                }
            }
            from = to;
        }
        Ok(())
    }
}
