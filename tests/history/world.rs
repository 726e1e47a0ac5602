//! The world: a real store, real disks, the library, and the real program where it is killed.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use jiff::Timestamp;
use knib_qcow::{Chain, Format, PlainPaths};
use knibfs::chain::retention::Keep;
use knibfs::ops::add_vm::{NewVm, add_disks};
use knibfs::ops::backup::{self, Options};
use knibfs::ops::control::OpControl;
use knibfs::ops::{check, compress, export, prune, recover, release, remove};
use knibfs::store::manifest::{BackupState, Compression, CompressionState, ImageFormat, Kind, Manifest};
use knibfs::store::vm::Track;
use knibfs::store::{BackupId, BackupSpec, DiskSpec, Offering, OfferingId, Store, VmName};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::model::Model;
use super::{Kill, Library, Setup, Step, What, Write};

type Done = Result<(), TestCaseError>;

const SECTOR: u64 = 512;
/// QEMU's programs are run for so many stored images of a history in the end.
const JUDGED: usize = 4;

pub struct World {
    dir: tempfile::TempDir,
    store: Store,
    vm: VmName,
    setup: Setup,
    model: Model,
    exports: u32,
}

fn quietly<T>(run: impl FnOnce(&OpControl<'_>) -> T) -> T {
    let cancel = AtomicBool::new(false);
    run(&OpControl { cancel: &cancel, progress: &|_| {} })
}

fn qemu(program: &str, arguments: &[&str]) -> Done {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}; install qemu-utils (scripts/install-deps)"));
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    prop_assert!(output.status.success() && !said.contains("failed"), "{program} {arguments:?}: {said}");
    Ok(())
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

impl World {
    pub fn new(setup: &Setup) -> Self {
        let dir = tempfile::Builder::new().prefix("knibfs-history").tempdir().unwrap();
        fs::create_dir(dir.path().join("primary")).unwrap();
        let store = Store::init(&dir.path().join("store"), setup.write_once).unwrap();
        let store = store.with_state_dir(dir.path().join("state").join(store_id(dir.path())));
        let vm: VmName = "web1".parse().unwrap();
        let offering = Offering {
            id: OfferingId::random(),
            name: "all".into(),
            compress: setup.compress.is_some(),
            validate: false,
            allow_quick_restore: false,
            allow_extract_file: false,
            chain_size: None,
            compression_library: match setup.compress {
                Some(Library::Zlib) => Compression::Zlib,
                _ => Compression::Zstd,
            },
            created: Timestamp::now(),
            removed: None,
        };
        store.create_offering(&offering).unwrap();
        store.set_setting("backup.chain.size", &setup.chain_size.to_string()).unwrap();
        let disks = setup.disks.iter().map(|sectors| vec![0; (sectors * SECTOR) as usize]).collect();
        let model = Model { disks, backups: vec![], current: None, chain_size: setup.chain_size };
        let world = Self { dir, store, vm, setup: setup.clone(), model, exports: 0 };
        let mut named = Vec::new();
        for at in 0..setup.disks.len() {
            let (path, size) = (world.disk(at), world.model.disks[at].len() as u64);
            match world.format() {
                Format::Raw => fs::File::create(&path).unwrap().set_len(size).unwrap(),
                _ => qemu(
                    "qemu-img",
                    &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &size.to_string()],
                )
                .unwrap(),
            }
            named.push((format!("disk{at}").parse().unwrap(), path));
        }
        let new =
            NewVm { name: world.vm.clone(), offering: Some("all".into()), exclude: vec![], delta_dir: None };
        let track = if setup.overlay { Track::Overlay } else { Track::Scan };
        add_disks(&world.store, &new, &named, track).unwrap();
        world
    }

    fn format(&self) -> Format {
        if self.setup.overlay || self.setup.qcow2 { Format::Qcow2 } else { Format::Raw }
    }

    fn disk(&self, at: usize) -> PathBuf {
        self.dir.path().join("primary").join(format!("disk{at}.img"))
    }

    pub fn step(&mut self, step: &Step) -> Done {
        match step {
            Step::Write(writes) => return writes.iter().try_for_each(|write| self.write(write)),
            Step::Resize { disk, sectors } => {
                return self.resize(disk.index(self.model.disks.len()), *sectors);
            }
            Step::ChainSize(size) => {
                self.store.set_setting("backup.chain.size", &size.to_string()).unwrap();
                self.model.chain_size = *size;
                return Ok(());
            }
            Step::Backup { isolated, kill } => self.backup(*isolated, kill.as_ref())?,
            Step::Remove { which, leased, kill } => self.remove(which, *leased, kill.as_ref())?,
            Step::Export { which, disk, qcow2 } => return self.export(which, disk, *qcow2),
            Step::Compress { which, kill } => self.compress(which, kill.as_ref())?,
            Step::Prune { last, kill } => self.prune(*last, kill.as_ref())?,
            Step::EndChain { kill } => self.end_chain(kill.as_ref())?,
        }
        self.check()
    }

    fn write(&mut self, write: &Write) -> Done {
        let at = write.disk.index(self.model.disks.len());
        let path = self.disk(at);
        let sectors = self.model.disks[at].len() as u64 / SECTOR;
        let start = write.at % sectors;
        let len = write.len.min(sectors - start) * SECTOR;
        let (start, size) = (start * SECTOR, len as usize);
        let bytes = match write.what {
            What::Byte(byte) => vec![byte; size],
            What::Noise(seed) => noise(seed, size),
            What::Zeros | What::Hole => vec![0; size],
        };
        if self.format() == Format::Raw {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            match write.what {
                What::Hole => {
                    use rustix::fs::{FallocateFlags, fallocate};
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, flags, start, len).unwrap();
                }
                _ => file.write_all_at(&bytes, start).unwrap(),
            }
        } else {
            let source = self.dir.path().join("data");
            let command = match write.what {
                What::Byte(byte) => format!("write -q -P {byte} {start} {len}"),
                What::Noise(_) => {
                    fs::write(&source, &bytes).unwrap();
                    format!("write -q -s {} {start} {len}", source.display())
                }
                What::Zeros => format!("write -q -P 0 {start} {len}"),
                What::Hole => format!("write -q -z -u {start} {len}"),
            };
            qemu("qemu-io", &["-f", "qcow2", "-c", &command, path.to_str().unwrap()])?;
        }
        self.model.disks[at][start as usize..start as usize + size].copy_from_slice(&bytes);
        Ok(())
    }

    fn resize(&mut self, at: usize, sectors: u64) -> Done {
        let now = self.model.disks[at].len() as u64 / SECTOR;
        // QEMU's program cannot make every image smaller.
        let sectors = if self.format() == Format::Raw { sectors } else { sectors.max(now) };
        let (path, size) = (self.disk(at), sectors * SECTOR);
        if self.format() == Format::Raw {
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        } else {
            qemu("qemu-img", &["resize", "-q", "-f", "qcow2", path.to_str().unwrap(), &size.to_string()])?;
        }
        self.model.disks[at].resize(size as usize, 0);
        Ok(())
    }

    /// Runs the program, killed; then `recover`, perhaps killed too. Whether it ended by itself.
    fn killed(&self, arguments: &[&str], kill: &Kill) -> Result<bool, TestCaseError> {
        let run = |arguments: &[&str], at: u32| {
            Command::new(env!("CARGO_BIN_EXE_knibfs"))
                .args(arguments)
                .env("KNIBFS_STORE", self.store.root())
                .env("KNIBFS_STATE_DIR", self.dir.path().join("state"))
                .env(knibfs::failpoint::ENV, format!("#{at}"))
                .output()
                .unwrap()
        };
        let output = run(arguments, kill.at);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let was_killed = said.contains("failpoint: killed at");
        if let Some(at) = kill.recover_at.filter(|_| was_killed) {
            run(&["recover"], at);
        }
        let recovered = quietly(|control| recover::run(&self.store, control));
        prop_assert!(recovered.is_ok(), "{said}: recover: {:?}", recovered.err().map(|e| e.to_string()));
        prop_assert!(self.store.unfinished().unwrap().is_empty());
        Ok(!was_killed && output.status.success())
    }

    fn backup(&mut self, isolated: bool, kill: Option<&Kill>) -> Done {
        let made = match kill {
            None => {
                let options = Options { isolated, quiesce: false };
                let made = quietly(|control| {
                    let made = backup::run(&self.store, &self.vm, options, control)?;
                    compress::after_backup(&self.store, made, control).map_err(backup::BackupError::from)
                });
                prop_assert!(made.is_ok(), "{}", made.err().map_or(String::new(), |e| e.to_string()));
                made.ok()
            }
            Some(kill) => {
                let arguments: &[&str] =
                    if isolated { &["backup", "web1", "--isolated"] } else { &["backup", "web1"] };
                let ended = self.killed(arguments, kill)?;
                let known = |m: &Manifest| self.model.find(m.id).is_some();
                let new = self.manifests()?.into_iter().find(|m| !known(m));
                prop_assert!(new.is_some() || !ended, "it ended, and no backup is there");
                new
            }
        };
        let Some(made) = made else { return Ok(()) };
        self.model.take(made.id, made.name.clone(), isolated);
        // QEMU agrees with the new images.
        for at in 0..self.model.disks.len() {
            self.judge(made.id, at)?;
        }
        self.read(made.id)
    }

    fn remove(
        &mut self,
        which: &[prop::sample::Index],
        leased: Option<prop::sample::Index>,
        kill: Option<&Kill>,
    ) -> Done {
        if self.model.backups.is_empty() {
            return Ok(());
        }
        let pick = |at: &prop::sample::Index| at.get(&self.model.backups).id;
        let targets: Vec<BackupId> = which.iter().map(pick).collect();
        let leased = leased.as_ref().map(pick);
        let specs: Vec<BackupSpec> = targets.iter().map(|id| self.spec(*id)).collect();
        let lease = leased.map(|id| self.store.lease(id, "the test's lease").unwrap());
        let after = self.model.remove(&targets, leased);
        match (kill, after) {
            (None, Some(after)) => {
                let done = quietly(|control| remove::run(&self.store, &specs, false, control));
                prop_assert!(done.is_ok(), "{}", done.err().map_or(String::new(), |e| e.to_string()));
                self.model = after;
            }
            (None, None) => {
                let done = quietly(|control| remove::run(&self.store, &specs, false, control));
                prop_assert!(done.is_err(), "it was to be refused");
            }
            (Some(kill), after) => {
                let texts: Vec<String> = specs.iter().map(ToString::to_string).collect();
                let mut arguments = vec!["remove"];
                arguments.extend(texts.iter().map(String::as_str));
                let ended = self.killed(&arguments, kill)?;
                prop_assert!(after.is_some() || !ended, "it was to be refused");
                // Done or undone, nothing between: the check that follows tells.
                let there = self.manifests()?;
                let hidden = |id| {
                    let found = there.iter().find(|m| m.id == id);
                    found.is_none_or(|m| m.state == BackupState::Removed)
                };
                if let Some(after) = after.filter(|_| targets.iter().any(|id| hidden(*id))) {
                    self.model = after;
                } else {
                    prop_assert!(!ended || targets.is_empty(), "it ended, and nothing was removed");
                }
            }
        }
        drop(lease);
        Ok(())
    }

    fn compress(&mut self, which: &prop::sample::Index, kill: Option<&Kill>) -> Done {
        if self.model.backups.is_empty() {
            return Ok(());
        }
        let backup = which.get(&self.model.backups).clone();
        let before = self.store.manifest(&self.vm, &backup.name).unwrap();
        // A hidden backup is kept for its children only.
        let refused = self.setup.write_once
            || before.compression == CompressionState::Compressed
            || before.state != BackupState::BackedUp;
        match kill {
            None => {
                let done = quietly(|control| compress::run(&self.store, &self.vm, &backup.name, control));
                prop_assert_eq!(done.is_err(), refused, "{:?}", done.err().map(|e| e.to_string()));
            }
            Some(kill) => {
                self.killed(&["compress", &format!("web1/{}", backup.name)], kill)?;
            }
        }
        for at in 0..backup.disks.len() {
            self.judge(backup.id, at)?;
        }
        self.read(backup.id)
    }

    fn prune(&mut self, last: u32, kill: Option<&Kill>) -> Done {
        let steps = self.model.prune(last as usize, !self.setup.write_once);
        let Some(kill) = kill else {
            let keep = Keep { last, ..Keep::default() };
            let done = quietly(|control| prune::run(&self.store, &self.vm, &keep, false, control));
            prop_assert!(done.is_ok(), "{}", done.err().map_or(String::new(), |e| e.to_string()));
            self.model = steps[steps.len() - 1].clone();
            return self.newest_is_sound();
        };
        let ended = self.killed(&["prune", "web1", "--keep-last", &last.to_string()], kill)?;
        let there = self.manifests()?;
        let is = |model: &&Model| {
            let parents = there
                .iter()
                .map(|m| (m.id, m.state == BackupState::Removed, m.parent.as_ref().map(|p| p.id)));
            parents.eq(model.backups.iter().map(|b| (b.id, b.hidden, b.parent)))
        };
        let found = steps.iter().rev().chain([&self.model]).find(is).cloned();
        prop_assert!(found.is_some(), "something between two steps of a prune");
        prop_assert!(!ended || found.as_ref() == steps.last(), "it ended before its end");
        self.model = found.unwrap();
        self.newest_is_sound()
    }

    fn newest_is_sound(&self) -> Done {
        let Some(newest) = self.model.backups.last() else { return Ok(()) };
        (0..newest.disks.len()).try_for_each(|at| self.judge(newest.id, at))?;
        self.read(newest.id)
    }

    fn end_chain(&mut self, kill: Option<&Kill>) -> Done {
        let ended = match kill {
            None => {
                let done = quietly(|control| release::unassign(&self.store, &self.vm, control));
                prop_assert!(done.is_ok(), "{}", done.err().map_or(String::new(), |e| e.to_string()));
                true
            }
            Some(kill) => {
                self.killed(&["vm", "unassign", "web1"], kill)?;
                self.store.vm(&self.vm).unwrap().offering.is_none()
            }
        };
        if ended {
            self.model.end_chain();
            release::assign(&self.store, &self.vm, "all").unwrap();
        }
        Ok(())
    }

    fn export(&mut self, which: &prop::sample::Index, disk: &prop::sample::Index, qcow2: bool) -> Done {
        if self.model.backups.is_empty() {
            return Ok(());
        }
        let backup = which.get(&self.model.backups).clone();
        let at = disk.index(backup.disks.len());
        self.exports += 1;
        let file = self.dir.path().join(format!("export{}", self.exports));
        self.export_to(backup.id, at, &file, if qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw })?;
        if qcow2 {
            let wanted = self.wanted(&backup.disks[at]);
            let paths = [wanted.to_str().unwrap(), file.to_str().unwrap()];
            qemu("qemu-img", &["check", "-q", "-f", "qcow2", paths[1]])?;
            qemu("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", paths[0], paths[1]])?;
        } else {
            prop_assert!(fs::read(&file).unwrap() == *backup.disks[at], "the export differs");
        }
        fs::remove_file(&file).unwrap();
        Ok(())
    }

    fn export_to(&self, id: BackupId, at: usize, file: &Path, format: ImageFormat) -> Done {
        let spec = DiskSpec { backup: self.spec(id), disk: format!("disk{at}").parse().unwrap() };
        let done = quietly(|control| export::run(&self.store, &spec, file, format, control));
        prop_assert!(done.is_ok(), "{}", done.err().map_or(String::new(), |e| e.to_string()));
        Ok(())
    }

    fn spec(&self, id: BackupId) -> BackupSpec {
        BackupSpec { vm: self.vm.clone(), backup: self.model.find(id).map(|b| b.name.clone()) }
    }

    fn manifests(&self) -> Result<Vec<Manifest>, TestCaseError> {
        let found = self.store.backups(&self.vm).unwrap();
        prop_assert!(found.damaged.is_empty(), "{:?}", found.damaged);
        Ok(found.manifests)
    }

    fn wanted(&self, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join("wanted");
        fs::write(&path, bytes).unwrap();
        path
    }

    /// `qemu-img` finds the stored image sound and equal to the model.
    fn judge(&self, id: BackupId, at: usize) -> Done {
        let backup = self.model.find(id).unwrap();
        let stored = self.store.disk_path(&self.vm, &backup.name, &format!("disk{at}").parse().unwrap());
        let wanted = self.wanted(&backup.disks[at]);
        let paths = [wanted.to_str().unwrap(), stored.to_str().unwrap()];
        qemu("qemu-img", &["check", "-q", "-f", "qcow2", paths[1]])?;
        qemu("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", paths[0], paths[1]])
    }

    /// The backup, read with every checksum tested, is equal to the model.
    fn read(&self, id: BackupId) -> Done {
        let backup = self.model.find(id).unwrap();
        for (at, bytes) in backup.disks.iter().enumerate() {
            let file = self.dir.path().join("read");
            let _ = fs::remove_file(&file);
            self.export_to(id, at, &file, ImageFormat::Raw)?;
            prop_assert!(fs::read(&file).unwrap() == **bytes, "{} disk{} differs", backup.name, at);
        }
        Ok(())
    }

    /// States, links and primary are as the model says.
    fn check(&self) -> Done {
        let manifests = self.manifests()?;
        let names = |m: &Manifest| m.name.clone();
        let wanted: Vec<_> = self.model.backups.iter().map(|b| b.name.clone()).collect();
        prop_assert_eq!(manifests.iter().map(names).collect::<Vec<_>>(), wanted);
        for (is, wanted) in manifests.iter().zip(&self.model.backups) {
            let state = if wanted.hidden { BackupState::Removed } else { BackupState::BackedUp };
            prop_assert_eq!((is.id, is.state), (wanted.id, state), "{}", is.name);
            let full: Vec<bool> = is.disks.iter().map(|d| d.kind == Kind::Full).collect();
            prop_assert_eq!(&full, &wanted.full, "{}", is.name);
            let parent = is.parent.as_ref().map(|p| p.id);
            prop_assert_eq!((parent, is.position), (wanted.parent, wanted.position), "{}", is.name);
            prop_assert_eq!(
                (is.isolated, is.end_of_chain),
                (wanted.isolated, wanted.end_of_chain),
                "{}",
                is.name
            );
        }
        let record = self.store.vm(&self.vm).unwrap();
        prop_assert_eq!(record.tracking.current.as_ref().map(|c| c.id), self.model.current);
        let mut left: Vec<String> = entries(&self.store.vm_dir(&self.vm));
        left.retain(|n| n.starts_with('.') && n != ".lock" && !n.ends_with(".tmp"));
        prop_assert_eq!(left, Vec::<String>::new(), "left in the store");
        // One owner for each delta, and none without.
        let mut deltas = entries(&self.dir.path().join("primary"));
        deltas.retain(|n| n.contains("knib"));
        let one_each = self.setup.overlay && self.model.current.is_some();
        prop_assert_eq!(deltas.len(), if one_each { self.model.disks.len() } else { 0 }, "{:?}", deltas);
        for (at, bytes) in self.model.disks.iter().enumerate() {
            let chain = Chain::open(&self.disk(at), self.format(), &PlainPaths).unwrap();
            let mut is = vec![0; bytes.len()];
            prop_assert_eq!(chain.size(), bytes.len() as u64);
            chain.read_at(&mut is, 0).unwrap();
            prop_assert!(is == *bytes, "disk{} is not what was written", at);
        }
        Ok(())
    }

    /// At the end: everything.
    pub fn check_all(&self) -> Done {
        self.check()?;
        for backup in &self.model.backups {
            self.read(backup.id)?;
        }
        for backup in self.model.backups.iter().rev().take(JUDGED) {
            self.judge(backup.id, 0)?;
        }
        let found = quietly(|control| check::run(&self.store, None, None, true, control)).unwrap();
        prop_assert_eq!(found.damage, Vec::<String>::new());
        if self.setup.overlay {
            let wanted = self.wanted(&self.model.disks[0]);
            let disk = self.disk(0);
            let paths = [wanted.to_str().unwrap(), disk.to_str().unwrap()];
            qemu("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", paths[0], paths[1]])?;
        }
        Ok(())
    }
}

/// The program appends the store's identity to `KNIBFS_STATE_DIR`.
fn store_id(dir: &Path) -> String {
    Store::open(&dir.join("store")).unwrap().id().to_string()
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}
