//! Changes an image in place. Data and refcounts are durable before the L2 entries that point to them, these before
//! the L1 entries, and only then is anything freed: a cut at any moment leaves at worst leaked clusters.

mod compressed;
mod content;
mod empty;
mod grow;
pub(crate) use compressed::compress_cluster;
pub(crate) use grow::{BitmapDirectory, mark_bitmaps};
mod preallocate;
mod sub;
mod tables;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::entry::{COPIED, L2, OFFSET_MASK};
use crate::header::incompatible;
use crate::refcount::Refcounts;
use crate::repair::{Repair, refuse_corrupt, repair};
use crate::storage::read_exact;
use crate::{Access, Chain, Control, Error, Gate, Header, Implicit, Result, Storage, codec};
pub(crate) use content::{Content, Shown};
use tables::{Entry, Table};

pub use preallocate::Preallocation;

/// What an image shows where it holds nothing itself.
pub trait Backing: Send + Sync {
    /// Reads the guest's bytes at `offset`; zeros past the end.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Size in bytes.
    fn size(&self) -> u64;
}

/// An image whose writer left its refcounts for later and did not come back to them.
fn repair_dirty(storage: &Arc<dyn Storage>) -> Result<()> {
    let cancel = AtomicBool::new(false);
    let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let repaired = repair(storage.clone(), Repair::All, &control)?;
    match repaired.after.messages.first().filter(|_| repaired.after.corruptions != 0) {
        Some(message) => Err(Error::damaged(
            storage.path(),
            format!("it is marked dirty, and its refcounts cannot be repaired: {message}"),
        )),
        None => Ok(()),
    }
}

impl Backing for Chain {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = Chain::size(self).saturating_sub(offset).min(buf.len() as u64) as usize;
        let (front, past) = buf.split_at_mut(inside);
        past.fill(0);
        self.read_at(front, offset)
    }
    fn size(&self) -> u64 {
        Chain::size(self)
    }
}

/// An image open for writing. What was written is kept by [`ImageMut::flush`]; dropping it without leaves leaks.
pub struct ImageMut {
    storage: Arc<dyn Storage>,
    data: Arc<dyn Storage>,
    header: Header,
    backing: Option<Box<dyn Backing>>,
    l1: Vec<u64>,
    l1_dirty: BTreeSet<usize>,
    tables: HashMap<usize, Table>,
    refcounts: Refcounts,
    /// Length of the file when it was opened, in bytes.
    file_len: u64,
    /// Clusters that hold metadata: guest data is never written there, whatever an entry says.
    meta: HashSet<u64>,
    /// References to take away once nothing durable makes use of them.
    frees: Vec<u64>,
    /// Where the next compressed cluster goes, in a cluster that others began.
    packed: Option<u64>,
    begun: bool,
    /// A write failed: what is in memory may point to clusters without data.
    failed: bool,
}

impl ImageMut {
    /// Opens an image of version 2 or 3 for writing, and through `gate` what its header names: its backing chain to
    /// read, its data file to write. The storage must allow writes. A dirty image is repaired first, one that is
    /// marked corrupt refused.
    pub fn open(storage: Arc<dyn Storage>, gate: &dyn Gate) -> Result<Self> {
        let header = Header::parse(&*storage)?;
        let backing: Option<Box<dyn Backing>> = match &header.backing {
            Some(name) => {
                let (below, format) =
                    gate.open(storage.path(), Implicit::Backing, name, header.backing_format.as_deref())?;
                Some(Box::new(Chain::from_storage(below, format, gate)?))
            }
            None => None,
        };
        Self::open_over(storage, gate, backing)
    }

    /// The same with a backing reader of the caller's instead of what the header names.
    pub fn open_over(
        storage: Arc<dyn Storage>,
        gate: &dyn Gate,
        backing: Option<Box<dyn Backing>>,
    ) -> Result<Self> {
        let mut header = Header::parse(&*storage)?;
        let path = storage.path();
        refuse_corrupt(&*storage, &header)?;
        if header.incompatible & incompatible::DIRTY != 0 {
            repair_dirty(&storage)?;
            header = Header::parse(&*storage)?;
        }
        let data = match (&header.data_file, header.external_data()) {
            (Some(name), true) => gate.open_data(path, name, Access::ReadWrite)?,
            (None, true) => {
                return Err(Error::unsupported(path, "its external data file is not named in the header"));
            }
            _ => storage.clone(),
        };
        let mut bytes = vec![0u8; header.l1_size as usize * 8];
        read_exact(&*storage, &mut bytes, header.l1_offset, "the L1 table")?;
        let l1: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|c| u64::from_be_bytes(*c)).collect();
        let refcounts = Refcounts::open(storage.clone(), &header)?;
        let file_len = storage.len().map_err(|e| Error::io(path, "asking for the length", e))?;
        let mut meta: HashSet<u64> = refcounts.own_clusters().into_iter().collect();
        meta.insert(0);
        meta.extend(header.l1_clusters());
        meta.extend(l1.iter().map(|e| (e & OFFSET_MASK) >> header.cluster_bits));
        Ok(Self {
            storage,
            data,
            header,
            backing,
            l1,
            l1_dirty: BTreeSet::new(),
            tables: HashMap::new(),
            refcounts,
            file_len,
            meta,
            frees: Vec::new(),
            packed: None,
            begun: false,
            failed: false,
        })
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The file with the guest's data: the image's own, or the external data file.
    pub(crate) fn data_storage(&self) -> &Arc<dyn Storage> {
        &self.data
    }

    /// The path, for messages.
    pub(crate) fn path(&self) -> &Path {
        self.storage.path()
    }

    pub(crate) fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// The header as it is now.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Writes guest bytes at `offset`.
    pub fn write_at(&mut self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(&buf, offset, buf.len() as u64)
    }

    /// Writes what `chain` shows at `offset` there; what is plain data in a file is copied by the system. None of it may
    /// lie in this image.
    pub(crate) fn copy_at(&mut self, chain: &Chain, offset: u64, len: u64) -> Result<()> {
        self.write(&Shown { chain, offset }, offset, len)
    }

    fn write(&mut self, content: &dyn Content, offset: u64, len: u64) -> Result<()> {
        self.prepare(offset, len)?;
        let result = self.write_clusters(content, offset, len);
        self.failed |= result.is_err();
        result
    }

    fn write_clusters(&mut self, content: &dyn Content, offset: u64, len: u64) -> Result<()> {
        let cluster = self.header.cluster_size();
        // Clusters that lie in a row on the host go out in one write: (host offset, part of the content).
        let mut row: (u64, Range<u64>) = (0, 0..0);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let within = at % cluster;
            let n = (cluster - within).min(len - done);
            if n == cluster {
                let host = self.place_whole(at >> self.header.cluster_bits)?;
                if host == row.0 + (row.1.end - row.1.start) && row.1.end == done {
                    row.1.end += n;
                } else {
                    content.put(&*self.data, row.1.clone(), row.0)?;
                    row = (host, done..done + n);
                }
            } else {
                let bytes = content.bytes(done..done + n)?;
                self.write_part(at >> self.header.cluster_bits, within, &bytes)?;
            }
            done += n;
        }
        content.put(&*self.data, row.1.clone(), row.0)
    }

    fn put(&self, bytes: &[u8], host: u64) -> Result<()> {
        content::write(&*self.data, bytes, host)
    }

    /// Gives a cluster that will be written whole its place on the host.
    fn place_whole(&mut self, index: u64) -> Result<u64> {
        let (entry, old) = if self.header.extended_l2() {
            // A bitmap that contradicts itself is damage for those too who write all of the cluster, as for QEMU.
            let now = self.subclusters(index)?;
            (now.entry, now.old)
        } else {
            let entry = self.entry(index)?;
            (entry, self.decode(index, entry)?)
        };
        let host = match old {
            L2::Data(host) | L2::Zero { allocated: Some(host) } if self.exclusive(index, entry, host)? => {
                host
            }
            _ => self.new_cluster(index)?,
        };
        let sub = if self.header.extended_l2() { sub::ALL_ALLOCATED } else { 0 };
        let new = Entry { word: host | COPIED, sub };
        if new != entry {
            if !matches!(old, L2::Data(h) | L2::Zero { allocated: Some(h) } if h == host) {
                self.free(old);
            }
            self.set_entry(index, new)?;
        }
        Ok(host)
    }

    fn write_part(&mut self, index: u64, within: u64, bytes: &[u8]) -> Result<()> {
        if self.header.extended_l2() {
            return self.write_subclusters(index, within, bytes);
        }
        let entry = self.entry(index)?;
        let old = self.decode(index, entry)?;
        if let L2::Data(host) = old
            && self.exclusive(index, entry, host)?
        {
            if entry.word & COPIED == 0 {
                self.set_entry(index, Entry { word: entry.word | COPIED, ..entry })?;
            }
            return self.put(bytes, host + within);
        }
        let mut whole = vec![0u8; self.header.cluster_size() as usize];
        self.read_old(index, old, &mut whole)?;
        let from = within as usize;
        whole[from..from + bytes.len()].copy_from_slice(bytes);
        let host = self.place_whole(index)?;
        self.put(&whole, host)
    }

    /// Reads what a cluster shows now.
    fn read_old(&self, index: u64, old: L2, whole: &mut [u8]) -> Result<()> {
        match old {
            L2::Zero { .. } => {}
            L2::Unallocated => {
                if let Some(backing) = &self.backing {
                    backing.read(whole, index << self.header.cluster_bits)?;
                }
            }
            L2::Data(host) => {
                let n = self
                    .data
                    .read_at(whole, host)
                    .map_err(|e| Error::io(self.data.path(), format!("reading the cluster at {host}"), e))?;
                if n == 0 && !self.header.external_data() {
                    return Err(self.damaged(format!(
                        "guest cluster {index} lies at {host:#x}, past the end of the file"
                    )));
                }
            }
            L2::Compressed { offset, max_len } => {
                let mut stored = vec![0u8; max_len as usize];
                let n = self.storage.read_at(&mut stored, offset).map_err(|e| {
                    Error::io(self.storage.path(), format!("reading the compressed cluster at {offset}"), e)
                })?;
                codec::decompress(self.header.compression, &stored[..n], whole)
                    .map_err(|why| self.damaged(format!("the compressed cluster at {offset:#x}: {why}")))?;
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros. Whole clusters give up their space where the image can say so.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len, false)
    }

    /// Lets a range go: its whole clusters read as zeros and give up their space (in an image of version 2 with a
    /// backing file, which cannot say so, they stay).
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len, true)
    }

    fn clear(&mut self, offset: u64, len: u64, discard: bool) -> Result<()> {
        self.prepare(offset, len)?;
        let (end, cluster) = (offset + len, self.header.cluster_size());
        let mut at = offset;
        while at < end {
            let index = at / cluster;
            if self.backing.is_none() && self.l1_entry(index)? & OFFSET_MASK == 0 {
                // The whole table's range reads as zeros already.
                let entries = self.header.l2_entries();
                at = (index / entries + 1).saturating_mul(entries).saturating_mul(cluster);
                continue;
            }
            let stop = ((index + 1) * cluster).min(end);
            // The disk's last cluster may be a part of one; nothing of it is seen past the disk's end.
            let whole =
                at.is_multiple_of(cluster) && (stop.is_multiple_of(cluster) || stop == self.header.size);
            let result = self.clear_cluster(index, at..stop, whole, discard);
            self.failed |= result.is_err();
            result?;
            at = stop;
            if self.tables_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn clear_cluster(&mut self, index: u64, range: Range<u64>, whole: bool, discard: bool) -> Result<()> {
        if self.header.extended_l2() {
            return self.clear_subclusters(index, range, whole, discard);
        }
        let entry = self.entry(index)?;
        let old = self.decode(index, entry)?;
        let is_zero = match old {
            L2::Zero { .. } => true,
            L2::Unallocated => self.backing.is_none(),
            _ => false,
        };
        let (len, within) = (range.end - range.start, range.start % self.header.cluster_size());
        if self.header.external_data() && (whole || !discard) && !is_zero {
            // The data file shows the guest's bytes by itself, so it must read as zeros too.
            if let L2::Data(host) = old {
                return self
                    .data
                    .punch(host + within, len)
                    .map_err(|e| Error::io(self.data.path(), "punching a hole", e));
            }
        }
        let new = match (self.backing.is_some(), self.header.version >= 3) {
            (false, _) if discard || self.header.version < 3 => Some(0),
            (_, true) => Some(1),
            _ => None,
        };
        match new {
            _ if is_zero && !(whole && discard) => Ok(()),
            Some(new) if whole => {
                if matches!(old, L2::Unallocated) && new == 0 {
                    return Ok(());
                }
                if entry.word == new || is_zero && self.header.external_data() {
                    return Ok(());
                }
                self.free(old);
                self.set_entry(index, Entry { word: new, sub: 0 })
            }
            _ if discard => Ok(()),
            _ => {
                let zeros = vec![0u8; len as usize];
                self.write_part(index, within, &zeros)
            }
        }
    }

    /// Checks a request, and readies the image for its first change.
    fn prepare(&mut self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.header.size) {
            return Err(Error::out_of_range(
                self.storage.path(),
                format!("{len} bytes at {offset} reach past the disk's {} bytes", self.header.size),
            ));
        }
        if self.tables_full() {
            self.flush()?;
        }
        if self.begun {
            return Ok(());
        }
        mark_bitmaps(&*self.storage, &mut self.header)?;
        self.begun = true;
        Ok(())
    }

    fn damaged(&self, what: String) -> Error {
        Error::damaged(self.storage.path(), what)
    }
}
