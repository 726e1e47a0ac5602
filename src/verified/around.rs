//! Reading around: a reader that jumps about waits for the disk at every jump. While it is alone, what lies around the
//! place that it had to wait for is brought into the page cache, so that it soon waits no more.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicUsize, Ordering};
use std::{io, iter};

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// One file that is read in jumps.
#[derive(Debug)]
pub struct Around {
    /// The windows that were asked for lately, one a place, as their number and one.
    asked: Box<[AtomicU32]>,
    /// Windows that may still be asked for: each costs one, and each read that finds its window there earns some.
    credit: AtomicI64,
    /// The file system can tell whether a read would wait.
    can_tell: AtomicBool,
}

/// Threads of this process that wait for a disk now.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Whether reads wait for a disk now.
pub fn is_anyone_waiting() -> bool {
    WAITING.load(Ordering::Relaxed) > 0
}

/// Reads what may have to be waited for.
fn wait_for(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    WAITING.fetch_add(1, Ordering::Relaxed);
    let result = file.read_exact_at(buf, offset);
    WAITING.fetch_sub(1, Ordering::Relaxed);
    result
}

/// What is brought in at once, as log2 of bytes: a disk takes little longer for it than for a cluster.
const WINDOW_BITS: u32 = 17;
/// Windows that are remembered: of 1 GiB.
const PLACES: usize = 1 << 13;
/// Windows that may be brought in without being of use: 256 MiB.
const START: i64 = 2048;
/// A window in so many must be of use.
const EARNED: i64 = 4;

impl Around {
    /// For a file that was just opened.
    pub fn new() -> Self {
        Self {
            asked: iter::repeat_with(|| AtomicU32::new(0)).take(PLACES).collect(),
            credit: AtomicI64::new(START),
            can_tell: AtomicBool::new(true),
        }
    }

    /// Fills `buf` from `offset`. True when the disk had to be waited for.
    pub fn read(&self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if !self.can_tell.load(Ordering::Relaxed) {
            return wait_for(file, offset, buf).map(|()| false);
        }
        let found = preadv2(file, &mut [io::IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT);
        let done = match found {
            Ok(done) => done,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // Network file systems cannot.
            Err(_) => {
                self.can_tell.store(false, Ordering::Relaxed);
                0
            }
        };
        if done == buf.len() {
            if self.place(offset).is_some_and(|(place, mark)| place.load(Ordering::Relaxed) == mark) {
                let credit = self.credit.load(Ordering::Relaxed);
                self.credit.store((credit + EARNED).min(START), Ordering::Relaxed);
            }
            return Ok(false);
        }
        let rest = buf.get_mut(done..).unwrap_or_default();
        wait_for(file, offset.saturating_add(done as u64), rest)?;
        Ok(self.can_tell.load(Ordering::Relaxed))
    }

    /// Has the system bring in what lies around `offset`, without waiting for it.
    pub fn bring_in(&self, file: &File, offset: u64) {
        let Some((place, mark)) = self.place(offset) else { return };
        if self.credit.load(Ordering::Relaxed) <= 0 || place.swap(mark, Ordering::Relaxed) == mark {
            return;
        }
        self.credit.fetch_sub(1, Ordering::Relaxed);
        let start = offset >> WINDOW_BITS << WINDOW_BITS;
        // Advice only: where it is not taken, reads wait as they did.
        let _ = rustix::fs::fadvise(file, start, NonZeroU64::new(1 << WINDOW_BITS), Advice::WillNeed);
    }

    /// Has the system bring in a range that is read soon, without waiting for it.
    pub fn will_need(&self, file: &File, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(file, offset, NonZeroU64::new(len), Advice::WillNeed);
    }

    fn place(&self, offset: u64) -> Option<(&AtomicU32, u32)> {
        let window = offset >> WINDOW_BITS;
        let mark = u32::try_from(window).ok()?.checked_add(1)?;
        Some((self.asked.get(window as usize % PLACES)?, mark))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|n| (n / 7) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn whatever_is_cached_the_right_bytes_are_read_and_the_end_is_an_error() {
        let (file, bytes) = file(1 << 20);
        let around = Around::new();
        for round in 0..2 {
            if round == 1 {
                file.as_file().sync_all().unwrap();
                rustix::fs::fadvise(file.as_file(), 0, None, Advice::DontNeed).unwrap();
            }
            for (at, len) in [(0, 4096), (5000, 100_000), (1 << 19, 1 << 19), (3, 1)] {
                let mut seen = vec![0; len];
                around.read(file.as_file(), at as u64, &mut seen).unwrap();
                assert!(seen == bytes[at..at + len]);
                around.bring_in(file.as_file(), at as u64);
            }
        }
        let mut seen = [0; 2];
        assert!(around.read(file.as_file(), (1 << 20) - 1, &mut seen).is_err());
    }

    #[test]
    fn a_window_is_brought_in_once_and_not_for_ever_when_it_is_of_no_use() {
        let (file, _) = file(4096);
        let around = Around::new();
        for _ in 0..3 {
            around.bring_in(file.as_file(), 100);
        }
        assert_eq!(around.credit.load(Ordering::Relaxed), START - 1);
        for window in 1..3 * START as u64 {
            around.bring_in(file.as_file(), window << WINDOW_BITS);
        }
        assert_eq!(around.credit.load(Ordering::Relaxed), 0);
        // A read that finds its window there earns some again.
        around.place(0).unwrap().0.store(1, Ordering::Relaxed);
        around.read(file.as_file(), 0, &mut [0; 10]).unwrap();
        assert_eq!(around.credit.load(Ordering::Relaxed), EARNED);
    }
}
