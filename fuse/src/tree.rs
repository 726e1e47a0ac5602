//! What a filesystem is to the adapter: numbered nodes that never change their meaning.

use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::SystemTime;

use crate::{FsError, FsResult, Problem};

/// Number of a node. Must be derived from what the node is, and never be given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

impl Ino {
    /// The root, by FUSE's protocol.
    pub const ROOT: Self = Self(1);
}

/// Kind of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

/// Attributes of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// Its kind.
    pub kind: NodeKind,
    /// Length in bytes.
    pub size: u64,
    /// Bytes really held; what `du` and libvirt's allocation say.
    pub allocated: u64,
    /// Time of the content.
    pub modified: SystemTime,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links; 2 and more for folders.
    pub links: u32,
    /// Its name keeps this node as long as its folder is there: the kernel may remember it for long.
    pub lasting: bool,
}

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: OsString,
    /// Number of the node.
    pub ino: Ino,
    /// Kind of the node.
    pub kind: NodeKind,
}

/// What `statfs` says. Bytes and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Size of the file system below, in bytes.
    pub total: u64,
    /// Of these, free ones.
    pub free: u64,
    /// Nodes.
    pub files: u64,
}

/// A tree of immutable files. Called from many threads at once.
pub trait Tree: Send + Sync + 'static {
    /// The node of that name in a folder.
    fn lookup(&self, folder: Ino, name: &OsStr) -> FsResult<Attr>;
    /// A node's attributes; [`Problem::Stale`] when it is gone.
    fn attr(&self, ino: Ino) -> FsResult<Attr>;
    /// A folder's names, without `.` and `..`, in an order that stays.
    fn list(&self, folder: Ino) -> FsResult<Vec<DirEntry>>;
    /// The folder above; the root's is itself.
    fn parent(&self, folder: Ino) -> FsResult<Ino>;
    /// Where a link points.
    fn readlink(&self, ino: Ino) -> FsResult<OsString>;
    /// Opens a file. What was opened stays readable whatever happens to its name.
    fn open(&self, ino: Ino) -> FsResult<Arc<dyn File>>;
    /// Size and room.
    fn statfs(&self) -> FsResult<Statfs>;

    /// Whether files of it have a [`File::backing`]. Asked once, before the first open.
    fn has_backings(&self) -> bool {
        false
    }
}

/// An opened file. Called from many threads at once; its bytes never change.
pub trait File: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the node's bytes are the same whenever it is opened: the kernel then keeps what it read.
    fn is_lasting(&self) -> bool {
        true
    }

    /// Fills `buf` from `offset`; the range lies within the file. All of it, or an error.
    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()>;

    /// A descriptor whose lock says that the file is in use. Who keeps the mount while its server is replaced keeps a copy of it.
    fn lock(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// A file on disk that has exactly these bytes, if the kernel may read it by itself: without a request, and unchecked. Used
    /// where a keeper holds the mount and the kernel is willing; else [`File::read`] is called as ever.
    fn backing(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Called when the kernel reads [`File::backing`] by itself, until this is dropped.
    fn passed_through(&self) {}

    /// Whether reads of it wait for a disk now, so that this one might.
    fn waits(&self) -> bool {
        false
    }

    /// Called when a read has been answered: work that no reader should wait for.
    fn replied(&self) {}

    /// The first byte of data at or behind `offset`; none when only a hole follows.
    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        Ok((offset < self.len()).then_some(offset))
    }

    /// The first byte of a hole at or behind `offset`; the end of the file is one.
    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        let _ = offset;
        Ok(self.len())
    }
}

/// The range that a read covers, cut at the file's end; an error where it cannot be one.
pub(crate) fn clip(file: &dyn File, offset: u64, size: usize) -> FsResult<usize> {
    if i64::try_from(offset).is_err() {
        return Err(FsError::new(Problem::Invalid, "a read at a negative offset"));
    }
    let left = file.len().saturating_sub(offset);
    Ok(usize::try_from(left).unwrap_or(usize::MAX).min(size))
}
