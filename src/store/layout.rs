//! Where everything lies in a store, and how it is found and read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    BackupName, BackupSpec, DiskName, Manifest, StoreError, StoreId, StoreResult, VmName, VmRecord, atomic,
    record,
};

/// Newest store format that this program reads, and the one that it makes.
pub const FORMAT: u64 = 1;

const CONFIG: &str = "knibfs.toml";
const MANIFEST: &str = "manifest.json";

/// `knibfs.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreConfig {
    /// Format number.
    pub format: u64,
    /// The store's identity.
    pub id: StoreId,
    /// When it was made.
    pub created: Timestamp,
    /// Backups are compressed while they are copied, never rewritten.
    #[serde(default)]
    pub write_once: bool,
    /// Settings that differ from their defaults.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

/// An opened store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    id: StoreId,
    write_once: bool,
}

/// A VM's backups as found: what cannot be read is reported, not hidden.
#[derive(Debug, Default)]
pub struct Backups {
    /// In order of their sequence numbers, `Removed` ones included.
    pub manifests: Vec<Manifest>,
    /// Folders whose manifest is missing or damaged.
    pub damaged: Vec<(BackupName, StoreError)>,
}

impl Store {
    /// Makes a store in a new or empty folder.
    pub fn init(path: &Path, write_once: bool) -> StoreResult<Self> {
        match fs::metadata(path) {
            Ok(found) if !found.is_dir() => return Err(StoreError::NotADirectory { path: path.into() }),
            Ok(_) => refuse_unless_empty(path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::DirBuilder::new()
                // Guests' disks are nobody else's business.
                .mode(0o700)
                .create(path)
                .and_then(|()| fs::metadata(path).map(drop))
                .map_err(StoreError::io("create the folder", path))?,
            Err(e) => return Err(StoreError::io("look at", path)(e)),
        }
        let root = path.canonicalize().map_err(StoreError::io("look at", path))?;
        refuse_hard_names(&root)?;
        for part in ["vms", "offerings", "journal", "leases"] {
            atomic::create_dir(&root.join(part))?;
        }
        let config = StoreConfig {
            format: FORMAT,
            id: StoreId::random(),
            created: Timestamp::now(),
            write_once,
            settings: BTreeMap::new(),
        };
        // The configuration comes last: a folder with one is a whole store.
        write_config(&root, &config)?;
        Self::open(&root)
    }

    /// Opens a store.
    pub fn open(path: &Path) -> StoreResult<Self> {
        match fs::metadata(path) {
            Ok(found) if !found.is_dir() => return Err(StoreError::NotADirectory { path: path.into() }),
            Ok(_) => {}
            Err(e) => return Err(StoreError::io("open the store", path)(e)),
        }
        let root = path.canonicalize().map_err(StoreError::io("open the store", path))?;
        let config = read_config(&root)?;
        Ok(Self { root, id: config.id, write_once: config.write_once })
    }

    /// Its folder, absolute and without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its identity.
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// Backups are compressed while they are copied, never rewritten.
    pub fn is_write_once(&self) -> bool {
        self.write_once
    }

    /// `vms/`.
    pub fn vms_dir(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// `vms/<vm>/`.
    pub fn vm_dir(&self, vm: &VmName) -> PathBuf {
        self.vms_dir().join(vm)
    }

    /// `vms/<vm>/<backup>/`.
    pub fn backup_dir(&self, vm: &VmName, backup: &BackupName) -> PathBuf {
        self.vm_dir(vm).join(backup)
    }

    /// `vms/<vm>/<backup>/<disk>.qcow2`.
    pub fn disk_path(&self, vm: &VmName, backup: &BackupName, disk: &DiskName) -> PathBuf {
        self.backup_dir(vm, backup).join(disk_file(disk))
    }

    /// `vms/<vm>/<backup>/<disk>.sums`.
    pub fn sums_path(&self, vm: &VmName, backup: &BackupName, disk: &DiskName) -> PathBuf {
        self.backup_dir(vm, backup).join(sums_file(disk))
    }

    /// `vms/<vm>/<backup>/manifest.json`.
    pub fn manifest_path(&self, vm: &VmName, backup: &BackupName) -> PathBuf {
        self.backup_dir(vm, backup).join(MANIFEST)
    }

    /// `vms/<vm>/vm.json`.
    pub fn vm_path(&self, vm: &VmName) -> PathBuf {
        self.vm_dir(vm).join("vm.json")
    }

    /// `offerings/`.
    pub fn offerings_dir(&self) -> PathBuf {
        self.root.join("offerings")
    }

    /// `journal/`.
    pub fn journal_dir(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// `leases/`.
    pub fn leases_dir(&self) -> PathBuf {
        self.root.join("leases")
    }

    /// The VMs' names, sorted. A folder whose name cannot be one is no VM.
    pub fn vms(&self) -> StoreResult<Vec<VmName>> {
        names(&self.vms_dir(), |name| VmName::new(name).ok())
    }

    /// Reads a VM's record.
    pub fn vm(&self, vm: &VmName) -> StoreResult<VmRecord> {
        let path = self.vm_path(vm);
        if !self.vm_dir(vm).is_dir() {
            return Err(StoreError::NotFound {
                what: "VM",
                name: vm.to_string(),
                store: self.root.clone(),
                advice: "`knibfs vm list` shows those that are, `knibfs vm add` adds one",
            });
        }
        let found: VmRecord = record::read(&path)?;
        if found.name != *vm {
            return Err(StoreError::damaged(&path, format!("it is the record of the VM {}", found.name)));
        }
        Ok(found)
    }

    /// Adds a VM; refused when the name is taken.
    pub fn create_vm(&self, vm: &VmRecord) -> StoreResult<()> {
        let dir = self.vm_dir(&vm.name);
        if self.vm_path(&vm.name).exists() {
            return Err(StoreError::Exists {
                article_what: "a VM",
                name: vm.name.to_string(),
                store: self.root.clone(),
            });
        }
        atomic::create_dir(&dir)?;
        self.save_vm(vm).inspect_err(|_| {
            // Only succeeds when it is empty: what was there is not ours to take.
            let _ = fs::remove_dir(&dir);
        })
    }

    /// Writes a VM's record; the caller holds the VM's lock.
    pub fn save_vm(&self, vm: &VmRecord) -> StoreResult<()> {
        record::write(&self.vm_path(&vm.name), vm)
    }

    /// The names of a VM's backup folders, sorted by name.
    pub fn backup_names(&self, vm: &VmName) -> StoreResult<Vec<BackupName>> {
        names(&self.vm_dir(vm), |name| BackupName::new(name).ok())
    }

    /// Reads all of a VM's manifests.
    pub fn backups(&self, vm: &VmName) -> StoreResult<Backups> {
        let mut found = Backups::default();
        for name in self.backup_names(vm)? {
            match self.manifest(vm, &name) {
                Ok(manifest) => found.manifests.push(manifest),
                // Deleted since the folder was read.
                Err(error) if error.is_not_found() => {}
                Err(error) => found.damaged.push((name, error)),
            }
        }
        found.manifests.sort_by_key(|m| m.sequence);
        Ok(found)
    }

    /// Reads one manifest.
    pub fn manifest(&self, vm: &VmName, backup: &BackupName) -> StoreResult<Manifest> {
        if !self.backup_dir(vm, backup).is_dir() {
            return Err(self.no_backup(&format!("{vm}/{backup}")));
        }
        let path = self.manifest_path(vm, backup);
        let found: Manifest = record::read(&path)?;
        if found.vm != *vm || found.name != *backup {
            let what = format!(
                "it is the manifest of {}/{}, not of the folder that it lies in",
                found.vm, found.name
            );
            return Err(StoreError::damaged(&path, what));
        }
        Ok(found)
    }

    /// Writes the manifest of a published backup anew; the caller holds the VM's lock.
    pub fn save_manifest(&self, manifest: &Manifest) -> StoreResult<()> {
        record::write(&self.manifest_path(&manifest.vm, &manifest.name), manifest)
    }

    /// The newest listed backup that is whole, by sequence number.
    pub fn latest(&self, vm: &VmName) -> StoreResult<Option<Manifest>> {
        Ok(self.backups(vm)?.manifests.into_iter().rev().find(Manifest::is_listed))
    }

    /// The manifest that a person named; `latest` is the newest that is listed.
    pub fn resolve(&self, spec: &BackupSpec) -> StoreResult<Manifest> {
        if !self.vm_dir(&spec.vm).is_dir() {
            self.vm(&spec.vm)?;
        }
        match &spec.backup {
            Some(name) => self.manifest(&spec.vm, name),
            None => self.latest(&spec.vm)?.ok_or_else(|| self.no_backup(&spec.to_string())),
        }
    }

    fn no_backup(&self, name: &str) -> StoreError {
        StoreError::NotFound {
            what: "backup",
            name: name.into(),
            store: self.root.clone(),
            advice: "`knibfs list` shows those that are",
        }
    }

    /// Reads `knibfs.toml` again: settings may have changed.
    pub fn config(&self) -> StoreResult<StoreConfig> {
        read_config(&self.root)
    }

    /// Replaces `knibfs.toml`; the caller holds the store's lock.
    pub(super) fn save_config(&self, config: &StoreConfig) -> StoreResult<()> {
        write_config(&self.root, config)
    }
}

/// `<disk>.qcow2`.
pub fn disk_file(disk: &DiskName) -> String {
    format!("{disk}.qcow2")
}

/// `<disk>.sums`.
pub fn sums_file(disk: &DiskName) -> String {
    format!("{disk}.sums")
}

/// File name of a manifest.
pub(super) fn manifest_file() -> &'static str {
    MANIFEST
}

fn refuse_unless_empty(path: &Path) -> StoreResult<()> {
    if path.join(CONFIG).exists() {
        return Err(StoreError::AlreadyAStore { path: path.into() });
    }
    for entry in fs::read_dir(path).map_err(StoreError::io("read the folder", path))? {
        let entry = entry.map_err(StoreError::io("read the folder", path))?;
        // A new file system's root holds this one.
        if entry.file_name() != OsStr::new("lost+found") {
            return Err(StoreError::NotEmpty { path: path.into() });
        }
    }
    Ok(())
}

/// QEMU and libvirt parse colons and commas in the paths that they are given.
fn refuse_hard_names(root: &Path) -> StoreResult<()> {
    let name = root.to_str().unwrap_or("\n");
    if name.contains([':', ',']) || name.chars().any(char::is_control) {
        return Err(StoreError::Unsuitable {
            path: root.into(),
            what: "its path holds a colon, a comma or a control character, which QEMU cannot take; choose another".into(),
        });
    }
    Ok(())
}

fn read_config(root: &Path) -> StoreResult<StoreConfig> {
    let path = root.join(CONFIG);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::NotInitialised { path: root.into() });
        }
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(StoreError::damaged(&path, "it is not text"));
        }
        Err(e) => return Err(StoreError::io("read", &path)(e)),
    };
    #[derive(Deserialize)]
    struct Gate {
        format: u64,
    }
    // The number first: a newer format may have changed everything else.
    let gate: Gate = toml::from_str(&text).map_err(|e| StoreError::damaged(&path, e.message()))?;
    if gate.format > FORMAT {
        return Err(StoreError::NewerFormat { path, found: gate.format, known: FORMAT });
    }
    toml::from_str(&text).map_err(|e| StoreError::damaged(&path, e.message()))
}

fn write_config(root: &Path, config: &StoreConfig) -> StoreResult<()> {
    let path = root.join(CONFIG);
    let text = toml::to_string(config)
        .map_err(|e| StoreError::Invalid(format!("cannot encode {}: {e}", path.display())))?;
    let text = format!(
        "# A knibfs store, described in docs/FORMAT.md. Settings change with `knibfs setting set`.\n{text}"
    );
    atomic::write(&path, text.as_bytes(), 0o644)
}

/// The folder's subfolders that are `T`s, sorted.
fn names<T: Ord>(dir: &Path, parse: impl Fn(&str) -> Option<T>) -> StoreResult<Vec<T>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return Err(StoreError::io("read the folder", dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::io("read the folder", dir))?;
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        if let Some(name) = entry.file_name().to_str().filter(|_| is_dir).and_then(&parse) {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}
