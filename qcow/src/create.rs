//! Empty images and overlays, and the name of the backing file in a header. Source: the qcow2 specification,
//! "Header" and "Header extensions".

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::entry::L1_MAX;
use crate::header::{self, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE, incompatible};
use crate::refcount;
use crate::repair::refuse_corrupt;
use crate::storage::read_exact;
use crate::writer::NewImage;
use crate::{Access, CompressionType, Error, FileStorage, Format, Header, Result, Storage};

/// Length of the headers that are written here, compression type included, in bytes.
const HEADER_LENGTH: usize = 112;
/// Longest name of a backing or data file in bytes.
const NAME_MAX: usize = 1023;
/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// What an empty image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// 3, or 2 for programs from before 2013 (`compat=0.10`).
    pub version: u32,
    /// log2 of the cluster size in bytes, 9–21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0–6 (version 2: 4).
    pub refcount_order: u32,
    /// Subclusters; needs clusters of 16 KiB or more.
    pub extended_l2: bool,
    /// Allows writers to leave refcounts for later, and readers to find the image dirty.
    pub lazy_refcounts: bool,
    /// Codec of clusters that are compressed later.
    pub compression: CompressionType,
    /// Backing file's name and format, as the header is to say them.
    pub backing: Option<(String, Format)>,
    /// Name of an external file for the guest's data, and whether that is to be a raw image by itself. The file is the
    /// caller's to make.
    pub data_file: Option<(String, bool)>,
}

impl Default for CreateOptions {
    /// What `qemu-img create` makes: version 3, clusters of 64 KiB, refcounts of 16 bits, deflate.
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            lazy_refcounts: false,
            compression: CompressionType::Deflate,
            backing: None,
            data_file: None,
        }
    }
}

/// Writes an empty version 3 image (16-bit refcounts) to `dest`, whatever that held before, and makes it durable.
/// With a backing file this is an overlay that shows it whole.
pub fn create(dest: Arc<dyn Storage>, new: &NewImage) -> Result<()> {
    let options = CreateOptions {
        size: new.size,
        cluster_bits: new.cluster_bits,
        compression: new.compression.as_ref().map_or(CompressionType::Deflate, |c| c.kind),
        backing: new.backing.clone(),
        ..CreateOptions::default()
    };
    create_with(dest, &options)
}

/// The same with every option. [`crate::ImageMut::preallocate`] gives the clusters their places.
pub fn create_with(dest: Arc<dyn Storage>, new: &CreateOptions) -> Result<()> {
    let path = dest.path();
    new.check(path)?;
    let layout = Layout::of(new, path)?;
    let zero = layout.header(new, path)?;
    let io = |doing: &'static str| move |e| Error::io(path, doing, e);
    if dest.len().map_err(io("asking for the length"))? > 0 {
        // The header of an image that was here before must not survive among the new tables.
        dest.write_at(&[0; SECTOR], 0).map_err(io("clearing the header"))?;
        dest.set_len(0).map_err(io("emptying"))?;
        dest.sync().map_err(io("syncing"))?;
    }
    dest.set_len(layout.clusters << layout.cluster_bits).map_err(io("growing"))?;
    if dest.len().map_err(io("asking for the length"))? > layout.clusters << layout.cluster_bits {
        // A block device keeps what it held.
        dest.punch(0, layout.clusters << layout.cluster_bits).map_err(io("clearing"))?;
    }
    let mut table = Vec::new();
    for block in 0..layout.blocks {
        table.extend_from_slice(&((layout.first_block() + block) << layout.cluster_bits).to_be_bytes());
    }
    let bits = (layout.clusters << new.refcount_order).next_multiple_of(64);
    let mut refcounts = vec![0u8; (bits / 8) as usize];
    for index in 0..layout.clusters {
        refcount::set(&mut refcounts, new.refcount_order, index as usize, 1);
    }
    dest.write_at(&refcounts, layout.first_block() << layout.cluster_bits)
        .map_err(io("writing refcounts"))?;
    dest.write_at(&table, 1 << layout.cluster_bits).map_err(io("writing the refcount table"))?;
    // The header last: a file that was cut before is no image at all.
    dest.sync().map_err(io("syncing"))?;
    dest.write_at(&zero, 0).map_err(io("writing the header"))?;
    dest.sync().map_err(io("syncing"))
}

impl CreateOptions {
    fn check(&self, path: &Path) -> Result<()> {
        let refuse = |what: String| Err(Error::unsupported(path, what));
        if !(9..=21).contains(&self.cluster_bits) {
            return refuse(format!("clusters of 2^{} bytes: qcow2 allows 2^9 to 2^21", self.cluster_bits));
        }
        if self.refcount_order > 6 {
            return refuse(format!("refcounts of 2^{} bits: qcow2 allows 1 to 64 bits", self.refcount_order));
        }
        match self.version {
            3 => {}
            2 => {
                let newer = [
                    (self.refcount_order != 4, "refcounts that are not 16 bits wide"),
                    (self.extended_l2, "extended L2 entries"),
                    (self.lazy_refcounts, "lazy refcounts"),
                    (self.compression != CompressionType::Deflate, "zstd"),
                    (self.data_file.is_some(), "an external data file"),
                ];
                if let Some((_, what)) = newer.iter().find(|(wanted, _)| *wanted) {
                    return refuse(format!("{what} and version 2 (compat 0.10): take version 3"));
                }
            }
            n => return refuse(format!("version {n} of qcow2: only 2 and 3 are known")),
        }
        if self.extended_l2 && self.cluster_bits < 14 {
            return refuse("extended L2 entries need clusters of 16 KiB or more".into());
        }
        if let (Some((_, true)), Some(_)) = (&self.data_file, &self.backing) {
            return refuse("a raw external data file and a backing file: the raw file would lack what the backing file holds".into());
        }
        Ok(())
    }
}

/// Where the parts of an empty image lie, in clusters: header, refcount table, refcount blocks, L1.
struct Layout {
    cluster_bits: u32,
    table: u64,
    blocks: u64,
    l1_entries: u64,
    clusters: u64,
}

impl Layout {
    fn of(new: &CreateOptions, path: &Path) -> Result<Layout> {
        let cluster = 1u64 << new.cluster_bits;
        let l2_entries = cluster / if new.extended_l2 { 16 } else { 8 };
        let l1_entries = new.size.div_ceil(cluster).div_ceil(l2_entries).max(1);
        if l1_entries * 8 > L1_MAX {
            return Err(Error::unsupported(
                path,
                format!(
                    "a disk of {} bytes is too large for clusters of {cluster} bytes: use larger clusters",
                    new.size
                ),
            ));
        }
        let l1 = (l1_entries * 8).div_ceil(cluster);
        let per_block = (cluster * 8) >> new.refcount_order;
        let (mut table, mut blocks) = (1, 1);
        loop {
            let clusters = 1 + table + blocks + l1;
            let need_blocks = clusters.div_ceil(per_block);
            let need_table = (need_blocks * 8).div_ceil(cluster);
            if (need_table, need_blocks) == (table, blocks) {
                return Ok(Layout { cluster_bits: new.cluster_bits, table, blocks, l1_entries, clusters });
            }
            (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
        }
    }

    fn first_block(&self) -> u64 {
        1 + self.table
    }

    fn header(&self, new: &CreateOptions, path: &Path) -> Result<Vec<u8>> {
        let mut h = vec![0u8; if new.version == 3 { HEADER_LENGTH } else { 72 }];
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &header::MAGIC.to_be_bytes());
        put(4, &new.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &new.size.to_be_bytes());
        put(36, &(self.l1_entries as u32).to_be_bytes());
        put(40, &((1 + self.table + self.blocks) << self.cluster_bits).to_be_bytes());
        put(48, &(1u64 << self.cluster_bits).to_be_bytes());
        put(56, &(self.table as u32).to_be_bytes());
        if new.version == 3 {
            let zstd = new.compression == CompressionType::Zstd;
            let flag = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
            let incompatible = flag(zstd, incompatible::COMPRESSION)
                | flag(new.data_file.is_some(), incompatible::DATA_FILE)
                | flag(new.extended_l2, incompatible::EXTENDED_L2);
            put(72, &incompatible.to_be_bytes());
            put(80, &u64::from(new.lazy_refcounts).to_be_bytes());
            let raw = new.data_file.as_ref().is_some_and(|(_, raw)| *raw);
            put(88, &flag(raw, header::AUTOCLEAR_RAW_DATA).to_be_bytes());
            put(96, &new.refcount_order.to_be_bytes());
            put(100, &(HEADER_LENGTH as u32).to_be_bytes());
            put(104, &[u8::from(zstd)]);
        }
        let mut others = Vec::new();
        if let Some((name, _)) = &new.data_file {
            check_data_file_name(path, name)?;
            append_extension(&mut others, EXT_DATA_FILE, name.as_bytes());
        }
        let backing = new.backing.as_ref().map(|(name, format)| (name.as_str(), Some(format.name())));
        append_backing(&mut h, others, backing, None, self.cluster_bits, path)?;
        Ok(h)
    }
}

/// Appends one header extension, padded.
fn append_extension(to: &mut Vec<u8>, kind: u32, data: &[u8]) {
    to.extend_from_slice(&kind.to_be_bytes());
    to.extend_from_slice(&(data.len() as u32).to_be_bytes());
    to.extend_from_slice(data);
    to.resize(to.len().next_multiple_of(8), 0);
}

/// Appends the extensions (that of the backing format first) and the name to the fixed part of a header, whose
/// backing fields are set. The name avoids the place of the old one where there is room. Returns the end of the
/// extensions and the name's place.
fn append_backing(
    h: &mut Vec<u8>,
    others: Vec<u8>,
    backing: Option<(&str, Option<&str>)>,
    old_name: Option<Range<usize>>,
    cluster_bits: u32,
    path: &Path,
) -> Result<(usize, usize)> {
    let cluster = 1usize << cluster_bits;
    if let Some((_, Some(format))) = backing {
        append_extension(h, EXT_BACKING_FORMAT, format.as_bytes());
    }
    h.extend_from_slice(&others);
    h.extend_from_slice(&[0; 8]);
    let ext_end = h.len();
    let name = backing.map_or("", |(name, _)| name);
    if name.len() > NAME_MAX || name.contains('\0') {
        return Err(Error::unsupported(
            path,
            format!(
                "the backing file's name is {} bytes long, and qcow2 allows {NAME_MAX} without NUL: use a shorter or relative path",
                name.len()
            ),
        ));
    }
    let mut name_at = ext_end;
    if let Some(old) = old_name.filter(|old| old.start < ext_end + name.len() && ext_end < old.end) {
        let behind = old.end.next_multiple_of(8);
        if behind + name.len() <= cluster {
            name_at = behind;
        }
    }
    if name_at + name.len() > cluster {
        return Err(Error::unsupported(
            path,
            format!(
                "the backing file's name does not fit into the header's cluster of {cluster} bytes: use a shorter or relative path"
            ),
        ));
    }
    let (at, len) = if backing.is_some() { (name_at as u64, name.len() as u32) } else { (0, 0) };
    h[8..16].copy_from_slice(&at.to_be_bytes());
    h[16..20].copy_from_slice(&len.to_be_bytes());
    h.resize(name_at, 0);
    h.extend_from_slice(name.as_bytes());
    Ok((ext_end, name_at))
}

/// One header extension: its type, and where its data lies in cluster 0.
pub(crate) struct Extension {
    pub(crate) kind: u32,
    pub(crate) data: Range<usize>,
}

/// The extensions of a header that has passed its checks; `zero` is cluster 0.
pub(crate) fn extensions(zero: &[u8], header: &Header) -> Vec<Extension> {
    let mut found = Vec::new();
    let limit = match header.backing_at.0 {
        0 => zero.len(),
        at => zero.len().min(at as usize),
    };
    let mut at = header.header_length as usize;
    while at + 8 <= limit {
        let word =
            |at: usize| zero.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
        let (kind, len) = (word(at), word(at + 4) as usize);
        let data = at + 8..(at + 8).saturating_add(len);
        if kind == 0 || data.end > zero.len() {
            break;
        }
        at = data.start.saturating_add(len.next_multiple_of(8));
        found.push(Extension { kind, data });
    }
    found
}

/// Reads cluster 0 as far as the file has it.
pub(crate) fn read_cluster_zero(storage: &dyn Storage, header: &Header) -> Result<Vec<u8>> {
    let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
    let mut zero = vec![0u8; len.min(header.cluster_size()) as usize];
    read_exact(storage, &mut zero, 0, "the header")?;
    Ok(zero)
}

/// Gives the image at `path` another backing file (none for `None`), without touching what the guest sees of its own
/// clusters. The name is not opened or checked. At any cut the header names either the old file or the new one: the
/// new name is made durable where nothing points to it before the header is written.
pub fn set_backing(path: &Path, name: Option<&str>, format: Option<Format>) -> Result<()> {
    let storage = FileStorage::open(path, Access::ReadWrite)?;
    set_backing_in(&*storage, name, format)
}

pub(crate) fn set_backing_in(
    storage: &dyn Storage,
    name: Option<&str>,
    format: Option<Format>,
) -> Result<()> {
    let header = Header::parse(storage)?;
    refuse_corrupt(storage, &header)?;
    let mut edit = Edit::keep(storage, &header)?;
    edit.backing = match (name, format) {
        (None, _) => None,
        (Some(name), Some(format)) => Some((name.to_owned(), Some(format.name().to_owned()))),
        (Some(name), None) => {
            return Err(Error::refused(
                storage.path(),
                format!("the backing file {name:?} was given without its format, which is never guessed"),
            ));
        }
    };
    edit.write(storage, &header)
}

fn check_data_file_name(path: &Path, name: &str) -> Result<()> {
    if (1..=NAME_MAX).contains(&name.len()) && !name.contains('\0') {
        return Ok(());
    }
    let what =
        format!("the data file's name is {} bytes long: 1 to {NAME_MAX} without NUL are allowed", name.len());
    Err(Error::unsupported(path, what))
}

/// Writes another name of its external data file into an image's header; the file is not looked at. An image without
/// such a file is refused, and names that are empty, longer than 1023 bytes or with a NUL.
pub fn set_data_file(storage: &dyn Storage, name: &str) -> Result<()> {
    let header = Header::parse(storage)?;
    refuse_corrupt(storage, &header)?;
    if !header.external_data() {
        return Err(Error::refused(storage.path(), "its data does not lie in an external file".to_owned()));
    }
    check_data_file_name(storage.path(), name)?;
    let mut edit = Edit::keep(storage, &header)?;
    edit.data_file = Some(name.as_bytes().to_vec());
    edit.write(storage, &header)
}

/// What cluster 0 is to say, beyond the fields of fixed size.
pub(crate) struct Edit {
    zero: Vec<u8>,
    /// 2 or 3.
    pub(crate) version: u32,
    pub(crate) backing: Option<(String, Option<String>)>,
    /// The bitmaps extension's data.
    pub(crate) bitmaps: Option<Vec<u8>>,
    /// The name of the external data file.
    data_file: Option<Vec<u8>>,
    pub(crate) autoclear: u64,
}

impl Edit {
    /// What it says now; autoclear bits that are not understood are cleared.
    pub(crate) fn keep(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let zero = read_cluster_zero(storage, header)?;
        let found = extensions(&zero, header);
        let data = |kind| {
            found.iter().find(|e| e.kind == kind).and_then(|e| zero.get(e.data.clone()).map(<[u8]>::to_vec))
        };
        Ok(Self {
            version: header.version,
            backing: header.backing.clone().map(|name| (name, header.backing_format.clone())),
            bitmaps: data(EXT_BITMAPS),
            data_file: data(EXT_DATA_FILE),
            autoclear: header.autoclear & header::AUTOCLEAR_KNOWN,
            zero,
        })
    }

    /// Writes it. A new backing file's name is made durable first, where nothing points to it yet; all else goes out in
    /// one write, of less than a sector where that is possible.
    pub(crate) fn write(&self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let path = storage.path();
        let old_fixed = header.header_length as usize;
        let mut h = self
            .zero
            .get(..old_fixed)
            .ok_or_else(|| Error::damaged(path, "the header runs past the end of the file"))?
            .to_vec();
        match (header.version, self.version) {
            (2, 3) => {
                h.resize(HEADER_LENGTH, 0);
                h[72..].fill(0);
                h[96..100].copy_from_slice(&4u32.to_be_bytes());
                h[100..104].copy_from_slice(&(HEADER_LENGTH as u32).to_be_bytes());
            }
            (3, 2) => h.truncate(72),
            _ => {}
        }
        h[4..8].copy_from_slice(&self.version.to_be_bytes());
        if self.version >= 3 {
            h[88..96].copy_from_slice(&self.autoclear.to_be_bytes());
        }
        let found = extensions(&self.zero, header);
        let kept = |names: bool| {
            let mut others = Vec::new();
            for (kind, data) in [(EXT_BITMAPS, &self.bitmaps), (EXT_DATA_FILE, &self.data_file)] {
                if let Some(data) = data {
                    append_extension(&mut others, kind, data);
                }
            }
            let ours = [EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE];
            for e in found.iter().filter(|e| !ours.contains(&e.kind)) {
                if names || e.kind != header::EXT_FEATURE_NAMES {
                    append_extension(&mut others, e.kind, &self.zero[e.data.clone()]);
                }
            }
            others
        };
        // The table of feature names is for people only: it must not push the rest out of the first sector.
        let mut others = kept(true);
        if h.len() + others.len() + 24 > SECTOR {
            others = kept(false);
        }
        let (old_at, old_len) = (header.backing_at.0 as usize, header.backing_at.1 as usize);
        let old_name = (old_at != 0 && old_len != 0).then(|| old_at..old_at + old_len);
        let backing = self.backing.as_ref().map(|(name, format)| (name.as_str(), format.as_deref()));
        let (ext_end, name_at) =
            append_backing(&mut h, others, backing, old_name.clone(), header.cluster_bits, path)?;
        let io = |doing: &'static str| move |e| Error::io(path, doing, e);
        let old_end = found.last().map_or(old_fixed, |e| e.data.end.next_multiple_of(8)) + 8;
        let apart =
            name_at >= old_end && old_name.is_none_or(|old| old.end <= name_at || h.len() <= old.start);
        if apart {
            let name = &h[name_at..];
            if !name.is_empty() {
                storage.write_at(name, name_at as u64).map_err(io("writing the backing file's name"))?;
                storage.sync().map_err(io("syncing"))?;
            }
            h.truncate(ext_end);
        }
        storage.write_at(&h, 0).map_err(io("writing the header"))?;
        storage.sync().map_err(io("syncing"))
    }
}
