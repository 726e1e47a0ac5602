//! `compress`: a stored backup anew with compressed clusters, compared, and swapped by renames.
//!
//! The manifest decides which of two files is right: it names the new ones only once both lie in their places, and
//! until then the old ones are kept under another name.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use knib_fuse::FsError;
use knib_qcow::{Chain, Control, FileStorage, Format, NewImage, PlainPaths, write_image};

mod finalize;
mod slot;
mod source;

use super::codec::codec;
use super::control::{Event, OpControl};
use super::deadline::within;
use super::disk_source::DiskSource;
use crate::failpoint;
use crate::store::journal::{CompressOp, Journal, Swap};
use crate::store::lease::{COMPRESSION, Lease};
use crate::store::manifest::{BackupState, Compression, CompressionState, Disk, Kind, Manifest};
pub(super) use crate::store::plain::swap_name as hidden;
use crate::store::sums::{Sums, SumsCache, SumsWriter, strong};
use crate::store::{
    BackupName, DiskName, Operation, Settings, Store, StoreError, StoreResult, VmName, atomic, disk_file,
};
use crate::verified::VerifiedReader;
use slot::Slot;
use source::Own;

/// Decoded records that are kept, in bytes.
const SUMS_CACHE: usize = 8 << 20;

/// Why a backup was not compressed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It cannot be compressed, or need not be.
    #[error("{backup} cannot be compressed: {why}")]
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
    /// There is no room for the new file.
    #[error("{backup} is not compressed: {why}")]
    NoRoom {
        /// The backup.
        backup: String,
        /// How much there is, how much is wanted, what to do.
        why: String,
    },
    /// It took longer than it may.
    #[error(
        "{backup} was not compressed within {} s (setting backup.compression.timeout); it is as it was", limit.as_secs()
    )]
    TimedOut {
        /// The backup.
        backup: String,
        /// The setting.
        limit: Duration,
    },
    /// Stopped because the caller asked.
    #[error("{backup} is not compressed; it is as it was")]
    Cancelled {
        /// The backup.
        backup: String,
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
/// The new files are written while the VM can be backed up (phase *Starting*); its lock is taken to swap them
/// (*Finalizing*), when nobody stands on the stored files.
///
/// # Errors
/// [`CompressError`]; the backup is as it was.
pub fn run(
    store: &Store,
    vm: &VmName,
    backup: &BackupName,
    control: &OpControl<'_>,
) -> Result<Compressed, CompressError> {
    let limit = Duration::from_secs(store.settings()?.compression_timeout());
    let (done, late) = within(control, limit, |control| once(store, vm, backup, control));
    match done {
        Err(_) if late => Err(CompressError::TimedOut { backup: format!("{vm}/{backup}"), limit }),
        done => done,
    }
}

/// A compression under way.
struct Begun {
    manifest: Manifest,
    journal: Journal,
    /// Tells others that it lives, and keeps the backup.
    _lease: Lease,
}

fn once(
    store: &Store,
    vm: &VmName,
    backup: &BackupName,
    control: &OpControl<'_>,
) -> Result<Compressed, CompressError> {
    let stopped = || CompressError::Cancelled { backup: format!("{vm}/{backup}") };
    let slot = Slot::take(store, control)?.ok_or_else(stopped)?;
    let begun = begin(store, vm, backup)?;
    let before = begun.manifest.stored_size();
    failpoint::hit("compress.begun");
    let written = write(store, &begun.manifest, control);
    // Finalizing jobs do not count.
    drop(slot);
    let locked = finalize::wait(store, &begun.manifest, control)?;
    let Some(_lock) = locked else {
        // Whoever holds the lock may be reading the manifest: the journal stays, for `recover`.
        return Err(CompressError::Refused {
            backup: format!("{vm}/{backup}"),
            why: format!("it was stopped while {vm} is in use: run `knibfs recover` to clean up"),
        });
    };
    let done = written.and_then(|disks| swap(store, &begun.manifest, disks, control));
    let journal = begun.journal;
    let Operation::Compress(operation) = journal.entry().operation.clone() else { return Err(stopped()) };
    // What cannot be undone now stays in the journal, for `recover`.
    recover(store, vm, &operation)?;
    let done = match done {
        Ok(after) => Ok(Compressed { vm: vm.clone(), backup: backup.clone(), before, after }),
        Err(_) if control.is_cancelled() => Err(stopped()),
        Err(error) => {
            save(store, &store.manifest(vm, backup)?, CompressionState::CompressionError)?;
            Err(error)
        }
    };
    journal.finish()?;
    done
}

/// Under the VM's lock, for a moment: may it be compressed, and does nobody else do it?
fn begin(store: &Store, vm: &VmName, backup: &BackupName) -> Result<Begun, CompressError> {
    let _lock = store.lock_vm(vm, &format!("compress {vm}/{backup}"))?;
    let manifest = store.manifest(vm, backup)?;
    check(store, &manifest, &store.settings()?)?;
    if let Some(other) = store.leases(manifest.id)?.iter().find(|l| l.purpose == COMPRESSION) {
        let why = format!("process {} on host {} does it already", other.pid, other.host);
        return Err(CompressError::Refused { backup: format!("{vm}/{backup}"), why });
    }
    if store.interrupted(vm)? {
        let why = format!("an operation on {vm} was interrupted: run `knibfs recover` first");
        return Err(CompressError::Refused { backup: format!("{vm}/{backup}"), why });
    }
    let lease = store.lease(manifest.id, COMPRESSION)?;
    let swaps = manifest.disks.iter().map(|d| Swap { disk: d.name.clone(), outcome: Default::default() });
    let operation = CompressOp { backup: manifest.id, name: backup.clone(), swaps: swaps.collect() };
    let journal = store.begin(vm, Operation::Compress(operation))?;
    if let Err(error) = save(store, &manifest, CompressionState::Compressing) {
        journal.finish()?;
        return Err(error.into());
    }
    Ok(Begun { manifest, journal, _lease: lease })
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
    let name = format!("{}/{}", manifest.vm, manifest.name);
    if !store.settings()?.compression_enabled() {
        control.warn(format!("{name} is not compressed: backup.compression.task.enabled is false"));
        return Ok(manifest);
    }
    let mut attempts = 1;
    while let Err(error) = run(store, &manifest.vm, &manifest.name, control) {
        control.warn(format!("{name} is not compressed: {error}"));
        // The settings are read anew: a change takes effect at once.
        let settings = store.settings()?;
        let again = !matches!(error, CompressError::Refused { .. } | CompressError::NoRoom { .. });
        if !again || control.is_cancelled() || attempts >= settings.compression_attempts() {
            break;
        }
        attempts += 1;
        let minutes = settings.compression_retry_minutes();
        control.step(format!(
            "attempt {attempts} of {} in {minutes} minutes (setting backup.compression.retry.interval)",
            settings.compression_attempts()
        ));
        let end = Instant::now() + Duration::from_secs(minutes.saturating_mul(60));
        while Instant::now() < end && !control.is_cancelled() {
            std::thread::sleep(Duration::from_millis(200));
        }
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
    if manifest.state != BackupState::BackedUp {
        return refuse(format!("it is {}", manifest.state));
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
        let why = format!(
            "{free} bytes are free in {}, {wanted} are wanted (setting backup.compression.minimum.free.storage); free space, then try again",
            root.display()
        );
        return Err(CompressError::NoRoom { backup: format!("{}/{}", manifest.vm, manifest.name), why });
    }
    Ok(())
}

fn save(store: &Store, manifest: &Manifest, state: CompressionState) -> StoreResult<()> {
    store.save_manifest(&Manifest { compression: state, ..manifest.clone() })
}

/// Phase *Starting*: writes the new files beside the old ones; returns what the manifest is to say of them.
fn write(store: &Store, manifest: &Manifest, control: &OpControl<'_>) -> Result<Vec<Disk>, CompressError> {
    Job::new(store, manifest, control)?.write()
}

/// Phase *Finalizing*, under the VM's lock: compares and swaps; returns the bytes of the new images.
fn swap(
    store: &Store,
    begun: &Manifest,
    disks: Vec<Disk>,
    control: &OpControl<'_>,
) -> Result<u64, CompressError> {
    // Other operations may have changed what it says since.
    let manifest = store.manifest(&begun.vm, &begun.name)?;
    save(store, &manifest, CompressionState::FinalizingCompression)?;
    let job = Job::new(store, &manifest, control)?;
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
    let new = Manifest { disks, compression: CompressionState::Compressed, ..manifest };
    store.save_manifest(&new)?;
    failpoint::hit("compress.recorded");
    Ok(new.stored_size())
}

/// The files of a disk that are swapped.
pub(super) fn files(store: &Store, vm: &VmName, backup: &BackupName, disk: &DiskName) -> [PathBuf; 2] {
    [store.disk_path(vm, backup, disk), store.sums_path(vm, backup, disk)]
}

struct Job<'a> {
    store: &'a Store,
    manifest: &'a Manifest,
    settings: Settings,
    library: Compression,
    reader: VerifiedReader,
    control: &'a OpControl<'a>,
}

impl<'a> Job<'a> {
    fn new(store: &'a Store, manifest: &'a Manifest, control: &'a OpControl<'a>) -> StoreResult<Self> {
        let record = store.vm(&manifest.vm)?;
        let offering = match record.offering {
            Some(id) => store.offerings(true)?.into_iter().find(|o| o.id == id),
            None => None,
        };
        let library = offering.map_or(Compression::Zstd, |o| o.compression_library);
        let settings = store.settings()?;
        let reader = VerifiedReader::new(store.clone(), "a compression");
        Ok(Self { store, manifest, settings, library, reader, control })
    }

    fn write(&self) -> Result<Vec<Disk>, CompressError> {
        self.manifest.disks.iter().map(|disk| self.disk(disk)).collect()
    }

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
        let data = DiskSource::open(self.store, &self.reader, self.manifest, &disk.name)
            .map_err(|why| CompressError::Read { disk: disk.name.clone(), why })?;
        let source = Own { data, sums: self.old_sums(disk)?, disk };
        let parent = self.manifest.parent.as_ref().filter(|_| disk.kind == Kind::Incremental);
        let new = NewImage {
            size: disk.virtual_size,
            cluster_bits: disk.cluster_size.trailing_zeros(),
            compression: Some(codec(self.library)),
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
        let written =
            write_image(FileStorage::create_new(&image).map_err(failed)?, &new, &source, &sums, &how)
                .map_err(failed)?;
        let summary = sums.finish(written.file_len)?;
        (self.control.progress)(Event::End { what });
        Ok(Disk {
            file_size: written.file_len,
            data_clusters: written.clusters,
            compressed_clusters: written.compressed_clusters,
            zero_clusters: written.zero_clusters,
            compression: Some(self.library).filter(|_| written.compressed_clusters > 0),
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
