//! The files and folders that are open now.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{DirEntry, File, FsError, FsResult, Ino};

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
    next: AtomicU64,
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
    /// Who holds what, each once, in order.
    pub fn holders(&self) -> Vec<Holder> {
        let mut found: Vec<_> = self.files.read().values().map(|o| o.holder).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.files.read().is_empty()
    }

    /// Waits until a file is closed or the time is up.
    pub fn wait_for_close(&self, patience: std::time::Duration) {
        let mut closed = self.closed.lock();
        if self.is_empty() {
            return;
        }
        self.bell.wait_for(&mut closed, patience);
    }

    pub(crate) fn add(&self, file: Arc<dyn File>, holder: Holder) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.files.write().insert(handle, Opened { file, holder });
        handle
    }

    pub(crate) fn get(&self, handle: u64) -> FsResult<Arc<dyn File>> {
        self.files.read().get(&handle).map(|o| o.file.clone()).ok_or_else(FsError::stale)
    }

    pub(crate) fn remove(&self, handle: u64) {
        // What closing costs is not paid under the lock.
        let closed = self.files.write().remove(&handle);
        drop(closed);
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
    next: AtomicU64,
}

impl OpenFolders {
    pub fn add(&self) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.folders.lock().insert(handle, Arc::default());
        handle
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
