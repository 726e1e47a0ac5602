//! Leases: who uses a backup, so that it is not taken away. Counted and on disk; a flag is not enough.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::lock::hostname;
use super::{BackupId, Operation, Store, StoreError, StoreResult, atomic};

/// Purpose of the lease that a compression holds on its backup.
pub const COMPRESSION: &str = "compression";
/// Beginning of the purpose of leases that readers of flat disks hold: they read on when the stored file is swapped.
pub const RAW_VIEW: &str = "flat disk open in ";
/// Beginning of the purpose of leases that readers of stored files hold.
pub const STORED_FILE: &str = "stored file open in ";

/// One use of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseInfo {
    /// The backup.
    pub backup: BackupId,
    /// For people: "mounted at /mnt", "compression".
    pub purpose: String,
    /// The host that uses it.
    pub host: String,
    /// The process that uses it.
    pub pid: u32,
    /// Since when.
    pub since: Timestamp,
}

/// A use of a backup by this process; ends when dropped or when the process dies.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    file: File,
}

impl Store {
    /// Takes a lease. The file stays locked while the lease lives, so that one of a dead process is known as such.
    pub fn lease(&self, backup: BackupId, purpose: &str) -> StoreResult<Lease> {
        self.lease_in_name_of(std::process::id(), backup, purpose)
    }

    /// The same, named after the process that people find and end: the locks of a mount's servers outlive these.
    pub fn lease_in_name_of(&self, pid: u32, backup: BackupId, purpose: &str) -> StoreResult<Lease> {
        let info =
            LeaseInfo { backup, purpose: purpose.into(), host: hostname(), pid, since: Timestamp::now() };
        let text = serde_json::to_vec(&info)
            .map_err(|e| StoreError::Invalid(format!("cannot encode a lease: {e}")))?;
        let name = format!("{backup}.{}.json", uuid::Uuid::new_v4().simple());
        // Locked before it has its name: whoever found it unlocked would take it for a dead process's.
        let (path, beside) = (self.leases_dir().join(&name), self.leases_dir().join(format!(".{name}.tmp")));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&beside)
            .map_err(StoreError::io("create the lease", &path))?;
        let named = file
            .lock()
            .and_then(|()| file.write_all(&text))
            .and_then(|()| fs::rename(&beside, &path))
            .map_err(StoreError::io("write the lease", &path));
        if let Err(error) = named {
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        atomic::sync_parent(&path)?;
        Ok(Lease { path, file })
    }

    /// The living leases of a backup. What dead processes left is cleared away.
    pub fn leases(&self, backup: BackupId) -> StoreResult<Vec<LeaseInfo>> {
        let dir = self.leases_dir();
        let prefix = format!("{backup}.");
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("read the folder", &dir))? {
            let entry = entry.map_err(StoreError::io("read the folder", &dir))?;
            if !entry.file_name().to_str().is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".json")) {
                continue;
            }
            let path = entry.path();
            let Ok(file) = File::open(&path) else { continue };
            if file.try_lock_shared().is_ok() {
                // Its process is gone. Losing a race with another that clears is fine.
                let _ = fs::remove_file(&path);
                continue;
            }
            let text = match fs::read(&path) {
                Ok(text) => text,
                // It ended just now.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("read", &path)(e)),
            };
            found.push(serde_json::from_slice(&text).unwrap_or_else(|_| LeaseInfo {
                backup,
                purpose: "unknown (its record is being written or damaged)".into(),
                host: "unknown".into(),
                pid: 0,
                since: Timestamp::UNIX_EPOCH,
            }));
        }
        found.extend(self.restores_of(backup)?);
        Ok(found)
    }

    /// Restores that are not at their end: with or without a living process, they need the backup.
    fn restores_of(&self, backup: BackupId) -> StoreResult<Vec<LeaseInfo>> {
        let mut found = Vec::new();
        for journal in self.unfinished()? {
            let entry = journal.entry();
            match &entry.operation {
                Operation::Restore(op) if op.backup == backup => found.push(LeaseInfo {
                    backup,
                    purpose: format!(
                        "restore to {} (`knibfs recover` ends one that was interrupted)",
                        entry.vm
                    ),
                    host: entry.host.clone(),
                    pid: entry.pid,
                    since: entry.started,
                }),
                _ => {}
            }
        }
        Ok(found)
    }
}

/// Its lock: it lives for as long as a process holds a copy of this descriptor.
impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot delete the lease {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::store_with_vm;
    use super::*;

    #[test]
    fn leases_are_counted_and_end_with_their_holder() {
        let (_dir, store, _) = store_with_vm();
        let (used, other) = (BackupId::random(), BackupId::random());
        let first = store.lease(used, "mounted at /mnt").unwrap();
        let second = store.lease(used, "compression").unwrap();
        assert_eq!(store.leases(used).unwrap().len(), 2);
        assert_eq!(store.leases(other).unwrap(), []);
        drop(first);
        assert_eq!(store.leases(used).unwrap()[0].purpose, "compression");
        drop(second);
        assert_eq!(store.leases(used).unwrap(), []);
    }

    #[test]
    fn a_lease_is_never_taken_for_a_dead_process_s_while_it_is_made() {
        let (_dir, store, _) = store_with_vm();
        let used = BackupId::random();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    store.leases(used).unwrap();
                }
            });
            for _ in 0..200 {
                let lease = store.lease(used, "mounted at /mnt").unwrap();
                assert!(lease.path.exists(), "it was cleared away");
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn what_a_dead_process_left_is_no_lease() {
        let (_dir, store, _) = store_with_vm();
        let used = BackupId::random();
        let path = store.leases_dir().join(format!("{used}.dead.json"));
        fs::write(&path, "{}").unwrap();
        assert_eq!(store.leases(used).unwrap(), []);
        assert!(!path.exists());
    }
}
