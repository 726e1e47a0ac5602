//! Opens what is read: the images of a chain, each once, and only those that the manifests name.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use knib_fuse::{FsError, FsResult};
use parking_lot::Mutex;

use super::damage::Damage;
use super::flat::FlatCache;
use super::image::{StoredImage, image_number};
use super::{VerifiedDisk, VerifiedFile};
use crate::store::lease::{RAW_VIEW, STORED_FILE};
use crate::store::manifest::{Disk, Kind};
use crate::store::sums::SumsCache;
use crate::store::{BackupId, DiskName, Lease, Manifest, Store, StoreError};

/// Reads the backups of a store. What it opened is shared by all that read it.
pub struct VerifiedReader {
    store: Store,
    /// For leases: who reads.
    by: String,
    pid: u32,
    images: Mutex<HashMap<u64, Weak<StoredImage>>>,
    leases: Mutex<HashMap<(BackupId, &'static str), Weak<Lease>>>,
    sums: Arc<SumsCache>,
    flat: Arc<FlatCache>,
    damage: Arc<Damage>,
}

/// Maps of open disks. Bytes.
const FLAT_CACHE: usize = 16 << 20;
/// Records that are read while maps are built and stored files are checked. Bytes.
const SUMS_CACHE: usize = 6 << 20;
const MOST_LAYERS: usize = 200;

impl VerifiedReader {
    /// A reader of a store; `by` is for people who ask why a backup is in use: "an export".
    pub fn new(store: Store, by: &str) -> Self {
        Self {
            store,
            by: by.into(),
            pid: std::process::id(),
            images: Mutex::default(),
            leases: Mutex::default(),
            sums: SumsCache::new(SUMS_CACHE),
            flat: Arc::new(FlatCache::new(FLAT_CACHE)),
            damage: Arc::default(),
        }
    }

    /// Reads for another process, which leases then name.
    #[must_use]
    pub fn in_name_of(self, pid: u32) -> Self {
        Self { pid, ..self }
    }

    /// What was found damaged so far.
    pub fn damage(&self) -> &Arc<Damage> {
        &self.damage
    }

    /// A disk of a backup as its guest saw it. Holds the lease for as long as it is open.
    ///
    /// # Errors
    /// The backup has no such disk, or its chain is damaged.
    pub fn disk(&self, of: &Manifest, disk: &DiskName, lease: Option<Arc<Lease>>) -> FsResult<VerifiedDisk> {
        let chain = self.chain(of, disk)?;
        VerifiedDisk::new(self.images(&chain, disk)?, self.flat.clone(), lease)
    }

    /// A stored image byte for byte. Holds the lease for as long as it is open.
    ///
    /// # Errors
    /// The backup has no such disk, or its chain is damaged.
    pub fn file(&self, of: &Manifest, disk: &DiskName, lease: Option<Arc<Lease>>) -> FsResult<VerifiedFile> {
        let chain = self.chain(of, disk)?;
        Ok(VerifiedFile::new(self.image(of, disk, chain.get(1))?, lease))
    }

    /// Tells others that a disk of the backup is being read: it is not removed, yet its stored files may be swapped. A
    /// store that cannot be written takes no lease: nothing is removed from it either.
    pub fn lease_disk(&self, backup: BackupId) -> Option<Arc<Lease>> {
        self.lease(backup, RAW_VIEW)
    }

    /// Tells others that a stored file of the backup is being read: it is neither removed nor swapped.
    pub fn lease_file(&self, backup: BackupId) -> Option<Arc<Lease>> {
        self.lease(backup, STORED_FILE)
    }

    fn lease(&self, backup: BackupId, what: &'static str) -> Option<Arc<Lease>> {
        let mut leases = self.leases.lock();
        if let Some(held) = leases.get(&(backup, what)).and_then(Weak::upgrade) {
            return Some(held);
        }
        match self.store.lease_in_name_of(self.pid, backup, &format!("{what}{}", self.by)) {
            Ok(lease) => {
                let lease = Arc::new(lease);
                leases.retain(|_, lease| lease.strong_count() > 0);
                leases.insert((backup, what), Arc::downgrade(&lease));
                Some(lease)
            }
            Err(error) => {
                tracing::debug!("no lease on the backup {backup}: {error}");
                None
            }
        }
    }

    fn error(&self, error: &StoreError) -> FsError {
        self.damage.of_store(error)
    }

    fn disk_of<'a>(&self, manifest: &'a Manifest, name: &DiskName) -> FsResult<&'a Disk> {
        manifest.disk(name).ok_or_else(FsError::stale)
    }

    /// A disk's backups from `top` down to the full one, by the manifests.
    pub(crate) fn chain(&self, top: &Manifest, disk: &DiskName) -> FsResult<Vec<Manifest>> {
        let broken = |of: &Manifest, what: String| {
            self.error(&StoreError::damaged(&self.store.manifest_path(&of.vm, &of.name), what))
        };
        let mut chain = vec![top.clone()];
        let mut volume = self.disk_of(top, disk)?.volume;
        while let Some(of) = chain.last() {
            let Some(here) = of.disk_of(volume) else {
                return Err(broken(of, "a backup stands on it for a disk that it does not have".into()));
            };
            volume = here.volume;
            if here.kind == Kind::Full {
                return Ok(chain);
            }
            let Some(parent) = &of.parent else { return Err(broken(of, "it has no parent".into())) };
            if chain.len() == MOST_LAYERS {
                return Err(broken(of, format!("its chain is longer than {MOST_LAYERS}")));
            }
            let below = self.store.manifest(&of.vm, &parent.name).map_err(|e| match e {
                e if e.is_not_found() => broken(of, format!("its parent {} is missing", parent.name)),
                e => self.error(&e),
            })?;
            if below.id != parent.id || below.disk_of(volume).is_none_or(|d| d.name != here.name) {
                return Err(broken(of, format!("{} is not the parent that it was made from", parent.name)));
            }
            chain.push(below);
        }
        Err(FsError::damage("an empty chain"))
    }

    /// Bytes of data in a disk's chain; what is stored twice counts twice.
    pub fn held(&self, top: &Manifest, disk: &DiskName) -> FsResult<u64> {
        let chain = self.chain(top, disk)?;
        let stored =
            chain.iter().filter_map(|m| m.disk(disk)).map(|d| d.data_clusters.saturating_mul(d.cluster_size));
        Ok(stored.fold(0, u64::saturating_add))
    }

    /// The images of a disk, the top first. Opened ones are shared between chains.
    fn images(&self, chain: &[Manifest], disk: &DiskName) -> FsResult<Vec<Arc<StoredImage>>> {
        let below = chain.iter().skip(1).map(Some).chain([None]);
        chain.iter().zip(below).map(|(of, below)| self.image(of, disk, below)).collect()
    }

    fn image(&self, of: &Manifest, disk: &DiskName, below: Option<&Manifest>) -> FsResult<Arc<StoredImage>> {
        let record = self.disk_of(of, disk)?;
        let number = image_number(of, record);
        if let Some(open) = self.images.lock().get(&number).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let opened =
            StoredImage::open(&self.store, of, record, below, self.sums.clone(), self.damage.clone())?;
        let opened = Arc::new(opened);
        let mut images = self.images.lock();
        images.retain(|_, image| image.strong_count() > 0);
        images.insert(number, Arc::downgrade(&opened));
        Ok(opened)
    }
}
