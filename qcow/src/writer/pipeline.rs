//! Workers that take jobs in guest order, and a consumer that gets their results in the same order. There is no thread
//! of its own for that: whichever worker has made the next result hands it over, while its bytes are in the cache of its
//! processor, and with it those that wait behind. Memory: at most `4 * threads + 4` results wait at once.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::writer::{Control, Run, Source};
use crate::{Error, Result};

/// Guest bytes in one job (one cluster, if that is more) where work is done on them.
pub(crate) const JOB_BYTES: u64 = 1 << 20;
/// The same where they are only copied: they stay in a processor's cache between the read and the write.
pub(crate) const COPY_BYTES: u64 = 256 << 10;

struct State<T> {
    from: u64,
    taken: u64,
    consumed: u64,
    last: bool,
    results: BTreeMap<u64, Result<(T, Run)>>,
    stop: bool,
    failed: Option<Error>,
}

impl<T> State<T> {
    fn fail(&mut self, error: Error) {
        self.stop = true;
        self.failed.get_or_insert(error);
    }
}

/// How jobs are cut.
#[derive(Clone, Copy)]
pub(crate) struct Jobs {
    /// They begin at multiples of this, in bytes.
    pub(crate) cluster: u64,
    /// They are about so many bytes long.
    pub(crate) bytes: u64,
}

/// Has `make` called for every job by `control.threads` workers (each with its own `new_worker`; the calling thread is
/// one of them), and `take` with each result in guest order by one of them at a time.
pub(crate) fn run<S: Source, W, T: Send>(
    source: &S,
    jobs: Jobs,
    control: &Control,
    new_worker: impl Fn() -> Result<W> + Sync,
    make: impl Fn(&mut W, Run) -> Result<T> + Sync,
    take: impl FnMut(T) -> Result<()> + Send,
) -> Result<()> {
    let threads = control.threads.max(1);
    let pipe = Pipe {
        source,
        control,
        window: 4 * threads as u64 + 4,
        job_len: jobs.bytes.max(jobs.cluster) / jobs.cluster * jobs.cluster,
        begun: Instant::now(),
        state: Mutex::new(State {
            from: 0,
            taken: 0,
            consumed: 0,
            last: false,
            results: BTreeMap::new(),
            stop: false,
            failed: None,
        }),
        room: Condvar::new(),
        consumer: Mutex::new(Consumer { take, copied: 0 }),
    };
    let work = || match new_worker() {
        Ok(mut worker) => pipe.work(|run| make(&mut worker, run)),
        Err(e) => pipe.state.lock().fail(e),
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    match pipe.state.into_inner().failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

struct Consumer<F> {
    take: F,
    /// Guest bytes done, for the rate: holes and zeros are no work.
    copied: u64,
}

struct Pipe<'a, 'c, S, T, F> {
    source: &'a S,
    control: &'a Control<'c>,
    window: u64,
    job_len: u64,
    begun: Instant,
    state: Mutex<State<T>>,
    room: Condvar,
    consumer: Mutex<Consumer<F>>,
}

impl<S: Source, T: Send, F: FnMut(T) -> Result<()>> Pipe<'_, '_, S, T, F> {
    /// One worker, until there is nothing left to do.
    fn work(&self, mut make: impl FnMut(Run) -> Result<T>) {
        while let Some((seq, run)) = self.next_job() {
            let made = make(run).map(|t| (t, run));
            self.state.lock().results.insert(seq, made);
            self.consume();
        }
        self.room.notify_all();
    }

    fn next_job(&self) -> Option<(u64, Run)> {
        let mut s = self.state.lock();
        while !s.stop && !s.last && s.taken >= s.consumed + self.window {
            self.room.wait(&mut s);
        }
        if self.control.cancel.load(Ordering::Relaxed) {
            s.fail(Error::Cancelled);
        }
        if s.stop || s.last {
            return None;
        }
        let run = match self.source.next(s.from) {
            Ok(Some(run)) if run.len > 0 && run.start >= s.from => run,
            Ok(Some(run)) => {
                let what = format!("a source went backwards, to {}", run.start);
                s.fail(Error::out_of_range(std::path::Path::new("source"), what));
                return None;
            }
            Ok(None) => {
                s.last = true;
                return None;
            }
            Err(e) => {
                s.fail(e);
                return None;
            }
        };
        // Zeros cost nothing, so a run of them is one job unless it is very long.
        let most = if run.zero { self.job_len.saturating_mul(1024) } else { self.job_len };
        let run = Run { len: run.len.min(most), ..run };
        s.from = run.start + run.len;
        s.taken += 1;
        Some((s.taken - 1, run))
    }

    /// Hands over what is ready, in order, unless another worker does so.
    fn consume(&self) {
        while let Some(mut consumer) = self.consumer.try_lock() {
            while let Some(next) = self.next_result() {
                let done = next.and_then(|(t, run)| {
                    (consumer.take)(t)?;
                    (self.control.progress)(run.start + run.len);
                    consumer.copied += if run.zero { 0 } else { run.len };
                    self.control.pace(self.begun, consumer.copied)
                });
                if let Err(e) = done {
                    self.state.lock().fail(e);
                    self.room.notify_all();
                }
            }
            drop(consumer);
            // Another's result may have come after the last look and before the lock was free.
            let s = self.state.lock();
            if s.stop || !s.results.contains_key(&s.consumed) {
                return;
            }
        }
    }

    fn next_result(&self) -> Option<Result<(T, Run)>> {
        let mut s = self.state.lock();
        if s.stop {
            return None;
        }
        if self.control.cancel.load(Ordering::Relaxed) {
            s.fail(Error::Cancelled);
            return None;
        }
        let seq = s.consumed;
        let result = s.results.remove(&seq)?;
        s.consumed += 1;
        // Those who wait for room are woken for several jobs at once, not for each.
        if s.taken - s.consumed <= self.window / 2 {
            self.room.notify_all();
        }
        Some(result)
    }
}
