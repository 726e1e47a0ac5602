//! After a crash: finishing or undoing what the journal says was under way.
//!
//! What is done follows from what is there (the domain's chain, the store's folders); the journal only says where to look.

use super::backup::{BackupError, finish, merge, undo};
use super::compress;
use super::control::OpControl;
use super::hypervisor;
use crate::store::journal::{BackupOp, CompressOp, Journal, Operation};
use crate::store::{Store, StoreError};

/// What was done about one interrupted operation.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Recovered {
    /// The VM.
    pub vm: String,
    /// What was done, in words.
    pub done: String,
}

/// Finishes or undoes every interrupted backup and compression. Those of a VM that is being worked on are left alone.
///
/// # Errors
/// The first that could not be recovered; the others were.
pub fn run(store: &Store, control: &OpControl<'_>) -> Result<Vec<Recovered>, BackupError> {
    let mut all = Vec::new();
    let mut failed = None;
    for journal in store.unfinished()? {
        let vm = journal.entry().vm.clone();
        let outcome = match journal.entry().operation.clone() {
            Operation::Backup(op) => one(store, journal, &op, control),
            Operation::Compress(op) => compression(store, journal, &op),
        };
        match outcome {
            Ok(done) => all.push(Recovered { vm: vm.to_string(), done }),
            Err(BackupError::Store(busy @ StoreError::Busy { .. })) => control.warn(busy.to_string()),
            Err(error) => {
                control.warn(format!("{vm}: {error}"));
                failed.get_or_insert(error);
            }
        }
    }
    failed.map_or(Ok(all), Err)
}

fn compression(store: &Store, journal: Journal, op: &CompressOp) -> Result<String, BackupError> {
    let vm = journal.entry().vm.clone();
    let _lock = store.lock_vm(&vm, "recover")?;
    // It may have been finished before the lock was free.
    let Some(journal) = store.unfinished()?.into_iter().find(|j| j.entry().id == journal.entry().id) else {
        return Ok("it was finished meanwhile".into());
    };
    compress::recover(store, &vm, op)?;
    journal.finish()?;
    Ok(format!("an interrupted compression of {vm}/{} was ended", op.name))
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
    let hypervisor = hypervisor::of(&record)?;
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
