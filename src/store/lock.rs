//! Locks: one operation at a time on a VM. The kernel releases them when the holder dies.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Store, StoreError, StoreResult, VmName};

/// File name of a lock.
pub(super) const LOCK: &str = ".lock";

/// How often a lock is tried that is held, and how long is waited in between.
const ATTEMPTS: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(20);

/// The exclusive right to change a VM's part of the store; given back when dropped.
#[derive(Debug)]
pub struct VmLock {
    file: File,
}

impl Drop for VmLock {
    /// A note of who holds it that outlives the holder would only mislead.
    fn drop(&mut self) {
        let _ = self.file.set_len(0);
    }
}

/// The right to change what belongs to no VM: settings, offerings.
#[derive(Debug)]
pub struct ConfigLock {
    _file: File,
}

impl Store {
    /// Takes a VM's lock for `command` ("backup web1"), or says who holds it.
    pub fn lock_vm(&self, vm: &VmName, command: &str) -> StoreResult<VmLock> {
        if !self.vm_dir(vm).is_dir() {
            self.vm(vm)?;
        }
        let path = self.vm_dir(vm).join(LOCK);
        let file = open(&path)?;
        for attempt in 1.. {
            match file.try_lock() {
                Ok(()) => return Ok(VmLock { file: note_holder(file, command) }),
                // Who only looks whether it is held holds it for a moment himself, and who took it just now may not have
                // said so yet.
                Err(TryLockError::WouldBlock) if attempt < ATTEMPTS => std::thread::sleep(BETWEEN),
                Err(TryLockError::WouldBlock) => break,
                Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &path)(e)),
            }
        }
        Err(StoreError::Busy { what: format!("the VM {vm}"), holder: holder(&file, &path) })
    }

    /// Whether someone holds a VM's lock; changes nothing.
    pub fn is_locked(&self, vm: &VmName) -> bool {
        File::open(self.vm_dir(vm).join(LOCK))
            .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Waits for and takes the lock on settings and offerings: it is only ever held for one small write.
    pub fn lock_config(&self) -> StoreResult<ConfigLock> {
        let path = self.root().join(LOCK);
        let file = open(&path)?;
        file.lock().map_err(StoreError::io("lock", &path))?;
        Ok(ConfigLock { _file: file })
    }
}

fn open(path: &PathBuf) -> StoreResult<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(StoreError::io("open the lock file", path))
}

/// Who holds it is a help for people only: failing to write it must not fail the operation.
fn note_holder(mut file: File, command: &str) -> File {
    let text = format!("`knibfs {command}`, process {} on host {}\n", std::process::id(), hostname());
    let noted = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    if let Err(error) = noted {
        tracing::debug!("cannot note the holder of a lock: {error}");
    }
    file
}

fn holder(mut file: &File, path: &Path) -> String {
    let mut text = String::new();
    let read = (&mut file).take(500).read_to_string(&mut text);
    match text.trim() {
        line if read.is_ok() && !line.is_empty() => line.chars().filter(|c| !c.is_control()).collect(),
        _ => format!("another process holds {}", path.display()),
    }
}

/// This host's name.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::store_with_vm;

    #[test]
    fn a_second_operation_on_a_vm_is_refused_and_told_who_is_at_work() {
        let (_dir, store, vm) = store_with_vm();
        let held = store.lock_vm(&vm, "backup web1").unwrap();
        let refusal = store.lock_vm(&vm, "check web1").unwrap_err().to_string();
        assert!(refusal.contains("`knibfs backup web1`"), "{refusal}");
        assert!(refusal.contains(&format!("process {}", std::process::id())), "{refusal}");
        assert!(store.is_locked(&vm));
        drop(held);
        assert!(!store.is_locked(&vm));
        let left = std::fs::read(store.vm_dir(&vm).join(super::LOCK)).unwrap();
        assert_eq!(left, b"", "nobody holds it");
        store.lock_vm(&vm, "check web1").unwrap();
    }

    #[test]
    fn there_is_no_lock_of_a_vm_that_is_not_there() {
        let (_dir, store, _) = store_with_vm();
        assert!(store.lock_vm(&"other".parse().unwrap(), "backup other").unwrap_err().is_not_found());
    }
}
