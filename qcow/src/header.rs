//! The header: everything in it is checked before it is used. Source: the qcow2 specification, "Header".

use std::collections::HashSet;

use crate::entry::L1_MAX;
use crate::storage::{Storage, read_exact};
use crate::{Error, Result};

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Incompatible feature bits.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// The image is damaged and may only be read.
    pub const CORRUPT: u64 = 2;
    /// Guest data lies in another file.
    pub const DATA_FILE: u64 = 4;
    /// The compression type field counts.
    pub const COMPRESSION: u64 = 8;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 16;
    /// Every bit that is understood.
    pub const KNOWN: u64 = 31;
}
/// Autoclear feature bits: bitmaps are up to date; the external data file is a raw image by itself.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1;
pub(crate) const AUTOCLEAR_RAW_DATA: u64 = 2;
/// Autoclear bits that are understood.
pub(crate) const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA;
pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;
pub(crate) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_LUKS: u32 = 0x0537_be77;

/// How an image's bytes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2.
    Qcow2,
}

impl Format {
    /// The name that QEMU and headers use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
    /// From the name that headers use.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Format::Raw),
            "qcow2" => Some(Format::Qcow2),
            _ => None,
        }
    }
}

/// The codec of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate (called zlib by QEMU).
    Deflate,
    /// zstd.
    Zstd,
}

/// A header that has passed every check.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9–21.
    pub cluster_bits: u32,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Offset of the L1 table in bytes.
    pub l1_offset: u64,
    /// Entries in the L1 table.
    pub l1_size: u32,
    /// Offset of the refcount table in bytes.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// log2 of the width of a refcount in bits, 0–6.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Offset of the snapshot table in bytes.
    pub snapshots_offset: u64,
    /// Incompatible feature bits, all known.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Codec of compressed clusters.
    pub compression: CompressionType,
    /// Backing file as named.
    pub backing: Option<String>,
    /// Format of the backing file as named.
    pub backing_format: Option<String>,
    /// External data file as named.
    pub data_file: Option<String>,
    /// Length of the header in bytes.
    pub header_length: u32,
    /// Offset and length of the backing file's name in bytes.
    pub backing_at: (u64, u32),
    /// What is wrong with the refcount table's place; the fields above are 0 then.
    pub(crate) refcounts_lost: Option<String>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks the header. Errors name the field.
    pub fn parse(storage: &dyn Storage) -> Result<Header> {
        let header = Self::parse_for_repair(storage)?;
        match header.refcounts_lost {
            Some(what) => Err(Error::damaged(
                storage.path(),
                format!("{what}: `knibfs img check -r all` counts and writes the refcounts anew"),
            )),
            None => Ok(header),
        }
    }

    /// The same for a check or repair: the refcount table may be anywhere, since it can be made anew.
    pub(crate) fn parse_for_repair(storage: &dyn Storage) -> Result<Header> {
        let path = storage.path();
        let damaged = |what: String| Error::damaged(path, what);
        let file_len = storage.len().map_err(|e| Error::io(path, "asking for the length", e))?;
        let mut first = vec![0u8; 112];
        let n = storage.read_at(&mut first, 0).map_err(|e| Error::io(path, "reading the header", e))?;
        if n < 72 || be32(&first, 0) != MAGIC {
            return Err(damaged("it does not begin as a qcow2 file does (is it raw, or cut off?)".into()));
        }
        let version = be32(&first, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(
                path,
                format!("qcow version {version} is not supported: only 2 and 3 are"),
            ));
        }
        let cluster_bits = be32(&first, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(format!("cluster_bits is {cluster_bits}, not 9 to 21")));
        }
        let cluster = 1u64 << cluster_bits;
        match be32(&first, 32) {
            0 => {}
            2 => {
                return Err(Error::unsupported(
                    path,
                    "the image is encrypted with LUKS, which is not supported: exclude this disk or decrypt it",
                ));
            }
            n => {
                return Err(Error::unsupported(
                    path,
                    format!(
                        "the image is encrypted (method {n}), which is not supported: exclude this disk or decrypt it"
                    ),
                ));
            }
        }
        let v3 = version == 3;
        if v3 && n < 104 {
            return Err(damaged("the header is cut off".into()));
        }
        let header_length = if v3 { be32(&first, 100) } else { 72 };
        if v3 && (header_length < 104 || header_length % 8 != 0 || u64::from(header_length) > cluster) {
            return Err(damaged(format!("header_length is {header_length}")));
        }
        let (incompatible, compatible, autoclear) =
            if v3 { (be64(&first, 72), be64(&first, 80), be64(&first, 88)) } else { (0, 0, 0) };
        if incompatible & !incompatible::KNOWN != 0 {
            return Err(Error::unsupported(
                path,
                format!(
                    "unknown incompatible features {:#x}: a newer QEMU made it",
                    incompatible & !incompatible::KNOWN
                ),
            ));
        }
        let refcount_order = if v3 { be32(&first, 96) } else { 4 };
        if refcount_order > 6 {
            return Err(damaged(format!("refcount_order is {refcount_order}, above 6")));
        }
        let kind = if header_length > 104 { first[104] } else { 0 };
        let compression = match kind {
            0 => CompressionType::Deflate,
            1 => CompressionType::Zstd,
            n => return Err(Error::unsupported(path, format!("compression type {n} is unknown"))),
        };
        if (kind != 0) != (incompatible & incompatible::COMPRESSION != 0) {
            return Err(damaged("the compression type and its feature bit disagree".into()));
        }
        if incompatible & incompatible::EXTENDED_L2 != 0 && cluster_bits < 14 {
            return Err(damaged("extended L2 entries need clusters of 16 KiB or more".into()));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&first, 24),
            l1_offset: be64(&first, 40),
            l1_size: be32(&first, 36),
            refcount_table_offset: be64(&first, 48),
            refcount_table_clusters: be32(&first, 56),
            refcount_order,
            snapshot_count: be32(&first, 60),
            snapshots_offset: be64(&first, 64),
            incompatible,
            compatible,
            autoclear,
            compression,
            backing: None,
            backing_format: None,
            data_file: None,
            header_length,
            backing_at: (be64(&first, 8), be32(&first, 16)),
            refcounts_lost: None,
        };
        header.refcounts_lost = header.wrong_refcount_table(file_len);
        if header.refcounts_lost.is_some() {
            (header.refcount_table_offset, header.refcount_table_clusters) = (0, 0);
        }
        header.check_tables(path, file_len)?;
        let mut zero = vec![0u8; cluster.min(file_len) as usize];
        read_exact(storage, &mut zero, 0, "the header")?;
        header.parse_names(path, &zero)?;
        if (incompatible & incompatible::DATA_FILE == 0) && header.data_file.is_some() {
            header.data_file = None;
        }
        Ok(header)
    }

    fn check_tables(&self, path: &std::path::Path, file_len: u64) -> Result<()> {
        let damaged = |what: String| Err(Error::damaged(path, what));
        let cluster = self.cluster_size();
        if u64::from(self.l1_size) * 8 > L1_MAX {
            return damaged(format!("the L1 table has {} entries, above 32 MiB", self.l1_size));
        }
        if u64::from(self.l1_size) < self.l1_needed() {
            return damaged(format!(
                "the L1 table has {} entries: too few for a disk of {} bytes",
                self.l1_size, self.size
            ));
        }
        let l1 = self.wrong_place("L1 table", self.l1_offset, u64::from(self.l1_size) * 8, file_len);
        if let Some(what) = l1 {
            return damaged(what);
        }
        if self.snapshot_count > 65_536 || !self.snapshots_offset.is_multiple_of(cluster) {
            return damaged("the snapshot table's fields are out of range".into());
        }
        Ok(())
    }

    fn wrong_refcount_table(&self, file_len: u64) -> Option<String> {
        let len = u64::from(self.refcount_table_clusters) * self.cluster_size();
        if len == 0 || len > 8 << 20 {
            return Some(format!("the refcount table has {} clusters", self.refcount_table_clusters));
        }
        self.wrong_place("refcount table", self.refcount_table_offset, len, file_len)
    }

    /// What is wrong with the place of a table.
    fn wrong_place(&self, name: &str, offset: u64, len: u64, file_len: u64) -> Option<String> {
        let cluster = self.cluster_size();
        if !offset.is_multiple_of(cluster) {
            return Some(format!("the {name}'s offset {offset} is not aligned"));
        }
        let end = offset.checked_add(len).filter(|end| *end <= file_len.next_multiple_of(cluster));
        (len > 0 && (offset == 0 || end.is_none()))
            .then(|| format!("the {name} at {offset} lies outside the file"))
    }

    fn parse_names(&mut self, path: &std::path::Path, zero: &[u8]) -> Result<()> {
        let damaged = |what: &str| Error::damaged(path, what.to_owned());
        let text = |bytes: &[u8]| -> Result<String> {
            let s =
                std::str::from_utf8(bytes).map_err(|_| damaged("a file name in the header is not UTF-8"))?;
            if s.contains('\0') {
                Err(damaged("a file name in the header holds a NUL byte"))
            } else {
                Ok(s.to_owned())
            }
        };
        let (offset, len) = self.backing_at;
        if offset != 0 {
            if len > 1023 {
                return Err(damaged("the backing file's name is longer than 1023 bytes"));
            }
            let end = offset.checked_add(u64::from(len)).filter(|e| *e <= zero.len() as u64);
            let bytes = end.and_then(|e| zero.get(offset as usize..e as usize));
            self.backing =
                Some(text(bytes.ok_or_else(|| damaged("the backing file's name lies outside cluster 0"))?)?)
                    .filter(|s| !s.is_empty());
        }
        let mut at = self.header_length as usize;
        let mut seen = HashSet::new();
        // Extensions end at their end marker, or where the backing file's name begins.
        let limit = if offset != 0 { (offset as usize).min(zero.len()) } else { zero.len() };
        while at + 8 <= limit {
            let (kind, len) = (be32(zero, at), be32(zero, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let data = at.checked_add(8).and_then(|from| zero.get(from..from.checked_add(len)?));
            let data = data.ok_or_else(|| damaged("a header extension runs past cluster 0"))?;
            if !seen.insert(kind) {
                return Err(damaged("a header extension stands twice"));
            }
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(text(data)?),
                EXT_DATA_FILE => self.data_file = Some(text(data)?),
                EXT_LUKS => {
                    return Err(Error::unsupported(
                        path,
                        "the image is encrypted with LUKS, which is not supported: exclude this disk or decrypt it",
                    ));
                }
                _ => {}
            }
            at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
        }
        Ok(())
    }

    /// Size of a cluster in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Whether L2 entries have subclusters (16 bytes an entry).
    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }
    /// Bytes of an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }
    /// Entries in one L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }
    /// L1 entries that the disk's size needs.
    pub fn l1_needed(&self) -> u64 {
        self.size.div_ceil(self.cluster_size()).div_ceil(self.l2_entries())
    }
    /// Whether guest data lies in an external file.
    pub fn external_data(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }
}
