//! `prune`: retention. What no rule keeps is removed, and what is left of it under others is merged into them.

mod absorb;
mod source;

pub(super) use absorb::recover;

use super::control::OpControl;
use super::remove::decide::{Known, user};
use super::remove::{self, RemoveError};
use crate::chain::absorb::{Absorb, absorbs};
use crate::chain::retention::{Keep, Reason, kept};
use crate::chain::{Node, Removal, remove_all};
use crate::store::manifest::{BackupState, Manifest};
use crate::store::{BackupId, BackupName, Backups, Store, StoreError, VmName, VmRecord};

/// Why a VM was not pruned, or not to the end: what was done is whole.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A backup could not be removed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// A stored image cannot be read.
    #[error("cannot merge into {backup}: {why}")]
    Read {
        /// The backup.
        backup: String,
        /// What is damaged.
        why: knib_fuse::FsError,
    },
    /// The new image cannot be written.
    #[error("cannot merge into {backup}: {source}")]
    Write {
        /// The backup.
        backup: String,
        /// Why not.
        source: knib_qcow::Error,
    },
    /// What was written is not what was read: a fault of the program or of the machine.
    #[error(
        "what was merged into {backup} differs at cluster {cluster}: it was thrown away; check the machine's memory and the store's disks"
    )]
    Differs {
        /// The backup.
        backup: String,
        /// Guest cluster.
        cluster: u64,
    },
}

impl From<PruneError> for super::backup::BackupError {
    fn from(error: PruneError) -> Self {
        match error {
            PruneError::Store(error) => Self::Store(error),
            PruneError::Remove(error) => error.into(),
            other => Self::Store(StoreError::Invalid(other.to_string())),
        }
    }
}

/// A backup that is kept.
#[derive(Debug, Clone, serde::Serialize)]
pub struct KeptBackup {
    /// Its name.
    pub backup: BackupName,
    /// Why.
    pub why: Vec<Reason>,
}

/// Removed backups that become part of the one that stands on them.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Merged {
    /// The one that stays.
    pub into: BackupName,
    /// Those that go, the nearest first.
    pub from: Vec<BackupName>,
}

/// What was done, or with `dry_run` would be.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Pruned {
    /// The VM.
    pub vm: VmName,
    /// What stays.
    pub kept: Vec<KeptBackup>,
    /// What is removed.
    pub removed: Vec<BackupName>,
    /// What is merged.
    pub merged: Vec<Merged>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Nothing was done.
    pub dry_run: bool,
}

/// Removes the backups of a VM that no rule keeps, and merges removed ones into those that stand on them.
///
/// # Errors
/// [`PruneError`]; every removal and merge before it is whole.
pub fn run(
    store: &Store,
    vm: &VmName,
    keep: &Keep,
    dry_run: bool,
    control: &OpControl<'_>,
) -> Result<Pruned, PruneError> {
    store.vm(vm)?;
    let lock = store.lock_vm(vm, &format!("prune {vm}"))?;
    if store.interrupted(vm)? {
        return Err(RemoveError::Unfinished { vm: vm.clone() }.into());
    }
    let record = store.vm(vm)?;
    let found = store.backups(vm)?;
    let known = Known::new(store, &record, &found);
    let used = used(store, &known)?;
    let current = record.tracking.current.as_ref().map(|c| c.id);
    let keeps = kept(&found.manifests, current, keep, &|id| used.contains(&id));
    let doomed: Vec<&Manifest> =
        found.manifests.iter().filter(|m| m.is_listed() && !keeps.contains_key(&m.id)).collect();
    let ids: Vec<BackupId> = doomed.iter().map(|m| m.id).collect();
    let mut done = Pruned {
        vm: vm.clone(),
        kept: found
            .manifests
            .iter()
            .filter_map(|m| {
                let why = keeps.get(&m.id)?.iter().copied().collect();
                Some(KeptBackup { backup: m.name.clone(), why })
            })
            .collect(),
        removed: doomed.iter().map(|m| m.name.clone()).collect(),
        merged: Vec::new(),
        notes: found
            .damaged
            .iter()
            .map(|(name, error)| format!("{vm}/{name} is left alone: {error}"))
            .collect(),
        dry_run,
    };
    if !dry_run && !doomed.is_empty() {
        let names: Vec<&BackupName> = doomed.iter().map(|m| &m.name).collect();
        let removed = remove::locked(store, vm, &names, &lock, control)?;
        done.notes.extend(removed.notes);
    }
    let after = match dry_run {
        true => Known { nodes: without(&known.nodes, current, &ids), ..known },
        false => look(store, &record, &store.backups(vm)?),
    };
    if store.is_write_once() {
        if !absorbs(&after.nodes).is_empty() {
            done.notes.push(
                "what was removed stays under those that stand on it: files of this store are written once"
                    .into(),
            );
        }
        return Ok(done);
    }
    for step in absorbs(&after.nodes) {
        let Some(merged) = merged(&after, &step) else { continue };
        if let Some(user) = busy(store, &after.nodes, &step)? {
            done.notes.push(format!(
                "{} is not merged into {vm}/{} now: {user}",
                list(&merged.from),
                merged.into
            ));
            continue;
        }
        let absorbed = match dry_run {
            true => Ok(true),
            false => absorb::run(store, vm, &after, &step, &lock, control),
        };
        if absorbed.inspect_err(|_| show_again(store, vm, &ids, control))? {
            done.merged.push(merged);
        } else {
            done.notes.push(format!("{vm}/{} came into use, nothing was merged into it", merged.into));
        }
    }
    Ok(done)
}

/// After a merge that failed: what was hidden for it and is still there is listed again. It holds good data, and a
/// person who looks at a list without it would think that it is lost.
fn show_again(store: &Store, vm: &VmName, hidden: &[BackupId], control: &OpControl<'_>) {
    let shown = store.backups(vm).and_then(|found| {
        let mut hidden: Vec<Manifest> = found
            .manifests
            .into_iter()
            .filter(|m| hidden.contains(&m.id) && m.state == BackupState::Removed)
            .collect();
        for manifest in &mut hidden {
            manifest.state = BackupState::BackedUp;
            store.save_manifest(manifest)?;
        }
        Ok(hidden)
    });
    match shown {
        Ok(shown) if !shown.is_empty() => {
            let names: Vec<BackupName> = shown.into_iter().map(|m| m.name).collect();
            control.warn(format!("{vm}: {} stays, as it could not be merged", list(&names)));
        }
        Ok(_) => {}
        Err(error) => control.warn(format!("what prune had hidden of {vm} stays hidden: {error}")),
    }
}

fn look(store: &Store, record: &VmRecord, found: &Backups) -> Known {
    Known::new(store, record, found)
}

fn used(store: &Store, known: &Known) -> Result<Vec<BackupId>, StoreError> {
    let mut used = Vec::new();
    for node in &known.nodes {
        if user(store, node.id)?.is_some() {
            used.push(node.id);
        }
    }
    Ok(used)
}

/// The backups as a removal would leave them.
fn without(nodes: &[Node], current: Option<BackupId>, targets: &[BackupId]) -> Vec<Node> {
    let mut left = nodes.to_vec();
    for (target, removal) in remove_all(nodes, current, targets, &|_| None) {
        match removal {
            Ok(Removal::Hide) => left.iter_mut().filter(|n| n.id == target).for_each(|n| n.removed = true),
            Ok(Removal::Delete { delete, .. }) => left.retain(|n| !delete.contains(&n.id)),
            Err(_) => {}
        }
    }
    left
}

fn merged(known: &Known, step: &Absorb) -> Option<Merged> {
    let name = |id: &BackupId| known.names.get(id).cloned();
    Some(Merged { into: name(&step.into)?, from: step.from.iter().filter_map(name).collect() })
}

fn list(names: &[BackupName]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Who uses what a merge would change: the backup, what goes, and all that stand on it, which read through both.
fn busy(store: &Store, nodes: &[Node], step: &Absorb) -> Result<Option<String>, StoreError> {
    let mut all = step.from.clone();
    all.push(step.into);
    let mut at = step.from.len();
    while let Some(id) = all.get(at).copied() {
        let above = nodes.iter().filter(|n| n.parent == Some(id)).map(|n| n.id);
        let new: Vec<BackupId> = above.filter(|id| !all.contains(id)).collect();
        all.extend(new);
        at += 1;
    }
    for id in all {
        if let Some(user) = user(store, id)? {
            return Ok(Some(user));
        }
    }
    Ok(None)
}
