//! Numbers of the format, hashes, and little-endian fields.

use xxhash_rust::xxh3::xxh3_64;

pub(super) const MAGIC: [u8; 8] = *b"KNIBSUMS";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_LEN: usize = 96;
pub(super) const ENTRY_LEN: usize = 56;
/// Fixed part of a cluster's record.
pub(super) const RECORD_LEN: usize = 32;
/// Fixed part of a metadata extent.
pub(super) const EXTENT_LEN: usize = 16;
/// log2 of the guest bytes that one block of records covers.
pub(super) const REGION_BITS: u32 = 24;
/// Stored bytes that one fast checksum covers; the last one of a cluster or extent may cover less.
pub const PIECE: u64 = 4096;

/// The first 128 bits of BLAKE3 over the guest's cluster.
pub type Strong = [u8; 16];

/// The strong hash of a cluster. `guest` may be shorter at the end of the disk: it is padded with zeros.
pub fn strong(guest: &[u8], cluster_size: u64) -> Strong {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut hasher = blake3::Hasher::new();
    hasher.update(guest);
    let mut missing = cluster_size.saturating_sub(guest.len() as u64);
    while missing > 0 {
        let step = missing.min(ZEROS.len() as u64);
        hasher.update(ZEROS.get(..step as usize).unwrap_or(&ZEROS));
        missing -= step;
    }
    first_half(&hasher)
}

fn first_half(hasher: &blake3::Hasher) -> Strong {
    let mut strong = Strong::default();
    hasher.finalize_xof().fill(&mut strong);
    strong
}

/// The fast checksum of one piece: the low half of XXH3-64.
pub fn fast(piece: &[u8]) -> u32 {
    xxh3_64(piece) as u32
}

/// The fast checksums of all pieces of a cluster or extent.
pub(super) fn fasts(stored: &[u8]) -> Vec<u32> {
    stored.chunks(PIECE as usize).map(fast).collect()
}

/// How many pieces `len` bytes have.
pub(super) fn pieces(len: u64) -> u64 {
    len.div_ceil(PIECE)
}

/// Clusters in a region: region and cluster size are powers of two.
pub(super) fn clusters_per_region(cluster_bits: u32) -> u64 {
    1 << REGION_BITS.saturating_sub(cluster_bits)
}

/// Reads little-endian fields one after the other; `None` past the end.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// The header: fixed, at the start of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub cluster_bits: u32,
    pub virtual_size: u64,
    pub image_len: u64,
    pub directory: Span,
    pub metadata: Span,
    pub clusters: u64,
}

/// A part of the sums file with the XXH3-64 of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub offset: u64,
    pub len: u64,
    pub checksum: u64,
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.cluster_bits.to_le_bytes());
        out.extend_from_slice(&self.virtual_size.to_le_bytes());
        out.extend_from_slice(&self.image_len.to_le_bytes());
        for span in [self.directory, self.metadata] {
            out.extend_from_slice(&span.offset.to_le_bytes());
            out.extend_from_slice(&span.len.to_le_bytes());
            out.extend_from_slice(&span.checksum.to_le_bytes());
        }
        out.extend_from_slice(&self.clusters.to_le_bytes());
        let checksum = xxh3_64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Decodes and checks a header against the length of the sums file.
    pub fn decode(bytes: &[u8; HEADER_LEN], file_len: u64) -> Result<Self, String> {
        let short = || "its header is cut".to_owned();
        let mut fields = Fields(bytes);
        if fields.array().ok_or_else(short)? != MAGIC {
            return Err("it does not start with KNIBSUMS".into());
        }
        let version = fields.u32().ok_or_else(short)?;
        if version > VERSION {
            return Err(format!("it has version {version}, this knibfs reads up to {VERSION}"));
        }
        let (body, _) = bytes.split_at(HEADER_LEN - 8);
        let cluster_bits = fields.u32().ok_or_else(short)?;
        let virtual_size = fields.u64().ok_or_else(short)?;
        let image_len = fields.u64().ok_or_else(short)?;
        let mut span = || Some(Span { offset: fields.u64()?, len: fields.u64()?, checksum: fields.u64()? });
        let directory = span().ok_or_else(short)?;
        let metadata = span().ok_or_else(short)?;
        let clusters = fields.u64().ok_or_else(short)?;
        if fields.u64() != Some(xxh3_64(body)) {
            return Err("its header does not match its checksum".into());
        }
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("it has impossible clusters of 2^{cluster_bits} bytes"));
        }
        for span in [directory, metadata] {
            let end = span.offset.checked_add(span.len);
            if span.offset < HEADER_LEN as u64 || end.is_none_or(|end| end > file_len) {
                return Err("its header points past its end: it is cut".into());
            }
        }
        Ok(Self { cluster_bits, virtual_size, image_len, directory, metadata, clusters })
    }
}

/// One block of records in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Which 16 MiB of the guest (or which cluster, where a cluster is not smaller).
    pub region: u64,
    pub span: Span,
    pub records: u64,
    /// Host range that its stored clusters lie in; empty where all are zeros.
    pub host_start: u64,
    pub host_end: u64,
}

impl Entry {
    pub fn encode(&self, out: &mut Vec<u8>) {
        for field in [
            self.region,
            self.span.offset,
            self.span.len,
            self.span.checksum,
            self.records,
            self.host_start,
            self.host_end,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
    }

    pub fn decode(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            region: fields.u64()?,
            span: Span { offset: fields.u64()?, len: fields.u64()?, checksum: fields.u64()? },
            records: fields.u64()?,
            host_start: fields.u64()?,
            host_end: fields.u64()?,
        })
    }
}
