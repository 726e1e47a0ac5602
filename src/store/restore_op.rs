//! A restore in the journal.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::journal::Outcome;
use super::manifest::ImageFormat;
use super::{BackupId, BackupName, DiskName, VmName, VmRecord, VolumeId};

/// A restore under way. The VM of the journal's entry is the one that gets the volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOp {
    /// The backup: nobody may take it away until the restore has ended.
    pub backup: BackupId,
    /// The VM that it is of.
    pub of: VmName,
    /// Its name.
    pub name: BackupName,
    /// What is restored.
    pub into: RestoreInto,
    /// The last step that was begun.
    pub step: RestoreStep,
    /// For a quick restore the folder where the store is mounted.
    #[serde(default)]
    pub mount: Option<PathBuf>,
    /// The host that the VM is to start on, as a libvirt URI, where it is another than its own.
    #[serde(default)]
    pub move_to: Option<String>,
    /// Bytes per second, at most.
    #[serde(default)]
    pub rate: Option<u64>,
    /// The running VM is stopped for a moment, so that QEMU flushes what was pulled.
    #[serde(default)]
    pub flushing: bool,
    /// Device number of the mount on which QEMU has the images open: it must open them anew on another.
    #[serde(default)]
    pub opened: Option<u64>,
    /// The VM's memory is saved and it is started from there, so that it opens its images anew.
    #[serde(default)]
    pub reopening: bool,
    /// What `vm.json` says when all is done.
    pub record: VmRecord,
    /// The volumes.
    pub disks: Vec<RestoreDisk>,
}

/// What QEMU does when a disk cannot be read or written: libvirt's words, none where the definition leaves it to QEMU (errors
/// go to the guest, but for a lack of room, which pauses it).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorPolicy {
    /// `error_policy`: for writing, and for reading where `read` says nothing.
    #[serde(default)]
    pub error: Option<String>,
    /// `rerror_policy`.
    #[serde(default)]
    pub read: Option<String>,
}

impl ErrorPolicy {
    /// The guest is paused and sees no error: what failed is done again when it goes on.
    pub fn stop() -> Self {
        Self { error: Some("stop".into()), read: Some("stop".into()) }
    }
}

/// What is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreInto {
    /// The VM's own volumes.
    SameVm,
    /// One disk as a new volume.
    NewVolume,
    /// All as a new VM.
    NewVm,
}

/// Steps of a restore, in order. Each is written before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreStep {
    /// New images are written under names of their own; block devices are overwritten.
    Write,
    /// All is written: the new images take their places.
    Swap,
    /// They have: `vm.json` says so. A quick restore starts the VM.
    Start,
    /// It was started; data is pulled.
    Pull,
}

/// One volume of a restore under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreDisk {
    /// Its name in the backup.
    pub from: DiskName,
    /// The volume that it becomes.
    pub volume: VolumeId,
    /// Device in the guest; the disk's name for plain disk files.
    pub target: String,
    /// It is overwritten in place: there is nothing to swap.
    #[serde(default)]
    pub in_place: bool,
    /// The new image until it takes its place.
    pub fresh: PathBuf,
    /// Its place.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Images that are not needed any more, and deleted when nothing names them.
    #[serde(default)]
    pub drop: Vec<PathBuf>,
    /// The `<disk>` that is added where the domain has no such disk.
    #[serde(default)]
    pub model: Option<String>,
    /// For a quick restore, what became of I/O errors before, and is to become of them afterwards.
    #[serde(default)]
    pub errors: ErrorPolicy,
    /// Owner, group and permission bits of the image that it replaces.
    #[serde(default)]
    pub access: Option<(u32, u32, u32)>,
    /// For a block device: whether overwriting it was begun. For a quick restore: whether all data is pulled.
    #[serde(default)]
    pub outcome: Outcome,
}
