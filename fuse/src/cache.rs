//! Decoded blocks, bounded in bytes, each decoded by one thread at a time.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::touched::Touched;
use crate::{BlockKey, FsError, FsResult, Problem};

/// Decoded blocks of all files. Bounded in bytes; shared by all handles.
///
/// Sharded by key. A shard's lock guards a table, never a read or a decoding: who finds nothing leaves a note that the
/// block is being decoded, and who finds such a note waits for that one.
#[derive(Debug)]
pub struct BlockCache {
    shards: Box<[Mutex<Shard>]>,
    shard_limit: usize,
    touched: Touched,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What a cache did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Bytes of blocks held now.
    pub bytes: usize,
    /// Most bytes that it will hold.
    pub limit: usize,
    /// Blocks found, or found being decoded.
    pub hits: u64,
    /// Blocks decoded.
    pub misses: u64,
}

#[derive(Debug, Default)]
struct Shard {
    slots: HashMap<BlockKey, Slot>,
    /// Blocks in the order in which they came; one that was used gets a second round.
    queue: VecDeque<BlockKey>,
    /// Of blocks held and of those being decoded.
    bytes: usize,
}

#[derive(Debug)]
enum Slot {
    Ready { block: Arc<[u8]>, used: AtomicBool },
    Decoding(Arc<Flight>),
}

/// What a cache knows of a block.
pub(crate) enum Found {
    /// It is there.
    Held(Arc<[u8]>),
    /// Another thread decodes it.
    Coming(Arc<Flight>),
}

/// A block being decoded.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    landed: Mutex<Option<FsResult<Arc<[u8]>>>>,
    bell: Condvar,
}

/// Least size of a shard: a few of the largest clusters. Bytes.
const SHARD: usize = 8 << 20;
const MOST_SHARDS: usize = 16;

impl BlockCache {
    /// A cache of at most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        let count = (limit / SHARD).clamp(1, MOST_SHARDS);
        Arc::new(Self {
            shards: (0..count).map(|_| Mutex::default()).collect(),
            shard_limit: limit / count,
            touched: Touched::new(limit),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        })
    }

    /// What it did so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            bytes: self.shards.iter().map(|s| s.lock().bytes).sum(),
            limit: self.shard_limit * self.shards.len(),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn stats_limit(&self) -> u64 {
        (self.shard_limit * self.shards.len()) as u64
    }

    /// Whether the block is held or being decoded.
    pub fn holds(&self, key: BlockKey) -> bool {
        self.shard(key).lock().slots.contains_key(&key)
    }

    /// The block if it is held or being decoded.
    pub(crate) fn find(&self, key: BlockKey) -> Option<Found> {
        let shard = self.shard(key).lock();
        let found = match shard.slots.get(&key)? {
            Slot::Ready { block, used } => {
                used.store(true, Ordering::Relaxed);
                Found::Held(block.clone())
            }
            Slot::Decoding(flight) => Found::Coming(flight.clone()),
        };
        drop(shard);
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Whether the block of `len` bytes, which is not held, was asked for lately and so should be.
    pub(crate) fn is_wanted(&self, key: BlockKey, len: usize) -> bool {
        let wanted = self.touched.again(key, len);
        if !wanted {
            self.misses.fetch_add(1, Ordering::Relaxed);
        }
        wanted
    }

    /// The block; decoded with `decode`, which fills all of a buffer of `len` bytes, when it is not held. Errors are not kept: the
    /// next reader tries again.
    pub fn get(
        &self,
        key: BlockKey,
        len: usize,
        decode: impl FnOnce(&mut [u8]) -> FsResult<()>,
    ) -> FsResult<Arc<[u8]>> {
        let (flight, room, old) = {
            let mut shard = self.shard(key).lock();
            match shard.slots.entry(key) {
                Entry::Occupied(found) => match found.get() {
                    Slot::Ready { block, used } => {
                        used.store(true, Ordering::Relaxed);
                        self.hits.fetch_add(1, Ordering::Relaxed);
                        return Ok(block.clone());
                    }
                    Slot::Decoding(flight) => {
                        let flight = flight.clone();
                        drop(shard);
                        self.hits.fetch_add(1, Ordering::Relaxed);
                        return flight.wait();
                    }
                },
                Entry::Vacant(free) => {
                    let flight = Arc::new(Flight::default());
                    free.insert(Slot::Decoding(flight.clone()));
                    let (room, old) = shard.reserve(len, self.shard_limit);
                    (flight, room, old)
                }
            }
        };
        self.misses.fetch_add(1, Ordering::Relaxed);
        // Whatever happens, a panic too, those who wait hear of it.
        let mut landing = Landing { cache: self, key, room, flight, result: None };
        let mut block: Arc<[u8]> = old.unwrap_or_else(|| std::iter::repeat_n(0, len).collect());
        let decoded = match Arc::get_mut(&mut block) {
            Some(out) => decode(out),
            None => Err(FsError::new(Problem::Bug, "a new block is shared")),
        };
        let result = decoded.map(|()| block);
        landing.result = Some(result.clone());
        drop(landing);
        result
    }

    fn shard(&self, key: BlockKey) -> &Mutex<Shard> {
        // Blocks of one image are neighbours: spread them, and images too.
        let mixed = (key.block ^ key.image.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.shards[(mixed >> 32) as usize % self.shards.len()]
    }

    fn land(&self, key: BlockKey, room: Option<usize>, block: Option<&Arc<[u8]>>) {
        let mut shard = self.shard(key).lock();
        match (block, room) {
            (Some(block), Some(_)) => {
                shard.queue.push_back(key);
                let slot = Slot::Ready { block: block.clone(), used: AtomicBool::new(false) };
                shard.slots.insert(key, slot);
            }
            (_, room) => {
                shard.slots.remove(&key);
                shard.bytes -= room.unwrap_or(0);
            }
        }
    }
}

impl Shard {
    /// Makes room for a block: drops the oldest that were not used since they came or were last spared. Gives back one
    /// of the same length that nobody reads any more: memory that is used again need not be asked for, nor cleared. No
    /// room when the block is larger than the shard, or all that it holds is being decoded: such a block is not kept.
    fn reserve(&mut self, len: usize, limit: usize) -> (Option<usize>, Option<Arc<[u8]>>) {
        if len > limit {
            return (None, None);
        }
        let mut old = None;
        while self.bytes + len > limit {
            let Some(key) = self.queue.pop_front() else { return (None, None) };
            match self.slots.get(&key) {
                Some(Slot::Ready { used, .. }) if used.swap(false, Ordering::Relaxed) => {
                    self.queue.push_back(key);
                }
                Some(Slot::Ready { block, .. }) => {
                    self.bytes -= block.len();
                    if let Some(Slot::Ready { block, .. }) = self.slots.remove(&key) {
                        old = Some(block);
                    }
                }
                _ => {}
            }
        }
        self.bytes += len;
        (Some(len), old.filter(|block| block.len() == len && Arc::strong_count(block) == 1))
    }
}

impl Flight {
    /// Waits for the block.
    pub fn wait(&self) -> FsResult<Arc<[u8]>> {
        let mut landed = self.landed.lock();
        loop {
            if let Some(result) = landed.as_ref() {
                return result.clone();
            }
            self.bell.wait(&mut landed);
        }
    }
}

/// Ends a flight when dropped.
struct Landing<'a> {
    cache: &'a BlockCache,
    key: BlockKey,
    /// Bytes that are counted for it; none when it is not to be kept.
    room: Option<usize>,
    flight: Arc<Flight>,
    result: Option<FsResult<Arc<[u8]>>>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let result = self
            .result
            .take()
            .unwrap_or_else(|| Err(FsError::new(Problem::Bug, "a thread panicked while it decoded a block")));
        self.cache.land(self.key, self.room, result.as_ref().ok());
        *self.flight.landed.lock() = Some(result);
        self.flight.bell.notify_all();
    }
}
