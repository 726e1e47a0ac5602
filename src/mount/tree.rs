//! The tree: names and nodes of a store.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use knib_fuse::{
    Attr, BlockCache, DirEntry, File, FsError, FsResult, Ino, NodeKind, Problem, ReadAhead, Statfs, Tree,
};
use parking_lot::{Mutex, RwLock};

use super::access::Access;
use super::boot::BootDisk;
use super::catalog::{Catalog, Stamp};
use super::moving::{Disks, while_stale};
use super::node::{BackupRef, Node};
use super::small::{Small, SmallPath};
use super::status::{self, Counted, Counters, ServerInfo};
use super::text::Text;
use crate::store::manifest::Disk;
use crate::store::sums::fast;
use crate::store::{BackupId, BackupName, DiskName, Manifest, Store, StoreError, VmName, disk_file, plain};
use crate::verified::VerifiedReader;

/// How a store is shown.
#[derive(Debug, Clone)]
pub struct TreeConfig {
    /// Who may read it.
    pub access: Access,
    /// Bytes of decoded clusters that are kept.
    pub cache_size: usize,
    /// For leases: where it is mounted.
    pub mounted_at: String,
    /// The process that holds the mount, whichever serves it.
    pub held_by: u32,
    /// Servers that the mount had before.
    pub restarts: u64,
    /// Whether the kernel may read stored files by itself, unchecked.
    pub passthrough: bool,
}

/// A store as a tree.
pub struct StoreTree {
    store: Store,
    config: TreeConfig,
    nodes: RwLock<HashMap<u64, Node>>,
    catalog: Catalog,
    /// Backups whose nodes are all known, and by which manifest.
    met: Mutex<HashSet<(BackupId, Stamp)>>,
    reader: Arc<VerifiedReader>,
    disks: Arc<Disks>,
    counters: Arc<Counters>,
    blocks: Arc<BlockCache>,
    made: SystemTime,
}

impl StoreTree {
    /// A tree over an opened store.
    pub fn new(store: Store, config: TreeConfig) -> std::io::Result<Self> {
        let reader = VerifiedReader::new(store.clone(), &format!("the mount at {}", config.mounted_at))
            .in_name_of(config.held_by);
        let (reader, blocks) = (Arc::new(reader), BlockCache::new(config.cache_size));
        Ok(Self {
            catalog: Catalog::new(store.clone(), reader.damage().clone()),
            met: Mutex::default(),
            disks: Disks::start(store.clone(), reader.clone(), blocks.clone(), ReadAhead::start())?,
            reader,
            blocks,
            counters: Arc::default(),
            nodes: RwLock::default(),
            made: SystemTime::now(),
            store,
            config,
        })
    }

    fn error(&self, error: &StoreError) -> FsError {
        self.reader.damage().of_store(error)
    }

    fn status(&self) -> String {
        let store = self.store.id().to_string();
        let server = ServerInfo { store, started: self.made, restarts: self.config.restarts };
        status::text(&self.counters, self.blocks.stats(), &server, &self.reader.damage().by_file())
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
        let damage = Node::Damage { version: self.reader.damage().text().0 };
        for node in [Node::Vms, Node::ById, Node::Control, Node::Status, damage] {
            self.remember(node);
        }
        for vm in self.store.vms().map_err(|e| self.error(&e))? {
            // What is damaged or gone has no nodes; the others' are looked for all the same.
            for found in self.catalog.all(&vm).unwrap_or_default() {
                // Nodes change with their manifest only.
                let met = (found.of.id, found.stamp);
                if self.met.lock().contains(&met) {
                    continue;
                }
                self.remember(Node::IdLink(found.of.clone()));
                self.meet(&found.of);
                self.remember(Node::Backup(found.of));
                // Not before: who asks meanwhile would take what is not known yet for gone.
                self.met.lock().insert(met);
            }
            self.remember(Node::Latest(vm.clone()));
            self.remember(Node::Vm(vm));
        }
        Ok(())
    }

    /// Meets what lies in a backup.
    fn meet(&self, of: &BackupRef) {
        let Ok(manifest) = self.manifest(of) else { return };
        let mut folders: Vec<_> = self.children(of, &manifest).into_iter().map(|(_, node)| node).collect();
        while let Some(node) = folders.pop() {
            if let Node::SmallFolder { of, path } = &node {
                let names = self.in_small_folder(of, path).unwrap_or_default();
                folders.extend(names.into_iter().map(|(_, node)| node));
            }
            self.remember(node);
        }
    }

    /// The manifest of a backup, which must still be the same one.
    fn manifest(&self, of: &BackupRef) -> FsResult<Manifest> {
        of.manifest(&self.store, self.reader.damage())
    }

    /// When a backup was taken.
    fn taken(&self, of: &BackupRef) -> FsResult<SystemTime> {
        match self.catalog.find(of) {
            Some(found) => Ok(time(found.taken)),
            None => Ok(time(self.manifest(of)?.taken)),
        }
    }

    fn disk<'a>(&self, manifest: &'a Manifest, name: &DiskName) -> FsResult<&'a Disk> {
        manifest.disk(name).ok_or_else(FsError::stale)
    }

    /// What lies in a backup's folder.
    fn children(&self, of: &BackupRef, manifest: &Manifest) -> Vec<(String, Node)> {
        let mut found = Vec::new();
        for disk in &manifest.disks {
            found.push((disk_file(&disk.name), stored_node(of, disk)));
            found.push((raw_name(&disk.name), raw_node(of, disk)));
        }
        for (name, small) in SmallPath::all() {
            // What is damaged is told when it is asked for by its name; the folder lists the others.
            if let Ok(Some(node)) = self.small_node(of, small) {
                found.push((name.into(), node));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// The child of a backup's folder with that name.
    fn child_of_backup(&self, of: &BackupRef, name: &str) -> FsResult<Node> {
        if let Some(small) = SmallPath::in_backup(name) {
            return self.small_node(of, small)?.ok_or_else(FsError::not_found);
        }
        let manifest = self.manifest(of)?;
        let mut disks = manifest.disks.iter();
        let found = disks.find_map(|disk| match name {
            name if *name == *disk_file(&disk.name) => Some(stored_node(of, disk)),
            name if *name == *raw_name(&disk.name) => Some(raw_node(of, disk)),
            _ => None,
        });
        found.ok_or_else(FsError::not_found)
    }

    /// The node of a small file or folder, where there is one.
    fn small_node(&self, of: &BackupRef, small: Small) -> FsResult<Option<Node>> {
        match small {
            Small::File(path) => {
                let found = path.read(&self.store, of).map_err(|e| self.error(&e))?;
                let node = |bytes: Vec<u8>| Node::Small { of: of.clone(), hash: small_hash(&bytes), path };
                Ok(found.map(node))
            }
            Small::Folder(path) => {
                let found = self.list_small(of, &path)?;
                Ok(found.map(|_| Node::SmallFolder { of: of.clone(), path }))
            }
        }
    }

    fn list_small(&self, of: &BackupRef, path: &SmallPath) -> FsResult<Option<Vec<(String, Small)>>> {
        let backup = self.store.backup_dir(&of.vm, &of.name);
        path.list(&backup).map_err(|e| FsError::io("read a folder of the store", &e))
    }

    fn in_small_folder(&self, of: &BackupRef, path: &SmallPath) -> FsResult<Vec<(String, Node)>> {
        let found = self.list_small(of, path)?.ok_or_else(FsError::stale)?;
        let node = |(name, small)| Some((name, self.small_node(of, small).ok()??));
        Ok(found.into_iter().filter_map(node).collect())
    }

    /// The bytes of a small file, which must still be the same.
    fn small(&self, of: &BackupRef, path: &SmallPath, hash: u64) -> FsResult<Vec<u8>> {
        let found = path.read(&self.store, of).map_err(|e| self.error(&e))?;
        found.filter(|bytes| small_hash(bytes) == hash).ok_or_else(FsError::stale)
    }

    fn is_vm(&self, vm: &VmName) -> FsResult<bool> {
        let failed = |e: io::Error| FsError::io("look at a folder of the store", &e);
        Ok(plain::is_folder(&self.store.vm_dir(vm)).map_err(failed)? && self.store.vm_path(vm).exists())
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
            Node::Control if name == "status" => Ok(Node::Status),
            Node::Control if name == "damage" => Ok(Node::Damage { version: self.reader.damage().text().0 }),
            Node::Vms => {
                let vm = VmName::new(name).map_err(|_| not_found())?;
                if self.is_vm(&vm)? { Ok(Node::Vm(vm)) } else { Err(not_found()) }
            }
            Node::ById => {
                let id: BackupId = name.parse().map_err(|_| not_found())?;
                // One spelling only.
                let found = if id.to_string() == name { self.catalog.by_id(id)? } else { None };
                Ok(Node::IdLink(found.ok_or_else(not_found)?))
            }
            Node::Vm(vm) if name == "latest" => {
                self.catalog.listed(vm)?.last().map(|_| Node::Latest(vm.clone())).ok_or_else(not_found)
            }
            Node::Vm(vm) => {
                // Also one that is removed and kept for its children: their images name it.
                let name = BackupName::new(name).map_err(|_| not_found())?;
                let dir = self.store.backup_dir(vm, &name);
                if !plain::is_folder(&dir).map_err(|e| FsError::io("look at a folder of the store", &e))? {
                    return Err(not_found());
                }
                let manifest = self.store.manifest(vm, &name).map_err(|e| self.error(&e))?;
                Ok(Node::Backup(BackupRef::new(&manifest)))
            }
            Node::Backup(of) => self.child_of_backup(of, name),
            Node::SmallFolder { of, path } => {
                let found = self.list_small(of, path)?.ok_or_else(FsError::stale)?;
                let small = found.into_iter().find(|(child, _)| child == name).ok_or_else(not_found)?.1;
                self.small_node(of, small)?.ok_or_else(not_found)
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
                let (now, text) = self.reader.damage().text();
                if now != *version {
                    return Err(FsError::stale());
                }
                attr(NodeKind::File, text.len() as u64, text.len() as u64, self.made, file_mode, false)
            }
            Node::Status => {
                let len = self.status().len() as u64;
                attr(NodeKind::File, len, len, SystemTime::now(), file_mode, false)
            }
            Node::Latest(vm) => {
                let latest = self.catalog.listed(vm)?.pop().ok_or_else(FsError::stale)?;
                link(latest.of.name.as_str().len(), time(latest.taken))
            }
            Node::Backup(of) => folder(self.taken(of)?),
            Node::IdLink(of) => link(id_target(of).len(), self.taken(of)?),
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
                let held = self.reader.held(&manifest, disk)?.min(size);
                attr(NodeKind::File, size, held, time(manifest.taken), file_mode, true)
            }
            Node::Small { of, path, hash } => {
                let len = self.small(of, path, *hash)?.len() as u64;
                let mode = if path.is_secret() { access.secret_mode() } else { file_mode };
                attr(NodeKind::File, len, len, self.taken(of)?, mode, false)
            }
            Node::SmallFolder { of, path } => {
                self.list_small(of, path)?.ok_or_else(FsError::stale)?;
                attr(NodeKind::Folder, 0, 0, self.taken(of)?, access.secret_folder_mode(), false)
            }
        })
    }

    fn folder_time(&self, dir: &std::path::Path) -> FsResult<SystemTime> {
        fs::metadata(dir).and_then(|m| m.modified()).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => FsError::stale(),
            _ => FsError::io("look at a folder of the store", &e),
        })
    }

    fn names(&self, node: &Node) -> FsResult<Vec<(String, Node)>> {
        Ok(match node {
            Node::Root => vec![
                (".knibfs".into(), Node::Control),
                ("by-id".into(), Node::ById),
                ("vms".into(), Node::Vms),
            ],
            Node::Control => vec![
                ("damage".into(), Node::Damage { version: self.reader.damage().text().0 }),
                ("status".into(), Node::Status),
            ],
            Node::Vms => {
                let vms = self.store.vms().map_err(|e| self.error(&e))?;
                vms.into_iter().map(|vm| (vm.to_string(), Node::Vm(vm))).collect()
            }
            Node::ById => {
                let mut found = Vec::new();
                for vm in self.store.vms().map_err(|e| self.error(&e))? {
                    let listed = self.catalog.listed(&vm)?;
                    found.extend(listed.into_iter().map(|s| (s.of.id.to_string(), Node::IdLink(s.of))));
                }
                found.sort_by(|a, b| a.0.cmp(&b.0));
                found
            }
            Node::Vm(vm) => {
                let mut listed = self.catalog.listed(vm)?;
                let latest = listed.last().map(|_| ("latest".to_owned(), Node::Latest(vm.clone())));
                listed.sort_by(|a, b| a.of.name.cmp(&b.of.name));
                let backups = listed.into_iter().map(|s| (s.of.name.to_string(), Node::Backup(s.of)));
                backups.chain(latest).collect()
            }
            Node::Backup(of) => self.children(of, &self.manifest(of)?),
            Node::SmallFolder { of, path } => self.in_small_folder(of, path)?,
            _ => return Err(FsError::new(Problem::NotAFolder, "not a folder")),
        })
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
            Node::SmallFolder { of, path } => match path.parent() {
                Some(path) => self.remember(Node::SmallFolder { of, path }),
                None => self.remember(Node::Backup(of)),
            },
            _ => Ino::ROOT,
        })
    }

    fn readlink(&self, ino: Ino) -> FsResult<OsString> {
        match self.node(ino)? {
            Node::Latest(vm) => {
                let latest = self.catalog.listed(&vm)?.pop().ok_or_else(FsError::stale)?;
                Ok(latest.of.name.as_str().into())
            }
            Node::IdLink(of) => Ok(id_target(&of).into()),
            _ => Err(FsError::new(Problem::Invalid, "not a link")),
        }
    }

    fn open(&self, ino: Ino) -> FsResult<Arc<dyn File>> {
        match self.node(ino)? {
            Node::Raw { of, disk } => {
                let manifest = self.manifest(&of)?;
                let volume = self.disk(&manifest, &disk)?.volume;
                let file = BootDisk::new(self.disks.open(&of, &disk)?, &self.store, &of.vm, volume);
                Ok(Arc::new(Counted::new(file, path_of(&of, &raw_name(&disk)), &self.counters)))
            }
            Node::Stored { of, disk, digest } => {
                let lease = self.reader.lease_file(of.id);
                let file = while_stale(|| {
                    let manifest = self.manifest(&of)?;
                    if self.disk(&manifest, &disk)?.sums_digest != digest {
                        return Err(FsError::stale());
                    }
                    self.reader.file(&manifest, &disk, lease.clone())
                })?;
                let file = file.with_passthrough(self.config.passthrough);
                Ok(Arc::new(Counted::new(file, path_of(&of, &disk_file(&disk)), &self.counters)))
            }
            Node::Small { of, path, hash } => Ok(Arc::new(Text::lasting(self.small(&of, &path, hash)?))),
            Node::Damage { version } => {
                let (now, text) = self.reader.damage().text();
                if now != version {
                    return Err(FsError::stale());
                }
                Ok(Arc::new(Text::lasting(text.into_bytes())))
            }
            Node::Status => Ok(Arc::new(Text::of_the_moment(self.status().into_bytes()))),
            _ => Err(FsError::new(Problem::IsAFolder, "not a file")),
        }
    }

    fn has_backings(&self) -> bool {
        self.config.passthrough
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

fn stored_node(of: &BackupRef, disk: &Disk) -> Node {
    Node::Stored { of: of.clone(), disk: disk.name.clone(), digest: disk.sums_digest.clone() }
}

fn raw_node(of: &BackupRef, disk: &Disk) -> Node {
    Node::Raw { of: of.clone(), disk: disk.name.clone() }
}

fn raw_name(disk: &DiskName) -> String {
    format!("{disk}.raw")
}

/// The path in the mount of a backup's file.
fn path_of(of: &BackupRef, file: &str) -> String {
    format!("vms/{}/{}/{file}", of.vm, of.name)
}

fn id_target(of: &BackupRef) -> String {
    format!("../vms/{}/{}", of.vm, of.name)
}

fn small_hash(bytes: &[u8]) -> u64 {
    u64::from(fast(bytes)) << 32 | bytes.len() as u64 & 0xffff_ffff
}

fn kind_of(node: &Node) -> NodeKind {
    match node {
        Node::Root
        | Node::Vms
        | Node::ById
        | Node::Control
        | Node::Vm(_)
        | Node::Backup(_)
        | Node::SmallFolder { .. } => NodeKind::Folder,
        Node::Latest(_) | Node::IdLink(_) => NodeKind::Link,
        Node::Damage { .. } | Node::Status | Node::Stored { .. } | Node::Raw { .. } | Node::Small { .. } => {
            NodeKind::File
        }
    }
}

fn time(of: Timestamp) -> SystemTime {
    let since = u64::try_from(of.as_second()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(since)
}
