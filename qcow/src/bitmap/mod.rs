//! Persistent bitmaps: which parts of the disk were written since a moment. Source: the qcow2 specification, "Bitmaps
//! extension".

mod bits;
mod change;

use crate::entry::OFFSET_MASK;
use crate::rw::BitmapDirectory;
use crate::{Error, Header, Result, Storage};

pub use bits::dirty;
pub(crate) use change::remove_all;
pub use change::{Copied, add, clear, copy, merge, remove, set_enabled};

/// QEMU's limit for the length of a name, in bytes.
const NAME_MAX: usize = 1023;
/// Longest table of a bitmap: QEMU's limit, in entries.
const TABLE_MAX: u64 = 0x800_0000;
/// Most bits of a bitmap: QEMU's limit.
const BITS_MAX: u64 = 0x2000_0000;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
/// Whoever does not know the extra data may use the bitmap nevertheless.
const EXTRA_COMPATIBLE: u32 = 4;
/// Bits of a table's entry that must be clear.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

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

/// Reads and checks one entry of the directory; its table is not looked at.
pub(crate) fn read(
    storage: &dyn Storage,
    header: &Header,
    directory: &BitmapDirectory,
    start: usize,
) -> Result<Bitmap> {
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
    if flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
        return damaged(format!("flags {flags:#x} are unknown"));
    }
    if !(1..=NAME_MAX).contains(&name_len) {
        return damaged(format!("its name is {name_len} bytes long, not 1 to {NAME_MAX}"));
    }
    let name_at = start.saturating_add(24).saturating_add(extra_len);
    let Some(name) = directory.bytes.get(name_at..name_at.saturating_add(name_len)) else {
        return damaged("its name runs past the directory".into());
    };
    let table_offset = field(0, 8);
    if table_offset == 0 || !table_offset.is_multiple_of(header.cluster_size()) {
        return damaged(format!("its table's offset {table_offset:#x} is 0 or not aligned"));
    }
    let bitmap = Bitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity: 1 << bits,
        in_use: flags & IN_USE != 0,
        auto: flags & AUTO != 0,
        table_offset,
        table_size: field(8, 4) as u32,
        flags,
        raw_name: name.to_vec(),
        extra: directory.bytes.get(start + 24..name_at).unwrap_or(&[]).to_vec(),
    };
    // One that is in use may be of the size that the disk had.
    let needed = bitmap.entries(header);
    if !bitmap.in_use && u64::from(bitmap.table_size) != needed {
        return damaged(format!("its table has {} entries, and the disk needs {needed}", bitmap.table_size));
    }
    Ok(bitmap)
}

/// Where the bits that an entry of a bitmap's table names lie, 0 for nowhere; the error says why it is no such entry.
pub(crate) fn bits_at(entry: u64, header: &Header) -> std::result::Result<u64, String> {
    let offset = entry & OFFSET_MASK;
    if entry & TABLE_RESERVED != 0 || offset != 0 && entry & 1 != 0 {
        return Err(format!("its table's entry {entry:#x} has reserved bits"));
    }
    if !offset.is_multiple_of(header.cluster_size()) {
        return Err(format!("its bits at {offset:#x} are not aligned"));
    }
    Ok(offset)
}

impl Bitmap {
    /// Refuses a bitmap that some program did not finish with, or that means something else to who knows its extra data.
    fn trusted(&self, storage: &dyn Storage) -> Result<()> {
        let why = if self.in_use {
            "is in use or was left so, and"
        } else if self.is_foreign() {
            "has data of a newer program, and"
        } else {
            return Ok(());
        };
        Err(Error::unsupported(
            storage.path(),
            format!("bitmap {:?} {why} cannot be trusted: it can only be removed", self.name),
        ))
    }

    fn is_foreign(&self) -> bool {
        !self.extra.is_empty() && self.flags & EXTRA_COMPATIBLE == 0
    }
}
