//! The read engine: a file over a block source and the shared cache.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::ahead::Place;
use crate::cache::{Flight, Found};
use crate::{
    BlockCache, BlockKey, BlockSource, File, FsError, FsResult, Plan, Problem, ReadAhead, Span, SpanKind,
};

/// A file over a [`BlockSource`]: zeros and stored bytes go straight into the reader's buffer, decoded blocks through
/// the cache.
pub struct BlockFile {
    source: Arc<dyn BlockSource>,
    cache: Arc<BlockCache>,
    ahead: Arc<ReadAhead>,
    reader: Arc<Place>,
    /// Reads in a row that went on there.
    streak: AtomicU32,
    /// From where and up to where decoding was asked for.
    asked_from: AtomicU64,
    asked: AtomicU64,
    /// What will be read, where that is known.
    plan: OnceLock<Arc<Plan>>,
}

/// Parallel readahead of the kernel arrives a little out of order. Bytes.
const NEAR: u64 = 2 << 20;
/// Reads in a row that make a reader sequential.
const SEQUENTIAL: u32 = 3;
/// How far ahead is decoded, at most. Bytes.
const WINDOW: u64 = 4 << 20;

/// A block that another thread decodes, for a part of a read.
struct Coming {
    flight: Arc<Flight>,
    /// Where in the block the part begins, and whether it reaches the block's end.
    from: usize,
    to_end: bool,
    key: BlockKey,
}

impl BlockFile {
    /// A file; `cache` and `ahead` are shared by all.
    pub fn new(source: Arc<dyn BlockSource>, cache: Arc<BlockCache>, ahead: Arc<ReadAhead>) -> Self {
        Self {
            source,
            cache,
            ahead,
            reader: Arc::default(),
            streak: AtomicU32::new(0),
            asked_from: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            plan: OnceLock::new(),
        }
    }

    /// Tells that these parts of the file ([`crate::FirstReads::PART_BITS`]) will be read, in this order, and that the reader is
    /// at the one at `place`: those behind it are decoded before they are asked for, as far as half of the cache reaches. Once for a
    /// file; the first plan stays.
    pub fn foresee(&self, parts: Arc<[u32]>, place: usize) -> Arc<Plan> {
        let mut is_new = false;
        let plan = self.plan.get_or_init(|| {
            is_new = true;
            let plan = Plan::new(self.source.clone(), self.cache.clone(), parts);
            // Before anyone follows it: what the reader has passed is not decoded.
            plan.reached(place);
            Arc::new(plan)
        });
        if is_new {
            self.ahead.follow(plan);
        }
        plan.clone()
    }

    /// Fills `buf`, or says which block has to be waited for.
    fn fill(&self, at: u64, span: &Span, buf: &mut [u8]) -> FsResult<Option<Coming>> {
        let key = match span.kind {
            SpanKind::Block(key) => key,
            SpanKind::Zero => {
                buf.fill(0);
                return Ok(None);
            }
            SpanKind::Direct => {
                self.source.read_direct(at, buf)?;
                return Ok(None);
            }
        };
        let len = usize::try_from(span.len).map_err(|_| bad_span(at))?;
        let from = usize::try_from(at - span.start).map_err(|_| bad_span(at))?;
        let to_end = from.saturating_add(buf.len()) == len;
        let decode = |out: &mut [u8]| self.source.read_block(span.start, key, out);
        let block = match self.cache.find(key, to_end) {
            Some(Found::Held(block)) => block,
            Some(Found::Coming(flight)) => return Ok(Some(Coming { flight, from, key, to_end })),
            // A boot's plan: others are about to decode it.
            None if self.plan.get().is_some_and(|plan| !plan.is_done()) => {
                self.cache.get(key, len, decode)?
            }
            // Small reads in sequence.
            None if buf.len() < len && self.is_in_sequence(span.start) => {
                self.cache.get_for_sequence(key, len, || true, decode)?.ok_or_else(|| bad_span(at))?
            }
            // The first time only as much as is asked for is decoded, and nothing is kept.
            None if !self.cache.is_wanted(key, len) => {
                self.source.read_part(span.start, key, len, from, buf)?;
                return Ok(None);
            }
            None => self.cache.get(key, len, decode)?,
        };
        copy_part(&block, from, buf).ok_or_else(|| bad_span(at))?;
        Ok(None)
    }

    /// Whether decoding it ahead was asked for.
    fn is_in_sequence(&self, start: u64) -> bool {
        (self.asked_from.load(Ordering::Relaxed)..self.asked.load(Ordering::Relaxed)).contains(&start)
    }

    /// Sees whether reads come one after the other, and has the next blocks decoded if they do.
    fn look_ahead(&self, offset: u64, len: usize) {
        let end = offset.saturating_add(len as u64);
        let expected = self.reader.expected.load(Ordering::Relaxed);
        let near = offset.saturating_add(NEAR) >= expected && offset <= expected.saturating_add(NEAR);
        if !near {
            self.reader.jumps.fetch_add(1, Ordering::Relaxed);
            self.reader.expected.store(end, Ordering::Relaxed);
            self.asked.store(end, Ordering::Relaxed);
            self.asked_from.store(end, Ordering::Relaxed);
            self.streak.store(0, Ordering::Relaxed);
            return;
        }
        self.reader.expected.fetch_max(end, Ordering::Relaxed);
        // Small reads all over a small file are near too: only those that go on count.
        if offset < expected && end <= expected {
            return;
        }
        let streak = self.streak.fetch_add(1, Ordering::Relaxed);
        if streak < SEQUENTIAL || !self.ahead.has_room() {
            return;
        }
        let window = WINDOW.min(self.cache.stats_limit() / 8);
        let to = end.saturating_add(window).min(self.source.len());
        let from = self.asked.load(Ordering::Relaxed).max(end);
        // Half a window at a time: asking for every block would cost a lock each.
        if to.saturating_sub(from) >= window / 2 || to == self.source.len() {
            if from > self.asked.load(Ordering::Relaxed) {
                self.asked_from.store(from, Ordering::Relaxed);
            }
            // Noted first: the reader may be there before the workers.
            self.asked.store(to, Ordering::Relaxed);
            let taken = self.ahead.ask(&self.source, &self.cache, &self.reader, from, to);
            self.asked.store(taken, Ordering::Relaxed);
        }
    }
}

impl Drop for BlockFile {
    fn drop(&mut self) {
        if let Some(plan) = self.plan.get() {
            plan.end();
        }
    }
}

impl File for BlockFile {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.source.len());
        if end.is_none() {
            return Err(FsError::new(Problem::Invalid, "a read past the end"));
        }
        let _reader = self.ahead.reader();
        self.look_ahead(offset, buf.len());
        let mut at = offset;
        let mut rest = buf;
        // Behind a block that another thread decodes may be some that nobody does yet.
        let mut waiting = Vec::new();
        while !rest.is_empty() {
            let span = self.source.span(at)?;
            let left = span.end().saturating_sub(at);
            if span.start > at || left == 0 {
                return Err(bad_span(at));
            }
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (part, later) = std::mem::take(&mut rest).split_at_mut(now);
            if let Some(coming) = self.fill(at, &span, part)? {
                waiting.push((coming, part));
            }
            at += now as u64;
            rest = later;
        }
        for (coming, part) in waiting {
            copy_part(&coming.flight.wait()?, coming.from, part).ok_or_else(|| bad_span(offset))?;
            if coming.to_end {
                self.cache.spend(coming.key);
            }
        }
        Ok(())
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.source.lock()
    }

    fn waits(&self) -> bool {
        self.source.waits()
    }

    fn replied(&self) {
        if self.ahead.is_idle() {
            self.source.replied();
        }
    }

    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        self.source.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        self.source.next_hole(offset)
    }
}

/// None where the block does not reach so far.
fn copy_part(block: &[u8], from: usize, into: &mut [u8]) -> Option<()> {
    into.copy_from_slice(block.get(from..from.saturating_add(into.len()))?);
    Some(())
}

fn bad_span(at: u64) -> FsError {
    FsError::new(Problem::Bug, format!("the map of the file makes no sense at byte {at}"))
}
