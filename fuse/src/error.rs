//! What can go wrong in a tree, and the one place where it becomes an errno.

use std::sync::Arc;

use fuser::Errno;

/// What a caller is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// There is no such name.
    NotFound,
    /// The node was there once and is no longer.
    Stale,
    /// A file was taken for a folder.
    NotAFolder,
    /// A folder was taken for a file.
    IsAFolder,
    /// Not a link, or an argument that makes no sense.
    Invalid,
    /// `SEEK_DATA` or `SEEK_HOLE` behind the last data.
    NoMoreData,
    /// Someone tried to write.
    ReadOnly,
    /// The name is longer than any name here.
    NameTooLong,
    /// The store's file system refuses this process.
    Denied,
    /// Too many open files in this process.
    TooManyOpen,
    /// What is stored is not what was written, or cannot be read.
    Damage,
    /// A bug: a handler panicked.
    Bug,
}

/// An error with the reason that the log gets. Cheap to clone: all who wait for a block share it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct FsError {
    problem: Problem,
    reason: Arc<str>,
}

/// Result of what a tree does.
pub type FsResult<T> = Result<T, FsError>;

impl FsError {
    /// An error of that kind; `reason` says on what, and why.
    pub fn new(problem: Problem, reason: impl Into<Arc<str>>) -> Self {
        Self { problem, reason: reason.into() }
    }

    /// No such name.
    pub fn not_found() -> Self {
        Self::new(Problem::NotFound, "no such name")
    }

    /// The node is gone.
    pub fn stale() -> Self {
        Self::new(Problem::Stale, "the node is gone")
    }

    /// What is stored is not what was written.
    pub fn damage(reason: impl Into<Arc<str>>) -> Self {
        Self::new(Problem::Damage, reason)
    }

    /// An operating system's error while doing something.
    pub fn io(doing: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let problem = match error.kind() {
            ErrorKind::NotFound => Problem::NotFound,
            ErrorKind::PermissionDenied => Problem::Denied,
            ErrorKind::StaleNetworkFileHandle => Problem::Stale,
            _ if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
                Problem::TooManyOpen
            }
            _ => Problem::Damage,
        };
        Self::new(problem, format!("cannot {doing}: {error}"))
    }

    /// What the caller is told.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// Whether a person must hear of it: the caller only sees a number.
    pub fn is_worth_a_line(&self) -> bool {
        matches!(self.problem, Problem::Damage | Problem::Bug | Problem::Denied | Problem::TooManyOpen)
    }

    pub(crate) fn errno(&self) -> Errno {
        match self.problem {
            Problem::NotFound => Errno::ENOENT,
            Problem::Stale => Errno::ESTALE,
            Problem::NotAFolder => Errno::ENOTDIR,
            Problem::IsAFolder => Errno::EISDIR,
            Problem::Invalid => Errno::EINVAL,
            Problem::NoMoreData => Errno::ENXIO,
            Problem::ReadOnly => Errno::EROFS,
            Problem::NameTooLong => Errno::ENAMETOOLONG,
            Problem::Denied => Errno::EACCES,
            Problem::TooManyOpen => Errno::EMFILE,
            Problem::Damage | Problem::Bug => Errno::EIO,
        }
    }
}
