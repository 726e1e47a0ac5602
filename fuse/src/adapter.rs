//! A [`Tree`] as fuser wants it. Translates and nothing else: no rule about content stands here.

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::awake::Awake;
use crate::handles::{Holder, OpenFolders, process_of};
use crate::tree::clip;
use crate::workers::Workers;
use crate::{Attr, DirEntry, File, FsError, FsResult, Ino, NodeKind, OpenFiles, Problem, Tree, with_buffer};

/// How long the kernel may remember what can change: a new backup is seen after this.
const SHORT: Duration = Duration::from_secs(1);
/// How long it may remember what cannot.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// Requests of the kernel's readahead and native aio in flight.
const BACKGROUND: u16 = 64;
/// How many file systems may lie on each other in a mount that passes files through: this one on one that lies on none. That
/// leaves room for one above it.
const STACK_DEPTH: u32 = 1;
/// No Linux file system has longer names. Bytes.
const LONGEST_NAME: usize = 255;
/// `lseek`'s whence.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
/// Node numbers are never used again, so there is one generation.
const GENERATION: Generation = Generation(0);

/// Set in the number of a request that the kernel hands out again.
const RESENT: u64 = 1 << 63;

pub(crate) struct Adapter {
    tree: Arc<dyn Tree>,
    files: Arc<OpenFiles>,
    folders: OpenFolders,
    workers: Workers,
    awake: Awake,
}

/// The handle that a request opens: the request's own number, so that the next server gives the same when it is asked again,
/// and none that another request has been given.
fn handle_of(request: &Request) -> u64 {
    request.unique().0 & !RESENT
}

impl Adapter {
    /// Answers what comes from `queue`, with `threads` in all; the session must be given [`Self::takers`] of them.
    pub fn new(
        tree: Arc<dyn Tree>,
        files: Arc<OpenFiles>,
        threads: usize,
        queue: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let (folders, workers) = (OpenFolders::default(), Workers::new(threads));
        Ok(Self { tree, files, folders, workers, awake: Awake::at(queue)? })
    }

    /// Threads that take requests from the kernel.
    pub fn takers(&self) -> usize {
        self.workers.takers()
    }

    fn names(&self, folder: Ino, handle: FileHandle, offset: u64) -> FsResult<Arc<Vec<DirEntry>>> {
        // From the beginning: as the folder is now. Later: as it was then.
        if offset > 0
            && let Some(names) = self.folders.get(handle.0).filter(|n| !n.is_empty())
        {
            return Ok(names);
        }
        let entry = |name: &str, ino| DirEntry { name: name.into(), ino, kind: NodeKind::Folder };
        let mut names = vec![entry(".", folder), entry("..", self.tree.parent(folder)?)];
        names.extend(self.tree.list(folder)?);
        let names = Arc::new(names);
        self.folders.set(handle.0, names.clone());
        Ok(names)
    }

    fn find(&self, parent: Ino, name: &OsStr) -> FsResult<Attr> {
        match name.as_bytes() {
            // NFS servers ask for these.
            b"." => self.tree.attr(parent),
            b".." => self.tree.attr(self.tree.parent(parent)?),
            bytes if bytes.len() > LONGEST_NAME => Err(FsError::new(Problem::NameTooLong, "name too long")),
            _ => self.tree.lookup(parent, name),
        }
    }

    fn file(&self, handle: FileHandle) -> FsResult<Arc<dyn File>> {
        self.files.get(handle.0, |ino| self.tree.open(ino))
    }

    fn seek(&self, handle: FileHandle, offset: i64, whence: i32) -> FsResult<i64> {
        let no_more = || FsError::new(Problem::NoMoreData, "nothing more");
        let file = self.file(handle)?;
        let from = u64::try_from(offset).ok().filter(|o| *o < file.len()).ok_or_else(no_more)?;
        let found = match whence {
            SEEK_DATA => file.next_data(from)?.filter(|at| *at < file.len()).ok_or_else(no_more)?,
            SEEK_HOLE => file.next_hole(from)?.min(file.len()),
            _ => return Err(FsError::new(Problem::Invalid, "an unknown kind of seek")),
        };
        i64::try_from(found).map_err(|_| no_more())
    }
}

/// Runs a handler's work: a panic becomes an error, and what a person must know goes to the log.
fn guarded<T>(doing: &str, ino: Ino, work: impl FnOnce() -> FsResult<T>) -> Result<T, Errno> {
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(FsError::new(Problem::Bug, "the handler panicked: please report this as a bug"))
    });
    result.map_err(|error| {
        if error.is_worth_a_line() {
            tracing::error!("{doing} of node {:x}: {error}", ino.0);
        }
        error.errno()
    })
}

fn answer_read(file: &dyn File, ino: Ino, offset: u64, len: usize, reply: ReplyData) {
    with_buffer(len, |buffer| match guarded("reading", ino, || file.read(offset, buffer)) {
        Ok(()) => reply.data(buffer),
        Err(errno) => reply.error(errno),
    });
    let _ = guarded("preparing for the next read", ino, || {
        file.replied();
        Ok(())
    });
}

fn file_attr(attr: &Attr) -> FileAttr {
    // 1970 looks like a bug to people and is one to some programs: the tree gives real times.
    let time: SystemTime = attr.modified;
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.links,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Folder => FileType::Directory,
        NodeKind::File => FileType::RegularFile,
        NodeKind::Link => FileType::Symlink,
    }
}

/// How long the kernel may remember attributes, and the name.
fn ttls(attr: &Attr) -> (Duration, Duration) {
    match (attr.kind, attr.lasting) {
        (NodeKind::Folder, _) | (_, false) => (SHORT, SHORT),
        (_, true) => (LONG, LONG),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // No POSIX_LOCKS or FLOCK_LOCKS: QEMU's locks stay in the kernel. What it does not know is left out.
        for capability in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_HAS_RESEND,
        ] {
            let _ = config.add_capabilities(capability);
        }
        let _ = config.set_max_background(BACKGROUND);
        if self.tree.has_backings() && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            let _ = config.set_max_stack_depth(STACK_DEPTH);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let parent = Ino(parent.0);
        match guarded("looking a name up", parent, || self.find(parent, name)) {
            Ok(attr) => {
                let (attrs, names) = ttls(&attr);
                reply.entry_with_ttls(&attrs, &names, &file_attr(&attr), GENERATION);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let ino = Ino(ino.0);
        match guarded("looking at the attributes", ino, || self.tree.attr(ino)) {
            Ok(attr) => reply.attr(&ttls(&attr).0, &file_attr(&attr)),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let ino = Ino(ino.0);
        match guarded("reading the link", ino, || self.tree.readlink(ino)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let ino = Ino(ino.0);
        let opened = guarded("opening", ino, || {
            if flags.acc_mode() != OpenAccMode::O_RDONLY {
                return Err(FsError::new(Problem::ReadOnly, "opened for writing"));
            }
            self.tree.open(ino)
        });
        match opened {
            Ok(file) => {
                let lasting = file.is_lasting();
                let handle = handle_of(req);
                let holder = Holder { pid: process_of(req.pid()), ino };
                if let Some(id) = self.files.open(handle, file, holder) {
                    // Its pages are those of the file behind it.
                    let (handle, flags) = (FileHandle(handle), FopenFlags::FOPEN_NOFLUSH);
                    return knib_raw::device::answer_with_backing(reply, handle, flags, id);
                }
                // Where a node's bytes never change, the kernel's pages of it stay true.
                let cache = if lasting { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::FOPEN_DIRECT_IO };
                let flags = cache | FopenFlags::FOPEN_NOFLUSH;
                reply.opened(FileHandle(handle), flags);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let ino = Ino(ino.0);
        let found = guarded("reading", ino, || {
            let file = self.file(fh)?;
            let len = clip(&*file, offset, size as usize)?;
            Ok((file, len))
        });
        let (file, len) = match found {
            Ok(found) => found,
            Err(errno) => return reply.error(errno),
        };
        let reading = self.workers.reading();
        self.awake.came(reading.is_alone());
        if reading.is_last() && file.waits() {
            let answer = Box::new(move || answer_read(&*file, ino, offset, len, reply));
            if let Err(answer) = self.workers.hand_over(answer) {
                answer();
            }
            return;
        }
        answer_read(&*file, ino, offset, len, reply);
        if reading.end() {
            self.awake.wait();
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        match guarded("closing", Ino(ino.0), || {
            self.files.remove(fh.0);
            Ok(())
        }) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match guarded("seeking", Ino(ino.0), || self.seek(fh, offset, whence)) {
            Ok(at) => reply.offset(at),
            Err(errno) => reply.error(errno),
        }
    }

    /// QEMU asks every image that it opens whether it is a block device.
    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn opendir(&self, req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = handle_of(req);
        self.folders.add(handle);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let ino = Ino(ino.0);
        match guarded("reading the folder", ino, || self.names(ino, fh, offset)) {
            Ok(names) => {
                for (next, entry) in
                    (1..).zip(names.iter()).skip(usize::try_from(offset).unwrap_or(usize::MAX))
                {
                    if reply.add(INodeNo(entry.ino.0), next, file_type(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let ino = Ino(ino.0);
        let listed = guarded("reading the folder", ino, || {
            let names = self.names(ino, fh, offset)?;
            for (next, entry) in (1..).zip(names.iter()).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
                // Gone since the folder was read: leave it out.
                let Ok(attr) = self.tree.attr(entry.ino) else { continue };
                let (ttl, _) = ttls(&attr);
                let ino = INodeNo(entry.ino.0);
                if reply.add(ino, next, &entry.name, &ttl, &file_attr(&attr), GENERATION) {
                    break;
                }
            }
            Ok(())
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.folders.remove(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match guarded("asking for the size", Ino(ino.0), || self.tree.statfs()) {
            Ok(found) => {
                let (blocks, free) = (found.total / 4096, found.free / 4096);
                // Free, but not for those who cannot write here.
                reply.statfs(blocks, free, 0, found.files, 0, 4096, LONGEST_NAME as u32, 4096);
            }
            Err(errno) => reply.error(errno),
        }
    }

    // Writers. The mount is read-only, so the kernel answers them itself, unless someone mounts it again `rw`.

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    // There are no extended attributes: the kernel tells callers so and does not ask again.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
