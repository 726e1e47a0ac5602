//! The journal: what an operation is about to do, written down before it is done, so that `recover` can finish or undo it.
//!
//! Every entry lies twice: in the store, and on the host that works (a store may vanish in the middle of a backup).

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::journal_removal::{AbsorbOp, ReleaseOp, RemoveOp};
use super::lease::COMPRESSION;
use super::lock::hostname;
use super::manifest::{Kind, PrimaryImage};
use super::restore_op::{RestoreOp, RestoreStep};
use super::snapshot::SnapshotOp;
use super::vm::{Tracking, VmState};
use super::{
    BackupId, BackupName, DiskName, OpId, Record, Store, StoreError, StoreResult, VmName, VmRecord, VolumeId,
};
use super::{atomic, record};

/// Folder for what a host keeps about stores, instead of `/var/lib/knibfs`.
pub const STATE_DIR_ENV: &str = "KNIBFS_STATE_DIR";

/// One operation that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its identity.
    pub id: OpId,
    /// Counts the writes: of two copies the higher is the later.
    pub revision: u64,
    /// The VM.
    pub vm: VmName,
    /// When it began.
    pub started: Timestamp,
    /// The host that works.
    pub host: String,
    /// The process that works.
    pub pid: u32,
    /// What is done and how far it is.
    pub operation: Operation,
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Operation {
    /// Taking a backup.
    Backup(BackupOp),
    /// Compressing a stored backup.
    Compress(CompressOp),
    /// Removing backups of a VM.
    Remove(RemoveOp),
    /// Ending a VM's chain: its deltas are merged.
    Release(ReleaseOp),
    /// Merging removed backups into the one that stands on them.
    Absorb(AbsorbOp),
    /// Restoring volumes.
    Restore(Box<RestoreOp>),
    /// Taking, reverting to or removing a snapshot.
    Snapshot(Box<SnapshotOp>),
}

impl Operation {
    /// The VM's state meanwhile; none where it can do all else.
    fn state(&self) -> Option<VmState> {
        match self {
            Operation::Backup(_) => Some(VmState::BackingUp),
            Operation::Restore(op) => {
                let overwritten = op.disks.iter().any(|d| d.in_place && d.outcome != Outcome::Pending);
                let whole = op.step > RestoreStep::Write || !overwritten;
                Some(if whole { VmState::Restoring } else { VmState::RestoreError })
            }
            Operation::Compress(_)
            | Operation::Remove(_)
            | Operation::Release(_)
            | Operation::Absorb(_)
            | Operation::Snapshot(_) => None,
        }
    }
}

/// A backup under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOp {
    /// The backup.
    pub backup: BackupId,
    /// Its name, once published.
    #[serde(default)]
    pub name: Option<BackupName>,
    /// Isolated backups leave no delta.
    pub isolated: bool,
    /// The last of its chain leaves no delta.
    pub end_of_chain: bool,
    /// The last step that was begun.
    pub step: BackupStep,
    /// Per disk what was done.
    pub disks: Vec<DiskOp>,
    /// The tracking state that `vm.json` gets when all is done, once known.
    #[serde(default)]
    pub tracking: Option<Tracking>,
}

/// Steps of a backup, in order. Each is written before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupStep {
    /// Nothing on primary has changed.
    Planned,
    /// Overlays may or may not be there.
    Snapshot,
    /// Overlays are there; the store has nothing whole.
    Copy,
    /// The staging folder is whole, or already renamed.
    Publish,
    /// Deltas are merged one after the other.
    Merge,
    /// `vm.json` is written.
    Record,
}

/// One disk of a backup under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOp {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: DiskName,
    /// Device in the guest; none for plain disk files.
    #[serde(default)]
    pub target: Option<String>,
    /// Full or incremental.
    pub kind: Kind,
    /// The images that are frozen and copied, top first, as they were before the snapshot.
    pub frozen: Vec<PrimaryImage>,
    /// The overlay that the snapshot makes; none for `scan`.
    #[serde(default)]
    pub overlay: Option<PathBuf>,
    /// How the copy went.
    #[serde(default)]
    pub copy: Outcome,
    /// The merges to do, in order.
    #[serde(default)]
    pub merges: Vec<Merge>,
}

/// Merging one image into the one below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// What is merged, and deleted when nothing names it any more.
    pub top: PathBuf,
    /// What it is merged into.
    pub base: PathBuf,
    /// How it went.
    #[serde(default)]
    pub outcome: Outcome,
}

/// How a part of an operation went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Outcome {
    /// Not begun.
    #[default]
    Pending,
    /// Begun; it may or may not have happened.
    Begun,
    /// Done.
    Done,
    /// Left out on purpose.
    Kept {
        /// Why.
        reason: String,
    },
    /// It failed.
    Failed {
        /// Why.
        error: String,
    },
}

/// A compression under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressOp {
    /// The backup.
    pub backup: BackupId,
    /// Its name.
    pub name: BackupName,
    /// Files that are swapped: written beside, renamed over.
    pub swaps: Vec<Swap>,
}

/// A file that is to take another's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// The disk.
    pub disk: DiskName,
    /// How it went.
    #[serde(default)]
    pub outcome: Outcome,
}

impl Record for Entry {
    const FORMAT: u64 = 1;
}

/// An operation under way with both of its files.
#[derive(Debug)]
pub struct Journal {
    entry: Entry,
    local: PathBuf,
    shared: PathBuf,
    /// The operation frees room: a store without any must not stop it.
    goes_on_when_full: bool,
}

impl Store {
    /// Begins an operation: returns once it is written down in both places. The caller holds the VM's lock.
    pub fn begin(&self, vm: &VmName, operation: Operation) -> StoreResult<Journal> {
        self.begin_as(vm, operation, false)
    }

    /// As `begin`, for what frees room: where the store is full, the copy on this host has to do.
    pub fn begin_freeing(&self, vm: &VmName, operation: Operation) -> StoreResult<Journal> {
        self.begin_as(vm, operation, true)
    }

    fn begin_as(&self, vm: &VmName, operation: Operation, freeing: bool) -> StoreResult<Journal> {
        let entry = Entry {
            id: OpId::random(),
            revision: 0,
            vm: vm.clone(),
            started: Timestamp::now(),
            host: hostname(),
            pid: std::process::id(),
            operation,
        };
        let local = self.local_journal_dir();
        fs::create_dir_all(&local).map_err(StoreError::io("create the folder", &local))?;
        let mut journal = Journal { goes_on_when_full: freeing, ..Journal::of(self, entry) };
        if let Err(error) = journal.write() {
            // Nothing was begun, so nothing may be found unfinished.
            let _ = atomic::remove(&journal.shared).and_then(|()| remove_local(&journal.local));
            return Err(error);
        }
        Ok(journal)
    }

    /// Every operation that was begun and not finished, the oldest first; of two copies the later.
    ///
    /// A damaged copy is only an error when the other one cannot stand in for it.
    pub fn unfinished(&self) -> StoreResult<Vec<Journal>> {
        let mut found: Vec<Entry> = Vec::new();
        let mut failed: Vec<(OpId, StoreError)> = Vec::new();
        for dir in [self.local_journal_dir(), self.journal_dir()] {
            for (id, entry) in entries(&dir)? {
                let done = done_elsewhere(&self.journal_dir(), id);
                if done.exists() {
                    // Another host brought it to its end: what this one remembers must not be done again.
                    remove_local(&self.local_journal_dir().join(format!("{id}.json")))?;
                    if !self.journal_dir().join(format!("{id}.json")).exists() {
                        atomic::remove(&done)?;
                    }
                    continue;
                }
                match (entry, found.iter_mut().find(|e| e.id == id)) {
                    (Ok(entry), None) => found.push(entry),
                    (Ok(entry), Some(known)) if entry.revision > known.revision => *known = entry,
                    (Ok(_), Some(_)) => {}
                    (Err(error), _) => failed.push((id, error)),
                }
            }
        }
        if let Some((_, error)) = failed.into_iter().find(|(id, _)| !found.iter().any(|e| e.id == *id)) {
            return Err(error);
        }
        found.sort_by_key(|e| e.started);
        Ok(found.into_iter().map(|entry| Journal::of(self, entry)).collect())
    }

    /// Whether an operation on the VM was begun and nobody works on it any more. The caller holds the VM's lock, without
    /// which only compressions are under way: those are known to live by their lease.
    pub fn interrupted(&self, vm: &VmName) -> StoreResult<bool> {
        for journal in self.unfinished()?.iter().filter(|j| j.entry.vm == *vm) {
            if !self.is_compressing(&journal.entry)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether it is a compression that goes on.
    pub fn is_compressing(&self, entry: &Entry) -> StoreResult<bool> {
        let Operation::Compress(op) = &entry.operation else { return Ok(false) };
        Ok(self.leases(op.backup)?.iter().any(|lease| lease.purpose == COMPRESSION))
    }

    /// What an operation under way makes of the VM's state, else what its record says; and whether nobody works on it.
    pub fn state_of(&self, vm: &VmRecord) -> StoreResult<(VmState, bool)> {
        let busy = self.unfinished()?.into_iter().filter(|j| j.entry.vm == vm.name);
        let state = busy.filter_map(|j| j.entry.operation.state()).next();
        Ok(match state {
            Some(state) => (state, !self.is_locked(&vm.name)),
            None => (vm.state, false),
        })
    }

    /// `/var/lib/knibfs/<store id>/journal` on this host.
    pub fn local_journal_dir(&self) -> PathBuf {
        self.state_dir().join("journal")
    }
}

/// Where this host keeps what it knows about stores.
pub fn state_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os(STATE_DIR_ENV).filter(|d| !d.is_empty()) {
        return PathBuf::from(dir);
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/knibfs");
    }
    match (std::env::var_os("XDG_STATE_HOME"), std::env::var_os("HOME")) {
        (Some(state), _) if !state.is_empty() => PathBuf::from(state).join("knibfs"),
        (_, Some(home)) => PathBuf::from(home).join(".local/state/knibfs"),
        _ => PathBuf::from("/var/lib/knibfs"),
    }
}

impl Journal {
    fn of(store: &Store, entry: Entry) -> Self {
        let file = format!("{}.json", entry.id);
        let (local, shared) = (store.local_journal_dir().join(&file), store.journal_dir().join(&file));
        let goes_on_when_full = matches!(entry.operation, Operation::Remove(_));
        Self { local, shared, entry, goes_on_when_full }
    }

    /// What is written down.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Changes what is written down; returns once it lasts.
    pub fn update(&mut self, change: impl FnOnce(&mut Operation)) -> StoreResult<()> {
        change(&mut self.entry.operation);
        self.write()
    }

    /// As `update` for a backup; does nothing to other operations.
    pub fn update_backup(&mut self, change: impl FnOnce(&mut BackupOp)) -> StoreResult<()> {
        self.update(|operation| {
            if let Operation::Backup(backup) = operation {
                change(backup);
            }
        })
    }

    /// As `update` for a restore; does nothing to other operations.
    pub fn update_restore(&mut self, change: impl FnOnce(&mut RestoreOp)) -> StoreResult<()> {
        self.update(|operation| {
            if let Operation::Restore(restore) = operation {
                change(restore);
            }
        })
    }

    /// As `update` for a snapshot; does nothing to other operations.
    pub fn update_snapshot(&mut self, change: impl FnOnce(&mut SnapshotOp)) -> StoreResult<()> {
        self.update(|operation| {
            if let Operation::Snapshot(snapshot) = operation {
                change(snapshot);
            }
        })
    }

    /// The local copy first: the store may be what fails.
    fn write(&mut self) -> StoreResult<()> {
        self.entry.revision = self.entry.revision.saturating_add(1);
        record::write(&self.local, &self.entry)?;
        match record::write(&self.shared, &self.entry) {
            Err(error) if self.goes_on_when_full && error.is_full() => {
                tracing::debug!("the journal goes on in {} only: {error}", self.local.display());
                Ok(())
            }
            written => written,
        }
    }

    /// The operation is finished or undone: nothing is left to recover.
    pub fn finish(self) -> StoreResult<()> {
        // The other order would let a crash in between bring a finished operation back from the store alone,
        // on any host; a left local copy is only ever seen here.
        if !self.local.exists()
            && let Some(dir) = self.shared.parent()
        {
            atomic::write(&done_elsewhere(dir, self.entry.id), b"", 0o644)?;
        }
        let shared = atomic::remove(&self.shared);
        // A store that refuses to be written has no copy to delete.
        if shared.is_err() && self.shared.exists() {
            return shared;
        }
        remove_local(&self.local)
    }
}

/// Says, in the store, to the host that began an operation that another one has ended it.
fn done_elsewhere(dir: &Path, id: OpId) -> PathBuf {
    dir.join(format!("{id}.done"))
}

fn remove_local(path: &Path) -> StoreResult<()> {
    // `recover` on another host has no local copy, perhaps not even the folder.
    if path.exists() { atomic::remove(path) } else { Ok(()) }
}

fn entries(dir: &Path) -> StoreResult<Vec<(OpId, StoreResult<Entry>)>> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io("read the folder", dir)(e)),
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(StoreError::io("read the folder", dir))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|n| n.strip_suffix(".json")).and_then(|id| id.parse::<OpId>().ok());
        if let Some(id) = id {
            found.push((id, record::read(&entry.path())));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::store_with_vm;
    use super::*;

    fn backup_op() -> Operation {
        Operation::Backup(BackupOp {
            backup: BackupId::random(),
            name: None,
            isolated: false,
            end_of_chain: false,
            step: BackupStep::Planned,
            disks: vec![],
            tracking: None,
        })
    }

    fn step(journal: &Journal) -> BackupStep {
        match &journal.entry().operation {
            Operation::Backup(op) => op.step,
            _ => panic!("it was a backup"),
        }
    }

    #[test]
    fn what_was_begun_is_found_until_it_is_finished() {
        let (_dir, store, vm) = store_with_vm();
        let mut journal = store.begin(&vm, backup_op()).unwrap();
        journal.update_backup(|op| op.step = BackupStep::Copy).unwrap();
        let found = store.unfinished().unwrap();
        assert_eq!((found.len(), step(&found[0])), (1, BackupStep::Copy));
        journal.finish().unwrap();
        assert!(store.unfinished().unwrap().is_empty());
    }

    #[test]
    fn either_copy_will_do_and_the_later_one_counts() {
        let (_dir, store, vm) = store_with_vm();
        let mut journal = store.begin(&vm, backup_op()).unwrap();
        let old = fs::read(&journal.shared).unwrap();
        journal.update_backup(|op| op.step = BackupStep::Merge).unwrap();
        // The store vanished before the last write.
        fs::write(&journal.shared, &old).unwrap();
        assert_eq!(step(&store.unfinished().unwrap()[0]), BackupStep::Merge);
        fs::remove_file(&journal.shared).unwrap();
        assert_eq!(step(&store.unfinished().unwrap()[0]), BackupStep::Merge);
        // A damaged copy is no harm while the other one is whole.
        fs::write(&journal.shared, b"{").unwrap();
        assert_eq!(step(&store.unfinished().unwrap()[0]), BackupStep::Merge);
        fs::remove_file(&journal.local).unwrap();
        assert!(
            store.unfinished().is_err(),
            "the only copy is damaged: nobody may think that nothing was going on"
        );
        // Another host has only what lies in the store.
        fs::write(&journal.shared, &old).unwrap();
        let elsewhere = store.clone().with_state_dir("/nonexistent".into());
        let found = elsewhere.unfinished().unwrap().remove(0);
        assert_eq!(step(&found), BackupStep::Planned);
        found.finish().unwrap();
    }

    #[test]
    fn what_another_host_has_ended_is_not_done_again_by_the_one_that_began_it() {
        let (dir, store, vm) = store_with_vm();
        store.begin(&vm, backup_op()).unwrap();
        let elsewhere = store.clone().with_state_dir(dir.path().join("elsewhere"));
        elsewhere.unfinished().unwrap().remove(0).finish().unwrap();
        assert!(store.unfinished().unwrap().is_empty());
        for left in [store.journal_dir(), store.local_journal_dir()] {
            assert_eq!(fs::read_dir(&left).unwrap().count(), 0, "{}", left.display());
        }
    }
}
