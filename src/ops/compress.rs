//! `compress`: a stored backup anew with compressed clusters, compared, and swapped by renames.
//!
//! The manifest decides which of two files is right: it names the new ones only once both lie in their places, and
//! until then the old ones are kept under another name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use knib_fuse::FsError;
use knib_qcow::{
    Chain, CompressionType, Control, FileStorage, Format, NewImage, Observer, Place, PlainPaths, Run, Source,
    write_image,
};

use super::control::{Event, OpControl};
use super::disk_source::{DiskSource, tree};
use crate::failpoint;
use crate::mount::StoreTree;
use crate::store::journal::{CompressOp, Swap};
use crate::store::manifest::{Compression, CompressionState, Disk, Kind, Manifest};
use crate::store::sums::{self, ClusterDigest, Sums, SumsCache, SumsWriter, strong};
use crate::store::{
    BackupName, DiskName, Operation, Settings, Store, StoreError, StoreResult, VmName, atomic, disk_file,
};

/// Levels that cost little against reading and writing.
const ZSTD_LEVEL: u32 = 3;
const ZLIB_LEVEL: u32 = 6;
/// Clusters that are handed to a worker at once.
const RUN: u64 = 16;
/// Decoded records that are kept, in bytes.
const SUMS_CACHE: usize = 8 << 20;

/// Why a backup was not compressed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It cannot be compressed, or need not be.
    #[error("{backup} is not compressed: {why}")]
    Refused {
        /// The backup.
        backup: String,
        /// Why, and what to do.
        why: String,
    },
    /// A stored image cannot be read.
    #[error("cannot read {disk}: {why}")]
    Read {
        /// The disk.
        disk: DiskName,
        /// What is damaged.
        why: FsError,
    },
    /// The new image cannot be written.
    #[error("cannot compress {disk}: {source}")]
    Write {
        /// The disk.
        disk: DiskName,
        /// Why not.
        source: knib_qcow::Error,
    },
    /// Old and new differ: a fault of the program or of the machine.
    #[error(
        "the compressed image of {disk} differs from the stored one at cluster {cluster}: it was thrown away; check the machine's memory and the store's disks"
    )]
    Differs {
        /// The disk.
        disk: DiskName,
        /// Guest cluster.
        cluster: u64,
    },
}

/// What was compressed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Compressed {
    /// The VM.
    pub vm: VmName,
    /// The backup.
    pub backup: BackupName,
    /// Bytes of its images before.
    pub before: u64,
    /// Bytes of its images now.
    pub after: u64,
}

/// Compresses the images of a backup with its offering's library. What stands on it stays valid.
///
/// # Errors
/// [`CompressError`]; the backup is as it was.
pub fn run(
    store: &Store,
    vm: &VmName,
    backup: &BackupName,
    control: &OpControl<'_>,
) -> Result<Compressed, CompressError> {
    let _lock = store.lock_vm(vm, &format!("compress {vm}/{backup}"))?;
    let manifest = store.manifest(vm, backup)?;
    let settings = store.settings()?;
    check(store, &manifest, &settings)?;
    let _lease = store.lease(manifest.id, "compression")?;
    let swaps = manifest.disks.iter().map(|d| Swap { disk: d.name.clone(), outcome: Default::default() });
    let operation = CompressOp { backup: manifest.id, name: backup.clone(), swaps: swaps.collect() };
    let journal = store.begin(vm, Operation::Compress(operation.clone()))?;
    let before = manifest.stored_size();
    let done = save(store, &manifest, CompressionState::Compressing)
        .map_err(CompressError::from)
        .and_then(|()| work(store, &manifest, &settings, control));
    match done {
        Ok(after) => {
            recover(store, vm, &operation)?;
            journal.finish()?;
            Ok(Compressed { vm: vm.clone(), backup: backup.clone(), before, after })
        }
        Err(error) => {
            // What cannot be undone now stays in the journal, for `recover`.
            recover(store, vm, &operation)?;
            if !control.is_cancelled() {
                save(store, &manifest, CompressionState::CompressionError)?;
            }
            journal.finish()?;
            Err(error)
        }
    }
}

/// What follows a backup: it is compressed where its VM's offering says so and the copy did not do it already. The
/// backup stands whatever happens here, so trouble is a warning, and `knibfs compress` tries again.
///
/// # Errors
/// The VM, its offering or the settings cannot be read.
pub fn after_backup(store: &Store, manifest: Manifest, control: &OpControl<'_>) -> StoreResult<Manifest> {
    let offering = store.vm(&manifest.vm)?.offering.map(|id| store.offering(id)).transpose()?;
    if manifest.compression != CompressionState::Uncompressed || !offering.is_some_and(|o| o.compress) {
        return Ok(manifest);
    }
    if let Err(error) = run(store, &manifest.vm, &manifest.name, control) {
        control.warn(format!("{}/{} is not compressed: {error}", manifest.vm, manifest.name));
    }
    store.manifest(&manifest.vm, &manifest.name)
}

/// Ends a compression that was interrupted: where the manifest does not name the new files yet, the old ones are put
/// back. The caller holds the VM's lock.
///
/// # Errors
/// A file cannot be renamed or deleted; it can be called again.
pub fn recover(store: &Store, vm: &VmName, operation: &CompressOp) -> StoreResult<()> {
    let mut manifest = store.manifest(vm, &operation.name)?;
    let swapped = manifest.compression == CompressionState::Compressed;
    for swap in &operation.swaps {
        for name in files(store, vm, &operation.name, &swap.disk) {
            let old = hidden(&name, "old");
            if !swapped && old.exists() {
                // A second name of the same file: the rename would do nothing, and the name is right already.
                atomic::rename(&old, &name)?;
            }
            atomic::remove(&old)?;
            atomic::remove(&hidden(&name, "new"))?;
        }
    }
    let begun = [CompressionState::Compressing, CompressionState::FinalizingCompression];
    if begun.contains(&manifest.compression) {
        manifest.compression = CompressionState::Uncompressed;
        store.save_manifest(&manifest)?;
    }
    Ok(())
}

fn check(store: &Store, manifest: &Manifest, settings: &Settings) -> Result<(), CompressError> {
    let refuse = |why: String| {
        Err(CompressError::Refused { backup: format!("{}/{}", manifest.vm, manifest.name), why })
    };
    if store.is_write_once() {
        return refuse(
            "files of this store are written once; its backups are compressed while they are taken".into(),
        );
    }
    if manifest.compression == CompressionState::Compressed {
        return refuse("it is compressed already".into());
    }
    let root = store.root();
    let found = rustix::fs::statvfs(root).map_err(|e| StoreError::Io {
        doing: "ask for the free space of",
        path: root.into(),
        source: e.into(),
    })?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    #[allow(clippy::cast_precision_loss, clippy::cast_sign_loss)] // a bound, not an amount
    let wanted = (manifest.stored_size() as f64 * settings.minimum_free_factor()) as u64;
    if free < wanted {
        return refuse(format!(
            "{free} bytes are free in {}, {wanted} are wanted (setting backup.compression.minimum.free.storage); free space, then try again",
            root.display()
        ));
    }
    Ok(())
}

fn save(store: &Store, manifest: &Manifest, state: CompressionState) -> StoreResult<()> {
    store.save_manifest(&Manifest { compression: state, ..manifest.clone() })
}

/// Writes, compares and swaps; returns the bytes of the new images.
fn work(
    store: &Store,
    manifest: &Manifest,
    settings: &Settings,
    control: &OpControl<'_>,
) -> Result<u64, CompressError> {
    let record = store.vm(&manifest.vm)?;
    let offering = match record.offering {
        Some(id) => store.offerings(true)?.into_iter().find(|o| o.id == id),
        None => None,
    };
    let library = offering.map_or(Compression::Zstd, |o| o.compression_library);
    let tree = tree(store, "compression")?;
    let job = Job { store, manifest, settings, library, tree, control };
    let disks = manifest.disks.iter().map(|disk| job.disk(disk)).collect::<Result<Vec<_>, _>>()?;
    save(store, manifest, CompressionState::FinalizingCompression)?;
    for disk in &disks {
        job.compare(disk)?;
    }
    let paths = || disks.iter().flat_map(|d| files(store, &manifest.vm, &manifest.name, &d.name));
    for name in paths() {
        let old = hidden(&name, "old");
        fs::hard_link(&name, &old).map_err(StoreError::io("give a second name to", &name))?;
    }
    let folder = store.backup_dir(&manifest.vm, &manifest.name);
    atomic::sync_dir(&folder)?;
    failpoint::hit("compress.swap");
    for name in paths() {
        atomic::rename(&hidden(&name, "new"), &name)?;
        failpoint::hit("compress.swapped");
    }
    let new = Manifest { disks, compression: CompressionState::Compressed, ..manifest.clone() };
    store.save_manifest(&new)?;
    failpoint::hit("compress.recorded");
    Ok(new.stored_size())
}

/// The files of a disk that are swapped.
fn files(store: &Store, vm: &VmName, backup: &BackupName, disk: &DiskName) -> [PathBuf; 2] {
    [store.disk_path(vm, backup, disk), store.sums_path(vm, backup, disk)]
}

/// Its name while it is not, or no longer, the right one.
fn hidden(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

struct Job<'a> {
    store: &'a Store,
    manifest: &'a Manifest,
    settings: &'a Settings,
    library: Compression,
    tree: StoreTree,
    control: &'a OpControl<'a>,
}

impl Job<'_> {
    fn files(&self, disk: &Disk) -> [PathBuf; 2] {
        files(self.store, &self.manifest.vm, &self.manifest.name, &disk.name)
    }

    fn old_sums(&self, disk: &Disk) -> StoreResult<Sums> {
        let [_, path] = self.files(disk);
        Sums::open_checked(&path, &disk.sums_digest, SumsCache::new(SUMS_CACHE))
    }

    /// Writes one disk beside; returns what the manifest is to say.
    fn disk(&self, disk: &Disk) -> Result<Disk, CompressError> {
        let failed = |source| CompressError::Write { disk: disk.name.clone(), source };
        let [image, sums_path] = self.files(disk).map(|p| hidden(&p, "new"));
        let data = DiskSource::open(self.store, &self.tree, self.manifest, &disk.name)
            .map_err(|why| CompressError::Read { disk: disk.name.clone(), why })?;
        let source = Own { data, sums: self.old_sums(disk)?, disk };
        let parent = self.manifest.parent.as_ref().filter(|_| disk.kind == Kind::Incremental);
        let (kind, level) = match self.library {
            Compression::Zstd => (CompressionType::Zstd, ZSTD_LEVEL),
            Compression::Zlib => (CompressionType::Deflate, ZLIB_LEVEL),
        };
        let new = NewImage {
            size: disk.virtual_size,
            cluster_bits: disk.cluster_size.trailing_zeros(),
            compression: Some(knib_qcow::Compression { kind, level }),
            backing: parent.map(|p| (format!("../{}/{}", p.name, disk_file(&disk.name)), Format::Qcow2)),
        };
        let what = format!("compressing {}", disk.name);
        (self.control.progress)(Event::Begin { what: what.clone(), total: disk.virtual_size });
        let progress = |done| (self.control.progress)(Event::Advance { what: what.clone(), done });
        let how = Control {
            threads: self.settings.compression_threads(),
            rate_limit: self.settings.compression_rate(),
            cancel: self.control.cancel,
            progress: &progress,
        };
        let sums = SumsWriter::create(&sums_path, new.cluster_bits, disk.virtual_size)?;
        let seen = Seen { sums: &sums, compressed: AtomicU64::new(0) };
        let written =
            write_image(FileStorage::create_new(&image).map_err(failed)?, &new, &source, &seen, &how)
                .map_err(failed)?;
        let compressed_clusters = seen.compressed.into_inner();
        let summary = sums.finish(written.file_len)?;
        (self.control.progress)(Event::End { what });
        Ok(Disk {
            file_size: written.file_len,
            data_clusters: written.clusters,
            compressed_clusters,
            zero_clusters: written.zero_clusters,
            compression: Some(self.library).filter(|_| compressed_clusters > 0),
            sums_size: summary.len,
            sums_digest: summary.digest,
            ..disk.clone()
        })
    }

    /// Whether the new file holds what the old one does: each cluster is read back and hashed.
    fn compare(&self, new: &Disk) -> Result<(), CompressError> {
        let old = self.manifest.disk(&new.name).map(|disk| self.old_sums(disk)).transpose()?;
        let Some(old) = old else { return Ok(()) };
        let [image, sums_path] = self.files(new).map(|p| hidden(&p, "new"));
        let read = |source| CompressError::Write { disk: new.name.clone(), source };
        let sums = Sums::open_checked(&sums_path, &new.sums_digest, SumsCache::new(SUMS_CACHE))?;
        let chain = Chain::open(&image, Format::Qcow2, &PlainPaths).map_err(read)?;
        let zeros = strong(&[], new.cluster_size);
        let mut buf = vec![0; new.cluster_size as usize];
        let mut found = 0;
        for region in old.regions() {
            for record in region?.records() {
                if self.control.is_cancelled() {
                    return Err(read(knib_qcow::Error::Cancelled));
                }
                let differs = || CompressError::Differs { disk: new.name.clone(), cluster: record.cluster };
                match sums.with_record(record.cluster, |r| r.map(|r| r.strong))? {
                    Some(hash) if hash == record.strong => found += 1,
                    // Zeros that stand on nothing need not be said.
                    None if new.kind == Kind::Full && record.strong == zeros => {}
                    _ => return Err(differs()),
                }
                let start = record.cluster.checked_mul(new.cluster_size).ok_or_else(differs)?;
                let len = new.virtual_size.saturating_sub(start).min(new.cluster_size) as usize;
                let guest = buf.get_mut(..len).unwrap_or_default();
                chain.read_at(guest, start).map_err(read)?;
                if !record.matches_guest(guest, new.cluster_size) {
                    return Err(differs());
                }
            }
        }
        if found != sums.info().clusters {
            return Err(CompressError::Differs { disk: new.name.clone(), cluster: 0 });
        }
        Ok(())
    }
}

/// What one stored image itself holds.
struct Own<'a> {
    data: DiskSource,
    sums: Sums,
    disk: &'a Disk,
}

impl Own<'_> {
    fn is_zero(&self, cluster: u64) -> StoreResult<Option<bool>> {
        self.sums.with_record(cluster, |r| r.map(|r| r.place == sums::Place::Zero))
    }

    fn find(&self, from: u64) -> StoreResult<Option<Run>> {
        let size = self.disk.cluster_size;
        let Some(first) = self.sums.next_stored(from.div_ceil(size))? else { return Ok(None) };
        let kind = self.is_zero(first)?;
        let mut end = first + 1;
        while end - first < RUN && self.is_zero(end)? == kind {
            end += 1;
        }
        let start = first.saturating_mul(size);
        let end = end.saturating_mul(size).min(self.disk.virtual_size);
        Ok((start < end).then_some(Run { start, len: end.saturating_sub(start), zero: kind == Some(true) }))
    }
}

impl Source for Own<'_> {
    fn next(&self, from: u64) -> knib_qcow::Result<Option<Run>> {
        self.find(from).map_err(|e| knib_qcow::Error::damaged(self.sums.path(), e.to_string()))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> knib_qcow::Result<()> {
        // Through the chain: for what the image itself holds that is the same, and every byte is checked.
        self.data.read(offset, buf)
    }
}

/// Takes checksums and counts what was compressed.
struct Seen<'a> {
    sums: &'a SumsWriter,
    compressed: AtomicU64,
}

impl Observer for Seen<'_> {
    type Digest = ClusterDigest;

    fn keep(&self, cluster: u64, guest: &[u8]) -> bool {
        self.sums.keep(cluster, guest)
    }

    fn digest(&self, cluster: u64, guest: &[u8], stored: &[u8]) -> ClusterDigest {
        self.sums.digest(cluster, guest, stored)
    }

    fn stored(&self, cluster: u64, place: Place, digest: ClusterDigest) -> knib_qcow::Result<()> {
        if matches!(place, Place::Compressed { .. }) {
            self.compressed.fetch_add(1, Ordering::Relaxed);
        }
        self.sums.stored(cluster, place, digest)
    }

    fn metadata(&self, offset: u64, bytes: &[u8]) -> knib_qcow::Result<()> {
        self.sums.metadata(offset, bytes)
    }
}
