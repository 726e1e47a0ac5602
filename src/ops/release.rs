//! Assigning VMs to offerings, and taking them off: the chain ends, and nothing of knibfs stays on primary.

use super::backup::BackupError;
use super::control::OpControl;
use super::{deltas, detached, whereabouts};
use crate::failpoint;
use crate::hypervisor::Hypervisor;
use crate::store::journal::{Journal, Operation};
use crate::store::journal_removal::{ReleaseOp, VolumeDeltas};
use crate::store::{Store, StoreError, StoreResult, VmName, VmRecord};

/// Assigns a VM to an offering, by name or id; what it was assigned to before does not matter.
///
/// # Errors
/// There is no such VM or offering, or the VM is in use. Nothing was changed.
pub fn assign(store: &Store, vm: &VmName, offering: &str) -> StoreResult<VmRecord> {
    store.vm(vm)?;
    let _lock = store.lock_vm(vm, &format!("vm assign {vm}"))?;
    // An offering that is being deleted must not be assigned meanwhile.
    let _config = store.lock_config()?;
    let mut record = store.vm_in_care(vm)?;
    let offering = store.find_offering(offering)?;
    record.offering = Some(offering.id);
    store.save_vm(&record)?;
    Ok(record)
}

/// Takes a VM off its offering: its deltas on primary are merged, and its next backup is full.
///
/// # Errors
/// It is assigned to none, or its primary cannot be reached: nothing was changed.
pub fn unassign(store: &Store, vm: &VmName, control: &OpControl<'_>) -> Result<VmRecord, BackupError> {
    store.vm(vm)?;
    let _lock = store.lock_vm(vm, &format!("vm unassign {vm}"))?;
    refuse_interrupted(store, vm)?;
    let mut record = store.vm_in_care(vm)?;
    if record.offering.is_none() {
        let what = format!(
            "{vm} is assigned to no offering, so there is none to take it off; `knibfs vm remove {vm}` merges its deltas and takes it out of care"
        );
        return Err(StoreError::Invalid(what).into());
    }
    let deltas = plan(store, &mut record, control)?;
    let journal = store.begin(vm, Operation::Release(ReleaseOp { unassign: true, remove: false, deltas }))?;
    failpoint::hit("release-planned");
    finish(store, journal, control)
}

/// Refuses a VM with an operation that nobody works on any more.
pub(super) fn refuse_interrupted(store: &Store, vm: &VmName) -> Result<(), BackupError> {
    if store.interrupted(vm)? {
        let what = format!("an operation on {vm} was interrupted: run `knibfs recover` first");
        return Err(StoreError::Invalid(what).into());
    }
    Ok(())
}

/// The merges that end the VM's chain; who leaves no delta is not asked.
pub(super) fn plan(
    store: &Store,
    record: &mut VmRecord,
    control: &OpControl<'_>,
) -> Result<Vec<VolumeDeltas>, BackupError> {
    if deltas::known_paths(record).is_empty() {
        return Ok(Vec::new());
    }
    let hypervisor = whereabouts::find(store, record)?;
    let guest = hypervisor.inspect()?;
    detached::settle(store, record, &guest, &*hypervisor, control)?;
    deltas::plan(record, &guest)
}

/// Does the merges and ends the chain in `record`, which the caller saves; says what had to be kept.
pub(super) fn end_chain(
    store: &Store,
    journal: &mut Journal,
    record: &mut VmRecord,
    hypervisor: Option<&dyn Hypervisor>,
    control: &OpControl<'_>,
) -> Result<Vec<String>, BackupError> {
    let (mut kept, mut guest) = (Vec::new(), None);
    if let Some(hypervisor) = hypervisor {
        kept = deltas::merge_all(hypervisor, journal, control)?;
        guest = Some(hypervisor.inspect()?);
    }
    mark_ended(store, record)?;
    deltas::end_tracking(record, guest.as_ref())?;
    Ok(kept)
}

fn finish(store: &Store, mut journal: Journal, control: &OpControl<'_>) -> Result<VmRecord, BackupError> {
    let mut record = store.vm(&journal.entry().vm)?;
    let Operation::Release(op) = journal.entry().operation.clone() else { return Ok(record) };
    let hypervisor = match op.deltas.is_empty() {
        true => None,
        false => Some(whereabouts::find(store, &mut record)?),
    };
    for kept in end_chain(store, &mut journal, &mut record, hypervisor.as_deref(), control)? {
        control.warn(kept);
    }
    if op.unassign {
        record.offering = None;
    }
    store.save_vm(&record)?;
    failpoint::hit("release-recorded");
    journal.finish()?;
    Ok(record)
}

/// Nothing may stand on the current backup any more; the caller saves the record.
pub(super) fn mark_ended(store: &Store, record: &mut VmRecord) -> StoreResult<()> {
    if let Some(current) = record.tracking.current.take() {
        match store.manifest(&record.name, &current.name) {
            Ok(manifest) if manifest.id == current.id && !manifest.end_of_chain => {
                store.save_manifest(&crate::store::Manifest { end_of_chain: true, ..manifest })?;
            }
            // Missing or damaged: nothing can stand on it anyway.
            _ => {}
        }
    }
    record.tracking.end_of_chain = true;
    Ok(())
}

/// Finishes what was interrupted; what was done, in words. The caller holds the VM's lock.
pub(super) fn recover(
    store: &Store,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<String, BackupError> {
    let vm = journal.entry().vm.clone();
    finish(store, journal, control)?;
    Ok(format!("{vm} was taken off its offering: its chain ended"))
}
