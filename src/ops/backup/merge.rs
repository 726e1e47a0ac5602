//! Merging deltas on primary once the backup is safe in the store, and the record of how everything was left.
//!
//! What fails here fails no backup: a delta that is kept is recorded with its owner, and the next backup merges it.

use std::collections::BTreeMap;
use std::path::Path;

use super::BackupError;
use super::before::primary;
use crate::failpoint;
use crate::hypervisor::{Guest, Hypervisor, ImageRef, JobControl};
use crate::ops::control::OpControl;
use crate::store::journal::{BackupOp, DiskOp, Journal, Merge, Operation, Outcome};
use crate::store::manifest::{Manifest, PrimaryImage};
use crate::store::vm::{Current, Tracking, VolumeTracking};
use crate::store::{BackupId, VmRecord, atomic};

/// What hypervisors call a disk of the journal.
pub(crate) fn target(disk: &DiskOp) -> String {
    disk.target.clone().unwrap_or_else(|| disk.name.to_string())
}

/// The merges of a disk whose frozen images are `frozen` and whose live one is `live` above `base`.
///
/// Only what a backup left is merged, and only into what it was made on: the lowest first.
pub(super) fn plan(
    frozen: &[PrimaryImage],
    after: &[ImageRef],
    keep_deltas: bool,
    merge_live: bool,
) -> Vec<Merge> {
    let mut merges = Vec::new();
    // Where the images are now, from the bottom: an overlay at the given path has renamed what it stands on.
    let mut below: Vec<&ImageRef> = Vec::new();
    for (image, now) in frozen.iter().zip(after.iter().skip(1)).rev() {
        match below.last() {
            Some(base) if image.owner.is_some() && !keep_deltas => merges.push(Merge {
                top: now.path.clone(),
                base: base.path.clone(),
                outcome: Outcome::Pending,
            }),
            _ => below.push(now),
        }
    }
    if let (true, Some(live), Some(base)) = (merge_live, after.first(), below.last()) {
        merges.push(Merge { top: live.path.clone(), base: base.path.clone(), outcome: Outcome::Pending });
    }
    merges
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
            let outcome = match one(hypervisor, &target(disk), merge, begun, control) {
                Ok(()) => Outcome::Done,
                Err(error) => {
                    let path = merge.top.display();
                    kept.push(format!("{path} was kept, the next backup merges it: {error}"));
                    Outcome::Kept { reason: error.to_string() }
                }
            };
            failpoint::hit("backup-merged");
            set(journal, outcome)?;
        }
    }
    Ok(kept)
}

fn one(
    hypervisor: &dyn Hypervisor,
    target: &str,
    merge: &Merge,
    begun: bool,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    if in_chain(hypervisor, target, merge)? {
        commit(hypervisor, target, &merge.top, &merge.base, control)?;
    } else if !begun {
        // Someone else changed the chain: what is not ours to judge stays.
        return Err(BackupError::Store(crate::store::StoreError::Invalid(format!(
            "{} does not stand on {} any more",
            merge.top.display(),
            merge.base.display()
        ))));
    }
    unlink(hypervisor, &merge.top)
}

fn in_chain(hypervisor: &dyn Hypervisor, target: &str, merge: &Merge) -> Result<bool, BackupError> {
    let guest = hypervisor.inspect()?;
    let chain = guest.volumes.iter().find(|v| v.target == target).map(|v| v.chain.as_slice());
    let has = |path: &Path| chain.unwrap_or_default().iter().any(|i| i.path == path);
    Ok(has(&merge.top) && has(&merge.base))
}

/// Merges one image into another of its chain.
pub(crate) fn commit(
    hypervisor: &dyn Hypervisor,
    target: &str,
    top: &Path,
    base: &Path,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    let job = JobControl { cancel: control.cancel, progress: &|_| {}, rate_limit: None };
    hypervisor.commit(target, top, base, &job)?;
    Ok(())
}

/// Deletes an image that nothing names any more.
pub(crate) fn unlink(hypervisor: &dyn Hypervisor, path: &Path) -> Result<(), BackupError> {
    if path.symlink_metadata().is_err() || !hypervisor.users_of(path)?.is_empty() {
        return Ok(());
    }
    failpoint::hit("backup-unlink");
    Ok(atomic::remove(path)?)
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
    record.tracking =
        Tracking { current: (!op.end_of_chain).then_some(current), end_of_chain: op.end_of_chain, volumes };
    Ok(())
}

/// Whether a backup with that identity was published.
pub(crate) fn published(history: &[Manifest], id: BackupId) -> Option<&Manifest> {
    history.iter().find(|m| m.id == id)
}
