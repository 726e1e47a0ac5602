//! A new generation of an image's tables. Everything that changes is written where nothing lies yet: L2 tables, L1,
//! snapshot table, all refcounts. One write of less than a sector, in the header, switches from the old ones to the new
//! ones, so a cut at any moment leaves the image as it was or as it is to be.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::check::Counted;
use crate::counts::Counts;
use crate::entry::{COPIED, L1_MAX, L2, OFFSET_MASK};
use crate::header::incompatible;
use crate::refcount;
use crate::storage::read_exact;
use crate::{Error, Header, Image, Result, Storage};

/// The tables in the making.
pub(crate) struct Generation {
    storage: Arc<dyn Storage>,
    /// The header as it will be.
    pub(crate) header: Header,
    /// References as they will be.
    counts: Counts,
    /// What is in use now or will be.
    busy: Counts,
    old: Counts,
    /// Length of the file when it was checked, in bytes.
    checked_len: u64,
    /// The same now.
    len: u64,
    /// No cluster below is free.
    hint: u64,
    /// L2 tables of the active disk that lie at or past this offset move too.
    pub(crate) move_from: u64,
}

/// An image that is to be changed as a whole, read with nothing of it cached.
pub(crate) fn image(storage: &Arc<dyn Storage>) -> Result<Image> {
    Image::open_tables(storage.clone())
}

impl Generation {
    /// Starts from what a check counted. The old refcounts are not taken over.
    pub(crate) fn new(storage: Arc<dyn Storage>, header: Header, counted: Counted) -> Result<Self> {
        let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        let (bits, cluster) = (header.cluster_bits, header.cluster_size());
        let mut counts = counted.counts;
        let busy = counts.clone();
        counts.remove_bytes(
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) << bits,
            bits,
        );
        for offset in counted.blocks.into_iter().chain(counted.doubled).filter(|offset| *offset != 0) {
            counts.remove_bytes(offset, cluster, bits);
        }
        Ok(Self {
            storage,
            header,
            counts,
            old: busy.clone(),
            busy,
            checked_len: len,
            len,
            hint: 1,
            move_from: u64::MAX,
        })
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.storage.path()
    }
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }
    fn damaged(&self, what: String) -> Error {
        Error::damaged(self.storage.path(), what)
    }

    /// A place for `count` clusters in a row, each with one reference; its offset.
    pub(crate) fn place(&mut self, count: u64) -> Result<u64> {
        let mut first = self.hint;
        let mut at = first;
        while at < first + count {
            at += 1;
            if self.busy.get(at - 1) != 0 {
                first = at;
            }
        }
        if (first + count) << self.header.cluster_bits > OFFSET_MASK {
            return Err(Error::unsupported(self.storage.path(), "the image would grow past 64 PiB"));
        }
        for cluster in first..first + count {
            self.busy.add(cluster);
            self.counts.add(cluster);
        }
        if first == self.hint || count == 1 {
            self.hint = first + count;
        }
        Ok(first << self.header.cluster_bits)
    }

    /// Writes to a place of this generation, filled up to whole clusters.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8], what: &str) -> Result<()> {
        let padded = bytes.len().next_multiple_of(self.header.cluster_size() as usize);
        let mut whole = bytes.to_vec();
        whole.resize(padded, 0);
        self.storage
            .write_at(&whole, offset)
            .map_err(|e| Error::io(self.storage.path(), format!("writing {what} at {offset}"), e))?;
        self.len = self.len.max(offset + whole.len() as u64);
        Ok(())
    }

    /// Drops the references to a table of `len` bytes.
    pub(crate) fn drop_bytes(&mut self, offset: u64, len: u64) {
        self.counts.remove_bytes(offset, len, self.header.cluster_bits);
    }

    /// Reads an L1 table; its place was checked.
    pub(crate) fn read_l1(&self, offset: u64, size: u32) -> Result<Vec<u64>> {
        self.words(offset, u64::from(size), "an L1 table")
    }

    fn words(&self, offset: u64, count: u64, what: &str) -> Result<Vec<u64>> {
        let mut bytes = vec![0u8; (count * 8) as usize];
        read_exact(&*self.storage, &mut bytes, offset, what)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    /// The L2 table of an L1 entry, `None` where there is none that can be used.
    fn l2(&self, entry: u64) -> Result<Option<(u64, Vec<u64>)>> {
        let (offset, cluster) = (entry & OFFSET_MASK, self.header.cluster_size());
        let inside = offset.checked_add(cluster).is_some_and(|end| end <= self.len);
        if offset == 0 || !offset.is_multiple_of(cluster) || !inside {
            return Ok(None);
        }
        Ok(Some((offset, self.words(offset, cluster / 8, "an L2 table")?)))
    }

    /// Adds or drops a reference to everything that an L1 table leads to: L2 tables and data.
    pub(crate) fn refer(&mut self, l1: &[u64], add: bool) -> Result<()> {
        let cluster = self.header.cluster_size();
        for entry in l1 {
            let Some((offset, words)) = self.l2(*entry)? else { continue };
            self.change(offset, cluster, add);
            for word in words.iter().step_by((self.header.l2_entry_size() / 8) as usize) {
                self.refer_entry(*word, add);
            }
        }
        Ok(())
    }

    /// Adds or drops the references of one L2 entry.
    pub(crate) fn refer_entry(&mut self, word: u64, add: bool) {
        if word == 0 {
            return;
        }
        match L2::decode(word, &self.header) {
            // What lies outside the file was never counted.
            Ok(L2::Compressed { offset, max_len })
                if L2::compressed_is_inside(offset, max_len, self.checked_len, &self.header) =>
            {
                self.count(offset, max_len, add);
            }
            Ok(L2::Data(offset) | L2::Zero { allocated: Some(offset) }) if !self.header.external_data() => {
                self.change(offset, self.header.cluster_size(), add);
            }
            _ => {}
        }
    }

    fn change(&mut self, offset: u64, len: u64, add: bool) {
        // What lies outside the file was never counted.
        let end = self.len.next_multiple_of(self.header.cluster_size());
        if offset.checked_add(len).is_some_and(|e| e <= end) {
            self.count(offset, len, add);
        }
    }

    fn count(&mut self, offset: u64, len: u64, add: bool) {
        let bits = self.header.cluster_bits;
        if add {
            self.counts.add_bytes(offset, len, bits);
        } else {
            self.counts.remove_bytes(offset, len, bits);
        }
    }

    /// Makes `l1` the table of the active disk, with the copied flags that the new refcounts call for. Tables that
    /// change move. `replaces` says whether the header's present L1 table is given up (else a snapshot keeps it).
    pub(crate) fn activate(&mut self, mut l1: Vec<u64>, moved: bool, replaces: bool) -> Result<()> {
        let step = (self.header.l2_entry_size() / 8) as usize;
        let bits = self.header.cluster_bits;
        let mut changed = moved;
        for entry in &mut l1 {
            let Some((offset, mut words)) = self.l2(*entry)? else { continue };
            let mut rewritten = offset >= self.move_from;
            for word in words.iter_mut().step_by(step) {
                let copied = match L2::decode(*word, &self.header) {
                    Ok(L2::Compressed { .. }) => false,
                    // An external file has no refcounts: its clusters are always the disk's own.
                    Ok(L2::Data(_) | L2::Zero { allocated: Some(_) }) if self.header.external_data() => {
                        *word & COPIED != 0
                    }
                    Ok(L2::Data(host) | L2::Zero { allocated: Some(host) }) => {
                        self.counts.get(host >> bits) == 1
                    }
                    _ => *word & COPIED != 0,
                };
                let want = if copied { *word | COPIED } else { *word & !COPIED };
                rewritten |= want != *word;
                *word = want;
            }
            let mut at = offset;
            if rewritten {
                at = self.place(1)?;
                self.counts.remove(offset >> bits);
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
                self.write(at, &bytes, "an L2 table")?;
            }
            let copied = if self.counts.get(at >> bits) == 1 { COPIED } else { 0 };
            let new = (*entry & !(OFFSET_MASK | COPIED)) | at | copied;
            changed |= new != *entry;
            *entry = new;
        }
        if changed {
            self.put_l1(&l1, replaces)?;
        }
        Ok(())
    }

    fn put_l1(&mut self, l1: &[u64], replaces: bool) -> Result<()> {
        let len = l1.len() as u64 * 8;
        if len > L1_MAX {
            return Err(Error::unsupported(self.storage.path(), "the L1 table would be longer than 32 MiB"));
        }
        if replaces {
            self.drop_bytes(self.header.l1_offset, u64::from(self.header.l1_size) * 8);
        }
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = self.place(len.div_ceil(self.header.cluster_size()).max(1))?;
        self.write(offset, &bytes, "the L1 table")?;
        self.header.l1_offset = offset;
        self.header.l1_size = l1.len() as u32;
        Ok(())
    }

    /// Writes a copy of an L2 table of the active disk that was changed; its offset. The data that it no longer names
    /// is the caller's to drop.
    pub(crate) fn move_l2(&mut self, old: u64, words: &[u64]) -> Result<u64> {
        let at = self.place(1)?;
        self.drop_bytes(old, self.header.cluster_size());
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.write(at, &bytes, "an L2 table")?;
        Ok(at)
    }

    /// The L2 table of an L1 entry of the active disk.
    pub(crate) fn read_l2(&self, entry: u64) -> Result<Option<(u64, Vec<u64>)>> {
        self.l2(entry)
    }

    /// Writes the refcounts, switches, and gives the space back that is no longer used. Where the file may end.
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.put_refcounts()?;
        let io = |doing: &'static str| {
            let storage = self.storage.clone();
            move |e| Error::io(storage.path(), doing, e)
        };
        self.storage.sync().map_err(io("syncing"))?;
        let h = &self.header;
        let end = if h.version >= 3 { 104 } else { 72 };
        let mut fixed = vec![0u8; end];
        read_exact(&*self.storage, &mut fixed, 0, "the header")?;
        let mut put = |at: usize, bytes: &[u8]| fixed[at..at + bytes.len()].copy_from_slice(bytes);
        put(24, &h.size.to_be_bytes());
        put(36, &h.l1_size.to_be_bytes());
        put(40, &h.l1_offset.to_be_bytes());
        put(48, &h.refcount_table_offset.to_be_bytes());
        put(56, &h.refcount_table_clusters.to_be_bytes());
        put(60, &h.snapshot_count.to_be_bytes());
        put(64, &h.snapshots_offset.to_be_bytes());
        if h.version >= 3 {
            put(72, &(h.incompatible & !incompatible::DIRTY).to_be_bytes());
            put(80, &h.compatible.to_be_bytes());
            put(88, &(h.autoclear & crate::header::AUTOCLEAR_KNOWN).to_be_bytes());
            put(96, &h.refcount_order.to_be_bytes());
        }
        self.storage.write_at(&fixed, 0).map_err(io("writing the header"))?;
        self.storage.sync().map_err(io("syncing"))?;
        self.release()?;
        let last = self.counts.used().last().map_or(0, |(cluster, _)| cluster + 1);
        Ok(last << self.header.cluster_bits)
    }

    /// Punches what was in use and is free now.
    fn release(&self) -> Result<()> {
        let bits = self.header.cluster_bits;
        let free: Vec<u64> = self.old.used().map(|(c, _)| c).filter(|c| self.counts.get(*c) == 0).collect();
        for row in free.chunk_by(|a, b| a + 1 == *b) {
            if let Some(first) = row.first() {
                self.storage
                    .punch(first << bits, (row.len() as u64) << bits)
                    .map_err(|e| Error::io(self.storage.path(), "punching a hole", e))?;
            }
        }
        Ok(())
    }

    /// Places and writes refcount blocks and table for the new counts, their own included.
    fn put_refcounts(&mut self) -> Result<()> {
        let (bits, order) = (self.header.cluster_bits, self.header.refcount_order);
        let per_block = (self.header.cluster_size() * 8) >> order;
        let per_table = self.header.cluster_size() / 8;
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut table = (0u64, 0u64);
        loop {
            let mut missing: Vec<u64> = self.counts.used().map(|(c, _)| c / per_block).collect();
            missing.dedup();
            missing.retain(|number| !blocks.contains_key(number));
            for number in &missing {
                let offset = self.place(1)?;
                blocks.insert(*number, offset);
            }
            let entries = blocks.last_key_value().map_or(1, |(number, _)| number + 1);
            if entries > table.1 * per_table {
                self.drop_bytes(table.0, table.1 << bits);
                let clusters = (entries + 1).div_ceil(per_table);
                if clusters << bits > 8 << 20 {
                    return Err(Error::unsupported(
                        self.storage.path(),
                        "the refcount table would be longer than 8 MiB: use larger clusters",
                    ));
                }
                table = (self.place(clusters)?, clusters);
            } else if missing.is_empty() {
                break;
            }
        }
        let max = if order >= 5 { u64::from(u32::MAX) } else { (1 << (1u64 << order)) - 1 };
        let mut bytes = vec![0u8; self.header.cluster_size() as usize];
        let mut pointers = vec![0u8; (table.1 << bits) as usize];
        let mut current = None;
        let mut filled: Vec<(u64, Vec<u8>)> = Vec::new();
        for (cluster, count) in self.counts.used() {
            if u64::from(count) > max {
                return Err(Error::unsupported(
                    self.storage.path(),
                    format!(
                        "cluster {cluster} would have {count} references, more than refcounts of {} bits hold: amend refcount_bits first",
                        1u64 << order
                    ),
                ));
            }
            let number = cluster / per_block;
            if current.is_some_and(|c| c != number) {
                filled.push((current.unwrap_or(0), std::mem::replace(&mut bytes, vec![0u8; 1 << bits])));
            }
            current = Some(number);
            refcount::set(&mut bytes, order, (cluster % per_block) as usize, u64::from(count));
        }
        if let Some(number) = current {
            filled.push((number, bytes));
        }
        for (number, bytes) in filled {
            let Some(offset) = blocks.get(&number).copied() else {
                return Err(self.damaged(format!("refcount block {number} has no place")));
            };
            self.write(offset, &bytes, "a refcount block")?;
        }
        for (number, offset) in &blocks {
            let at = *number as usize * 8;
            pointers[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        }
        self.write(table.0, &pointers, "the refcount table")?;
        self.header.refcount_table_offset = table.0;
        self.header.refcount_table_clusters = table.1 as u32;
        Ok(())
    }
}
