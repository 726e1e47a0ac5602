//! The next backup of a VM: what each volume will be, and whether the chain ends with it.

use crate::store::manifest::{Disk, Kind, Manifest, Parent, PrimaryImage};
use crate::store::vm::{Current, Tracking, VolumeTracking};
use crate::store::{DiskName, VolumeId};

use super::{FULL_AT_DEPTH, Why};
use crate::store::manifest::BackupState;

/// What is known before a backup.
#[derive(Debug)]
pub struct Next<'a> {
    /// `backup.chain.size`, or the offering's: 1 makes every backup full, below 1 is unlimited.
    pub chain_size: i64,
    /// Whether it is to be isolated.
    pub isolated: bool,
    /// How changes are found.
    pub method: Method,
    /// All of the VM's backups whose manifests can be read, `Removed` ones included.
    pub history: &'a [Manifest],
    /// How knibfs left the VM.
    pub tracking: &'a Tracking,
    /// The volumes to back up, as they are now.
    pub volumes: &'a [VolumeNow],
}

/// How changes since the parent are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// In overlays.
    Delta,
    /// By comparing with the parent's checksums.
    Scan,
}

/// A volume as it is now.
#[derive(Debug, Clone)]
pub struct VolumeNow {
    /// Its identity.
    pub id: VolumeId,
    /// Its name.
    pub name: DiskName,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Its images on primary, top first. `owner` is not looked at: the record of how they were left has it.
    pub images: Vec<PrimaryImage>,
    /// Its file in the current backup with all below it.
    pub stored: StoredFile,
}

/// What a look at the parent's file, its sums and all below them found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredFile {
    /// It can be stood on.
    Sound,
    /// One of them is not there.
    Missing,
    /// One of them is not as it was written.
    Damaged(String),
}

/// What the next backup will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What it stands on; none when every volume is full.
    pub parent: Option<Parent>,
    /// Its place in its chain, from 1; removed backups count.
    pub position: u32,
    /// Nothing will stand on it and it leaves no delta on primary.
    pub end_of_chain: bool,
    /// It replaces the current backup. An isolated one does not: the chain goes on without it.
    pub becomes_current: bool,
    /// One for each volume, in the order asked.
    pub volumes: Vec<VolumePlan>,
}

/// What one volume will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlan {
    /// The volume.
    pub volume: VolumeId,
    /// Full or incremental.
    pub kind: Kind,
    /// Why.
    pub why: Why,
    /// Images in the store from the new file to the bottom of its chain.
    pub depth: u32,
    /// For an incremental from overlays: how many images from the top hold what changed since the parent, the
    /// parent's delta being the last of them. 0 otherwise.
    pub layers: usize,
}

/// Decides the next backup.
pub fn plan(next: &Next<'_>) -> Plan {
    let parent = parent(next);
    let volumes: Vec<VolumePlan> = next
        .volumes
        .iter()
        .map(|now| match &parent {
            Ok((current, parent)) => volume(next, current, parent, now),
            Err(why) => full(now, ended(next, now, why)),
        })
        .collect();
    // A backup without any incremental volume stands on nothing: it begins a chain.
    let stands_on =
        parent.ok().filter(|_| volumes.iter().any(|v| v.kind == Kind::Incremental)).map(|(_, p)| p);
    let position = stands_on.map_or(1, |p| p.position.saturating_add(1));
    Plan {
        parent: stands_on.map(|p| Parent { id: p.id, name: p.name.clone() }),
        position,
        end_of_chain: next.isolated || (next.chain_size >= 1 && i64::from(position) >= next.chain_size),
        becomes_current: !next.isolated,
        volumes,
    }
}

/// The backup that the next can stand on, or why every volume is full.
fn parent<'a>(next: &Next<'a>) -> Result<(&'a Current, &'a Manifest), Why> {
    if next.isolated {
        return Err(Why::Isolated);
    }
    // Row "chain size": 1 makes every backup full, <1 is unlimited.
    if next.chain_size == 1 {
        return Err(Why::EveryOneFull);
    }
    let Some(current) = &next.tracking.current else {
        let first = next.history.iter().all(|m| m.isolated);
        return Err(if first { Why::First } else { Why::ChainEnded });
    };
    let Some(parent) = next.history.iter().find(|m| m.id == current.id) else {
        return Err(Why::ParentGone { parent: current.name.clone() });
    };
    // Row "when in doubt, full": parent not BackedUp.
    if parent.state != BackupState::BackedUp {
        return Err(Why::ParentState { parent: parent.name.clone(), state: parent.state });
    }
    if next.tracking.end_of_chain || parent.end_of_chain || parent.isolated {
        return Err(Why::ChainEnded);
    }
    // Row "chain size": removed backups count, as `position` does not change with them.
    if next.chain_size > 1 && i64::from(parent.position) >= next.chain_size {
        return Err(Why::ChainFull { size: parent.position });
    }
    Ok((current, parent))
}

fn volume(next: &Next<'_>, current: &Current, parent: &Manifest, now: &VolumeNow) -> VolumePlan {
    match incremental(next, current, parent, now) {
        Ok((disk, layers)) => VolumePlan {
            volume: now.id,
            kind: Kind::Incremental,
            why: Why::Changed { parent: parent.name.clone() },
            depth: disk.depth.saturating_add(1),
            layers,
        },
        Err(why) => full(now, why),
    }
}

/// Why a volume is full where nothing can be stood on.
fn ended(next: &Next<'_>, now: &VolumeNow, why: &Why) -> Why {
    match why {
        Why::ChainEnded => since(next, now).unwrap_or(Why::ChainEnded),
        why => why.clone(),
    }
}

/// What became of it since the last backup: it was reverted to a snapshot, or restored from a backup.
fn since(next: &Next<'_>, now: &VolumeNow) -> Option<Why> {
    let reverted = next.tracking.reverted.get(&now.id);
    let restored = || next.tracking.restored.get(&now.id);
    match reverted {
        Some(snapshot) => Some(Why::Reverted { snapshot: snapshot.clone() }),
        None => restored().map(|backup| Why::Restored { backup: backup.clone() }),
    }
}

fn full(now: &VolumeNow, why: Why) -> VolumePlan {
    VolumePlan { volume: now.id, kind: Kind::Full, why, depth: 1, layers: 0 }
}

/// The parent's disk and the layers that hold the changes, or why this volume is full.
fn incremental<'a>(
    next: &Next<'_>,
    current: &Current,
    parent: &'a Manifest,
    now: &VolumeNow,
) -> Result<(&'a Disk, usize), Why> {
    // Row "per volume".
    let (Some(left), Some(disk)) = (next.tracking.volumes.get(&now.id), parent.disk_of(now.id)) else {
        return Err(since(next, now).unwrap_or(Why::NoTracking));
    };
    // Row "when in doubt, full".
    match &now.stored {
        StoredFile::Sound => {}
        StoredFile::Missing => return Err(Why::FileMissing { parent: parent.name.clone() }),
        StoredFile::Damaged(what) => {
            return Err(Why::FileDamaged { parent: parent.name.clone(), what: what.clone() });
        }
    }
    if left.virtual_size != now.virtual_size {
        return Err(Why::Resized { from: left.virtual_size, to: now.virtual_size });
    }
    // Row "plain disk files": a scan compares contents, so nothing on primary needs to be as it was.
    let layers = match next.method {
        Method::Scan => 0,
        Method::Delta => changed_layers(current, left, now)?,
    };
    // Row "depth": the stored chain and primary's own layers.
    let depth = disk.depth.saturating_add(u32::try_from(now.images.len()).unwrap_or(u32::MAX));
    if depth >= FULL_AT_DEPTH {
        return Err(Why::TooDeep { depth });
    }
    Ok((disk, layers))
}

/// How many images from the top hold what changed, provided that all are as they were left.
fn changed_layers(current: &Current, left: &VolumeTracking, now: &VolumeNow) -> Result<usize, Why> {
    let changed = |what: String| Err(Why::ChainChanged { what });
    for (depth, (was, is)) in left.images.iter().zip(&now.images).enumerate() {
        if was.path != is.path {
            return changed(format!("{} is where {} was", is.path.display(), was.path.display()));
        }
        if (was.device, was.inode) != (is.device, is.inode) {
            return changed(format!("{} is another file than before", is.path.display()));
        }
        if was.format != is.format {
            return changed(format!("{} is {}, it was {}", is.path.display(), is.format, was.format));
        }
        // The guest writes to the live image only.
        if depth > 0 && was.modified.is_some() && was.modified != is.modified {
            return changed(format!("{}, which its overlay stands on, was written to", is.path.display()));
        }
    }
    if left.images.len() != now.images.len() {
        return changed(format!("there are {} of them, there were {}", now.images.len(), left.images.len()));
    }
    let delta = left.images.iter().position(|image| image.owner == Some(current.id));
    delta.map(|at| at + 1).ok_or(Why::NoTracking)
}
