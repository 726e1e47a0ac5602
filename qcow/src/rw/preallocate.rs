//! Space that is there before the guest writes.

use std::ops::Range;

use crate::entry::{COPIED, L2};
use crate::rw::ImageMut;
use crate::rw::tables::Entry;
use crate::{Error, Result, Storage};

/// How much of a disk is allocated ahead of its use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: clusters are allocated as they are written.
    #[default]
    Off,
    /// Every cluster has its place in the file, which stays sparse.
    Metadata,
    /// The file system reserves the space too.
    Falloc,
    /// Zeros are written to all of it.
    Full,
}

impl ImageMut {
    /// Gives every cluster of `range` (guest bytes) that has none a place in the file; it goes on to read as zeros.
    /// With a backing file that is only possible with subclusters. Flushes.
    pub fn preallocate(&mut self, range: Range<u64>, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off || range.is_empty() {
            return Ok(());
        }
        if self.backing.is_some() && !self.header.extended_l2() {
            return Err(Error::unsupported(
                self.storage.path(),
                "an image with a backing file can only be preallocated with extended L2 entries: what is allocated would hide the backing file",
            ));
        }
        self.preallocate_zeros(range, how)
    }

    /// The same where all that has no place reads as zeros, as the new part of a disk does that grew.
    pub(crate) fn preallocate_zeros(&mut self, range: Range<u64>, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off || range.is_empty() {
            return Ok(());
        }
        self.prepare(range.start, range.end.saturating_sub(range.start))?;
        let result = self.preallocate_clusters(range, how);
        self.failed |= result.is_err();
        result?;
        self.flush()
    }

    fn preallocate_clusters(&mut self, range: Range<u64>, how: Preallocation) -> Result<()> {
        let bits = self.header.cluster_bits;
        let len = |s: &dyn Storage| s.len().map_err(|e| Error::io(s.path(), "asking for the length", e));
        let mut run: Range<u64> = 0..0;
        for index in range.start >> bits..range.end.div_ceil(1 << bits) {
            if self.tables_full() {
                self.fill(std::mem::take(&mut run), how)?;
                self.flush()?;
            }
            let entry = self.entry(index)?;
            if !matches!(self.decode(index, entry)?, L2::Unallocated) || entry.sub != 0 {
                continue;
            }
            let host = self.new_cluster(index)?;
            if host != run.end {
                self.fill(std::mem::take(&mut run), how)?;
                run = host..host;
            }
            run.end = host + (1 << bits);
            self.set_entry(index, Entry { word: host | COPIED, sub: 0 })?;
        }
        self.fill(run, how)?;
        // Data past the end of the file would be damage.
        let end = if self.header.external_data() {
            range.end
        } else {
            self.refcounts.end().saturating_mul(1 << bits)
        };
        if len(&*self.data)? < end {
            self.data.set_len(end).map_err(|e| Error::io(self.data.path(), "growing", e))?;
        }
        Ok(())
    }

    /// Makes new host clusters read as zeros, in the way that was asked for.
    fn fill(&self, run: Range<u64>, how: Preallocation) -> Result<()> {
        let io = |doing: &'static str| move |e| Error::io(self.data.path(), doing, e);
        let len = self.data.len().map_err(io("asking for the length"))?;
        // An external data file ends where the disk ends, not where the cluster does.
        let end = if self.header.external_data() { run.end.min(self.header.size) } else { run.end };
        if end <= run.start {
            return Ok(());
        }
        // A cluster that was free may hold what was there before; an external file holds the guest's own bytes.
        let stale = run.start..end.min(len);
        if !self.header.external_data() && !stale.is_empty() {
            self.data.punch(stale.start, stale.end - stale.start).map_err(io("clearing"))?;
        }
        match how {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => {
                self.data.reserve(run.start, end - run.start).map_err(io("reserving space"))
            }
            Preallocation::Full => {
                let zeros = vec![0u8; 1 << 20];
                let from = if self.header.external_data() { run.start.max(len) } else { run.start };
                let mut at = from;
                while at < end {
                    let n = (end - at).min(zeros.len() as u64);
                    self.data.write_at(&zeros[..n as usize], at).map_err(io("writing zeros"))?;
                    at += n;
                }
                Ok(())
            }
        }
    }
}
