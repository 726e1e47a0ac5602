//! What is compressed.

use knib_qcow::{Run, Source};

use crate::ops::disk_source::DiskSource;
use crate::store::StoreResult;
use crate::store::manifest::Disk;
use crate::store::sums::{self, Sums};

/// Clusters that are handed to a worker at once.
const RUN: u64 = 16;

/// What one stored image itself holds.
pub(super) struct Own<'a> {
    pub data: DiskSource,
    pub sums: Sums,
    pub disk: &'a Disk,
}

impl Own<'_> {
    fn is_zero(&self, cluster: u64) -> StoreResult<Option<bool>> {
        self.sums.with_record(cluster, |r| r.map(|r| r.place == sums::Place::Zero))
    }

    fn find(&self, from: u64) -> StoreResult<Option<Run>> {
        let size = self.disk.cluster_size;
        let Some(first) = self.sums.next_stored(from.div_ceil(size))? else { return Ok(None) };
        let kind = self.is_zero(first)?;
        let mut end = first + 1;
        while end - first < RUN && self.is_zero(end)? == kind {
            end += 1;
        }
        let start = first.saturating_mul(size);
        let end = end.saturating_mul(size).min(self.disk.virtual_size);
        Ok((start < end).then_some(Run { start, len: end.saturating_sub(start), zero: kind == Some(true) }))
    }
}

impl Source for Own<'_> {
    fn next(&self, from: u64) -> knib_qcow::Result<Option<Run>> {
        self.find(from).map_err(|e| knib_qcow::Error::damaged(self.sums.path(), e.to_string()))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> knib_qcow::Result<()> {
        // Through the chain: for what the image itself holds that is the same, and every byte is checked.
        self.data.read(offset, buf)
    }
}
