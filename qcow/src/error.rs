//! What can go wrong with an image, in words that name the file and the place.

use std::path::{Path, PathBuf};

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a call.
    #[error("{}: {doing} failed: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done, as in "reading 512 bytes at 0".
        doing: String,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The image breaks a rule of the format.
    #[error("{}: the image is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The table or field and why it cannot be.
        what: String,
    },
    /// The image is well formed, but is of a kind that the engine does not read or write.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is and what to do instead.
        what: String,
    },
    /// A backing file or data file may not be followed.
    #[error("{}: {what}", path.display())]
    Refused {
        /// The file whose header names the other.
        path: PathBuf,
        /// The name and the reason.
        what: String,
    },
    /// The image is used by another process in a way that forbids this one.
    #[error("{}: the image is in use by another process (a running VM?): {what}", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// Which lock was held.
        what: String,
    },
    /// The caller asked for something outside the image.
    #[error("{}: {what}", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// The offset and the size of the disk.
        what: String,
    },
    /// The caller cancelled the work.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// An operating system's error while `doing` something to `path`.
    pub fn io(path: &Path, doing: impl Into<String>, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), doing: doing.into(), source }
    }
    /// A broken rule of the format.
    pub fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Error::Damaged { path: path.to_owned(), what: what.into() }
    }
    /// A kind of image that is not read or written.
    pub fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Error::Unsupported { path: path.to_owned(), what: what.into() }
    }
    /// A file that may not be followed.
    pub fn refused(path: &Path, what: impl Into<String>) -> Self {
        Error::Refused { path: path.to_owned(), what: what.into() }
    }
    /// An access outside the disk.
    pub fn out_of_range(path: &Path, what: impl Into<String>) -> Self {
        Error::OutOfRange { path: path.to_owned(), what: what.into() }
    }
}
