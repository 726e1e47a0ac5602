//! Merging deltas on primary once the backup is safe in the store, and the record of how everything was left.
//!
//! What fails here fails no backup: a delta that is kept is recorded with its owner, and the next backup merges it.

use std::collections::BTreeMap;
use std::path::Path;

use super::BackupError;
use super::before::primary;
use crate::chain::deltas::{Held, after_backup};
use crate::failpoint;
use crate::hypervisor::{Guest, Hypervisor, ImageRef, JobControl};
use crate::ops::control::OpControl;
use crate::store::journal::{BackupOp, DiskOp, Journal, Merge, Operation, Outcome};
use crate::store::manifest::{Manifest, PrimaryImage};
use crate::store::vm::{Current, Tracking, VolumeTracking};
use crate::store::{BackupId, StoreError, VmRecord, atomic};

/// What hypervisors call a disk of the journal.
pub(crate) fn target(disk: &DiskOp) -> String {
    disk.target.clone().unwrap_or_else(|| disk.name.to_string())
}

/// The merges of a disk that was `frozen` and is `after` now.
pub(super) fn plan(
    frozen: &[PrimaryImage],
    after: &[ImageRef],
    keep_deltas: bool,
    merge_live: bool,
    held: &Held,
) -> Vec<Merge> {
    let after: Vec<&Path> = after.iter().map(|i| i.path.as_path()).collect();
    let steps = after_backup(frozen, &after, keep_deltas, merge_live, held);
    steps.into_iter().map(|s| Merge { top: s.top, base: s.base, outcome: Outcome::Pending }).collect()
}

/// Does the merges that the journal asks for and that are not done; says what had to be kept.
pub(crate) fn merge_all(
    hypervisor: &dyn Hypervisor,
    journal: &mut Journal,
    control: &OpControl<'_>,
) -> Result<Vec<String>, BackupError> {
    let Operation::Backup(op) = journal.entry().operation.clone() else { return Ok(Vec::new()) };
    let mut kept = Vec::new();
    for (at, disk) in op.disks.iter().enumerate() {
        for (number, merge) in disk.merges.iter().enumerate() {
            if matches!(merge.outcome, Outcome::Done | Outcome::Kept { .. }) {
                continue;
            }
            let set = |journal: &mut Journal, outcome: Outcome| {
                journal.update_backup(|op| {
                    if let Some(m) = op.disks.get_mut(at).and_then(|d| d.merges.get_mut(number)) {
                        m.outcome = outcome;
                    }
                })
            };
            let begun = merge.outcome != Outcome::Pending;
            set(journal, Outcome::Begun)?;
            failpoint::hit("backup-merge");
            control.step(format!("merging {} into {}", merge.top.display(), merge.base.display()));
            let outcome = outcome(hypervisor, &target(disk), merge, begun, control, &mut kept)?;
            failpoint::hit("backup-merged");
            set(journal, outcome)?;
        }
    }
    Ok(kept)
}

/// What becomes of a merge of the journal; one that had to be kept is told in `kept`.
pub(crate) fn outcome(
    hypervisor: &dyn Hypervisor,
    target: &str,
    merge: &Merge,
    begun: bool,
    control: &OpControl<'_>,
    kept: &mut Vec<String>,
) -> Result<Outcome, BackupError> {
    match one(hypervisor, target, merge, begun, control) {
        Ok(()) => Ok(Outcome::Done),
        // It may work when the host is back: `recover` tries again.
        Err(error) if error.is_lost() => Err(error),
        Err(error) => {
            kept.push(format!("{} was kept, the next backup merges it: {error}", merge.top.display()));
            Ok(Outcome::Kept { reason: error.to_string() })
        }
    }
}

/// Does one merge of the journal and deletes what was merged. One that was `begun` may have been done before a crash.
fn one(
    hypervisor: &dyn Hypervisor,
    target: &str,
    merge: &Merge,
    begun: bool,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    if !commit(hypervisor, target, &merge.top, &merge.base, control)? && !begun {
        // Someone else changed the chain: what is not ours to judge stays.
        return Err(BackupError::Store(StoreError::Invalid(format!(
            "{} does not stand on {} any more",
            merge.top.display(),
            merge.base.display()
        ))));
    }
    unlink(hypervisor, &merge.top)
}

/// Merges one image, and what lies between, into another of its chain; false where they are not both in it.
pub(crate) fn commit(
    hypervisor: &dyn Hypervisor,
    target: &str,
    top: &Path,
    base: &Path,
    control: &OpControl<'_>,
) -> Result<bool, BackupError> {
    let guest = hypervisor.inspect()?;
    let chain = guest.volumes.iter().find(|v| v.target == target).map(|v| v.chain.as_slice());
    let chain = chain.unwrap_or_default();
    let has = |path: &Path| chain.iter().any(|i| i.path == path);
    if !has(top) || !has(base) {
        return Ok(false);
    }
    let mut merged = chain.iter().skip_while(|i| i.path != top).take_while(|i| i.path != base);
    merged.try_for_each(|image| refuse_snapshots(&image.path))?;
    let job = JobControl { cancel: control.cancel, progress: &|_| {}, rate_limit: None };
    hypervisor.commit(target, top, base, &job)?;
    Ok(true)
}

/// A merge takes over what the disk holds now, and would lose the snapshots that someone made inside the image.
pub(crate) fn refuse_snapshots(image: &Path) -> Result<(), BackupError> {
    let broken = |error: knib_qcow::Error| BackupError::Store(StoreError::Invalid(error.to_string()));
    let file = knib_qcow::FileStorage::open(image, knib_qcow::Access::Read).map_err(broken)?;
    let inside = knib_qcow::snapshot::list(&*file).map_err(broken)?;
    if inside.is_empty() {
        return Ok(());
    }
    let names: Vec<String> =
        inside.iter().map(|s| s.name.chars().filter(|c| !c.is_control()).collect()).collect();
    Err(BackupError::Store(StoreError::Invalid(format!(
        "{} holds internal snapshots ({}), which merging would lose; delete them when they are not needed (`qemu-img snapshot -d`, or `virsh snapshot-delete` if libvirt knows them)",
        image.display(),
        names.join(", ")
    ))))
}

/// Deletes an image that nothing names any more.
pub(crate) fn unlink(hypervisor: &dyn Hypervisor, path: &Path) -> Result<(), BackupError> {
    if path.symlink_metadata().is_err() || !hypervisor.users_of(path)?.is_empty() {
        return Ok(());
    }
    failpoint::hit("backup-unlink");
    Ok(atomic::remove(path)?)
}

fn sync(path: &Path) -> Result<(), BackupError> {
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    Ok(synced.map_err(StoreError::io("sync", path))?)
}

/// Records in `record` how the backup left the VM, as it is now.
pub(crate) fn track(
    record: &mut VmRecord,
    op: &BackupOp,
    manifest: &Manifest,
    guest: &Guest,
) -> Result<(), BackupError> {
    let scan = op.disks.iter().all(|d| d.overlay.is_none());
    let mut volumes = BTreeMap::new();
    for disk in &op.disks {
        let name = target(disk);
        let Some(found) = guest.volumes.iter().find(|v| v.target == name) else { continue };
        let mut images = Vec::new();
        if !scan {
            for (depth, image) in found.chain.iter().enumerate() {
                if depth > 0 {
                    // A file's time is the server's only once its data is there (NFS).
                    sync(&image.path)?;
                }
                let mut seen = primary(image)?;
                let was = disk.frozen.iter().find(|f| (f.device, f.inode) == (seen.device, seen.inode));
                seen.owner = match was {
                    Some(was) => was.owner,
                    None => (depth == 0).then_some(op.backup),
                };
                images.push(seen);
            }
        }
        let size = manifest.disk_of(disk.volume).map_or(0, |d| d.virtual_size);
        volumes.insert(disk.volume, VolumeTracking { images, virtual_size: size });
        let volume = record.volumes.iter_mut().find(|v| v.id == disk.volume);
        if let (Some(volume), Some(live)) = (volume, found.chain.first()) {
            volume.path.clone_from(&live.path);
            volume.format = live.format;
        }
    }
    record.next_sequence = record.next_sequence.max(manifest.sequence.saturating_add(1));
    if op.isolated {
        // The chain goes on without it; but images may have been left where merging was refused.
        for (id, left) in volumes {
            if let Some(known) = record.tracking.volumes.get_mut(&id) {
                known.images = left.images;
            } else if left.images.iter().any(|i| i.owner.is_some()) {
                record.tracking.volumes.insert(id, left);
            }
        }
        return Ok(());
    }
    let current = Current { id: op.backup, name: manifest.name.clone() };
    record.tracking = Tracking {
        current: (!op.end_of_chain).then_some(current),
        end_of_chain: op.end_of_chain,
        volumes,
        ..Tracking::default()
    };
    Ok(())
}

/// Whether a backup with that identity was published.
pub(crate) fn published(history: &[Manifest], id: BackupId) -> Option<&Manifest> {
    history.iter().find(|m| m.id == id)
}
