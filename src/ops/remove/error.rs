//! Why backups were not removed.

use std::path::PathBuf;

use crate::chain::Refusal;
use crate::ops::backup::BackupError;
use crate::store::{StoreError, VmName};

/// Why backups were not removed. Unless the error says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rules refuse.
    #[error("cannot remove {backup}: {why}")]
    Refused {
        /// The backup.
        backup: String,
        /// Why, and what to do.
        why: Refusal,
    },
    /// Its manifest cannot be read.
    #[error("cannot remove {backup}: {why}; --force removes it all the same")]
    Damaged {
        /// The backup.
        backup: String,
        /// What is wrong with it.
        why: String,
    },
    /// A damaged backup may stand on what would be deleted.
    #[error(
        "cannot remove {backup}: the manifest of {damaged} is damaged, and what it stands on cannot be told; copy it from a replica of the store, or remove {damaged} with --force first"
    )]
    InDoubt {
        /// The backup.
        backup: String,
        /// The damaged one.
        damaged: String,
    },
    /// An operation on the VM was interrupted.
    #[error("an operation on {vm} was interrupted: run `knibfs recover` first")]
    Unfinished {
        /// The VM.
        vm: VmName,
    },
    /// The deltas on primary cannot be reached.
    #[error(
        "cannot merge the deltas that {backup} left on primary: {source}; --force removes it and leaves them: the next backup merges them"
    )]
    Primary {
        /// The backup.
        backup: String,
        /// Why not.
        source: Box<BackupError>,
    },
    /// Merging or recording failed after the decision.
    #[error(transparent)]
    Work(#[from] BackupError),
    /// Row "files cannot be deleted".
    #[error(
        "{backup} is in state Error now, because its files cannot be deleted: {source}; free them and remove it again, or give it up with --force{}",
        rest(others)
    )]
    NotDeleted {
        /// The backup.
        backup: String,
        /// Why not.
        source: Box<StoreError>,
        /// More backups with the same fate.
        others: Vec<String>,
    },
    /// Row "files cannot be deleted", where not even the folder can be hidden.
    #[error("cannot delete the files of {backup}, not even hide them: {source}; {} stays", path.display())]
    NotTaken {
        /// The backup.
        backup: String,
        /// Why not.
        source: Box<StoreError>,
        /// Its folder.
        path: PathBuf,
    },
}

fn rest(others: &[String]) -> String {
    if others.is_empty() { String::new() } else { format!("; the same goes for {}", others.join(", ")) }
}

impl From<RemoveError> for BackupError {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::Store(error) => Self::Store(error),
            RemoveError::Work(error) => error,
            other => Self::Store(StoreError::Invalid(other.to_string())),
        }
    }
}
