//! Who answers reads. Few threads take requests from the kernel, so that none is woken for nothing; when all but the last
//! of them read and the disk is being waited for, that one hands its reads over to others, so that a disk is asked for
//! much at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::pool::{Job, Pool};

/// Threads that answer reads: those that take requests are counted, the others are started when there is work.
pub(crate) struct Workers {
    takers: usize,
    /// Takers that read now.
    reading: AtomicUsize,
    others: Pool,
}

impl Workers {
    /// For `threads` in all, at least one: two a core take requests, the others wait for disks.
    pub fn new(threads: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let takers = cores.saturating_mul(2).clamp(4, 16).min(threads.max(1));
        let others = Pool::new("reader", threads.saturating_sub(takers));
        Self { takers, reading: AtomicUsize::new(0), others }
    }

    /// Threads that take requests from the kernel.
    pub fn takers(&self) -> usize {
        self.takers
    }

    /// Counts a taker in that reads, for as long as the guard lives.
    pub fn reading(&self) -> Reading<'_> {
        let before = self.reading.fetch_add(1, Ordering::Relaxed);
        Reading { workers: self, is_alone: before == 0, is_last: before + 1 >= self.takers }
    }

    /// Has another thread do it; gives it back when there is none.
    pub fn hand_over(&self, job: Job) -> Result<(), Job> {
        self.others.run(job)
    }
}

pub(crate) struct Reading<'a> {
    workers: &'a Workers,
    is_alone: bool,
    is_last: bool,
}

impl Reading<'_> {
    /// Whether no other taker read when this one began.
    pub fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Ends it. Whether no other taker reads now.
    pub fn end(self) -> bool {
        let workers = self.workers;
        drop(self);
        workers.reading.load(Ordering::Relaxed) == 0
    }

    /// Whether every other taker reads too: while this one does, nobody takes requests.
    pub fn is_last(&self) -> bool {
        self.is_last
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.workers.reading.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_taker_is_told_and_one_thread_alone_hands_nothing_over() {
        let workers = Workers::new(1);
        assert_eq!(workers.takers(), 1);
        assert!(workers.reading().is_last());
        assert!(workers.hand_over(Box::new(|| {})).is_err());
        let workers = Workers::new(32);
        let all: Vec<_> = (0..workers.takers()).map(|_| workers.reading()).collect();
        assert!(all.iter().rev().skip(1).all(|r| !r.is_last()) && all.last().unwrap().is_last());
        assert!(workers.hand_over(Box::new(|| {})).is_ok());
    }
}
