//! What a chain of backups holds of a cluster, without reading any image.

use std::sync::Arc;

use super::{Place, Strong, Sums};
use crate::store::{StoreError, StoreResult};

/// The sums files of one disk's chain, the newest first.
#[derive(Debug, Clone)]
pub struct SumsChain {
    layers: Vec<Arc<Sums>>,
}

impl SumsChain {
    /// Takes the files, newest first; they must agree on the cluster size.
    pub fn new(layers: Vec<Arc<Sums>>) -> StoreResult<Self> {
        let sizes = layers.iter().map(|l| l.header.cluster_bits);
        if let Some((one, other)) =
            layers.iter().zip(sizes.clone().skip(1)).find(|(a, b)| a.header.cluster_bits != *b)
        {
            let what =
                format!("clusters of 2^{} bytes stand on clusters of 2^{other}", one.header.cluster_bits);
            return Err(StoreError::damaged(one.path(), what));
        }
        Ok(Self { layers })
    }

    /// Bytes a cluster; none for no layers.
    pub fn cluster_size(&self) -> Option<u64> {
        self.layers.first().map(|l| 1 << l.header.cluster_bits)
    }

    /// Hash of the guest's cluster; none where nothing is stored or zeros are: it reads as zeros.
    pub fn strong(&self, cluster: u64) -> StoreResult<Option<Strong>> {
        for layer in &self.layers {
            let found = layer.with_record(cluster, |r| r.map(|r| (r.place, r.strong)))?;
            match found {
                Some((Place::Zero, _)) => return Ok(None),
                Some((_, strong)) => return Ok(Some(strong)),
                None => {}
            }
        }
        Ok(None)
    }

    /// Whether the cluster still is what the chain holds.
    pub fn is_unchanged(&self, cluster: u64, hash: &Strong, guest: &[u8]) -> StoreResult<bool> {
        Ok(match self.strong(cluster)? {
            Some(known) => known == *hash,
            None => guest.iter().all(|b| *b == 0),
        })
    }

    /// The first cluster from `cluster` on for which a layer has a record. All others read as zeros.
    pub fn next_stored(&self, cluster: u64) -> StoreResult<Option<u64>> {
        let mut next: Option<u64> = None;
        for layer in &self.layers {
            let found = layer.next_stored(cluster)?;
            next = [next, found].into_iter().flatten().min();
        }
        Ok(next)
    }
}
