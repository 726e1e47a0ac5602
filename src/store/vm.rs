//! What the store knows of a VM: `vm.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::manifest::{ImageFormat, PrimaryImage};
use super::snapshot::{self, Layer, Snapshot};
use super::{BackupId, BackupName, DiskName, OfferingId, Record, SnapshotName, VmId, VmName, VolumeId};

/// A VM, its volumes, and how knibfs left its images on primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The domain's UUID, or a random one for plain disk files.
    pub id: VmId,
    /// Its name in this store.
    pub name: VmName,
    /// Where its disks are found.
    pub source: Source,
    /// Its volumes. Detached ones are kept: backups hold them.
    pub volumes: Vec<Volume>,
    /// The offering that it is assigned to.
    #[serde(default)]
    pub offering: Option<OfferingId>,
    /// Disks that are not backed up: targets or names.
    #[serde(default)]
    pub exclude: Vec<DiskName>,
    /// Folder for deltas; none means beside the volume.
    #[serde(default)]
    pub delta_dir: Option<PathBuf>,
    /// Sequence number of the next backup.
    pub next_sequence: u64,
    /// What an operation is doing with it, or left it in.
    #[serde(default)]
    pub state: VmState,
    /// What the next backup may stand on.
    #[serde(default)]
    pub tracking: Tracking,
    /// When it was taken out of knibfs's care (`vm remove`); its backups are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<Timestamp>,
    /// VM and volume snapshots, the oldest first; removed ones that others stand on too.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    /// Images on primary that knibfs made for snapshots: those that no backup owns.
    #[serde(default)]
    pub layers: Vec<Layer>,
}

/// Where a VM's disks are found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Source {
    /// A libvirt domain, known by its UUID (`VmRecord::id`).
    Domain {
        /// The host, as a libvirt URI.
        uri: String,
        /// Its name when it was added; for people.
        domain: String,
    },
    /// Image files that no domain owns.
    Disks {
        /// How changes are found.
        track: Track,
    },
}

/// How changes of plain disk files are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Track {
    /// By comparing with the parent's checksums; nothing on primary is touched.
    Scan,
    /// By an overlay that takes the given path.
    Overlay,
}

impl std::fmt::Display for Track {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Track::Scan => "scan",
            Track::Overlay => "overlay",
        })
    }
}

/// One disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its identity.
    pub id: VolumeId,
    /// Its name: the first target, or the name given.
    pub name: DiskName,
    /// The image that is live now.
    pub path: PathBuf,
    /// That image's format.
    pub format: ImageFormat,
    /// Device in the guest; none for plain disk files.
    #[serde(default)]
    pub target: Option<String>,
    /// The disk's serial number, if it has one.
    #[serde(default)]
    pub serial: Option<String>,
    /// It is a block device.
    #[serde(default)]
    pub block_device: bool,
    /// No longer a disk of the VM; kept for the backups that hold it.
    #[serde(default)]
    pub detached: bool,
}

/// State of a VM (section 3 of the requirements).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Nothing is going on.
    #[default]
    Ready,
    /// A backup is being taken.
    BackingUp,
    /// It is being restored.
    Restoring,
    /// A backup left something that needs `recover`.
    BackupError,
    /// A restore left something that needs `recover`.
    RestoreError,
}

/// How knibfs left the VM's images: what the next incremental can stand on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracking {
    /// The current backup; none after the end of a chain or before the first.
    pub current: Option<Current>,
    /// The current backup ended its chain: nothing may stand on it.
    #[serde(default)]
    pub end_of_chain: bool,
    /// Per volume what it looked like after the current backup; a volume that is not here has no tracking state.
    #[serde(default)]
    pub volumes: BTreeMap<VolumeId, VolumeTracking>,
    /// Volumes that were reverted since the last backup, and to which snapshot.
    #[serde(default)]
    pub reverted: BTreeMap<VolumeId, SnapshotName>,
    /// Volumes that were restored since the last backup, with the `VM/BACKUP` that they were restored from.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub restored: BTreeMap<VolumeId, String>,
}

/// The backup that the next incremental stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Current {
    /// Its identity.
    pub id: BackupId,
    /// Its name.
    pub name: BackupName,
}

/// One volume as it was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTracking {
    /// Its images, top first; deltas of knibfs name their `owner`. Empty for `scan`, which leaves none.
    pub images: Vec<PrimaryImage>,
    /// Size that the guest saw, in bytes.
    pub virtual_size: u64,
}

impl VmRecord {
    /// One without volumes, of which no backup was taken yet.
    pub fn new(id: VmId, name: VmName, source: Source) -> Self {
        Self {
            id,
            name,
            source,
            volumes: Vec::new(),
            offering: None,
            exclude: Vec::new(),
            delta_dir: None,
            next_sequence: 1,
            state: VmState::Ready,
            tracking: Tracking::default(),
            removed: None,
            snapshots: Vec::new(),
            layers: Vec::new(),
        }
    }

    /// The volume of that name.
    pub fn volume(&self, name: &DiskName) -> Option<&Volume> {
        self.volumes.iter().find(|v| v.name == *name)
    }

    /// The volumes that are disks of the VM now.
    pub fn attached(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.iter().filter(|v| !v.detached)
    }
}

impl Record for VmRecord {
    const FORMAT: u64 = 1;

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for volume in &self.volumes {
            if !names.insert(&volume.name) || !ids.insert(volume.id) {
                return Err(format!("volume {} is there twice", volume.name));
            }
            if !volume.path.is_absolute() {
                return Err(format!("the path of volume {} is not absolute", volume.name));
            }
        }
        if self.delta_dir.as_ref().is_some_and(|d| !d.is_absolute()) {
            return Err("the folder for deltas is not absolute".into());
        }
        snapshot::check(&self.snapshots, &self.layers)
    }
}
