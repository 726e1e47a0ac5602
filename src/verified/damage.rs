//! What was found damaged while the store is mounted: for the log, and for `MNT/.knibfs/damage`.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use jiff::Timestamp;
use knib_fuse::{FsError, Problem};
use parking_lot::Mutex;

use crate::store::StoreError;

/// The last reasons, each once.
#[derive(Debug, Default)]
pub struct Damage {
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    lines: VecDeque<(Timestamp, String)>,
    version: u64,
    /// How often each file was found damaged.
    by_file: BTreeMap<String, u64>,
}

/// Reasons that are kept.
const KEPT: usize = 256;
/// Files that are counted.
const MOST_FILES: usize = 4096;

impl Damage {
    /// An error for the reader; the reason is kept.
    pub fn report(&self, reason: String) -> FsError {
        let mut found = self.found.lock();
        if !found.lines.iter().any(|(_, known)| *known == reason) {
            if found.lines.len() == KEPT {
                found.lines.pop_front();
            }
            found.lines.push_back((Timestamp::now(), reason.clone()));
            found.version += 1;
        }
        FsError::damage(reason)
    }

    /// As `report`, and counts it for the file.
    pub fn report_file(&self, file: &Path, reason: String) -> FsError {
        let mut found = self.found.lock();
        let name = file.display().to_string();
        if found.by_file.contains_key(&name) || found.by_file.len() < MOST_FILES {
            *found.by_file.entry(name).or_default() += 1;
        }
        drop(found);
        self.report(reason)
    }

    /// The files that were found damaged, and how often.
    pub fn by_file(&self) -> Vec<(String, u64)> {
        self.found.lock().by_file.iter().map(|(file, count)| (file.clone(), *count)).collect()
    }

    /// The store's error as the reader's.
    pub fn of_store(&self, error: &StoreError) -> FsError {
        match error {
            StoreError::NotFound { .. } => FsError::not_found(),
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                FsError::not_found()
            }
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                FsError::new(Problem::Denied, error.to_string())
            }
            StoreError::Damaged { path, .. } => self.report_file(path, error.to_string()),
            _ => self.report(error.to_string()),
        }
    }

    /// Grows with every new reason, and the text of all.
    pub fn text(&self) -> (u64, String) {
        let found = self.found.lock();
        let lines = found.lines.iter().map(|(at, reason)| format!("{at:.0} {reason}\n"));
        (found.version, lines.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_kept_once_and_bounded() {
        let damage = Damage::default();
        for _ in 0..2 {
            assert_eq!(damage.report("a".into()).problem(), Problem::Damage);
        }
        assert_eq!(damage.text().0, 1);
        for n in 0..1000 {
            damage.report(format!("reason {n}"));
        }
        let (version, text) = damage.text();
        assert_eq!((version, text.lines().count()), (1001, KEPT));
        assert!(text.ends_with("reason 999\n"));
    }
}
