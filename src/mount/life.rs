//! The life of a mount: where it may be, who holds it, how it ends.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use knib_fuse::{mount_at, unmount};
use rustix::mount::UnmountFlags;

/// Source of our mounts, and behind `fuse.` their type.
pub(super) const NAME: &str = "knibfs";
const TYPE: &str = "fuse.knibfs";

/// Why a folder cannot be a mount point, or not be unmounted; each with the way out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the sentences say it
pub enum PlaceError {
    #[error("there is no folder {}: create it first", .0.display())]
    Missing(PathBuf),
    #[error("{} is not a folder: name one to mount at", .0.display())]
    NotAFolder(PathBuf),
    #[error("{} lies in the store: mount somewhere else", .0.display())]
    InTheStore(PathBuf),
    #[error("the store lies below {}: a mount there would hide it; mount somewhere else", .0.display())]
    OverTheStore(PathBuf),
    #[error("a knibfs store is already mounted at {}: use it, or `knibfs umount` it first", .0.display())]
    Mounted(PathBuf),
    #[error("no knibfs store is mounted at {}: `findmnt -t fuse.knibfs` lists those that are", .0.display())]
    NotMounted(PathBuf),
    #[error("{} is in use by {holders}: stop them first, or take the mount away under them with `umount -l`", path.display())]
    Busy { path: PathBuf, holders: String },
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// A folder that a store can be mounted at: absolute, without links.
#[derive(Debug, Clone)]
pub struct MountPoint(PathBuf);

impl MountPoint {
    /// Checks a folder. What a dead server left there is taken away first.
    pub fn check(path: &Path, store: &Path) -> Result<Self, PlaceError> {
        let place = resolve(path)?;
        if let Some(found) = ours(&place)? {
            if !is_stale(&place) {
                return Err(PlaceError::Mounted(place));
            }
            tracing::warn!("the server of the mount at {} is gone: cleaned up", found.display());
            unmount(&place).map_err(failed("take away the dead mount at", &place))?;
        }
        match fs::metadata(&place) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(PlaceError::NotAFolder(place)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(PlaceError::Missing(place)),
            Err(e) => return Err(failed("look at", &place)(e)),
        }
        if place.starts_with(store) {
            return Err(PlaceError::InTheStore(place));
        }
        if store.starts_with(&place) {
            return Err(PlaceError::OverTheStore(place));
        }
        if fs::read_dir(&place).is_ok_and(|mut names| names.next().is_some()) {
            // As mount(8) does: some put a file there that says that nothing is mounted.
            tracing::warn!(
                "{} is not empty: what lies there is hidden until `knibfs umount` takes the mount away",
                place.display()
            );
        }
        Ok(Self(place))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Takes a mount away, unless it is in use.
pub fn unmount_unless_busy(path: &Path) -> Result<(), PlaceError> {
    let place = resolve(path)?;
    if ours(&place)?.is_none() {
        return Err(PlaceError::NotMounted(place));
    }
    if is_stale(&place) {
        return unmount(&place).map_err(failed("unmount", &place));
    }
    match rustix::mount::unmount(&place, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => {
            let holders = describe(&holders_of(&place));
            Err(PlaceError::Busy { path: place, holders })
        }
        Err(rustix::io::Errno::PERM) => {
            let held = holders_of(&place);
            if !held.is_empty() {
                return Err(PlaceError::Busy { path: place, holders: describe(&held) });
            }
            unmount(&place).map_err(failed("unmount", &place))
        }
        Err(error) => Err(failed("unmount", &place)(error.into())),
    }
}

/// Absolute and without links, also where the server of a mount is dead.
fn resolve(path: &Path) -> Result<PathBuf, PlaceError> {
    match path.canonicalize() {
        Ok(place) => Ok(place),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(PlaceError::Missing(path.into())),
        Err(_) => {
            let path = std::path::absolute(path).map_err(failed("find", path))?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(path) };
            let parent = parent.canonicalize().map_err(failed("find", parent))?;
            Ok(parent.join(name))
        }
    }
}

fn ours(place: &Path) -> Result<Option<PathBuf>, PlaceError> {
    let found = mount_at(place).map_err(failed("read the mounts for", place))?;
    Ok(found.filter(|m| m.fs_type == TYPE).map(|m| m.mount_point))
}

/// Attributes may be in the kernel's memory still; the size of the file system is asked for anew.
fn is_stale(place: &Path) -> bool {
    rustix::fs::statfs(place).is_err_and(|e| e == rustix::io::Errno::NOTCONN)
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PlaceError + 'a {
    move |source| PlaceError::Io { doing, path: path.into(), source }
}

/// The processes with a file or their working folder below `place`. Those of other users are seen by root only.
pub fn holders_of(place: &Path) -> Vec<u32> {
    let mut found = BTreeSet::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let fds = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten().map(|e| e.path());
        let mut links = fds.chain(["cwd", "root"].map(|l| process.path().join(l)));
        if links.any(|link| fs::read_link(link).is_ok_and(|target| target.starts_with(place))) {
            found.insert(pid);
        }
    }
    found.into_iter().collect()
}

/// `qemu-system-x86 (pid 17), cp (pid 4)`.
pub(super) fn describe(pids: &[u32]) -> String {
    let name = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        match name.trim() {
            "" => format!("pid {pid}"),
            name => format!("{name} (pid {pid})"),
        }
    };
    match pids {
        [] => "someone".into(),
        some => some.iter().map(name).collect::<Vec<_>>().join(", "),
    }
}

/// A chain of 200 images takes 400 files.
pub(super) fn raise_limit_of_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
