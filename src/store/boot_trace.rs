//! What a VM's guest reads of a volume while it boots: a short list that is kept with the VM. It only makes reads faster;
//! whatever it says, what is read is verified as always.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Record, Store, StoreError, StoreResult, VmName, VolumeId, record};

/// Parts of a volume in the order in which a booting guest read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTrace {
    /// The volume.
    pub volume: VolumeId,
    /// Bytes of a part, as log2.
    pub part_bits: u32,
    /// The parts.
    pub parts: Parts,
}

/// Numbers of parts; in the file as text, with runs: `0 5-9 3`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Parts(pub Vec<u32>);

impl Parts {
    /// No list is longer.
    pub const MOST: usize = 1 << 14;
}

impl From<Parts> for String {
    fn from(parts: Parts) -> Self {
        let mut text = Self::new();
        let mut rest = parts.0.as_slice();
        while let Some((first, _)) = rest.split_first() {
            let follows = |(n, part): (usize, &u32)| {
                u32::try_from(n).ok().and_then(|n| first.checked_add(n)) == Some(*part)
            };
            let run = rest.iter().enumerate().take_while(|(n, part)| follows((*n, part))).count().max(1);
            let gap = if text.is_empty() { "" } else { " " };
            // Writing to a string does not fail.
            let _ = match rest.get(run - 1) {
                Some(last) if last != first => write!(text, "{gap}{first}-{last}"),
                _ => write!(text, "{gap}{first}"),
            };
            rest = rest.get(run..).unwrap_or_default();
        }
        text
    }
}

impl TryFrom<String> for Parts {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = |word: &str| word.parse::<u32>().map_err(|_| format!("{word:?} is no number of a part"));
        let mut parts = Vec::new();
        for word in text.split_ascii_whitespace() {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            let (first, last) = (number(first)?, number(last)?);
            if last < first || (last - first) as usize >= Self::MOST - parts.len() {
                return Err(format!("{word:?} is no run of parts, or there are more than {}", Self::MOST));
            }
            parts.extend(first..=last);
        }
        Ok(Self(parts))
    }
}

impl Record for BootTrace {
    const FORMAT: u64 = 1;

    fn check(&self) -> Result<(), String> {
        match (self.part_bits, self.parts.0.len()) {
            (9..=21, 1..=Parts::MOST) => Ok(()),
            _ => Err("its parts are of an impossible size, or none, or too many".into()),
        }
    }
}

impl Store {
    fn boot_trace_path(&self, vm: &VmName, volume: VolumeId) -> PathBuf {
        self.vm_dir(vm).join(boot_trace_file(volume))
    }

    /// Where it is when the store cannot be written.
    fn local_boot_trace_path(&self, volume: VolumeId) -> PathBuf {
        self.state_dir().join("boot").join(boot_trace_file(volume))
    }

    /// What was noted of a volume last, in the store or on this host; none where that is nothing, or damaged.
    pub fn boot_trace(&self, vm: &VmName, volume: VolumeId) -> Option<BootTrace> {
        let places = [self.local_boot_trace_path(volume), self.boot_trace_path(vm, volume)];
        // A store that could be written again since has the newer one; a file that is not plain is not opened.
        let plain =
            |path: &PathBuf| fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?.modified().ok();
        let newest = places.into_iter().filter_map(|path| Some((plain(&path)?, path))).max()?.1;
        match record::read::<BootTrace>(&newest) {
            Ok(trace) if trace.volume == volume => Some(trace),
            Ok(_) => None,
            Err(error) => {
                // It is made anew with the next boot.
                tracing::debug!("a boot trace is not used: {error}");
                None
            }
        }
    }

    /// Keeps what was noted, in place of what was.
    ///
    /// # Errors
    /// Neither the store nor this host's folder can be written.
    pub fn keep_boot_trace(&self, vm: &VmName, trace: &BootTrace) -> StoreResult<()> {
        let in_store = record::write(&self.boot_trace_path(vm, trace.volume), trace);
        if in_store.is_ok() {
            return in_store;
        }
        let path = self.local_boot_trace_path(trace.volume);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(StoreError::io("create the folder", dir))?;
        }
        record::write(&path, trace)
    }
}

/// No backup's name begins with a dot.
fn boot_trace_file(volume: VolumeId) -> String {
    format!(".boot-{volume}.json")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::layout_fixtures::store_with_vm;
    use super::*;

    fn trace(parts: &[u32]) -> BootTrace {
        BootTrace { volume: VolumeId::random(), part_bits: 16, parts: Parts(parts.to_vec()) }
    }

    proptest! {
        #[test]
        fn any_parts_are_read_as_they_were_written(
            parts in prop::collection::vec(prop_oneof![0u32..20, any::<u32>(), Just(u32::MAX)], 0..200),
        ) {
            let text = String::from(Parts(parts.clone()));
            prop_assert_eq!(Parts::try_from(text).unwrap().0, parts);
        }

        #[test]
        fn any_text_is_parts_or_refused(text in "[0-9 -]{0,40}") {
            if let Ok(parts) = Parts::try_from(text) {
                prop_assert!(parts.0.len() <= Parts::MOST);
            }
        }
    }

    #[test]
    fn runs_are_short_and_too_long_ones_are_refused() {
        assert_eq!(String::from(Parts(vec![0, 5, 6, 7, 3, 3, 2])), "0 5-7 3 3 2");
        for bad in ["0-4294967295", "5-4", "x", "1-", "-1", "4294967296", "0-16384", "0-16383 1"] {
            assert!(Parts::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        assert!(Parts::try_from("0-16383".to_owned()).is_ok());
    }

    #[test]
    fn the_last_trace_is_found_and_backups_are_listed_as_before() {
        let (_dir, store, vm) = store_with_vm();
        let mut kept = trace(&[1, 2, 9]);
        assert_eq!(store.boot_trace(&vm, kept.volume), None);
        store.keep_boot_trace(&vm, &kept).unwrap();
        assert_eq!(store.boot_trace(&vm, kept.volume), Some(kept.clone()));
        kept.parts = Parts(vec![4]);
        store.keep_boot_trace(&vm, &kept).unwrap();
        assert_eq!(store.boot_trace(&vm, kept.volume), Some(kept.clone()));
        assert_eq!(store.boot_trace(&vm, VolumeId::random()), None);
        assert!(store.backups(&vm).unwrap().damaged.is_empty());
    }

    #[test]
    fn a_store_that_cannot_be_written_has_its_traces_on_this_host() {
        let (dir, store, vm) = store_with_vm();
        let store = store.with_state_dir(dir.path().join("state"));
        let kept = trace(&[7]);
        // A folder in its place cannot be replaced by a file, not by root either.
        fs::create_dir(store.boot_trace_path(&vm, kept.volume)).unwrap();
        store.keep_boot_trace(&vm, &kept).unwrap();
        assert_eq!(store.boot_trace(&vm, kept.volume), Some(kept));
    }

    #[test]
    fn a_damaged_or_foreign_trace_is_not_used() {
        let (_dir, store, vm) = store_with_vm();
        let (kept, other) = (trace(&[1, 2, 9]), trace(&[3]));
        store.keep_boot_trace(&vm, &kept).unwrap();
        store.keep_boot_trace(&vm, &other).unwrap();
        let (path, foreign) =
            (store.boot_trace_path(&vm, kept.volume), store.boot_trace_path(&vm, other.volume));
        let good = fs::read_to_string(&path).unwrap();
        for bad in [good.replace('9', "8"), good.replace("1-2", "0-99999999"), String::new(), "{}".into()] {
            fs::write(&path, bad).unwrap();
            assert_eq!(store.boot_trace(&vm, kept.volume), None);
        }
        fs::copy(&foreign, &path).unwrap();
        assert_eq!(store.boot_trace(&vm, kept.volume), None);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&foreign, &path).unwrap();
        assert_eq!(store.boot_trace(&vm, kept.volume), None);
    }
}
