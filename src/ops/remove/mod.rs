//! `remove`: backups are hidden or deleted, by the table "Removal" of the requirements.
//!
//! What is deleted is first taken out of sight by renames, which can be undone; then it is made sure that nobody came to
//! use it meanwhile; from there on the removal is only ever finished.

pub(super) mod decide;
mod error;
mod finish;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use error::RemoveError;
pub(super) use finish::recover;

use super::control::OpControl;
use super::{deltas, remove_vm, whereabouts};
use crate::chain::Refusal;
use crate::failpoint;
use crate::hypervisor::Hypervisor;
use crate::store::journal::{Journal, Operation};
use crate::store::journal_removal::{RemoveOp, RemoveStep};
use crate::store::{BackupName, BackupSpec, Store, StoreError, VmLock, VmName, VmRecord};
use decide::Decided;

/// What happened to one backup.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Fate {
    /// `VM/BACKUP`.
    pub backup: String,
    /// What was done.
    pub how: How,
}

/// What is done to a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// It is gone.
    Deleted,
    /// It is kept for what stands on it, and no longer listed.
    Hidden,
    /// It had been hidden, and nothing needed it any more: it is gone.
    DeletedAfterHidden,
}

/// What a removal did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Removed {
    /// Each backup that was changed.
    pub backups: Vec<Fate>,
    /// With `--force`: what could not be deleted and is known to the store no longer.
    pub left: Vec<PathBuf>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// One VM's part of a removal, decided and not begun.
struct Part<'a> {
    store: &'a Store,
    vm: VmName,
    record: VmRecord,
    hypervisor: Option<std::sync::Arc<dyn Hypervisor>>,
    op: RemoveOp,
    note: Option<String>,
    left_behind: Vec<PathBuf>,
}

/// Removes any set of backups, in any order. Either all of them are removed or, where one is refused, none.
///
/// With `forced`, a backup whose files cannot be deleted, whose manifest is damaged or whose deltas on primary cannot be
/// reached is forgotten all the same, and what is left is reported.
///
/// # Errors
/// [`RemoveError`].
pub fn run(
    store: &Store,
    targets: &[BackupSpec],
    forced: bool,
    control: &OpControl<'_>,
) -> Result<Removed, RemoveError> {
    let mut by_vm: BTreeMap<&VmName, Vec<Option<&BackupName>>> = BTreeMap::new();
    for spec in targets {
        by_vm.entry(&spec.vm).or_default().push(spec.backup.as_ref());
    }
    // All locks and all decisions come before the first change.
    let mut parts = Vec::new();
    for (vm, names) in by_vm {
        store.vm(vm)?;
        let lock = store.lock_vm(vm, &format!("remove {vm}/…"))?;
        parts.push((part(store, vm, &names, forced)?, lock));
    }
    let mut done = Removed::default();
    for (part, _lock) in parts {
        let vm = part.vm.clone();
        part.run(&mut done, control)?;
        if remove_vm::forget_if_empty(store, &vm)? {
            done.notes.push(format!(
                "the VM {vm}, which was removed before, is forgotten: that was its last backup"
            ));
        }
    }
    Ok(done)
}

/// As `run` for backups of one VM, whose lock the caller holds.
pub(super) fn locked(
    store: &Store,
    vm: &VmName,
    names: &[&BackupName],
    _lock: &VmLock,
    control: &OpControl<'_>,
) -> Result<Removed, RemoveError> {
    let names: Vec<_> = names.iter().map(|name| Some(*name)).collect();
    let mut done = Removed::default();
    part(store, vm, &names, false)?.run(&mut done, control)?;
    Ok(done)
}

fn part<'a>(
    store: &'a Store,
    vm: &VmName,
    names: &[Option<&BackupName>],
    forced: bool,
) -> Result<Part<'a>, RemoveError> {
    if store.interrupted(vm)? {
        return Err(RemoveError::Unfinished { vm: vm.clone() });
    }
    let record = store.vm(vm)?;
    let Decided { mut op, merges_for } = decide::decide(store, &record, names, forced)?;
    let mut part = Part {
        store,
        vm: vm.clone(),
        hypervisor: None,
        note: None,
        left_behind: Vec::new(),
        op: op.clone(),
        record,
    };
    if let Some(current) = merges_for {
        match part.deltas() {
            Ok(deltas) => op.deltas = Some(deltas),
            Err(error) if forced => {
                op.deltas = Some(Vec::new());
                part.hypervisor = None;
                part.note = Some(format!("its deltas on primary were left: {error}"));
            }
            Err(source) => {
                return Err(RemoveError::Primary {
                    backup: format!("{vm}/{current}"),
                    source: Box::new(source),
                });
            }
        }
    }
    part.op = op;
    Ok(part)
}

impl Part<'_> {
    fn deltas(
        &mut self,
    ) -> Result<Vec<crate::store::journal_removal::VolumeDeltas>, super::backup::BackupError> {
        if deltas::known_paths(&self.record).is_empty() {
            // A scan leaves nothing, so nobody needs to be asked.
            return Ok(Vec::new());
        }
        let hypervisor = whereabouts::find(self.store, &mut self.record)?;
        let planned = deltas::plan(&self.record, &hypervisor.inspect()?)?;
        self.hypervisor = Some(hypervisor);
        self.left_behind = deltas::left_behind(&self.record, &planned);
        Ok(planned)
    }

    fn run(mut self, done: &mut Removed, control: &OpControl<'_>) -> Result<(), RemoveError> {
        let operation = Operation::Remove(self.op.clone());
        let mut journal = if self.op.delete.is_empty() {
            self.store.begin(&self.vm, operation)?
        } else {
            self.store.begin_freeing(&self.vm, operation)?
        };
        failpoint::hit("remove-planned");
        if let Err(error) = self.take(control) {
            self.put_back()?;
            journal.finish()?;
            return Err(error);
        }
        journal.update(decided)?;
        failpoint::hit("remove-decided");
        for path in &self.left_behind {
            done.notes.push(format!(
                "{} is no part of its disk any more, as another tool took it out: delete it when you know that nothing needs it",
                path.display()
            ));
        }
        if let Some(note) = self.note.take() {
            done.left.extend(deltas::known_paths(&self.record));
            done.notes.push(note);
        }
        finish::finish(self.store, &mut self.record, self.hypervisor.as_deref(), journal, done, control)
    }

    /// Takes what is to be deleted out of sight, then makes sure that nobody uses it.
    fn take(&self, control: &OpControl<'_>) -> Result<(), RemoveError> {
        for doomed in &self.op.delete {
            let backup = format!("{}/{}", self.vm, doomed.backup.name);
            let trash = self.store.trash(&self.vm, doomed.backup.id);
            trash.take(self.store, &doomed.backup.name).map_err(|source| RemoveError::NotTaken {
                path: self.store.backup_dir(&self.vm, &doomed.backup.name),
                backup,
                source: Box::new(source),
            })?;
        }
        failpoint::hit("remove-taken");
        if control.is_cancelled() {
            return Err(StoreError::Invalid("nothing was removed".into()).into());
        }
        // It can only have been opened before it was out of sight.
        for doomed in &self.op.delete {
            if let Some(user) = decide::user(self.store, doomed.backup.id)? {
                let backup = format!("{}/{}", self.vm, doomed.backup.name);
                return Err(RemoveError::Refused { backup, why: Refusal::InUse { user } });
            }
        }
        Ok(())
    }

    fn put_back(&self) -> Result<(), RemoveError> {
        put_back(self.store, &self.vm, &self.op)?;
        Ok(())
    }
}

fn decided(operation: &mut Operation) {
    if let Operation::Remove(op) = operation {
        op.step = RemoveStep::Decided;
    }
}

/// Undoes a removal that was not decided.
fn put_back(store: &Store, vm: &VmName, op: &RemoveOp) -> Result<(), StoreError> {
    for doomed in op.delete.iter().rev() {
        let trash = store.trash(vm, doomed.backup.id);
        if trash.is_whole() {
            trash.put_back(store, &doomed.backup.name)?;
        } else {
            // Only where another host's decision was not written into the store, for lack of room: it had begun.
            trash.empty()?;
        }
    }
    Ok(())
}

/// What one entry of the journal is about.
fn op_of(journal: &Journal) -> Option<RemoveOp> {
    match &journal.entry().operation {
        Operation::Remove(op) => Some(op.clone()),
        _ => None,
    }
}
