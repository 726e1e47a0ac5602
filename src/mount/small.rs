//! The small files of a backup beside its disks: its manifest, its VM's definition, firmware variables, TPM state.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use super::node::BackupRef;
use crate::store::{Store, StoreError, StoreResult, plain};

/// What anyone may read who may read the disks. All others hold secrets.
const MANIFEST: &str = "manifest.json";
/// Files that a backup may have.
const FILES: [&str; 3] = [MANIFEST, "domain.xml", "nvram.fd"];
/// A folder that it may have.
const FOLDER: &str = "tpm";
/// No small file is longer. Bytes.
const LONGEST: u64 = 16 << 20;
/// Folders in folders; a TPM's state has two.
const DEEPEST: usize = 6;
/// Names of a folder that are shown.
const MOST_NAMES: usize = 1000;

/// The path of a small file or a folder of them below its backup's folder: ordinary names, and never a hidden one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallPath(String);

/// What a name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Small {
    File(SmallPath),
    Folder(SmallPath),
}

impl SmallPath {
    /// What a backup may have of that name.
    pub fn in_backup(name: &str) -> Option<Small> {
        match name {
            FOLDER => Some(Small::Folder(Self(name.into()))),
            name if FILES.contains(&name) => Some(Small::File(Self(name.into()))),
            _ => None,
        }
    }

    /// All that a backup may have.
    pub fn all() -> impl Iterator<Item = (&'static str, Small)> {
        FILES.into_iter().chain([FOLDER]).filter_map(|name| Some((name, Self::in_backup(name)?)))
    }

    fn join(&self, name: &str) -> Option<Self> {
        let is_deep = self.0.split('/').count() >= DEEPEST;
        let is_odd = name.is_empty() || name.starts_with('.') || name.contains('/') || name.contains('\0');
        (!is_deep && !is_odd).then(|| Self(format!("{}/{name}", self.0)))
    }

    /// The folder that it lies in; none where that is the backup's own.
    pub fn parent(&self) -> Option<Self> {
        self.0.rsplit_once('/').map(|(parent, _)| Self(parent.into()))
    }

    /// Below the backup's folder.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is for its owner only.
    pub fn is_secret(&self) -> bool {
        self.0 != MANIFEST
    }

    /// The file's bytes; none where there is no such file.
    pub fn read(&self, store: &Store, of: &BackupRef) -> StoreResult<Option<Vec<u8>>> {
        let below = format!("{}/{}/{}", of.vm, of.name, self.0);
        let Some(file) = plain::open_below(&store.vms_dir(), &below)? else { return Ok(None) };
        let path = store.vms_dir().join(&below);
        let mut text = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut text).map_err(StoreError::io("read", &path))?;
        if text.len() as u64 > LONGEST {
            return Err(StoreError::damaged(&path, "it is longer than 16 MiB"));
        }
        Ok(Some(text))
    }

    /// What lies in the folder, sorted by name; none where there is no such folder. What is neither a file nor a folder is
    /// left out.
    pub fn list(&self, backup: &Path) -> io::Result<Option<Vec<(String, Small)>>> {
        let mut dir = backup.to_path_buf();
        for part in self.0.split('/') {
            dir.push(part);
            if !plain::is_folder(&dir)? {
                return Ok(None);
            }
        }
        let mut found: Vec<(String, Small)> = Vec::new();
        for entry in fs::read_dir(&dir)?.take(MOST_NAMES) {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name();
            let Some((name, path)) = name.to_str().and_then(|n| Some((n, self.join(n)?))) else { continue };
            if kind.is_dir() {
                found.push((name.into(), Small::Folder(path)));
            } else if kind.is_file() {
                found.push((name.into(), Small::File(path)));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Some(found))
    }
}
