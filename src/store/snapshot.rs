//! VM and volume snapshots in `vm.json`, and one that is being worked on in the journal.

use std::collections::BTreeSet;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::journal::Outcome;
use super::manifest::PrimaryImage;
use super::{SnapshotId, SnapshotName, VmRecord, VolumeId};

/// A state of a VM's disks, or of one of them, that lies on primary and can be gone back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// The volume that it is of; none for a snapshot of the VM.
    #[serde(default)]
    pub disk: Option<VolumeId>,
    /// The snapshot that its disks stood on when it was taken.
    #[serde(default)]
    pub parent: Option<SnapshotId>,
    /// The point in time that it shows.
    pub created: Timestamp,
    /// The guest's file systems were frozen then.
    #[serde(default)]
    pub quiesced: bool,
    /// It was removed and is kept for what stands on it.
    #[serde(default)]
    pub removed: bool,
    /// Its disks.
    pub volumes: Vec<Frozen>,
}

/// One disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The volume.
    pub volume: VolumeId,
    /// The image that shows it, with all below it; nobody writes to it.
    pub image: PrimaryImage,
}

/// An image on primary that knibfs made for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The volume that it is of.
    pub volume: VolumeId,
    /// The image.
    pub image: PrimaryImage,
}

/// What is done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotAction {
    /// Taking it.
    Create,
    /// Going back to it.
    Revert,
    /// Removing it.
    Remove,
}

/// Steps, in order. Each is written before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotStep {
    /// Overlays may be there; perhaps the disks are on them already.
    Overlays,
    /// The disks are where they shall be, or nothing is to be changed there: `vm.json` is written.
    Record,
    /// Layers that nothing needs are merged and deleted.
    Tidy,
}

/// A snapshot that is being taken, gone back to or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOp {
    /// What is done.
    pub action: SnapshotAction,
    /// The snapshot. One that is taken names the images that are frozen as they were before.
    pub snapshot: Snapshot,
    /// The last step that was begun.
    pub step: SnapshotStep,
    /// The overlays that become live.
    #[serde(default)]
    pub overlays: Vec<SnapshotOverlay>,
    /// Volumes whose images were as the last backup left them: for these it is recorded how they are left now.
    #[serde(default)]
    pub intact: BTreeSet<VolumeId>,
    /// The merge that is under way.
    #[serde(default)]
    pub merge: Option<LayerMerge>,
}

/// An overlay that becomes live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOverlay {
    /// The volume.
    pub volume: VolumeId,
    /// What the hypervisor calls it.
    pub target: String,
    /// The overlay, or for plain disk files the new name of the image that was live.
    pub path: PathBuf,
}

/// A layer that is being merged into the one below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMerge {
    /// The volume.
    pub volume: VolumeId,
    /// What is merged.
    pub top: PrimaryImage,
    /// What it is merged into.
    pub base: PrimaryImage,
    /// Both are in the chain of the live image.
    pub in_chain: bool,
    /// How it went.
    #[serde(default)]
    pub outcome: Outcome,
}

impl VmRecord {
    /// The snapshots that were not removed.
    pub fn living_snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.iter().filter(|s| !s.removed)
    }

    /// Living snapshots that show the volume.
    pub fn snapshots_of(&self, volume: VolumeId) -> impl Iterator<Item = &Snapshot> {
        self.living_snapshots().filter(move |s| s.frozen(volume).is_some())
    }
}

impl Snapshot {
    /// The image that shows a volume.
    pub fn frozen(&self, volume: VolumeId) -> Option<&Frozen> {
        self.volumes.iter().find(|f| f.volume == volume)
    }
}

/// Whether what a record says of snapshots can be.
pub(super) fn check(snapshots: &[Snapshot], layers: &[Layer]) -> Result<(), String> {
    let mut ids = BTreeSet::new();
    let mut names = BTreeSet::new();
    for snapshot in snapshots {
        let twice = !snapshot.removed && !names.insert((snapshot.disk, &snapshot.name));
        if twice || !ids.insert(snapshot.id) {
            return Err(format!("snapshot {} is there twice", snapshot.name));
        }
        let mut volumes = BTreeSet::new();
        if !snapshot.volumes.iter().all(|f| volumes.insert(f.volume)) {
            return Err(format!("snapshot {} has a volume twice", snapshot.name));
        }
    }
    let frozen = snapshots.iter().flat_map(|s| &s.volumes).map(|f| &f.image);
    match frozen.chain(layers.iter().map(|l| &l.image)).find(|i| !i.path.is_absolute()) {
        Some(image) => {
            Err(format!("the path {} of a snapshot's image is not absolute", image.path.display()))
        }
        None => Ok(()),
    }
}
