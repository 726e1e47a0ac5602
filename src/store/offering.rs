//! Offerings: named sets of options that VMs are assigned to (section 2 of the requirements).

use std::fs;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::manifest::Compression;
use super::{OfferingId, Record, Store, StoreError, StoreResult, atomic, record};

/// One offering.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offering {
    /// Its identity.
    pub id: OfferingId,
    /// Its name; no two living ones share it.
    pub name: String,
    /// Backups are compressed.
    pub compress: bool,
    /// Backups are validated.
    pub validate: bool,
    /// Quick restores are allowed.
    pub allow_quick_restore: bool,
    /// Guests' files may be taken out.
    pub allow_extract_file: bool,
    /// Overrides `backup.chain.size`.
    #[serde(default)]
    pub chain_size: Option<i64>,
    /// How clusters are compressed.
    pub compression_library: Compression,
    /// When it was made.
    pub created: Timestamp,
    /// When it was deleted; kept for what refers to it.
    #[serde(default)]
    pub removed: Option<Timestamp>,
}

impl Record for Offering {
    const FORMAT: u64 = 1;

    fn check(&self) -> Result<(), String> {
        if self.name.is_empty() || self.name.len() > 255 || self.name.chars().any(char::is_control) {
            return Err("its name is empty, longer than 255 bytes or holds control characters".into());
        }
        Ok(())
    }
}

impl Store {
    fn offering_path(&self, id: OfferingId) -> std::path::PathBuf {
        self.offerings_dir().join(format!("{id}.json"))
    }

    /// The living offerings by name; with `removed` the deleted ones too.
    pub fn offerings(&self, removed: bool) -> StoreResult<Vec<Offering>> {
        let dir = self.offerings_dir();
        let mut found: Vec<Offering> = Vec::new();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("read the folder", &dir))? {
            let entry = entry.map_err(StoreError::io("read the folder", &dir))?;
            let id = entry
                .file_name()
                .to_str()
                .and_then(|n| n.strip_suffix(".json"))
                .and_then(|id| id.parse().ok());
            if let Some(id) = id {
                let offering = self.offering(id)?;
                if removed || offering.removed.is_none() {
                    found.push(offering);
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        Ok(found)
    }

    /// Reads one offering.
    pub fn offering(&self, id: OfferingId) -> StoreResult<Offering> {
        let path = self.offering_path(id);
        if !path.exists() {
            return Err(self.no_offering(&id.to_string()));
        }
        let found: Offering = record::read(&path)?;
        if found.id == id {
            Ok(found)
        } else {
            Err(StoreError::damaged(&path, "it is another offering's record"))
        }
    }

    /// The living offering of that id or name.
    pub fn find_offering(&self, name_or_id: &str) -> StoreResult<Offering> {
        self.offerings(false)?
            .into_iter()
            .find(|o| o.name == name_or_id || o.id.to_string() == name_or_id)
            .ok_or_else(|| self.no_offering(name_or_id))
    }

    fn no_offering(&self, name: &str) -> StoreError {
        StoreError::NotFound {
            what: "offering",
            name: name.into(),
            store: self.root().to_path_buf(),
            advice: "`knibfs offering list` shows those that are",
        }
    }

    /// Adds an offering; refused when a living one has its name.
    pub fn create_offering(&self, offering: &Offering) -> StoreResult<()> {
        let _lock = self.lock_config()?;
        if self.offerings(false)?.iter().any(|o| o.name == offering.name) {
            return Err(StoreError::Exists {
                article_what: "an offering",
                name: offering.name.clone(),
                store: self.root().to_path_buf(),
            });
        }
        record::write(&self.offering_path(offering.id), offering)
    }

    /// Deletes an offering; refused while a VM is assigned to it. One that backups may refer to stays as removed.
    pub fn delete_offering(&self, name_or_id: &str) -> StoreResult<Offering> {
        let _lock = self.lock_config()?;
        let mut offering = self.find_offering(name_or_id)?;
        for name in self.vms()? {
            if self.vm(&name)?.offering == Some(offering.id) {
                return Err(StoreError::Invalid(format!(
                    "offering \"{}\" is assigned to the VM {name}: take the VM off it first",
                    offering.name
                )));
            }
        }
        offering.removed = Some(Timestamp::now());
        record::write(&self.offering_path(offering.id), &offering)?;
        atomic::sync_dir(&self.offerings_dir())?;
        Ok(offering)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offering(name: &str) -> Offering {
        Offering {
            id: OfferingId::random(),
            name: name.into(),
            compress: true,
            validate: false,
            allow_quick_restore: false,
            allow_extract_file: false,
            chain_size: Some(3),
            compression_library: Compression::Zstd,
            created: Timestamp::now(),
            removed: None,
        }
    }

    #[test]
    fn an_offering_is_found_by_name_and_by_id_until_it_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path(), false).unwrap();
        let gold = offering("gold");
        store.create_offering(&gold).unwrap();
        assert_eq!(store.find_offering("gold").unwrap(), gold);
        assert_eq!(store.find_offering(&gold.id.to_string()).unwrap(), gold);
        assert!(store.create_offering(&offering("gold")).is_err(), "the name is taken");
        store.delete_offering("gold").unwrap();
        assert!(store.find_offering("gold").unwrap_err().is_not_found());
        assert_eq!(store.offerings(false).unwrap(), []);
        assert_eq!(store.offerings(true).unwrap().len(), 1);
        store.create_offering(&offering("gold")).unwrap();
    }
}
