//! Memory that files are read into.

use std::ops::{Deref, DerefMut};

/// A size of pages that all usual machines have, in bytes.
pub(crate) const PAGE: usize = 4096;

/// Bytes that begin where a page of memory does. Reading a file out of the page cache copies pages; on some processors
/// (AMD's, measured) that takes five times as long where the target begins a few bytes further into a page than the source, which is
/// just what an allocator gives out that puts 16 bytes of its own before a large piece of memory.
///
/// ```
/// let mut buf = knib_qcow::PageBuf::default();
/// buf.set_len(1 << 20);
/// assert!(buf.len() == 1 << 20 && buf.as_ptr().addr() % 4096 == 0);
/// ```
#[derive(Default)]
pub struct PageBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuf {
    /// So many bytes; what they are is not said: zeros, or what they were before.
    pub fn set_len(&mut self, len: usize) {
        if self.bytes.len() - self.start < len {
            // The old memory goes back first.
            self.bytes = Vec::new();
            // Memory that is zero already, where the system gives it out anew, is not touched here.
            self.bytes = vec![0; len.saturating_add(PAGE)];
            self.start = self.bytes.as_ptr().align_offset(PAGE).min(PAGE);
        }
        self.len = len;
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_page_whatever_its_length_was() {
        let mut buf = PageBuf::default();
        assert!(buf.is_empty());
        for len in [1, 4096, 100, 1 << 20, 0, (1 << 20) + 1, 3 << 20] {
            buf.set_len(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr().addr() % PAGE, 0);
            buf.fill(7);
        }
        buf.set_len(1);
        assert_eq!(&*buf, [7]);
    }
}
