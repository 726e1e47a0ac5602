//! The deltas that a VM has on primary: finding them, merging them, recording what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::backup::{BackupError, merge, primary};
use super::control::OpControl;
use super::hypervisor::target;
use crate::chain::deltas::{Held, merges};
use crate::chain::foreign_base;
use crate::failpoint;
use crate::hypervisor::{Guest, GuestVolume, Hypervisor, backing_chain};
use crate::store::journal::{Journal, Merge, Operation, Outcome};
use crate::store::journal_removal::VolumeDeltas;
use crate::store::manifest::PrimaryImage;
use crate::store::vm::{Tracking, Volume, VolumeTracking};
use crate::store::{StoreError, VmRecord, VolumeId};

/// A volume that gets an overlay.
pub struct Place<'a> {
    /// Its VM.
    pub record: &'a VmRecord,
    /// The volume.
    pub volume: &'a Volume,
    /// Its live image is a block device.
    pub block_device: bool,
    /// Its live image.
    pub live: &'a Path,
}

impl Place<'_> {
    /// The path of an overlay of what `id` names: beside the volume, or in the folder for deltas. For plain disk files,
    /// whose given path the overlay takes, it is the new name of the image that was there.
    ///
    /// # Errors
    /// What to do about a block device, beside which no file can lie.
    pub fn overlay(&self, id: &str) -> Result<PathBuf, String> {
        // The old image of a plain disk file can only be renamed within its folder.
        let dir = self.record.delta_dir.as_deref().filter(|_| self.volume.target.is_some());
        let dir = match dir {
            Some(dir) => dir,
            None if self.block_device => {
                return Err(format!(
                    "{} is a block device: say where its delta may lie, with `vm add --delta-dir`",
                    self.live.display()
                ));
            }
            None => self.live.parent().unwrap_or_else(|| Path::new("/")),
        };
        let short = id.get(..8).unwrap_or(id);
        Ok(dir.join(format!("{}-{}-{short}.knib.qcow2", self.record.name, self.volume.name)))
    }
}

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
        let steps = merges(&images, &held(record, volume.id));
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

/// The images that living snapshots of a volume are made of.
pub fn held(record: &VmRecord, volume: VolumeId) -> Held {
    let mut images = BTreeSet::new();
    for frozen in record.snapshots_of(volume).filter_map(|s| s.frozen(volume)) {
        let chain = backing_chain(&frozen.image.path, frozen.image.format);
        let chain = chain.map_err(BackupError::from).and_then(|chain| {
            chain.iter().map(|i| primary(i).map(|p| (p.device, p.inode))).collect::<Result<Vec<_>, _>>()
        });
        match chain {
            Ok(chain) => images.extend(chain),
            Err(error) => {
                tracing::warn!("nothing is merged below the snapshots of {}: {error}", record.name);
                return Held::All;
            }
        }
    }
    Held::Images(images)
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
            let outcome = merge::outcome(hypervisor, &volume.target, step, begun, &control, &mut kept)?;
            failpoint::hit("delta-merged");
            set(journal, at, number, outcome)?;
        }
    }
    Ok(kept)
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
    let was = std::mem::take(&mut record.tracking);
    record.tracking = Tracking {
        current: None,
        end_of_chain: true,
        volumes: left,
        reverted: was.reverted,
        restored: was.restored,
    };
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
