//! Why something was not restored.

use std::path::PathBuf;

use knib_fuse::FsError;

use crate::chain::restore::Refused;
use crate::hypervisor::HypervisorError;
use crate::store::{DiskName, StoreError};

/// Why something was not restored; all is as before unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A rule forbids it.
    #[error("{0}; nothing was changed")]
    Refused(#[from] Refused),
    /// It cannot be done now.
    #[error("cannot restore {what}: {why}")]
    Cannot {
        /// What.
        what: String,
        /// Why, and what to do.
        why: String,
    },
    /// The backup cannot be read.
    #[error("cannot read {disk}: {why}")]
    Read {
        /// The disk.
        disk: DiskName,
        /// What is wrong, and with which file.
        why: FsError,
    },
    /// An image could not be written, or the backup's data not read.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// What went wrong.
        source: knib_qcow::Error,
    },
    /// Stopped because the caller asked.
    #[error("nothing was restored; all is as it was before")]
    Cancelled,
    /// The VM did not take the new volume.
    #[error("{error}; the new volume was removed again, the VM is as it was")]
    NotAttached {
        /// Why not.
        error: Box<RestoreError>,
    },
    /// It was begun and can only be finished.
    #[error("{error}; {left}; run `knibfs recover`, which finishes it")]
    Unfinished {
        /// Why it was not finished.
        error: Box<RestoreError>,
        /// What state that leaves.
        left: String,
    },
    /// The store could not be mounted.
    #[error("cannot mount the store at {} for a quick restore: {why}", path.display())]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

impl RestoreError {
    pub(super) fn cannot(what: impl std::fmt::Display, why: impl Into<String>) -> Self {
        Self::Cannot { what: what.to_string(), why: why.into() }
    }

    pub(super) fn write(path: &std::path::Path, source: knib_qcow::Error) -> Self {
        match source {
            knib_qcow::Error::Cancelled => Self::Cancelled,
            source => Self::Write { path: path.to_owned(), source },
        }
    }
}
