//! Another backing file under an image that goes on to show what it showed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::chain::ExtentKind;
use crate::codec::Compressor;
use crate::create::set_backing_in;
use crate::rw::{Backing, ImageMut, compress_cluster};
use crate::writer::is_zero;
use crate::writer::pipeline::{self, COPY_BYTES, Jobs};
use crate::{
    Access, Chain, Compression, Control, Error, Format, Gate, Implicit, PageBuf, Result, Run, Source, Storage,
};

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
    let old = Chain::from_storage(storage.clone(), Format::Qcow2, &Own { gate, path: &path })?;
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
    let compression = compression.map(|c| Compression { kind: image.header().compression, ..c });
    let cluster = image.header().cluster_size();
    Differing { old: &old, new: new.as_ref(), cluster }.copy_into(&mut image, &path, compression, control)?;
    drop(image);
    set_backing_in(&*storage, name.map(|(name, _)| name), name.map(|(_, format)| format))
}

/// Opens the external data file of the image itself to be read beside the writer, whose lock it is.
struct Own<'a> {
    gate: &'a dyn Gate,
    path: &'a Path,
}

impl Gate for Own<'_> {
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        name: &str,
        format: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format)> {
        if kind == Implicit::DataFile && from == self.path {
            return Ok((self.gate.open_data(from, name, Access::Read)?, Format::Raw));
        }
        self.gate.open(from, kind, name, format)
    }
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

/// Where the image says nothing itself, and the old and the new backing chain may differ.
struct Differing<'a> {
    old: &'a Chain,
    new: Option<&'a Chain>,
    cluster: u64,
}

/// What one thread keeps from job to job.
struct Worker {
    compressor: Option<Compressor>,
    shown: PageBuf,
    below: PageBuf,
}

/// What the image is to say of a cluster, or a part of one, by itself.
enum Change {
    Zeros,
    Plain(Vec<u8>),
    Stored(Vec<u8>),
}

impl Differing<'_> {
    /// Bytes that are compared at once: whole clusters.
    fn step(&self) -> u64 {
        COPY_BYTES.max(self.cluster)
    }

    fn copy_into(
        &self,
        image: &mut ImageMut,
        path: &Path,
        compression: Option<Compression>,
        control: &Control,
    ) -> Result<()> {
        let new_worker = || {
            let compressor = compression.map(Compressor::new).transpose();
            let compressor = compressor.map_err(|why| Error::unsupported(path, why))?;
            Ok(Worker { compressor, shown: PageBuf::default(), below: PageBuf::default() })
        };
        let make = |worker: &mut Worker, run: Run| worker.changes(self, run, path);
        let take = |changes: Vec<(Range<u64>, Change)>| {
            for (range, change) in changes {
                let len = range.end - range.start;
                match (change, compression) {
                    (Change::Zeros, _) => image.write_zeroes(range.start, len)?,
                    (Change::Stored(stored), Some(c)) => {
                        image.write_stored(c.kind, &stored, range.start, len)?;
                    }
                    (Change::Plain(bytes) | Change::Stored(bytes), _) => {
                        image.write_at(&bytes, range.start)?;
                    }
                }
            }
            Ok(())
        };
        pipeline::run(self, Jobs { cluster: 1, bytes: self.step() }, control, new_worker, make, take)?;
        (control.progress)(self.old.size());
        image.flush()
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

    /// Whether `at` is to be compared, and up to where that holds.
    fn look(&self, at: u64) -> Result<(u64, bool)> {
        let own = self.old.top_extent_at(1, at)?;
        // Without a backing file the chain itself says that nobody says anything.
        if !matches!(own.kind, ExtentKind::Absent | ExtentKind::Zero { layer: None }) {
            return Ok((own.len, false));
        }
        let (len, same) = self.same(at, own.len)?;
        Ok((len, !same))
    }
}

impl Source for Differing<'_> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        let size = self.old.size();
        let mut at = from;
        while at < size {
            let (mut len, differs) = self.look(at)?;
            if !differs {
                at += len;
                continue;
            }
            // Up to a multiple of the step, so that clusters are not cut.
            let most = (at / self.step() + 1) * self.step() - at;
            while len < most && at + len < size {
                let (more, differs) = self.look(at + len)?;
                if !differs {
                    break;
                }
                len += more;
            }
            return Ok(Some(Run { start: at, len: len.min(most), zero: false }));
        }
        Ok(None)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.old.read_at(buf, offset)
    }
}

impl Worker {
    /// The clusters of a run that show something else through the new chain.
    fn changes(&mut self, of: &Differing<'_>, run: Run, path: &Path) -> Result<Vec<(Range<u64>, Change)>> {
        self.shown.set_len(run.len as usize);
        self.below.set_len(run.len as usize);
        of.read(run.start, &mut self.shown)?;
        match of.new {
            Some(new) => new.read(&mut self.below, run.start)?,
            None => self.below.fill(0),
        }
        let mut changes = Vec::new();
        let (mut at, end) = (run.start, run.start + run.len);
        while at < end {
            let stop = end.min((at / of.cluster + 1) * of.cluster);
            let range = (at - run.start) as usize..(stop - run.start) as usize;
            let part = &self.shown[range.clone()];
            if part != &self.below[range] {
                let whole = at.is_multiple_of(of.cluster)
                    && (stop.is_multiple_of(of.cluster) || stop == of.old.size());
                let change = Self::change(self.compressor.as_mut().filter(|_| whole), part, of.cluster);
                let change = change.map_err(|why| Error::unsupported(path, why))?;
                changes.push((at..stop, change));
            }
            at = stop;
        }
        Ok(changes)
    }

    fn change(
        compressor: Option<&mut Compressor>,
        part: &[u8],
        cluster: u64,
    ) -> std::result::Result<Change, String> {
        if is_zero(part) {
            return Ok(Change::Zeros);
        }
        let mut stored = Vec::new();
        if let Some(compressor) = compressor
            && compress_cluster(compressor, part, cluster, &mut stored)?
        {
            return Ok(Change::Stored(stored));
        }
        Ok(Change::Plain(part.to_vec()))
    }
}
