//! A source in memory whose every byte is known, and a tree to mount.
#![allow(dead_code, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use knib_fuse::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Zero,
    Direct,
    Block,
}

/// Clusters of three kinds; the bytes follow from the place.
pub struct MemorySource {
    pub image: u64,
    pub cluster: u64,
    pub kinds: Vec<Kind>,
    pub len: u64,
    pub damaged: BTreeSet<u64>,
    pub decoded: AtomicUsize,
}

impl MemorySource {
    pub fn new(image: u64, cluster: u64, kinds: Vec<Kind>, len: u64) -> Self {
        assert!(len <= cluster * kinds.len() as u64);
        Self { image, cluster, kinds, len, damaged: BTreeSet::new(), decoded: AtomicUsize::new(0) }
    }

    fn byte(&self, at: u64) -> u8 {
        ((at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8) ^ (self.image as u8)
    }

    /// What a reader must see.
    pub fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64)
            .map(|at| match self.kinds[(at / self.cluster) as usize] {
                Kind::Zero => 0,
                _ => self.byte(at),
            })
            .collect()
    }

    fn check(&self, offset: u64, len: u64) -> FsResult<()> {
        match self.damaged.range(offset / self.cluster..(offset + len).div_ceil(self.cluster)).next() {
            Some(cluster) => Err(FsError::damage(format!("cluster {cluster} is not as it was written"))),
            None => Ok(()),
        }
    }
}

impl BlockSource for MemorySource {
    fn len(&self) -> u64 {
        self.len
    }

    fn span(&self, offset: u64) -> FsResult<Span> {
        let cluster = offset / self.cluster;
        let start = cluster * self.cluster;
        let kind = match self.kinds[cluster as usize] {
            Kind::Zero => SpanKind::Zero,
            Kind::Direct => SpanKind::Direct,
            Kind::Block => SpanKind::Block(BlockKey { image: self.image, block: cluster }),
        };
        Ok(Span { start, len: self.cluster, kind })
    }

    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.check(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.content(offset, buf.len()));
        Ok(())
    }

    fn read_block(&self, start: u64, key: BlockKey, out: &mut [u8]) -> FsResult<()> {
        self.decoded.fetch_add(1, Ordering::SeqCst);
        assert_eq!((key.image, key.block), (self.image, start / self.cluster));
        assert_eq!(out.len() as u64, self.cluster);
        self.check(start, 1)?;
        for (at, byte) in (start..).zip(out) {
            *byte = self.byte(at);
        }
        Ok(())
    }
}

pub struct Bytes(pub Vec<u8>);

impl File for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        buf.copy_from_slice(&self.0[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
}

/// A file whose reader has a bug.
pub struct Panics;

impl File for Panics {
    fn len(&self) -> u64 {
        8192
    }

    fn read(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
        panic!("as the test wants it")
    }
}

/// A file whose reads are answered when so many are being answered at once.
pub struct Together {
    pub wanted: usize,
    pub reading: parking_lot::Mutex<usize>,
    pub bell: parking_lot::Condvar,
}

impl File for Together {
    fn len(&self) -> u64 {
        1 << 20
    }

    fn read(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
        let mut reading = self.reading.lock();
        *reading += 1;
        self.bell.notify_all();
        let late = self.bell.wait_while_for(&mut reading, |n| *n < self.wanted, Duration::from_secs(60));
        if late.timed_out() { Err(FsError::damage("the others did not come")) } else { Ok(()) }
    }
}

pub enum Node {
    Folder(parking_lot::RwLock<BTreeMap<OsString, Ino>>, Ino),
    File(Arc<dyn File>, u64),
    Link(OsString),
}

#[derive(Default)]
pub struct MemoryTree {
    nodes: parking_lot::RwLock<BTreeMap<Ino, Arc<Node>>>,
}

pub fn time() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

impl MemoryTree {
    pub fn new() -> Self {
        let tree = Self::default();
        tree.nodes.write().insert(Ino::ROOT, Arc::new(Node::Folder(Default::default(), Ino::ROOT)));
        tree
    }

    fn node(&self, ino: Ino) -> FsResult<Arc<Node>> {
        self.nodes.read().get(&ino).cloned().ok_or_else(FsError::stale)
    }

    pub fn add(&self, folder: Ino, name: impl Into<OsString>, node: Node) -> Ino {
        let ino = Ino(self.nodes.read().len() as u64 + 0x10_0000);
        self.nodes.write().insert(ino, Arc::new(node));
        match &*self.node(folder).unwrap() {
            Node::Folder(names, _) => names.write().insert(name.into(), ino),
            _ => panic!("not a folder"),
        };
        ino
    }

    pub fn add_folder(&self, folder: Ino, name: &str) -> Ino {
        self.add(folder, name, Node::Folder(Default::default(), folder))
    }

    pub fn remove(&self, folder: Ino, name: &str) {
        if let Node::Folder(names, _) = &*self.node(folder).unwrap() {
            let ino = names.write().remove(OsStr::new(name)).unwrap();
            self.nodes.write().remove(&ino);
        }
    }
}

impl Tree for MemoryTree {
    fn lookup(&self, folder: Ino, name: &OsStr) -> FsResult<Attr> {
        match &*self.node(folder)? {
            Node::Folder(names, _) => {
                let found = names.read().get(name).copied();
                self.attr(found.ok_or_else(FsError::not_found)?)
            }
            _ => Err(FsError::new(Problem::NotAFolder, "not a folder")),
        }
    }

    fn attr(&self, ino: Ino) -> FsResult<Attr> {
        let node = self.node(ino)?;
        let (kind, size, allocated, mode) = match &*node {
            Node::Folder(..) => (NodeKind::Folder, 0, 0, 0o555),
            Node::File(file, held) => (NodeKind::File, file.len(), *held, 0o444),
            Node::Link(target) => (NodeKind::Link, target.len() as u64, 0, 0o777),
        };
        Ok(Attr {
            ino,
            kind,
            size,
            allocated,
            modified: time(),
            mode,
            uid: 0,
            gid: 0,
            links: 1,
            lasting: kind == NodeKind::File,
        })
    }

    fn list(&self, folder: Ino) -> FsResult<Vec<DirEntry>> {
        match &*self.node(folder)? {
            Node::Folder(names, _) => names
                .read()
                .iter()
                .map(|(name, ino)| {
                    Ok(DirEntry { name: name.clone(), ino: *ino, kind: self.attr(*ino)?.kind })
                })
                .collect(),
            _ => Err(FsError::new(Problem::NotAFolder, "not a folder")),
        }
    }

    fn parent(&self, folder: Ino) -> FsResult<Ino> {
        match &*self.node(folder)? {
            Node::Folder(_, parent) => Ok(*parent),
            _ => Err(FsError::new(Problem::NotAFolder, "not a folder")),
        }
    }

    fn readlink(&self, ino: Ino) -> FsResult<OsString> {
        match &*self.node(ino)? {
            Node::Link(target) => Ok(target.clone()),
            _ => Err(FsError::new(Problem::Invalid, "not a link")),
        }
    }

    fn open(&self, ino: Ino) -> FsResult<Arc<dyn File>> {
        match &*self.node(ino)? {
            Node::File(file, _) => Ok(file.clone()),
            _ => Err(FsError::new(Problem::IsAFolder, "not a file")),
        }
    }

    fn statfs(&self) -> FsResult<Statfs> {
        Ok(Statfs { total: 1 << 40, free: 1 << 39, files: self.nodes.read().len() as u64 })
    }
}
