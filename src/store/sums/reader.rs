//! Reads a sums file: the directory when it is opened, blocks of records when they are asked for.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::format::{ENTRY_LEN, Entry, Fields, HEADER_LEN, Header, Span, clusters_per_region};
use super::host::Metadata;
use super::writer::digest;
use super::{Record, Region, SumsCache};
use crate::store::{StoreError, StoreResult, plain};

/// An opened sums file. Cheap to share; reads from many threads at once.
#[derive(Debug)]
pub struct Sums {
    path: PathBuf,
    file: File,
    number: u64,
    pub(super) header: Header,
    pub(super) directory: Vec<Entry>,
    metadata: OnceLock<Metadata>,
    digest: String,
    cache: Arc<SumsCache>,
}

/// What an opened sums file says of its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumsInfo {
    /// Bytes a cluster.
    pub cluster_size: u64,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Length of the image in bytes.
    pub image_len: u64,
    /// Stored clusters.
    pub clusters: u64,
    /// Digest of header and directory, as the manifest has it.
    pub digest: String,
}

impl Sums {
    /// Opens a file and checks its header and directory.
    pub fn open(path: &Path, cache: Arc<SumsCache>) -> StoreResult<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let file = plain::open(path)?;
        let len = file.metadata().map_err(StoreError::io("look at", path))?.len();
        let damaged = |what: String| StoreError::damaged(path, what);
        if len < HEADER_LEN as u64 {
            return Err(damaged("it is shorter than its header".into()));
        }
        let mut head = [0; HEADER_LEN];
        file.read_exact_at(&mut head, 0).map_err(StoreError::io("read", path))?;
        let header = Header::decode(&head, len).map_err(damaged)?;
        let directory_bytes = read_span(&file, path, header.directory)?;
        if len <= WANTED_SOON {
            // Its blocks will be asked for one after the other: better they come all at once. Advice only.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
        }
        let directory = decode_directory(&directory_bytes, &header).map_err(damaged)?;
        Ok(Self {
            path: path.into(),
            file,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            digest: digest(&head, &directory_bytes),
            header,
            directory,
            metadata: OnceLock::new(),
            cache,
        })
    }

    /// As `open`, and it must be the very file that the manifest speaks of.
    pub fn open_checked(path: &Path, expected_digest: &str, cache: Arc<SumsCache>) -> StoreResult<Self> {
        let sums = Self::open(path, cache)?;
        if sums.digest != expected_digest {
            return Err(StoreError::damaged(path, "it is not the file that the manifest was written with"));
        }
        Ok(sums)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says of its image.
    pub fn info(&self) -> SumsInfo {
        SumsInfo {
            cluster_size: 1 << self.header.cluster_bits,
            virtual_size: self.header.virtual_size,
            image_len: self.header.image_len,
            clusters: self.header.clusters,
            digest: self.digest.clone(),
        }
    }

    /// The records of the region that holds `cluster`; none where nothing of it is stored. Kept in the cache.
    pub fn region_of(&self, cluster: u64) -> StoreResult<Option<Arc<Region>>> {
        let region = cluster / clusters_per_region(self.header.cluster_bits);
        match self.directory.binary_search_by_key(&region, |e| e.region) {
            Ok(at) => self.load(at).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Calls `with` with the record of a cluster, none where it is not stored.
    pub fn with_record<R>(&self, cluster: u64, with: impl FnOnce(Option<Record<'_>>) -> R) -> StoreResult<R> {
        let region = self.region_of(cluster)?;
        Ok(with(region.as_ref().and_then(|r| r.get(cluster))))
    }

    /// The first stored cluster from `cluster` on, in guest order.
    pub fn next_stored(&self, cluster: u64) -> StoreResult<Option<u64>> {
        let region = cluster / clusters_per_region(self.header.cluster_bits);
        let from = self.directory.partition_point(|e| e.region < region);
        for at in from..self.directory.len() {
            let records = self.load(at)?;
            if let Some(record) = records.records().find(|r| r.cluster >= cluster) {
                return Ok(Some(record.cluster));
            }
        }
        Ok(None)
    }

    /// The regions in guest order, one after the other: for reading everything.
    pub fn regions(&self) -> impl Iterator<Item = StoreResult<Arc<Region>>> {
        (0..self.directory.len()).map(|at| self.load(at))
    }

    pub(super) fn load(&self, at: usize) -> StoreResult<Arc<Region>> {
        let entry = self.directory.get(at).ok_or_else(|| self.damage("its directory is short"))?;
        if let Some(region) = self.cache.get(self.number, entry.region) {
            return Ok(region);
        }
        let bytes = read_span(&self.file, &self.path, entry.span)?;
        let region = Region::decode(entry.region, self.header.cluster_bits, self.header.image_len, &bytes)
            .map_err(|what| self.damage(&format!("it holds {what}")))?;
        let range = region.host_range().unwrap_or((entry.host_start, entry.host_start));
        if range != (entry.host_start, entry.host_end) || region.records().count() as u64 != entry.records {
            return Err(self.damage("its directory and its records disagree"));
        }
        let region = Arc::new(region);
        self.cache.put(self.number, entry.region, &region);
        Ok(region)
    }

    pub(super) fn metadata(&self) -> StoreResult<&Metadata> {
        if let Some(known) = self.metadata.get() {
            return Ok(known);
        }
        let bytes = read_span(&self.file, &self.path, self.header.metadata)?;
        let metadata = Metadata::decode(&bytes, self.header.image_len).map_err(|what| self.damage(&what))?;
        Ok(self.metadata.get_or_init(|| metadata))
    }

    pub(super) fn damage(&self, what: &str) -> StoreError {
        StoreError::damaged(&self.path, what)
    }
}

/// Files up to this length are read when they are opened: that of 100 GiB of compressed data. Bytes.
const WANTED_SOON: u64 = 64 << 20;

impl Drop for Sums {
    fn drop(&mut self) {
        self.cache.forget(self.number);
    }
}

/// No part of a real file comes near this: the directory of 100 TiB of data is 350 MB. Bytes.
const MAX_SPAN: u64 = 512 << 20;

/// Reads a part whose place was checked against the file's length, and compares its checksum.
fn read_span(file: &File, path: &Path, span: Span) -> StoreResult<Vec<u8>> {
    let len = usize::try_from(span.len)
        .ok()
        .filter(|_| span.len <= MAX_SPAN)
        .ok_or_else(|| StoreError::damaged(path, "it claims an impossible length"))?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, span.offset).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => StoreError::damaged(path, "it is cut"),
        _ => StoreError::io("read", path)(e),
    })?;
    if xxh3_64(&bytes) != span.checksum {
        return Err(StoreError::damaged(
            path,
            format!("{len} bytes at {} do not match their checksum", span.offset),
        ));
    }
    Ok(bytes)
}

fn decode_directory(bytes: &[u8], header: &Header) -> Result<Vec<Entry>, String> {
    if !bytes.len().is_multiple_of(ENTRY_LEN) {
        return Err("its directory has a broken length".into());
    }
    let mut fields = Fields(bytes);
    let mut entries: Vec<Entry> = Vec::with_capacity(bytes.len() / ENTRY_LEN);
    let (mut host, mut total) = (0, 0u64);
    while let Some(entry) = Entry::decode(&mut fields) {
        let end = entry.span.offset.checked_add(entry.span.len);
        if entry.span.offset < HEADER_LEN as u64 || end.is_none_or(|end| end > header.metadata.offset) {
            return Err("its directory points outside its records".into());
        }
        if entries.last().is_some_and(|last| last.region >= entry.region) {
            return Err("its directory is out of order".into());
        }
        if entry.host_end > 0 {
            if entry.host_start < host
                || entry.host_end < entry.host_start
                || entry.host_end > header.image_len
            {
                return Err("its directory names impossible places in the image".into());
            }
            host = entry.host_end;
        }
        total = total.saturating_add(entry.records);
        entries.push(entry);
    }
    if total != header.clusters {
        return Err("its directory and its header disagree".into());
    }
    Ok(entries)
}
