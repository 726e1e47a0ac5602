//! What a scan has to look at: where the disk has data now, and where the parent's chain has.

use knib_qcow::{Chain, ExtentKind, Result, Run, Source};

use crate::store::sums::SumsChain;

/// Clusters that may have changed since the parent. Everything else reads as zeros, then and now.
pub(super) struct ScanSource<'a> {
    chain: &'a Chain,
    parent: SumsChain,
    cluster: u64,
}

/// So long is one run at most, in bytes.
const RUN: u64 = 64 << 20;

impl<'a> ScanSource<'a> {
    pub fn new(chain: &'a Chain, parent: SumsChain, cluster: u64) -> Self {
        Self { chain, parent, cluster }
    }

    /// The first cluster with data on the disk, and where that data ends.
    fn data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let mut at = from;
        while at < self.chain.size() {
            let extent = self.chain.extent_at(at)?;
            let end = extent.start.saturating_add(extent.len).max(at.saturating_add(1));
            if !matches!(extent.kind, ExtentKind::Absent | ExtentKind::Zero { .. }) {
                return Ok(Some((at - at % self.cluster, end)));
            }
            at = end;
        }
        Ok(None)
    }

    fn stored(&self, from: u64) -> Result<Option<u64>> {
        let next = self.parent.next_stored(from / self.cluster).map_err(|e| {
            knib_qcow::Error::damaged(std::path::Path::new("the parent's checksums"), e.to_string())
        })?;
        Ok(next.map(|cluster| cluster.saturating_mul(self.cluster)))
    }
}

impl Source for ScanSource<'_> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        let size = self.chain.size();
        if from >= size {
            return Ok(None);
        }
        let data = self.data(from)?;
        let stored = self.stored(from)?.filter(|at| *at < size);
        let (start, end) = match (data, stored) {
            (None, None) => return Ok(None),
            (Some((start, end)), Some(at)) if start <= at => (start, end),
            (Some((start, end)), None) => (start, end),
            (_, Some(at)) => (at, at.saturating_add(self.cluster)),
        };
        // Whole clusters, none before `from`.
        let start = start.max(from);
        let end = end.min(start.saturating_add(RUN)).div_ceil(self.cluster).saturating_mul(self.cluster);
        Ok(Some(Run { start, len: end.min(size).saturating_sub(start), zero: false }))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read_at(buf, offset)
    }
}
