//! Where everything lies in a store, and how it is found and read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::journal::state_dir;
use super::probe;
use super::{
    BackupName, BackupSpec, DiskName, Manifest, StoreError, StoreId, StoreResult, VmName, VmRecord, atomic,
    record,
};

/// Newest store format that this program reads, and the one that it makes.
pub const FORMAT: u64 = 1;

const CONFIG: &str = "knibfs.toml";
/// The folders of a store.
const PARTS: [&str; 4] = ["vms", "offerings", "journal", "leases"];
const MANIFEST: &str = "manifest.json";
const VM: &str = "vm.json";
/// What is left of VMs that are being forgotten.
const GONE: &str = ".gone-";

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
    state_dir: PathBuf,
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
        let new = match fs::metadata(path) {
            Ok(found) if !found.is_dir() => return Err(StoreError::NotADirectory { path: path.into() }),
            Ok(_) => refuse_unless_empty(path).map(|()| false)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::DirBuilder::new()
                // Guests' disks are nobody else's business.
                .mode(0o700)
                .create(path)
                .map(|()| true)
                .map_err(StoreError::io("create the folder", path))?,
            Err(e) => return Err(StoreError::io("look at", path)(e)),
        };
        Self::fill(path, write_once).inspect_err(|_| {
            // What was begun is taken away again; only what is empty can be.
            for part in PARTS {
                let _ = fs::remove_dir(path.join(part));
            }
            if new {
                let _ = fs::remove_dir(path);
            }
        })
    }

    fn fill(path: &Path, write_once: bool) -> StoreResult<Self> {
        let root = path.canonicalize().map_err(StoreError::io("look at", path))?;
        refuse_hard_names(&root)?;
        probe::probe(&root)?;
        for part in PARTS {
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
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing { path: path.into(), source });
            }
            Err(e) => return Err(StoreError::io("open the store", path)(e)),
        }
        let root = path.canonicalize().map_err(StoreError::io("open the store", path))?;
        let config = read_config(&root)?;
        let state_dir = state_dir().join(config.id.to_string());
        Ok(Self { root, id: config.id, write_once: config.write_once, state_dir })
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

    /// What this host keeps about the store, outside of it: `/var/lib/knibfs/<store id>`.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Keeps it in another folder, whatever the environment says.
    #[must_use]
    pub fn with_state_dir(mut self, dir: PathBuf) -> Self {
        self.state_dir = dir;
        self
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
        self.vm_dir(vm).join(VM)
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
        let exists = || StoreError::Exists {
            article_what: "a VM",
            name: vm.name.to_string(),
            store: self.root.clone(),
        };
        let place = self.vm_dir(&vm.name);
        if place.exists() {
            return Err(exists());
        }
        // Like a backup: there whole or not at all. No VM's name begins with a dot.
        let beside = self.vms_dir().join(format!(".new-{}", uuid::Uuid::new_v4()));
        let made = atomic::create_dir(&beside)
            .and_then(|()| record::write(&beside.join(VM), vm))
            // There from the start, so that an operation that is refused adds no file.
            .and_then(|()| atomic::write(&beside.join(super::lock::LOCK), b"", 0o644))
            .and_then(|()| atomic::rename(&beside, &place));
        made.map_err(|error| {
            let _ = fs::remove_dir_all(&beside);
            // Another process was faster.
            if place.join(VM).exists() { exists() } else { error }
        })
    }

    /// Reads the record of a VM that is in knibfs's care; one that was removed is refused.
    pub fn vm_in_care(&self, vm: &VmName) -> StoreResult<VmRecord> {
        let record = self.vm(vm)?;
        match record.removed {
            None => Ok(record),
            Some(_) => Err(StoreError::Invalid(format!(
                "the VM {vm} was removed from knibfs's care, and only its backups are kept: `knibfs create-vm` makes a new VM of one, `knibfs vm add` takes its domain back"
            ))),
        }
    }

    /// Deletes what is left of a VM that was removed and has no backup any more. The caller holds the VM's lock.
    pub fn forget_vm(&self, vm: &VmName) -> StoreResult<()> {
        // Out of sight by one rename: a folder without its record would be a damaged VM. No VM's name begins with a dot.
        let aside = self.vms_dir().join(format!("{GONE}{}", uuid::Uuid::new_v4()));
        atomic::rename(&self.vm_dir(vm), &aside)?;
        self.sweep_forgotten()
    }

    /// Deletes what a crash left of VMs that were forgotten.
    pub fn sweep_forgotten(&self) -> StoreResult<()> {
        let dir = self.vms_dir();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("read the folder", &dir))? {
            let entry = entry.map_err(StoreError::io("read the folder", &dir))?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(GONE)) {
                let path = entry.path();
                match fs::remove_dir_all(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        return Err(StoreError::io("delete", &path)(e));
                    }
                    _ => {}
                }
            }
        }
        atomic::sync_dir(&dir)
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

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::manifest::{
        BackupState, CompressionState, Disk, ImageFormat, Kind, PrimaryImage, ValidationState,
    };
    use super::super::vm::{Source, Track, Volume};
    use super::super::{BackupId, Staging, VmId, VolumeId};
    use super::*;

    /// A store with one VM of plain disk files, `web1`.
    pub(crate) fn store_with_vm() -> (tempfile::TempDir, Store, VmName) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), false).unwrap();
        let store = store.with_state_dir(dir.path().join("state"));
        let name = VmName::new("web1").unwrap();
        store.create_vm(&vm_record(&name)).unwrap();
        (dir, store, name)
    }

    pub(crate) fn vm_record(name: &VmName) -> VmRecord {
        VmRecord {
            volumes: vec![Volume {
                id: VolumeId::random(),
                name: DiskName::new("root").unwrap(),
                path: "/images/root.raw".into(),
                format: ImageFormat::Raw,
                target: None,
                serial: None,
                block_device: false,
                detached: false,
            }],
            ..VmRecord::new(VmId::random(), name.clone(), Source::Disks { track: Track::Scan })
        }
    }

    pub(crate) fn manifest(vm: &VmRecord, taken: &str, sequence: u64) -> Manifest {
        let taken: Timestamp = taken.parse().unwrap();
        let volume = &vm.volumes[0];
        Manifest {
            id: BackupId::random(),
            name: BackupName::at(taken, 1),
            vm: vm.name.clone(),
            vm_id: vm.id,
            sequence,
            parent: None,
            position: 1,
            isolated: false,
            end_of_chain: false,
            state: BackupState::BackedUp,
            compression: CompressionState::Uncompressed,
            validation: ValidationState::NotValidated,
            started: taken,
            taken,
            finished: taken,
            quiesced: false,
            source: vm.source.clone(),
            disks: vec![Disk {
                name: volume.name.clone(),
                volume: volume.id,
                target: None,
                kind: Kind::Full,
                reason: "it is the first".into(),
                depth: 1,
                virtual_size: 1 << 30,
                file_size: 4 << 20,
                cluster_size: 65536,
                data_clusters: 10,
                compressed_clusters: 0,
                zero_clusters: 0,
                compression: None,
                sums_size: 100,
                sums_digest: String::new(),
                primary: PrimaryImage {
                    path: volume.path.clone(),
                    format: volume.format,
                    device: 1,
                    inode: 2,
                    virtual_size: 1 << 30,
                    modified: None,
                    owner: None,
                },
            }],
            skipped: vec![],
            notes: vec![],
            knibfs_version: "0".into(),
        }
    }

    fn publish(store: &Store, manifest: &mut Manifest) -> BackupName {
        let staging = store.stage(&manifest.vm, manifest.id).unwrap();
        fs::write(staging.disk_path(&manifest.disks[0].name), b"image").unwrap();
        staging.publish(store, manifest).unwrap()
    }

    #[test]
    fn a_backup_is_there_whole_or_not_at_all() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let mut backup = manifest(&vm, "2026-11-23T22:32:42Z", 1);
        let staging = store.stage(&name, backup.id).unwrap();
        fs::write(staging.disk_path(&backup.disks[0].name), b"image").unwrap();
        assert_eq!(store.backup_names(&name).unwrap(), []);
        assert!(!staging.is_whole());
        let published = staging.publish(&store, &mut backup).unwrap();
        assert_eq!(store.manifest(&name, &published).unwrap(), backup);
        assert!(store.stagings(&name).unwrap().is_empty());
    }

    #[test]
    fn an_interrupted_backup_is_found_and_discarded() {
        let (_dir, store, name) = store_with_vm();
        let id = BackupId::random();
        store.stage(&name, id).unwrap();
        let left: Vec<Staging> = store.stagings(&name).unwrap();
        assert_eq!(left.iter().map(Staging::id).collect::<Vec<_>>(), [id]);
        left.into_iter().for_each(|s| s.discard().unwrap());
        assert!(store.stagings(&name).unwrap().is_empty());
        store.staging(&name, id).discard().unwrap();
    }

    #[test]
    fn names_that_are_taken_get_a_number_and_latest_follows_the_sequence() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let names: Vec<_> = (1..=3)
            .map(|n| publish(&store, &mut manifest(&vm, "2026-11-23T22:32:42Z", n)).to_string())
            .collect();
        assert_eq!(names, ["2026-11-23T22-32-42Z", "2026-11-23T22-32-42Z-2", "2026-11-23T22-32-42Z-3"]);
        // The clock went back.
        let last = publish(&store, &mut manifest(&vm, "2020-01-01T00:00:00Z", 4));
        assert_eq!(store.resolve(&"web1/latest".parse().unwrap()).unwrap().name, last);
        let sequence: Vec<_> = store.backups(&name).unwrap().manifests.iter().map(|m| m.sequence).collect();
        assert_eq!(sequence, [1, 2, 3, 4]);
    }

    #[test]
    fn removed_backups_are_never_latest() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let first = publish(&store, &mut manifest(&vm, "2026-01-01T00:00:00Z", 1));
        let mut second = manifest(&vm, "2026-01-02T00:00:00Z", 2);
        publish(&store, &mut second);
        second.state = BackupState::Removed;
        store.save_manifest(&second).unwrap();
        assert_eq!(store.latest(&name).unwrap().unwrap().name, first);
    }

    #[test]
    fn what_is_not_there_is_said_with_the_way_out() {
        let (dir, store, name) = store_with_vm();
        let cases = [
            (Store::open(dir.path()).unwrap_err(), "make one with `knibfs init"),
            (Store::open(&store.vm_path(&name)).unwrap_err(), "is not a folder"),
            (Store::open(&dir.path().join("nowhere")).unwrap_err(), "nowhere"),
            (Store::init(store.root(), false).unwrap_err(), "already is a knibfs store"),
            (Store::init(dir.path(), false).unwrap_err(), "is not empty"),
            (Store::init(&dir.path().join("a/b"), false).unwrap_err(), "cannot create the folder"),
            (Store::init(&store.vm_path(&name), false).unwrap_err(), "is not a folder"),
            (store.vm(&"db".parse().unwrap()).unwrap_err(), "there is no VM \"db\""),
            (store.resolve(&"db/latest".parse().unwrap()).unwrap_err(), "there is no VM \"db\""),
            (
                store.resolve(&"web1/latest".parse().unwrap()).unwrap_err(),
                "there is no backup \"web1/latest\"",
            ),
            (store.create_vm(&vm_record(&name)).unwrap_err(), "there already is a VM \"web1\""),
        ];
        for (error, words) in cases {
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_folder_that_qemu_could_not_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["a:b", "a,b", "a\nb"] {
            assert!(Store::init(&dir.path().join(bad), false).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let (_dir, store, name) = store_with_vm();
        let config = store.root().join("knibfs.toml");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("format = 1", "format = 2") + "future = [[1]]\n").unwrap();
        assert!(matches!(Store::open(store.root()).unwrap_err(), StoreError::NewerFormat { found: 2, .. }));
        let vm = store.vm_path(&name);
        let text = fs::read_to_string(&vm).unwrap();
        fs::write(&vm, text.replace("\"format\": 1", "\"format\": 7")).unwrap();
        assert!(matches!(store.vm(&name).unwrap_err(), StoreError::NewerFormat { found: 7, .. }));
    }

    #[test]
    fn a_manifest_in_another_folder_is_damage() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let first = publish(&store, &mut manifest(&vm, "2026-01-01T00:00:00Z", 1));
        let second = publish(&store, &mut manifest(&vm, "2026-01-02T00:00:00Z", 2));
        fs::copy(store.manifest_path(&name, &first), store.manifest_path(&name, &second)).unwrap();
        let found = store.backups(&name).unwrap();
        assert_eq!(found.manifests.len(), 1);
        assert_eq!(found.damaged[0].0, second);
    }

    #[test]
    fn a_deleted_manifest_is_reported_and_hides_no_other() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let first = publish(&store, &mut manifest(&vm, "2026-01-01T00:00:00Z", 1));
        publish(&store, &mut manifest(&vm, "2026-01-02T00:00:00Z", 2));
        fs::remove_file(store.manifest_path(&name, &first)).unwrap();
        let found = store.backups(&name).unwrap();
        assert_eq!((found.manifests.len(), found.damaged.len()), (1, 1));
        assert!(found.damaged[0].1.to_string().contains("it is missing"));
    }

    #[test]
    fn a_hostile_manifest_is_refused() {
        let (_dir, store, name) = store_with_vm();
        let vm = store.vm(&name).unwrap();
        let good = manifest(&vm, "2026-01-01T00:00:00Z", 1);
        let mut twice = good.clone();
        twice.disks.push(twice.disks[0].clone());
        let mut orphan = good.clone();
        orphan.disks[0].kind = Kind::Incremental;
        orphan.disks[0].depth = 2;
        let mut deep = good.clone();
        deep.disks[0].depth = 201;
        let mut huge = good.clone();
        huge.disks[0].virtual_size = u64::MAX;
        for bad in [twice, orphan, deep, huge] {
            assert!(super::super::Record::check(&bad).is_err());
            assert!(store.save_manifest(&bad).is_err());
        }
        let text = serde_json::to_string(&good).unwrap();
        for (from, to) in
            [("\"root\"", "\"../../etc\""), ("\"web1\"", "\"a/b\""), ("2026-01-01T00-00-00Z", "..")]
        {
            assert!(text.contains(from));
            assert!(serde_json::from_str::<Manifest>(&text.replace(from, to)).is_err(), "{to} was taken");
        }
    }

    proptest! {
        #[test]
        fn no_damaged_record_is_taken_for_a_good_one(place in 0.0f64..1.0, cut in any::<bool>(), flip in 1u8..=255) {
            let (_dir, store, name) = store_with_vm();
            let path = store.vm_path(&name);
            let good = store.vm(&name).unwrap();
            let mut bytes = fs::read(&path).unwrap();
            #[allow(clippy::cast_sign_loss)]
            let at = (place * bytes.len() as f64) as usize;
            if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
            fs::write(&path, &bytes).unwrap();
            // White space, and the case of a digit in an escape, say nothing: the record may only be the same or refused.
            if let Ok(found) = store.vm(&name) {
                prop_assert_eq!(found, good);
            }
        }
    }
}
