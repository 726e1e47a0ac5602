//! Opens what the store names: files, never a link to somewhere else, a pipe that never answers, or a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{StoreError, StoreResult};

/// Opens a regular file to read.
///
/// # Errors
/// As for any opening; [`StoreError::Damaged`] where the name is missing or is a link, a pipe or a device.
pub fn open(path: &Path) -> StoreResult<File> {
    // A pipe without a writer would be waited for without an end.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let opened = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path);
    let file = opened.map_err(|e| match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => StoreError::damaged(path, "it is missing"),
        // A link; a socket, or a device without a driver.
        Some(Errno::LOOP | Errno::NXIO | Errno::NODEV) => not_a_file(path),
        _ => StoreError::io("open", path)(e),
    })?;
    let found = file.metadata().map_err(StoreError::io("look at", path))?;
    if found.is_file() { Ok(file) } else { Err(not_a_file(path)) }
}

/// Opens a regular file below a folder, with no link on the way; none where there is none.
///
/// # Errors
/// As [`open`].
pub fn open_below(dir: &Path, below: &str) -> StoreResult<Option<File>> {
    let path = dir.join(below);
    let io = |doing| move |e: Errno| StoreError::Io { doing, path: dir.join(below), source: e.into() };
    let folder = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(folder.map_err(io("open"))?, below, flags, Mode::empty(), within);
    let file = match opened {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(Errno::LOOP | Errno::XDEV | Errno::NXIO | Errno::NODEV) => return Err(not_a_file(&path)),
        Err(error) => return Err(io("open")(error)),
    };
    let found = file.metadata().map_err(StoreError::io("look at", &path))?;
    if found.is_file() { Ok(Some(file)) } else { Err(not_a_file(&path)) }
}

/// Whether a name is a folder itself, not a link to one.
pub fn is_folder(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_dir()),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A file's name while it is not, or no longer, the right one: `new` before a swap, `old` until the manifest speaks of the
/// new one.
pub fn swap_name(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

fn not_a_file(path: &Path) -> StoreError {
    StoreError::damaged(path, "it is not a regular file")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_files_are_opened_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "x").unwrap();
        assert!(open(&path("file")).is_ok());
        symlink(path("file"), path("link")).unwrap();
        let mode = Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for other in [path("link"), path("pipe"), path("socket"), path("."), "/dev/null".into()] {
            let error = open(&other).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{}: {error}", other.display());
        }
        assert!(open(&path("none")).unwrap_err().to_string().contains("missing"));
        symlink(dir.path(), path("folder")).unwrap();
        assert!(is_folder(dir.path()).unwrap() && !is_folder(&path("folder")).unwrap());
        let below = |name: &str| open_below(dir.path(), name);
        std::fs::create_dir(path("in")).unwrap();
        std::fs::write(path("in/file"), "x").unwrap();
        symlink("in", path("way")).unwrap();
        assert!(below("in/file").unwrap().is_some() && below("in/none").unwrap().is_none());
        for other in ["link", "pipe", "in", "way/file", "in/../../etc/passwd", "/etc/passwd"] {
            assert!(below(other).unwrap_err().to_string().contains("not a regular file"), "{other}");
        }
    }
}
