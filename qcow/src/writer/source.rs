//! A chain as the source of a new image.

use crate::chain::ExtentKind;
use crate::writer::{Run, Source};
use crate::{Chain, CompressionType, Result};

/// A whole chain flattened, or only what its newest layers hold.
pub struct ChainSource<'a> {
    chain: &'a Chain,
    layers: Option<usize>,
    cluster: u64,
}

impl<'a> ChainSource<'a> {
    /// All of the disk; what reads as zeros is left out.
    pub fn whole(chain: &'a Chain, cluster_size: u64) -> Self {
        Self { chain, layers: None, cluster: cluster_size.max(512) }
    }

    /// Every cluster of which the newest `n` layers hold a part; the rest of it is read through the whole chain.
    pub fn top(chain: &'a Chain, n: usize, cluster_size: u64) -> Self {
        Self { chain, layers: Some(n), cluster: cluster_size.max(512) }
    }

    /// `Some(zero)` where there is something to write at `at`, and how far that holds.
    fn look(&self, at: u64) -> Result<(Option<bool>, u64)> {
        let extent = match self.layers {
            None => self.chain.extent_at(at)?,
            Some(n) => self.chain.top_extent_at(n, at)?,
        };
        let what = match extent.kind {
            ExtentKind::Absent => None,
            ExtentKind::Zero { .. } => self.layers.map(|_| true),
            ExtentKind::Data { .. } | ExtentKind::Compressed { .. } => Some(false),
        };
        Ok((what, extent.start + extent.len))
    }
}

impl Source for ChainSource<'_> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        let size = self.chain.size();
        let mut at = from;
        // Runs are cut so that the map of a huge disk is never walked ahead of the work.
        let longest = self.cluster.max(1 << 20);
        while at < size {
            let (what, end) = self.look(at)?;
            let Some(zero) = what else {
                at = end;
                continue;
            };
            let start = at / self.cluster * self.cluster;
            let start = start.max(from);
            let whole = end / self.cluster * self.cluster;
            if zero && at == start && whole > start {
                return Ok(Some(Run { start, len: whole - start, zero: true }));
            }
            // Data, or a cluster of which only a part is known to be zeros.
            let mut stop = end.next_multiple_of(self.cluster);
            while !zero && stop < size && stop - start < longest {
                let (next, next_end) = self.look(stop)?;
                if next != Some(false) {
                    break;
                }
                stop = next_end.next_multiple_of(self.cluster);
            }
            let stop = if zero { start + self.cluster } else { stop };
            return Ok(Some(Run { start, len: stop.min(size) - start, zero: false }));
        }
        Ok(None)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read_at(buf, offset)
    }

    fn take_stored(
        &self,
        start: u64,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let extent = match self.layers {
            None => self.chain.extent_at(start)?,
            Some(n) => self.chain.top_extent_at(n, start)?,
        };
        self.chain.take_stored(&extent, cluster, kind, out)
    }
}
