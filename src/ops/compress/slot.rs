//! How many compressions run at once on a host: files that are locked, numbered from 0.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::time::Duration;

use crate::ops::control::OpControl;
use crate::store::{Store, StoreError, StoreResult};

/// How often it is tried again.
const AGAIN: Duration = Duration::from_millis(200);

/// The right to compress; given back when dropped or when the process dies.
#[derive(Debug)]
pub(super) struct Slot {
    _file: Option<File>,
}

impl Slot {
    /// Waits until fewer compressions run than the setting allows, which is read anew each time; `None` where the
    /// operation is to stop.
    pub fn take(store: &Store, control: &OpControl<'_>) -> StoreResult<Option<Self>> {
        // All stores of this host count.
        let dir = store.state_dir().parent().unwrap_or(store.state_dir()).join("compressions");
        let mut told = false;
        while !control.is_cancelled() {
            let Some(limit) = store.settings()?.max_concurrent_compressions() else {
                return Ok(Some(Self { _file: None }));
            };
            fs::create_dir_all(&dir).map_err(StoreError::io("create the folder", &dir))?;
            for number in 0..limit {
                let path = dir.join(format!("{number}.lock"));
                let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
                let file = file.map_err(StoreError::io("open the lock file", &path))?;
                match file.try_lock() {
                    Ok(()) => return Ok(Some(Self { _file: Some(file) })),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &path)(e)),
                }
            }
            if !told {
                told = true;
                control.step(format!(
                    "waiting: {limit} compressions run on this host already (setting backup.compression.max.concurrent.compressions.per.host)"
                ));
            }
            std::thread::sleep(AGAIN);
        }
        Ok(None)
    }
}
