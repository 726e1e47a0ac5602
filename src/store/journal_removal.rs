//! What the journal holds of operations that remove backups or end a chain.

use serde::{Deserialize, Serialize};

use super::journal::{Merge, Outcome};
use super::{BackupId, BackupName, VolumeId};

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
    /// The VM's deltas.
    pub deltas: Vec<VolumeDeltas>,
}

impl VolumeDeltas {
    /// Merges that are not brought to an end yet.
    pub fn open(&self) -> impl Iterator<Item = &Merge> {
        self.merges.iter().filter(|m| !matches!(m.outcome, Outcome::Done | Outcome::Kept { .. }))
    }
}
