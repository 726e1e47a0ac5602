//! Persistent bitmaps: which parts of the disk were written since a moment. Source: the qcow2 specification, "Bitmaps
//! extension".

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::create::Edit;
use crate::entry::OFFSET_MASK;
use crate::header::AUTOCLEAR_BITMAPS;
use crate::refcount::Refcounts;
use crate::repair::sound;
use crate::rw::BitmapDirectory;
use crate::storage::read_exact;
use crate::{Control, Error, Header, Result, Storage};

/// QEMU's limit for the length of a name, in bytes.
const NAME_MAX: usize = 1023;
/// Longest table of a bitmap: QEMU's limit, in entries.
const TABLE_MAX: u64 = 0x800_0000;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;

/// A persistent bitmap as the directory names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// Guest bytes that one bit stands for: a power of two, 512 B to 2 GiB.
    pub granularity: u64,
    /// Some program has the image open, or did not finish: the bits cannot be trusted.
    pub in_use: bool,
    /// It records writes by itself whenever the image is open.
    pub auto: bool,
    /// Offset of its table in bytes.
    pub(crate) table_offset: u64,
    /// Entries in its table.
    pub(crate) table_size: u32,
    flags: u32,
    raw_name: Vec<u8>,
    extra: Vec<u8>,
}

/// The image's persistent bitmaps; none where a program that does not know of them wrote to the image (the autoclear
/// bit is clear), since they are out of date.
pub fn list(storage: &dyn Storage) -> Result<Vec<Bitmap>> {
    let header = Header::parse(storage)?;
    let Some(directory) = BitmapDirectory::read(storage, &header)? else { return Ok(Vec::new()) };
    directory.entries(storage.path())?.into_iter().map(|at| read(storage, &header, &directory, at)).collect()
}

fn read(storage: &dyn Storage, header: &Header, directory: &BitmapDirectory, start: usize) -> Result<Bitmap> {
    let damaged = |what: String| {
        let at = directory.offset + start as u64;
        Err(Error::damaged(storage.path(), format!("the bitmap directory's entry at {at:#x}: {what}")))
    };
    let field = |from: usize, len: usize| {
        let bytes = directory.bytes.get(start + from..start + from + len);
        bytes.unwrap_or(&[]).iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
    };
    let (flags, kind, bits) = (field(12, 4) as u32, field(16, 1), field(17, 1));
    let (name_len, extra_len) = (field(18, 2) as usize, field(20, 4) as usize);
    if kind != 1 {
        return damaged(format!("type {kind} is unknown"));
    }
    if !(9..=31).contains(&bits) {
        return damaged(format!("granularity 2^{bits} is not 2^9 to 2^31"));
    }
    let name_at = start.saturating_add(24).saturating_add(extra_len);
    let Some(name) = directory.bytes.get(name_at..name_at.saturating_add(name_len)) else {
        return damaged("its name runs past the directory".into());
    };
    let table_offset = field(0, 8);
    if !table_offset.is_multiple_of(header.cluster_size()) {
        return damaged(format!("its table's offset {table_offset:#x} is not aligned"));
    }
    Ok(Bitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity: 1 << bits,
        in_use: flags & IN_USE != 0,
        auto: flags & AUTO != 0,
        table_offset,
        table_size: field(8, 4) as u32,
        flags,
        raw_name: name.to_vec(),
        extra: directory.bytes.get(start + 24..name_at).unwrap_or(&[]).to_vec(),
    })
}

/// The bits of a bitmap: parts of one cluster each, by their number; a part that is missing is all zeros.
type Parts = BTreeMap<u64, Vec<u8>>;

/// A change of an image's bitmaps. New tables lie where nothing lay before; the header then names the new directory.
struct Change {
    storage: Arc<dyn Storage>,
    header: Header,
    refcounts: Refcounts,
    all: Vec<Bitmap>,
    /// What the present directory and what is replaced occupy, in clusters.
    old: Vec<u64>,
}

impl Change {
    fn begin(storage: Arc<dyn Storage>, control: &Control) -> Result<Self> {
        let (header, _) = sound(&storage, control)?;
        if header.version < 3 {
            return Err(Error::unsupported(
                storage.path(),
                "an image of version 2 (compat 0.10) has no bitmaps: amend it to version 3",
            ));
        }
        let all = list(&*storage)?;
        let refcounts = Refcounts::open(storage.clone(), &header)?;
        let mut old = Vec::new();
        if let Some(d) = BitmapDirectory::read(&*storage, &header)? {
            old.extend(clusters(d.offset, d.bytes.len() as u64, &header));
        }
        Ok(Self { storage, header, refcounts, all, old })
    }

    fn find(&self, name: &str) -> Result<usize> {
        let place = self.all.iter().position(|b| b.name == name);
        place.ok_or_else(|| {
            Error::unsupported(self.storage.path(), format!("it has no bitmap named {name:?}"))
        })
    }

    fn usable(&self, name: &str) -> Result<usize> {
        let place = self.find(name)?;
        if self.all.get(place).is_some_and(|b| b.in_use) {
            return Err(Error::unsupported(
                self.storage.path(),
                format!(
                    "bitmap {name:?} is in use or was left so, and cannot be trusted: it can only be removed"
                ),
            ));
        }
        Ok(place)
    }

    /// Allocates and writes clusters in a row; their offset.
    fn put(&mut self, bytes: &[u8], what: &str) -> Result<u64> {
        let bits = self.header.cluster_bits;
        let count = (bytes.len() as u64).div_ceil(self.header.cluster_size()).max(1);
        let offset = self.refcounts.allocate(count, &mut Vec::new())? << bits;
        let mut whole = bytes.to_vec();
        whole.resize((count << bits) as usize, 0);
        self.storage
            .write_at(&whole, offset)
            .map_err(|e| Error::io(self.storage.path(), format!("writing {what} at {offset}"), e))?;
        Ok(offset)
    }

    /// Writes the bits of a bitmap, and notes what held them before as free.
    fn put_bits(&mut self, place: usize, parts: &Parts, fresh: bool) -> Result<()> {
        let Some(bitmap) = self.all.get(place).cloned() else { return Ok(()) };
        if !fresh {
            self.old.extend(bitmap.clusters(&*self.storage, &self.header)?);
        }
        let entries = bitmap.entries(&self.header);
        if entries > TABLE_MAX {
            return Err(Error::unsupported(
                self.storage.path(),
                format!(
                    "a bitmap with granularity {} is too large for this disk: take a larger one",
                    bitmap.granularity
                ),
            ));
        }
        let mut table = vec![0u8; (entries * 8) as usize];
        for (number, bytes) in parts.iter().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
            let offset = self.put(bytes, "a bitmap")?;
            if let Some(to) = table.get_mut((*number * 8) as usize..(*number * 8 + 8) as usize) {
                to.copy_from_slice(&offset.to_be_bytes());
            }
        }
        let offset = self.put(&table, "a bitmap's table")?;
        if let Some(bitmap) = self.all.get_mut(place) {
            bitmap.table_offset = offset;
            bitmap.table_size = entries as u32;
        }
        Ok(())
    }

    /// Writes the directory and switches to it.
    fn finish(mut self) -> Result<()> {
        let mut bytes = Vec::new();
        for b in &self.all {
            bytes.extend(b.table_offset.to_be_bytes());
            bytes.extend(b.table_size.to_be_bytes());
            bytes.extend(b.flags.to_be_bytes());
            bytes.extend([1, b.granularity.trailing_zeros() as u8]);
            bytes.extend((b.raw_name.len() as u16).to_be_bytes());
            bytes.extend((b.extra.len() as u32).to_be_bytes());
            bytes.extend(&b.extra);
            bytes.extend(&b.raw_name);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        if self.all.len() > 65_535 || bytes.len() > 64 << 20 {
            return Err(Error::unsupported(self.storage.path(), "it holds as many bitmaps as qcow2 allows"));
        }
        let mut edit = Edit::keep(&*self.storage, &self.header)?;
        if self.all.is_empty() {
            edit.bitmaps = None;
            edit.autoclear &= !AUTOCLEAR_BITMAPS;
        } else {
            let offset = self.put(&bytes, "the bitmap directory")?;
            let mut data = (self.all.len() as u32).to_be_bytes().to_vec();
            data.extend([0; 4]);
            data.extend((bytes.len() as u64).to_be_bytes());
            data.extend(offset.to_be_bytes());
            edit.bitmaps = Some(data);
            edit.autoclear |= AUTOCLEAR_BITMAPS;
        }
        self.refcounts.write()?;
        self.storage.sync().map_err(|e| Error::io(self.storage.path(), "syncing", e))?;
        // The refcount table may have moved, which the header says.
        let header = Header::parse(&*self.storage)?;
        let mut now = Edit::keep(&*self.storage, &header)?;
        (now.bitmaps, now.autoclear) = (edit.bitmaps, edit.autoclear);
        now.write(&*self.storage, &header)?;
        for cluster in std::mem::take(&mut self.old) {
            self.refcounts.release(cluster)?;
        }
        self.refcounts.write()?;
        self.storage.sync().map_err(|e| Error::io(self.storage.path(), "syncing", e))
    }
}

/// The clusters that a range of bytes touches.
fn clusters(offset: u64, len: u64, header: &Header) -> Range<u64> {
    let bits = header.cluster_bits;
    offset >> bits..offset.saturating_add(len).div_ceil(1 << bits)
}

impl Bitmap {
    /// Entries that its table needs.
    fn entries(&self, header: &Header) -> u64 {
        header.size.div_ceil(self.granularity).div_ceil(8).div_ceil(header.cluster_size())
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
    fn clusters(&self, storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
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
        let cluster = header.cluster_size();
        let mut bytes = vec![0u8; cluster as usize];
        let mut seen = HashSet::new();
        for (number, entry) in (0..self.entries(header)).zip(self.table(storage)?) {
            let offset = entry & OFFSET_MASK;
            bytes.fill(if entry & 1 != 0 { 0xff } else { 0 });
            if offset != 0 {
                if !offset.is_multiple_of(cluster) || !seen.insert(offset) {
                    return Err(Error::damaged(
                        storage.path(),
                        format!("bitmap {:?} has bits at {offset:#x}, not aligned or used twice", self.name),
                    ));
                }
                read_exact(storage, &mut bytes, offset, "a bitmap")?;
            }
            if bytes.iter().any(|b| *b != 0) {
                each(number, &bytes)?;
            }
        }
        Ok(())
    }

    fn parts(&self, storage: &dyn Storage, header: &Header) -> Result<Parts> {
        let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        let mut parts = Parts::new();
        self.each_part(storage, header, &mut |number, bytes| {
            // A table of a few bytes can say that much is all ones.
            if parts.len() as u64 * header.cluster_size() > len.saturating_add(64 << 20) {
                return Err(Error::unsupported(
                    storage.path(),
                    format!("bitmap {:?} is too large to be changed", self.name),
                ));
            }
            parts.insert(number, bytes.to_vec());
            Ok(())
        })?;
        Ok(parts)
    }
}

/// The ranges of the guest's disk (bytes) that a bitmap of the image marks, in order. One that is in use is refused.
pub fn dirty(storage: &dyn Storage, name: &str) -> Result<Vec<Range<u64>>> {
    let header = Header::parse(storage)?;
    let all = list(storage)?;
    let Some(bitmap) = all.iter().find(|b| b.name == name && !b.in_use) else {
        return Err(Error::unsupported(storage.path(), format!("it has no usable bitmap named {name:?}")));
    };
    let mut found: Vec<Range<u64>> = Vec::new();
    let per_part = header.cluster_size() * 8;
    bitmap.each_part(storage, &header, &mut |number, bytes| {
        for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                let start = (number * per_part + at as u64 * 8 + bit).saturating_mul(bitmap.granularity);
                let end = start.saturating_add(bitmap.granularity).min(header.size);
                match found.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ if start < end => found.push(start..end),
                    _ => {}
                }
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// Adds an empty bitmap that records writes from now on (none, if `disabled`). `granularity` is a power of two, 512 B
/// to 2 GiB. All changes of bitmaps take effect by one write of the header.
pub fn add(
    storage: Arc<dyn Storage>,
    name: &str,
    granularity: u64,
    disabled: bool,
    control: &Control,
) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    let refuse = |what: String| Err(Error::unsupported(change.storage.path(), what));
    if !granularity.is_power_of_two() || !(512..=1 << 31).contains(&granularity) {
        return refuse(format!(
            "a granularity of {granularity} bytes is not a power of two from 512 to 2 GiB"
        ));
    }
    if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
        return refuse(format!("a bitmap's name has 1 to {NAME_MAX} bytes and no NUL"));
    }
    if change.find(name).is_ok() {
        return refuse(format!("it has a bitmap named {name:?} already"));
    }
    let flags = if disabled { 0 } else { AUTO };
    change.all.push(Bitmap {
        name: name.to_owned(),
        granularity,
        in_use: false,
        auto: !disabled,
        table_offset: 0,
        table_size: 0,
        flags,
        raw_name: name.as_bytes().to_vec(),
        extra: Vec::new(),
    });
    change.put_bits(change.all.len() - 1, &Parts::new(), true)?;
    change.finish()
}

/// Removes a bitmap, also one that is in use.
pub fn remove(storage: Arc<dyn Storage>, name: &str, control: &Control) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    let gone = change.all.remove(change.find(name)?);
    change.old.extend(gone.clusters(&*change.storage, &change.header)?);
    change.finish()
}

/// Clears all bits of a bitmap.
pub fn clear(storage: Arc<dyn Storage>, name: &str, control: &Control) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    let place = change.usable(name)?;
    change.put_bits(place, &Parts::new(), false)?;
    change.finish()
}

/// Lets a bitmap record writes, or stops it.
pub fn set_enabled(storage: Arc<dyn Storage>, name: &str, enabled: bool, control: &Control) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    let place = change.usable(name)?;
    if let Some(bitmap) = change.all.get_mut(place) {
        bitmap.auto = enabled;
        bitmap.flags = if enabled { bitmap.flags | AUTO } else { bitmap.flags & !AUTO };
    }
    change.finish()
}

/// Sets in the bitmap `name` what the bitmap `from` of `source` marks, which may be the same image or another one with
/// another granularity.
pub fn merge(
    storage: Arc<dyn Storage>,
    name: &str,
    source: &dyn Storage,
    from: &str,
    control: &Control,
) -> Result<()> {
    let ranges = dirty(source, from)?;
    let mut change = Change::begin(storage, control)?;
    let place = change.usable(name)?;
    let Some(bitmap) = change.all.get(place) else { return Ok(()) };
    let mut parts = bitmap.parts(&*change.storage, &change.header)?;
    let (granularity, cluster) = (bitmap.granularity, change.header.cluster_size());
    let bits = change.header.size.div_ceil(granularity);
    for range in ranges {
        for bit in range.start / granularity..range.end.div_ceil(granularity).min(bits) {
            let part = parts.entry(bit / (cluster * 8)).or_insert_with(|| vec![0; cluster as usize]);
            if let Some(byte) = part.get_mut((bit / 8 % cluster) as usize) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    change.put_bits(place, &parts, false)?;
    change.finish()
}
