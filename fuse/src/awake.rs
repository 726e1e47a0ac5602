//! Waits for the next request awake. A program that has one read in flight sends the next a few microseconds behind the answer, and
//! to be woken takes a sleeping thread longer than that: so for a program that does so a thread looks for a while before it sleeps.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest time without sleep. Over before a disk would have answered.
const LONGEST: Duration = Duration::from_micros(50);
/// Reads in a row that came in that time, and one at a time, before a thread stays awake for the next.
const ENOUGH: u32 = 16;

/// Whether and how long to stay awake: bounded by what the last reads did, so that a mount that is not read costs nothing, and one
/// that is read now and then next to nothing.
pub(crate) struct Awake {
    queue: OwnedFd,
    start: Instant,
    pace: Pace,
    /// On one processor the reader could not go on meanwhile.
    is_worth_it: bool,
    /// One thread does.
    taken: AtomicBool,
}

/// How reads come. Times are since the start.
#[derive(Default)]
struct Pace {
    /// When the last one was answered, in nanoseconds.
    answered: AtomicU64,
    in_a_row: AtomicU32,
}

impl Pace {
    /// A read came; `is_alone`: no other is being answered.
    fn came(&self, now: Duration, is_alone: bool) {
        let answered = Duration::from_nanos(self.answered.load(Ordering::Relaxed));
        if !is_alone || now.saturating_sub(answered) >= LONGEST {
            self.in_a_row.store(0, Ordering::Relaxed);
        } else if !self.is_steady() {
            self.in_a_row.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn answered(&self, now: Duration) {
        self.answered.store(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Whether the next is likely to come at once.
    fn is_steady(&self) -> bool {
        self.in_a_row.load(Ordering::Relaxed) >= ENOUGH
    }
}

impl Awake {
    /// For the queue that requests are read from.
    pub fn at(queue: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            queue: queue.try_clone_to_owned()?,
            start: Instant::now(),
            pace: Pace::default(),
            is_worth_it: thread::available_parallelism().is_ok_and(|cores| cores.get() > 1),
            taken: AtomicBool::new(false),
        })
    }

    /// A read came; `is_alone`: no other is being answered.
    pub fn came(&self, is_alone: bool) {
        self.pace.came(self.start.elapsed(), is_alone);
    }

    /// A read was answered: returns when the next request is there, or when it is time to sleep.
    pub fn wait(&self) {
        let began = self.start.elapsed();
        self.pace.answered(began);
        if !self.is_worth_it || !self.pace.is_steady() || self.taken.swap(true, Ordering::Acquire) {
            return;
        }
        let end = began.saturating_add(LONGEST);
        while !self.is_something_there() && self.start.elapsed() < end {
            std::hint::spin_loop();
        }
        self.taken.store(false, Ordering::Release);
    }

    /// Also when the mount is gone: the thread that reads next hears of it.
    fn is_something_there(&self) -> bool {
        let mut queue = [PollFd::new(&self.queue, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error is left to the thread that reads next, too.
        poll(&mut queue, Some(&at_once)).map_or(true, |ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use super::*;

    /// One read after another, each `gap` behind the answer to the last.
    fn reads(pace: &Pace, now: &mut Duration, gap: Duration, count: u32) {
        for _ in 0..count {
            *now += gap;
            pace.came(*now, true);
            *now += Duration::from_micros(10);
            pace.answered(*now);
        }
    }

    #[test]
    fn only_reads_that_come_one_at_a_time_and_at_once_are_waited_for_awake() {
        let (pace, mut now) = (Pace::default(), Duration::from_secs(1));
        let soon = Duration::from_micros(9);
        reads(&pace, &mut now, soon, ENOUGH);
        assert!(!pace.is_steady(), "the first of them came behind a pause");
        reads(&pace, &mut now, soon, 1);
        assert!(pace.is_steady());
        reads(&pace, &mut now, LONGEST, 1);
        assert!(!pace.is_steady(), "a pause ends it");
        reads(&pace, &mut now, soon, 2 * ENOUGH);
        assert!(pace.is_steady());
        pace.came(now, false);
        assert!(!pace.is_steady(), "a second reader ends it");
    }

    #[test]
    fn waiting_ends_when_a_request_comes_or_without_one() {
        let (ours, mut theirs) = io::pipe().unwrap();
        let awake = Awake::at(ours.as_fd()).unwrap();
        let mut now = Duration::ZERO;
        reads(&awake.pace, &mut now, Duration::ZERO, ENOUGH);
        assert!(!awake.is_something_there());
        awake.wait();
        theirs.write_all(b"x").unwrap();
        assert!(awake.is_something_there());
        awake.wait();
        drop(theirs);
        assert!(awake.is_something_there(), "the mount is gone");
        assert!(!awake.taken.load(Ordering::Relaxed));
    }
}
