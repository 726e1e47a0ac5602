//! What a backup is: its `manifest.json`, the truth from which everything else can be rebuilt.

use std::collections::BTreeSet;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::vm::Source;
use super::{BackupId, BackupName, DiskName, Record, VmId, VmName, VolumeId};

/// One backup of all of a VM's volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup's identity.
    pub id: BackupId,
    /// Its name: the folder that it lies in.
    pub name: BackupName,
    /// The VM's name in this store: the folder above.
    pub vm: VmName,
    /// The VM's identity.
    pub vm_id: VmId,
    /// Order among the VM's backups; never given twice, never from the clock.
    pub sequence: u64,
    /// The backup that incremental disks stand on; none when every disk is full.
    pub parent: Option<Parent>,
    /// How many backups its chain holds up to this one, removed ones too; 1 for a full one.
    pub position: u32,
    /// Outside every chain.
    pub isolated: bool,
    /// No later backup stands on this one.
    pub end_of_chain: bool,
    /// State of the backup.
    pub state: BackupState,
    /// State of its compression.
    pub compression: CompressionState,
    /// State of its validation.
    pub validation: ValidationState,
    /// When the operation began.
    pub started: Timestamp,
    /// The point in time that the disks show.
    pub taken: Timestamp,
    /// When its data was whole in the store.
    pub finished: Timestamp,
    /// The guest's file systems were frozen at `taken`.
    pub quiesced: bool,
    /// Where it came from.
    pub source: Source,
    /// The volumes.
    pub disks: Vec<Disk>,
    /// What of the VM was left out, and why.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// What a person should know about how it went.
    #[serde(default)]
    pub notes: Vec<String>,
    /// The program that made it.
    pub knibfs_version: String,
}

/// The backup below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its identity.
    pub id: BackupId,
    /// Its name.
    pub name: BackupName,
}

/// One volume in a backup: exactly one qcow2 file, `<name>.qcow2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Stem of its files.
    pub name: DiskName,
    /// The volume's identity in `vm.json`.
    pub volume: VolumeId,
    /// Device in the guest (`vda`); none for plain disk files.
    #[serde(default)]
    pub target: Option<String>,
    /// Whole, or only what changed since the parent.
    pub kind: Kind,
    /// Why it is of that kind: a sentence of `chain`.
    pub reason: String,
    /// Images in the store from this file to the bottom of its chain, this one included.
    pub depth: u32,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Length of the stored qcow2 file in bytes.
    pub file_size: u64,
    /// Bytes a cluster of the stored file.
    pub cluster_size: u64,
    /// Clusters stored with data, plain or compressed.
    pub data_clusters: u64,
    /// Of these, compressed ones.
    #[serde(default)]
    pub compressed_clusters: u64,
    /// Clusters stored as zeros (over the parent's data).
    pub zero_clusters: u64,
    /// How clusters are compressed, if any are.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Length of the `.sums` file in bytes.
    pub sums_size: u64,
    /// Digest of the `.sums` file's header and directory, which cover the rest of it.
    pub sums_digest: String,
    /// The image on primary that was copied.
    pub primary: PrimaryImage,
}

/// An image on primary as it was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimaryImage {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Device number and inode.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Size that the guest sees through it, in bytes.
    pub virtual_size: u64,
    /// When a file was last written to, in nanoseconds since 1970; none for a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<i64>,
    /// The backup that left this delta; none for what knibfs did not make.
    #[serde(default)]
    pub owner: Option<BackupId>,
}

/// Something of a VM that is not backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Device or name.
    pub disk: String,
    /// Why.
    pub reason: String,
}

/// Whole or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The whole volume.
    Full,
    /// What changed since the parent.
    Incremental,
}

/// Formats of images on primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The guest's bytes and nothing else.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Compression of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Zstandard.
    Zstd,
    /// Deflate.
    Zlib,
}

/// State of a backup (section 3 of the requirements).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the requirements' words are the names
pub enum BackupState {
    Allocated,
    Queued,
    BackingUp,
    BackedUp,
    Restoring,
    Removed,
    Expunged,
    Failed,
    Error,
}

/// State of a backup's compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum CompressionState {
    Uncompressed,
    Compressing,
    FinalizingCompression,
    Compressed,
    CompressionError,
}

/// State of a backup's validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum ValidationState {
    NotValidated,
    Validating,
    Valid,
    NotValid,
    UnableToValidate,
}

macro_rules! display_as_debug {
    ($($t:ty),*) => { $(impl std::fmt::Display for $t {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(&format!("{self:?}")) }
    })* };
}
display_as_debug!(BackupState, CompressionState, ValidationState);

macro_rules! display_as_lower {
    ($($t:ty),*) => { $(impl std::fmt::Display for $t {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.pad(&format!("{self:?}").to_ascii_lowercase())
        }
    })* };
}
display_as_lower!(Kind, ImageFormat, Compression);

impl Manifest {
    /// The disk of that name.
    pub fn disk(&self, name: &DiskName) -> Option<&Disk> {
        self.disks.iter().find(|d| d.name == *name)
    }

    /// The disk of that volume.
    pub fn disk_of(&self, volume: VolumeId) -> Option<&Disk> {
        self.disks.iter().find(|d| d.volume == volume)
    }

    /// Whether it is to be listed: `Removed` ones are kept only for their children.
    pub fn is_listed(&self) -> bool {
        !matches!(self.state, BackupState::Removed | BackupState::Expunged)
    }

    /// Bytes of its images in the store.
    pub fn stored_size(&self) -> u64 {
        self.disks.iter().fold(0, |sum, d| sum.saturating_add(d.file_size))
    }
}

/// What no part of the program can handle is refused where it is read. Bytes.
const MAX_VIRTUAL: u64 = i64::MAX as u64;

impl Record for Manifest {
    const FORMAT: u64 = 1;

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut volumes = BTreeSet::new();
        for disk in &self.disks {
            if !names.insert(&disk.name) || !volumes.insert(disk.volume) {
                return Err(format!("disk {} is there twice", disk.name));
            }
            if disk.virtual_size > MAX_VIRTUAL || disk.file_size > MAX_VIRTUAL {
                return Err(format!("disk {} has an impossible size", disk.name));
            }
            if disk.depth == 0 || disk.depth > 200 {
                return Err(format!("disk {} has an impossible depth of {}", disk.name, disk.depth));
            }
            match disk.kind {
                Kind::Full if disk.depth != 1 => {
                    return Err(format!("disk {} is full but not of depth 1", disk.name));
                }
                Kind::Incremental if disk.depth == 1 || self.parent.is_none() => {
                    return Err(format!("disk {} is incremental but stands on nothing", disk.name));
                }
                _ => {}
            }
        }
        if self.parent.as_ref().is_some_and(|p| p.id == self.id || p.name == self.name) {
            return Err("it is its own parent".into());
        }
        if self.isolated && self.parent.is_some() {
            return Err("it is isolated and has a parent".into());
        }
        Ok(())
    }
}
