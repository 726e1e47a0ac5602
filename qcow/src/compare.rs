//! Whether two disks show the same bytes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::chain::ExtentKind;
use crate::rw::Backing;
use crate::{Chain, Control, Error, PageBuf, Result};

/// Guest bytes that a worker takes at a time.
const STEP: u64 = 2 << 20;
/// Guest bytes that are read and compared at once: both sides' stay in the processor's cache.
const READ: u64 = 128 << 10;

/// The first place in which two disks differ, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// They show different bytes. A disk reads as zeros past its end.
    Content {
        /// Where the first such byte lies.
        offset: u64,
    },
    /// One holds something of its own here, the other nothing at all (looked for only if asked).
    Allocation {
        /// Where the first such byte lies.
        offset: u64,
    },
}

impl Difference {
    /// Where it begins, in bytes.
    pub fn offset(self) -> u64 {
        let (Difference::Content { offset } | Difference::Allocation { offset }) = self;
        offset
    }
}

/// Finds the first difference between two disks; the shorter one is taken to end in zeros. With `allocation`, a range
/// that only one of the chains says anything of is a difference too. What both read from the same place of the same
/// file, or know to be zeros, is not read.
pub fn compare(a: &Chain, b: &Chain, allocation: bool, control: &Control) -> Result<Option<Difference>> {
    let size = a.size().max(b.size());
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let found: Mutex<Option<Difference>> = Mutex::new(None);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let work = || {
        let mut buffers = (PageBuf::default(), PageBuf::default());
        while !stop.load(Ordering::Relaxed) {
            let from = next.fetch_add(STEP, Ordering::Relaxed);
            // What lies behind a difference that is known already cannot be the first one.
            if from >= size || found.lock().is_some_and(|d| d.offset() < from) {
                return;
            }
            let to = size.min(from.saturating_add(STEP));
            let result = if control.cancel.load(Ordering::Relaxed) {
                Err(Error::Cancelled)
            } else {
                part(a, b, from..to, allocation, &mut buffers)
            };
            match result {
                Ok(None) => {}
                Ok(Some(new)) => {
                    let mut first = found.lock();
                    if first.is_none_or(|d| new.offset() < d.offset()) {
                        *first = Some(new);
                    }
                }
                Err(e) => {
                    failed.lock().get_or_insert(e);
                    stop.store(true, Ordering::Relaxed);
                }
            }
            (control.progress)(done.fetch_add(to - from, Ordering::Relaxed) + to - from);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..control.threads.max(1) {
            scope.spawn(work);
        }
    });
    match failed.into_inner() {
        Some(e) => Err(e),
        None => Ok(found.into_inner()),
    }
}

/// What one side shows at a place, and how far that holds.
struct Side {
    len: u64,
    zero: bool,
    allocated: bool,
    place: Option<((u64, u64), u64)>,
}

fn side(chain: &Chain, at: u64, end: u64) -> Result<Side> {
    if at >= chain.size() {
        return Ok(Side { len: end - at, zero: true, allocated: false, place: None });
    }
    let extent = chain.extent_at(at)?;
    let (zero, allocated) = match extent.kind {
        ExtentKind::Absent => (true, false),
        ExtentKind::Zero { layer } => (true, layer.is_some()),
        ExtentKind::Data { .. } | ExtentKind::Compressed { .. } => (false, true),
    };
    let place = chain.place(&extent);
    Ok(Side { len: extent.len.min(end - at), zero, allocated, place })
}

fn part(
    a: &Chain,
    b: &Chain,
    range: std::ops::Range<u64>,
    allocation: bool,
    buffers: &mut (PageBuf, PageBuf),
) -> Result<Option<Difference>> {
    let mut at = range.start;
    while at < range.end {
        let (left, right) = (side(a, at, range.end)?, side(b, at, range.end)?);
        let len = left.len.min(right.len);
        if allocation && left.allocated != right.allocated {
            return Ok(Some(Difference::Allocation { offset: at }));
        }
        let same = left.zero && right.zero || left.place.is_some() && left.place == right.place;
        let len = if same { len } else { len.min(READ) };
        if !same {
            for (chain, side, buf) in [(a, &left, &mut buffers.0), (b, &right, &mut buffers.1)] {
                buf.set_len(len as usize);
                if side.zero {
                    buf.fill(0);
                } else {
                    Backing::read(chain, buf, at)?;
                }
            }
            if *buffers.0 != *buffers.1 {
                let first = buffers.0.iter().zip(&*buffers.1).take_while(|(x, y)| x == y).count();
                return Ok(Some(Difference::Content { offset: at + first as u64 }));
            }
        }
        at += len;
    }
    Ok(None)
}
