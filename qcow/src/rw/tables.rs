//! L1 and L2 tables in memory, and the order in which they reach the disk.

use crate::entry::{COPIED, L2, OFFSET_MASK};
use crate::rw::ImageMut;
use crate::storage::read_exact;
use crate::{Error, Result};

/// L2 tables are kept in memory up to so many bytes.
const CACHE_BYTES: usize = 32 << 20;

/// An L2 table in memory.
pub(super) struct Table {
    pub(super) offset: u64,
    /// One word an entry, two with subclusters.
    pub(super) words: Vec<u64>,
    pub(super) dirty: bool,
}

/// An L2 entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(super) word: u64,
    /// Subclusters: allocated in the low half, zeros in the high one. 0 where the image has none.
    pub(super) sub: u64,
}

impl ImageMut {
    pub(super) fn tables_full(&self) -> bool {
        self.tables.len() > 1 && self.tables.len() << self.header.cluster_bits > CACHE_BYTES
    }

    fn split(&self, index: u64) -> (usize, usize) {
        let entries = self.header.l2_entries();
        ((index / entries) as usize, (index % entries) as usize)
    }

    /// The L1 entry over a guest cluster.
    pub(crate) fn l1_entry(&self, index: u64) -> Result<u64> {
        let (number, _) = self.split(index);
        self.l1
            .get(number)
            .copied()
            .ok_or_else(|| self.damaged(format!("the L1 table has no entry for guest cluster {index}")))
    }

    fn load(&mut self, number: usize, l1: u64) -> Result<()> {
        if self.tables.contains_key(&number) {
            return Ok(());
        }
        let offset = l1 & OFFSET_MASK;
        if !offset.is_multiple_of(self.header.cluster_size()) {
            return Err(
                self.damaged(format!("L1 entry {number} points to {offset:#x}, which is not aligned"))
            );
        }
        let mut bytes = vec![0u8; self.header.cluster_size() as usize];
        read_exact(&*self.storage, &mut bytes, offset, "an L2 table")?;
        let words = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
        self.tables.insert(number, Table { offset, words, dirty: false });
        Ok(())
    }

    /// The L2 entry of a guest cluster, 0 where there is no table.
    pub(crate) fn entry(&mut self, index: u64) -> Result<Entry> {
        let l1 = self.l1_entry(index)?;
        if l1 & OFFSET_MASK == 0 {
            return Ok(Entry::default());
        }
        let (number, at) = self.split(index);
        self.load(number, l1)?;
        let words = self.tables.get(&number).map_or(&[][..], |t| &t.words);
        let word = |i: usize| words.get(i).copied().unwrap_or(0);
        Ok(if self.header.extended_l2() {
            Entry { word: word(2 * at), sub: word(2 * at + 1) }
        } else {
            Entry { word: word(at), sub: 0 }
        })
    }

    pub(crate) fn decode(&self, index: u64, entry: Entry) -> Result<L2> {
        L2::decode(entry.word, &self.header)
            .map_err(|why| self.damaged(format!("the L2 entry of guest cluster {index}: {why}")))
    }

    /// Changes an L2 entry in memory. A table that is missing is made; one that a snapshot shares is copied.
    pub(super) fn set_entry(&mut self, index: u64, entry: Entry) -> Result<()> {
        let step = (self.header.l2_entry_size() / 8) as usize;
        let l1 = self.l1_entry(index)?;
        let (number, at) = self.split(index);
        let old = l1 & OFFSET_MASK;
        if old == 0 {
            let offset = self.new_metadata(1)?;
            let words = vec![0; (self.header.cluster_size() / 8) as usize];
            self.tables.insert(number, Table { offset, words, dirty: true });
            self.set_l1(number, offset | COPIED);
        } else {
            self.load(number, l1)?;
            if l1 & COPIED == 0 {
                let cluster = old >> self.header.cluster_bits;
                if self.refcounts.get(cluster)? == 1 {
                    self.set_l1(number, l1 | COPIED);
                } else {
                    let offset = self.new_metadata(1)?;
                    if let Some(table) = self.tables.get_mut(&number) {
                        table.offset = offset;
                        // What the other owner of the table sees is shared too.
                        for word in table.words.iter_mut().step_by(step) {
                            *word &= !COPIED;
                        }
                    }
                    self.frees.push(cluster);
                    self.set_l1(number, offset | COPIED);
                }
            }
        }
        if let Some(table) = self.tables.get_mut(&number) {
            if let Some(to) = table.words.get_mut(at * step..(at + 1) * step) {
                to.copy_from_slice(&[entry.word, entry.sub][..step]);
            }
            table.dirty = true;
        }
        Ok(())
    }

    fn set_l1(&mut self, number: usize, entry: u64) {
        if let Some(to) = self.l1.get_mut(number) {
            *to = entry;
            self.l1_dirty.insert(number);
        }
    }

    /// Allocates clusters in a row; their offset.
    fn allocate(&mut self, count: u64) -> Result<u64> {
        let mut own = Vec::new();
        let first = self.refcounts.allocate(count, &mut own);
        for (cluster, used) in own {
            if used {
                self.meta.insert(cluster);
            } else {
                self.meta.remove(&cluster);
            }
        }
        let first = first?;
        for cluster in first..first + count {
            if self.meta.contains(&cluster) {
                return Err(self.damaged(format!(
                    "cluster {cluster} holds metadata, but its refcount is 0: repair it with `qemu-img check -r all`"
                )));
            }
        }
        Ok(first << self.header.cluster_bits)
    }

    pub(super) fn new_metadata(&mut self, count: u64) -> Result<u64> {
        let offset = self.allocate(count)?;
        let first = offset >> self.header.cluster_bits;
        self.meta.extend(first..first + count);
        Ok(offset)
    }

    /// A new host cluster for a guest cluster: in an external data file, the guest's own offset.
    pub(super) fn new_cluster(&mut self, index: u64) -> Result<u64> {
        if self.header.external_data() {
            return Ok(index << self.header.cluster_bits);
        }
        self.allocate(1)
    }

    /// Whether the active disk alone uses a host cluster, so that it may be overwritten.
    pub(super) fn exclusive(&mut self, index: u64, entry: Entry, host: u64) -> Result<bool> {
        if self.header.external_data() {
            return Ok(true);
        }
        let cluster = host >> self.header.cluster_bits;
        if self.meta.contains(&cluster) {
            return Err(self.damaged(format!(
                "guest cluster {index} lies at {host:#x}, where there is metadata: repair it with `qemu-img check -r all`"
            )));
        }
        if host >= self.file_len.max(self.refcounts.end().saturating_mul(self.header.cluster_size())) {
            return Err(
                self.damaged(format!("guest cluster {index} lies at {host:#x}, past the end of the file"))
            );
        }
        Ok(entry.word & COPIED != 0 || self.refcounts.get(cluster)? == 1)
    }

    /// Notes the host clusters of an entry that is being replaced; a later flush frees them.
    pub(super) fn free(&mut self, old: L2) {
        if self.header.external_data() {
            return;
        }
        let bits = self.header.cluster_bits;
        match old {
            L2::Unallocated | L2::Zero { allocated: None } => {}
            L2::Data(host) | L2::Zero { allocated: Some(host) } => self.frees.push(host >> bits),
            L2::Compressed { offset, max_len } => {
                self.frees.extend(offset >> bits..=(offset + max_len - 1) >> bits);
            }
        }
    }

    /// Makes everything written so far durable, and frees what is no longer used.
    pub fn flush(&mut self) -> Result<()> {
        if self.failed {
            return Err(Error::unsupported(
                self.storage.path(),
                "an earlier write failed, so what is in memory is not written: open the image anew",
            ));
        }
        let result = self.write_all();
        self.failed |= result.is_err();
        result
    }

    fn write_all(&mut self) -> Result<()> {
        self.refcounts.write()?;
        self.sync()?;
        let mut wrote = false;
        for table in self.tables.values_mut().filter(|t| t.dirty) {
            let bytes: Vec<u8> = table.words.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.storage
                .write_at(&bytes, table.offset)
                .map_err(|e| Error::io(self.storage.path(), "writing an L2 table", e))?;
            table.dirty = false;
            wrote = true;
        }
        if wrote {
            self.sync()?;
        }
        if !self.l1_dirty.is_empty() {
            for number in std::mem::take(&mut self.l1_dirty) {
                let entry = self.l1.get(number).copied().unwrap_or(0);
                self.storage
                    .write_at(&entry.to_be_bytes(), self.header.l1_offset + number as u64 * 8)
                    .map_err(|e| Error::io(self.storage.path(), "writing the L1 table", e))?;
            }
            self.sync()?;
        }
        if self.tables_full() {
            self.tables.clear();
        }
        self.release_all()
    }

    /// Frees what nothing durable uses any more.
    pub(super) fn release_all(&mut self) -> Result<()> {
        if self.frees.is_empty() {
            return Ok(());
        }
        let mut free = Vec::new();
        for cluster in std::mem::take(&mut self.frees) {
            if self.refcounts.release(cluster)? {
                self.meta.remove(&cluster);
                self.packed = self.packed.filter(|at| at >> self.header.cluster_bits != cluster);
                free.push(cluster);
            }
        }
        self.refcounts.write()?;
        self.sync()?;
        free.sort_unstable();
        for row in free.chunk_by(|a, b| a + 1 == *b) {
            let bits = self.header.cluster_bits;
            if let Some(first) = row.first() {
                self.storage
                    .punch(first << bits, (row.len() as u64) << bits)
                    .map_err(|e| Error::io(self.storage.path(), "punching a hole", e))?;
            }
        }
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        if self.header.external_data() {
            self.data.sync().map_err(|e| Error::io(self.data.path(), "syncing", e))?;
        }
        self.storage.sync().map_err(|e| Error::io(self.storage.path(), "syncing", e))
    }
}
