//! Parts of a file that will be read, in that order, and how far that has come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::{BlockCache, BlockSource, FirstReads, SpanKind};

/// What a reader will most likely read, as known from before: workers decode it before the reader comes there.
pub struct Plan {
    source: Arc<dyn BlockSource>,
    cache: Arc<BlockCache>,
    parts: Arc<[u32]>,
    /// The next part to decode.
    next: AtomicUsize,
    /// Bytes that may still be decoded.
    room: AtomicU64,
    done: AtomicBool,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} parts", self.next.load(Ordering::Relaxed), self.parts.len())
    }
}

impl Plan {
    pub(crate) fn new(source: Arc<dyn BlockSource>, cache: Arc<BlockCache>, parts: Arc<[u32]>) -> Self {
        // Half of the cache is left to other readers.
        let room = AtomicU64::new(cache.stats_limit() / 2);
        Self { source, cache, parts, next: AtomicUsize::new(0), room, done: AtomicBool::new(false) }
    }

    /// Whether nothing is left to decode.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends it: nobody reads any more.
    pub fn end(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// The reader came to the part at `place`: what stands before it comes too late.
    pub fn reached(&self, place: usize) {
        self.next.fetch_max(place.saturating_add(1), Ordering::Relaxed);
    }

    /// Decodes the next part. False when there was nothing left.
    pub(crate) fn step(&self) -> bool {
        if self.is_done() {
            return false;
        }
        let place = self.next.fetch_add(1, Ordering::Relaxed);
        let Some(part) = self.parts.get(place) else {
            self.end();
            return false;
        };
        // Damage is the reader's to meet; the rest may be good.
        let _ = self.decode(u64::from(*part) << FirstReads::PART_BITS);
        if self.room.load(Ordering::Relaxed) == 0 {
            self.end();
        }
        true
    }

    fn decode(&self, start: u64) -> Option<()> {
        let end = start.saturating_add(1 << FirstReads::PART_BITS).min(self.source.len());
        let mut at = start;
        while at < end && !self.is_done() {
            let span = self.source.span(at).ok()?;
            match span.kind {
                SpanKind::Block(key) if !self.cache.holds(key) => {
                    let len = usize::try_from(span.len).ok()?;
                    self.cache.get(key, len, |out| self.source.read_block(span.start, key, out)).ok()?;
                    let spend = |room: u64| Some(room.saturating_sub(span.len));
                    let _ = self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend);
                }
                SpanKind::Direct => self.source.will_need(at, span.end().min(end) - at),
                _ => {}
            }
            at = span.end().max(at.saturating_add(1));
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::{BlockKey, FsError, FsResult, Problem, Span};

    const PART: u64 = 1 << FirstReads::PART_BITS;

    /// Decoded blocks of a part each, from part 1 on; the first part is zeros, part 2 is stored as it is,
    /// part 3 is damaged.
    #[derive(Default)]
    struct Blocks {
        decoded: Mutex<Vec<u64>>,
        needed: Mutex<Vec<(u64, u64)>>,
    }

    impl BlockSource for Blocks {
        fn len(&self) -> u64 {
            1000 * PART
        }
        fn span(&self, offset: u64) -> FsResult<Span> {
            let block = offset / PART;
            let kind = match block {
                0 => SpanKind::Zero,
                2 => SpanKind::Direct,
                _ => SpanKind::Block(BlockKey { image: 1, block }),
            };
            Ok(Span { start: block * PART, len: PART, kind })
        }
        fn read_direct(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
            Err(FsError::new(Problem::Bug, "nothing here is stored as it is"))
        }
        fn read_block(&self, start: u64, _: BlockKey, _: &mut [u8]) -> FsResult<()> {
            self.decoded.lock().push(start / PART);
            if start / PART == 3 { Err(FsError::damage("of the test")) } else { Ok(()) }
        }
        fn will_need(&self, offset: u64, len: u64) {
            self.needed.lock().push((offset / PART, len));
        }
    }

    fn plan(limit: usize, parts: &[u32]) -> (Plan, Arc<Blocks>, Arc<BlockCache>) {
        let (source, cache) = (Arc::new(Blocks::default()), BlockCache::new(limit));
        (Plan::new(source.clone(), cache.clone(), parts.into()), source, cache)
    }

    #[test]
    fn parts_are_decoded_in_order_and_what_cannot_be_is_left_out() {
        let (plan, source, cache) = plan(64 << 20, &[9, 0, 3, 5, 2, 9, u32::MAX, 1000, 999, 1]);
        while plan.step() {}
        assert_eq!(*source.decoded.lock(), [9, 3, 5, 999, 1]);
        assert_eq!(cache.stats().bytes as u64, 4 * PART);
        assert_eq!(*source.needed.lock(), [(2, PART)]);
        assert!(plan.is_done() && !plan.step());
    }

    #[test]
    fn no_more_than_half_of_the_cache_is_taken() {
        let parts: Vec<u32> = (4..904).collect();
        let (plan, _, cache) = plan(16 << 20, &parts);
        while plan.step() {}
        assert_eq!(cache.stats().bytes, 8 << 20);
    }

    #[test]
    fn what_the_reader_has_passed_is_not_decoded_and_a_plan_that_ended_does_nothing() {
        let parts: Vec<u32> = (100..200).collect();
        let (plan, source, _) = plan(64 << 20, &parts);
        plan.reached(89);
        assert!(plan.step());
        assert_eq!(*source.decoded.lock(), [190]);
        plan.end();
        assert!(!plan.step());
        assert_eq!(source.decoded.lock().len(), 1);
    }
}
