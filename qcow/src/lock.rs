//! QEMU's locks on image files, so that the engine and QEMU keep out of each other's way.
//! Source: QEMU's block/file-posix.c: open-file-description locks on single bytes. A permission in use is a shared lock
//! on byte 100 + its bit, one that is not shared with others a shared lock on byte 200 + its bit.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::{Error, Result};

const IN_USE: i64 = 100;
const NOT_SHARED: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Which of QEMU's locks are taken on a file when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// None: for files that are known to be nobody else's, and for a look at an image that a VM has open (`qemu-img -U`).
    Off,
    /// Those of a reader: others may read, nobody may write.
    Reader,
    /// Those of a writer: nobody else may read or write.
    Writer,
}

impl Locking {
    /// Takes the locks on an open file. They go with it, or with [`release`].
    pub(crate) fn take(self, file: &File, path: &Path) -> Result<()> {
        let used: &[i64] = match self {
            Locking::Off => return Ok(()),
            Locking::Reader => &[CONSISTENT_READ],
            Locking::Writer => &[CONSISTENT_READ, WRITE, RESIZE],
        };
        // First the own locks, then the look for others': two that begin at once both see each other.
        for byte in used.iter().map(|p| IN_USE + p).chain([NOT_SHARED + WRITE, NOT_SHARED + RESIZE]) {
            match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(in_use(path, byte)),
                // A file system without locks has nobody else's either; QEMU goes on too.
                Err(Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => return Ok(()),
                Err(e) => return Err(Error::io(path, "locking", e.into())),
            }
        }
        for permission in [WRITE, RESIZE] {
            refuse_if_held(file, path, IN_USE + permission)?;
        }
        for permission in used {
            refuse_if_held(file, path, NOT_SHARED + permission)?;
        }
        Ok(())
    }
}

/// Gives the locks back at once: a child between fork and exec may still hold the file open.
pub(crate) fn release(file: &File) {
    let all = libc::flock { l_len: NOT_SHARED, ..byte_lock(libc::F_UNLCK, IN_USE) };
    // Closing the file gives them back too, so there is nothing to do about an error.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&all));
}

/// Refuses with [`Error::InUse`] when some process may write the file or change its size.
pub fn check_unused(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io(path, "opening", e))?;
    for permission in [WRITE, RESIZE] {
        refuse_if_held(&file, path, IN_USE + permission)?;
    }
    Ok(())
}

fn refuse_if_held(file: &File, path: &Path, byte: i64) -> Result<()> {
    let mut asked = byte_lock(libc::F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)) {
        Ok(_) if asked.l_type == libc::F_UNLCK as libc::c_short => Ok(()),
        Ok(_) => Err(in_use(path, byte)),
        Err(Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(()),
        Err(e) => Err(Error::io(path, "looking for locks", e.into())),
    }
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn in_use(path: &Path, byte: i64) -> Error {
    let (permission, shared) = (byte % 100, byte >= NOT_SHARED);
    let permission = match permission {
        WRITE => "write",
        RESIZE => "resize",
        _ => "consistent read",
    };
    let what = if shared {
        format!("it forbids others to use the \"{permission}\" lock")
    } else {
        format!("it holds the \"{permission}\" lock")
    };
    Error::InUse { path: path.to_owned(), what }
}
