//! The bits of a bitmap as its table has them.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::{BITS_MAX, Bitmap, bits_at, list};
use crate::entry::OFFSET_MASK;
use crate::storage::read_exact;
use crate::{Error, Header, Result, Storage};

/// The bits of a bitmap: parts of one cluster each, by their number; a part that is missing is all zeros.
pub(super) type Parts = BTreeMap<u64, Vec<u8>>;

/// The clusters that a range of bytes touches.
pub(super) fn clusters(offset: u64, len: u64, header: &Header) -> Range<u64> {
    let bits = header.cluster_bits;
    offset >> bits..offset.saturating_add(len).div_ceil(1 << bits)
}

impl Bitmap {
    /// How many bits it has.
    pub(super) fn bits(&self, header: &Header) -> u64 {
        header.size.div_ceil(self.granularity)
    }

    /// Entries that its table needs.
    pub(super) fn entries(&self, header: &Header) -> u64 {
        self.bits(header).div_ceil(8).div_ceil(header.cluster_size())
    }

    fn table(&self, storage: &dyn Storage) -> Result<Vec<u64>> {
        let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        let bytes = u64::from(self.table_size) * 8;
        if self.table_offset.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(Error::damaged(
                storage.path(),
                format!(
                    "the table of bitmap {:?} at {:#x} lies outside the file",
                    self.name, self.table_offset
                ),
            ));
        }
        let mut table = vec![0u8; bytes as usize];
        read_exact(storage, &mut table, self.table_offset, "a bitmap's table")?;
        Ok(table.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    /// What its table and bits occupy.
    pub(super) fn clusters(&self, storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
        let table = self.table(storage)?;
        let bits = table.iter().map(|e| (e & OFFSET_MASK) >> header.cluster_bits).filter(|c| *c != 0);
        Ok(clusters(self.table_offset, u64::from(self.table_size) * 8, header).chain(bits).collect())
    }

    /// Hands the parts that are not all zeros to `each`, in order.
    fn each_part(
        &self,
        storage: &dyn Storage,
        header: &Header,
        each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        if self.bits(header) > BITS_MAX {
            return Err(Error::unsupported(
                storage.path(),
                format!("bitmap {:?} has more than the {BITS_MAX} bits that QEMU allows", self.name),
            ));
        }
        let cluster = header.cluster_size();
        let mut bytes = vec![0u8; cluster as usize];
        let mut seen = HashSet::new();
        for (number, entry) in (0..self.entries(header)).zip(self.table(storage)?) {
            let damaged =
                |why: String| Error::damaged(storage.path(), format!("bitmap {:?}: {why}", self.name));
            let offset = bits_at(entry, header).map_err(damaged)?;
            bytes.fill(if entry & 1 != 0 { 0xff } else { 0 });
            if offset != 0 {
                if !seen.insert(offset) {
                    return Err(damaged(format!("its bits at {offset:#x} are used twice")));
                }
                read_exact(storage, &mut bytes, offset, "a bitmap")?;
            }
            if bytes.iter().any(|b| *b != 0) {
                each(number, &bytes)?;
            }
        }
        Ok(())
    }

    pub(super) fn parts(&self, storage: &dyn Storage, header: &Header) -> Result<Parts> {
        let mut parts = Parts::new();
        self.each_part(storage, header, &mut |number, bytes| {
            parts.insert(number, bytes.to_vec());
            Ok(())
        })?;
        Ok(parts)
    }

    /// Hands the ranges of the guest's disk (bytes) that it marks to `each`, in order, none touching the next.
    pub(super) fn each_range(
        &self,
        storage: &dyn Storage,
        header: &Header,
        each: &mut dyn FnMut(Range<u64>),
    ) -> Result<()> {
        let mut last: Range<u64> = 0..0;
        let mut mark = |from: u64, bits: u64| {
            let start = from.saturating_mul(self.granularity).min(header.size);
            let end = (from + bits).saturating_mul(self.granularity).min(header.size);
            if start == last.end {
                last.end = end;
            } else if start < end {
                let range = std::mem::replace(&mut last, start..end);
                if !range.is_empty() {
                    each(range);
                }
            }
        };
        let per_part = header.cluster_size() * 8;
        self.each_part(storage, header, &mut |number, bytes| {
            for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
                let first = number * per_part + at as u64 * 8;
                if *byte == 0xff {
                    mark(first, 8);
                    continue;
                }
                for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                    mark(first + bit, 1);
                }
            }
            Ok(())
        })?;
        if !last.is_empty() {
            each(last);
        }
        Ok(())
    }
}

/// The bitmap of this name, which can be trusted.
pub(super) fn usable(storage: &dyn Storage, name: &str) -> Result<Bitmap> {
    let found = list(storage)?.into_iter().find(|b| b.name == name);
    let found = found
        .ok_or_else(|| Error::unsupported(storage.path(), format!("it has no bitmap named {name:?}")))?;
    found.trusted(storage).map(|()| found)
}

/// The ranges of the guest's disk (bytes) that a bitmap of the image marks, in order. One that is in use is refused.
pub fn dirty(storage: &dyn Storage, name: &str) -> Result<Vec<Range<u64>>> {
    let header = Header::parse(storage)?;
    let mut found = Vec::new();
    usable(storage, name)?.each_range(storage, &header, &mut |range| found.push(range))?;
    Ok(found)
}
