//! Before a swap: the VM's lock, and nobody who stands on the stored file.

use std::time::Duration;

use crate::ops::control::OpControl;
use crate::store::lease::{COMPRESSION, RAW_VIEW};
use crate::store::{BackupId, Manifest, Store, StoreError, StoreResult, VmLock};

/// How often it is tried again.
const AGAIN: Duration = Duration::from_millis(200);

/// Waits until nobody uses what is swapped and the VM's lock is free; `None` where the operation is to stop and the
/// lock is not free even then. An operation that is to stop gets the lock whoever uses the backup: to clean up.
pub(super) fn wait(store: &Store, of: &Manifest, control: &OpControl<'_>) -> StoreResult<Option<VmLock>> {
    let mut told = None;
    loop {
        // Without the lock first: the VM can be backed up while a quick restore takes hours.
        let why = match user(store, of)?.filter(|_| !control.is_cancelled()) {
            Some(user) => user,
            None => match store.lock_vm(&of.vm, &format!("compress {}/{}", of.vm, of.name)) {
                Ok(lock) if control.is_cancelled() => return Ok(Some(lock)),
                Ok(lock) => match user(store, of)? {
                    None => return Ok(Some(lock)),
                    Some(user) => user,
                },
                Err(StoreError::Busy { .. }) if control.is_cancelled() => return Ok(None),
                Err(busy @ StoreError::Busy { .. }) => busy.to_string(),
                Err(error) => return Err(error),
            },
        };
        if told.as_ref() != Some(&why) {
            control.step(format!("{}/{} is swapped later: {why}", of.vm, of.name));
            told = Some(why);
        }
        std::thread::sleep(AGAIN);
    }
}

/// Who keeps a backup's files from being swapped: "this backup or a child is being restored", or a handle on the
/// stored file. Compressions do not, nor do handles on raw views, which go on reading what they opened.
pub(super) fn user(store: &Store, of: &Manifest) -> StoreResult<Option<String>> {
    let mut all = store.backups(&of.vm)?.manifests;
    all.sort_by_key(|m| m.sequence);
    let mut standing: Vec<BackupId> = vec![of.id];
    for backup in &all {
        if backup.parent.as_ref().is_some_and(|p| standing.contains(&p.id)) {
            standing.push(backup.id);
        }
    }
    for id in standing {
        for lease in store.leases(id)? {
            // A reader of a child opens this backup's file by a lease of its own.
            let counts = id == of.id || lease.purpose.contains("restore");
            if counts && lease.purpose != COMPRESSION && !lease.purpose.starts_with(RAW_VIEW) {
                return Ok(Some(format!("{} (process {} on host {})", lease.purpose, lease.pid, lease.host)));
            }
        }
    }
    Ok(None)
}
