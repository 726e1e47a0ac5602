//! A removal from its decision to its end; all of it can be done again.

use std::path::PathBuf;

use super::{Fate, How, RemoveError, Removed, op_of, put_back};
use crate::failpoint;
use crate::hypervisor::Hypervisor;
use crate::ops::control::OpControl;
use crate::ops::{deltas, whereabouts};
use crate::store::journal::Journal;
use crate::store::journal_removal::{Doomed, Named, RemoveStep};
use crate::store::manifest::{BackupState, Manifest};
use crate::store::{Store, StoreError, StoreResult, VmName, VmRecord};

/// Merges, deletes, records. `hypervisor` is none where nothing is to be merged, or nobody can be asked.
pub(super) fn finish(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: Option<&dyn Hypervisor>,
    mut journal: Journal,
    done: &mut Removed,
    control: &OpControl<'_>,
) -> Result<(), RemoveError> {
    let vm = record.name.clone();
    if let Some(hypervisor) = hypervisor {
        for kept in deltas::merge_all(hypervisor, &mut journal, control)? {
            control.warn(kept.clone());
            done.notes.push(kept);
        }
    }
    let Some(op) = op_of(&journal) else { return Ok(()) };
    let mut failed = Vec::new();
    let mut stuck: Vec<Manifest> = Vec::new();
    for doomed in &op.delete {
        match delete(store, &vm, doomed, op.forced, &stuck)? {
            Deleted::Gone(left) => {
                done.left.extend(left);
                let how = if doomed.asked { How::Deleted } else { How::DeletedAfterHidden };
                done.backups.push(Fate { backup: format!("{vm}/{}", doomed.backup.name), how });
            }
            Deleted::Failed(manifest, error) => {
                failed.push((format!("{vm}/{}", doomed.backup.name), error));
                stuck.push(*manifest);
            }
            Deleted::Needed(manifest) => {
                stuck.push(*manifest);
                if doomed.asked {
                    done.backups
                        .push(Fate { backup: format!("{vm}/{}", doomed.backup.name), how: How::Hidden });
                }
            }
        }
        failpoint::hit("remove-deleted");
    }
    // After the deletions: on a full disk there is room only now.
    if op.deltas.is_some() {
        let guest =
            hypervisor.map(Hypervisor::inspect).transpose().map_err(crate::ops::backup::BackupError::from)?;
        deltas::end_tracking(record, guest.as_ref())?;
        store.save_vm(record)?;
        failpoint::hit("remove-recorded");
    }
    for ends in &op.ends {
        change(store, &vm, ends, |m| m.end_of_chain = true)?;
    }
    for hidden in &op.hide {
        change(store, &vm, hidden, |m| m.state = BackupState::Removed)?;
        done.backups.push(Fate { backup: format!("{vm}/{}", hidden.name), how: How::Hidden });
        failpoint::hit("remove-hidden");
    }
    journal.finish()?;
    let mut failed = failed.into_iter();
    match failed.next() {
        None => Ok(()),
        Some((backup, source)) => Err(RemoveError::NotDeleted {
            backup,
            source: Box::new(source),
            others: failed.map(|(b, _)| b).collect(),
        }),
    }
}

enum Deleted {
    /// Gone, but for these.
    Gone(Vec<PathBuf>),
    /// Row "files cannot be deleted": back in its place, in state `Error`.
    Failed(Box<Manifest>, StoreError),
    /// What could not be deleted stands on it: back in its place.
    Needed(Box<Manifest>),
}

fn delete(
    store: &Store,
    vm: &VmName,
    doomed: &Doomed,
    forced: bool,
    stuck: &[Manifest],
) -> StoreResult<Deleted> {
    let name = &doomed.backup.name;
    let trash = store.trash(vm, doomed.backup.id);
    if !trash.exists() {
        // Done before a crash: deleted, or put back.
        return Ok(match store.manifest(vm, name) {
            Ok(back) if back.id == doomed.backup.id => Deleted::Needed(Box::new(back)),
            _ => Deleted::Gone(Vec::new()),
        });
    }
    let manifest = trash.manifest();
    if let (Ok(mut needed), true) = (
        manifest.as_ref().cloned(),
        stuck.iter().any(|m| m.parent.as_ref().is_some_and(|p| p.id == doomed.backup.id)),
    ) {
        trash.put_back(store, name)?;
        if needed.state != BackupState::Removed {
            needed.state = BackupState::Removed;
            store.save_manifest(&needed)?;
        }
        return Ok(Deleted::Needed(Box::new(needed)));
    }
    let Err(error) = trash.empty() else { return Ok(Deleted::Gone(Vec::new())) };
    if forced {
        return trash.drop_record().map(Deleted::Gone);
    }
    trash.put_back(store, name)?;
    let mut left = store.manifest(vm, name)?;
    left.state = BackupState::Error;
    store.save_manifest(&left)?;
    Ok(Deleted::Failed(Box::new(left), error))
}

fn change(store: &Store, vm: &VmName, of: &Named, change: impl FnOnce(&mut Manifest)) -> StoreResult<()> {
    let mut manifest = match store.manifest(vm, &of.name) {
        Ok(found) if found.id == of.id => found,
        Ok(_) => return Ok(()),
        // It is gone: nothing is left to be marked.
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    };
    let before = manifest.clone();
    change(&mut manifest);
    if manifest == before { Ok(()) } else { store.save_manifest(&manifest) }
}

/// Finishes or undoes a removal that was interrupted; what was done, in words. The caller holds the VM's lock.
pub(in crate::ops) fn recover(
    store: &Store,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<String, RemoveError> {
    let vm = journal.entry().vm.clone();
    let Some(op) = op_of(&journal) else { return Ok(String::new()) };
    if op.step == RemoveStep::Planned {
        put_back(store, &vm, &op)?;
        journal.finish()?;
        return Ok(format!("an interrupted removal of backups of {vm} was undone"));
    }
    let mut record = store.vm(&vm)?;
    let merges = op.deltas.as_ref().is_some_and(|all| !all.is_empty());
    let hypervisor = merges
        .then(|| whereabouts::find(store, &mut record))
        .transpose()
        .map_err(crate::ops::backup::BackupError::from)?;
    let mut done = Removed::default();
    finish(store, &mut record, hypervisor.as_deref(), journal, &mut done, control)?;
    Ok(format!("an interrupted removal of backups of {vm} was finished"))
}
