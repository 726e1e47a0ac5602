//! A backup while it is being made: a hidden folder beside the others, renamed into place when whole.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::layout::{disk_file, manifest_file, sums_file};
use super::{
    BackupId, BackupName, DiskName, Manifest, Store, StoreError, StoreResult, VmName, atomic, record,
};

const PREFIX: &str = ".new-";

/// `vms/<vm>/.new-<id>/`. As deep as a backup's folder, so relative backing files hold before and after.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    id: BackupId,
    vm: VmName,
}

impl Store {
    /// Makes the folder for a new backup; the caller holds the VM's lock.
    pub fn stage(&self, vm: &VmName, id: BackupId) -> StoreResult<Staging> {
        let staging = self.staging(vm, id);
        fs::create_dir(&staging.dir).map_err(StoreError::io("create the folder", &staging.dir))?;
        atomic::sync_parent(&staging.dir)?;
        Ok(staging)
    }

    /// The folder of a backup that was being made; it may be there or not.
    pub fn staging(&self, vm: &VmName, id: BackupId) -> Staging {
        Staging { dir: self.vm_dir(vm).join(format!("{PREFIX}{id}")), id, vm: vm.clone() }
    }

    /// What interrupted backups of a VM left.
    pub fn stagings(&self, vm: &VmName) -> StoreResult<Vec<Staging>> {
        Ok(hidden(&self.vm_dir(vm), PREFIX)?.into_iter().map(|id| self.staging(vm, id)).collect())
    }
}

/// The backups that have a hidden folder of that kind.
pub(super) fn hidden(dir: &Path, prefix: &str) -> StoreResult<Vec<BackupId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(StoreError::io("read the folder", dir))? {
        let name = entry.map_err(StoreError::io("read the folder", dir))?.file_name();
        found.extend(
            name.to_str().and_then(|n| n.strip_prefix(prefix)).and_then(|id| id.parse::<BackupId>().ok()),
        );
    }
    Ok(found)
}

impl Staging {
    /// The backup that it will be.
    pub fn id(&self) -> BackupId {
        self.id
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the disk's image is to be written.
    pub fn disk_path(&self, disk: &DiskName) -> PathBuf {
        self.dir.join(disk_file(disk))
    }

    /// Where the disk's checksums are to be written.
    pub fn sums_path(&self, disk: &DiskName) -> PathBuf {
        self.dir.join(sums_file(disk))
    }

    /// Writes another file of the backup (`domain.xml`, `nvram.fd`); secrets get 0o600.
    pub fn write(&self, name: &str, bytes: &[u8], mode: u32) -> StoreResult<()> {
        atomic::write(&self.dir.join(name), bytes, mode)
    }

    /// Makes a folder for other files (`tpm`), for the owner only.
    pub fn create_dir(&self, name: &str) -> StoreResult<()> {
        let dir = self.dir.join(name);
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(StoreError::io("create the folder", &dir))
    }

    /// Whether its manifest was written: every file was flushed before that, so it is whole.
    pub fn is_whole(&self) -> bool {
        record::read::<Manifest>(&self.dir.join(manifest_file())).is_ok()
    }

    /// Flushes every file, writes the manifest, and renames the folder to the first free name of `manifest.taken`,
    /// which is also set in the manifest. The caller holds the VM's lock.
    pub fn publish(self, store: &Store, manifest: &mut Manifest) -> StoreResult<BackupName> {
        if manifest.id != self.id || manifest.vm != self.vm {
            return Err(StoreError::Invalid(format!(
                "{} is not the folder of this manifest",
                self.dir.display()
            )));
        }
        self.flush(&self.dir)?;
        let (name, place) = self.free_name(store, manifest)?;
        manifest.name = name.clone();
        record::write(&self.dir.join(manifest_file()), manifest)?;
        atomic::rename(&self.dir, &place)?;
        Ok(name)
    }

    /// For `recover`: publishes what is whole (its manifest was written) but was not yet renamed.
    pub fn republish(self, store: &Store) -> StoreResult<Manifest> {
        let mut manifest: Manifest = record::read(&self.dir.join(manifest_file()))?;
        self.publish(store, &mut manifest)?;
        Ok(manifest)
    }

    fn free_name(&self, store: &Store, manifest: &Manifest) -> StoreResult<(BackupName, PathBuf)> {
        for n in 1..1_000_000 {
            let name = BackupName::at(manifest.taken, n);
            let place = store.backup_dir(&self.vm, &name);
            match fs::symlink_metadata(&place) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((name, place)),
                Err(e) => return Err(StoreError::io("look at", &place)(e)),
            }
        }
        Err(StoreError::Invalid(format!(
            "every name for a backup of {} at {} is taken",
            self.vm, manifest.taken
        )))
    }

    fn flush(&self, dir: &Path) -> StoreResult<()> {
        for entry in fs::read_dir(dir).map_err(StoreError::io("read the folder", dir))? {
            let entry = entry.map_err(StoreError::io("read the folder", dir))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(StoreError::io("look at", &path))?;
            if kind.is_dir() {
                self.flush(&path)?;
            } else if kind.is_file() {
                fs::File::open(&path).and_then(|f| f.sync_all()).map_err(StoreError::io("flush", &path))?;
            }
        }
        atomic::sync_dir(dir)
    }

    /// Deletes the folder and all in it; fine when it is not there.
    pub fn discard(self) -> StoreResult<()> {
        match fs::remove_dir_all(&self.dir) {
            Ok(()) => atomic::sync_parent(&self.dir),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(StoreError::io("delete", &self.dir)(e)),
        }
    }
}
