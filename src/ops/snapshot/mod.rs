//! VM and volume snapshots: disk-only, external, on primary.
//!
//! A snapshot is an image that nobody writes to any more, with all below it; the guest goes on in an overlay. Which images
//! are needed, and what becomes of the others, are the rules of [`crate::chain::snapshot`]. They live together with
//! backups, whose deltas are images of the same tree: what a snapshot shows is never merged into by a backup, and a
//! backup finds what changed in all layers above the delta of its parent.

mod create;
mod error;
mod list;
mod remove;
mod revert;
mod settle;
mod tidy;
mod tree;

pub use create::{Options, create};
pub use error::SnapshotError;
pub use list::{Listed, ListedDisk, list};
pub use remove::remove;
pub use revert::revert;

use super::control::OpControl;
use super::whereabouts;
use crate::hypervisor::Hypervisor;
use crate::store::journal::Journal;
use crate::store::snapshot::{Snapshot, SnapshotAction, SnapshotOp};
use crate::store::vm::{Source, Track, Volume};
use crate::store::{DiskName, Operation, SnapshotName, Store, VmName, VmRecord, VolumeId};
use tidy::Tidy;

/// What a snapshot is of: the VM, or one of its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The VM.
    pub vm: VmName,
    /// The disk; none for a snapshot of the VM.
    pub disk: Option<DiskName>,
}

impl Scope {
    fn volume<'a>(&self, record: &'a VmRecord) -> Result<Option<&'a Volume>, SnapshotError> {
        let Some(name) = &self.disk else { return Ok(None) };
        let found = record.volumes.iter().find(|v| v.name == *name);
        found.map(Some).ok_or_else(|| SnapshotError::Unknown {
            what: format!("disk \"{name}\""),
            of: self.vm.to_string(),
            there: names(record.attached().map(|v| v.name.as_str())),
        })
    }

    /// The living snapshot of that name.
    fn find(&self, record: &VmRecord, name: &SnapshotName) -> Result<Snapshot, SnapshotError> {
        let volume = self.volume(record)?.map(|v| v.id);
        let of_this = || record.living_snapshots().filter(|s| s.disk == volume);
        of_this().find(|s| s.name == *name).cloned().ok_or_else(|| SnapshotError::Unknown {
            what: format!("snapshot \"{name}\""),
            of: self.to_string(),
            there: names(of_this().map(|s| s.name.as_str())),
        })
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.disk {
            Some(disk) => write!(f, "the disk {disk} of {}", self.vm),
            None => write!(f, "{}", self.vm),
        }
    }
}

fn refused(doing: String, scope: &Scope, why: impl ToString) -> SnapshotError {
    SnapshotError::Refused { doing, vm: scope.vm.clone(), why: why.to_string() }
}

/// Refuses a VM that an interrupted operation left half way, and one whose disks knibfs must not touch.
fn check_usable(store: &Store, record: &VmRecord, doing: &str, scope: &Scope) -> Result<(), SnapshotError> {
    if store.interrupted(&record.name)? {
        let why = "an operation on it was interrupted: run `knibfs recover` first";
        return Err(refused(doing.to_owned(), scope, why));
    }
    if let Source::Disks { track: Track::Scan } = record.source {
        let why = "its disk files are tracked by scan, which leaves everything on primary as it is: \
                   snapshots are for libvirt domains and for disk files added with --track overlay";
        return Err(refused(doing.to_owned(), scope, why));
    }
    Ok(())
}

/// Merges and deletes what nothing needs any more, and ends the operation.
fn tidy(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
    control: &OpControl<'_>,
) -> Result<(), SnapshotError> {
    let Some(op) = op_of(&journal) else { return Ok(()) };
    let volumes: Vec<VolumeId> = op.snapshot.volumes.iter().map(|f| f.volume).collect();
    let mut tidy =
        Tidy { store, record, hypervisor, journal: &mut journal, intact: op.intact, control: *control };
    for kept in tidy.run(&volumes)? {
        control.warn(kept);
    }
    crate::failpoint::hit("snapshot-tidied");
    journal.finish()?;
    Ok(())
}

fn op_of(journal: &Journal) -> Option<SnapshotOp> {
    match &journal.entry().operation {
        Operation::Snapshot(op) => Some((**op).clone()),
        _ => None,
    }
}

/// Finishes or undoes what was interrupted; what was done, in words. The caller holds the VM's lock.
pub(super) fn recover(
    store: &Store,
    journal: Journal,
    control: &OpControl<'_>,
) -> Result<String, SnapshotError> {
    let vm = journal.entry().vm.clone();
    let Some(op) = op_of(&journal) else { return Ok(String::new()) };
    let mut record = store.vm(&vm)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let name = op.snapshot.name.clone();
    let done = match op.action {
        SnapshotAction::Create => create::recover(store, &mut record, &*hypervisor, journal, control)?,
        SnapshotAction::Revert => revert::recover(store, &mut record, &*hypervisor, journal, control)?,
        SnapshotAction::Remove => {
            remove::finish(store, &mut record, &*hypervisor, journal, control)?;
            true
        }
    };
    let how = if done { "finished" } else { "undone" };
    let what = match op.action {
        SnapshotAction::Create => "taking",
        SnapshotAction::Revert => "going back to",
        SnapshotAction::Remove => "removing",
    };
    Ok(format!("{what} the snapshot {name} of {vm} was {how}"))
}
