//! Writes a sums file while its image is written.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::block::{self, Place, Region};
use super::format::{Entry, Header, RECORD_LEN, Span, Strong, clusters_per_region, fasts, pieces, strong};
use super::{PIECE, SumsChain};
use crate::store::{StoreError, StoreResult};

/// What a worker computes of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterDigest {
    strong: Strong,
    fasts: Vec<u32>,
}

impl ClusterDigest {
    /// Of a cluster that moves as it is stored, whose guest's bytes are known by their hash in another image's record.
    pub fn of_moved(strong: Strong, stored: &[u8]) -> Self {
        Self { strong, fasts: fasts(stored) }
    }
}

/// What the manifest says of a sums file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumsSummary {
    /// Its length in bytes.
    pub len: u64,
    /// BLAKE3 (128 bits, hexadecimal) of its header and directory, which cover the rest.
    pub digest: String,
    /// Records in it.
    pub clusters: u64,
}

/// Collects checksums of an image that is being written in guest order, and writes them to `path`.
#[derive(Debug)]
pub struct SumsWriter {
    path: PathBuf,
    cluster_bits: u32,
    virtual_size: u64,
    compare: Option<SumsChain>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    out: BufWriter<File>,
    at: u64,
    region: Option<u64>,
    block: Vec<u8>,
    directory: Vec<Entry>,
    next_cluster: u64,
    /// Host bytes behind what is stored of the regions before this one, and of all regions.
    before: u64,
    host: u64,
    clusters: u64,
    metadata: BTreeMap<u64, Extent>,
}

#[derive(Debug)]
struct Extent {
    len: u64,
    fasts: Vec<u32>,
}

impl Extent {
    /// Takes the sums of pieces that were written again; `None` where they are not whole pieces of this extent at `at`.
    fn rewrite(&mut self, at: u64, offset: u64, end: u64, sums: &[u32]) -> Option<()> {
        let first = offset.checked_sub(at)?;
        let ends_whole = end == at + self.len || (end < at + self.len && (end - at).is_multiple_of(PIECE));
        if !first.is_multiple_of(PIECE) || !ends_whole {
            return None;
        }
        let first = usize::try_from(first / PIECE).ok()?;
        self.fasts.get_mut(first..first.checked_add(sums.len())?)?.copy_from_slice(sums);
        Some(())
    }
}

impl SumsWriter {
    /// Creates the file; one that is there is an error.
    pub fn create(path: &Path, cluster_bits: u32, virtual_size: u64) -> StoreResult<Self> {
        if !(9..=21).contains(&cluster_bits) {
            return Err(StoreError::Invalid(format!("no image has clusters of 2^{cluster_bits} bytes")));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(StoreError::io("create", path))?;
        let mut out = BufWriter::with_capacity(256 << 10, file);
        out.write_all(&[0; super::format::HEADER_LEN]).map_err(StoreError::io("write", path))?;
        let state = State {
            out,
            at: super::format::HEADER_LEN as u64,
            region: None,
            block: Vec::new(),
            directory: Vec::new(),
            next_cluster: 0,
            before: 0,
            host: 0,
            clusters: 0,
            metadata: BTreeMap::new(),
        };
        Ok(Self { path: path.into(), cluster_bits, virtual_size, compare: None, state: Mutex::new(state) })
    }

    /// Where it is written.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// For `scan`: clusters that are what the parent's chain holds are left out.
    #[must_use]
    pub fn leave_out_what_is_in(mut self, parent: SumsChain) -> Self {
        self.compare = Some(parent);
        self
    }

    /// Whether a cluster has to be stored. What cannot be compared is stored.
    pub fn is_new(&self, cluster: u64, guest: &[u8]) -> bool {
        let Some(parent) = &self.compare else { return true };
        let hash = strong(guest, 1 << self.cluster_bits);
        match parent.is_unchanged(cluster, &hash, guest) {
            Ok(unchanged) => !unchanged,
            Err(error) => {
                tracing::warn!("comparing with the parent failed, so the cluster is stored: {error}");
                true
            }
        }
    }

    /// Checksums of one cluster: from any thread. `stored` is empty for zeros.
    pub fn digest_cluster(&self, guest: &[u8], stored: &[u8]) -> ClusterDigest {
        ClusterDigest { strong: strong(guest, 1 << self.cluster_bits), fasts: fasts(stored) }
    }

    /// Records one stored cluster. Guest clusters must ascend, and so must host offsets from one region to the next.
    pub fn record_cluster(&self, cluster: u64, place: Place, digest: &ClusterDigest) -> StoreResult<()> {
        let state = &mut *self.state.lock();
        let cluster_size = 1u64 << self.cluster_bits;
        let broken = |what: &str| {
            Err(StoreError::Invalid(format!("{}: {what} (cluster {cluster})", self.path.display())))
        };
        if cluster < state.next_cluster || cluster >= self.virtual_size.div_ceil(cluster_size) {
            return broken("clusters must be recorded in the guest's order and lie in the disk");
        }
        let span = clusters_per_region(self.cluster_bits);
        let region = cluster / span;
        if state.region != Some(region) {
            self.flush_region(state)?;
            state.region = Some(region);
            state.before = state.host;
        }
        let (offset, len) = place.stored().unwrap_or((state.host, 0));
        if offset < state.before || len > cluster_size || pieces(len) != digest.fasts.len() as u64 {
            return broken("what is stored of a region must lie behind the regions before it in the file");
        }
        let index = u16::try_from(cluster % span).unwrap_or_default();
        block::encode(&mut state.block, index, place, &digest.strong, &digest.fasts);
        state.host = state.host.max(offset.saturating_add(len));
        state.next_cluster = cluster + 1;
        state.clusters += 1;
        Ok(())
    }

    /// Records one write of metadata. Whole pieces of what was recorded may be written again; other overlaps are errors.
    pub fn record_metadata(&self, offset: u64, bytes: &[u8]) -> StoreResult<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let state = &mut *self.state.lock();
        let len = bytes.len() as u64;
        let end = offset.saturating_add(len);
        let sums = fasts(bytes);
        if let Some((at, last)) = state.metadata.range_mut(..end).next_back() {
            let last_end = at.saturating_add(last.len);
            if last_end > offset {
                return last.rewrite(*at, offset, end, &sums).ok_or_else(|| {
                    StoreError::Invalid(format!(
                        "{}: metadata at {offset} was written twice in different pieces",
                        self.path.display()
                    ))
                });
            }
            // Tables are written piece by piece: one extent for what is contiguous keeps the list short.
            if last_end == offset && last.len.is_multiple_of(PIECE) {
                last.len += len;
                last.fasts.extend(sums);
                return Ok(());
            }
        }
        state.metadata.insert(offset, Extent { len, fasts: sums });
        Ok(())
    }

    fn flush_region(&self, state: &mut State) -> StoreResult<()> {
        let Some(region) = state.region.take() else { return Ok(()) };
        let block = std::mem::take(&mut state.block);
        // What is written is what can be read again: the same code decodes it.
        let decoded =
            Region::decode(region, self.cluster_bits, u64::MAX, &block).map_err(StoreError::Invalid)?;
        // A region of zeros only has an empty range where the one before ended, so that ranges ascend.
        let before = state.directory.last().map_or(0, |e| e.host_end);
        let (host_start, host_end) = decoded.host_range().unwrap_or((before, before));
        let span = self.write(state, &block)?;
        state.directory.push(Entry {
            region,
            span,
            records: decoded.records().count() as u64,
            host_start,
            host_end,
        });
        state.block = block;
        state.block.clear();
        Ok(())
    }

    fn write(&self, state: &mut State, bytes: &[u8]) -> StoreResult<Span> {
        let span = Span { offset: state.at, len: bytes.len() as u64, checksum: xxh3_64(bytes) };
        state.out.write_all(bytes).map_err(StoreError::io("write", &self.path))?;
        state.at += span.len;
        Ok(span)
    }

    /// Writes what is left and the header, and flushes. `image_len` is the length of the finished qcow2 file.
    pub fn finish(self, image_len: u64) -> StoreResult<SumsSummary> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        self.flush_region(state)?;
        let mut metadata = Vec::new();
        for (offset, extent) in std::mem::take(&mut state.metadata) {
            if offset.saturating_add(extent.len) > image_len {
                return Err(StoreError::Invalid(format!(
                    "{}: metadata past the image's end",
                    self.path.display()
                )));
            }
            metadata.reserve(super::format::EXTENT_LEN + extent.fasts.len() * 4);
            metadata.extend_from_slice(&offset.to_le_bytes());
            metadata.extend_from_slice(&extent.len.to_le_bytes());
            extent.fasts.iter().for_each(|f| metadata.extend_from_slice(&f.to_le_bytes()));
        }
        let metadata = self.write(state, &metadata)?;
        let mut directory = Vec::with_capacity(state.directory.len() * super::format::ENTRY_LEN);
        state.directory.iter().for_each(|e| e.encode(&mut directory));
        let directory_span = self.write(state, &directory)?;
        let header = Header {
            cluster_bits: self.cluster_bits,
            virtual_size: self.virtual_size,
            image_len,
            directory: directory_span,
            metadata,
            clusters: state.clusters,
        }
        .encode();
        let out = &mut state.out;
        out.seek(SeekFrom::Start(0))
            .and_then(|_| out.write_all(&header))
            .and_then(|()| out.flush())
            .and_then(|()| out.get_ref().sync_all())
            .map_err(StoreError::io("write", &self.path))?;
        Ok(SumsSummary { len: state.at, digest: digest(&header, &directory), clusters: state.clusters })
    }
}

/// Digest of header and directory, for the manifest.
pub(super) fn digest(header: &[u8], directory: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(directory);
    hasher.finalize().to_hex().as_str().chars().take(32).collect()
}

const _: () = assert!(RECORD_LEN == 2 + 2 + 4 + 8 + 16);
