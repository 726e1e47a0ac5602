//! Taking a snapshot: the images that are live are frozen, and the guest goes on in overlays.

use jiff::Timestamp;

use super::{Scope, SnapshotError, check_usable, op_of, refused, settle, tree};
use crate::chain::snapshot::room_above;
use crate::failpoint;
use crate::hypervisor::{Guest, Hypervisor, Images as _, NewOverlay, Power, Quiesce};
use crate::ops::backup::{AGENT, FREEZE, before, placed, primary, undo_disk};
use crate::ops::control::OpControl;
use crate::ops::deltas::Place;
use crate::ops::hypervisor::{self, target};
use crate::ops::images::EngineImages;
use crate::ops::whereabouts;
use crate::store::journal::Journal;
use crate::store::snapshot::{Frozen, Snapshot, SnapshotAction, SnapshotOp, SnapshotOverlay, SnapshotStep};
use crate::store::{BackupName, Operation, SnapshotId, SnapshotName, Store, VmRecord};

/// How a snapshot is taken.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Its name; none for the time.
    pub name: Option<SnapshotName>,
    /// Freeze the guest's file systems, or fail.
    pub quiesce: bool,
}

/// Takes a snapshot of a VM that runs, is paused or off.
///
/// # Errors
/// [`SnapshotError`]: the VM goes on as before.
pub fn create(
    store: &Store,
    scope: &Scope,
    options: &Options,
    control: &OpControl<'_>,
) -> Result<Snapshot, SnapshotError> {
    store.vm(&scope.vm)?;
    let _lock = store.lock_vm(&scope.vm, &format!("take a snapshot of {scope}"))?;
    let mut record = store.vm_in_care(&scope.vm)?;
    let created = Timestamp::now();
    let name = match &options.name {
        Some(name) => name.clone(),
        None => by_time(&record, created)?,
    };
    let doing = format!("take the snapshot {name}");
    check_usable(store, &record, &doing, scope)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let guest = hypervisor.inspect()?;
    if let Some(why) = before::trouble(&record, &guest) {
        return Err(refused(doing, scope, why));
    }
    before::refresh(&mut record, &guest)?;
    let disk = scope.volume(&record)?.map(|v| v.id);
    let same = |s: &&Snapshot| s.disk == disk && s.name == name;
    if record.living_snapshots().any(|s| same(&s)) {
        return Err(refused(doing, scope, "there is one of that name; choose another, or remove it first"));
    }
    let id = SnapshotId::random();
    let mut overlays = Vec::new();
    let mut volumes = Vec::new();
    let wanted = |v: &&crate::store::vm::Volume| match disk {
        Some(disk) => v.id == disk,
        None => !record.exclude.contains(&v.name),
    };
    for volume in record.attached().filter(wanted) {
        let Some(found) = guest.volumes.iter().find(|v| v.target == target(volume)) else { continue };
        let Some(live) = found.chain.first() else { continue };
        room_above(volume.name.as_str(), found.chain.len())
            .map_err(|why| refused(doing.clone(), scope, why))?;
        let place = Place { record: &record, volume, block_device: found.block_device, live: &live.path };
        let path = place.overlay(&id.to_string()).map_err(|why| refused(doing.clone(), scope, why))?;
        if guest.power == Power::Off {
            EngineImages.check_unused(live)?;
        }
        overlays.push(SnapshotOverlay { volume: volume.id, target: target(volume), path });
        volumes.push(Frozen { volume: volume.id, image: primary(live)? });
    }
    if overlays.is_empty() {
        return Err(refused(doing, scope, "no disk of it is a disk of the VM now"));
    }
    if options.quiesce && guest.power != Power::Off {
        hypervisor.agent_ping(AGENT)?;
    }
    let parent = parent(&record, &guest);
    let snapshot = Snapshot { id, name, disk, parent, created, quiesced: false, removed: false, volumes };
    let intact = tree::intact(&record, &guest).into_iter().collect();
    // New disks of the VM have their identity from now on.
    store.save_vm(&record)?;
    let journal = store.begin(
        &scope.vm,
        Operation::Snapshot(Box::new(SnapshotOp {
            action: SnapshotAction::Create,
            snapshot,
            step: SnapshotStep::Overlays,
            overlays,
            intact,
            merge: None,
        })),
    )?;
    failpoint::hit("snapshot-planned");
    take(store, &mut record, &*hypervisor, journal, options.quiesce, control)
}

/// A name for a snapshot that got none: its time, as backups have it.
fn by_time(record: &VmRecord, time: Timestamp) -> Result<SnapshotName, SnapshotError> {
    let mut number = 1;
    loop {
        let name = SnapshotName::new(BackupName::at(time, number).as_str())
            .map_err(crate::store::StoreError::from)?;
        if record.snapshots.iter().all(|s| s.name != name) {
            return Ok(name);
        }
        number += 1;
    }
}

/// The nearest snapshot that the VM's disks stand on.
fn parent(record: &VmRecord, guest: &Guest) -> Option<SnapshotId> {
    super::list::below(record, |volume| {
        guest.volumes.iter().find(|v| v.target == target(volume)).map(|v| v.chain.clone())
    })
}

fn take(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
    quiesce: bool,
    control: &OpControl<'_>,
) -> Result<Snapshot, SnapshotError> {
    let overlays = op_of(&journal).map(|op| new_overlays(&op)).unwrap_or_default();
    let quiesce = if quiesce { Quiesce::Required { limit: FREEZE } } else { Quiesce::No };
    control.step("taking a snapshot");
    match hypervisor.snapshot(&overlays, quiesce) {
        Ok(taken) => {
            taken.notes.iter().for_each(|note| control.warn(note.as_str()));
            if taken.frozen {
                journal.update_snapshot(|op| op.snapshot.quiesced = true)?;
            }
            failpoint::hit("snapshot-live");
            finish(store, record, hypervisor, journal)
        }
        Err(error) => match undo(record, hypervisor, journal, control) {
            Ok(()) => Err(error.into()),
            Err(undo) => {
                Err(SnapshotError::NotUndone { error: Box::new(error.into()), undo: Box::new(undo) })
            }
        },
    }
}

fn new_overlays(op: &SnapshotOp) -> Vec<NewOverlay> {
    op.overlays.iter().map(|o| NewOverlay { target: o.target.clone(), path: o.path.clone() }).collect()
}

/// The overlays are live: the record says so.
fn finish(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
) -> Result<Snapshot, SnapshotError> {
    journal.update_snapshot(|op| op.step = SnapshotStep::Record)?;
    let guest = hypervisor.inspect()?;
    let Some(op) = op_of(&journal) else {
        return Err(crate::store::StoreError::Invalid("no snapshot".into()).into());
    };
    let mut snapshot = op.snapshot.clone();
    for overlay in &op.overlays {
        let Some((live, frozen)) = placed(&guest, &overlay.target, &overlay.path) else { continue };
        if let Some(known) = snapshot.volumes.iter_mut().find(|f| f.volume == overlay.volume) {
            known.image = primary(frozen)?;
        }
        tree::add_layer(record, overlay.volume, primary(live)?);
    }
    if record.snapshots.iter().all(|s| s.id != snapshot.id) {
        record.snapshots.push(snapshot.clone());
    }
    settle::save(store, record, &guest, &op.intact)?;
    failpoint::hit("snapshot-recorded");
    journal.finish()?;
    Ok(snapshot)
}

/// The guest goes on as before, on what it was on.
fn undo(
    record: &VmRecord,
    hypervisor: &dyn Hypervisor,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<(), SnapshotError> {
    let overlays = op_of(&journal).map(|op| new_overlays(&op)).unwrap_or_default();
    let go_on = std::sync::atomic::AtomicBool::new(false);
    let control = OpControl { cancel: &go_on, ..*control };
    let guest = hypervisor.inspect()?;
    for overlay in &overlays {
        undo_disk(hypervisor, &guest, overlay, &control)?;
    }
    if guest.uuid.is_none() {
        hypervisor::disk_files(record)?.undo_interrupted(&overlays)?;
    }
    Ok(journal.finish()?)
}

/// Finishes it where all disks are on their overlays, else undoes it; whether it is finished.
pub(super) fn recover(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<bool, SnapshotError> {
    let guest = hypervisor.inspect()?;
    let all = op_of(&journal)
        .is_some_and(|op| op.overlays.iter().all(|o| placed(&guest, &o.target, &o.path).is_some()));
    if all {
        finish(store, record, hypervisor, journal)?;
    } else {
        undo(record, hypervisor, journal, control)?;
    }
    Ok(all)
}
