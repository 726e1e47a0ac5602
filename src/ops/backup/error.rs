//! Why a backup was not taken.

use crate::hypervisor::HypervisorError;
use crate::store::{DiskName, StoreError, VmName};

/// Why a backup was not taken; the VM is as before unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A disk could not be copied.
    #[error("copying the disk {disk} failed: {source}{}; nothing was changed", way_out(source))]
    Copy {
        /// The disk.
        disk: DiskName,
        /// Why.
        source: knib_qcow::Error,
    },
    /// It cannot be done now.
    #[error("cannot back up {vm}: {why}")]
    Refused {
        /// The VM.
        vm: VmName,
        /// Why, and what to do.
        why: String,
    },
    /// A restore could not be recovered.
    #[error(transparent)]
    Restore(Box<crate::ops::restore::RestoreError>),
    /// Stopped because the caller asked.
    #[error("no backup was made; the VM is as it was before")]
    Cancelled,
    /// It took longer than it may.
    #[error(
        "the backup of {vm} took longer than {} s and was stopped: no backup was made, the VM is as it was; raise the setting knib.timeout, or see what holds it up", limit.as_secs()
    )]
    TimedOut {
        /// The VM.
        vm: VmName,
        /// The setting.
        limit: std::time::Duration,
    },
    /// It is in the store, but what is left of the one before it on primary is not all merged and recorded.
    #[error(
        "{error}; the backup {backup} is whole in the store: run `knibfs recover`, which finishes the rest"
    )]
    Unfinished {
        /// `VM/BACKUP`.
        backup: String,
        /// What went wrong.
        error: Box<BackupError>,
    },
    /// What was begun could not be undone.
    #[error("{error}; undoing what was begun failed as well: {undo}; run `knibfs recover`")]
    NotUndone {
        /// Why the backup failed.
        error: Box<BackupError>,
        /// Why it could not be undone.
        undo: Box<BackupError>,
    },
}

impl BackupError {
    /// libvirt could not be asked: the same may work later.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self, Self::Hypervisor(HypervisorError::Unreachable { .. } | HypervisorError::Silent { .. }))
    }

    pub(super) fn refused(vm: &VmName, why: impl Into<String>) -> Self {
        Self::Refused { vm: vm.clone(), why: why.into() }
    }
}

fn way_out(error: &knib_qcow::Error) -> String {
    use std::io::ErrorKind;
    match error {
        knib_qcow::Error::Io { path, source, .. }
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
        {
            format!("; free space where {} lies, then try again", path.display())
        }
        knib_qcow::Error::Damaged { .. } => "; repair the image first (`qemu-img check`)".into(),
        _ => String::new(),
    }
}
