//! Deltas of volumes that are no disks of their VM any more, or lie elsewhere since: detached, or moved to another storage.
//! "Ending a chain early" (section 3) for that volume only: they are merged into the image that they were made on.
//!
//! Done again after a crash it does the same, so it needs no journal: until its delta is deleted, all data is in the chain.

use super::backup::primary;
use super::control::OpControl;
use super::hypervisor::{is_block, target};
use super::images::EngineImages;
use crate::failpoint;
use crate::hypervisor::{Guest, Hypervisor, ImageRef, Images as _, JobControl, backing_chain, identity};
use crate::store::manifest::PrimaryImage;
use crate::store::vm::Volume;
use crate::store::{Store, StoreResult, VmRecord, atomic};

/// Merges what can be merged, and records it; what a person should know of the rest. The caller holds the VM's lock.
///
/// # Errors
/// An image could not be deleted, or the record not be written.
pub(super) fn settle(
    store: &Store,
    record: &mut VmRecord,
    guest: &Guest,
    hypervisor: &dyn Hypervisor,
    control: &OpControl<'_>,
) -> StoreResult<()> {
    // Plain disk files are known by their paths: none of them is ever detached.
    if guest.uuid.is_none() {
        return Ok(());
    }
    let mut settled = false;
    for volume in record.volumes.clone() {
        let Some(left) = record.tracking.volumes.get(&volume.id) else { continue };
        let images = left.images.clone();
        if images.iter().all(|i| i.owner.is_none()) || stands_on(guest, &volume, &images) {
            continue;
        }
        // What snapshots are made of is never written.
        let is_held = record.snapshots_of(volume.id).next().is_some()
            || record.layers.iter().any(|layer| layer.volume == volume.id);
        let merged = match is_held {
            true => Err("snapshots of the disk are kept".to_owned()),
            false => merge(&images, &volume, hypervisor, control),
        };
        match merged {
            Ok(()) => {
                let deltas = images.iter().take_while(|i| i.owner.is_some());
                for delta in deltas.filter(|delta| delta.path.exists()) {
                    atomic::remove(&delta.path)?;
                    failpoint::hit("detached-unlinked");
                }
                let base = images.iter().find(|i| i.owner.is_none());
                let known = record.volumes.iter_mut().find(|v| v.id == volume.id && v.detached);
                if let (Some(known), Some(base)) = (known, base) {
                    known.path.clone_from(&base.path);
                    known.format = base.format;
                }
                record.tracking.volumes.remove(&volume.id);
                settled = true;
            }
            Err(why) => {
                let deltas = images.iter().filter(|i| i.owner.is_some() && i.path.exists());
                for delta in deltas {
                    control.warn(format!(
                        "{}, a delta of knibfs, is no part of the disk {} any more and was left: {why}; delete it when you know that nothing needs it",
                        delta.path.display(),
                        volume.name
                    ));
                }
            }
        }
    }
    if settled {
        store.save_vm(record)?;
    }
    Ok(())
}

/// Whether the VM's disk has any of the images still: what became of the others is another matter then.
fn stands_on(guest: &Guest, volume: &Volume, images: &[PrimaryImage]) -> bool {
    let name = target(volume);
    // One that cannot be looked at is not gone.
    if guest.refused.iter().chain(&guest.skipped).any(|disk| disk.target == name) {
        return true;
    }
    let found = guest.volumes.iter().filter(|v| v.target == name).flat_map(|v| &v.chain);
    found.filter_map(|image| identity(&image.path)).any(|id| images.iter().any(|i| (i.device, i.inode) == id))
}

fn merge(
    images: &[PrimaryImage],
    volume: &Volume,
    hypervisor: &dyn Hypervisor,
    control: &OpControl<'_>,
) -> Result<(), String> {
    let count = images.iter().take_while(|i| i.owner.is_some()).count();
    let (Some(deltas), Some(base)) = (images.get(..count), images.get(count)) else {
        return Err("it stands on nothing that is known".into());
    };
    let Some(live) = deltas.first() else {
        return Err("another image stands on it".into());
    };
    // Gone with its delta, or merged by an attempt that a crash ended: nothing is left to be done.
    if deltas.iter().all(|delta| !delta.path.exists()) {
        return Ok(());
    }
    if images.iter().skip(count).any(|image| image.owner.is_some()) {
        return Err("another image lies between it and its base".into());
    }
    if is_block(&base.path) {
        return Err(format!("{} is a block device, which may be another's by now", base.path.display()));
    }
    let touched = images.get(..=count).unwrap_or_default();
    for image in touched {
        let seen = primary(&ImageRef { path: image.path.clone(), format: image.format });
        let seen = seen.map_err(|e| e.to_string())?;
        if (seen.device, seen.inode) != (image.device, image.inode) {
            return Err(format!("{} is another file than it was", image.path.display()));
        }
        if let Some(user) = hypervisor.users_of(&image.path).map_err(|e| e.to_string())?.first() {
            return Err(format!("{} is in use as {user}", image.path.display()));
        }
        let image = ImageRef { path: image.path.clone(), format: image.format };
        EngineImages.check_unused(&image).map_err(|e| e.to_string())?;
    }
    let chain = backing_chain(&live.path, live.format).map_err(|e| e.to_string())?;
    let same =
        touched.iter().zip(&chain).all(|(was, is)| identity(&is.path) == Some((was.device, was.inode)));
    if !same || chain.len() < touched.len() {
        return Err("it does not stand on what it was made on".into());
    }
    let layers: Vec<ImageRef> =
        deltas.iter().map(|i| ImageRef { path: i.path.clone(), format: i.format }).collect();
    let below = ImageRef { path: base.path.clone(), format: base.format };
    control.step(format!(
        "merging {} into {}: the disk {} was detached or moved",
        live.path.display(),
        base.path.display(),
        volume.name
    ));
    let job = JobControl { cancel: control.cancel, progress: &|_| {}, rate_limit: None };
    EngineImages.commit(&target(volume), &layers, &below, &job).map_err(|e| e.to_string())?;
    failpoint::hit("detached-merged");
    Ok(())
}
