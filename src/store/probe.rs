//! Whether a file system can hold a store: tried at `init`, refused with what to mount it with.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

use super::{StoreError, StoreResult, atomic};

/// Tries what a store relies on: replacing a file by renaming, flushing a folder, locks that others see.
pub(super) fn probe(dir: &Path) -> StoreResult<()> {
    let path = dir.join(format!(".probe-{}", uuid::Uuid::new_v4().simple()));
    let outcome = try_all(&path);
    let _ = fs::remove_file(&path);
    outcome.map_err(|error| match error {
        // A full disk or a lack of rights is no fault of the file system's kind.
        error @ StoreError::Io { .. } => error,
        other => StoreError::Unsuitable { path: dir.into(), what: other.to_string() },
    })
}

fn try_all(path: &Path) -> StoreResult<()> {
    atomic::write(path, b"one", 0o600)?;
    // Replacing is what every later change does.
    atomic::write(path, b"two", 0o600)?;
    let read = fs::read(path).map_err(StoreError::io("read", path))?;
    if read != b"two" {
        return Err(StoreError::Invalid("a file that was replaced by renaming still reads as before".into()));
    }
    let open = || OpenOptions::new().read(true).write(true).open(path).map_err(StoreError::io("open", path));
    let (first, second) = (open()?, open()?);
    lock(&first, path)?;
    match second.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(()),
        Ok(()) => Err(StoreError::Invalid(
            "its locks keep nobody out; mount NFS without `nolock`, CIFS without `nobrl`".into(),
        )),
        Err(TryLockError::Error(e)) => Err(no_locks(&e)),
    }
}

fn lock(file: &File, path: &Path) -> StoreResult<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Err(no_locks(&e)),
        Err(TryLockError::Error(e)) => Err(StoreError::io("lock", path)(e)),
        Err(TryLockError::WouldBlock) => Err(StoreError::Invalid("it says that a new file is locked".into())),
    }
}

fn no_locks(error: &io::Error) -> StoreError {
    StoreError::Invalid(format!(
        "it has no locks ({error}); for NFS start the lock service, mount CIFS without `nobrl`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_file_system_will_do_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        probe(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_system_that_cannot_be_written_is_said_as_such() {
        // Nobody can make files there, root neither.
        let error = probe(Path::new("/proc/self")).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error}");
    }
}
