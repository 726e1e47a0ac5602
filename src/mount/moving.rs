//! A flat disk that is open while its stored files are swapped: it moves to the new ones, so that the old ones' room is free.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use knib_fuse::{BlockCache, BlockFile, File, FsResult, Plan, Problem, ReadAhead};
use parking_lot::{Condvar, Mutex, RwLock};

use super::catalog::Stamp;
use super::node::BackupRef;
use crate::store::{DiskName, Lease, Manifest, Store};
use crate::verified::VerifiedReader;

/// How often manifests of open disks are looked at.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked whether the mount is still there.
const IDLE: Duration = Duration::from_secs(60);
/// How often in a row the files of a disk are expected to be replaced while they are opened.
const TRIES: usize = 20;

/// Opens flat disks and keeps them on the files that the manifests name.
pub struct Disks {
    store: Store,
    reader: Arc<VerifiedReader>,
    blocks: Arc<BlockCache>,
    ahead: Arc<ReadAhead>,
    open: Mutex<Vec<Weak<MovingDisk>>>,
    opened: Condvar,
}

/// An open flat disk.
struct MovingDisk {
    of: BackupRef,
    disk: DiskName,
    now: RwLock<Arc<BlockFile>>,
    /// The manifests of its chain as they were before its files were opened.
    seen: Mutex<Seen>,
    lease: Option<Arc<Lease>>,
}

/// A handle on one.
pub struct OpenDisk(Arc<MovingDisk>);

/// Manifests and what they were.
type Seen = Vec<(Option<Stamp>, PathBuf)>;

impl Disks {
    /// None is open yet. A thread follows those that will be.
    pub fn start(
        store: Store,
        reader: Arc<VerifiedReader>,
        blocks: Arc<BlockCache>,
        ahead: Arc<ReadAhead>,
    ) -> std::io::Result<Arc<Self>> {
        let disks =
            Arc::new(Self { store, reader, blocks, ahead, open: Mutex::default(), opened: Condvar::new() });
        let followed = Arc::downgrade(&disks);
        std::thread::Builder::new().name("follow".into()).spawn(move || follow(&followed))?;
        Ok(disks)
    }

    /// Opens a disk of a backup, which must still be the same one.
    pub fn open(&self, of: &BackupRef, disk: &DiskName) -> FsResult<OpenDisk> {
        let lease = self.reader.lease_disk(of.id);
        let (file, seen) = self.files(of, disk, lease.as_ref())?;
        let moving = Arc::new(MovingDisk {
            of: of.clone(),
            disk: disk.clone(),
            now: RwLock::new(Arc::new(file)),
            seen: Mutex::new(seen),
            lease,
        });
        let mut open = self.open.lock();
        open.retain(|disk| disk.strong_count() > 0);
        open.push(Arc::downgrade(&moving));
        self.opened.notify_all();
        Ok(OpenDisk(moving))
    }

    fn files(
        &self,
        of: &BackupRef,
        disk: &DiskName,
        lease: Option<&Arc<Lease>>,
    ) -> FsResult<(BlockFile, Seen)> {
        let opened = while_stale(|| {
            let chain = self.reader.chain(&of.manifest(&self.store, self.reader.damage())?, disk)?;
            let stamp = |m: &Manifest| {
                let path = self.store.manifest_path(&m.vm, &m.name);
                (Stamp::of(&path).ok().flatten(), path)
            };
            // Looked at before its files are opened by manifests that are read once more: whatever is swapped from now on is
            // seen to be another.
            let seen: Seen = chain.iter().map(stamp).collect();
            let top = of.manifest(&self.store, self.reader.damage())?;
            Ok((self.reader.disk(&top, disk, lease.cloned())?, seen))
        })?;
        let file = BlockFile::new(Arc::new(opened.0), self.blocks.clone(), self.ahead.clone());
        Ok((file, opened.1))
    }

    /// Moves a disk to the files that are its own now, if they are others.
    fn follow(&self, disk: &MovingDisk) {
        let is_another = |(was, path): &(Option<Stamp>, PathBuf)| {
            Stamp::of(path).is_ok_and(|now| now.is_some() && now != *was)
        };
        if !disk.seen.lock().iter().any(is_another) {
            return;
        }
        match self.files(&disk.of, &disk.disk, disk.lease.as_ref()) {
            Ok((file, seen)) => {
                *disk.now.write() = Arc::new(file);
                *disk.seen.lock() = seen;
            }
            // It reads on from the files that it has.
            Err(error) => {
                tracing::debug!(
                    "{}/{}: {} stays on its old files: {error}",
                    disk.of.vm,
                    disk.of.name,
                    disk.disk
                );
            }
        }
    }
}

/// Runs `open` again while what it opens is replaced under it.
pub fn while_stale<T>(mut open: impl FnMut() -> FsResult<T>) -> FsResult<T> {
    for _ in 0..TRIES {
        match open() {
            Err(error) if error.problem() == Problem::Stale => {}
            done => return done,
        }
    }
    open()
}

fn follow(disks: &Weak<Disks>) {
    while let Some(disks) = disks.upgrade() {
        let mut open = disks.open.lock();
        if open.iter().all(|disk| disk.strong_count() == 0) {
            open.clear();
            disks.opened.wait_for(&mut open, IDLE);
        }
        let now: Vec<_> = open.iter().filter_map(Weak::upgrade).collect();
        drop(open);
        now.iter().for_each(|disk| disks.follow(disk));
        drop((now, disks));
        std::thread::sleep(AGAIN);
    }
}

impl OpenDisk {
    /// Has these parts decoded ahead, as [`BlockFile::foresee`] does.
    pub fn foresee(&self, parts: Arc<[u32]>, place: usize) -> Arc<Plan> {
        self.file().foresee(parts, place)
    }

    fn file(&self) -> Arc<BlockFile> {
        self.0.now.read().clone()
    }
}

impl File for OpenDisk {
    fn len(&self) -> u64 {
        self.file().len()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.file().read(offset, buf)
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.0.lease.as_deref().map(AsFd::as_fd)
    }

    fn waits(&self) -> bool {
        self.file().waits()
    }

    fn replied(&self) {
        self.file().replied();
    }

    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        self.file().next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        self.file().next_hole(offset)
    }
}
