//! A larger disk, and what must be said in the header before the first change.

use crate::create::{extensions, read_cluster_zero};
use crate::entry::{L1_MAX, OFFSET_MASK};
use crate::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_KNOWN, EXT_BITMAPS, incompatible};
use crate::rw::ImageMut;
use crate::rw::tables::Entry;
use crate::storage::read_exact;
use crate::{Error, Header, Result, Storage};

impl Header {
    /// Clusters (by index) of the active L1 table.
    pub(crate) fn l1_clusters(&self) -> std::ops::Range<u64> {
        let first = self.l1_offset >> self.cluster_bits;
        first..first + (u64::from(self.l1_size) * 8).div_ceil(self.cluster_size())
    }
}

/// The directory of persistent bitmaps as the header names it.
pub(crate) struct BitmapDirectory {
    pub(crate) count: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

impl BitmapDirectory {
    /// Reads the directory; `None` where there are no bitmaps, or none that count.
    pub(crate) fn read(storage: &dyn Storage, header: &Header) -> Result<Option<Self>> {
        if header.version < 3 || header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(None);
        }
        let zero = read_cluster_zero(storage, header)?;
        let Some(ext) = extensions(&zero, header).into_iter().find(|e| e.kind == EXT_BITMAPS) else {
            return Ok(None);
        };
        let data = zero.get(ext.data).filter(|d| d.len() >= 24);
        let damaged = |what: &str| Error::damaged(storage.path(), what);
        let data = data.ok_or_else(|| damaged("the bitmaps extension is too short"))?;
        let word = |at: usize| data[at..at + 8].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let (count, size, offset) = ((word(0) >> 32) as u32, word(8), word(16));
        if !(1..=65_535).contains(&count)
            || word(0) as u32 != 0
            || size > 64 << 20
            || !offset.is_multiple_of(header.cluster_size())
        {
            return Err(damaged("the bitmap directory's fields are out of range"));
        }
        let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        if offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(damaged("the bitmap directory lies outside the file"));
        }
        let mut bytes = vec![0u8; size as usize];
        read_exact(storage, &mut bytes, offset, "the bitmap directory")?;
        Ok(Some(Self { count, offset, bytes }))
    }

    /// Where each entry starts in `bytes`; the fixed part of each (24 bytes) is there.
    pub(crate) fn entries(&self, path: &std::path::Path) -> Result<Vec<usize>> {
        let mut starts = Vec::new();
        let mut at = 0usize;
        for _ in 0..self.count {
            let fixed = self.bytes.get(at..at + 24);
            let fixed = fixed.ok_or_else(|| Error::damaged(path, "the bitmap directory is too short"))?;
            let name = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
            let extra = u32::from_be_bytes([fixed[20], fixed[21], fixed[22], fixed[23]]) as usize;
            starts.push(at);
            at = at.saturating_add((24 + name).saturating_add(extra).next_multiple_of(8));
        }
        // An entry may end past the directory: that is for those to say who read it.
        if at < self.bytes.len() {
            return Err(Error::damaged(path, "the bitmap directory is longer than its entries"));
        }
        Ok(starts)
    }
}

/// Clears the autoclear bits that are not understood, and marks every bitmap as in use: nobody keeps them up to date
/// from here on, and a reader must not trust them. Durable on return.
pub(crate) fn mark_bitmaps(storage: &dyn Storage, header: &mut Header) -> Result<()> {
    if header.version < 3 {
        return Ok(());
    }
    let mut changed = false;
    if let Some(mut directory) = BitmapDirectory::read(storage, header)? {
        for at in directory.entries(storage.path())? {
            // Bit 0 of the flags, the last byte of the word at 12.
            changed |= directory.bytes[at + 15] & 1 == 0;
            directory.bytes[at + 15] |= 1;
        }
        if changed {
            storage
                .write_at(&directory.bytes, directory.offset)
                .map_err(|e| Error::io(storage.path(), "marking the bitmaps as in use", e))?;
        }
    }
    if header.autoclear & !AUTOCLEAR_KNOWN != 0 {
        let known = header.autoclear & AUTOCLEAR_KNOWN;
        storage
            .write_at(&known.to_be_bytes(), 88)
            .map_err(|e| Error::io(storage.path(), "writing the header", e))?;
        header.autoclear = known;
        changed = true;
    }
    if changed { storage.sync().map_err(|e| Error::io(storage.path(), "syncing", e)) } else { Ok(()) }
}

impl ImageMut {
    /// Makes the disk larger; the new part reads as zeros, also over a backing file that is longer. Flushes.
    pub fn grow(&mut self, new_size: u64) -> Result<()> {
        let old_size = self.header.size;
        if new_size < old_size {
            return Err(Error::unsupported(
                self.storage.path(),
                format!("the disk of {old_size} bytes cannot be made smaller ({new_size} bytes)"),
            ));
        }
        if new_size == old_size {
            return Ok(());
        }
        if self.header.incompatible & incompatible::DATA_FILE != 0 {
            let io = |e| Error::io(self.data.path(), "growing", e);
            if self.data.len().map_err(io)? < new_size {
                self.data.set_len(new_size).map_err(io)?;
            }
        }
        self.prepare(old_size, 0)?;
        self.flush()?;
        let mut grown = self.header.clone();
        grown.size = new_size;
        let needed = grown.l1_needed();
        if needed * 8 > L1_MAX {
            return Err(Error::unsupported(
                self.storage.path(),
                format!(
                    "a disk of {new_size} bytes is too large for its clusters of {} bytes",
                    grown.cluster_size()
                ),
            ));
        }
        if needed > u64::from(self.header.l1_size) {
            self.move_l1(needed)?;
        }
        // What comes into view is cleared while nobody sees it yet.
        let cluster = self.header.cluster_size();
        let shown = self.backing.as_ref().map_or(0, |b| b.size());
        let clear_to = old_size.next_multiple_of(cluster).max(shown).min(new_size);
        self.header.size = new_size;
        let cleared = self
            .clear_stale(clear_to, new_size)
            .and_then(|()| self.write_zeroes(old_size, clear_to.saturating_sub(old_size)))
            .and_then(|()| self.flush());
        if cleared.is_err() {
            self.failed = true;
            self.header.size = old_size;
        }
        cleared?;
        self.storage
            .write_at(&new_size.to_be_bytes(), 24)
            .map_err(|e| Error::io(self.storage.path(), "writing the header", e))?;
        self.sync()
    }

    /// Clears clusters that something lies in. Past a disk's end nothing should; a program that was cut while it made
    /// the disk smaller may have left it.
    fn clear_stale(&mut self, from: u64, to: u64) -> Result<()> {
        let (cluster, entries) = (self.header.cluster_size(), self.header.l2_entries());
        let mut index = from.div_ceil(cluster);
        while index < to.div_ceil(cluster) {
            if self.l1_entry(index)? & OFFSET_MASK == 0 {
                index = (index / entries + 1) * entries;
                continue;
            }
            if self.entry(index)? != Entry::default() {
                let start = index * cluster;
                self.write_zeroes(start, cluster.min(to - start))?;
            }
            index += 1;
        }
        Ok(())
    }

    /// Moves the L1 table to where it has room for `needed` entries.
    fn move_l1(&mut self, needed: u64) -> Result<()> {
        let cluster = self.header.cluster_size();
        let clusters = (needed * 8).div_ceil(cluster);
        let offset = self.new_metadata(clusters)?;
        self.l1.resize(needed as usize, 0);
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters * cluster) as usize, 0);
        self.refcounts.write()?;
        let io = |doing: &'static str| {
            let path = self.storage.path();
            move |e| Error::io(path, doing, e)
        };
        self.storage.write_at(&bytes, offset).map_err(io("writing the L1 table"))?;
        self.sync()?;
        // L1 size (36) and offset (40) in one write.
        let mut fields = [0u8; 12];
        fields[..4].copy_from_slice(&(needed as u32).to_be_bytes());
        fields[4..].copy_from_slice(&offset.to_be_bytes());
        self.storage.write_at(&fields, 36).map_err(io("writing the header"))?;
        self.sync()?;
        self.frees.extend(self.header.l1_clusters());
        self.header.l1_size = needed as u32;
        self.header.l1_offset = offset;
        self.release_all()
    }
}
