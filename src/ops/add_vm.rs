//! Adding a VM to a store: its disks are looked at and refused where they could not be backed up. Nothing on primary changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use knib_qcow::{Chain, PlainPaths};

use super::hypervisor::new_volume;
use super::images::{self, EngineImages};
use crate::hypervisor::{Guest, HypervisorError, ImageRef, Images as _};
use crate::img::open::other_format;
use crate::store::manifest::ImageFormat;
use crate::store::vm::{Source, Track, VmRecord, Volume};
use crate::store::{DiskName, Store, StoreError, VmId, VmName, VolumeId};

/// What is common to both ways of adding a VM.
#[derive(Debug, Clone)]
pub struct NewVm {
    /// Its name in the store.
    pub name: VmName,
    /// An offering's name or id.
    pub offering: Option<String>,
    /// Disks that are not backed up.
    pub exclude: Vec<DiskName>,
    /// Folder for deltas instead of beside each volume.
    pub delta_dir: Option<PathBuf>,
}

/// Why a VM is not added. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A disk that is no disk.
    #[error("cannot use {} as the disk {name}: {why}", path.display())]
    Disk {
        /// The disk.
        name: DiskName,
        /// Its path as given.
        path: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
    /// A domain that will not do.
    #[error("cannot add the domain {domain}: {why}")]
    Domain {
        /// The domain.
        domain: String,
        /// Why not, and what to do.
        why: String,
    },
    /// A disk of a domain that will not do.
    #[error("cannot back up the disk {target} on {}: {why}", path.display())]
    Target {
        /// Device in the guest.
        target: String,
        /// Its live image.
        path: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
    /// A folder for deltas that will not do.
    #[error("cannot use {} for deltas: {why}", path.display())]
    DeltaDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Every disk is excluded.
    #[error("every disk is excluded: nothing would be backed up")]
    NothingLeft,
    /// An exclusion that excludes nothing.
    #[error("cannot exclude {name}: the VM has no such disk; it has {disks}")]
    NothingToExclude {
        /// The name given.
        name: DiskName,
        /// The names that there are.
        disks: String,
    },
}

/// Adds a VM whose disks are image files that no libvirt domain owns.
pub fn add_disks(
    store: &Store,
    new: &NewVm,
    disks: &[(DiskName, PathBuf)],
    track: Track,
) -> Result<VmRecord, AddError> {
    let mut volumes: Vec<Volume> = Vec::new();
    let mut seen: BTreeMap<(u64, u64), &DiskName> = BTreeMap::new();
    for (name, given) in disks {
        let refuse = |why: String| AddError::Disk { name: name.clone(), path: given.clone(), why };
        if volumes.iter().any(|v| v.name == *name) {
            return Err(refuse("another disk has that name already: give each its own".into()));
        }
        if new.exclude.contains(name) {
            continue;
        }
        let (volume, identity) = look_at(store, name, given, track).map_err(&refuse)?;
        if let Some(other) = seen.insert(identity, name) {
            return Err(refuse(format!("it is the same file as the disk {other}")));
        }
        volumes.push(volume);
    }
    let names: Vec<&str> = disks.iter().map(|(name, _)| name.as_str()).collect();
    check_exclusions(new, &names)?;
    if volumes.is_empty() {
        return Err(AddError::NothingLeft);
    }
    finish(store, new, VmId::random(), Source::Disks { track }, volumes)
}

/// Adds a libvirt domain as `guest` found it on the host `uri`.
pub fn add_domain(store: &Store, new: &NewVm, uri: &str, guest: &Guest) -> Result<VmRecord, AddError> {
    let no_domain = || AddError::Domain { domain: guest.name.clone(), why: "it has no UUID".into() };
    let id = VmId::from(guest.uuid.ok_or_else(no_domain)?);
    if let Some(other) = known_as(store, id)? {
        let why = match other.removed {
            None => format!("the store knows it already, as the VM {}", other.name),
            // Its backups go on where they are.
            Some(_) if other.name == new.name => String::new(),
            Some(_) => format!(
                "the store has its backups from before it was removed: add it as {}, as it was called then",
                other.name
            ),
        };
        if !why.is_empty() {
            return Err(AddError::Domain { domain: guest.name.clone(), why });
        }
    }
    let disk = |target: &str, path: &Path, why: String| AddError::Target {
        target: target.into(),
        path: path.into(),
        why,
    };
    let excluded = |target: &str| new.exclude.iter().any(|name| name.as_str() == target);
    // What cannot be backed up is refused here, not found out by the first backup.
    if let Some(refused) = guest.refused.iter().find(|r| !excluded(&r.target)) {
        let target = &refused.target;
        let why = format!("because it {}; leave it out with `--exclude-disk {target}`", refused.reason);
        return Err(AddError::Domain {
            domain: guest.name.clone(),
            why: format!("its disk {target} is refused {why}"),
        });
    }
    let mut volumes = Vec::new();
    for found in guest.volumes.iter().filter(|v| !excluded(&v.target)) {
        let Some(live) = found.chain.first() else { continue };
        nameable(&live.path).map_err(|why| disk(&found.target, &live.path, why))?;
        let name = DiskName::new(&*found.target).map_err(StoreError::from)?;
        volumes.push(new_volume(name, found, live));
    }
    let others = guest.skipped.iter().chain(&guest.refused).map(|d| d.target.as_str());
    let names: Vec<&str> = guest.volumes.iter().map(|v| v.target.as_str()).chain(others).collect();
    check_exclusions(new, &names)?;
    if volumes.is_empty() {
        let why = "it has no disk that can be backed up".into();
        return Err(AddError::Domain { domain: guest.name.clone(), why });
    }
    let source = Source::Domain { uri: uri.into(), domain: guest.name.clone() };
    finish(store, new, id, source, volumes)
}

/// As what the store knows the domain.
fn known_as(store: &Store, id: VmId) -> Result<Option<VmRecord>, AddError> {
    for name in store.vms()? {
        let record = store.vm(&name)?;
        if record.id == id {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

/// What both ways end with.
fn finish(
    store: &Store,
    new: &NewVm,
    id: VmId,
    source: Source,
    volumes: Vec<Volume>,
) -> Result<VmRecord, AddError> {
    let record = VmRecord {
        volumes,
        offering: offering(store, new)?,
        exclude: new.exclude.clone(),
        delta_dir: delta_dir(new)?,
        ..VmRecord::new(id, new.name.clone(), source)
    };
    match store.vm(&new.name) {
        Ok(removed) if removed.removed.is_some() => take_back(store, record),
        _ => {
            store.create_vm(&record)?;
            Ok(record)
        }
    }
}

/// A VM that was removed and has backups still: just its own domain may have its name again.
fn take_back(store: &Store, record: VmRecord) -> Result<VmRecord, AddError> {
    let name = record.name.clone();
    let _lock = store.lock_vm(&name, &format!("vm add {name}"))?;
    let before = store.vm(&name)?;
    if before.removed.is_none() || before.id != record.id {
        let what = format!(
            "the name {name} is that of a VM that was removed and whose backups are kept: choose another, or delete those first"
        );
        return Err(StoreError::Invalid(what).into());
    }
    let mut volumes = before.volumes;
    for new in record.volumes {
        match volumes.iter_mut().find(|known| known.name == new.name) {
            // Backups know it by its identity.
            Some(known) => *known = Volume { id: known.id, ..new },
            None => volumes.push(new),
        }
    }
    let record = VmRecord {
        volumes,
        next_sequence: before.next_sequence,
        tracking: before.tracking,
        snapshots: before.snapshots,
        layers: before.layers,
        ..record
    };
    store.save_vm(&record)?;
    Ok(record)
}

/// Each name in `exclude` must be one of the disks: a typing error would back up what should not be.
fn check_exclusions(new: &NewVm, disks: &[&str]) -> Result<(), AddError> {
    match new.exclude.iter().find(|name| !disks.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(AddError::NothingToExclude { name: name.clone(), disks: disks.join(", ") }),
    }
}

fn offering(store: &Store, new: &NewVm) -> Result<Option<crate::store::OfferingId>, AddError> {
    Ok(new.offering.as_deref().map(|o| store.find_offering(o)).transpose()?.map(|o| o.id))
}

fn delta_dir(new: &NewVm) -> Result<Option<PathBuf>, AddError> {
    let Some(path) = &new.delta_dir else { return Ok(None) };
    let refuse = |why: String| AddError::DeltaDir { path: path.clone(), why };
    let real = path.canonicalize().map_err(|e| refuse(e.to_string()))?;
    if !real.is_dir() {
        return Err(refuse("it is not a folder".into()));
    }
    nameable(&real).map_err(refuse)?;
    Ok(Some(real))
}

/// QEMU and libvirt parse colons and commas in paths.
fn nameable(path: &Path) -> Result<(), String> {
    match path.to_str() {
        None => Err("its path is not UTF-8".into()),
        Some(p) if p.contains([':', ',']) || p.chars().any(char::is_control) => {
            Err("its path holds a colon, a comma or a control character, which QEMU cannot take: rename it"
                .into())
        }
        Some(_) => Ok(()),
    }
}

/// One disk file: what it is and which file it is, or why it cannot be used.
fn look_at(
    store: &Store,
    name: &DiskName,
    given: &Path,
    track: Track,
) -> Result<(Volume, (u64, u64)), String> {
    let path = given.canonicalize().map_err(|e| match e.kind() {
        ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => e.to_string(),
    })?;
    if path.starts_with(store.root()) {
        return Err("it lies in the store: name the VM's own disk".into());
    }
    let found = fs::metadata(&path).map_err(|e| e.to_string())?;
    let block_device = found.file_type().is_block_device();
    if !found.is_file() && !block_device {
        return Err("it is neither a file nor a block device".into());
    }
    let format = probe(&path)?;
    check_image(&path, format)?;
    if track == Track::Overlay {
        if format != ImageFormat::Qcow2 || block_device {
            return Err("overlays need a qcow2 file under the disk's own path: use `--track scan`".into());
        }
        nameable(&path)?;
    }
    let volume = Volume {
        id: VolumeId::random(),
        name: name.clone(),
        path,
        format,
        target: None,
        serial: None,
        block_device,
        detached: false,
    };
    Ok((volume, (found.dev(), found.ino())))
}

/// Whether a file that a person named begins as qcow2 does; backing files are never probed.
fn probe(path: &Path) -> Result<ImageFormat, String> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(512).read_to_end(&mut head))
        .map_err(|e| format!("it cannot be read: {e}"))?;
    match other_format(&head) {
        Some("LUKS") => Err(
            "it is encrypted with LUKS: leave it out with `--exclude-disk`, or, if it is the guest that encrypted its whole disk, add the VM by its domain (`--domain`), which says that the disk is raw"
                .into(),
        ),
        Some(other) => Err(format!(
            "it is a {other} image, and only raw and qcow2 are backed up: convert it (`qemu-img convert -O qcow2`), or, if the guest really sees these bytes, add the VM by its domain (`--domain`), which says that the disk is raw"
        )),
        None if head.starts_with(b"QFI\xfb") => Ok(ImageFormat::Qcow2),
        None => Ok(ImageFormat::Raw),
    }
}

/// Whether nobody writes to the image and all of its metadata, and what it stands on, can be read.
fn check_image(path: &Path, format: ImageFormat) -> Result<(), String> {
    let image = ImageRef { path: path.to_owned(), format };
    EngineImages.check_unused(&image).map_err(|error| match error {
        HypervisorError::InUse { who, .. } => format!(
            "it is in use ({who}): stop the VM that runs on it, or add that VM by its domain with `--domain`"
        ),
        other => other.to_string(),
    })?;
    let map = |chain: Chain| {
        if chain.size() == 0 {
            let what = "it is empty: a disk has at least one byte; was it cut?";
            return Err(knib_qcow::Error::Unsupported { path: path.to_owned(), what: what.into() });
        }
        let mut at = 0;
        while at < chain.size() {
            let extent = chain.extent_at(at)?;
            at = extent.start.saturating_add(extent.len.max(1));
        }
        Ok(())
    };
    Chain::open(path, images::format(format), &PlainPaths).and_then(map).map_err(|error| match error {
        knib_qcow::Error::Damaged { path: at, what } => {
            let at = at.display();
            let what =
                if at.to_string() == path.display().to_string() { what } else { format!("{at}: {what}") };
            format!("{what}; repair it first (`qemu-img check`, `qemu-img rebase`) or name another image")
        }
        knib_qcow::Error::Unsupported { what, .. } => what,
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{GuestVolume, ImageRef, NotTaken, Power};
    use crate::store::layout_fixtures::store_with_vm;

    fn guest() -> Guest {
        let volume = |target: &str, path: &str| GuestVolume {
            target: target.into(),
            serial: Some(format!("serial of {target}")),
            chain: vec![
                ImageRef { path: path.into(), format: ImageFormat::Qcow2 },
                ImageRef { path: "/images/base.raw".into(), format: ImageFormat::Raw },
            ],
            block_device: false,
            mirror: None,
        };
        Guest {
            uuid: Some(uuid::Uuid::from_u128(7)),
            name: "debian".into(),
            power: Power::Running,
            persistent: true,
            managed_save: false,
            volumes: vec![volume("vda", "/images/a.qcow2"), volume("vdb", "/images/b.qcow2")],
            skipped: vec![NotTaken { target: "sda".into(), reason: "is a cdrom".into() }],
            refused: vec![],
            xml: String::new(),
            nvram: None,
            tpm_state: None,
        }
    }

    fn new(name: &str, exclude: &[&str]) -> NewVm {
        let exclude = exclude.iter().map(|n| DiskName::new(*n).unwrap()).collect();
        NewVm { name: VmName::new(name).unwrap(), offering: None, exclude, delta_dir: None }
    }

    #[test]
    fn a_domain_is_known_by_its_uuid_and_its_volumes_by_their_targets() {
        let (_dir, store, _) = store_with_vm();
        let record = add_domain(&store, &new("db", &["sda"]), "qemu:///system", &guest()).unwrap();
        assert_eq!(record.id.uuid(), uuid::Uuid::from_u128(7));
        let volumes: Vec<_> =
            record.volumes.iter().map(|v| (v.name.as_str(), v.path.to_str().unwrap())).collect();
        assert_eq!(volumes, [("vda", "/images/a.qcow2"), ("vdb", "/images/b.qcow2")]);
        assert_eq!(store.vm(&record.name).unwrap(), record);
        let again = add_domain(&store, &new("db2", &[]), "qemu:///system", &guest()).unwrap_err();
        assert!(again.to_string().contains("as the VM db"), "{again}");
    }

    #[test]
    fn a_disk_that_cannot_be_backed_up_has_to_be_excluded() {
        let (_dir, store, _) = store_with_vm();
        let mut guest = guest();
        guest.refused.push(NotTaken { target: "vdc".into(), reason: "is a network disk".into() });
        let said = add_domain(&store, &new("db", &[]), "u", &guest).unwrap_err().to_string();
        assert!(said.contains("vdc") && said.contains("--exclude-disk vdc"), "{said}");
        let record = add_domain(&store, &new("db", &["vdc", "vdb"]), "u", &guest).unwrap();
        assert_eq!(record.volumes.len(), 1);
    }

    #[test]
    fn a_domain_that_cannot_be_kept_is_refused_and_leaves_nothing() {
        let (_dir, store, _) = store_with_vm();
        let mut comma = guest();
        comma.volumes[0].chain[0].path = "/images/a,b.qcow2".into();
        let mut hostile = guest();
        hostile.volumes[0].target = "../x".into();
        let mut empty = guest();
        empty.volumes.clear();
        for (guest, words) in [(comma, "a comma"), (hostile, "disk name"), (empty, "no disk")] {
            let said = add_domain(&store, &new("db", &[]), "u", &guest).unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        }
        let said = add_domain(&store, &new("db", &["vdz"]), "u", &self::guest()).unwrap_err().to_string();
        assert!(said.contains("it has vda, vdb, sda"), "{said}");
        assert_eq!(store.vms().unwrap().len(), 1);
    }
}
