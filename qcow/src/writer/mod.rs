//! New images in one pass: workers read, compress and digest; one at a time lays the clusters out in guest order.

mod clusters;
mod fill;
mod head;
mod layout;
pub(crate) mod pipeline;
mod raw;
mod source;
pub(crate) mod write_behind;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use fill::{Before, Sink};
pub use layout::write_image;
pub(crate) use raw::is_zero;
pub use raw::write_raw;
pub use source::ChainSource;

use crate::codec::Compression;
use crate::{CompressionType, Error, Format, Result};

/// What a new image is to be: version 3, refcounts of 16 bits.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// log2 of the cluster size in bytes, 9–21.
    pub cluster_bits: u32,
    /// How clusters are compressed; `None` leaves them plain.
    pub compression: Option<Compression>,
    /// Backing file's name and format, as the header is to say them.
    pub backing: Option<(String, Format)>,
}

/// A run of clusters to write, in bytes of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it starts: a multiple of the cluster size.
    pub start: u64,
    /// Its length: whole clusters, but at the end of the disk.
    pub len: u64,
    /// Known to read as zeros, so it need not be read.
    pub zero: bool,
}

/// What is written into a new image. Clusters between runs are left out.
pub trait Source: Sync {
    /// The first run at or after `from`; called by one thread at a time, in guest order.
    fn next(&self, from: u64) -> Result<Option<Run>>;
    /// Reads the guest's bytes; called by workers side by side.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Where the guest's `cluster` bytes at `start` (a multiple of it) are stored as one cluster compressed with `kind`,
    /// appends the stored bytes, without what may follow them, to `out` and says so: they go into the new image as they
    /// are. Called by workers side by side. Not knowing how is always right.
    fn take_stored(
        &self,
        start: u64,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let _ = (start, cluster, kind, out);
        Ok(false)
    }
}

/// Where a cluster was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: its entry says that it reads as zeros.
    Zero,
    /// Plain, at an offset, so many bytes (a cluster).
    Data {
        /// Host offset in bytes.
        offset: u64,
        /// Stored length in bytes.
        len: u64,
    },
    /// Compressed, at an offset, so many bytes.
    Compressed {
        /// Host offset in bytes.
        offset: u64,
        /// Stored length in bytes.
        len: u64,
    },
}

/// Sees everything that is written, to remember checksums.
pub trait Observer: Sync {
    /// What a worker finds out about one cluster.
    type Digest: Send;
    /// Whether the cluster is written at all. Workers, any order. `guest` is a whole cluster.
    fn keep(&self, cluster: u64, guest: &[u8]) -> bool;
    /// Digests one cluster. Workers, any order. `stored` is empty for zeros.
    fn digest(&self, cluster: u64, guest: &[u8], stored: &[u8]) -> Self::Digest;
    /// Digests a compressed cluster that is taken over as it is stored. `None`, which is the default, when that takes the
    /// guest's bytes: it is decompressed then, and [`Observer::keep`] and [`Observer::digest`] are called.
    fn digest_stored(&self, cluster: u64, stored: &[u8]) -> Option<Self::Digest> {
        let _ = (cluster, stored);
        None
    }
    /// A cluster has its place. One call at a time, in guest order. Places ascend, except that within 16 MiB of the guest
    /// (aligned) plain clusters may lie behind compressed ones that follow them.
    fn stored(&self, cluster: u64, place: Place, digest: Self::Digest) -> Result<()>;
    /// Header, tables or refcounts were written. One call at a time.
    fn metadata(&self, offset: u64, bytes: &[u8]) -> Result<()>;
}

/// Sees nothing.
pub struct NoObserver;

impl Observer for NoObserver {
    type Digest = ();
    fn keep(&self, _: u64, _: &[u8]) -> bool {
        true
    }
    fn digest(&self, _: u64, _: &[u8], _: &[u8]) {}
    fn digest_stored(&self, _: u64, _: &[u8]) -> Option<()> {
        Some(())
    }
    fn stored(&self, _: u64, _: Place, (): ()) -> Result<()> {
        Ok(())
    }
    fn metadata(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// How long work is done, watched and stopped.
pub struct Control<'a> {
    /// Worker threads, at least one.
    pub threads: usize,
    /// Guest bytes a second, at most.
    pub rate_limit: Option<u64>,
    /// Set to stop: the work ends with [`crate::Error::Cancelled`].
    pub cancel: &'a AtomicBool,
    /// Told how many guest bytes are done.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Control<'_> {
    /// Waits until `done` bytes fit the rate, in small steps so that a cancel is noticed.
    pub(crate) fn pace(&self, begun: Instant, done: u64) -> Result<()> {
        let Some(rate) = self.rate_limit.filter(|r| *r > 0) else { return Ok(()) };
        let due = Duration::from_secs_f64(done as f64 / rate as f64);
        while let Some(left) = due.checked_sub(begun.elapsed()) {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
        Ok(())
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Length of the file in bytes.
    pub file_len: u64,
    /// Clusters with stored bytes.
    pub clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Clusters whose entries say that they read as zeros.
    pub zero_clusters: u64,
}
