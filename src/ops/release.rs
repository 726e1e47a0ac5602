//! Assigning VMs to offerings, and taking them off: the chain ends, and nothing of knibfs stays on primary.

use super::backup::BackupError;
use super::control::OpControl;
use super::{deltas, hypervisor};
use crate::failpoint;
use crate::store::journal::{Journal, Operation};
use crate::store::journal_removal::ReleaseOp;
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
    let offering = store.find_offering(offering)?;
    let mut record = store.vm(vm)?;
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
    if store.interrupted(vm)? {
        let what = format!("an operation on {vm} was interrupted: run `knibfs recover` first");
        return Err(StoreError::Invalid(what).into());
    }
    let record = store.vm(vm)?;
    if record.offering.is_none() {
        return Err(StoreError::Invalid(format!("{vm} is assigned to no offering")).into());
    }
    let deltas = match deltas::known_paths(&record).is_empty() {
        true => Vec::new(),
        false => deltas::plan(&record, &hypervisor::of(&record)?.inspect()?)?,
    };
    let journal = store.begin(vm, Operation::Release(ReleaseOp { unassign: true, deltas }))?;
    failpoint::hit("release-planned");
    finish(store, journal, control)
}

fn finish(store: &Store, mut journal: Journal, control: &OpControl<'_>) -> Result<VmRecord, BackupError> {
    let vm = journal.entry().vm.clone();
    let mut record = store.vm(&vm)?;
    let Operation::Release(op) = journal.entry().operation.clone() else { return Ok(record) };
    let guest = match op.deltas.is_empty() {
        true => None,
        false => {
            let hypervisor = hypervisor::of(&record)?;
            for kept in deltas::merge_all(&*hypervisor, &mut journal, control)? {
                control.warn(kept);
            }
            Some(hypervisor.inspect()?)
        }
    };
    if let Some(current) = record.tracking.current.clone() {
        match store.manifest(&vm, &current.name) {
            Ok(manifest) if manifest.id == current.id && !manifest.end_of_chain => {
                store.save_manifest(&crate::store::Manifest { end_of_chain: true, ..manifest })?;
            }
            // Missing or damaged: nothing can stand on it anyway.
            _ => {}
        }
    }
    deltas::end_tracking(&mut record, guest.as_ref())?;
    if op.unassign {
        record.offering = None;
    }
    store.save_vm(&record)?;
    failpoint::hit("release-recorded");
    journal.finish()?;
    Ok(record)
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
