//! Buffers that are used again: the last one given back is the next one taken, so that few are in use and those that
//! are lie in the processor's cache, whichever thread works.

use parking_lot::Mutex;

static FREE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Longest that is kept: a megabyte, and an edge on both sides. Bytes.
const LONGEST: usize = (2 << 20) + 8192;
/// Most that are kept: about as many as threads work at once.
const MOST: usize = 16;

/// Calls `with` with a buffer of `len` bytes, whose content is whatever was there last.
pub fn with_buffer<T>(len: usize, with: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = FREE.lock().pop().unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = with(buffer.get_mut(..len).unwrap_or_default());
    if buffer.len() <= LONGEST {
        let mut free = FREE.lock();
        if free.len() < MOST {
            free.push(buffer);
        }
    }
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
        assert!(FREE.lock().iter().all(|b| b.len() <= LONGEST));
    }
}
