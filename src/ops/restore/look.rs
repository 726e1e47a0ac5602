//! What is known before a restore: where the volumes lie now, who else has them, how much room there is.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use knib_qcow::Source as _;

use super::{Options, RestoreError};
use crate::chain::restore::{BackupNow, HostNow, Room, VmNow};
use crate::hypervisor::xml::{self, Fate};
use crate::hypervisor::{Definition, Guest, Hypervisor, ImageRef, Power, identity};
use crate::ops::disk_source::DiskSource;
use crate::ops::hypervisor::{host_trouble, is_block, same_file, target};
use crate::store::manifest::{Disk, ImageFormat, Manifest};
use crate::store::vm::{Source, Volume};
use crate::store::{BackupId, DiskName, Store, StoreError, VmRecord};
use crate::verified::VerifiedReader;

/// Metadata of a new image: one part in so many of its data, and this many bytes.
const METADATA_PART: u64 = 1000;
const METADATA: u64 = 2 << 20;

/// An image on primary, and the backup that left it if one did.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub image: ImageRef,
    pub owner: Option<BackupId>,
}

/// A volume as it lies on primary.
#[derive(Debug, Clone)]
pub(super) struct Lies {
    /// Live image first; never empty.
    pub layers: Vec<Layer>,
    /// Which of them is the volume itself: what lies above are deltas, what lies below is not the volume's own.
    pub own: usize,
}

impl Lies {
    pub fn own(&self) -> Option<&Layer> {
        self.layers.get(self.own)
    }

    /// The images that the restore replaces.
    pub fn replaced(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().take(self.own + 1)
    }
}

/// Where a volume of the VM lies now; none where it is no disk of it.
pub(super) fn lies(record: &VmRecord, guest: &Guest, volume: &Volume) -> Option<Lies> {
    let name = target(volume);
    let left = record.tracking.volumes.get(&volume.id).map(|t| t.images.as_slice()).unwrap_or_default();
    let known: Vec<ImageRef> =
        left.iter().map(|i| ImageRef { path: i.path.clone(), format: i.format }).collect();
    let chain = match guest.volumes.iter().find(|v| v.target == name) {
        Some(found) => found.chain.clone(),
        None => {
            // It may be there and be damaged, or its file gone: that is what backups are for.
            let live = broken(record, guest, volume, &name)?;
            if known.first().is_some_and(|first| first.path == live.path) { known } else { vec![live] }
        }
    };
    let layers: Vec<Layer> = chain
        .into_iter()
        .map(|image| {
            let seen = identity(&image.path);
            let was = left
                .iter()
                .find(|i| i.path == image.path && seen.is_none_or(|seen| seen == (i.device, i.inode)));
            Layer { owner: was.and_then(|i| i.owner), image }
        })
        .collect();
    let deepest = layers.iter().rposition(|l| l.owner.is_some());
    let own = deepest.map_or(0, |at| (at + 1).min(layers.len().saturating_sub(1)));
    (!layers.is_empty()).then_some(Lies { layers, own })
}

/// The live image of a disk whose chain cannot be read.
fn broken(record: &VmRecord, guest: &Guest, volume: &Volume, name: &str) -> Option<ImageRef> {
    guest.refused.iter().find(|r| r.target == name)?;
    if matches!(record.source, Source::Disks { .. }) {
        return Some(ImageRef { path: volume.path.clone(), format: volume.format });
    }
    let disk = xml::parse(&guest.xml).ok()?.disks.into_iter().find(|d| d.target == name)?;
    let format = xml::image_format(disk.driver_type.as_deref().unwrap_or("raw"))?;
    let path = disk.source.path().filter(|_| disk.fate == Fate::Taken)?;
    Some(ImageRef { path: path.to_owned(), format })
}

/// Who else has the images that are replaced: other VMs, and VM snapshots.
pub(super) fn users(
    store: &Store,
    record: &VmRecord,
    guest: &Guest,
    hypervisor: &dyn Hypervisor,
    name: &str,
    lies: &Lies,
) -> Result<(Vec<String>, Vec<String>), RestoreError> {
    let (mut others, mut snapshots) = (Vec::new(), Vec::new());
    for layer in lies.replaced() {
        let path = &layer.image.path;
        let found = match hypervisor.users_of(path) {
            // The chain of a plain disk file that cannot be read names nobody.
            Err(_) if guest.uuid.is_none() => Vec::new(),
            found => found?,
        };
        for user in found {
            match &user.definition {
                Definition::Snapshot(snapshot) if user.uuid == guest.uuid => snapshots.push(snapshot.clone()),
                _ if user.uuid != guest.uuid || user.target != name => others.push(user.to_string()),
                _ => {}
            }
        }
        for vm in store.vms()?.into_iter().filter(|vm| *vm != record.name) {
            // A record that cannot be read says nothing about its disks; QEMU's locks still do.
            let Ok(other) = store.vm(&vm) else { continue };
            if other.id != record.id && other.attached().any(|v| same_file(&v.path, path)) {
                others.push(format!("the VM {vm} of this store"));
            }
        }
        if path.exists() {
            crate::hypervisor::Images::check_unused(&crate::ops::images::EngineImages, &layer.image)?;
        }
    }
    Ok((others, snapshots))
}

/// The backup, and its disks opened for reading: each file it needs is there and is the right one.
pub(super) fn backup(
    store: &Store,
    reader: &VerifiedReader,
    manifest: &Manifest,
    only: Option<&DiskName>,
) -> (BackupNow, Vec<DiskSource>) {
    let mut sources = Vec::new();
    let mut damage = None;
    for disk in manifest.disks.iter().filter(|d| only.is_none_or(|o| d.name == *o)) {
        match DiskSource::open(store, reader, manifest, &disk.name) {
            Ok(source) => sources.push(source),
            Err(why) => {
                damage.get_or_insert(format!("disk {}: {why}", disk.name));
            }
        }
    }
    let now = BackupNow {
        name: format!("{}/{}", manifest.vm, manifest.name),
        state: manifest.state,
        compression: manifest.compression,
        validation: manifest.validation,
        damage,
    };
    (now, sources)
}

/// The VM that gets the volumes.
pub(super) fn vm(store: &Store, record: &VmRecord, guest: Option<&Guest>) -> Result<VmNow, RestoreError> {
    let offering = record.offering.map(|id| store.offering(id)).transpose()?;
    Ok(VmNow {
        name: record.name.to_string(),
        running: guest.is_some_and(|g| g.power != Power::Off),
        saved: guest.is_some_and(|g| g.managed_save),
        has_domain: matches!(record.source, Source::Domain { .. }),
        offering: offering.map(|o| (o.name, o.allow_quick_restore)),
    })
}

/// The host that was named, and its URI.
pub(super) fn host(
    store: &Store,
    name: &str,
    own: Option<&str>,
) -> Result<(HostNow, Option<String>), RestoreError> {
    let found = match store.host(name) {
        Ok(found) => found,
        Err(e) if e.is_not_found() => {
            return Ok((HostNow { name: name.into(), trouble: Some(e.to_string()), is_own: false }, None));
        }
        Err(e) => return Err(e.into()),
    };
    let is_own = own == Some(found.uri.as_str());
    Ok((HostNow { name: name.into(), trouble: host_trouble(&found.uri), is_own }, Some(found.uri)))
}

/// The host that was asked for to start `record`'s VM on, and its URI.
pub(super) fn asked_host(
    store: &Store,
    options: &Options,
    record: &VmRecord,
) -> Result<(Option<HostNow>, Option<String>), RestoreError> {
    let Some(name) = &options.host else { return Ok((None, None)) };
    let own = match &record.source {
        Source::Domain { uri, .. } => Some(uri.as_str()),
        Source::Disks { .. } => None,
    };
    let (host, uri) = host(store, name, own)?;
    Ok((Some(host), uri))
}

/// The size that was asked for.
pub(super) fn wanted(options: &Options, disk: &DiskName) -> Option<u64> {
    let of = |named: bool| {
        options
            .sizes
            .iter()
            .find(|(name, _)| if named { name.as_ref() == Some(disk) } else { name.is_none() })
    };
    of(true).or_else(|| of(false)).map(|(_, size)| *size)
}

/// Bytes of data that a disk of the backup holds, with what an image needs beside.
pub(super) fn data(source: &DiskSource) -> knib_qcow::Result<u64> {
    let (mut at, mut sum) = (0, 0u64);
    while let Some(run) = source.next(at)? {
        sum = sum.saturating_add(run.len);
        at = run.start.saturating_add(run.len);
    }
    Ok(sum.saturating_add(sum / METADATA_PART).saturating_add(METADATA))
}

/// What is to be written, summed for each file system.
pub(super) fn room(wanted: &[(PathBuf, u64)]) -> Result<Vec<Room>, RestoreError> {
    let mut all: Vec<(u64, Room)> = Vec::new();
    for (folder, bytes) in wanted {
        let io = |doing| move |e: std::io::Error| StoreError::io(doing, folder)(e);
        let device = std::fs::metadata(folder).map_err(io("look at"))?.dev();
        if let Some((_, room)) = all.iter_mut().find(|(d, _)| *d == device) {
            room.wanted = room.wanted.saturating_add(*bytes);
            continue;
        }
        let found = rustix::fs::statvfs(folder).map_err(|e| io("ask for the free space of")(e.into()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        all.push((device, Room { folder: folder.clone(), free, wanted: *bytes }));
    }
    Ok(all.into_iter().map(|(_, room)| room).collect())
}

/// Size of a block device in bytes.
pub(super) fn device_size(path: &Path) -> Result<u64, RestoreError> {
    use knib_qcow::Storage as _;
    let size = knib_qcow::FileStorage::open(path, knib_qcow::Access::Read)
        .and_then(|file| file.len().map_err(|e| knib_qcow::Error::io(path, "asking for the size", e)));
    size.map_err(|e| RestoreError::write(path, e))
}

/// Folder and format of a volume that is made.
pub(super) fn new_place(
    options: &Options,
    disk: &Disk,
    beside: Option<&Path>,
) -> Result<(PathBuf, ImageFormat), RestoreError> {
    let plain = disk.primary.format == ImageFormat::Raw && !options.quick;
    let format = if plain { ImageFormat::Raw } else { ImageFormat::Qcow2 };
    if let Some(folder) = &options.storage {
        return Ok((folder.clone(), format));
    }
    let was = &disk.primary.path;
    let folder = beside.filter(|p| !is_block(p)).or(Some(was.as_path())).and_then(Path::parent);
    match folder {
        Some(folder) if folder.is_dir() && !folder.starts_with("/dev") => Ok((folder.to_owned(), format)),
        _ => Err(RestoreError::cannot(
            &disk.name,
            format!("it was on {}, where no file can be made: name a folder with --storage", was.display()),
        )),
    }
}
