//! A backup while it is deleted: its folder is hidden by one rename, then emptied.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::layout::manifest_file;
use super::staging::hidden;
use super::{BackupId, BackupName, Manifest, Store, StoreError, StoreResult, VmName, atomic, record};

const PREFIX: &str = ".del-";
/// The manifest while its backup is emptied: from then on there is nothing that could be put back.
const GONE: &str = ".manifest.gone";

/// `vms/<vm>/.del-<id>/`.
#[derive(Debug)]
pub struct Trash {
    dir: PathBuf,
    id: BackupId,
    vm: VmName,
}

impl Store {
    /// The folder of a backup that is being deleted; it may be there or not.
    pub fn trash(&self, vm: &VmName, id: BackupId) -> Trash {
        Trash { dir: self.vm_dir(vm).join(format!("{PREFIX}{id}")), id, vm: vm.clone() }
    }

    /// All that there are of a VM.
    pub fn trashes(&self, vm: &VmName) -> StoreResult<Vec<Trash>> {
        Ok(hidden(&self.vm_dir(vm), PREFIX)?.into_iter().map(|id| self.trash(vm, id)).collect())
    }
}

impl Trash {
    /// The backup.
    pub fn id(&self) -> BackupId {
        self.id
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.dir.symlink_metadata().is_ok()
    }

    /// Takes a backup out of sight. Nothing is deleted yet; done again, it does nothing.
    pub fn take(&self, store: &Store, name: &BackupName) -> StoreResult<()> {
        if self.exists() {
            return Ok(());
        }
        atomic::rename(&store.backup_dir(&self.vm, name), &self.dir)
    }

    /// The backup's manifest, while it can be put back.
    pub fn manifest(&self) -> StoreResult<Manifest> {
        record::read(&self.dir.join(manifest_file()))
    }

    /// Gives the backup its place again; one whose emptying was begun is only put back by whom it failed.
    pub fn put_back(&self, store: &Store, name: &BackupName) -> StoreResult<()> {
        if !self.exists() {
            return Ok(());
        }
        let gone = self.dir.join(GONE);
        if gone.exists() {
            atomic::rename(&gone, &self.dir.join(manifest_file()))?;
        }
        atomic::rename(&self.dir, &store.backup_dir(&self.vm, name))
    }

    /// Whether emptying was not begun.
    pub fn is_whole(&self) -> bool {
        self.dir.join(manifest_file()).exists()
    }

    /// Deletes the folder and all in it; it can be done again.
    ///
    /// # Errors
    /// Something cannot be deleted: what is left of the backup can be put back.
    pub fn empty(&self) -> StoreResult<()> {
        if !self.exists() {
            return Ok(());
        }
        let (manifest, gone) = (self.dir.join(manifest_file()), self.dir.join(GONE));
        if manifest.exists() {
            // A name of the same length or less needs no room, also on a full disk.
            atomic::rename(&manifest, &gone)?;
        }
        for path in self.left()? {
            if path != gone {
                delete(&path)?;
            }
        }
        atomic::remove(&gone)?;
        fs::remove_dir(&self.dir).map_err(StoreError::io("delete the folder", &self.dir))?;
        atomic::sync_parent(&self.dir)
    }

    /// What lies in it.
    pub fn left(&self) -> StoreResult<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(StoreError::io("read the folder", &self.dir)(e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            found.push(entry.map_err(StoreError::io("read the folder", &self.dir))?.path());
        }
        found.sort();
        Ok(found)
    }

    /// Deletes what can be deleted, the record first; what cannot is told.
    pub fn drop_record(&self) -> StoreResult<Vec<PathBuf>> {
        for record in [self.dir.join(manifest_file()), self.dir.join(GONE)] {
            atomic::remove(&record)?;
        }
        let mut kept = Vec::new();
        for path in self.left()? {
            if delete(&path).is_err() {
                kept.push(path);
            }
        }
        if kept.is_empty() {
            fs::remove_dir(&self.dir).map_err(StoreError::io("delete the folder", &self.dir))?;
            atomic::sync_parent(&self.dir)?;
        }
        Ok(kept)
    }
}

/// A file, or a folder with all in it (a TPM's state).
fn delete(path: &Path) -> StoreResult<()> {
    let is_dir = path.symlink_metadata().is_ok_and(|m| m.is_dir());
    if !is_dir {
        return atomic::remove(path);
    }
    fs::remove_dir_all(path).map_err(StoreError::io("delete", path))
}
