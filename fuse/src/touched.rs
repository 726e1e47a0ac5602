//! Which blocks were asked for lately: a block that is asked for once is not worth memory, one that is asked for again is, if it
//! would still have been held.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::BlockKey;

/// A table of marks, one block a place; a newer block takes the place of an older one. May forget, and may confuse two
/// blocks once in four thousand million: it only decides what is kept.
pub(crate) struct Touched {
    /// The block in the upper half, when it was asked for in the lower one.
    marks: Box<[AtomicU64]>,
    /// Bytes of blocks that were asked for so far, in [`UNIT`]s; begins anew after 16 TiB.
    clock: AtomicU32,
    /// How far back "lately" reaches, in the same.
    reach: u32,
}

/// Places; with clusters of 64 KiB that is 4 GiB of the disk in 512 KiB of memory.
const PLACES: usize = 1 << 16;
/// Bytes.
const UNIT: usize = 4096;

impl std::fmt::Debug for Touched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Touched")
    }
}

impl Touched {
    /// For a cache of `bytes`: what was asked for longer ago than so many bytes of other blocks would have been dropped from
    /// it meanwhile. To decode such a block whole would cost more than it ever brings.
    pub fn new(bytes: usize) -> Self {
        Self {
            marks: (0..PLACES).map(|_| AtomicU64::new(0)).collect(),
            clock: AtomicU32::new(0),
            reach: u32::try_from(bytes / UNIT).unwrap_or(u32::MAX),
        }
    }

    /// Notes a block of `len` bytes; whether it was noted lately.
    pub fn again(&self, key: BlockKey, len: usize) -> bool {
        let now = self.clock.fetch_add(len.div_ceil(UNIT) as u32, Ordering::Relaxed);
        let hash = (key.block ^ key.image.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let tag = u64::from(hash as u32 | 1);
        let Some(mark) = self.marks.get((hash >> 48) as usize % PLACES) else { return false };
        let was = mark.swap(tag << 32 | u64::from(now), Ordering::Relaxed);
        was >> 32 == tag && now.wrapping_sub(was as u32) <= self.reach
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lately_is_as_long_as_a_cache_would_have_held_it() {
        let len = 64 << 10;
        let block = |block| BlockKey { image: 7, block };
        for others in [0, 7, 8, 9, 1000] {
            let touched = Touched::new(8 * len);
            assert!(!touched.again(block(5), len));
            (100..100 + others).for_each(|other| assert!(!touched.again(block(other), len)));
            assert_eq!(touched.again(block(5), len), others < 8, "{others} others");
            assert!(touched.again(block(5), len));
        }
        let touched = Touched::new(usize::MAX);
        assert!(!touched.again(block(5), len) && touched.again(block(5), len));
    }

    #[test]
    fn the_clock_may_begin_anew() {
        let touched = Touched::new(1 << 20);
        touched.clock.store(u32::MAX - 3, Ordering::Relaxed);
        let key = BlockKey { image: 1, block: 1 };
        assert!(!touched.again(key, 64 << 10) && touched.again(key, 64 << 10));
    }
}
