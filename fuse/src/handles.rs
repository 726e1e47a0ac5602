//! The files and folders that are open now.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{DirEntry, File, FsError, FsResult, Ino, Link, ToKeeper};

/// Who holds a file open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder {
    /// The process that opened it; 0 for the kernel (an NFS server).
    pub pid: u32,
    /// The file.
    pub ino: Ino,
}

/// The open files of a mount.
#[derive(Default)]
pub struct OpenFiles {
    files: RwLock<HashMap<u64, Opened>>,
    /// Open since before this server, and not opened again yet: what they are on could not be read.
    missing: RwLock<HashMap<u64, Holder>>,
    /// Who is told what is opened and closed, so that the next server knows it.
    keeper: Option<Arc<Link>>,
    closed: Mutex<u64>,
    bell: Condvar,
}

struct Opened {
    file: Arc<dyn File>,
    holder: Holder,
}

impl std::fmt::Debug for OpenFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.holders()).finish()
    }
}

impl OpenFiles {
    /// None yet, in a mount that a keeper holds.
    pub(crate) fn told_to(keeper: Arc<Link>) -> Self {
        Self { keeper: Some(keeper), ..Self::default() }
    }

    /// Who holds what, each once, in order.
    pub fn holders(&self) -> Vec<Holder> {
        let mut found: Vec<_> = self.files.read().values().map(|o| o.holder).collect();
        found.extend(self.missing.read().values());
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.files.read().is_empty() && self.missing.read().is_empty()
    }

    /// Waits until a file is closed or the time is up.
    pub fn wait_for_close(&self, patience: std::time::Duration) {
        let mut closed = self.closed.lock();
        if self.is_empty() {
            return;
        }
        self.bell.wait_for(&mut closed, patience);
    }

    /// Adds an opened file. The keeper knows it before the kernel does: what was opened outlives this server.
    pub(crate) fn add(&self, handle: u64, file: Arc<dyn File>, holder: Holder) {
        if let Some(keeper) = &self.keeper {
            let opened = ToKeeper::Opened { handle, ino: holder.ino.0, pid: holder.pid };
            keeper.tell(&opened, file.lock());
        }
        self.files.write().insert(handle, Opened { file, holder });
        self.missing.write().remove(&handle);
    }

    /// Notes a handle whose file cannot be opened now.
    pub(crate) fn miss(&self, handle: u64, holder: Holder) {
        self.missing.write().insert(handle, holder);
    }

    /// A file that is open; one that is missing is opened as soon as it can be.
    pub(crate) fn get(
        &self,
        handle: u64,
        open: impl FnOnce(Ino) -> FsResult<Arc<dyn File>>,
    ) -> FsResult<Arc<dyn File>> {
        if let Some(found) = self.files.read().get(&handle) {
            return Ok(found.file.clone());
        }
        let missing = self.missing.read().get(&handle).copied();
        let holder = missing.ok_or_else(FsError::stale)?;
        let file = open(holder.ino)?;
        self.add(handle, file.clone(), holder);
        Ok(file)
    }

    pub(crate) fn remove(&self, handle: u64) {
        // What closing costs is not paid under the lock.
        let closed = self.files.write().remove(&handle);
        drop(closed);
        self.missing.write().remove(&handle);
        if let Some(keeper) = &self.keeper {
            keeper.tell(&ToKeeper::Closed { handle }, None);
        }
        *self.closed.lock() += 1;
        self.bell.notify_all();
    }
}

/// The process that a thread belongs to: FUSE names the thread, which may be gone when a person asks.
pub(crate) fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(thread)
}

/// Open folders, each with the names that it had when reading it began: offsets stay true whatever happens to it.
#[derive(Default)]
pub(crate) struct OpenFolders {
    folders: Mutex<HashMap<u64, Arc<Vec<DirEntry>>>>,
}

impl OpenFolders {
    pub fn add(&self, handle: u64) {
        self.folders.lock().insert(handle, Arc::default());
    }

    pub fn set(&self, handle: u64, names: Arc<Vec<DirEntry>>) {
        self.folders.lock().insert(handle, names);
    }

    pub fn get(&self, handle: u64) -> Option<Arc<Vec<DirEntry>>> {
        self.folders.lock().get(&handle).cloned()
    }

    pub fn remove(&self, handle: u64) {
        self.folders.lock().remove(&handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;

    struct Empty;

    impl File for Empty {
        fn len(&self) -> u64 {
            0
        }

        fn read(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
            Ok(())
        }
    }

    #[test]
    fn a_handle_from_before_is_open_also_while_its_file_cannot_be_opened() {
        let files = OpenFiles::default();
        let holder = Holder { pid: 3, ino: Ino(7) };
        files.miss(5, holder);
        assert_eq!((files.holders(), files.is_empty()), (vec![holder], false));
        let out_of_reach = |_| Err(FsError::new(Problem::Damage, "the store is out of reach"));
        assert_eq!(files.get(5, out_of_reach).err().map(|e| e.problem()), Some(Problem::Damage));
        // Opened when it can be, once, and by its node.
        let open = |ino: Ino| {
            assert_eq!(ino, Ino(7));
            Ok(Arc::new(Empty) as Arc<dyn File>)
        };
        assert!(files.get(5, open).is_ok() && files.get(5, out_of_reach).is_ok());
        assert_eq!(files.holders(), [holder]);
        files.remove(5);
        assert!(files.is_empty());
        assert_eq!(files.get(5, open).err().map(|e| e.problem()), Some(Problem::Stale));
    }
}
