//! Going back to a snapshot: the disks of a VM that is off go on in new overlays on what the snapshot shows, and what was
//! written since is dropped.

use std::collections::BTreeSet;

use super::{Scope, SnapshotError, check_usable, op_of, refused, settle, tidy, tree};
use crate::chain::snapshot::{RevertDisk, revert as may_revert};
use crate::failpoint;
use crate::hypervisor::{
    DiskPlace, Guest, Hypervisor, HypervisorError, ImageFormat, ImageRef, Images as _, Power, backing_chain,
};
use crate::ops::backup::{before, merge, primary};
use crate::ops::control::OpControl;
use crate::ops::deltas::Place;
use crate::ops::hypervisor::target;
use crate::ops::images::EngineImages;
use crate::ops::{release, whereabouts};
use crate::store::journal::Journal;
use crate::store::manifest::PrimaryImage;
use crate::store::snapshot::{Layer, Snapshot, SnapshotAction, SnapshotOp, SnapshotOverlay, SnapshotStep};
use crate::store::{OpId, Operation, SnapshotName, Store, VmRecord};

/// Makes the disks of a VM that is off what they were when the snapshot was taken. The snapshot stays; the chain of
/// backups ends, as what changed since its last one is not known.
///
/// # Errors
/// [`SnapshotError`]: nothing was changed.
pub fn revert(
    store: &Store,
    scope: &Scope,
    name: &SnapshotName,
    control: &OpControl<'_>,
) -> Result<Snapshot, SnapshotError> {
    store.vm(&scope.vm)?;
    let _lock = store.lock_vm(&scope.vm, &format!("go back to the snapshot {name} of {scope}"))?;
    let mut record = store.vm_in_care(&scope.vm)?;
    let doing = format!("go back to the snapshot {name}");
    let refuse = |why: String| refused(doing.clone(), scope, why);
    check_usable(store, &record, &doing, scope)?;
    let snapshot = scope.find(&record, name)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let guest = hypervisor.inspect()?;
    if let Some(why) = before::trouble(&record, &guest) {
        return Err(refuse(why));
    }
    before::refresh(&mut record, &guest)?;
    let state = match guest.power {
        Power::Running => Some("running"),
        Power::Paused => Some("paused"),
        Power::Off => None,
    };
    let disks: Vec<RevertDisk> = snapshot.volumes.iter().map(|f| look(&record, &guest, f)).collect();
    may_revert(state, guest.managed_save, &disks).map_err(|why| refuse(why.to_string()))?;
    let id = OpId::random().to_string();
    let mut overlays = Vec::new();
    for frozen in &snapshot.volumes {
        let Some(volume) = record.volumes.iter().find(|v| v.id == frozen.volume) else { continue };
        let Some(found) = guest.volumes.iter().find(|v| v.target == target(volume)) else { continue };
        for image in &found.chain {
            EngineImages.check_unused(image)?;
        }
        let Some(live) = found.chain.first() else { continue };
        let place = Place { record: &record, volume, block_device: found.block_device, live: &live.path };
        let path = place.overlay(&id).map_err(refuse)?;
        if path.symlink_metadata().is_ok() {
            return Err(refuse(format!("{} is there already", path.display())));
        }
        overlays.push(SnapshotOverlay { volume: volume.id, target: target(volume), path });
    }
    store.save_vm(&record)?;
    let intact = tree::intact(&record, &guest).into_iter();
    let intact = intact.filter(|id| snapshot.frozen(*id).is_none()).collect();
    let mut journal = store.begin(
        &scope.vm,
        Operation::Snapshot(Box::new(SnapshotOp {
            action: SnapshotAction::Revert,
            snapshot: snapshot.clone(),
            step: SnapshotStep::Overlays,
            overlays,
            intact,
            merge: None,
        })),
    )?;
    failpoint::hit("snapshot-planned");
    control.step("making overlays on what the snapshot shows");
    let placed = make(&journal, guest.uuid.is_none())
        .and_then(|()| Ok(journal.update_snapshot(|op| op.step = SnapshotStep::Record)?))
        .and_then(|()| place(&*hypervisor, &journal));
    if let Err(error) = placed {
        return Err(match undo(&*hypervisor, journal) {
            Ok(()) => error,
            Err(undo) => SnapshotError::NotUndone { error: Box::new(error), undo: Box::new(undo) },
        });
    }
    failpoint::hit("snapshot-placed");
    finish(store, &mut record, &*hypervisor, journal, control)?;
    Ok(snapshot)
}

fn look(record: &VmRecord, guest: &Guest, frozen: &crate::store::snapshot::Frozen) -> RevertDisk {
    let volume = record.volumes.iter().find(|v| v.id == frozen.volume);
    let name = volume.map_or_else(|| frozen.volume.to_string(), |v| v.name.to_string());
    let path = &frozen.image.path;
    let (mut trouble, mut depth) = (None, 0);
    match backing_chain(path, frozen.image.format) {
        _ if path.symlink_metadata().is_err() => trouble = Some("is gone".to_owned()),
        _ if !tree::is_there(&frozen.image) => {
            trouble = Some("is another file than the one that was frozen".to_owned())
        }
        Ok(chain) => depth = chain.len(),
        Err(why) => trouble = Some(format!("has a chain that cannot be used: {why}")),
    }
    let attached = volume.is_some_and(|v| guest.volumes.iter().any(|g| g.target == target(v)));
    RevertDisk { disk: name, attached, path: path.clone(), trouble, depth }
}

/// The overlays, empty, on the images that the snapshot shows.
fn make(journal: &Journal, files: bool) -> Result<(), SnapshotError> {
    let Some(op) = op_of(journal) else { return Ok(()) };
    for overlay in &op.overlays {
        let Some(frozen) = op.snapshot.frozen(overlay.volume) else { continue };
        // By name alone for plain disk files: the folder may be moved as a whole.
        let alone = frozen.image.path.file_name().filter(|_| files).map(std::path::PathBuf::from);
        let path = alone.unwrap_or_else(|| frozen.image.path.clone());
        EngineImages.create_overlay(&overlay.path, &ImageRef { path, format: frozen.image.format })?;
        failpoint::hit("snapshot-overlay");
    }
    Ok(())
}

fn places(journal: &Journal) -> Result<Vec<DiskPlace>, SnapshotError> {
    let Some(op) = op_of(journal) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for overlay in &op.overlays {
        let Some(frozen) = op.snapshot.frozen(overlay.volume) else { continue };
        let mut chain = vec![ImageRef { path: overlay.path.clone(), format: ImageFormat::Qcow2 }];
        chain.extend(backing_chain(&frozen.image.path, frozen.image.format)?);
        all.push(DiskPlace { target: overlay.target.clone(), chain, model: None, errors: None });
    }
    Ok(all)
}

fn place(hypervisor: &dyn Hypervisor, journal: &Journal) -> Result<(), SnapshotError> {
    Ok(hypervisor.place(&places(journal)?)?)
}

/// Whether the VM is on the overlays. Those of plain disk files are gone from their own names then.
fn is_placed(guest: &Guest, op: &SnapshotOp) -> bool {
    op.overlays.iter().all(|overlay| match guest.uuid {
        Some(_) => guest
            .volumes
            .iter()
            .any(|v| v.target == overlay.target && v.chain.iter().any(|i| i.path == overlay.path)),
        None => overlay.path.symlink_metadata().is_err(),
    })
}

/// The disks are on their overlays: the record says so, the chain of backups ends, and what nothing needs is deleted.
fn finish(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
    control: &OpControl<'_>,
) -> Result<(), SnapshotError> {
    let Some(op) = op_of(&journal) else { return Ok(()) };
    if op.step < SnapshotStep::Tidy {
        let guest = hypervisor.inspect()?;
        for overlay in &op.overlays {
            let found = guest.volumes.iter().find(|v| v.target == overlay.target);
            // For plain disk files the overlay has the given path now.
            let on = |i: &&ImageRef| guest.uuid.is_none() || i.path == overlay.path;
            if let Some(live) = found.and_then(|v| v.chain.iter().find(on)) {
                tree::add_layer(record, overlay.volume, primary(live)?);
            }
            // Deltas of backups belong to nobody now; those that another snapshot shows stay.
            if let Some(left) = record.tracking.volumes.remove(&overlay.volume) {
                let owned = left.images.into_iter().filter(|i| i.owner.is_some());
                record.layers.extend(
                    owned.map(|i| Layer { volume: overlay.volume, image: PrimaryImage { owner: None, ..i } }),
                );
            }
            record.tracking.reverted.insert(overlay.volume, op.snapshot.name.clone());
        }
        if record.tracking.volumes.is_empty() {
            // Nothing can stand on the last backup any more.
            release::mark_ended(store, record)?;
        }
        let intact: BTreeSet<_> = op.intact.iter().copied().collect();
        settle::save(store, record, &guest, &intact)?;
        failpoint::hit("snapshot-recorded");
        journal.update_snapshot(|op| op.step = SnapshotStep::Tidy)?;
    }
    tidy(store, record, hypervisor, journal, control)
}

/// The VM goes on on what it was on: the overlays are empty.
fn undo(hypervisor: &dyn Hypervisor, journal: Journal) -> Result<(), SnapshotError> {
    let Some(op) = op_of(&journal) else { return Ok(()) };
    let is_files = hypervisor.inspect()?.uuid.is_none();
    if is_files && op.step >= SnapshotStep::Record && op.overlays.iter().any(|o| !o.path.exists()) {
        // What one disk was is gone: only forward makes them one state again.
        let what = "some of the disks are on their overlays already".to_owned();
        return Err(HypervisorError::NotNow { what }.into());
    }
    for overlay in op.overlays {
        merge::unlink(hypervisor, &overlay.path)?;
        if overlay.path.exists() {
            let what = format!("{} is used", overlay.path.display());
            return Err(HypervisorError::NotNow { what }.into());
        }
    }
    Ok(journal.finish()?)
}

/// Finishes it where it was decided, else undoes it; whether it is finished.
pub(super) fn recover(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<bool, SnapshotError> {
    let Some(op) = op_of(&journal) else { return Ok(false) };
    let guest = hypervisor.inspect()?;
    let decided = op.step >= SnapshotStep::Record;
    if decided && !is_placed(&guest, &op) && guest.power == Power::Off {
        place(hypervisor, &journal)?;
    } else if !decided || !is_placed(&guest, &op) {
        // Not begun, or the VM was started meanwhile on what it was on.
        undo(hypervisor, journal)?;
        return Ok(false);
    }
    finish(store, record, hypervisor, journal, control)?;
    Ok(true)
}
