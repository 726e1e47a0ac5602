//! Bitmaps added, removed and changed: the new directory is written beside the old one and takes effect by one write of
//! the header.

use std::sync::Arc;

use super::bits::{Parts, clusters, usable};
use super::{AUTO, BITS_MAX, Bitmap, NAME_MAX, TABLE_MAX, list};
use crate::create::Edit;
use crate::header::AUTOCLEAR_BITMAPS;
use crate::refcount::Refcounts;
use crate::repair::sound;
use crate::rw::BitmapDirectory;
use crate::{Control, Error, Header, Result, Storage};

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
        self.all.get(place).map_or(Ok(()), |b| b.trusted(&*self.storage))?;
        Ok(place)
    }

    /// Adds an empty bitmap to the list; its place there.
    fn add(&mut self, name: &str, granularity: u64, disabled: bool) -> Result<usize> {
        let refuse = |what: String| Err(Error::unsupported(self.storage.path(), what));
        if !granularity.is_power_of_two() || !(512..=1 << 31).contains(&granularity) {
            return refuse(format!(
                "a granularity of {granularity} bytes is not a power of two from 512 to 2 GiB"
            ));
        }
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return refuse(format!("a bitmap's name has 1 to {NAME_MAX} bytes and no NUL"));
        }
        if self.find(name).is_ok() {
            return refuse(format!("it has a bitmap named {name:?} already"));
        }
        self.all.push(Bitmap {
            name: name.to_owned(),
            granularity,
            in_use: false,
            auto: !disabled,
            table_offset: 0,
            table_size: 0,
            flags: if disabled { 0 } else { AUTO },
            raw_name: name.as_bytes().to_vec(),
            extra: Vec::new(),
        });
        Ok(self.all.len() - 1)
    }

    /// Sets in `parts`, which are bits of the bitmap at `place`, what a bitmap of another image marks.
    fn mark(&self, place: usize, parts: &mut Parts, from: &Bitmap, source: &dyn Storage) -> Result<()> {
        let header = Header::parse(source)?;
        if header.size != self.header.size {
            return Err(Error::unsupported(
                self.storage.path(),
                format!(
                    "its disk has {} bytes and that of {} has {}: bitmaps of disks of different sizes are not merged",
                    self.header.size,
                    source.path().display(),
                    header.size
                ),
            ));
        }
        let Some(bitmap) = self.all.get(place) else { return Ok(()) };
        let (granularity, cluster) = (bitmap.granularity, self.header.cluster_size());
        from.each_range(source, &header, &mut |range| {
            let mut bit = range.start / granularity;
            let end = range.end.div_ceil(granularity);
            while bit < end {
                let part = parts.entry(bit / (cluster * 8)).or_insert_with(|| vec![0; cluster as usize]);
                let part_end = (bit / (cluster * 8) + 1) * cluster * 8;
                while bit < end.min(part_end) {
                    let whole = bit.is_multiple_of(8) && bit + 8 <= end;
                    if let Some(byte) = part.get_mut((bit / 8 % cluster) as usize) {
                        *byte |= if whole { 0xff } else { 1 << (bit % 8) };
                    }
                    bit += if whole { 8 } else { 1 };
                }
            }
        })
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
        if entries > TABLE_MAX || bitmap.bits(&self.header) > BITS_MAX {
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
    let place = change.add(name, granularity, disabled)?;
    change.put_bits(place, &Parts::new(), true)?;
    change.finish()
}

/// Removes a bitmap, also one that is in use.
pub fn remove(storage: Arc<dyn Storage>, name: &str, control: &Control) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    let gone = change.all.remove(change.find(name)?);
    change.old.extend(gone.clusters(&*change.storage, &change.header)?);
    change.finish()
}

/// Removes all bitmaps, also those that are in use.
pub(crate) fn remove_all(storage: Arc<dyn Storage>, control: &Control) -> Result<()> {
    let mut change = Change::begin(storage, control)?;
    for gone in std::mem::take(&mut change.all) {
        change.old.extend(gone.clusters(&*change.storage, &change.header)?);
    }
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

/// Sets in the bitmap `name` what the bitmap `from` of `source` marks, which may be the same image, or another one of the
/// same size; the granularities may differ.
pub fn merge(
    storage: Arc<dyn Storage>,
    name: &str,
    source: &dyn Storage,
    from: &str,
    control: &Control,
) -> Result<()> {
    let from = usable(source, from)?;
    let mut change = Change::begin(storage, control)?;
    let place = change.usable(name)?;
    let mut parts = change
        .all
        .get(place)
        .map_or_else(|| Ok(Parts::new()), |bitmap| bitmap.parts(&*change.storage, &change.header))?;
    change.mark(place, &mut parts, &from, source)?;
    change.put_bits(place, &parts, false)?;
    change.finish()
}

/// What [`copy`] did, by the names of the bitmaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Those that the image has now too.
    pub copied: Vec<String>,
    /// Those that were in use, and were left out.
    pub skipped: Vec<String>,
}

/// Copies all bitmaps of `source` into the image, whose disk has the same content and size, all at once. One that is in
/// use is left out with `skip_broken`, and else refused before anything changes.
pub fn copy(
    storage: Arc<dyn Storage>,
    source: &dyn Storage,
    skip_broken: bool,
    control: &Control,
) -> Result<Copied> {
    let mut done = Copied::default();
    let all = list(source)?;
    if !skip_broken {
        all.iter().try_for_each(|b| b.trusted(source))?;
    }
    let mut change = Change::begin(storage, control)?;
    for from in all {
        if from.trusted(source).is_err() {
            done.skipped.push(from.name);
            continue;
        }
        let place = change.add(&from.name, from.granularity, !from.auto)?;
        let mut parts = Parts::new();
        change.mark(place, &mut parts, &from, source)?;
        change.put_bits(place, &parts, true)?;
        done.copied.push(from.name);
    }
    if !done.copied.is_empty() {
        change.finish()?;
    }
    Ok(done)
}
