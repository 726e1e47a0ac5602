//! Decodes what a sequential reader will want next, on cores that have nothing else to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::pool::Pool;
use crate::{BlockCache, BlockSource, Plan, SpanKind};

/// Worker threads and a short queue of ranges to decode. What does not fit in the queue is left to the reader.
#[derive(Debug)]
pub struct ReadAhead {
    workers: Pool,
    cores: usize,
    reading: AtomicUsize,
    /// For what is foreseen.
    followers: Pool,
}

/// Where a sequential reader of one file is.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// Where it would go on.
    pub expected: AtomicU64,
    /// How often it went elsewhere.
    pub jumps: AtomicUsize,
}

/// Jobs that may wait. Few: an old one is of no use.
const QUEUE: usize = 64;
/// Bytes a job.
const STEP: u64 = 128 << 10;
const MOST_WORKERS: usize = 4;
/// Threads that follow plans: more than cores, because they wait for the disk most of the time, and a disk is as fast as it is
/// asked for much at once.
const FOLLOWERS: usize = 8;

impl ReadAhead {
    /// Workers that start when there is something to do: one fewer than cores, between one and four.
    pub fn start() -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = Pool::new("ahead", cores.saturating_sub(1).clamp(1, MOST_WORKERS));
        let followers = Pool::new("foresee", FOLLOWERS);
        Arc::new(Self { workers, cores, reading: AtomicUsize::new(0), followers })
    }

    /// Has a plan followed, after those before it.
    pub(crate) fn follow(&self, plan: &Arc<Plan>) {
        for _ in 0..FOLLOWERS {
            let plan = plan.clone();
            // Where there is no thread, reads are answered as if nothing had been foreseen.
            if self.followers.run(Box::new(move || while plan.step() {})).is_err() {
                return;
            }
        }
    }

    /// Counts a reader in for as long as the guard lives.
    pub(crate) fn reader(&self) -> Reader<'_> {
        self.reading.fetch_add(1, Ordering::Relaxed);
        Reader(self)
    }

    /// Whether nobody reads now.
    pub(crate) fn is_idle(&self) -> bool {
        self.reading.load(Ordering::Relaxed) == 0
    }

    /// Whether readers leave a core free.
    pub(crate) fn has_room(&self) -> bool {
        self.reading.load(Ordering::Relaxed) < self.cores
    }

    /// Asks for a range, less what the reader has come to by then; gives back up to where it was taken on.
    pub(crate) fn ask(
        &self,
        source: &Arc<dyn BlockSource>,
        cache: &Arc<BlockCache>,
        reader: &Arc<Place>,
        from: u64,
        to: u64,
    ) -> u64 {
        let jumps = reader.jumps.load(Ordering::Relaxed);
        let mut at = from;
        while at < to {
            let end = at.saturating_add(STEP).min(to);
            let (source, cache, reader) = (source.clone(), cache.clone(), reader.clone());
            // What the reader has come to it decodes itself, into its own buffer.
            let needed = move |start| {
                reader.jumps.load(Ordering::Relaxed) == jumps
                    && reader.expected.load(Ordering::Relaxed) <= start
            };
            let job = move || decode(&*source, &cache, needed, at, end);
            if self.workers.run_within(QUEUE, Box::new(job)).is_err() {
                break;
            }
            at = end;
        }
        at
    }
}

pub(crate) struct Reader<'a>(&'a ReadAhead);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Errors are the reader's to report: it will meet them itself.
fn decode(source: &dyn BlockSource, cache: &BlockCache, needed: impl Fn(u64) -> bool, from: u64, to: u64) {
    let end = to.min(source.len());
    let mut at = from;
    while at < end {
        let Ok(span) = source.span(at) else { return };
        if let SpanKind::Block(key) = span.kind {
            let Ok(len) = usize::try_from(span.len) else { return };
            let needed = || needed(span.start);
            let decode = |out: &mut [u8]| source.read_block(span.start, key, out);
            if needed() && !cache.holds(key) && cache.get_for_sequence(key, len, needed, decode).is_err() {
                return;
            }
        }
        at = span.end().max(at.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockFile, BlockKey, File as _, FsResult, Span};

    /// Nothing but blocks; counts those that it decodes.
    #[derive(Default)]
    struct Blocks(AtomicUsize);

    const BLOCK: u64 = 65536;
    const COUNT: u64 = 256;

    impl BlockSource for Blocks {
        fn len(&self) -> u64 {
            COUNT * BLOCK
        }

        fn span(&self, offset: u64) -> FsResult<Span> {
            let block = offset / BLOCK;
            let kind = SpanKind::Block(BlockKey { image: 1, block });
            Ok(Span { start: block * BLOCK, len: BLOCK, kind })
        }

        fn read_direct(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
            Ok(())
        }

        fn read_block(&self, _: u64, _: BlockKey, _: &mut [u8]) -> FsResult<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    /// Blocks that are decoded when eight are read one after the other while others read, too.
    fn decoded(others: usize) -> usize {
        let (source, ahead) = (Arc::new(Blocks::default()), ReadAhead::start());
        let others: Vec<_> = (0..others).map(|_| ahead.reader()).collect();
        let file = BlockFile::new(source.clone(), BlockCache::new(64 << 20), ahead.clone());
        for block in 0..8 {
            assert!(file.read(block * BLOCK, &mut [0; BLOCK as usize]).is_ok());
        }
        drop((others, file));
        // Ends when its workers have done what they took on.
        drop(Arc::into_inner(ahead));
        source.0.load(Ordering::Relaxed)
    }

    #[test]
    fn nothing_is_decoded_ahead_when_every_core_has_a_reader() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        assert_eq!(decoded(cores - 1), 8, "with the one that is counted");
        assert!(cores == 1 || decoded(0) > 8, "a core is free");
    }
}
