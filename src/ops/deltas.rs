//! The deltas that a VM has on primary: finding them, merging them, recording what is left.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::backup::{BackupError, merge, primary};
use super::control::OpControl;
use super::hypervisor::target;
use crate::chain::deltas::merges;
use crate::chain::foreign_base;
use crate::failpoint;
use crate::hypervisor::{Guest, GuestVolume, Hypervisor};
use crate::store::journal::{Journal, Merge, Operation, Outcome};
use crate::store::journal_removal::VolumeDeltas;
use crate::store::manifest::PrimaryImage;
use crate::store::vm::{Tracking, VolumeTracking};
use crate::store::{StoreError, VmRecord};

/// The merges that leave nothing of knibfs on primary.
pub fn plan(record: &VmRecord, guest: &Guest) -> Result<Vec<VolumeDeltas>, BackupError> {
    let mut all = Vec::new();
    for volume in record.attached() {
        let target = target(volume);
        let known = record.tracking.volumes.get(&volume.id);
        let has_delta = known.is_some_and(|v| v.images.iter().any(|i| i.owner.is_some()));
        if let Some(refused) = guest.refused.iter().find(|r| r.target == target).filter(|_| has_delta) {
            let what = format!("its disk {target} {}", refused.reason);
            return Err(StoreError::Invalid(what).into());
        }
        let Some(found) = guest.volumes.iter().find(|v| v.target == target) else { continue };
        let images = owned_images(record, volume.id, found)?;
        if let Some(foreign) = known.and_then(|left| foreign_base(left, &images)) {
            let what = format!(
                "the disk {target} may not hold what its guest wrote: {foreign}; put the right image back"
            );
            return Err(StoreError::Invalid(what).into());
        }
        let steps = merges(&images);
        let merges = steps
            .into_iter()
            .map(|s| Merge { top: s.top, base: s.base, outcome: Outcome::Pending })
            .collect::<Vec<_>>();
        if !merges.is_empty() {
            all.push(VolumeDeltas { volume: volume.id, target, merges });
        }
    }
    Ok(all)
}

/// Does the merges that the journal asks for and that are not done; says what had to be kept.
pub fn merge_all(
    hypervisor: &dyn Hypervisor,
    journal: &mut Journal,
    control: &OpControl<'_>,
) -> Result<Vec<String>, BackupError> {
    // What was decided is not undone by Ctrl-C: a merge that stops half way only has to be done again.
    let go_on = std::sync::atomic::AtomicBool::new(false);
    let control = OpControl { cancel: &go_on, ..*control };
    let volumes = deltas(&journal.entry().operation).to_vec();
    let mut kept = Vec::new();
    for (at, volume) in volumes.iter().enumerate() {
        for (number, step) in volume.merges.iter().enumerate() {
            if matches!(step.outcome, Outcome::Done | Outcome::Kept { .. }) {
                continue;
            }
            let begun = step.outcome != Outcome::Pending;
            set(journal, at, number, Outcome::Begun)?;
            failpoint::hit("delta-merge");
            control.step(format!("merging {} into {}", step.top.display(), step.base.display()));
            let outcome = match one(hypervisor, &volume.target, step, begun, &control) {
                Ok(()) => Outcome::Done,
                Err(error) => {
                    let path = step.top.display();
                    kept.push(format!("{path} was kept, the next backup merges it: {error}"));
                    Outcome::Kept { reason: error.to_string() }
                }
            };
            failpoint::hit("delta-merged");
            set(journal, at, number, outcome)?;
        }
    }
    Ok(kept)
}

fn one(
    hypervisor: &dyn Hypervisor,
    target: &str,
    step: &Merge,
    begun: bool,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    let guest = hypervisor.inspect()?;
    let chain = guest.volumes.iter().find(|v| v.target == target).map(|v| v.chain.as_slice());
    let has = |path: &PathBuf| chain.unwrap_or_default().iter().any(|i| i.path == *path);
    if has(&step.top) && has(&step.base) {
        merge::commit(hypervisor, target, &step.top, &step.base, control)?;
    } else if !begun {
        let what = format!("{} does not stand on {} any more", step.top.display(), step.base.display());
        return Err(StoreError::Invalid(what).into());
    }
    merge::unlink(hypervisor, &step.top)
}

/// Records that nothing can stand on the last backup: the next one is full. Deltas that had to be kept keep their owner,
/// so that the next backup merges them.
pub fn end_tracking(record: &mut VmRecord, guest: Option<&Guest>) -> Result<(), BackupError> {
    let mut left = BTreeMap::new();
    for volume in &record.volumes {
        let Some(known) = record.tracking.volumes.get(&volume.id) else { continue };
        let target = target(volume);
        let images = match guest.and_then(|g| g.volumes.iter().find(|v| v.target == target)) {
            Some(found) => owned_images(record, volume.id, found)?,
            // Nobody can be asked: what was recorded stays recorded.
            None => known.images.clone(),
        };
        if images.iter().any(|i| i.owner.is_some()) {
            left.insert(volume.id, VolumeTracking { images, virtual_size: known.virtual_size });
        }
    }
    for volume in &mut record.volumes {
        let target = target(volume);
        let found = guest.and_then(|g| g.volumes.iter().find(|v| v.target == target));
        if let Some(live) = found.and_then(|f| f.chain.first()) {
            volume.path.clone_from(&live.path);
            volume.format = live.format;
        }
    }
    record.tracking = Tracking { current: None, end_of_chain: true, volumes: left };
    Ok(())
}

/// Deltas that are no part of their disks any more, as another tool took them out. They may hold data: nobody deletes them.
pub fn left_behind(record: &VmRecord, planned: &[VolumeDeltas]) -> Vec<PathBuf> {
    let merged = |path: &PathBuf| planned.iter().flat_map(|v| &v.merges).any(|m| m.top == *path);
    let live = |path: &PathBuf| record.volumes.iter().any(|v| v.path == *path);
    known_paths(record).into_iter().filter(|p| !merged(p) && !live(p) && p.exists()).collect()
}

/// Paths of deltas that the record knows.
pub fn known_paths(record: &VmRecord) -> Vec<PathBuf> {
    let images = record.tracking.volumes.values().flat_map(|v| &v.images);
    images.filter(|i| i.owner.is_some()).map(|i| i.path.clone()).collect()
}

/// The images of a volume with their owners, known by device and inode: names change with merges.
fn owned_images(
    record: &VmRecord,
    volume: crate::store::VolumeId,
    found: &GuestVolume,
) -> Result<Vec<PrimaryImage>, BackupError> {
    let left = record.tracking.volumes.get(&volume).map(|t| t.images.as_slice()).unwrap_or_default();
    let mut images = Vec::new();
    for image in &found.chain {
        let mut seen = primary(image)?;
        let was = left.iter().find(|i| (i.device, i.inode) == (seen.device, seen.inode));
        seen.owner = was.and_then(|i| i.owner);
        images.push(seen);
    }
    Ok(images)
}

fn deltas(operation: &Operation) -> &[VolumeDeltas] {
    match operation {
        Operation::Remove(op) => op.deltas.as_deref().unwrap_or_default(),
        Operation::Release(op) => &op.deltas,
        _ => &[],
    }
}

fn set(journal: &mut Journal, volume: usize, number: usize, outcome: Outcome) -> Result<(), BackupError> {
    journal.update(|operation| {
        let all = match operation {
            Operation::Remove(op) => op.deltas.as_deref_mut().unwrap_or_default(),
            Operation::Release(op) => op.deltas.as_mut_slice(),
            _ => return,
        };
        if let Some(merge) = all.get_mut(volume).and_then(|v| v.merges.get_mut(number)) {
            merge.outcome = outcome;
        }
    })?;
    Ok(())
}
