//! The state of an emulated TPM, for a new VM: without it the guest could not open what it sealed.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use super::RestoreError;
use crate::hypervisor::xml;
use crate::store::{StoreError, StoreResult, atomic};

/// Where libvirt keeps the states of its domains, by UUID.
const KEPT: &str = "/var/lib/libvirt/swtpm";

/// Refuses a new VM whose TPM's state would take the place of another's.
pub(super) fn refuse_taken(backup: &Path, definition: &str) -> Result<(), RestoreError> {
    match place(definition).filter(|to| backup.join("tpm").exists() && to.exists()) {
        Some(to) => Err(RestoreError::cannot(
            backup.display(),
            format!("{} is there, the state of another TPM: choose another name", to.display()),
        )),
        None => Ok(()),
    }
}

/// Copies the state in the backup to where the new definition has it, where there is one. Done again after a crash, it
/// begins anew.
pub(super) fn copy(backup: &Path, old: &str, new: &str) -> StoreResult<()> {
    let from = backup.join("tpm");
    let Some(to) = place(new).filter(|_| from.exists()) else { return Ok(()) };
    // The old one's, else that of any other where libvirt keeps them all.
    let neighbours = to.parent().filter(|parent| *parent == Path::new(KEPT));
    let owner = place(old).and_then(|old| owner_in(&old)).or_else(|| owner_in(neighbours?));
    folder(&from, &to, owner)?;
    // libvirt looks through its own folder as root, and the TPM's user must pass it.
    let mode = if to.starts_with(KEPT) { 0o711 } else { 0o700 };
    fs::set_permissions(&to, fs::Permissions::from_mode(mode)).map_err(StoreError::io("open up", &to))?;
    atomic::sync_parent(&to)
}

/// The folder of the state; none without an emulated TPM.
fn place(definition: &str) -> Option<PathBuf> {
    let domain = xml::parse(definition).ok()?;
    match domain.tpm?.source {
        Some(path) => Some(path),
        None => Some(Path::new(KEPT).join(domain.uuid?.to_string())),
    }
}

/// Who owns the files of a state: the user that the emulator runs as.
fn owner_in(folder: &Path) -> Option<(u32, u32)> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let meta = entry.metadata().ok()?;
        match meta.is_dir() {
            true => folders.push(entry.path()),
            false => return Some((meta.uid(), meta.gid())),
        }
    }
    folders.iter().find_map(|folder| owner_in(folder))
}

fn folder(from: &Path, to: &Path, owner: Option<(u32, u32)>) -> StoreResult<()> {
    fs::create_dir_all(to).map_err(StoreError::io("create the folder", to))?;
    own(to, 0o700, owner)?;
    for entry in fs::read_dir(from).map_err(StoreError::io("read the folder", from))? {
        let path = entry.map_err(StoreError::io("read the folder", from))?.path();
        let Some(name) = path.file_name() else { continue };
        let to = to.join(name);
        if path.is_dir() {
            folder(&path, &to, owner)?;
        } else {
            let bytes = fs::read(&path).map_err(StoreError::io("read", &path))?;
            atomic::write(&to, &bytes, 0o600)?;
            own(&to, 0o600, owner)?;
        }
    }
    Ok(())
}

fn own(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> StoreResult<()> {
    if let Some((user, group)) = owner {
        chown(path, Some(user), Some(group)).map_err(StoreError::io("change the owner of", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(StoreError::io("close up", path))
}
