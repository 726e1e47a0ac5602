//! What is known before a removal, and what the rules make of it.

use std::collections::BTreeMap;
use std::fs;

use super::RemoveError;
use crate::chain::{Node, Refusal, Removal, remove_all};
use crate::store::journal_removal::{Doomed, Named, RemoveOp, RemoveStep};
use crate::store::{BackupId, BackupName, BackupSpec, Backups, Store, StoreResult, VmName, VmRecord};

/// A removal that is allowed.
pub(super) struct Decided {
    pub op: RemoveOp,
    /// The current backup, where it is removed: deltas are to be merged.
    pub merges_for: Option<BackupName>,
}

/// A VM's backups as the rules see them, those with damaged manifests too.
pub(in crate::ops) struct Known {
    pub nodes: Vec<Node>,
    pub names: BTreeMap<BackupId, BackupName>,
    /// A damaged backup of which nobody knows what it stands on.
    pub in_doubt: Option<BackupName>,
}

/// Decides on backups of one VM; none stands for `latest`. The caller holds the VM's lock.
pub(super) fn decide(
    store: &Store,
    record: &VmRecord,
    targets: &[Option<&BackupName>],
    forced: bool,
) -> Result<Decided, RemoveError> {
    let vm = &record.name;
    let found = store.backups(vm)?;
    let known = Known::new(store, record, &found);
    let mut wanted = Vec::new();
    for target in targets {
        let id = find(store, vm, &found, &known, *target)?;
        let name = known.names.get(&id);
        if let Some((name, error)) = found.damaged.iter().find(|(n, _)| Some(n) == name).filter(|_| !forced) {
            return Err(RemoveError::Damaged { backup: format!("{vm}/{name}"), why: error.to_string() });
        }
        if !wanted.contains(&id) {
            wanted.push(id);
        }
    }
    let mut users: BTreeMap<BackupId, String> = BTreeMap::new();
    for node in &known.nodes {
        if let Some(user) = user(store, node.id)? {
            users.insert(node.id, user);
        }
    }
    let current = record.tracking.current.as_ref().map(|c| c.id);
    let steps = remove_all(&known.nodes, current, &wanted, &|id| users.get(&id).cloned());
    let mut decided = Decided {
        op: RemoveOp {
            step: RemoveStep::Planned,
            forced,
            delete: Vec::new(),
            hide: Vec::new(),
            ends: Vec::new(),
            deltas: None,
        },
        merges_for: None,
    };
    for (target, step) in steps {
        let backup = || match known.names.get(&target) {
            Some(name) => format!("{vm}/{name}"),
            None => format!("{vm}/{target}"),
        };
        match step.map_err(|why| RemoveError::Refused { backup: backup(), why })? {
            Removal::Hide => decided.op.hide.extend(known.named(target)),
            Removal::Delete { merge_deltas, delete, ends_chain } => {
                if let Some(damaged) = known.in_doubt.as_ref().filter(|_| !forced) {
                    let damaged = format!("{vm}/{damaged}");
                    return Err(RemoveError::InDoubt { backup: backup(), damaged });
                }
                for id in delete {
                    let asked = wanted.contains(&id);
                    decided.op.delete.extend(known.named(id).map(|backup| Doomed { backup, asked }));
                }
                decided.op.ends.extend(ends_chain.and_then(|id| known.named(id)));
                if merge_deltas {
                    decided.merges_for = known.names.get(&target).cloned();
                }
            }
        }
    }
    // In a batch what one step hides, or leaves as the end of a chain, a later one may delete.
    let gone: Vec<BackupId> = decided.op.delete.iter().map(|d| d.backup.id).collect();
    decided.op.hide.retain(|n| !gone.contains(&n.id));
    decided.op.ends.retain(|n| !gone.contains(&n.id));
    let readable = |id| known.nodes.iter().any(|n| n.id == id && n.readable);
    decided.op.ends.retain(|n| readable(n.id));
    Ok(decided)
}

fn find(
    store: &Store,
    vm: &VmName,
    found: &Backups,
    known: &Known,
    target: Option<&BackupName>,
) -> Result<BackupId, RemoveError> {
    let id = match target {
        None => found.manifests.iter().rev().find(|m| m.is_listed()).map(|m| m.id),
        Some(name) => known.names.iter().find(|(_, n)| *n == name).map(|(id, _)| *id),
    };
    let spec = BackupSpec { vm: vm.clone(), backup: target.cloned() };
    id.ok_or_else(|| {
        let missing = store.resolve(&spec).err();
        missing.map_or_else(
            || RemoveError::Refused { backup: spec.to_string(), why: Refusal::Unknown },
            RemoveError::from,
        )
    })
}

/// Who uses a backup.
pub(in crate::ops) fn user(store: &Store, id: BackupId) -> StoreResult<Option<String>> {
    let leases = store.leases(id)?;
    let users: Vec<String> = leases
        .iter()
        .map(|l| format!("{} (process {} on host {}, since {:.0})", l.purpose, l.pid, l.host, l.since))
        .collect();
    Ok((!users.is_empty()).then(|| users.join(", ")))
}

impl Known {
    /// Looks at all backups that were found.
    pub fn new(store: &Store, record: &VmRecord, found: &Backups) -> Self {
        let vm = &record.name;
        let mut nodes: Vec<Node> = found.manifests.iter().map(Node::from).collect();
        let mut names: BTreeMap<BackupId, BackupName> =
            found.manifests.iter().map(|m| (m.id, m.name.clone())).collect();
        let mut in_doubt = None;
        for (name, _) in &found.damaged {
            // Its identity is told by what refers to it.
            let children =
                || found.manifests.iter().filter(|m| m.parent.as_ref().is_some_and(|p| p.name == *name));
            let by_child = children().find_map(|m| m.parent.as_ref()).map(|p| p.id);
            let current = record.tracking.current.as_ref().filter(|c| c.name == *name).map(|c| c.id);
            let id =
                by_child.or(current).filter(|id| !names.contains_key(id)).unwrap_or_else(BackupId::random);
            let sequence = children().map(|m| m.sequence.saturating_sub(1)).min().unwrap_or(u64::MAX);
            names.insert(id, name.clone());
            nodes.push(Node {
                id,
                parent: None,
                sequence,
                removed: false,
                end_of_chain: false,
                readable: false,
            });
        }
        let by_name = |wanted: &str| names.iter().find(|(_, n)| n.as_str() == wanted).map(|(id, _)| *id);
        for node in nodes.iter_mut().filter(|n| !n.readable) {
            let Some(name) = names.get(&node.id) else { continue };
            match backing_names(store, vm, name) {
                Some(parents) => node.parent = parents.first().and_then(|p| by_name(p)),
                None => in_doubt = Some(name.clone()),
            }
        }
        Self { nodes, names, in_doubt }
    }

    /// Both of a backup's names.
    pub fn named(&self, id: BackupId) -> Option<Named> {
        self.names.get(&id).map(|name| Named { id, name: name.clone() })
    }
}

/// The backups that a backup's images name as what they stand on; none where it cannot be told.
fn backing_names(store: &Store, vm: &VmName, name: &BackupName) -> Option<Vec<String>> {
    let mut parents = Vec::new();
    let mut images = 0;
    for entry in fs::read_dir(store.backup_dir(vm, name)).ok()? {
        let path = entry.ok()?.path();
        if path.extension().is_none_or(|e| e != "qcow2") {
            continue;
        }
        images += 1;
        let file = knib_qcow::FileStorage::open(&path, knib_qcow::Access::Read).ok()?;
        let header = knib_qcow::Header::parse(&*file).ok()?;
        if let Some(backing) = header.backing {
            // `../<backup>/<disk>.qcow2`
            parents.push(backing.split('/').nth(1)?.to_owned());
        }
    }
    (images > 0).then_some(parents)
}
