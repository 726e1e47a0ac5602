//! What is known before a backup: the VM's volumes as they are now, and what the next backup of each will be.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use super::BackupError;
use crate::chain::{Method, Next, Plan, StoredFile, VolumeNow, foreign_base, plan};
use crate::hypervisor::{Guest, GuestVolume, ImageRef};
use crate::ops::hypervisor::{new_volume, target};
use crate::store::manifest::{Disk, Manifest, PrimaryImage};
use crate::store::sums::{Sums, SumsCache};
use crate::store::vm::{Source, Track, Volume};
use crate::store::{DiskName, Store, StoreError, VmRecord, VolumeId};

/// A volume that takes part.
pub(super) struct Taken {
    pub volume: Volume,
    pub target: String,
    pub now: VolumeNow,
    pub block_device: bool,
}

/// How changes of a VM's disks are found.
pub(super) fn method(record: &VmRecord) -> Method {
    match record.source {
        Source::Disks { track: Track::Scan } => Method::Scan,
        _ => Method::Delta,
    }
}

/// Brings the record's volumes up to what the VM has now.
pub(crate) fn refresh(record: &mut VmRecord, guest: &Guest) -> Result<(), BackupError> {
    for volume in &mut record.volumes {
        let found = guest.volumes.iter().find(|g| g.target == target(volume));
        volume.detached = found.is_none();
        if let Some((found, live)) = found.and_then(|f| f.chain.first().map(|live| (f, live))) {
            volume.path.clone_from(&live.path);
            volume.format = live.format;
            volume.block_device = found.block_device;
        }
    }
    for found in &guest.volumes {
        let name = DiskName::new(&*found.target).map_err(StoreError::from)?;
        let known = record.volumes.iter().any(|v| target(v) == found.target || v.name == name);
        let Some(live) = found.chain.first().filter(|_| !known && !record.exclude.contains(&name)) else {
            continue;
        };
        record.volumes.push(new_volume(name, found, live));
    }
    Ok(())
}

/// Refuses what must not be backed up now.
pub(super) fn check(record: &VmRecord, guest: &Guest) -> Result<(), BackupError> {
    trouble(record, guest).map_or(Ok(()), |why| Err(BackupError::refused(&record.name, why)))
}

/// Why the state of the VM's disks cannot be taken now, if so.
pub(crate) fn trouble(record: &VmRecord, guest: &Guest) -> Option<String> {
    if guest.managed_save {
        let why = "its memory was saved by `virsh managedsave`: start it, or `virsh managedsave-remove` it";
        return Some(why.to_owned());
    }
    let excluded = |target: &str| record.exclude.iter().any(|name| name.as_str() == target);
    if let Some(refused) = guest.refused.iter().find(|r| !excluded(&r.target)) {
        let way_out = if record.volumes.iter().any(|v| target(v) == refused.target) {
            "put back what is missing or was changed"
        } else {
            "detach it, or add the VM anew without it (`vm add --exclude-disk`)"
        };
        return Some(format!("its disk {} {}; {way_out}, then try again", refused.target, refused.reason));
    }
    None
}

/// The volumes that take part, as they are now.
pub(super) fn look(
    store: &Store,
    record: &VmRecord,
    guest: &Guest,
    history: &[Manifest],
) -> Result<Vec<Taken>, BackupError> {
    let mut all = Vec::new();
    for volume in record.attached().filter(|v| !record.exclude.contains(&v.name)) {
        let target = target(volume);
        let Some(found) = guest.volumes.iter().find(|g| g.target == target) else { continue };
        let images = images(record, volume.id, found)?;
        let now = VolumeNow {
            id: volume.id,
            name: volume.name.clone(),
            virtual_size: images.first().map_or(0, |i| i.virtual_size),
            images,
            stored: stored(store, record, volume.id, history),
        };
        all.push(Taken { volume: volume.clone(), target, now, block_device: found.block_device });
    }
    if all.is_empty() {
        return Err(BackupError::refused(&record.name, "it has no disk that can be backed up"));
    }
    Ok(all)
}

/// Refuses a volume whose delta of ours stands on an image that it was not made on. An isolated backup takes the disk
/// as it is, and the delta is ours no longer: the next backup of the chain is full.
pub(super) fn check_bases(record: &VmRecord, taken: &mut [Taken], isolated: bool) -> Result<(), BackupError> {
    for volume in taken {
        let Some(left) = record.tracking.volumes.get(&volume.volume.id) else { continue };
        let Some(foreign) = foreign_base(left, &volume.now.images) else { continue };
        if !isolated {
            let name = &volume.volume.name;
            let vm = &record.name;
            let why = format!(
                "the disk {name} may not hold what its guest wrote: {foreign}; put the right image back, or, if the disk is right as it is, take it so with `knibfs backup {vm} --isolated`, after which the next backup is full"
            );
            return Err(BackupError::refused(vm, why));
        }
        volume.now.images.iter_mut().for_each(|image| image.owner = None);
    }
    Ok(())
}

/// Deltas of ours that another tool took out of their chains, in words. They may hold data: nobody deletes them.
pub(super) fn left_behind(record: &VmRecord, taken: &[Taken]) -> Vec<String> {
    let mut notes = Vec::new();
    for volume in taken {
        let left = record.tracking.volumes.get(&volume.volume.id).map(|l| l.images.as_slice());
        for delta in left.unwrap_or_default().iter().filter(|image| image.owner.is_some()) {
            let gone = volume.now.images.iter().all(|image| image.path != delta.path);
            if gone && delta.path.exists() {
                notes.push(format!(
                    "{}, a delta of knibfs, is no part of the disk {} any more, as another tool took it out: delete it when you know that nothing needs it",
                    delta.path.display(),
                    volume.volume.name
                ));
            }
        }
    }
    notes
}

/// Decides what each volume will be.
pub(super) fn decide(
    record: &VmRecord,
    chain_size: i64,
    isolated: bool,
    history: &[Manifest],
    taken: &[Taken],
) -> Plan {
    let volumes: Vec<VolumeNow> = taken.iter().map(|t| t.now.clone()).collect();
    plan(&Next {
        chain_size,
        isolated,
        method: method(record),
        history,
        tracking: &record.tracking,
        volumes: &volumes,
    })
}

fn images(record: &VmRecord, id: VolumeId, found: &GuestVolume) -> Result<Vec<PrimaryImage>, BackupError> {
    let left = record.tracking.volumes.get(&id).map(|t| t.images.as_slice()).unwrap_or_default();
    let mut images = Vec::new();
    for image in &found.chain {
        let mut seen = match primary(image) {
            Err(BackupError::Store(gone)) if gone.is_not_found() => {
                let why = format!(
                    "{}, an image of its disk {}, is gone: put it back, or, while the VM runs and still has it open, copy the disk to a new file with `virsh blockcopy`",
                    image.path.display(),
                    found.target
                );
                return Err(BackupError::refused(&record.name, why));
            }
            seen => seen?,
        };
        seen.owner = left
            .iter()
            .find(|i| i.path == seen.path && (i.device, i.inode) == (seen.device, seen.inode))
            .and_then(|i| i.owner);
        images.push(seen);
    }
    Ok(images)
}

/// An image as it is now, owned by no backup.
pub(crate) fn primary(image: &ImageRef) -> Result<PrimaryImage, BackupError> {
    let path = &image.path;
    let meta = std::fs::metadata(path).map_err(StoreError::io("look at", path))?;
    Ok(PrimaryImage {
        path: path.clone(),
        format: image.format,
        device: meta.dev(),
        inode: meta.ino(),
        virtual_size: virtual_size(image)?,
        modified: meta
            .is_file()
            .then(|| meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec())),
        owner: None,
    })
}

fn virtual_size(image: &ImageRef) -> Result<u64, BackupError> {
    use crate::store::manifest::ImageFormat;
    let size = knib_qcow::FileStorage::open(&image.path, knib_qcow::Access::Read).and_then(|file| {
        use knib_qcow::Storage as _;
        match image.format {
            ImageFormat::Qcow2 => knib_qcow::Header::parse(&*file).map(|h| h.size),
            ImageFormat::Raw => {
                file.len().map_err(|e| knib_qcow::Error::io(&image.path, "asking for the length", e))
            }
        }
    });
    size.map_err(|e| BackupError::Store(StoreError::Invalid(e.to_string())))
}

/// The disk's sums files from the current backup down, checked with their images.
pub(super) fn sums_chain(
    store: &Store,
    record: &VmRecord,
    volume: VolumeId,
    history: &[Manifest],
) -> Result<Vec<Arc<Sums>>, StoredFile> {
    let cache = SumsCache::new(64 << 20);
    let mut layers = Vec::new();
    for (manifest, disk) in disk_chain(record, volume, history)? {
        let image = store.disk_path(&record.name, &manifest.name, &disk.name);
        let path = store.sums_path(&record.name, &manifest.name, &disk.name);
        check_len(&image, disk.file_size)?;
        if !path.exists() {
            return Err(StoredFile::Missing);
        }
        let sums = Sums::open_checked(&path, &disk.sums_digest, cache.clone())
            .map_err(|e| StoredFile::Damaged(e.to_string()))?;
        if sums.info().image_len != disk.file_size {
            return Err(StoredFile::Damaged(format!("{} is of another image", path.display())));
        }
        layers.push(Arc::new(sums));
    }
    Ok(layers)
}

/// The disk's files in the store from the current backup down.
fn disk_chain<'a>(
    record: &VmRecord,
    volume: VolumeId,
    history: &'a [Manifest],
) -> Result<Vec<(&'a Manifest, &'a Disk)>, StoredFile> {
    let mut chain = Vec::new();
    let mut next = record.tracking.current.as_ref().map(|c| c.id);
    while let Some(id) = next {
        let Some(manifest) = history.iter().find(|m| m.id == id) else { return Err(StoredFile::Missing) };
        let Some(disk) = manifest.disk_of(volume) else { return Err(StoredFile::Missing) };
        if chain.len() > 200 {
            return Err(StoredFile::Damaged("its manifests stand on one another without an end".into()));
        }
        chain.push((manifest, disk));
        next = manifest.parent.as_ref().filter(|_| disk.depth > 1).map(|p| p.id);
    }
    Ok(chain)
}

/// Reads all checksums that a scan of the disk compares with, and records those that are damaged; whether any is.
pub(super) fn find_damaged_sums(
    store: &Store,
    record: &VmRecord,
    volume: VolumeId,
    history: &[Manifest],
) -> Result<bool, BackupError> {
    let cache = SumsCache::new(1 << 20);
    let mut found = false;
    for (manifest, disk) in disk_chain(record, volume, history).unwrap_or_default() {
        let path = store.sums_path(&record.name, &manifest.name, &disk.name);
        let read = Sums::open_checked(&path, &disk.sums_digest, cache.clone())
            .and_then(|sums| sums.regions().try_for_each(|region| region.map(drop)));
        if let Err(error) = read {
            store.note_damage(&record.name, manifest.id, &disk.name, Some(&error.to_string()))?;
            found = true;
        }
    }
    Ok(found)
}

fn check_len(path: &Path, expected: u64) -> Result<(), StoredFile> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() == expected => Ok(()),
        Ok(meta) => Err(StoredFile::Damaged(format!("it is {} bytes long, not {expected}", meta.len()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(StoredFile::Missing),
        Err(e) => Err(StoredFile::Damaged(e.to_string())),
    }
}

fn stored(store: &Store, record: &VmRecord, volume: VolumeId, history: &[Manifest]) -> StoredFile {
    if let Err(why) = sums_chain(store, record, volume, history) {
        return why;
    }
    // Row "when in doubt, full": what cannot be read says nothing good either.
    let known = match store.known_damage(&record.name) {
        Ok(known) => known,
        Err(error) => return StoredFile::Damaged(error.to_string()),
    };
    let chain = disk_chain(record, volume, history).unwrap_or_default();
    match chain.iter().find_map(|(manifest, disk)| known.of(manifest.id, &disk.name)) {
        Some(damaged) => StoredFile::Damaged(damaged.what.clone()),
        None => StoredFile::Sound,
    }
}
