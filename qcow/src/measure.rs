//! How large an image will be. Source: the qcow2 specification; the sums agree with `qemu-img measure`.

use crate::chain::ExtentKind;
use crate::entry::L1_MAX;
use crate::{Chain, Result};

/// What decides the size of an image's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// log2 of the cluster size in bytes, 9–21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0–6.
    pub refcount_order: u32,
    /// L2 entries have subclusters.
    pub extended_l2: bool,
}

/// Sizes of files in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// With the data that is there now, uncompressed.
    pub required: u64,
    /// When the guest has written all of its disk.
    pub fully_allocated: u64,
}

impl Shape {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether its L1 table has no more than the 32 MiB that QEMU opens.
    pub fn is_possible(&self) -> bool {
        self.l2_tables() * 8 <= L1_MAX
    }

    fn l2_tables(&self) -> u64 {
        let entry = if self.extended_l2 { 16 } else { 8 };
        self.size.div_ceil(self.cluster()).div_ceil(self.cluster() / entry)
    }

    /// Size of the file when all of the disk is allocated, in bytes.
    pub fn fully_allocated(&self) -> u64 {
        let cluster = self.cluster();
        let data = self.size.div_ceil(cluster);
        let l2 = self.l2_tables();
        let l1 = l2.div_ceil(cluster / 8);
        let clusters = 1 + data + l2 + l1;
        (clusters + refcount_clusters(clusters, self.cluster_bits, self.refcount_order)) << self.cluster_bits
    }

    /// Sizes for a disk whose data lies in `chain` (none: an empty one). With `preallocated`, all of it takes space.
    pub fn measure(&self, chain: Option<&Chain>, preallocated: bool) -> Result<Measure> {
        let whole = self.size.next_multiple_of(self.cluster());
        let data = match chain {
            _ if preallocated => whole,
            Some(chain) => self.data(chain)?,
            None => 0,
        };
        let fully_allocated = self.fully_allocated();
        Ok(Measure { required: fully_allocated - whole + data.min(whole), fully_allocated })
    }

    /// Bytes of the clusters in which the chain has data.
    fn data(&self, chain: &Chain) -> Result<u64> {
        let size = chain.size().min(self.size);
        let (mut at, mut data) = (0, 0);
        while at < size {
            let extent = chain.extent_at(at)?;
            let end = extent.start + extent.len;
            at = match extent.kind {
                ExtentKind::Absent | ExtentKind::Zero { .. } => end,
                ExtentKind::Data { .. } | ExtentKind::Compressed { .. } => {
                    let end = end.next_multiple_of(self.cluster());
                    data += end - at / self.cluster() * self.cluster();
                    end
                }
            };
        }
        Ok(data)
    }
}

/// Clusters of refcount blocks and table for an image with `clusters` others.
pub(crate) fn refcount_clusters(clusters: u64, cluster_bits: u32, order: u32) -> u64 {
    let (per_block, per_table) = ((8u64 << cluster_bits) >> order, (1u64 << cluster_bits) / 8);
    let (mut blocks, mut table) = (0, 0);
    loop {
        let need = (clusters + blocks + table).div_ceil(per_block);
        let need_table = need.div_ceil(per_table);
        if (need, need_table) == (blocks, table) {
            return blocks + table;
        }
        (blocks, table) = (need, need_table);
    }
}
