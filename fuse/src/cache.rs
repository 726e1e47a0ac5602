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
    /// The same for those that are kept until they are read.
    ahead: VecDeque<BlockKey>,
    /// Of blocks held and of those being decoded.
    bytes: usize,
}

#[derive(Debug)]
enum Slot {
    Ready { block: Arc<[u8]>, used: AtomicBool, spent: AtomicBool },
    Decoding(Arc<Flight>),
}

/// How long a block is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// As long as others are not used more.
    Long,
    /// Until it is read to its end: then the next of these takes its memory, which still lies in the processor's cache.
    UntilRead,
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
/// One in so many bytes may be held by blocks that are kept until they are read.
const AHEAD: usize = 4;
/// Of these so many at most make room for one.
const PLACES: usize = 4;

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

    /// The block if it is held or being decoded, for a reader that reads it to its end or not.
    pub(crate) fn find(&self, key: BlockKey, to_end: bool) -> Option<Found> {
        let shard = self.shard(key).lock();
        let found = shard.slots.get(&key)?.found(to_end);
        drop(shard);
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// The block was read to its end.
    pub(crate) fn spend(&self, key: BlockKey) {
        if let Some(Slot::Ready { spent, .. }) = self.shard(key).lock().slots.get(&key) {
            spent.store(true, Ordering::Relaxed);
        }
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
        let block = self.fetch(key, len, || Some(Keep::Long), decode)?;
        block.ok_or_else(|| FsError::new(Problem::Bug, "a block that was needed was left out"))
    }

    /// The same for a block that a sequential reader is at or comes to: held until it is read to its end, unless it was asked for
    /// lately, too. None where it is neither held nor `needed` any more.
    pub(crate) fn get_for_sequence(
        &self,
        key: BlockKey,
        len: usize,
        needed: impl FnOnce() -> bool,
        decode: impl FnOnce(&mut [u8]) -> FsResult<()>,
    ) -> FsResult<Option<Arc<[u8]>>> {
        let keep = || if self.touched.again(key, len) { Keep::Long } else { Keep::UntilRead };
        self.fetch(key, len, || needed().then(keep), decode)
    }

    fn fetch(
        &self,
        key: BlockKey,
        len: usize,
        keep: impl FnOnce() -> Option<Keep>,
        decode: impl FnOnce(&mut [u8]) -> FsResult<()>,
    ) -> FsResult<Option<Arc<[u8]>>> {
        let (flight, keep, room, old) = {
            let mut shard = self.shard(key).lock();
            match shard.slots.entry(key) {
                Entry::Occupied(slot) => {
                    let found = slot.get().found(false);
                    drop(shard);
                    self.hits.fetch_add(1, Ordering::Relaxed);
                    return found.wait().map(Some);
                }
                Entry::Vacant(free) => {
                    let Some(keep) = keep() else { return Ok(None) };
                    let flight = Arc::new(Flight::default());
                    free.insert(Slot::Decoding(flight.clone()));
                    let (room, old) = shard.reserve(len, self.shard_limit, keep);
                    (flight, keep, room, old)
                }
            }
        };
        self.misses.fetch_add(1, Ordering::Relaxed);
        // Whatever happens, a panic too, those who wait hear of it.
        let mut landing = Landing { cache: self, key, keep, room, flight, result: None };
        let mut block: Arc<[u8]> = old.unwrap_or_else(|| std::iter::repeat_n(0, len).collect());
        let decoded = match Arc::get_mut(&mut block) {
            Some(out) => decode(out),
            None => Err(FsError::new(Problem::Bug, "a new block is shared")),
        };
        let result = decoded.map(|()| block);
        landing.result = Some(result.clone());
        drop(landing);
        result.map(Some)
    }

    fn shard(&self, key: BlockKey) -> &Mutex<Shard> {
        // Blocks of one image are neighbours: spread them, and images too.
        let mixed = (key.block ^ key.image.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.shards[(mixed >> 32) as usize % self.shards.len()]
    }

    fn land(&self, key: BlockKey, keep: Keep, room: Option<usize>, block: Option<&Arc<[u8]>>) {
        let mut shard = self.shard(key).lock();
        match (block, room) {
            (Some(block), Some(_)) => {
                shard.queue_of(keep).push_back(key);
                let (used, spent) = (AtomicBool::new(false), AtomicBool::new(false));
                shard.slots.insert(key, Slot::Ready { block: block.clone(), used, spent });
            }
            (_, room) => {
                shard.slots.remove(&key);
                shard.bytes -= room.unwrap_or(0);
            }
        }
    }
}

impl Slot {
    /// What is there for a reader that reads the block to its end or not.
    fn found(&self, to_end: bool) -> Found {
        match self {
            Self::Ready { block, used, spent } => {
                used.store(true, Ordering::Relaxed);
                spent.fetch_or(to_end, Ordering::Relaxed);
                Found::Held(block.clone())
            }
            Self::Decoding(flight) => Found::Coming(flight.clone()),
        }
    }
}

impl Found {
    fn wait(self) -> FsResult<Arc<[u8]>> {
        match self {
            Self::Held(block) => Ok(block),
            Self::Coming(flight) => flight.wait(),
        }
    }
}

impl Shard {
    fn queue_of(&mut self, keep: Keep) -> &mut VecDeque<BlockKey> {
        match keep {
            Keep::Long => &mut self.queue,
            Keep::UntilRead => &mut self.ahead,
        }
    }

    /// Makes room for a block: drops the oldest that were not used since they came or were last spared. Gives back one
    /// of the same length that nobody reads any more: memory that is used again need not be asked for, nor cleared. No
    /// room when the block is larger than the shard, or all that it holds is being decoded: such a block is not kept.
    fn reserve(&mut self, len: usize, limit: usize, keep: Keep) -> (Option<usize>, Option<Arc<[u8]>>) {
        if len > limit {
            return (None, None);
        }
        let mut old = None;
        if keep == Keep::UntilRead {
            // One takes the place of several, so that they get fewer again when there were many; and of one that was not read when
            // those behind it are many: its reader went elsewhere.
            for _ in 0..PLACES {
                let Some(key) = self.ahead.front().copied() else { break };
                if !self.is_spent(&key) && self.ahead.len() * len <= limit / AHEAD {
                    break;
                }
                self.ahead.pop_front();
                old = self.drop(&key);
            }
        }
        while self.bytes + len > limit {
            let Some(key) = self.queue.pop_front() else {
                let Some(key) = self.ahead.pop_front() else { return (None, None) };
                old = self.drop(&key);
                continue;
            };
            match self.slots.get(&key) {
                Some(Slot::Ready { used, .. }) if used.swap(false, Ordering::Relaxed) => {
                    self.queue.push_back(key);
                }
                _ => old = self.drop(&key),
            }
        }
        self.bytes += len;
        (Some(len), old.filter(|block| block.len() == len && Arc::strong_count(block) == 1))
    }

    fn is_spent(&self, key: &BlockKey) -> bool {
        matches!(self.slots.get(key), Some(Slot::Ready { spent, .. }) if spent.load(Ordering::Relaxed))
    }

    /// Gives back the block that was held, which its queue no longer names.
    fn drop(&mut self, key: &BlockKey) -> Option<Arc<[u8]>> {
        let Some(Slot::Ready { block, .. }) = self.slots.get(key) else { return None };
        let block = block.clone();
        self.slots.remove(key);
        self.bytes -= block.len();
        Some(block)
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
    keep: Keep,
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
        self.cache.land(self.key, self.keep, self.room, result.as_ref().ok());
        *self.flight.landed.lock() = Some(result);
        self.flight.bell.notify_all();
    }
}
