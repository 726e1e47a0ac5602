//! What must be, by the requirements' tables and in the simplest words: no code of the program is used.

use std::rc::Rc;

use knibfs::store::{BackupId, BackupName};

/// One backup that is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Backup {
    pub id: BackupId,
    pub name: BackupName,
    /// Bytes of each disk.
    pub disks: Vec<Rc<Vec<u8>>>,
    pub full: Vec<bool>,
    pub parent: Option<BackupId>,
    pub position: u32,
    pub isolated: bool,
    pub end_of_chain: bool,
    pub hidden: bool,
}

/// A VM and its backups.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub disks: Vec<Vec<u8>>,
    pub backups: Vec<Backup>,
    pub current: Option<BackupId>,
    pub chain_size: i64,
}

/// What the next backup must be.
#[derive(Debug, Clone, PartialEq)]
pub struct Next {
    pub full: Vec<bool>,
    pub parent: Option<BackupId>,
    pub position: u32,
    pub end_of_chain: bool,
}

impl Model {
    pub fn find(&self, id: BackupId) -> Option<&Backup> {
        self.backups.iter().find(|b| b.id == id)
    }

    /// Table "Backups": rows "chain size", "per volume", "when in doubt, full".
    pub fn next(&self, isolated: bool) -> Next {
        let size = self.chain_size;
        let parent = self.current.and_then(|id| self.find(id)).filter(|_| !isolated && size != 1);
        let parent = parent.filter(|p| size < 1 || i64::from(p.position) < size);
        let same_size =
            |(at, disk): (usize, &Vec<u8>)| parent.is_some_and(|p| p.disks[at].len() == disk.len());
        let full: Vec<bool> = self.disks.iter().enumerate().map(|disk| !same_size(disk)).collect();
        let parent = parent.filter(|_| full.contains(&false));
        let position = parent.map_or(1, |p| p.position + 1);
        Next {
            full,
            parent: parent.map(|p| p.id),
            position,
            end_of_chain: isolated || (size >= 1 && i64::from(position) >= size),
        }
    }

    pub fn take(&mut self, id: BackupId, name: BackupName, isolated: bool) {
        let Next { full, parent, position, end_of_chain } = self.next(isolated);
        let disks = self.disks.iter().cloned().map(Rc::new).collect();
        let hidden = false;
        self.backups.push(Backup { id, name, disks, full, parent, position, isolated, end_of_chain, hidden });
        if !isolated {
            self.current = (!end_of_chain).then_some(id);
        }
    }

    /// Table "Removal": what is removed and what nothing living stands on is gone; the first living one below ends its
    /// chain. `None`: it is refused.
    pub fn remove(&self, targets: &[BackupId], leased: Option<BackupId>) -> Option<Self> {
        let mut after = self.clone();
        for id in targets {
            let backup = after.backups.iter_mut().find(|b| b.id == *id)?;
            if self.find(*id)?.hidden {
                return None;
            }
            backup.hidden = true;
        }
        let mut needed: Vec<BackupId> = after.backups.iter().filter(|b| !b.hidden).map(|b| b.id).collect();
        let mut at = 0;
        while at < needed.len() {
            needed.extend(self.find(needed[at]).and_then(|b| b.parent).filter(|p| !needed.contains(p)));
            at += 1;
        }
        let gone: Vec<Backup> = after.backups.iter().filter(|b| !needed.contains(&b.id)).cloned().collect();
        if leased.is_some_and(|id| targets.contains(&id) || gone.iter().any(|b| b.id == id)) {
            return None;
        }
        after.backups.retain(|b| needed.contains(&b.id));
        for backup in after.backups.iter_mut().filter(|b| !b.hidden) {
            backup.end_of_chain |= gone.iter().any(|g| g.parent == Some(backup.id));
        }
        after.current = self.current.filter(|id| needed.contains(id));
        Some(after)
    }

    /// What there is after each step of a prune: its removal, then merge after merge.
    pub fn prune(&self, last: usize, merges: bool) -> Vec<Self> {
        let listed: Vec<BackupId> = self.backups.iter().filter(|b| !b.hidden).map(|b| b.id).collect();
        let keep =
            |id: &BackupId| listed.iter().rev().take(last).any(|k| k == id) || self.current == Some(*id);
        let targets: Vec<BackupId> = listed.iter().copied().filter(|id| !keep(id)).collect();
        let mut steps = vec![self.remove(&targets, None).unwrap()];
        if !merges {
            return steps;
        }
        loop {
            let now = &steps[steps.len() - 1];
            let hidden_below = |b: &Backup| b.parent.and_then(|p| now.find(p)).is_some_and(|p| p.hidden);
            let Some(at) = now.backups.iter().position(|b| !b.hidden && hidden_below(b)) else { break };
            let mut after = now.clone();
            let mut into = after.backups[at].clone();
            while let Some(gone) = into.parent.and_then(|p| now.find(p)).filter(|p| p.hidden) {
                into.full.iter_mut().zip(&gone.full).for_each(|(full, below)| *full |= below);
                into.parent = gone.parent;
                after.backups.retain(|b| b.id != gone.id);
            }
            into.parent = into.parent.filter(|_| into.full.contains(&false));
            let place = after.backups.iter().position(|b| b.id == into.id).unwrap();
            after.backups[place] = into;
            for at in 0..after.backups.len() {
                let parent = after.backups[at].parent.and_then(|p| after.find(p));
                after.backups[at].position = parent.map_or(1, |p| p.position + 1);
            }
            steps.push(after);
        }
        steps
    }

    /// "Ending a chain early".
    pub fn end_chain(&mut self) {
        let current = self.current.take();
        self.backups.iter_mut().filter(|b| Some(b.id) == current).for_each(|b| b.end_of_chain = true);
    }
}
