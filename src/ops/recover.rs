//! After a crash: finishing or undoing what the journal says was under way.
//!
//! What is done follows from what is there (the domain's chain, the store's folders); the journal only says where to look.

use super::backup::{BackupError, finish, merge, undo};
use super::compress;
use super::control::OpControl;
use super::{prune, release, remove, remove_vm, restore, snapshot, whereabouts};
use crate::store::journal::{BackupOp, CompressOp, Journal, Operation};
use crate::store::{Store, StoreError, VmName};

/// What was done about one interrupted operation.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Recovered {
    /// The VM.
    pub vm: String,
    /// What was done, in words.
    pub done: String,
}

/// Finishes or undoes every interrupted operation, and pulls the data of quick restores to its end. A compression that goes on
/// is left alone.
///
/// # Errors
/// The first that could not be recovered, a VM that is being worked on among them; the others were.
pub fn run(store: &Store, control: &OpControl<'_>) -> Result<Vec<Recovered>, BackupError> {
    let mut all = Vec::new();
    let mut failed = None;
    let (quick, mut journals): (Vec<_>, Vec<_>) = store.unfinished()?.into_iter().partition(is_quick);
    // Pulling data may take hours: it keeps nothing else waiting.
    journals.extend(quick);
    for journal in journals {
        if store.is_compressing(journal.entry())? {
            continue;
        }
        let vm = journal.entry().vm.clone();
        let outcome = match journal.entry().operation.clone() {
            Operation::Backup(op) => one(store, journal, &op, control),
            Operation::Compress(op) => compression(store, journal, &op),
            Operation::Remove(_) => locked(store, journal, |journal| {
                remove::recover(store, journal, control).map_err(BackupError::from)
            }),
            Operation::Absorb(_) => {
                locked(store, journal, |journal| prune::recover(store, journal).map_err(BackupError::from))
            }
            Operation::Release(op) if op.remove => {
                locked(store, journal, |journal| remove_vm::recover(store, journal, control))
            }
            Operation::Release(_) => {
                locked(store, journal, |journal| release::recover(store, journal, control))
            }
            Operation::Restore(_) => restoring(store, journal, control),
            Operation::Snapshot(_) => locked(store, journal, |journal| {
                snapshot::recover(store, journal, control).map_err(BackupError::from)
            }),
        };
        match outcome {
            Ok(done) => all.push(Recovered { vm: vm.to_string(), done }),
            Err(error) if failed.is_some() => control.warn(format!("{vm}: {error}")),
            Err(error) => failed = Some(error),
        }
    }
    store.sweep_forgotten()?;
    for vm in store.vms()? {
        match strays(store, &vm) {
            Ok(done) => all.extend(done.into_iter().map(|done| Recovered { vm: vm.to_string(), done })),
            Err(StoreError::Busy { .. }) => {}
            Err(error) => control.warn(format!("{vm}: {error}")),
        }
    }
    failed.map_or(Ok(all), Err)
}

fn is_quick(journal: &Journal) -> bool {
    matches!(&journal.entry().operation, Operation::Restore(op) if op.mount.is_some())
}

/// Takes the VM's lock and goes on, unless the operation was finished before the lock was free.
fn locked(
    store: &Store,
    journal: Journal,
    go_on: impl FnOnce(Journal) -> Result<String, BackupError>,
) -> Result<String, BackupError> {
    let _lock = store.lock_vm(&journal.entry().vm, "recover")?;
    match store.unfinished()?.into_iter().find(|j| j.entry().id == journal.entry().id) {
        Some(journal) => go_on(journal),
        None => Ok("it was finished meanwhile".into()),
    }
}

/// Backups that were being deleted and of which no journal tells: whole ones are put back, the others deleted.
fn strays(store: &Store, vm: &VmName) -> Result<Vec<String>, StoreError> {
    let removed = store.vm(vm).is_ok_and(|record| record.removed.is_some());
    if store.trashes(vm)?.is_empty() && !removed {
        return Ok(Vec::new());
    }
    let _lock = store.lock_vm(vm, "recover")?;
    let mut done = Vec::new();
    if store.unfinished()?.iter().any(|j| j.entry().vm == *vm) {
        return Ok(done);
    }
    for trash in store.trashes(vm)? {
        match trash.manifest() {
            Ok(manifest) => {
                trash.put_back(store, &manifest.name)?;
                done.push(format!(
                    "the backup {vm}/{} was put back: its deletion had not begun",
                    manifest.name
                ));
            }
            Err(_) => {
                trash.empty()?;
                done.push(format!("what was left of a deleted backup of {vm} was deleted"));
            }
        }
    }
    if removed && remove_vm::forget_if_empty(store, vm)? {
        done.push(format!("the VM {vm}, which was removed, was forgotten: it has no backup any more"));
    }
    Ok(done)
}

fn compression(store: &Store, journal: Journal, op: &CompressOp) -> Result<String, BackupError> {
    let vm = journal.entry().vm.clone();
    let _lock = store.lock_vm(&vm, "recover")?;
    // It may have been finished before the lock was free.
    let Some(journal) = store.unfinished()?.into_iter().find(|j| j.entry().id == journal.entry().id) else {
        return Ok("it was finished meanwhile".into());
    };
    if store.is_compressing(journal.entry())? {
        return Ok(format!("the compression of {vm}/{} goes on", op.name));
    }
    compress::recover(store, &vm, op)?;
    journal.finish()?;
    Ok(format!("an interrupted compression of {vm}/{} was ended", op.name))
}

fn restoring(store: &Store, journal: Journal, control: &OpControl<'_>) -> Result<String, BackupError> {
    let vm = journal.entry().vm.clone();
    // A VM that was to be made may not be there yet.
    let _lock = store.vm_dir(&vm).exists().then(|| store.lock_vm(&vm, "recover")).transpose()?;
    let Some(journal) = store.unfinished()?.into_iter().find(|j| j.entry().id == journal.entry().id) else {
        return Ok("it was finished meanwhile".into());
    };
    restore::recover(store, journal, control).map_err(|error| BackupError::Restore(Box::new(error)))
}

fn one(
    store: &Store,
    journal: Journal,
    op: &BackupOp,
    control: &OpControl<'_>,
) -> Result<String, BackupError> {
    let vm = journal.entry().vm.clone();
    let _lock = store.lock_vm(&vm, "recover")?;
    // It may have been finished while we waited for nothing but the lock.
    let Some(journal) = store.unfinished()?.into_iter().find(|j| j.entry().id == journal.entry().id) else {
        return Ok("it was finished meanwhile".into());
    };
    let mut record = store.vm(&vm)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let history = store.backups(&vm)?.manifests;
    let staging = store.staging(&vm, op.backup);
    let manifest = match merge::published(&history, op.backup) {
        Some(manifest) => Some(manifest.clone()),
        None if staging.is_whole() => Some(store.staging(&vm, op.backup).republish(store)?),
        None => None,
    };
    match manifest {
        Some(manifest) => {
            control.step(format!("finishing the backup {vm}/{}", manifest.name));
            for warning in finish(store, &mut record, &*hypervisor, journal, &manifest, control)? {
                control.warn(warning);
            }
            Ok(format!("the backup {vm}/{} was finished", manifest.name))
        }
        None => {
            control.step(format!("undoing an interrupted backup of {vm}"));
            undo(&mut record, store, &*hypervisor, journal, staging, control)?;
            Ok(format!("an interrupted backup of {vm} was undone"))
        }
    }
}
