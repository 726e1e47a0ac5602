//! Subclusters: a 32nd of a cluster each, allocated or known to be zeros by itself. Source: the qcow2 specification,
//! "Extended L2 Entries".

use std::ops::Range;

use crate::entry::{COPIED, L2};
use crate::rw::ImageMut;
use crate::rw::tables::Entry;
use crate::{Error, Result};

/// Every subcluster allocated.
pub(super) const ALL_ALLOCATED: u64 = 0xffff_ffff;

/// What a cluster holds by subclusters; a compressed one holds all of them.
pub(super) struct Subclusters {
    pub(super) entry: Entry,
    pub(super) old: L2,
    allocated: u32,
    zero: u32,
}

/// The bits `first..last`.
fn bits(first: u64, last: u64) -> u32 {
    (((1u64 << last.min(32)) - 1) & !((1u64 << first.min(32)) - 1)) as u32
}

/// Runs of set bits, as ranges of subclusters.
fn runs(mask: u32) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0u64;
    std::iter::from_fn(move || {
        let rest = u64::from(mask) >> at;
        if rest == 0 {
            return None;
        }
        let first = at + u64::from(rest.trailing_zeros());
        let last = first + u64::from((!(u64::from(mask) >> first)).trailing_zeros());
        at = last;
        Some(first..last)
    })
}

impl ImageMut {
    pub(super) fn subclusters(&mut self, index: u64) -> Result<Subclusters> {
        let entry = self.entry(index)?;
        let old = self.decode(index, entry)?;
        let (allocated, zero) = (entry.sub as u32, (entry.sub >> 32) as u32);
        let wrong = match old {
            _ if allocated & zero != 0 => Some("has subclusters that are allocated and zero"),
            L2::Compressed { .. } if entry.sub != 0 => Some("is compressed and has subclusters"),
            L2::Unallocated if allocated != 0 => Some("has an allocated subcluster without a cluster"),
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(self.damaged(format!("guest cluster {index} {wrong}")));
        }
        let allocated = if matches!(old, L2::Compressed { .. }) { u32::MAX } else { allocated };
        Ok(Subclusters { entry, old, allocated, zero })
    }

    /// Writes a part of a cluster: subclusters that are written in part, and those that move with the cluster, are
    /// filled with what they show.
    pub(super) fn write_subclusters(&mut self, index: u64, within: u64, bytes: &[u8]) -> Result<()> {
        let size = self.header.cluster_size() / 32;
        let end = within + bytes.len() as u64;
        let touched = bits(within / size, end.div_ceil(size));
        let full = bits(within.div_ceil(size), end / size);
        let now = self.subclusters(index)?;
        let kept = match now.old {
            L2::Data(host) if self.exclusive(index, now.entry, host)? => Some(host),
            _ => None,
        };
        if let Some(host) = kept
            && touched & !now.allocated == 0
        {
            if now.entry.word & COPIED == 0 {
                self.set_entry(index, Entry { word: now.entry.word | COPIED, ..now.entry })?;
            }
            return self.put(bytes, host + within);
        }
        let stays = if kept.is_some() { 0 } else { now.allocated };
        let written = touched | stays;
        let mut whole = vec![0u8; self.header.cluster_size() as usize];
        self.read_subclusters(index, &now, written & !full, &mut whole)?;
        whole[within as usize..end as usize].copy_from_slice(bytes);
        let host = match kept {
            Some(host) => host,
            None => {
                let host = self.new_cluster(index)?;
                self.free(now.old);
                host
            }
        };
        for run in runs(written) {
            let (from, to) = (run.start * size, run.end * size);
            self.put(&whole[from as usize..to as usize], host + from)?;
        }
        let (allocated, zero) = (now.allocated | touched, now.zero & !touched);
        let sub = u64::from(allocated) | u64::from(zero) << 32;
        self.set_entry(index, Entry { word: host | COPIED, sub })
    }

    /// Reads what the subclusters of `mask` show into their places in `whole`, which holds zeros.
    fn read_subclusters(&self, index: u64, now: &Subclusters, mask: u32, whole: &mut [u8]) -> Result<()> {
        if mask == 0 {
            return Ok(());
        }
        let size = self.header.cluster_size() / 32;
        if matches!(now.old, L2::Compressed { .. }) {
            return self.read_old(index, now.old, whole);
        }
        for run in runs(mask & now.allocated) {
            let L2::Data(host) = now.old else { break };
            let part = &mut whole[(run.start * size) as usize..(run.end * size) as usize];
            let at = host + run.start * size;
            let doing = || format!("reading {} bytes at {at}", part.len());
            let doing = doing();
            self.data.read_at(part, at).map_err(|e| Error::io(self.data.path(), doing, e))?;
        }
        if let Some(backing) = &self.backing {
            for run in runs(mask & !now.allocated & !now.zero) {
                let part = &mut whole[(run.start * size) as usize..(run.end * size) as usize];
                backing.read(part, (index << self.header.cluster_bits) + run.start * size)?;
            }
        }
        Ok(())
    }

    /// Makes a range of one cluster read as zeros; a discard leaves a cluster alone that it does not cover.
    pub(super) fn clear_subclusters(
        &mut self,
        index: u64,
        range: Range<u64>,
        whole: bool,
        discard: bool,
    ) -> Result<()> {
        if discard && !whole {
            return Ok(());
        }
        let (cluster, size) = (self.header.cluster_size(), self.header.cluster_size() / 32);
        let start = index << self.header.cluster_bits;
        let (from, to) = (range.start - start, range.end - start);
        // What lies past the end of the disk is nobody's.
        let end = if range.end == self.header.size { cluster } else { to };
        let (first, last) = (from.div_ceil(size), end / size);
        if !whole {
            // Subclusters that are covered in part.
            let head = from..(first * size).min(to);
            let tail = (last * size).max(head.end)..to;
            for edge in [head, tail].into_iter().filter(|e| e.start < e.end) {
                let now = self.subclusters(index)?;
                let bit = bits(edge.start / size, edge.end.div_ceil(size));
                let shows_zeros = now.zero | if self.backing.is_none() { !now.allocated } else { 0 };
                if bit & !shows_zeros != 0 {
                    let zeros = vec![0u8; (edge.end - edge.start) as usize];
                    self.write_subclusters(index, edge.start, &zeros)?;
                }
            }
        }
        let mask = if whole { u32::MAX } else { bits(first, last) };
        let now = self.subclusters(index)?;
        let shows_zeros = now.zero | if self.backing.is_none() { !now.allocated } else { 0 };
        if mask & !shows_zeros == 0 && !discard {
            return Ok(());
        }
        if matches!(now.old, L2::Compressed { .. }) && mask != u32::MAX {
            let zeros = vec![0u8; (last.saturating_sub(first) * size) as usize];
            return if zeros.is_empty() {
                Ok(())
            } else {
                self.write_subclusters(index, first * size, &zeros)
            };
        }
        if self.header.external_data()
            && let L2::Data(host) = now.old
        {
            // The data file shows the guest's bytes by itself, so it must read as zeros too.
            for run in runs(mask & now.allocated) {
                let (at, len) = (host + run.start * size, (run.end - run.start) * size);
                self.data.punch(at, len).map_err(|e| Error::io(self.data.path(), "punching a hole", e))?;
            }
        }
        let allocated = now.allocated & !mask;
        let zero = if discard && self.backing.is_none() { now.zero & !mask } else { now.zero | mask };
        let word = if allocated == 0 { 0 } else { now.entry.word };
        let new = Entry { word, sub: u64::from(allocated) | u64::from(zero) << 32 };
        if new == now.entry {
            return Ok(());
        }
        if word == 0 {
            self.free(now.old);
        }
        self.set_entry(index, new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_are_found() {
        let of = |mask| runs(mask).map(|r| (r.start, r.end)).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(u32::MAX), [(0, 32)]);
        assert_eq!(of(0b1011_0001), [(0, 1), (4, 6), (7, 8)]);
        assert_eq!(of(0x8000_0000), [(31, 32)]);
        assert_eq!(bits(3, 3), 0);
        assert_eq!(bits(5, 3), 0);
        assert_eq!(bits(0, 32), u32::MAX);
        assert_eq!(bits(1, 3), 0b110);
    }
}
