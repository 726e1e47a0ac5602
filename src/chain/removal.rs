//! Removing backups: what is hidden, what is deleted, and which chain ends.

use crate::store::BackupId;
use crate::store::manifest::{BackupState, Manifest};

/// What removal looks at of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The backup.
    pub id: BackupId,
    /// What it stands on.
    pub parent: Option<BackupId>,
    /// Its order.
    pub sequence: u64,
    /// It is hidden, kept for what stands on it.
    pub removed: bool,
    /// Nothing may stand on it.
    pub end_of_chain: bool,
    /// Its manifest can be read, so that its state can be changed.
    pub readable: bool,
}

impl From<&Manifest> for Node {
    fn from(m: &Manifest) -> Self {
        Self {
            id: m.id,
            parent: m.parent.as_ref().map(|p| p.id),
            sequence: m.sequence,
            removed: m.state == BackupState::Removed,
            end_of_chain: m.end_of_chain,
            readable: true,
        }
    }
}

/// What removing one backup does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// Row "it has a living child": state `Removed`, hidden, files kept.
    Hide,
    /// Rows "it is current" and "leaf".
    Delete {
        /// Its deltas on primary are merged into the volumes first.
        merge_deltas: bool,
        /// Backups whose files are deleted, each before what it stands on.
        delete: Vec<BackupId>,
        /// The first living ancestor: it ends its chain.
        ends_chain: Option<BackupId>,
    },
}

/// Why a backup is not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such backup.
    #[error("there is no such backup")]
    Unknown,
    /// It is hidden already.
    #[error("it is removed already: it is kept only for the backups that stand on it")]
    AlreadyRemoved,
    /// Row "it has a living child", but its manifest is damaged: it cannot be marked.
    #[error("its manifest is damaged, and other backups stand on it: remove those first, or with it")]
    StoodOn,
    /// Row "in use": refused, naming the user of it.
    #[error("it, or a removed backup that would be deleted with it, is in use: {user}")]
    InUse {
        /// Who.
        user: String,
    },
}

/// Decides what removing `target` does. `in_use` names who uses a backup.
pub fn removal(
    nodes: &[Node],
    current: Option<BackupId>,
    target: BackupId,
    in_use: &dyn Fn(BackupId) -> Option<String>,
) -> Result<Removal, Refusal> {
    let find = |id: BackupId| nodes.iter().find(|n| n.id == id);
    let node = find(target).ok_or(Refusal::Unknown)?;
    if node.removed {
        return Err(Refusal::AlreadyRemoved);
    }
    if let Some(user) = in_use(target) {
        return Err(Refusal::InUse { user });
    }
    // A hidden child is only there because something living stands on it.
    if nodes.iter().any(|n| n.parent == Some(target)) {
        return if node.readable { Ok(Removal::Hide) } else { Err(Refusal::StoodOn) };
    }
    let mut delete = vec![target];
    let mut above = node.parent.and_then(find);
    while let Some(ancestor) = above {
        let stood_on = nodes.iter().any(|n| n.parent == Some(ancestor.id) && !delete.contains(&n.id));
        if !ancestor.removed || stood_on || delete.contains(&ancestor.id) {
            break;
        }
        if let Some(user) = in_use(ancestor.id) {
            return Err(Refusal::InUse { user });
        }
        delete.push(ancestor.id);
        above = ancestor.parent.and_then(find);
    }
    let living = above.filter(|a| !a.removed && !delete.contains(&a.id)).map(|a| a.id);
    Ok(Removal::Delete { merge_deltas: current == Some(target), delete, ends_chain: living })
}

/// Row "batch": any set in one call, in any order. The newest goes first, so that nothing is hidden only to be deleted.
///
/// Returns the steps in the order in which they are to be done, each decided on what the ones before leave.
pub fn remove_all(
    nodes: &[Node],
    current: Option<BackupId>,
    targets: &[BackupId],
    in_use: &dyn Fn(BackupId) -> Option<String>,
) -> Vec<(BackupId, Result<Removal, Refusal>)> {
    let before = nodes;
    let mut nodes = nodes.to_vec();
    let mut current = current;
    let mut order: Vec<BackupId> = targets.to_vec();
    order.sort_by_key(|id| std::cmp::Reverse((nodes.iter().find(|n| n.id == *id).map(|n| n.sequence), *id)));
    order.dedup();
    let mut steps = Vec::new();
    for target in order {
        // Said of what it was before: a step before this one may have deleted it with what stood on it.
        let decision = match before.iter().find(|n| n.id == target) {
            Some(node) if node.removed => Err(Refusal::AlreadyRemoved),
            _ => removal(&nodes, current, target, in_use),
        };
        if let Ok(removal) = &decision {
            apply(&mut nodes, &mut current, target, removal);
        }
        steps.push((target, decision));
    }
    steps
}

fn apply(nodes: &mut Vec<Node>, current: &mut Option<BackupId>, target: BackupId, removal: &Removal) {
    match removal {
        Removal::Hide => nodes.iter_mut().filter(|n| n.id == target).for_each(|n| n.removed = true),
        Removal::Delete { merge_deltas, delete, ends_chain } => {
            nodes.retain(|n| !delete.contains(&n.id));
            nodes.iter_mut().filter(|n| Some(n.id) == *ends_chain).for_each(|n| n.end_of_chain = true);
            if *merge_deltas {
                *current = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Chains as the lengths say; the last backup of the last chain is current.
    fn chains(lengths: &[usize]) -> (Vec<Node>, Option<BackupId>) {
        let mut nodes: Vec<Node> = Vec::new();
        for length in lengths {
            for at in 0..*length {
                let parent = if at == 0 { None } else { nodes.last().map(|n| n.id) };
                let sequence = nodes.len() as u64 + 1;
                nodes.push(Node {
                    id: BackupId::random(),
                    parent,
                    sequence,
                    removed: false,
                    end_of_chain: false,
                    readable: true,
                });
            }
        }
        let current = nodes.last().map(|n| n.id);
        (nodes, current)
    }

    fn nobody(_: BackupId) -> Option<String> {
        None
    }

    #[test]
    fn a_backup_with_a_child_is_hidden_and_kept() {
        let (nodes, current) = chains(&[3]);
        assert_eq!(removal(&nodes, current, nodes[1].id, &nobody), Ok(Removal::Hide));
    }

    #[test]
    fn the_current_backup_has_its_deltas_merged_and_its_parent_ends_the_chain() {
        let (nodes, current) = chains(&[2]);
        let (parent, target) = (nodes[0].id, nodes[1].id);
        assert_eq!(
            removal(&nodes, current, target, &nobody),
            Ok(Removal::Delete { merge_deltas: true, delete: vec![target], ends_chain: Some(parent) })
        );
    }

    #[test]
    fn a_leaf_takes_the_removed_ancestors_with_it_up_to_the_first_living_one() {
        // Acceptance table B, row 7.
        let (mut nodes, _) = chains(&[4]);
        nodes[1].removed = true;
        nodes[2].removed = true;
        let ids: Vec<_> = nodes.iter().map(|n| n.id).collect();
        assert_eq!(
            removal(&nodes, None, ids[3], &nobody),
            Ok(Removal::Delete {
                merge_deltas: false,
                delete: vec![ids[3], ids[2], ids[1]],
                ends_chain: Some(ids[0])
            })
        );
    }

    #[test]
    fn what_is_in_use_is_not_removed_and_its_user_is_named() {
        let (mut nodes, current) = chains(&[2]);
        nodes[0].removed = true;
        let used = nodes[0].id;
        let by = move |id: BackupId| (id == used).then(|| "mounted at /mnt".to_owned());
        let refusal = removal(&nodes, current, nodes[1].id, &by).unwrap_err();
        assert!(refusal.to_string().contains("mounted at /mnt"));
        assert_eq!(removal(&nodes, current, used, &nobody), Err(Refusal::AlreadyRemoved));
        assert_eq!(removal(&nodes, current, BackupId::random(), &nobody), Err(Refusal::Unknown));
    }

    #[test]
    fn a_damaged_backup_is_deleted_but_never_hidden() {
        let (mut nodes, _) = chains(&[2]);
        nodes[0].readable = false;
        let (damaged, child) = (nodes[0].id, nodes[1].id);
        assert_eq!(removal(&nodes, None, damaged, &nobody), Err(Refusal::StoodOn));
        let steps = remove_all(&nodes, None, &[damaged, child], &nobody);
        let deleted = |id| Ok(Removal::Delete { merge_deltas: false, delete: vec![id], ends_chain: None });
        assert_eq!(steps[1], (damaged, deleted(damaged)));
        assert_eq!(steps[0].0, child);
    }

    fn check_invariants(nodes: &[Node]) -> Result<(), TestCaseError> {
        for node in nodes {
            if let Some(parent) = node.parent {
                prop_assert!(nodes.iter().any(|n| n.id == parent), "a backup stands on nothing");
            }
            let has_child = nodes.iter().any(|n| n.parent == Some(node.id));
            prop_assert!(!node.removed || has_child, "a removed backup is kept for nobody");
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn nothing_living_loses_what_it_stands_on(
            lengths in prop::collection::vec(1usize..6, 1..4), picks in prop::collection::vec(any::<prop::sample::Index>(), 1..20),
        ) {
            let (mut nodes, mut current) = chains(&lengths);
            for pick in picks {
                if nodes.is_empty() { break; }
                let target = pick.get(&nodes).id;
                let living_before = nodes.iter().filter(|n| !n.removed).count();
                match removal(&nodes, current, target, &nobody) {
                    Ok(removal) => {
                        if let Removal::Delete { merge_deltas, .. } = &removal {
                            prop_assert_eq!(*merge_deltas, current == Some(target));
                        }
                        apply(&mut nodes, &mut current, target, &removal);
                        prop_assert_eq!(nodes.iter().filter(|n| !n.removed).count(), living_before - 1);
                    }
                    Err(refusal) => prop_assert_eq!(refusal, Refusal::AlreadyRemoved),
                }
                check_invariants(&nodes)?;
            }
        }

        #[test]
        fn a_batch_leaves_the_same_whatever_its_order(
            lengths in prop::collection::vec(1usize..5, 1..4), picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let (nodes, current) = chains(&lengths);
            let targets: Vec<_> = picks.iter().map(|p| p.get(&nodes).id).collect();
            let mut reversed = targets.clone();
            reversed.reverse();
            let steps = remove_all(&nodes, current, &targets, &nobody);
            prop_assert_eq!(&steps, &remove_all(&nodes, current, &reversed, &nobody));
            let wanted: BTreeSet<_> = targets.iter().collect();
            prop_assert_eq!(steps.len(), wanted.len());
            prop_assert!(steps.iter().all(|(_, s)| s.is_ok()));
            let (mut left, mut at) = (nodes.clone(), current);
            for (target, step) in &steps {
                apply(&mut left, &mut at, *target, step.as_ref().unwrap());
            }
            check_invariants(&left)?;
            prop_assert!(left.iter().all(|n| n.removed == wanted.contains(&n.id)));
            if wanted.len() == nodes.len() {
                prop_assert!(left.is_empty(), "all removed in one batch: all gone");
            }
        }
    }
}
