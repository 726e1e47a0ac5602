//! Write beside, fsync, rename, fsync the folder: the only way in which a store changes.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::{StoreError, StoreResult};
use crate::failpoint;

/// Replaces or makes `path` with `bytes` at once: whoever reads, also after a crash, sees the old or the new whole.
///
/// `mode` is the file's permissions (0o600 for what holds secrets).
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> StoreResult<()> {
    let beside = beside(path)?;
    failpoint::hit("write.begin");
    let outcome = write_beside(&beside, bytes, mode).and_then(|()| {
        failpoint::hit("write.rename");
        fs::rename(&beside, path).map_err(StoreError::io("rename into place", path))
    });
    if outcome.is_err() {
        // What is left of a failed write (a full disk, mostly) only takes room.
        let _ = fs::remove_file(&beside);
        return outcome;
    }
    failpoint::hit("write.done");
    sync_parent(path)
}

fn write_beside(beside: &Path, bytes: &[u8], mode: u32) -> StoreResult<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(beside)
        .map_err(StoreError::io("create", beside))?;
    file.write_all(bytes).map_err(StoreError::io("write", beside))?;
    file.sync_all().map_err(StoreError::io("flush", beside))
}

/// A name of the same folder that no reader takes for a record and no other writer uses.
fn beside(path: &Path) -> StoreResult<PathBuf> {
    let name = path
        .file_name()
        .and_then(|n| n.to_str())
        .ok_or_else(|| StoreError::Invalid(format!("{} has no file name", path.display())))?;
    Ok(path.with_file_name(format!(".{name}.{}.tmp", uuid::Uuid::new_v4().simple())))
}

/// Renames and makes the rename last; both folders are flushed.
pub fn rename(from: &Path, to: &Path) -> StoreResult<()> {
    failpoint::hit("rename.begin");
    fs::rename(from, to).map_err(StoreError::io("rename into place", to))?;
    failpoint::hit("rename.done");
    sync_parent(to)?;
    if from.parent() != to.parent() { sync_parent(from) } else { Ok(()) }
}

/// Unlinks a file and makes that last; a file that is not there is fine.
pub fn remove(path: &Path) -> StoreResult<()> {
    failpoint::hit("remove.begin");
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(StoreError::io("delete", path)(e)),
    }
}

/// Flushes the folder that holds `path`.
pub fn sync_parent(path: &Path) -> StoreResult<()> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Flushes a folder's entries.
pub fn sync_dir(dir: &Path) -> StoreResult<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::io("flush the folder", dir))
}

/// Makes a folder, and makes that last; one that is there already is fine.
pub fn create_dir(dir: &Path) -> StoreResult<()> {
    failpoint::hit("create-dir.begin");
    match fs::create_dir(dir) {
        Ok(()) => sync_parent(dir),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(StoreError::io("create the folder", dir)(e)),
    }
}

/// Whether `name` is a file that an interrupted [`write`] left: safe to delete under the lock of its owner.
pub fn is_leftover(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, b"first, and longer", 0o600).unwrap();
        write(&path, b"second", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, b"x", 0o644).is_err(), "a folder cannot be replaced by a file");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
