//! What several stored images of one disk hold together, as the source of the image that takes their place.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use knib_qcow::{CompressionType, Run, Source};

use crate::ops::disk_source::DiskSource;
use crate::store::StoreResult;
use crate::store::sums::{Place, Sums};

/// Clusters that are handed to a worker at once.
const RUN: u64 = 16;

/// One stored image.
pub(super) struct Image {
    pub sums: Arc<Sums>,
    pub file: File,
    /// How its compressed clusters are compressed.
    pub compression: Option<CompressionType>,
}

impl Image {
    /// Appends the stored bytes of a cluster that is compressed with `kind`, checked; none where it has no such cluster.
    fn take(
        &self,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> knib_qcow::Result<Option<bool>> {
        let damaged = |what: String| knib_qcow::Error::damaged(self.sums.path(), what);
        let taken = self.sums.with_record(cluster, |record| {
            let record = record?;
            let Place::Compressed { offset, len } = record.place else { return Some(Ok(false)) };
            if self.compression != Some(kind) {
                return Some(Ok(false));
            }
            let from = out.len();
            out.resize(from.saturating_add(len as usize), 0);
            let bytes = out.get_mut(from..).unwrap_or_default();
            let read = self.file.read_exact_at(bytes, offset);
            Some(match read {
                Err(e) => Err(format!("its image cannot be read at byte {offset}: {e}")),
                Ok(()) if record.matches_stored(0, bytes) => Ok(true),
                Ok(()) => Err(format!("{len} bytes of its image at {offset} are not as they were written")),
            })
        });
        taken.map_err(|e| damaged(e.to_string()))?.transpose().map_err(damaged)
    }
}

/// The images, the newest first, and the disk as it is seen through them.
pub(super) struct Together {
    pub data: DiskSource,
    pub layers: Vec<Image>,
    pub cluster_size: u64,
    pub virtual_size: u64,
}

impl Together {
    /// Whether the cluster is zeros; none where no image has it.
    fn is_zero(&self, cluster: u64) -> StoreResult<Option<bool>> {
        for layer in &self.layers {
            let found = layer.sums.with_record(cluster, |r| r.map(|r| r.place == Place::Zero))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn next_stored(&self, from: u64) -> StoreResult<Option<u64>> {
        let mut next: Option<u64> = None;
        for layer in &self.layers {
            next = [next, layer.sums.next_stored(from)?].into_iter().flatten().min();
        }
        Ok(next)
    }

    fn find(&self, from: u64) -> StoreResult<Option<Run>> {
        let size = self.cluster_size;
        let Some(first) = self.next_stored(from.div_ceil(size))? else { return Ok(None) };
        let kind = self.is_zero(first)?;
        let mut end = first + 1;
        while end - first < RUN && self.is_zero(end)? == kind {
            end += 1;
        }
        let start = first.saturating_mul(size);
        let end = end.saturating_mul(size).min(self.virtual_size);
        Ok((start < end).then_some(Run { start, len: end.saturating_sub(start), zero: kind == Some(true) }))
    }
}

impl Source for Together {
    fn next(&self, from: u64) -> knib_qcow::Result<Option<Run>> {
        self.find(from).map_err(|e| {
            let path = self.layers.first().map_or(std::path::Path::new(""), |l| l.sums.path());
            knib_qcow::Error::damaged(path, e.to_string())
        })
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> knib_qcow::Result<()> {
        // Through the chain, which is the same where one of the images has the cluster; every byte is checked.
        self.data.read(offset, buf)
    }

    fn take_stored(
        &self,
        start: u64,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> knib_qcow::Result<bool> {
        if cluster != self.cluster_size {
            return Ok(false);
        }
        for layer in &self.layers {
            if let Some(taken) = layer.take(start / cluster, kind, out)? {
                return Ok(taken);
            }
        }
        Ok(false)
    }
}
