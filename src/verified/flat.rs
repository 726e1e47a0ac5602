//! A chain as one flat map: for each region of the disk, which layer holds a cluster, where, and what it must be.
//!
//! A region is looked up in every layer once, then kept: reads cost the same whatever the chain's depth.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::image::StoredImage;
use crate::store::StoreResult;
use crate::store::sums::{PIECE, Place, fast};

/// One cluster of the flat disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Zeros; nothing is stored, or zeros are.
    Zero,
    /// As it is, at `offset` in the layer's file.
    Data { layer: u16, offset: u64 },
    /// Compressed: `len` bytes at `offset` in the layer's file.
    Compressed { layer: u16, offset: u64, len: u32 },
}

/// The clusters of one region and the checksums of their stored bytes.
#[derive(Debug)]
pub struct FlatRegion {
    clusters: Box<[Cluster]>,
    /// Where a cluster's checksums begin; one more than clusters.
    starts: Box<[u32]>,
    fasts: Box<[u32]>,
}

/// Bytes of the guest in a region, as log2; as in the sums files.
pub const REGION_BITS: u32 = 24;

impl FlatRegion {
    /// Builds the map of a region from the layers, the top first.
    pub fn build(layers: &[Arc<StoredImage>], region: u64, cluster_bits: u32) -> StoreResult<Self> {
        let count = 1u64 << REGION_BITS.saturating_sub(cluster_bits);
        let first = region.saturating_mul(count);
        let mut clusters = vec![Cluster::Zero; count as usize];
        let mut found: Vec<Vec<u32>> = vec![Vec::new(); count as usize];
        let mut open: Vec<usize> = (0..count as usize).collect();
        for (depth, image) in layers.iter().enumerate() {
            if open.is_empty() {
                break;
            }
            let layer = u16::try_from(depth).unwrap_or(u16::MAX);
            let records = image.sums.region_of(first)?;
            open.retain(|&at| {
                let cluster = first.saturating_add(at as u64);
                // Behind the end of a shorter layer are zeros, whatever lies below it.
                if depth > 0 && cluster.checked_shl(cluster_bits).is_none_or(|s| s >= image.virtual_size) {
                    return false;
                }
                let Some(record) = records.as_ref().and_then(|r| r.get(cluster)) else { return true };
                if let (Some(slot), Some(fasts)) = (clusters.get_mut(at), found.get_mut(at)) {
                    *slot = match record.place {
                        Place::Zero => Cluster::Zero,
                        Place::Data { offset, .. } => Cluster::Data { layer, offset },
                        Place::Compressed { offset, len } => {
                            Cluster::Compressed { layer, offset, len: u32::try_from(len).unwrap_or(u32::MAX) }
                        }
                    };
                    fasts.extend_from_slice(record.fasts());
                }
                false
            });
        }
        let mut starts = Vec::with_capacity(found.len() + 1);
        let mut fasts = Vec::with_capacity(found.iter().map(Vec::len).sum());
        for cluster in &found {
            starts.push(fasts.len() as u32);
            fasts.extend_from_slice(cluster);
        }
        starts.push(fasts.len() as u32);
        Ok(Self { clusters: clusters.into(), starts: starts.into(), fasts: fasts.into() })
    }

    /// The cluster at an index of the region.
    pub fn cluster(&self, at: usize) -> Cluster {
        self.clusters.get(at).copied().unwrap_or(Cluster::Zero)
    }

    /// How many clusters from `at` on are of one run: all zeros, or data that follows itself in one layer's file.
    pub fn run(&self, at: usize, cluster_size: u64) -> usize {
        let rest = self.clusters.get(at..).unwrap_or_default();
        let same = |(n, cluster): (usize, &Cluster)| match (rest.first(), cluster) {
            (Some(Cluster::Zero), Cluster::Zero) => true,
            (Some(Cluster::Data { layer, offset }), Cluster::Data { layer: other, offset: there }) => {
                layer == other && offset.checked_add(n as u64 * cluster_size) == Some(*there)
            }
            _ => n == 0,
        };
        rest.iter().enumerate().take_while(|(n, c)| same((*n, *c))).count()
    }

    /// Whether stored bytes of the cluster from its piece `piece` on are as they were written.
    pub fn matches(&self, at: usize, piece: usize, bytes: &[u8]) -> bool {
        let bounds = (self.starts.get(at), self.starts.get(at + 1));
        let (Some(from), Some(to)) = bounds else { return false };
        let fasts = self.fasts.get(*from as usize..*to as usize).unwrap_or_default();
        let Some(wanted) = fasts.get(piece..) else { return false };
        let mut pieces = bytes.chunks(PIECE as usize);
        pieces.len() <= wanted.len() && pieces.all_with(wanted)
    }

    /// Bytes of memory, about.
    fn weight(&self) -> usize {
        size_of::<Self>()
            + self.clusters.len() * size_of::<Cluster>()
            + (self.starts.len() + self.fasts.len()) * 4
            + 128
    }
}

trait AllWith {
    fn all_with(&mut self, wanted: &[u32]) -> bool;
}

impl<'a, I: Iterator<Item = &'a [u8]>> AllWith for I {
    fn all_with(&mut self, wanted: &[u32]) -> bool {
        self.zip(wanted).all(|(piece, wanted)| fast(piece) == *wanted)
    }
}

/// Regions of all open disks, bounded in bytes. A lock guards a table only, never the building of a region: two that
/// miss the same build it twice, which is cheap.
#[derive(Debug)]
pub struct FlatCache {
    shards: Box<[Mutex<Shard>]>,
    shard_limit: usize,
}

#[derive(Debug, Default)]
struct Shard {
    regions: HashMap<(u64, u64), Arc<FlatRegion>>,
    queue: VecDeque<(u64, u64)>,
    bytes: usize,
}

const SHARDS: usize = 8;

impl FlatCache {
    /// A cache of at most `limit` bytes (and always of a region a shard).
    pub fn new(limit: usize) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), shard_limit: limit / SHARDS }
    }

    /// The region of a disk; built when it is not held.
    pub fn get<E>(
        &self,
        disk: u64,
        region: u64,
        build: impl FnOnce() -> Result<FlatRegion, E>,
    ) -> Result<Arc<FlatRegion>, E> {
        let key = (disk, region);
        let shard = &self.shards[(disk ^ region) as usize % SHARDS];
        if let Some(found) = shard.lock().regions.get(&key) {
            return Ok(found.clone());
        }
        let built = Arc::new(build()?);
        let mut shard = shard.lock();
        if shard.regions.insert(key, built.clone()).is_none() {
            shard.queue.push_back(key);
            shard.bytes += built.weight();
        }
        while shard.bytes > self.shard_limit && shard.queue.len() > 1 {
            let Some(old) = shard.queue.pop_front() else { break };
            if let Some(dropped) = shard.regions.remove(&old) {
                shard.bytes -= dropped.weight();
            }
        }
        Ok(built)
    }
}
