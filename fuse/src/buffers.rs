//! Buffers that are used again: the last one given back is the next one taken, so that few are in use and those that
//! are lie in the processor's cache, whichever thread works.

use parking_lot::Mutex;

static FREE: Mutex<Free> = Mutex::new(Free { buffers: Vec::new(), bytes: 0 });

/// Buffers begin where a page of memory does: out of the page cache files are read into them, which takes some processors
/// five times as long where the target begins a few bytes further into a page than the source. Bytes.
const PAGE: usize = 4096;
/// Longest that is kept: a megabyte, and an edge on both sides. Bytes.
const LONGEST: usize = (2 << 20) + 8192 + PAGE;
/// What is kept in all: about a long read for each thread that works at once. Bytes.
const MOST: usize = 16 << 20;

/// Buffers that nobody uses.
struct Free {
    buffers: Vec<Vec<u8>>,
    /// Of all of them.
    bytes: usize,
}

impl Free {
    fn take(&mut self) -> Vec<u8> {
        let buffer = self.buffers.pop().unwrap_or_default();
        self.bytes -= buffer.capacity();
        buffer
    }

    /// Gives back what is not kept: it is freed where nobody waits for this.
    fn give(&mut self, buffer: Vec<u8>) -> Option<Vec<u8>> {
        let bytes = buffer.capacity();
        if bytes > LONGEST || self.bytes + bytes > MOST {
            return Some(buffer);
        }
        self.bytes += bytes;
        self.buffers.push(buffer);
        None
    }
}

/// Calls `with` with a buffer of `len` bytes, whose content is whatever was there last.
pub fn with_buffer<T>(len: usize, with: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = FREE.lock().take();
    let whole = len.saturating_add(PAGE);
    if buffer.len() < whole {
        // Not more than that: twice as much would not be kept.
        buffer.reserve_exact(whole - buffer.len());
        buffer.resize(whole, 0);
    }
    let start = buffer.as_ptr().align_offset(PAGE).min(PAGE);
    let result = with(buffer.get_mut(start..start + len).unwrap_or_default());
    let surplus = FREE.lock().give(buffer);
    drop(surplus);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_as_long_as_asked_also_when_nested() {
        for len in [0, 1, 5000, LONGEST + 1, 3] {
            with_buffer(len, |outer| {
                outer.fill(1);
                with_buffer(len + 1, |inner| {
                    inner.fill(2);
                    assert_eq!(inner.len(), len + 1);
                });
                assert!(outer.len() == len && outer.iter().all(|b| *b == 1));
            });
        }
        assert!(FREE.lock().buffers.iter().all(|b| b.capacity() <= LONGEST));
    }

    #[test]
    fn what_is_kept_is_bounded_in_bytes() {
        let mut free = Free { buffers: Vec::new(), bytes: 0 };
        let freed = (0..64).filter_map(|_| free.give(vec![0; 2 << 20])).count();
        assert_eq!((freed, free.buffers.len(), free.bytes), (56, 8, MOST));
        assert_eq!((free.take().len(), free.bytes), (2 << 20, MOST - (2 << 20)));
        assert!(free.give(vec![0; LONGEST + 1]).is_some(), "longer than any read");
    }
}
