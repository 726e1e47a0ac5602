//! The tree: names and nodes of a store.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use knib_fuse::{
    Attr, BlockCache, BlockFile, DirEntry, File, FsError, FsResult, Ino, NodeKind, Problem, ReadAhead,
    Statfs, Tree,
};
use parking_lot::RwLock;

use super::access::Access;
use super::node::{BackupRef, Node, TextFile};
use super::status::{self, Counted, Counters};
use super::text::Text;
use crate::store::manifest::Disk;
use crate::store::sums::fast;
use crate::store::{BackupId, BackupName, DiskName, Manifest, Store, StoreError, VmName, disk_file};
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
}

/// A store as a tree.
pub struct StoreTree {
    store: Store,
    config: TreeConfig,
    nodes: RwLock<HashMap<u64, Node>>,
    reader: VerifiedReader,
    counters: Arc<Counters>,
    blocks: Arc<BlockCache>,
    ahead: Arc<ReadAhead>,
    made: SystemTime,
}

/// No backup's text is longer. Bytes.
const LONGEST_TEXT: u64 = 64 << 20;

impl StoreTree {
    /// A tree over an opened store.
    pub fn new(store: Store, config: TreeConfig) -> std::io::Result<Self> {
        Ok(Self {
            blocks: BlockCache::new(config.cache_size),
            ahead: ReadAhead::start()?,
            reader: VerifiedReader::new(store.clone(), &format!("the mount at {}", config.mounted_at)),
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
        status::text(&self.counters, self.blocks.stats(), &store, self.made, &self.reader.damage().by_file())
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
            Node::Control if name == "status" => Ok(Node::Status),
            Node::Control if name == "damage" => Ok(Node::Damage { version: self.reader.damage().text().0 }),
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
                let held = self.reader.held(&manifest, disk)?.min(size);
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
                let lease = self.reader.lease_disk(of.id);
                let source = Arc::new(self.reader.disk(&self.manifest(&of)?, &disk, lease)?);
                let file = BlockFile::new(source, self.blocks.clone(), self.ahead.clone());
                Ok(Arc::new(Counted::new(file, &self.counters)))
            }
            Node::Stored { of, disk, digest } => {
                let lease = self.reader.lease_file(of.id);
                let manifest = self.manifest(&of)?;
                if self.disk(&manifest, &disk)?.sums_digest != digest {
                    return Err(FsError::stale());
                }
                Ok(Arc::new(Counted::new(self.reader.file(&manifest, &disk, lease)?, &self.counters)))
            }
            Node::Text { of, file, hash } => {
                let text = self.read_text(&of, file)?;
                if text_hash(&text) != hash {
                    return Err(FsError::stale());
                }
                Ok(Arc::new(Text::lasting(text)))
            }
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
        Node::Damage { .. } | Node::Status | Node::Stored { .. } | Node::Raw { .. } | Node::Text { .. } => {
            NodeKind::File
        }
    }
}

fn time(of: Timestamp) -> SystemTime {
    let since = u64::try_from(of.as_second()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(since)
}
