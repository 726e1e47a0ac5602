//! Removing a snapshot: what only it needs is merged or deleted. What others stand on is kept, and merged when it can be.

use super::{Scope, SnapshotError, check_usable, op_of, tidy, tree};
use crate::failpoint;
use crate::hypervisor::Hypervisor;
use crate::ops::control::OpControl;
use crate::ops::whereabouts;
use crate::store::journal::Journal;
use crate::store::snapshot::{Snapshot, SnapshotAction, SnapshotOp, SnapshotStep};
use crate::store::{Operation, SnapshotName, Store, VmRecord};

/// Removes a snapshot of a VM that runs, is paused or off; as it is afterwards: still in the store's record, marked
/// `removed`, where others stand on it.
///
/// # Errors
/// [`SnapshotError`]: nothing was changed, or, where the error says so, `recover` brings it to its end.
pub fn remove(
    store: &Store,
    scope: &Scope,
    name: &SnapshotName,
    control: &OpControl<'_>,
) -> Result<Option<Snapshot>, SnapshotError> {
    store.vm(&scope.vm)?;
    let _lock = store.lock_vm(&scope.vm, &format!("remove the snapshot {name} of {scope}"))?;
    let mut record = store.vm_in_care(&scope.vm)?;
    check_usable(store, &record, &format!("remove the snapshot {name}"), scope)?;
    let snapshot = scope.find(&record, name)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let guest = hypervisor.inspect()?;
    let id = snapshot.id;
    let journal = store.begin(
        &scope.vm,
        Operation::Snapshot(Box::new(SnapshotOp {
            action: SnapshotAction::Remove,
            snapshot,
            step: SnapshotStep::Record,
            overlays: Vec::new(),
            intact: tree::intact(&record, &guest).into_iter().collect(),
            merge: None,
        })),
    )?;
    failpoint::hit("snapshot-planned");
    finish(store, &mut record, &*hypervisor, journal, control)?;
    Ok(record.snapshots.into_iter().find(|s| s.id == id))
}

pub(super) fn finish(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
    control: &OpControl<'_>,
) -> Result<(), SnapshotError> {
    let Some(op) = op_of(&journal) else { return Ok(()) };
    if op.step < SnapshotStep::Tidy {
        for snapshot in record.snapshots.iter_mut().filter(|s| s.id == op.snapshot.id) {
            snapshot.removed = true;
        }
        store.save_vm(record)?;
        failpoint::hit("snapshot-recorded");
        journal.update_snapshot(|op| op.step = SnapshotStep::Tidy)?;
    }
    tidy(store, record, hypervisor, journal, control)
}
