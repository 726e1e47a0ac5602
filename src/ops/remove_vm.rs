//! `vm remove`: a VM is taken out of knibfs's care. Its deltas on primary are merged, its backups are kept.

use std::path::PathBuf;

use jiff::Timestamp;

use super::backup::BackupError;
use super::control::OpControl;
use super::{deltas, release, whereabouts};
use crate::failpoint;
use crate::hypervisor::HypervisorError;
use crate::store::journal::{Journal, Operation};
use crate::store::journal_removal::ReleaseOp;
use crate::store::vm::VmState;
use crate::store::{Store, StoreError, VmName, VmRecord};

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct RemovedVm {
    /// The VM.
    pub vm: VmName,
    /// How many backups are kept.
    pub backups: usize,
    /// Deltas that lie on primary still.
    pub left: Vec<PathBuf>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Takes a VM out of knibfs's care; its domain goes on without it. One that has gone from every host that is known is
/// removed, too: its deltas cannot be merged then, and are reported. With `forced`, so is one whose host cannot be asked.
///
/// # Errors
/// It is in use, or its primary cannot be reached: nothing was changed. After an interruption `recover` finishes it.
pub fn run(
    store: &Store,
    vm: &VmName,
    forced: bool,
    control: &OpControl<'_>,
) -> Result<RemovedVm, BackupError> {
    store.vm(vm)?;
    let _lock = store.lock_vm(vm, &format!("vm remove {vm}"))?;
    release::refuse_interrupted(store, vm)?;
    let mut record = store.vm(vm)?;
    if record.removed.is_some() {
        return Err(
            StoreError::Invalid(format!("the VM {vm} was removed already; its backups are kept")).into()
        );
    }
    let mut notes = Vec::new();
    let snapshots: Vec<_> = record.living_snapshots().map(|s| s.name.as_str()).collect();
    if !snapshots.is_empty() && !forced {
        let what = format!(
            "the VM {vm} has snapshots ({}), which nobody could merge afterwards: remove them first, or leave them with --force",
            snapshots.join(", ")
        );
        return Err(StoreError::Invalid(what).into());
    }
    let deltas = match release::plan(store, &mut record, control) {
        Ok(deltas) => deltas,
        Err(error) if is_gone(&error) => {
            notes.push("its domain is gone from every host that is known".to_owned());
            Vec::new()
        }
        Err(error) if forced => {
            notes.push(format!("its deltas on primary were left: {error}"));
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    let operation = Operation::Release(ReleaseOp { unassign: true, remove: true, deltas });
    let journal = store.begin(vm, operation)?;
    failpoint::hit("remove-vm-planned");
    let mut done = finish(store, journal, control)?;
    notes.append(&mut done.notes);
    Ok(RemovedVm { notes, ..done })
}

fn is_gone(error: &BackupError) -> bool {
    matches!(error, BackupError::Hypervisor(HypervisorError::Gone { silent, .. }) if silent.is_empty())
}

fn finish(store: &Store, mut journal: Journal, control: &OpControl<'_>) -> Result<RemovedVm, BackupError> {
    let vm = journal.entry().vm.clone();
    let mut record = store.vm(&vm)?;
    let planned = match &journal.entry().operation {
        Operation::Release(op) => !op.deltas.is_empty(),
        _ => false,
    };
    let mut notes = Vec::new();
    if record.removed.is_none() {
        let hypervisor = match planned.then(|| whereabouts::find(store, &mut record)).transpose() {
            // It went in the meantime.
            Err(HypervisorError::Gone { silent, .. }) if silent.is_empty() => None,
            found => found?,
        };
        notes = release::end_chain(store, &mut journal, &mut record, hypervisor.as_deref(), control)?;
        forget(&mut record);
        store.save_vm(&record)?;
    }
    failpoint::hit("remove-vm-recorded");
    let layers = record.layers.iter().map(|l| l.image.path.clone());
    let left: Vec<_> =
        deltas::known_paths(&record).into_iter().chain(layers).filter(|p| p.exists()).collect();
    journal.finish()?;
    failpoint::hit("remove-vm-finished");
    let backups = store.backups(&vm)?;
    if is_empty(store, &vm)? {
        store.forget_vm(&vm)?;
    }
    let backups = backups.manifests.iter().filter(|m| m.is_listed()).count();
    Ok(RemovedVm { vm, backups, left, notes })
}

/// What stays is who it was, so that its backups are found, and that it may be taken back.
fn forget(record: &mut VmRecord) {
    record.removed = Some(Timestamp::now());
    record.offering = None;
    record.exclude.clear();
    record.delta_dir = None;
    record.state = VmState::Ready;
    for volume in &mut record.volumes {
        volume.detached = true;
    }
}

/// Whether nothing is left that its record is needed for.
fn is_empty(store: &Store, vm: &VmName) -> Result<bool, StoreError> {
    Ok(store.backup_names(vm)?.is_empty() && store.trashes(vm)?.is_empty())
}

/// Forgets a removed VM for good when its last backup has gone; whether it did. The caller holds the VM's lock.
pub(super) fn forget_if_empty(store: &Store, vm: &VmName) -> Result<bool, StoreError> {
    let gone = store.vm(vm)?.removed.is_some() && is_empty(store, vm)? && !store.interrupted(vm)?;
    if gone {
        store.forget_vm(vm)?;
    }
    Ok(gone)
}

/// Finishes what was interrupted; what was done, in words. The caller holds the VM's lock.
pub(super) fn recover(
    store: &Store,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<String, BackupError> {
    let done = finish(store, journal, control)?;
    for note in done.notes {
        control.warn(note);
    }
    for left in done.left {
        control.warn(format!("{} is a delta that was left on primary", left.display()));
    }
    Ok(format!("the removal of the VM {} was finished", done.vm))
}
