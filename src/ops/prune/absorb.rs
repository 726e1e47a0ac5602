//! One merge: the backup's images are written anew beside the old ones, compared, and swapped by renames.
//!
//! Its manifest decides which are right: it names its new parent only once the new images lie in their places.

use std::fs;
use std::sync::Arc;

use knib_qcow::{Chain, Control, FileStorage, Format, NewImage, PlainPaths, write_image};

use super::PruneError;
use super::source::{Image, Together};
use crate::chain::absorb::{Absorb, renumber};
use crate::failpoint;
use crate::ops::codec::codec;
use crate::ops::compress::{files, hidden};
use crate::ops::control::{Event, OpControl};
use crate::ops::disk_source::DiskSource;
use crate::ops::remove::decide::Known;
use crate::store::journal::{Journal, Operation};
use crate::store::journal_removal::AbsorbOp;
use crate::store::manifest::{CompressionState, Disk, Kind, Manifest, Parent};
use crate::store::sums::{Sums, SumsCache, SumsWriter, strong};
use crate::store::{Store, StoreError, StoreResult, VmLock, VmName, atomic, disk_file};
use crate::verified::VerifiedReader;

/// Decoded records that are kept, in bytes.
const SUMS_CACHE: usize = 16 << 20;

/// Merges; false where the backup came into use meanwhile, and nothing was changed.
pub(super) fn run(
    store: &Store,
    vm: &VmName,
    known: &Known,
    step: &Absorb,
    _lock: &VmLock,
    control: &OpControl<'_>,
) -> Result<bool, PruneError> {
    let (Some(into), Some(from)) =
        (known.named(step.into), step.from.iter().map(|id| known.named(*id)).collect::<Option<Vec<_>>>())
    else {
        return Ok(false);
    };
    let manifest = store.manifest(vm, &into.name)?;
    let below = from.iter().map(|n| store.manifest(vm, &n.name)).collect::<StoreResult<Vec<_>>>()?;
    let written = manifest.disks.iter().filter(|d| d.kind == Kind::Incremental);
    let op = AbsorbOp {
        disks: written.map(|d| d.name.clone()).collect(),
        onto: step.onto.and_then(|id| known.named(id)),
        into,
        from,
    };
    let names: Vec<String> = op.from.iter().map(|n| n.name.to_string()).collect();
    control.step(format!("merging {} into {vm}/{}", names.join(", "), manifest.name));
    let journal = store.begin(vm, Operation::Absorb(op.clone()))?;
    failpoint::hit("absorb-planned");
    let job = Job { store, manifest: &manifest, below: &below, op: &op, control };
    let done = job.work(|| super::busy(store, &known.nodes, step));
    match done {
        Ok(true) => {
            finish(store, journal, &op, control)?;
            Ok(true)
        }
        Ok(false) => {
            put_back(store, vm, &op)?;
            journal.finish()?;
            Ok(false)
        }
        Err(error) => {
            put_back(store, vm, &op)?;
            journal.finish()?;
            Err(error)
        }
    }
}

/// Whether the manifest names the new images.
fn is_swapped(manifest: &Manifest, op: &AbsorbOp) -> bool {
    let parent = manifest.parent.as_ref().map(|p| p.id);
    !op.from.iter().any(|gone| Some(gone.id) == parent)
}

/// The old images again.
fn put_back(store: &Store, vm: &VmName, op: &AbsorbOp) -> StoreResult<()> {
    for name in op.disks.iter().flat_map(|disk| files(store, vm, &op.into.name, disk)) {
        let old = hidden(&name, "old");
        if old.exists() {
            // A second name of the same file: the rename would do nothing, and the name is right already.
            atomic::rename(&old, &name)?;
            atomic::remove(&old)?;
        }
        atomic::remove(&hidden(&name, "new"))?;
    }
    Ok(())
}

/// After the swap: the old images, and the backups that are part of the new ones, go.
fn finish(store: &Store, journal: Journal, op: &AbsorbOp, control: &OpControl<'_>) -> StoreResult<()> {
    let vm = journal.entry().vm.clone();
    for name in op.disks.iter().flat_map(|disk| files(store, &vm, &op.into.name, disk)) {
        atomic::remove(&hidden(&name, "old"))?;
        atomic::remove(&hidden(&name, "new"))?;
    }
    for gone in &op.from {
        let trash = store.trash(&vm, gone.id);
        if store.manifest(&vm, &gone.name).is_ok_and(|m| m.id == gone.id) {
            trash.take(store, &gone.name)?;
        }
        if let Err(error) = trash.empty() {
            // It is out of every chain; the next `recover` tries again.
            control.warn(format!("what was merged into {vm}/{} cannot be deleted: {error}", op.into.name));
        }
        failpoint::hit("absorb-deleted");
    }
    for changed in renumber(&store.backups(&vm)?.manifests) {
        store.save_manifest(&changed)?;
        failpoint::hit("absorb-renumbered");
    }
    journal.finish()
}

/// Finishes or undoes a merge that was interrupted; what was done, in words. The caller holds the VM's lock.
pub(in crate::ops) fn recover(store: &Store, journal: Journal) -> Result<String, PruneError> {
    let vm = journal.entry().vm.clone();
    let Operation::Absorb(op) = journal.entry().operation.clone() else { return Ok(String::new()) };
    let into = format!("{vm}/{}", op.into.name);
    if is_swapped(&store.manifest(&vm, &op.into.name)?, &op) {
        let never = std::sync::atomic::AtomicBool::new(false);
        let control = OpControl { cancel: &never, progress: &|_| {} };
        finish(store, journal, &op, &control)?;
        return Ok(format!("an interrupted merge into {into} was finished"));
    }
    put_back(store, &vm, &op)?;
    journal.finish()?;
    Ok(format!("an interrupted merge into {into} was undone"))
}

struct Job<'a> {
    store: &'a Store,
    manifest: &'a Manifest,
    below: &'a [Manifest],
    op: &'a AbsorbOp,
    control: &'a OpControl<'a>,
}

impl Job<'_> {
    /// Writes, compares and swaps; false where `busy` says that someone uses it.
    fn work(&self, busy: impl FnOnce() -> Result<Option<String>, StoreError>) -> Result<bool, PruneError> {
        let mut new = self.manifest.clone();
        for disk in &mut new.disks {
            if self.op.disks.contains(&disk.name) {
                *disk = self.disk(disk)?;
                self.compare(disk)?;
            }
        }
        if busy()?.is_some() {
            return Ok(false);
        }
        let stands = new.disks.iter().any(|d| d.kind == Kind::Incremental);
        let onto = self.op.onto.as_ref().filter(|_| stands);
        new.parent = onto.map(|p| Parent { id: p.id, name: p.name.clone() });
        if new.disks.iter().any(|d| d.compressed_clusters > 0) {
            new.compression = CompressionState::Compressed;
        }
        let paths = || {
            self.op.disks.iter().flat_map(|d| files(self.store, &self.manifest.vm, &self.manifest.name, d))
        };
        for name in paths() {
            let old = hidden(&name, "old");
            fs::hard_link(&name, &old).map_err(StoreError::io("give a second name to", &name))?;
        }
        atomic::sync_dir(&self.store.backup_dir(&self.manifest.vm, &self.manifest.name))?;
        failpoint::hit("absorb-swap");
        for name in paths() {
            atomic::rename(&hidden(&name, "new"), &name)?;
            failpoint::hit("absorb-swapped");
        }
        // Depths and positions of this one at once: a full disk of depth 2 would be no legal state.
        let mut all = self.store.backups(&self.manifest.vm)?.manifests;
        all.retain(|m| m.id != new.id && !self.op.from.iter().any(|gone| gone.id == m.id));
        all.push(new.clone());
        let new = renumber(&all).into_iter().find(|m| m.id == new.id).unwrap_or(new);
        self.store.save_manifest(&new)?;
        failpoint::hit("absorb-recorded");
        Ok(true)
    }

    fn backup(&self) -> String {
        format!("{}/{}", self.manifest.vm, self.manifest.name)
    }

    fn sums(&self, of: &Manifest, disk: &Disk, cache: &Arc<SumsCache>) -> StoreResult<Arc<Sums>> {
        let path = self.store.sums_path(&of.vm, &of.name, &disk.name);
        Sums::open_checked(&path, &disk.sums_digest, cache.clone()).map(Arc::new)
    }

    fn image(&self, of: &Manifest, disk: &Disk, cache: &Arc<SumsCache>) -> StoreResult<Image> {
        let path = self.store.disk_path(&of.vm, &of.name, &disk.name);
        let file = fs::File::open(&path).map_err(StoreError::io("open", &path))?;
        let compression = disk.compression.map(|library| codec(library).kind);
        Ok(Image { sums: self.sums(of, disk, cache)?, file, compression })
    }

    /// The disk's images that become one, the newest first.
    fn images(&self, disk: &Disk) -> Result<Vec<(&Manifest, Disk)>, PruneError> {
        let mut images = vec![(self.manifest, disk.clone())];
        for of in self.below {
            if images.last().is_none_or(|(_, d)| d.kind == Kind::Full) {
                break;
            }
            let Some(below) = of.disk_of(disk.volume) else {
                let path = self.store.manifest_path(&of.vm, &of.name);
                let what = format!("{} stands on it for a disk that it does not have", self.manifest.name);
                return Err(StoreError::damaged(&path, what).into());
            };
            images.push((of, below.clone()));
        }
        Ok(images)
    }

    /// Writes one disk beside; returns what the manifest is to say.
    fn disk(&self, disk: &Disk) -> Result<Disk, PruneError> {
        let failed = |source| PruneError::Write { backup: self.backup(), source };
        let images = self.images(disk)?;
        let kind = images.last().map_or(disk.kind, |(_, d)| d.kind);
        let [image, sums_path] =
            files(self.store, &self.manifest.vm, &self.manifest.name, &disk.name).map(|p| hidden(&p, "new"));
        let reader = VerifiedReader::new(self.store.clone(), "a prune");
        let data = DiskSource::open(self.store, &reader, self.manifest, &disk.name)
            .map_err(|why| PruneError::Read { backup: self.backup(), why })?;
        let cache = SumsCache::new(SUMS_CACHE);
        let layers =
            images.iter().map(|(of, d)| self.image(of, d, &cache)).collect::<StoreResult<Vec<_>>>()?;
        if let Some(odd) = images.iter().find(|(_, d)| d.cluster_size != disk.cluster_size) {
            let path = self.store.disk_path(&odd.0.vm, &odd.0.name, &disk.name);
            return Err(StoreError::damaged(&path, "its clusters have another size").into());
        }
        let source =
            Together { data, layers, cluster_size: disk.cluster_size, virtual_size: disk.virtual_size };
        let library = images.iter().find_map(|(_, d)| d.compression);
        let onto = self.op.onto.as_ref().filter(|_| kind == Kind::Incremental);
        let new = NewImage {
            size: disk.virtual_size,
            cluster_bits: disk.cluster_size.trailing_zeros(),
            compression: library.map(codec),
            backing: onto.map(|p| (format!("../{}/{}", p.name, disk_file(&disk.name)), Format::Qcow2)),
        };
        let what = format!("merging {}", disk.name);
        (self.control.progress)(Event::Begin { what: what.clone(), total: disk.virtual_size });
        let progress = |done| (self.control.progress)(Event::Advance { what: what.clone(), done });
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(16);
        let how = Control { threads, rate_limit: None, cancel: self.control.cancel, progress: &progress };
        let sums = SumsWriter::create(&sums_path, new.cluster_bits, disk.virtual_size)?;
        let file = FileStorage::create_new(&image).map_err(failed)?;
        let written = write_image(file, &new, &source, &sums, &how).map_err(failed)?;
        let summary = sums.finish(written.file_len)?;
        (self.control.progress)(Event::End { what });
        let reason = match onto {
            Some(onto) => {
                format!("it holds what changed since {}: what lay between was merged into it", onto.name)
            }
            None => "the full backup that it stood on was merged into it".into(),
        };
        Ok(Disk {
            kind,
            reason,
            depth: if kind == Kind::Full { 1 } else { disk.depth },
            file_size: written.file_len,
            data_clusters: written.clusters,
            compressed_clusters: written.compressed_clusters,
            zero_clusters: written.zero_clusters,
            compression: library.filter(|_| written.compressed_clusters > 0),
            sums_size: summary.len,
            sums_digest: summary.digest,
            ..disk.clone()
        })
    }

    /// Whether the new image holds what the newest of the old ones had of each cluster: each is read back and hashed.
    fn compare(&self, new: &Disk) -> Result<(), PruneError> {
        let Some(old) = self.manifest.disk(&new.name) else { return Ok(()) };
        let failed = |source| PruneError::Write { backup: self.backup(), source };
        let [image, sums_path] =
            files(self.store, &self.manifest.vm, &self.manifest.name, &new.name).map(|p| hidden(&p, "new"));
        let cache = SumsCache::new(SUMS_CACHE);
        let sums = Sums::open_checked(&sums_path, &new.sums_digest, cache.clone())?;
        let chain = Chain::open(&image, Format::Qcow2, &PlainPaths).map_err(failed)?;
        let images = self.images(old)?;
        let layers =
            images.iter().map(|(of, d)| self.sums(of, d, &cache)).collect::<StoreResult<Vec<_>>>()?;
        let zeros = strong(&[], new.cluster_size);
        let mut buf = vec![0; new.cluster_size as usize];
        let mut found = 0;
        for (at, layer) in layers.iter().enumerate() {
            for region in layer.regions() {
                for record in region?.records() {
                    let cluster = record.cluster;
                    let differs = || PruneError::Differs { backup: self.backup(), cluster };
                    if self.control.is_cancelled() {
                        return Err(failed(knib_qcow::Error::Cancelled));
                    }
                    let hidden = layers.iter().take(at).try_fold(false, |hidden, above| {
                        Ok::<_, StoreError>(hidden || above.with_record(cluster, |r| r.is_some())?)
                    })?;
                    if hidden {
                        continue;
                    }
                    match sums.with_record(cluster, |r| r.map(|r| r.strong))? {
                        Some(hash) if hash == record.strong => found += 1,
                        // Zeros that stand on nothing need not be said.
                        None if new.kind == Kind::Full && record.strong == zeros => {}
                        _ => return Err(differs()),
                    }
                    let start = cluster.checked_mul(new.cluster_size).ok_or_else(differs)?;
                    let len = new.virtual_size.saturating_sub(start).min(new.cluster_size) as usize;
                    let guest = buf.get_mut(..len).unwrap_or_default();
                    chain.read_at(guest, start).map_err(failed)?;
                    if !record.matches_guest(guest, new.cluster_size) {
                        return Err(differs());
                    }
                }
            }
        }
        if found == sums.info().clusters {
            Ok(())
        } else {
            Err(PruneError::Differs { backup: self.backup(), cluster: 0 })
        }
    }
}
