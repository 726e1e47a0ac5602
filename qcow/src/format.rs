//! Empty images with every choice that the format leaves: version, width of refcounts, extended L2 entries, an
//! external data file, allocated metadata. [`crate::create`] is the short way for what new images usually are.

use crate::create::append_backing;
use crate::entry::COPIED;
use crate::header::{self, EXT_DATA_FILE, incompatible};
use crate::{CompressionType, Error, Result, Storage, refcount};

/// Compatible feature bit of lazy refcounts.
const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit: the data file is the guest's disk by itself.
const RAW_DATA_FILE: u64 = 2;

/// What a new, empty image is to be.
#[derive(Clone, Debug)]
pub struct NewFormat {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9–21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0–6; version 2 has 4.
    pub refcount_order: u32,
    /// Whether refcounts may be written late. Version 3.
    pub lazy_refcounts: bool,
    /// Whether L2 entries have subclusters. Version 3.
    pub extended_l2: bool,
    /// Codec of the clusters that will be compressed. Other than deflate: version 3.
    pub compression: CompressionType,
    /// Backing file's name and its format's, as the header is to say them.
    pub backing: Option<(String, Option<String>)>,
    /// External data file as named, and whether it is the guest's disk by itself. Version 3.
    pub data_file: Option<(String, bool)>,
    /// Whether every cluster gets its place now.
    pub allocate: bool,
}

impl NewFormat {
    /// Version 3, 64 KiB clusters, 16-bit refcounts, deflate, standing on nothing.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            extended_l2: false,
            compression: CompressionType::Deflate,
            backing: None,
            data_file: None,
            allocate: false,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster() / if self.extended_l2 { 16 } else { 8 }
    }

    fn check(&self, path: &std::path::Path) -> Result<()> {
        let v2_has = self.lazy_refcounts
            || self.extended_l2
            || self.data_file.is_some()
            || self.compression != CompressionType::Deflate
            || self.refcount_order != 4;
        let what = if !(9..=21).contains(&self.cluster_bits) {
            "clusters are of 512 bytes to 2 MiB"
        } else if self.refcount_order > 6 {
            "refcounts have at most 64 bits"
        } else if !(2..=3).contains(&self.version) {
            "versions are 2 and 3"
        } else if self.version == 2 && v2_has {
            "version 2 has 16-bit refcounts, deflate, and neither lazy refcounts, extended L2 entries nor data files"
        } else if self.extended_l2 && self.cluster_bits < 14 {
            "extended L2 entries need clusters of 16 KiB or more"
        } else if self.size > i64::MAX as u64 {
            "a disk is smaller than 8 EiB"
        } else if self.data_file.is_some() && self.backing.is_some() && self.allocate {
            "an image with allocated clusters hides its backing file"
        } else {
            return Ok(());
        };
        Err(Error::unsupported(path, what))
    }
}

/// Where the parts of a new image lie, in clusters.
pub(crate) struct Parts {
    pub(crate) table: u64,
    pub(crate) blocks: u64,
    pub(crate) l1_entries: u64,
    pub(crate) l1: u64,
    pub(crate) l2: u64,
    pub(crate) data: u64,
}

impl Parts {
    /// The layout of an image: header, refcount table, refcount blocks, L1 table, L2 tables, data.
    pub(crate) fn of(new: &NewFormat, path: &std::path::Path) -> Result<Self> {
        let cluster = new.cluster();
        let disk = new.size.div_ceil(cluster);
        let l1_entries = disk.div_ceil(new.l2_entries()).max(1);
        if l1_entries * 8 > 32 << 20 {
            let what = format!(
                "a disk of {} bytes is too large for clusters of {cluster} bytes: use larger clusters",
                new.size
            );
            return Err(Error::unsupported(path, what));
        }
        let l1 = (l1_entries * 8).div_ceil(cluster);
        let l2 = if new.allocate { disk.div_ceil(new.l2_entries()) } else { 0 };
        let data = if new.allocate && new.data_file.is_none() { disk } else { 0 };
        let per_block = (cluster * 8) >> new.refcount_order;
        let (mut table, mut blocks) = (1, 1);
        loop {
            let need_blocks = (1 + table + blocks + l1 + l2 + data).div_ceil(per_block);
            let need_table = (need_blocks * 8).div_ceil(cluster);
            if need_table <= table && need_blocks <= blocks {
                break;
            }
            (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
        }
        if table * cluster > 8 << 20 {
            return Err(Error::unsupported(
                path,
                "the refcounts would need a table of more than 8 MiB: use larger clusters",
            ));
        }
        Ok(Self { table, blocks, l1_entries, l1, l2, data })
    }

    pub(crate) fn l1_at(&self) -> u64 {
        1 + self.table + self.blocks
    }
    pub(crate) fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1
    }
    pub(crate) fn data_at(&self) -> u64 {
        self.l2_at() + self.l2
    }
    pub(crate) fn end(&self) -> u64 {
        self.data_at() + self.data
    }
}

/// Writes an empty image to `dest`, whatever that held before, and makes it durable. Returns the range (offset and
/// length in bytes) where the guest's data will lie, empty unless clusters were allocated. An external data file is
/// only named, not touched.
pub fn create_as(dest: &dyn Storage, new: &NewFormat) -> Result<(u64, u64)> {
    let path = dest.path();
    new.check(path)?;
    let parts = Parts::of(new, path)?;
    let (bits, cluster) = (new.cluster_bits, new.cluster());
    let zero = header_of(new, &parts, path)?;
    let io = |doing: &'static str| move |e| Error::io(path, doing, e);
    // The end of the last table that is not data: what is behind reads as zeros.
    let l1_end = (parts.l1_at() << bits) + (parts.l1_entries * 8).next_multiple_of(512);
    let len = if new.allocate { parts.end() << bits } else { l1_end };
    dest.set_len(0).map_err(io("emptying"))?;
    dest.set_len(len).map_err(io("growing"))?;
    if dest.len().map_err(io("asking for the length"))? > len {
        // A block device keeps what it held.
        dest.punch(0, parts.data_at() << bits).map_err(io("clearing"))?;
    }
    let blocks: Vec<u8> =
        (0..parts.blocks).flat_map(|b| ((1 + parts.table + b) << bits).to_be_bytes()).collect();
    dest.write_at(&blocks, cluster).map_err(io("writing the refcount table"))?;
    let per_block = (cluster * 8) >> new.refcount_order;
    for number in 0..parts.blocks {
        let mut block = vec![0u8; cluster as usize];
        for at in 0..per_block.min(parts.end().saturating_sub(number * per_block)) {
            refcount::set(&mut block, new.refcount_order, at as usize, 1);
        }
        dest.write_at(&block, (1 + parts.table + number) << bits).map_err(io("writing refcounts"))?;
    }
    if new.allocate {
        let l1: Vec<u8> =
            (0..parts.l2).flat_map(|t| ((parts.l2_at() + t) << bits | COPIED).to_be_bytes()).collect();
        dest.write_at(&l1, parts.l1_at() << bits).map_err(io("writing the L1 table"))?;
        let disk = new.size.div_ceil(cluster);
        let first = if new.data_file.is_some() { 0 } else { parts.data_at() };
        for table in 0..parts.l2 {
            let from = table * new.l2_entries();
            let mut bytes = Vec::with_capacity(cluster as usize);
            for index in from..disk.min(from + new.l2_entries()) {
                bytes.extend_from_slice(&((first + index) << bits | COPIED).to_be_bytes());
                if new.extended_l2 {
                    // The cluster is there, and none of its subclusters holds data yet.
                    bytes.extend_from_slice(&[0; 8]);
                }
            }
            dest.write_at(&bytes, (parts.l2_at() + table) << bits).map_err(io("writing an L2 table"))?;
        }
    }
    // The header last: a file that was cut before is no image at all.
    dest.sync().map_err(io("syncing"))?;
    dest.write_at(&zero, 0).map_err(io("writing the header"))?;
    dest.sync().map_err(io("syncing"))?;
    Ok((parts.data_at() << bits, parts.data << bits))
}

fn header_of(new: &NewFormat, parts: &Parts, path: &std::path::Path) -> Result<Vec<u8>> {
    let v3 = new.version >= 3;
    let mut h = vec![0u8; if v3 { 112 } else { 72 }];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &header::MAGIC.to_be_bytes());
    put(4, &new.version.to_be_bytes());
    put(20, &new.cluster_bits.to_be_bytes());
    put(24, &new.size.to_be_bytes());
    put(36, &(parts.l1_entries as u32).to_be_bytes());
    put(40, &(parts.l1_at() << new.cluster_bits).to_be_bytes());
    put(48, &new.cluster().to_be_bytes());
    put(56, &(parts.table as u32).to_be_bytes());
    let mut others = Vec::new();
    if v3 {
        let mut features = 0;
        if new.compression == CompressionType::Zstd {
            features |= incompatible::COMPRESSION;
            put(104, &[1]);
        }
        if new.extended_l2 {
            features |= incompatible::EXTENDED_L2;
        }
        if let Some((name, raw)) = &new.data_file {
            features |= incompatible::DATA_FILE;
            if *raw {
                put(88, &RAW_DATA_FILE.to_be_bytes());
            }
            others.extend_from_slice(&EXT_DATA_FILE.to_be_bytes());
            others.extend_from_slice(&(name.len() as u32).to_be_bytes());
            others.extend_from_slice(name.as_bytes());
            others.resize(others.len().next_multiple_of(8), 0);
        }
        put(72, &features.to_be_bytes());
        put(80, &(if new.lazy_refcounts { LAZY_REFCOUNTS } else { 0 }).to_be_bytes());
        put(96, &new.refcount_order.to_be_bytes());
        put(100, &112u32.to_be_bytes());
    }
    let backing = new.backing.as_ref().map(|(name, format)| (name.as_str(), format.as_deref()));
    append_backing(&mut h, others, backing, None, new.cluster_bits, path)?;
    Ok(h)
}
