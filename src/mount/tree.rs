//! The tree: names and nodes of a store.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use knib_fuse::{
    Attr, BlockCache, BlockFile, BlockSource, DirEntry, File, FsError, FsResult, Ino, NodeKind, Problem,
    ReadAhead, Statfs, Tree,
};
use parking_lot::{Mutex, RwLock};

use super::access::Access;
use super::damage::Damage;
use super::flat::FlatCache;
use super::image::{StoredImage, image_number};
use super::node::{BackupRef, Node, TextFile};
use super::raw::RawDisk;
use super::stored::{StoredFile, Text};
use crate::store::lease::RAW_VIEW;
use crate::store::manifest::{Disk, Kind};
use crate::store::sums::{SumsCache, fast};
use crate::store::{BackupId, BackupName, DiskName, Lease, Manifest, Store, StoreError, VmName, disk_file};

/// How a store is shown.
#[derive(Debug, Clone)]
pub struct TreeConfig {
    /// Who may read it.
    pub access: Access,
    /// Bytes of decoded clusters that are kept.
    pub cache_size: usize,
    /// For leases: where it is mounted.
    pub mounted_at: String,
}

/// A store as a tree.
pub struct StoreTree {
    store: Store,
    config: TreeConfig,
    nodes: RwLock<HashMap<u64, Node>>,
    images: Mutex<HashMap<u64, Weak<StoredImage>>>,
    leases: Mutex<HashMap<(BackupId, &'static str), Weak<Lease>>>,
    blocks: Arc<BlockCache>,
    ahead: Arc<ReadAhead>,
    sums: Arc<SumsCache>,
    flat: Arc<FlatCache>,
    damage: Arc<Damage>,
    made: SystemTime,
}

/// Purpose of leases on backups whose stored files are read.
const STORED: &str = "stored file open in the mount";

/// Maps of open disks, beside the cache of decoded clusters. Bytes.
const FLAT_CACHE: usize = 16 << 20;
/// Records that are read while maps are built and stored files are checked. Bytes.
const SUMS_CACHE: usize = 6 << 20;
/// No backup's text is longer. Bytes.
const LONGEST_TEXT: u64 = 64 << 20;
const MOST_LAYERS: usize = 200;

impl StoreTree {
    /// A tree over an opened store.
    pub fn new(store: Store, config: TreeConfig) -> std::io::Result<Self> {
        Ok(Self {
            blocks: BlockCache::new(config.cache_size),
            ahead: ReadAhead::start()?,
            sums: SumsCache::new(SUMS_CACHE),
            flat: Arc::new(FlatCache::new(FLAT_CACHE)),
            damage: Arc::new(Damage::default()),
            nodes: RwLock::default(),
            images: Mutex::default(),
            leases: Mutex::default(),
            made: SystemTime::now(),
            store,
            config,
        })
    }

    fn error(&self, error: &StoreError) -> FsError {
        self.damage.of_store(error)
    }

    fn remember(&self, node: Node) -> Ino {
        let ino = node.ino(self.store.id());
        if !self.nodes.read().contains_key(&ino) {
            self.nodes.write().insert(ino, node);
        }
        Ino(ino)
    }

    fn node(&self, ino: Ino) -> FsResult<Node> {
        if ino == Ino::ROOT {
            return Ok(Node::Root);
        }
        if let Some(node) = self.nodes.read().get(&ino.0) {
            return Ok(node.clone());
        }
        // An NFS client or a kernel that remembers a number from before a restart.
        self.meet_all()?;
        self.nodes.read().get(&ino.0).cloned().ok_or_else(FsError::stale)
    }

    /// Meets every node there is, so that its number is known.
    fn meet_all(&self) -> FsResult<()> {
        for node in [Node::Vms, Node::ById, Node::Control] {
            self.remember(node);
        }
        for vm in self.store.vms().map_err(|e| self.error(&e))? {
            for manifest in self.store.backups(&vm).map_err(|e| self.error(&e))?.manifests {
                let of = backup_ref(&manifest);
                self.remember(Node::IdLink(of.clone()));
                for (_, node) in self.children(&of, &manifest) {
                    self.remember(node);
                }
                self.remember(Node::Backup(of));
            }
            self.remember(Node::Latest(vm.clone()));
            self.remember(Node::Vm(vm));
        }
        Ok(())
    }

    /// The manifest of a backup, which must still be the same one.
    fn manifest(&self, of: &BackupRef) -> FsResult<Manifest> {
        let found = self.store.manifest(&of.vm, &of.name).map_err(|e| match self.error(&e) {
            gone if gone.problem() == Problem::NotFound => FsError::stale(),
            other => other,
        })?;
        if found.id == of.id { Ok(found) } else { Err(FsError::stale()) }
    }

    fn disk<'a>(&self, manifest: &'a Manifest, name: &DiskName) -> FsResult<&'a Disk> {
        manifest.disk(name).ok_or_else(FsError::stale)
    }

    /// What lies in a backup's folder.
    fn children(&self, of: &BackupRef, manifest: &Manifest) -> Vec<(String, Node)> {
        let mut found = Vec::new();
        for disk in &manifest.disks {
            let (of, name) = (of.clone(), disk.name.clone());
            let stored =
                Node::Stored { of: of.clone(), disk: name.clone(), digest: disk.sums_digest.clone() };
            found.push((disk_file(&disk.name), stored));
            found.push((format!("{name}.raw"), Node::Raw { of, disk: name }));
        }
        for file in TextFile::ALL {
            if let Ok(text) = self.read_text(of, file) {
                found.push((file.name().into(), text_node(of, file, &text)));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    fn read_text(&self, of: &BackupRef, file: TextFile) -> FsResult<Vec<u8>> {
        let path = self.store.backup_dir(&of.vm, &of.name).join(file.name());
        let io = |e| self.error(&StoreError::Io { doing: "read", path: path.clone(), source: e });
        if fs::metadata(&path).map_err(io)?.len() > LONGEST_TEXT {
            return Err(self.error(&StoreError::damaged(&path, "it is too long")));
        }
        fs::read(&path).map_err(io)
    }

    fn listed(&self, vm: &VmName) -> FsResult<Vec<Manifest>> {
        let found = self.store.backups(vm).map_err(|e| self.error(&e))?;
        for (name, error) in found.damaged {
            // Said once in the log and in .knibfs/damage; the others are as good as before.
            let reason = self.error(&error);
            tracing::warn!("the backup {vm}/{name} is not shown: {reason}");
        }
        Ok(found.manifests.into_iter().filter(Manifest::is_listed).collect())
    }

    fn latest(&self, vm: &VmName) -> FsResult<Option<Manifest>> {
        Ok(self.listed(vm)?.pop())
    }

    fn find_id(&self, id: BackupId) -> FsResult<Option<BackupRef>> {
        for vm in self.store.vms().map_err(|e| self.error(&e))? {
            if let Some(found) = self.listed(&vm)?.into_iter().find(|m| m.id == id) {
                return Ok(Some(backup_ref(&found)));
            }
        }
        Ok(None)
    }

    fn child(&self, folder: &Node, name: &str) -> FsResult<Node> {
        let not_found = FsError::not_found;
        match folder {
            Node::Root => match name {
                "vms" => Ok(Node::Vms),
                "by-id" => Ok(Node::ById),
                ".knibfs" => Ok(Node::Control),
                _ => Err(not_found()),
            },
            Node::Control if name == "damage" => Ok(Node::Damage { version: self.damage.text().0 }),
            Node::Vms => {
                let vm = VmName::new(name).map_err(|_| not_found())?;
                if self.store.vm_path(&vm).exists() { Ok(Node::Vm(vm)) } else { Err(not_found()) }
            }
            Node::ById => {
                let id: BackupId = name.parse().map_err(|_| not_found())?;
                // One spelling only.
                let found = if id.to_string() == name { self.find_id(id)? } else { None };
                Ok(Node::IdLink(found.ok_or_else(not_found)?))
            }
            Node::Vm(vm) if name == "latest" => {
                self.latest(vm)?.map(|_| Node::Latest(vm.clone())).ok_or_else(not_found)
            }
            Node::Vm(vm) => {
                // Also one that is removed and kept for its children: their images name it.
                let name = BackupName::new(name).map_err(|_| not_found())?;
                let manifest = self.store.manifest(vm, &name).map_err(|e| self.error(&e))?;
                Ok(Node::Backup(backup_ref(&manifest)))
            }
            Node::Backup(of) => {
                let manifest = self.manifest(of)?;
                let found = self.children(of, &manifest).into_iter().find(|(child, _)| child == name);
                found.map(|(_, node)| node).ok_or_else(not_found)
            }
            Node::Control => Err(not_found()),
            _ => Err(FsError::new(Problem::NotAFolder, "not a folder")),
        }
    }

    fn attr_of(&self, ino: Ino, node: &Node) -> FsResult<Attr> {
        let access = &self.config.access;
        let attr = |kind, size, allocated, modified, mode, lasting| Attr {
            ino,
            kind,
            size,
            allocated,
            modified,
            mode,
            uid: access.uid,
            gid: access.gid,
            links: if kind == NodeKind::Folder { 2 } else { 1 },
            lasting,
        };
        let folder = |modified| attr(NodeKind::Folder, 0, 0, modified, access.folder_mode(), false);
        let link = |len: usize, modified| attr(NodeKind::Link, len as u64, 0, modified, 0o777, false);
        let file_mode = access.file_mode();
        Ok(match node {
            Node::Root => folder(self.made),
            Node::Control => folder(self.made),
            Node::Vms | Node::ById => folder(self.folder_time(&self.store.vms_dir())?),
            Node::Vm(vm) => folder(self.folder_time(&self.store.vm_dir(vm))?),
            Node::Damage { version } => {
                let (now, text) = self.damage.text();
                if now != *version {
                    return Err(FsError::stale());
                }
                attr(NodeKind::File, text.len() as u64, text.len() as u64, self.made, file_mode, false)
            }
            Node::Latest(vm) => {
                let latest = self.latest(vm)?.ok_or_else(FsError::stale)?;
                link(latest.name.as_str().len(), time(latest.taken))
            }
            Node::Backup(of) => folder(time(self.manifest(of)?.taken)),
            Node::IdLink(of) => link(id_target(of).len(), time(self.manifest(of)?.taken)),
            Node::Stored { of, disk, digest } => {
                let manifest = self.manifest(of)?;
                let disk = self.disk(&manifest, disk)?;
                if disk.sums_digest != *digest {
                    return Err(FsError::stale());
                }
                let path = self.store.disk_path(&of.vm, &of.name, &disk.name);
                let held = fs::metadata(&path).map_or(0, |m| m.blocks().saturating_mul(512));
                // A compressed file may take its name.
                attr(NodeKind::File, disk.file_size, held, time(manifest.taken), file_mode, false)
            }
            Node::Raw { of, disk } => {
                let manifest = self.manifest(of)?;
                let size = self.disk(&manifest, disk)?.virtual_size;
                let held = self.held(&manifest, disk)?.min(size);
                attr(NodeKind::File, size, held, time(manifest.taken), file_mode, true)
            }
            Node::Text { of, file, hash } => {
                let text = self.read_text(of, *file).map_err(|e| match e.problem() {
                    Problem::NotFound => FsError::stale(),
                    _ => e,
                })?;
                if text_hash(&text) != *hash {
                    return Err(FsError::stale());
                }
                let mode = if *file == TextFile::DomainXml { access.secret_mode() } else { file_mode };
                let taken = time(self.manifest(of)?.taken);
                attr(NodeKind::File, text.len() as u64, text.len() as u64, taken, mode, false)
            }
        })
    }

    fn folder_time(&self, dir: &std::path::Path) -> FsResult<SystemTime> {
        fs::metadata(dir).and_then(|m| m.modified()).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => FsError::stale(),
            _ => FsError::io("look at a folder of the store", &e),
        })
    }

    /// A disk's backups from `top` down to the full one, by the manifests.
    fn chain(&self, top: &Manifest, disk: &DiskName) -> FsResult<Vec<Manifest>> {
        let broken = |of: &Manifest, what: String| {
            self.error(&StoreError::damaged(&self.store.manifest_path(&of.vm, &of.name), what))
        };
        let mut chain = vec![top.clone()];
        let mut volume = self.disk(top, disk)?.volume;
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
    fn held(&self, top: &Manifest, disk: &DiskName) -> FsResult<u64> {
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
        let record = self.disk(of, disk)?;
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

    /// Tells others that the backup is in use. A store that cannot be written takes no lease: nothing is removed from it either.
    fn lease(&self, of: &BackupRef, what: &'static str) -> Option<Arc<Lease>> {
        let mut leases = self.leases.lock();
        if let Some(held) = leases.get(&(of.id, what)).and_then(Weak::upgrade) {
            return Some(held);
        }
        match self.store.lease(of.id, &format!("{what} at {}", self.config.mounted_at)) {
            Ok(lease) => {
                let lease = Arc::new(lease);
                leases.retain(|_, lease| lease.strong_count() > 0);
                leases.insert((of.id, what), Arc::downgrade(&lease));
                Some(lease)
            }
            Err(error) => {
                tracing::debug!("no lease on {}/{}: {error}", of.vm, of.name);
                None
            }
        }
    }

    fn names(&self, node: &Node) -> FsResult<Vec<(String, Node)>> {
        Ok(match node {
            Node::Root => vec![
                (".knibfs".into(), Node::Control),
                ("by-id".into(), Node::ById),
                ("vms".into(), Node::Vms),
            ],
            Node::Control => vec![("damage".into(), Node::Damage { version: self.damage.text().0 })],
            Node::Vms => {
                let vms = self.store.vms().map_err(|e| self.error(&e))?;
                vms.into_iter().map(|vm| (vm.to_string(), Node::Vm(vm))).collect()
            }
            Node::ById => {
                let mut found = Vec::new();
                for vm in self.store.vms().map_err(|e| self.error(&e))? {
                    let listed = self.listed(&vm)?;
                    found.extend(listed.iter().map(|m| (m.id.to_string(), Node::IdLink(backup_ref(m)))));
                }
                found.sort_by(|a, b| a.0.cmp(&b.0));
                found
            }
            Node::Vm(vm) => {
                let mut listed = self.listed(vm)?;
                let latest = listed.last().map(|_| ("latest".to_owned(), Node::Latest(vm.clone())));
                listed.sort_by(|a, b| a.name.cmp(&b.name));
                let backups = listed.iter().map(|m| (m.name.to_string(), Node::Backup(backup_ref(m))));
                backups.chain(latest).collect()
            }
            Node::Backup(of) => self.children(of, &self.manifest(of)?),
            _ => return Err(FsError::new(Problem::NotAFolder, "not a folder")),
        })
    }

    fn raw_disk(&self, of: &Manifest, disk: &DiskName, lease: Option<Arc<Lease>>) -> FsResult<RawDisk> {
        let chain = self.chain(of, disk)?;
        RawDisk::new(self.images(&chain, disk)?, self.flat.clone(), lease)
    }

    /// A disk of a backup as its guest saw it, every byte checked, for those that read without a mount. It holds a lease.
    ///
    /// # Errors
    /// The backup has no such disk, or its chain is damaged.
    pub fn disk_source(&self, of: &Manifest, disk: &DiskName) -> FsResult<Arc<dyn BlockSource>> {
        Ok(Arc::new(self.raw_disk(of, disk, self.lease(&backup_ref(of), RAW_VIEW))?))
    }

    /// A stored image byte for byte, every byte checked.
    ///
    /// # Errors
    /// The backup has no such disk, or its chain is damaged.
    pub fn stored_file(&self, of: &Manifest, disk: &DiskName) -> FsResult<Arc<dyn File>> {
        let chain = self.chain(of, disk)?;
        Ok(Arc::new(StoredFile::new(
            self.image(of, disk, chain.get(1))?,
            self.lease(&backup_ref(of), STORED),
        )))
    }
}

impl Tree for StoreTree {
    fn lookup(&self, folder: Ino, name: &OsStr) -> FsResult<Attr> {
        let folder = self.node(folder)?;
        // No name here is anything but UTF-8.
        let name = name.to_str().ok_or_else(FsError::not_found)?;
        let node = self.child(&folder, name)?;
        let ino = self.remember(node.clone());
        self.attr_of(ino, &node)
    }

    fn attr(&self, ino: Ino) -> FsResult<Attr> {
        self.attr_of(ino, &self.node(ino)?)
    }

    fn list(&self, folder: Ino) -> FsResult<Vec<DirEntry>> {
        let names = self.names(&self.node(folder)?)?;
        let entry = |(name, node): (String, Node)| DirEntry {
            name: name.into(),
            kind: kind_of(&node),
            ino: self.remember(node),
        };
        Ok(names.into_iter().map(entry).collect())
    }

    fn parent(&self, folder: Ino) -> FsResult<Ino> {
        Ok(match self.node(folder)? {
            Node::Vm(_) => self.remember(Node::Vms),
            Node::Backup(of) => self.remember(Node::Vm(of.vm)),
            _ => Ino::ROOT,
        })
    }

    fn readlink(&self, ino: Ino) -> FsResult<OsString> {
        match self.node(ino)? {
            Node::Latest(vm) => Ok(self.latest(&vm)?.ok_or_else(FsError::stale)?.name.as_str().into()),
            Node::IdLink(of) => Ok(id_target(&of).into()),
            _ => Err(FsError::new(Problem::Invalid, "not a link")),
        }
    }

    fn open(&self, ino: Ino) -> FsResult<Arc<dyn File>> {
        match self.node(ino)? {
            Node::Raw { of, disk } => {
                let lease = self.lease(&of, RAW_VIEW);
                let source = self.raw_disk(&self.manifest(&of)?, &disk, lease)?;
                Ok(Arc::new(BlockFile::new(Arc::new(source), self.blocks.clone(), self.ahead.clone())))
            }
            Node::Stored { of, disk, digest } => {
                let lease = self.lease(&of, STORED);
                let manifest = self.manifest(&of)?;
                if self.disk(&manifest, &disk)?.sums_digest != digest {
                    return Err(FsError::stale());
                }
                let chain = self.chain(&manifest, &disk)?;
                let image = self.image(&manifest, &disk, chain.get(1))?;
                Ok(Arc::new(StoredFile::new(image, lease)))
            }
            Node::Text { of, file, hash } => {
                let text = self.read_text(&of, file)?;
                if text_hash(&text) != hash {
                    return Err(FsError::stale());
                }
                Ok(Arc::new(Text(text.into())))
            }
            Node::Damage { version } => {
                let (now, text) = self.damage.text();
                if now != version {
                    return Err(FsError::stale());
                }
                Ok(Arc::new(Text(text.into_bytes().into())))
            }
            _ => Err(FsError::new(Problem::IsAFolder, "not a file")),
        }
    }

    fn statfs(&self) -> FsResult<Statfs> {
        let found = rustix::fs::statvfs(self.store.root())
            .map_err(|e| FsError::io("ask for the size of the store's file system", &e.into()))?;
        Ok(Statfs {
            total: found.f_blocks.saturating_mul(found.f_frsize),
            free: found.f_bavail.saturating_mul(found.f_frsize),
            files: self.nodes.read().len() as u64,
        })
    }
}

fn backup_ref(manifest: &Manifest) -> BackupRef {
    BackupRef { vm: manifest.vm.clone(), name: manifest.name.clone(), id: manifest.id }
}

fn id_target(of: &BackupRef) -> String {
    format!("../vms/{}/{}", of.vm, of.name)
}

fn text_node(of: &BackupRef, file: TextFile, text: &[u8]) -> Node {
    Node::Text { of: of.clone(), file, hash: text_hash(text) }
}

fn text_hash(text: &[u8]) -> u64 {
    u64::from(fast(text)) << 32 | text.len() as u64 & 0xffff_ffff
}

fn kind_of(node: &Node) -> NodeKind {
    match node {
        Node::Root | Node::Vms | Node::ById | Node::Control | Node::Vm(_) | Node::Backup(_) => {
            NodeKind::Folder
        }
        Node::Latest(_) | Node::IdLink(_) => NodeKind::Link,
        Node::Damage { .. } | Node::Stored { .. } | Node::Raw { .. } | Node::Text { .. } => NodeKind::File,
    }
}

fn time(of: Timestamp) -> SystemTime {
    let since = u64::try_from(of.as_second()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(since)
}
