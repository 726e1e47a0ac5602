//! Why a volume of a backup is full or incremental, as a sentence that is kept in the manifest.

use crate::store::manifest::BackupState;
use crate::store::{BackupName, SnapshotName};

use super::FULL_AT_DEPTH;

/// The reason; each names the table row that it comes from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Section 3: "an incremental holds just what changed since its parent".
    #[error("it holds what changed since {parent}")]
    Changed {
        /// The parent.
        parent: BackupName,
    },
    /// The VM has no backup yet.
    #[error("it is the first backup")]
    First,
    /// Words: "a full backup outside every chain".
    #[error("it is isolated")]
    Isolated,
    /// Row "chain size": "1 makes every backup full".
    #[error("backup.chain.size is 1: every backup is full")]
    EveryOneFull,
    /// Row "chain size": the chain has as many backups as it may have.
    #[error("the chain has {size} backups, as many as backup.chain.size allows")]
    ChainFull {
        /// Backups in the chain.
        size: u32,
    },
    /// "Ending a chain early", or the chain ended with its last backup.
    #[error("the chain before it has ended: nothing may stand on its last backup")]
    ChainEnded,
    /// Row "when in doubt, full": the current backup is gone or cannot be read.
    #[error("its parent {parent} is missing from the store or its manifest is damaged")]
    ParentGone {
        /// What was the current backup.
        parent: BackupName,
    },
    /// Row "when in doubt, full": "parent not BackedUp".
    #[error("its parent {parent} is {state}, not BackedUp")]
    ParentState {
        /// The parent.
        parent: BackupName,
        /// Its state.
        state: BackupState,
    },
    /// Row "when in doubt, full": "parent file missing".
    #[error("its file in the parent {parent}, or one below, is missing")]
    FileMissing {
        /// The parent.
        parent: BackupName,
    },
    /// Row "when in doubt, full": "parent file damaged".
    #[error("its file in the parent {parent}, or one below, is damaged: {what}")]
    FileDamaged {
        /// The parent.
        parent: BackupName,
        /// What was found.
        what: String,
    },
    /// Row "per volume": "a volume without tracking state".
    #[error("the volume has no tracking state: it is new, migrated, reverted or restored")]
    NoTracking,
    /// "Ending a chain early": "revert of a VM or volume snapshot".
    #[error("the volume was reverted to the snapshot {snapshot}")]
    Reverted {
        /// The snapshot.
        snapshot: SnapshotName,
    },
    /// "Ending a chain early": "restore".
    #[error("the volume was restored from {backup} since its last backup")]
    Restored {
        /// What from, as `VM/BACKUP`.
        backup: String,
    },
    /// Row "when in doubt, full": "resized".
    #[error("the volume was resized from {from} to {to} bytes")]
    Resized {
        /// Bytes after the last backup.
        from: u64,
        /// Bytes now.
        to: u64,
    },
    /// Row "when in doubt, full": "primary chain not as it was left".
    #[error("the volume's images are not as knibfs left them: {what}")]
    ChainChanged {
        /// The first difference.
        what: String,
    },
    /// Row "depth".
    #[error("the chain is {depth} images deep; from {FULL_AT_DEPTH} on the next backup is full")]
    TooDeep {
        /// Images in the store and on primary.
        depth: u32,
    },
}
