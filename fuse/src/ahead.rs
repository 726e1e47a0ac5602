//! Decodes what a sequential reader will want next, on cores that have nothing else to do.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::pool::Pool;
use crate::{BlockCache, BlockSource, Plan, SpanKind};

/// Worker threads and a short queue of ranges to decode. What does not fit in the queue is left to the reader.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
    cores: usize,
    reading: AtomicUsize,
    /// For what is foreseen.
    followers: Pool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    bell: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Job {
    source: Arc<dyn BlockSource>,
    cache: Arc<BlockCache>,
    from: u64,
    to: u64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} jobs", self.queue.lock().jobs.len())
    }
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
    /// Starts the workers: one fewer than cores, between one and four.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let shared = Arc::new(Shared::default());
        for n in 0..cores.saturating_sub(1).clamp(1, MOST_WORKERS) {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("ahead-{n}")).spawn(move || work(&shared))?;
        }
        let followers = Pool::new("foresee", FOLLOWERS);
        Ok(Arc::new(Self { shared, cores, reading: AtomicUsize::new(0), followers }))
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

    /// Asks for a range; gives back up to where it was taken on.
    pub(crate) fn ask(
        &self,
        source: &Arc<dyn BlockSource>,
        cache: &Arc<BlockCache>,
        from: u64,
        to: u64,
    ) -> u64 {
        let mut at = from;
        {
            let mut queue = self.shared.queue.lock();
            while at < to && queue.jobs.len() < QUEUE {
                let end = at.saturating_add(STEP).min(to);
                let job = Job { source: source.clone(), cache: cache.clone(), from: at, to: end };
                queue.jobs.push_back(job);
                at = end;
            }
        }
        if at > from {
            self.shared.bell.notify_all();
        }
        at
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        queue.jobs.clear();
        drop(queue);
        self.shared.bell.notify_all();
    }
}

pub(crate) struct Reader<'a>(&'a ReadAhead);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Ordering::Relaxed);
    }
}

fn work(shared: &Shared) {
    loop {
        let job = {
            let mut queue = shared.queue.lock();
            loop {
                if queue.closed {
                    return;
                }
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None => shared.bell.wait(&mut queue),
                }
            }
        };
        // Errors are the reader's to report: it will meet them itself. A panic must not end the worker.
        if catch_unwind(AssertUnwindSafe(|| run(&job))).is_err() {
            tracing::error!("reading ahead panicked; the reader will report what is wrong");
        }
    }
}

fn run(job: &Job) {
    let end = job.to.min(job.source.len());
    let mut at = job.from;
    while at < end {
        let Ok(span) = job.source.span(at) else { return };
        if let SpanKind::Block(key) = span.kind
            && !job.cache.holds(key)
        {
            let Ok(len) = usize::try_from(span.len) else { return };
            if job.cache.get(key, len, |out| job.source.read_block(span.start, key, out)).is_err() {
                return;
            }
        }
        at = span.end().max(at.saturating_add(1));
    }
}
