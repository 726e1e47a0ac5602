//! Which backups there are, as listings need it. A manifest is read once, and again when its file is another one: a store
//! of ten thousand backups is listed by looking at its files, not by reading them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use knib_fuse::FsResult;
use parking_lot::Mutex;

use super::node::BackupRef;
use crate::store::{BackupId, BackupName, Manifest, Store, StoreError, VmName};
use crate::verified::Damage;

/// What tells a file from the one that took its name, or from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    /// Of a name as it is now; none where there is none.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        match fs::symlink_metadata(path) {
            Ok(m) => Ok(Some(Self {
                device: m.dev(),
                inode: m.ino(),
                size: m.size(),
                changed: (m.ctime(), m.ctime_nsec()),
            })),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// What listings need of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub of: BackupRef,
    pub sequence: u64,
    pub taken: Timestamp,
    /// Not one that is kept only for its children.
    pub is_listed: bool,
    /// Of its manifest.
    pub stamp: Stamp,
}

impl Summary {
    fn new(manifest: &Manifest, stamp: Stamp) -> Self {
        Self {
            of: BackupRef::new(manifest),
            sequence: manifest.sequence,
            taken: manifest.taken,
            is_listed: manifest.is_listed(),
            stamp,
        }
    }
}

/// What a manifest said when it was last read; none where it is damaged.
#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    said: Option<Summary>,
}

/// The backups of a store. Its locks are never held while the store is read.
#[derive(Debug)]
pub struct Catalog {
    store: Store,
    damage: Arc<Damage>,
    vms: Mutex<HashMap<VmName, HashMap<BackupName, Known>>>,
    /// Where a backup was last seen.
    ids: Mutex<HashMap<BackupId, BackupRef>>,
}

impl Catalog {
    /// Of a store; nothing is read yet.
    pub fn new(store: Store, damage: Arc<Damage>) -> Self {
        Self { store, damage, vms: Mutex::default(), ids: Mutex::default() }
    }

    /// A VM's listed backups by their sequence numbers. What cannot be read is reported and left out.
    pub fn listed(&self, vm: &VmName) -> FsResult<Vec<Summary>> {
        Ok(self.all(vm)?.into_iter().filter(|s| s.is_listed).collect())
    }

    /// The same, and those that are kept for their children.
    pub fn all(&self, vm: &VmName) -> FsResult<Vec<Summary>> {
        let names = self.store.backup_names(vm).map_err(|e| self.damage.of_store(&e))?;
        let mut before = self.vms.lock().get(vm).cloned().unwrap_or_default();
        let mut now = HashMap::with_capacity(names.len());
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let known = match before.remove(&name) {
                Some(known) if self.stamp(vm, &name).is_ok_and(|s| s == Some(known.stamp)) => Some(known),
                _ => self.read(vm, &name),
            };
            let Some(known) = known else { continue };
            found.extend(known.said.clone());
            now.insert(name, known);
        }
        self.ids.lock().extend(found.iter().map(|s| (s.of.id, s.of.clone())));
        self.vms.lock().insert(vm.clone(), now);
        found.sort_by_key(|s| s.sequence);
        Ok(found)
    }

    /// What a backup's manifest says now; none where it is gone, damaged, or another backup's.
    pub fn find(&self, of: &BackupRef) -> Option<Summary> {
        let stamp = self.stamp(&of.vm, &of.name).ok().flatten()?;
        let known = self.vms.lock().get(&of.vm).and_then(|vm| vm.get(&of.name)).cloned();
        let said = match known {
            Some(known) if known.stamp == stamp => known.said,
            _ => self.store.manifest(&of.vm, &of.name).ok().map(|m| Summary::new(&m, stamp)),
        };
        said.filter(|s| s.of == *of)
    }

    /// The listed backup with that id.
    pub fn by_id(&self, id: BackupId) -> FsResult<Option<BackupRef>> {
        let hint = self.ids.lock().get(&id).cloned();
        if let Some(found) = hint.and_then(|of| self.find(&of)) {
            return Ok(Some(found).filter(|s| s.is_listed).map(|s| s.of));
        }
        let mut all = HashMap::new();
        for vm in self.store.vms().map_err(|e| self.damage.of_store(&e))? {
            let listed = self.listed(&vm)?;
            all.extend(listed.into_iter().map(|s| (s.of.id, s.of)));
        }
        let found = all.get(&id).cloned();
        // Those that were removed are forgotten with it.
        *self.ids.lock() = all;
        Ok(found)
    }

    fn stamp(&self, vm: &VmName, name: &BackupName) -> io::Result<Option<Stamp>> {
        Stamp::of(&self.store.manifest_path(vm, name))
    }

    fn read(&self, vm: &VmName, name: &BackupName) -> Option<Known> {
        // First: what is changed while it is read has another one afterwards.
        let stamp = self.stamp(vm, name).ok().flatten();
        let said = match self.store.manifest(vm, name) {
            Ok(manifest) => stamp.map(|stamp| Summary::new(&manifest, stamp)),
            // Deleted since the folder was read.
            Err(error) if error.is_not_found() => return None,
            Err(error) => {
                let reason = self.damage.of_store(&error);
                tracing::warn!("the backup {vm}/{name} is not shown: {reason}");
                if !matches!(error, StoreError::Damaged { .. } | StoreError::NewerFormat { .. }) {
                    // The store may be away for a moment.
                    return None;
                }
                None
            }
        };
        stamp.map(|stamp| Known { stamp, said })
    }
}
