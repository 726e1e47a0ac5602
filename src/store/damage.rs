//! What checks found damaged: `vms/<vm>/damage.json`. No backup stands on such an image until a check finds it whole.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{BackupId, DiskName, Record, Store, StoreResult, VmName, record};

const DAMAGE: &str = "damage.json";

/// The images of a VM that were found damaged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDamage {
    /// Each once.
    pub images: Vec<DamagedImage>,
}

/// An image whose bytes are not what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedImage {
    /// Its backup.
    pub backup: BackupId,
    /// Its disk there.
    pub disk: DiskName,
    /// What was found.
    pub what: String,
    /// When.
    pub found: Timestamp,
}

impl KnownDamage {
    /// What is known of an image.
    pub fn of(&self, backup: BackupId, disk: &DiskName) -> Option<&DamagedImage> {
        self.images.iter().find(|i| i.backup == backup && i.disk == *disk)
    }
}

impl Record for KnownDamage {
    const FORMAT: u64 = 1;
}

impl Store {
    /// What is known to be damaged of a VM's images.
    ///
    /// # Errors
    /// The record is there and cannot be read.
    pub fn known_damage(&self, vm: &VmName) -> StoreResult<KnownDamage> {
        let path = self.vm_dir(vm).join(DAMAGE);
        if !path.exists() { Ok(KnownDamage::default()) } else { record::read(&path) }
    }

    /// Records that an image was read whole and what was found: damage, or none. Writes only what is news.
    ///
    /// # Errors
    /// The record cannot be written; a record that cannot be read is replaced.
    pub fn note_damage(
        &self,
        vm: &VmName,
        backup: BackupId,
        disk: &DiskName,
        what: Option<&str>,
    ) -> StoreResult<()> {
        let news = |known: &KnownDamage| known.of(backup, disk).is_some() != what.is_some();
        if self.known_damage(vm).is_ok_and(|known| !news(&known)) {
            return Ok(());
        }
        // Checks run beside one another: read and written under one lock, which is held for just that.
        let _lock = self.lock_config()?;
        let mut known = self.known_damage(vm).unwrap_or_default();
        known.images.retain(|i| i.backup != backup || i.disk != *disk);
        if let Some(what) = what {
            known.images.push(DamagedImage {
                backup,
                disk: disk.clone(),
                what: what.to_owned(),
                found: Timestamp::now(),
            });
        }
        record::write(&self.vm_dir(vm).join(DAMAGE), &known)
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::store_with_vm;
    use super::*;

    #[test]
    fn damage_is_known_until_a_check_finds_the_image_whole() {
        let (_dir, store, vm) = store_with_vm();
        let (backup, disk, other) = (BackupId::random(), "vda".parse().unwrap(), "vdb".parse().unwrap());
        let note = |disk: &DiskName, what: Option<&str>| store.note_damage(&vm, backup, disk, what).unwrap();
        note(&disk, None);
        assert!(!store.vm_dir(&vm).join(DAMAGE).exists(), "nothing to write");
        note(&disk, Some("it is cut"));
        note(&other, Some("a bit is wrong"));
        note(&disk, Some("it is cut"));
        let known = store.known_damage(&vm).unwrap();
        assert_eq!(known.images.len(), 2);
        assert_eq!(known.of(backup, &disk).unwrap().what, "it is cut");
        assert_eq!(known.of(BackupId::random(), &disk), None);
        note(&disk, None);
        assert_eq!(store.known_damage(&vm).unwrap().images.len(), 1);
        std::fs::write(store.vm_dir(&vm).join(DAMAGE), "{").unwrap();
        store.known_damage(&vm).unwrap_err();
        note(&other, Some("a bit is wrong"));
        assert_eq!(store.known_damage(&vm).unwrap().images.len(), 1, "a broken record is made anew");
    }
}
