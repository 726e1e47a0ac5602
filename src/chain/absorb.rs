//! Merging removed backups into the one that stands on them, instead of keeping dead files.

use crate::store::BackupId;
use crate::store::manifest::{Kind, Manifest};

use super::Node;

/// One merge: what `into` stands on becomes part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absorb {
    /// The living backup.
    pub into: BackupId,
    /// The removed ones below it, the nearest first; they go afterwards.
    pub from: Vec<BackupId>,
    /// What it stands on then; none when it is full.
    pub onto: Option<BackupId>,
}

/// Every merge that can be done. Row "it has a living child": what is kept for one child only is kept no longer.
///
/// A removed backup on which several stand stays, and one whose manifest cannot be read is not touched.
pub fn absorbs(nodes: &[Node]) -> Vec<Absorb> {
    let find = |id: BackupId| nodes.iter().find(|n| n.id == id);
    let children = |id: BackupId| nodes.iter().filter(|n| n.parent == Some(id)).count();
    let mut all = Vec::new();
    for node in nodes.iter().filter(|n| !n.removed && n.readable) {
        let mut from: Vec<BackupId> = Vec::new();
        let mut below = node.parent.and_then(find);
        while let Some(removed) = below {
            let loops = from.contains(&removed.id);
            if !removed.removed || !removed.readable || children(removed.id) != 1 || loops {
                break;
            }
            from.push(removed.id);
            below = removed.parent.and_then(find);
        }
        if !from.is_empty() {
            all.push(Absorb { into: node.id, from, onto: below.map(|n| n.id) });
        }
    }
    all
}

/// Positions and depths as they follow from what stands on what; the manifests that change. "Backups removed but kept
/// count": those that were merged do not, so a chain that is pruned never reaches its end.
pub fn renumber(manifests: &[Manifest]) -> Vec<Manifest> {
    let mut all: Vec<Manifest> = manifests.to_vec();
    all.sort_by_key(|m| m.sequence);
    for at in 0..all.len() {
        let (before, rest) = all.split_at_mut(at);
        let Some(manifest) = rest.first_mut() else { continue };
        let parent = match &manifest.parent {
            None => None,
            // What it stands on cannot be read: nothing follows from it.
            Some(parent) => match before.iter().find(|m| m.id == parent.id) {
                None => continue,
                found => found,
            },
        };
        manifest.position = parent.map_or(1, |p| p.position.saturating_add(1));
        for disk in &mut manifest.disks {
            let below = parent.and_then(|p| p.disk_of(disk.volume));
            disk.depth = match (disk.kind, below) {
                (Kind::Full, _) => 1,
                (Kind::Incremental, Some(below)) => below.depth.saturating_add(1),
                (Kind::Incremental, None) => disk.depth,
            };
        }
    }
    all.retain(|m| manifests.iter().any(|old| old.id == m.id && old != m));
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Removal, remove_all};
    use super::*;

    /// Chains of so many backups each, some of them removed.
    fn nodes(lengths: &[usize], removed: &[bool]) -> Vec<Node> {
        let mut nodes: Vec<Node> = Vec::new();
        for length in lengths {
            for at in 0..*length {
                let parent = if at == 0 { None } else { nodes.last().map(|n| n.id) };
                let removed = removed.get(nodes.len()).copied().unwrap_or(false) && at + 1 < *length;
                let sequence = nodes.len() as u64 + 1;
                let id = BackupId::random();
                nodes.push(Node { id, parent, sequence, removed, end_of_chain: false, readable: true });
            }
        }
        nodes
    }

    fn apply(nodes: &mut Vec<Node>, step: &Absorb) {
        nodes.retain(|n| !step.from.contains(&n.id));
        nodes.iter_mut().filter(|n| n.id == step.into).for_each(|n| n.parent = step.onto);
    }

    #[test]
    fn a_run_of_removed_backups_goes_into_the_living_one_above() {
        let n = nodes(&[5], &[false, true, true, false, false]);
        let wanted = Absorb { into: n[3].id, from: vec![n[2].id, n[1].id], onto: Some(n[0].id) };
        assert_eq!(absorbs(&n), [wanted]);
    }

    #[test]
    fn over_a_removed_full_backup_the_child_becomes_full() {
        let n = nodes(&[3], &[true]);
        assert_eq!(absorbs(&n), [Absorb { into: n[1].id, from: vec![n[0].id], onto: None }]);
    }

    #[test]
    fn what_several_stand_on_or_nobody_can_read_stays() {
        let mut n = nodes(&[2, 1], &[true]);
        n[2].parent = Some(n[0].id);
        assert_eq!(absorbs(&n), []);
        let mut n = nodes(&[2], &[true]);
        n[0].readable = false;
        assert_eq!(absorbs(&n), []);
        let mut n = nodes(&[3], &[false, true]);
        n[2].readable = false;
        assert_eq!(absorbs(&n), []);
    }

    proptest! {
        #[test]
        fn nothing_living_loses_an_ancestor_and_nothing_dead_is_left(
            lengths in prop::collection::vec(1usize..7, 1..4), removed in prop::collection::vec(any::<bool>(), 0..20),
        ) {
            let before = nodes(&lengths, &removed);
            let mut left = before.clone();
            for step in absorbs(&before) {
                // What a backup holds is what it and all below it hold: no more, no less, in the same order.
                let below = |nodes: &[Node], id| {
                    let mut all = vec![id];
                    while let Some(parent) = nodes.iter().find(|n| n.id == all[all.len() - 1]).and_then(|n| n.parent) {
                        all.push(parent);
                    }
                    all
                };
                let mut expected = below(&left, step.into);
                expected.retain(|id| !step.from.contains(id));
                apply(&mut left, &step);
                prop_assert_eq!(below(&left, step.into), expected);
            }
            prop_assert!(left.iter().all(|n| !n.removed));
            prop_assert_eq!(left.len(), before.iter().filter(|n| !n.removed).count());
            prop_assert!(absorbs(&left).is_empty());
            for node in &left {
                prop_assert!(node.parent.is_none_or(|p| left.iter().any(|n| n.id == p)));
            }
        }

        #[test]
        fn after_a_removal_and_its_merges_only_living_backups_take_room(
            lengths in prop::collection::vec(1usize..7, 1..4), picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut left = nodes(&lengths, &[]);
            let targets: Vec<_> = picks.iter().map(|p| p.get(&left).id).collect();
            for (target, removal) in remove_all(&left, None, &targets, &|_| None) {
                match removal.unwrap() {
                    Removal::Hide => left.iter_mut().filter(|n| n.id == target).for_each(|n| n.removed = true),
                    Removal::Delete { delete, .. } => left.retain(|n| !delete.contains(&n.id)),
                }
            }
            for step in absorbs(&left) { apply(&mut left, &step); }
            prop_assert!(left.iter().all(|n| !n.removed && !targets.contains(&n.id)));
        }
    }
}
