//! What snapshots there are, and which of them a VM's disks stand on.

use std::path::PathBuf;

use jiff::Timestamp;

use super::{Scope, SnapshotError, tree};
use crate::hypervisor::{ImageRef, backing_chain};
use crate::ops::backup::primary;
use crate::store::manifest::ImageFormat;
use crate::store::snapshot::Snapshot;
use crate::store::vm::Volume;
use crate::store::{DiskName, SnapshotId, SnapshotName, Store, VmName, VmRecord};

/// One snapshot.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Listed {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// Its VM.
    pub vm: VmName,
    /// The disk that it is of; none for one of the VM.
    pub disk: Option<DiskName>,
    /// The snapshot below it.
    pub parent: Option<SnapshotId>,
    /// The point in time that it shows.
    pub created: Timestamp,
    /// The guest's file systems were frozen then.
    pub quiesced: bool,
    /// It was removed, and is kept for what stands on it.
    pub removed: bool,
    /// It is the nearest that the disks stand on now.
    pub current: bool,
    /// Its disks.
    pub volumes: Vec<ListedDisk>,
}

/// One disk of a snapshot.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ListedDisk {
    /// Its name.
    pub name: String,
    /// The image that shows it, with all below it.
    pub path: PathBuf,
    /// That image's format.
    pub format: ImageFormat,
    /// It is gone, or another file.
    pub missing: bool,
}

/// The snapshots of a VM, or of its disks, the oldest first; with removed ones that are kept.
///
/// # Errors
/// The VM or the disk is not known.
pub fn list(store: &Store, scope: &Scope, of_disks: bool) -> Result<Vec<Listed>, SnapshotError> {
    let record = store.vm(&scope.vm)?;
    let volume = scope.volume(&record)?.map(|v| v.id);
    let now = below(&record, |v| backing_chain(&v.path, v.format).ok());
    let wanted = |s: &&Snapshot| match volume {
        Some(volume) => s.disk == Some(volume),
        None => s.disk.is_some() == of_disks,
    };
    let name = |id| record.volumes.iter().find(|v| v.id == id).map(|v| v.name.clone());
    let listed = |s: &Snapshot| Listed {
        id: s.id,
        name: s.name.clone(),
        vm: record.name.clone(),
        disk: s.disk.and_then(name),
        parent: s.parent,
        created: s.created,
        quiesced: s.quiesced,
        removed: s.removed,
        current: now == Some(s.id),
        volumes: s
            .volumes
            .iter()
            .map(|f| ListedDisk {
                name: name(f.volume).map_or_else(|| f.volume.to_string(), |n| n.to_string()),
                path: f.image.path.clone(),
                format: f.image.format,
                missing: !tree::is_there(&f.image),
            })
            .collect(),
    };
    Ok(record.snapshots.iter().filter(wanted).map(listed).collect())
}

/// The nearest snapshot that the disks stand on, if `chain` gives the images of each.
pub(super) fn below(
    record: &VmRecord,
    chain: impl Fn(&Volume) -> Option<Vec<ImageRef>>,
) -> Option<SnapshotId> {
    record.attached().find_map(|volume| {
        let images = chain(volume)?;
        images.iter().filter_map(|i| primary(i).ok()).find_map(|image| {
            let shows = |s: &&Snapshot| {
                s.frozen(volume.id)
                    .is_some_and(|f| (f.image.inode, f.image.device) == (image.inode, image.device))
            };
            // The latest of those that show the same.
            record.snapshots.iter().rev().find(shows).map(|s| s.id)
        })
    })
}
