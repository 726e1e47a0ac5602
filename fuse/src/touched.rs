//! Which blocks were asked for lately: a block that is asked for once is not worth memory, one that is asked for again is.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::BlockKey;

/// A table of marks, one block a place; a newer block takes the place of an older one. May forget, and may confuse two
/// blocks once in four thousand million: it only decides what is kept.
pub(crate) struct Touched {
    marks: Box<[AtomicU32]>,
}

/// Places; with clusters of 64 KiB that is 4 GiB of the disk in 256 KiB of memory.
const PLACES: usize = 1 << 16;

impl std::fmt::Debug for Touched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Touched")
    }
}

impl Touched {
    pub fn new() -> Self {
        Self { marks: (0..PLACES).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Notes the block; whether it was noted before.
    pub fn again(&self, key: BlockKey) -> bool {
        let hash = (key.block ^ key.image.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let tag = hash as u32 | 1;
        match self.marks.get((hash >> 48) as usize % PLACES) {
            Some(mark) => mark.swap(tag, Ordering::Relaxed) == tag,
            None => false,
        }
    }
}
