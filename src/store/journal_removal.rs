//! What the journal holds of operations that remove backups or end a chain.

use serde::{Deserialize, Serialize};

use super::journal::{Merge, Outcome};
use super::{BackupId, BackupName, DiskName, VolumeId};

/// Backups of one VM that are being removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveOp {
    /// The last step that was begun.
    pub step: RemoveStep,
    /// What cannot be deleted is left, and its record dropped.
    pub forced: bool,
    /// Backups that are deleted, each before what it stands on.
    pub delete: Vec<Doomed>,
    /// Backups that become `Removed`.
    pub hide: Vec<Named>,
    /// Backups that end their chain.
    pub ends: Vec<Named>,
    /// The current backup is among them: the VM's deltas, lowest first in each volume.
    #[serde(default)]
    pub deltas: Option<Vec<VolumeDeltas>>,
}

/// Steps of a removal, in order. Each is written before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoveStep {
    /// Folders may be out of sight; everything can be put back.
    Planned,
    /// It can only be finished.
    Decided,
}

/// A backup by both of its names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Its identity.
    pub id: BackupId,
    /// Its name.
    pub name: BackupName,
}

/// A backup that is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doomed {
    /// Which.
    #[serde(flatten)]
    pub backup: Named,
    /// A person named it; otherwise it was hidden already, and nothing needs it any more.
    pub asked: bool,
}

/// The deltas of one volume on primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDeltas {
    /// The volume.
    pub volume: VolumeId,
    /// What the hypervisor calls it.
    pub target: String,
    /// The merges to do, in order.
    pub merges: Vec<Merge>,
}

/// A chain that is being ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseOp {
    /// The VM is taken off its offering when it is done.
    pub unassign: bool,
    /// The VM is no longer in knibfs's care when it is done.
    #[serde(default)]
    pub remove: bool,
    /// The VM's deltas.
    pub deltas: Vec<VolumeDeltas>,
}

/// Removed backups that are being merged into the one that stands on them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbsorbOp {
    /// The backup that stays. Its manifest tells whether its new files are the right ones: then it names `onto`.
    pub into: Named,
    /// What goes: the nearest first.
    pub from: Vec<Named>,
    /// What `into` stands on afterwards.
    #[serde(default)]
    pub onto: Option<Named>,
    /// Disks of `into` that are written anew.
    pub disks: Vec<DiskName>,
}

impl VolumeDeltas {
    /// Merges that are not brought to an end yet.
    pub fn open(&self) -> impl Iterator<Item = &Merge> {
        self.merges.iter().filter(|m| !matches!(m.outcome, Outcome::Done | Outcome::Kept { .. }))
    }
}
