//! Adding a VM to a store: its disks are looked at and refused where they could not be backed up. Nothing on primary changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::store::manifest::ImageFormat;
use crate::store::vm::{Source, Track, Tracking, VmRecord, VmState, Volume};
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
    /// A folder for deltas that will not do.
    #[error("cannot use {} for deltas: {why}", path.display())]
    DeltaDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        why: String,
    },
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
    check_exclusions(new, disks.iter().map(|(name, _)| name))?;
    let record = VmRecord {
        id: VmId::random(),
        name: new.name.clone(),
        source: Source::Disks { track },
        volumes,
        offering: offering(store, new)?,
        exclude: new.exclude.clone(),
        delta_dir: delta_dir(new)?,
        next_sequence: 1,
        state: VmState::Ready,
        tracking: Tracking::default(),
    };
    store.create_vm(&record)?;
    Ok(record)
}

/// Each name in `exclude` must be one of the disks: a typing error would back up what should not be.
fn check_exclusions<'a>(
    new: &NewVm,
    disks: impl Iterator<Item = &'a DiskName> + Clone,
) -> Result<(), AddError> {
    match new.exclude.iter().find(|name| !disks.clone().any(|d| d == *name)) {
        None => Ok(()),
        Some(name) => Err(AddError::NothingToExclude {
            name: name.clone(),
            disks: disks.map(DiskName::as_str).collect::<Vec<_>>().join(", "),
        }),
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
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
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
    let format = probe(&path).map_err(|e| e.to_string())?;
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
fn probe(path: &Path) -> io::Result<ImageFormat> {
    let mut magic = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut magic)?;
    Ok(if magic == *b"QFI\xfb" { ImageFormat::Qcow2 } else { ImageFormat::Raw })
}
