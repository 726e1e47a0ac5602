//! What of a file is read first, and in which order: a guest that boots reads nearly the same each time.

use std::collections::HashSet;

/// The parts of a file that were read first, in order, each once.
#[derive(Debug, Default)]
pub struct FirstReads {
    order: Vec<u32>,
    seen: HashSet<u32>,
    /// Where a reader that goes on would read next.
    next: u64,
    jumps: usize,
}

impl FirstReads {
    /// Bytes of a part, as log2.
    pub const PART_BITS: u32 = 16;
    /// Most parts that are noted: 1 GiB.
    pub const MOST: usize = 1 << 14;
    /// A boot reads more than this.
    const LEAST: usize = 32;
    /// A boot jumps; who copies a disk goes on for a mebibyte at least, even when its reads arrive out of order.
    const PARTS_A_JUMP: usize = 12;

    /// Notes a read; calls `new` with each part that was not read before.
    pub fn note(&mut self, offset: u64, len: usize, mut new: impl FnMut(u32)) {
        let Some(last) = offset.checked_add((len as u64).saturating_sub(1)) else { return };
        let (first, last) = (offset >> Self::PART_BITS, last >> Self::PART_BITS);
        if first != self.next && first.checked_add(1) != Some(self.next) {
            self.jumps += 1;
        }
        self.next = last.saturating_add(1);
        for part in (first..=last).map_while(|part| u32::try_from(part).ok()) {
            if self.is_full() {
                return;
            }
            if self.seen.insert(part) {
                self.order.push(part);
                new(part);
            }
        }
    }

    /// Whether no more is noted.
    pub fn is_full(&self) -> bool {
        self.order.len() >= Self::MOST
    }

    /// The parts so far.
    pub fn parts(&self) -> &[u32] {
        &self.order
    }

    /// Whether a guest may have read so, and not a program that copies the disk or looks at its first bytes.
    pub fn look_like_a_boot(&self) -> bool {
        self.order.len() >= Self::LEAST && self.jumps.saturating_mul(Self::PARTS_A_JUMP) >= self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(reads: impl IntoIterator<Item = (u64, usize)>) -> (FirstReads, Vec<u32>) {
        let (mut first, mut new) = (FirstReads::default(), Vec::new());
        reads.into_iter().for_each(|(offset, len)| first.note(offset, len, |part| new.push(part)));
        (first, new)
    }

    #[test]
    fn parts_are_noted_in_order_and_once() {
        let (first, new) =
            noted([(0, 4096), (5 << 16, 1), ((5 << 16) - 1, 2), (100, 200_000), (u64::MAX, 9), (7, 0)]);
        assert_eq!(first.parts(), [0, 5, 4, 1, 2, 3]);
        assert_eq!(new, first.parts());
    }

    #[test]
    fn no_more_is_noted_than_fits() {
        let (first, _) = noted([(0, usize::MAX)]);
        assert!(first.is_full() && first.parts().len() == FirstReads::MOST);
    }

    #[test]
    fn a_boot_jumps_about_and_a_copy_does_not() {
        let scattered = |n: u64| (n * 7919 % 1009) << 18;
        assert!(noted((0..500).map(|n| (scattered(n), 32 << 10))).0.look_like_a_boot());
        // Some files are read as a whole, with the readahead of the guest.
        let files = (0..100u64).flat_map(|n| (0..4).map(move |m| (scattered(n) + (m << 17), 128 << 10)));
        assert!(noted(files).0.look_like_a_boot());
        assert!(!noted((0..20).map(|n| (scattered(n), 4096))).0.look_like_a_boot(), "too little");
        for size in [4096u64, 65536, 1 << 20] {
            let copy = (0..(64 << 20) / size).map(|n| (n * size, size as usize));
            assert!(!noted(copy).0.look_like_a_boot(), "{size}");
        }
        // Readahead by several threads at once.
        let mixed = (0..64u64).map(|n| ((n ^ 1) << 20, 1 << 20));
        assert!(!noted(mixed).0.look_like_a_boot());
    }
}
