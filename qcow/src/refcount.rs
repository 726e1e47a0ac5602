//! Refcounts of an image that is changed in place: counts of any width, allocation, growing blocks and table.
//! Source: the qcow2 specification, "Host cluster management".

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::storage::read_exact;
use crate::{Error, Header, Result, Storage};

/// Offset bits of an entry of the refcount table.
pub(crate) const BLOCK_MASK: u64 = !0x1ff;
/// Blocks kept in memory at most, in bytes, when they are clean.
const CACHE_BYTES: usize = 16 << 20;

/// Reads count number `index` of a block of `1 << order` bits each.
pub(crate) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let bit = index * width;
            let byte = block.get(bit / 8).copied().unwrap_or(0);
            u64::from(byte >> (bit % 8)) & ((1 << width) - 1)
        }
        // The usual width.
        4 => block.as_chunks::<2>().0.get(index).map_or(0, |b| u64::from(u16::from_be_bytes(*b))),
        _ => {
            let bytes = 1usize << (order - 3);
            let at = index * bytes;
            block.get(at..at + bytes).unwrap_or(&[]).iter().fold(0, |n, b| n << 8 | u64::from(*b))
        }
    }
}

/// Writes count number `index`; the value fits the width.
pub(crate) fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let bit = index * width;
            let mask = (((1u16 << width) - 1) as u8) << (bit % 8);
            if let Some(byte) = block.get_mut(bit / 8) {
                *byte = (*byte & !mask) | ((value as u8) << (bit % 8) & mask);
            }
        }
        _ => {
            let bytes = 1usize << (order - 3);
            let at = index * bytes;
            if let Some(to) = block.get_mut(at..at + bytes) {
                to.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
            }
        }
    }
}

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
}

/// The refcounts of one image. What is allocated is written by [`Refcounts::write`] before anything may point to it.
pub(crate) struct Refcounts {
    storage: Arc<dyn Storage>,
    order: u32,
    cluster_bits: u32,
    table_offset: u64,
    table: Vec<u64>,
    /// Table entries that are not on disk yet.
    table_dirty: BTreeSet<usize>,
    blocks: HashMap<usize, Block>,
    /// No cluster below is free.
    hint: u64,
    /// One past the last cluster that was allocated.
    end: u64,
}

impl Refcounts {
    pub(crate) fn open(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let mut bytes = vec![0u8; len as usize];
        read_exact(&*storage, &mut bytes, header.refcount_table_offset, "the refcount table")?;
        let table = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b) & BLOCK_MASK).collect();
        Ok(Self {
            storage,
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table_offset: header.refcount_table_offset,
            table,
            table_dirty: BTreeSet::new(),
            blocks: HashMap::new(),
            hint: 1,
            end: 0,
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Counts in a block.
    fn per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.order
    }
    fn damaged(&self, what: String) -> Error {
        Error::damaged(self.storage.path(), what)
    }
    fn io(&self, doing: &str, e: std::io::Error) -> Error {
        Error::io(self.storage.path(), doing, e)
    }
    fn place(&self, index: u64) -> (usize, usize) {
        ((index / self.per_block()) as usize, (index % self.per_block()) as usize)
    }

    /// Clusters (by index) that hold the table and the blocks.
    pub(crate) fn own_clusters(&self) -> Vec<u64> {
        let first = self.table_offset >> self.cluster_bits;
        let table = first..first + (self.table.len() as u64 * 8).div_ceil(self.cluster());
        let blocks = self.table.iter().filter(|b| **b != 0).map(|b| *b >> self.cluster_bits);
        table.chain(blocks).collect()
    }

    /// Loads a block that exists.
    fn block(&mut self, number: usize) -> Result<Option<&mut Block>> {
        let offset = self.table.get(number).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&number) {
            if !offset.is_multiple_of(self.cluster()) {
                return Err(self.damaged(format!("refcount block {number} lies at {offset:#x}, not aligned")));
            }
            if self.blocks.len() << self.cluster_bits > CACHE_BYTES {
                self.blocks.retain(|_, b| b.dirty);
            }
            let mut bytes = vec![0u8; self.cluster() as usize];
            read_exact(&*self.storage, &mut bytes, offset, "a refcount block")?;
            self.blocks.insert(number, Block { bytes, dirty: false });
        }
        Ok(self.blocks.get_mut(&number))
    }

    /// The refcount of a cluster.
    pub(crate) fn get(&mut self, index: u64) -> Result<u64> {
        let (number, at) = self.place(index);
        let order = self.order;
        Ok(self.block(number)?.map_or(0, |b| get(&b.bytes, order, at)))
    }

    fn set(&mut self, index: u64, value: u64) -> Result<()> {
        let (number, at) = self.place(index);
        let order = self.order;
        if let Some(block) = self.block(number)? {
            set(&mut block.bytes, order, at, value);
            block.dirty = true;
        }
        Ok(())
    }

    /// Takes one reference away; says whether the cluster is free now.
    pub(crate) fn release(&mut self, index: u64) -> Result<bool> {
        let count = self.get(index)?;
        if count == 0 {
            return Err(self.damaged(format!(
                "cluster {index} is used, but its refcount is 0: repair it with `qemu-img check -r all`"
            )));
        }
        self.set(index, count - 1)?;
        if count == 1 {
            self.hint = self.hint.min(index);
        }
        Ok(count == 1)
    }

    /// One past the last cluster that was allocated here; only clusters that were free before lie below unseen.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Adds a reference to a cluster that is in use; `false` when its width holds no more.
    pub(crate) fn add(&mut self, index: u64) -> Result<bool> {
        let count = self.get(index)?;
        let max = if self.order == 6 { u64::MAX } else { (1 << (1u64 << self.order)) - 1 };
        if count == 0 || count == max {
            return Ok(false);
        }
        self.set(index, count + 1)?;
        Ok(true)
    }

    /// Finds `count` free clusters in a row and gives each a refcount of 1; the index of the first. New blocks and
    /// tables that this needs are reported in `own` (true), and what they no longer use (false).
    pub(crate) fn allocate(&mut self, count: u64, own: &mut Vec<(u64, bool)>) -> Result<u64> {
        let mut first = self.hint;
        let mut at = first;
        while at < first + count {
            let (number, _) = self.place(at);
            if self.table.get(number).copied().unwrap_or(0) == 0 {
                self.add_block(at / self.per_block(), own)?;
            }
            if self.get(at)? == 0 {
                at += 1;
            } else {
                at += 1;
                first = at;
            }
        }
        if (first + count) << self.cluster_bits > crate::entry::OFFSET_MASK {
            return Err(Error::unsupported(self.storage.path(), "the image would grow past 64 PiB"));
        }
        for index in first..first + count {
            self.set(index, 1)?;
        }
        self.end = self.end.max(first + count);
        if count == 1 || first == self.hint {
            self.hint = first + count;
        }
        Ok(first)
    }

    /// Adds the block for region `number`, in which no cluster has a count yet: it lies in its own first cluster.
    fn add_block(&mut self, number: u64, own: &mut Vec<(u64, bool)>) -> Result<()> {
        if number >= self.table.len() as u64 {
            return self.grow_table(number, own);
        }
        let index = number * self.per_block();
        self.insert_block(number as usize, index);
        self.set(index, 1)?;
        own.push((index, true));
        Ok(())
    }

    fn insert_block(&mut self, number: usize, index: u64) {
        let bytes = vec![0u8; self.cluster() as usize];
        self.blocks.insert(number, Block { bytes, dirty: true });
        if let Some(entry) = self.table.get_mut(number) {
            *entry = index << self.cluster_bits;
            self.table_dirty.insert(number);
        }
    }

    /// Moves the table to region `number`, larger by half. There lie, in a row, the blocks for what is new and the
    /// table. The header is changed once all that is durable; then the old table is let go.
    fn grow_table(&mut self, number: u64, own: &mut Vec<(u64, bool)>) -> Result<()> {
        let old = (self.table_offset >> self.cluster_bits, self.table.len() as u64 * 8 / self.cluster());
        let mut blocks = 1;
        let (blocks, clusters) = loop {
            let entries = (number + blocks).max(self.table.len() as u64 * 3 / 2);
            let clusters = (entries * 8).div_ceil(self.cluster());
            let need = (blocks + clusters).div_ceil(self.per_block());
            if need <= blocks {
                break (blocks, clusters);
            }
            blocks = need;
        };
        if clusters << self.cluster_bits > 8 << 20 {
            return Err(Error::unsupported(
                self.storage.path(),
                "the refcount table would grow past 8 MiB: use larger clusters",
            ));
        }
        let start = number * self.per_block();
        self.table.resize((clusters * self.cluster() / 8) as usize, 0);
        for i in 0..blocks {
            self.insert_block((number + i) as usize, start + i);
        }
        for index in start..start + blocks + clusters {
            self.set(index, 1)?;
            own.push((index, true));
        }
        // Nothing points to the blocks or the new table before the header does.
        self.write_blocks()?;
        self.table_offset = (start + blocks) << self.cluster_bits;
        let bytes: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.storage
            .write_at(&bytes, self.table_offset)
            .map_err(|e| self.io("writing the refcount table", e))?;
        self.storage.sync().map_err(|e| self.io("syncing", e))?;
        self.table_dirty.clear();
        let mut fields = [0u8; 12];
        fields[..8].copy_from_slice(&self.table_offset.to_be_bytes());
        fields[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        self.storage.write_at(&fields, 48).map_err(|e| self.io("writing the header", e))?;
        self.storage.sync().map_err(|e| self.io("syncing", e))?;
        for index in old.0..old.0 + old.1 {
            self.release(index)?;
            own.push((index, false));
        }
        Ok(())
    }

    fn write_blocks(&mut self) -> Result<()> {
        for (number, block) in &mut self.blocks {
            if block.dirty {
                let offset = self.table.get(*number).copied().unwrap_or(0);
                self.storage
                    .write_at(&block.bytes, offset)
                    .map_err(|e| Error::io(self.storage.path(), "writing a refcount block", e))?;
                block.dirty = false;
            }
        }
        Ok(())
    }

    /// Writes what changed: blocks, then (once they are durable) the table's entries. Does not sync the last.
    pub(crate) fn write(&mut self) -> Result<()> {
        self.write_blocks()?;
        if self.table_dirty.is_empty() {
            return Ok(());
        }
        self.storage.sync().map_err(|e| self.io("syncing", e))?;
        for number in std::mem::take(&mut self.table_dirty) {
            let entry = self.table.get(number).copied().unwrap_or(0);
            self.storage
                .write_at(&entry.to_be_bytes(), self.table_offset + number as u64 * 8)
                .map_err(|e| self.io("writing the refcount table", e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0u8; 512];
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            let counts = (512 * 8) >> order;
            for i in 0..counts {
                set(&mut block, order, i, (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max);
            }
            for i in 0..counts {
                assert_eq!(
                    get(&block, order, i),
                    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max,
                    "width {} index {i}",
                    1 << order
                );
            }
        }
    }

    #[test]
    fn narrow_counts_start_at_the_low_bit() {
        let mut block = vec![0u8; 512];
        set(&mut block, 0, 1, 1);
        assert_eq!(block[0], 2);
        set(&mut block, 4, 1, 0x1234);
        assert_eq!(block[2..4], [0x12, 0x34]);
    }
}
