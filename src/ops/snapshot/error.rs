//! Why nothing was done about a snapshot.

use crate::hypervisor::HypervisorError;
use crate::ops::backup::BackupError;
use crate::store::{StoreError, VmName};

/// Why it was not done; the VM and its snapshots are as before unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// Something on primary is not as it should be.
    #[error(transparent)]
    Primary(#[from] BackupError),
    /// There is no such snapshot or disk.
    #[error("there is no {what} of {of}; it has {there}")]
    Unknown {
        /// `snapshot "s1"`.
        what: String,
        /// The VM or disk.
        of: String,
        /// What there is.
        there: String,
    },
    /// It cannot be done now.
    #[error("cannot {doing} of {vm}: {why}")]
    Refused {
        /// "take the snapshot s1".
        doing: String,
        /// The VM.
        vm: VmName,
        /// Why, and what to do.
        why: String,
    },
    /// What was begun could not be undone.
    #[error("{error}; undoing what was begun failed as well: {undo}; run `knibfs recover`")]
    NotUndone {
        /// Why it failed.
        error: Box<SnapshotError>,
        /// Why it could not be undone.
        undo: Box<SnapshotError>,
    },
}

impl From<SnapshotError> for BackupError {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Store(error) => Self::Store(error),
            SnapshotError::Hypervisor(error) => Self::Hypervisor(error),
            SnapshotError::Primary(error) => error,
            other => Self::Store(StoreError::Invalid(other.to_string())),
        }
    }
}
