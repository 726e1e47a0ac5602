//! A mounted store under random file-system calls, compared with a model of it: handles that are opened, read, left open while
//! backups come, are removed and are compressed. And all that writes is refused.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use knibfs::ops::control::OpControl;
use knibfs::ops::{compress, remove};
use knibfs::store::manifest::BackupState;
use knibfs::store::{BackupName, Manifest};
use mounted_store::{CLUSTER, Fixture, Layer, Shape, content};
use proptest::prelude::*;
use proptest::sample::Index;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timestamps, XattrFlags};

/// Not a multiple of a cluster.
const SIZE: u64 = 40 * CLUSTER - 1536;

fn quietly<T>(run: impl FnOnce(&OpControl<'_>) -> T) -> T {
    let cancel = AtomicBool::new(false);
    run(&OpControl { cancel: &cancel, progress: &|_| {} })
}

/// Waits for what the kernel may remember differently for a second.
fn eventually(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Stored,
    Manifest,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "root.raw",
            Self::Stored => "root.qcow2",
            Self::Manifest => "manifest.json",
        }
    }
}

#[derive(Debug, Clone)]
enum Call {
    Open(Index, Kind),
    Close(Index),
    Read(Index, f64, usize),
    Seek(Index, f64, bool),
    Look(Index, Kind),
    NoSuch(Index, String),
    List,
    Backup(Layer, bool),
    Remove(Index),
    Compress(Index),
}

fn any_layer() -> impl Strategy<Value = Layer> {
    let shape = prop_oneof![Just(Shape::Plain), Just(Shape::Compressed), Just(Shape::Zero)];
    prop::collection::btree_map(0..SIZE.div_ceil(CLUSTER), shape, 0..12)
}

fn any_call() -> impl Strategy<Value = Call> {
    let kind = || prop_oneof![4 => Just(Kind::Raw), 2 => Just(Kind::Stored), 1 => Just(Kind::Manifest)];
    let at = || prop_oneof![6 => 0.0f64..1.0, 1 => Just(1.0), 1 => Just(1.5)];
    let len = prop_oneof![Just(0usize), Just(1), 1usize..5000, Just(CLUSTER as usize), 1usize..400_000];
    // What cannot be a name there, and what could be one elsewhere.
    let name = prop_oneof![
        Just("..x".to_owned()),
        Just("root.RAW".to_owned()),
        Just("root.sums".to_owned()),
        Just(".root.qcow2.old".to_owned()),
        Just("root.qcow2\n".to_owned()),
        Just("tpm".to_owned()),
        "[^/\0]{1,60}",
    ];
    prop_oneof![
        6 => (any::<Index>(), kind()).prop_map(|(i, k)| Call::Open(i, k)),
        2 => any::<Index>().prop_map(Call::Close),
        16 => (any::<Index>(), at(), len).prop_map(|(i, at, len)| Call::Read(i, at, len)),
        4 => (any::<Index>(), at(), any::<bool>()).prop_map(|(i, at, data)| Call::Seek(i, at, data)),
        3 => (any::<Index>(), kind()).prop_map(|(i, k)| Call::Look(i, k)),
        2 => (any::<Index>(), name).prop_map(|(i, name)| Call::NoSuch(i, name)),
        1 => Just(Call::List),
        2 => (any_layer(), any::<bool>()).prop_map(|(layer, full)| Call::Backup(layer, full)),
        2 => any::<Index>().prop_map(Call::Remove),
        2 => any::<Index>().prop_map(Call::Compress),
    ]
}

/// What a backup's guest sees: who wrote a cluster.
type Map = BTreeMap<u64, Option<usize>>;

struct Backup {
    name: BackupName,
    map: Map,
}

struct Open {
    file: File,
    kind: Kind,
    backup: BackupName,
    /// All bytes that it must ever give.
    bytes: Vec<u8>,
    map: Map,
}

struct Model {
    f: Fixture,
    backups: Vec<Backup>,
    open: Vec<Open>,
}

impl Model {
    fn new(first: Layer) -> Self {
        let f = Fixture::new(SIZE, true);
        std::mem::forget(f.mount(&["--cache-size", "1M"])); // the fixture changes; it unmounts at its end
        let mut model = Self { f, backups: vec![], open: vec![] };
        model.backup(first, true);
        model
    }

    fn bytes(map: &Map) -> Vec<u8> {
        let mut out = vec![0; (SIZE.div_ceil(CLUSTER) * CLUSTER) as usize];
        for (cluster, by) in map {
            if let Some(number) = by {
                let from = (cluster * CLUSTER) as usize;
                out[from..from + CLUSTER as usize].copy_from_slice(&content(*number, *cluster));
            }
        }
        out.truncate(SIZE as usize);
        out
    }

    fn path(&self, backup: &BackupName, kind: Kind) -> PathBuf {
        self.f.mnt().join("vms/web1").join(backup).join(kind.name())
    }

    fn manifest(&self, name: &BackupName) -> Manifest {
        self.f.store.manifest(&self.f.vm.name, name).unwrap()
    }

    /// Those that can be opened by name, and those that are listed: from what the store's own code says.
    fn there(&self) -> Vec<Manifest> {
        self.f.store.backups(&self.f.vm.name).unwrap().manifests
    }

    fn backup(&mut self, layer: Layer, full: bool) {
        let number = self.f.backups.len();
        let there = self.there();
        let parent = there.last().filter(|m| !full && m.state == BackupState::BackedUp).cloned();
        let mut map = match &parent {
            Some(parent) => self.backups.iter().find(|b| b.name == parent.name).unwrap().map.clone(),
            None => Map::new(),
        };
        map.extend(layer.iter().map(|(c, shape)| (*c, (*shape != Shape::Zero).then_some(number))));
        let name = self.f.add_on(layer, parent.as_ref());
        self.backups.push(Backup { name, map });
        self.listing_is_right();
    }

    fn listing_is_right(&self) {
        let mut wanted: Vec<_> =
            self.there().iter().filter(|m| m.is_listed()).map(|m| m.name.to_string()).collect();
        wanted.sort();
        if !wanted.is_empty() {
            wanted.push("latest".into());
        }
        eventually("the folder lists what the store has", || {
            let names = fs::read_dir(self.f.mnt().join("vms/web1")).unwrap();
            let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names == wanted
        });
    }

    fn pick(&self, index: Index) -> Option<Manifest> {
        let there = self.there();
        (!there.is_empty()).then(|| index.get(&there).clone())
    }

    fn is_open(&self, name: &BackupName, kind: Kind) -> bool {
        self.open.iter().any(|o| o.backup == *name && o.kind == kind)
    }

    fn open(&mut self, of: &Manifest, kind: Kind) {
        let backup = self.backups.iter().find(|b| b.name == of.name).unwrap();
        let stored = self.f.store.backup_dir(&self.f.vm.name, &of.name).join(kind.name());
        let bytes = match kind {
            Kind::Raw => Self::bytes(&backup.map),
            Kind::Stored | Kind::Manifest => fs::read(stored).unwrap(),
        };
        // For a second a name may lead to the file that has just been replaced: that is gone, not another's.
        let path = self.path(&of.name, kind);
        let end = Instant::now() + Duration::from_secs(60);
        let file = loop {
            match File::open(&path) {
                Ok(file) if kind == Kind::Raw || file.metadata().unwrap().len() == bytes.len() as u64 => {
                    break file;
                }
                Ok(_) => {}
                Err(e) => assert_eq!(e.raw_os_error(), Some(116), "ESTALE at most: {e}"),
            }
            assert!(Instant::now() < end, "{} is never the new file", path.display());
        };
        self.open.push(Open { file, kind, backup: of.name.clone(), bytes, map: backup.map.clone() });
    }

    fn read(&self, index: Index, at: f64, len: usize) {
        if self.open.is_empty() {
            return;
        }
        let open = index.get(&self.open);
        #[allow(clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = (at * open.bytes.len() as f64) as usize;
        let wanted = open.bytes.get(at..).unwrap_or_default();
        let wanted = &wanted[..len.min(wanted.len())];
        let mut seen = vec![0xaa; len];
        let mut read = 0;
        while read < len {
            match open.file.read_at(&mut seen[read..], (at + read) as u64).unwrap() {
                0 => break,
                more => read += more,
            }
        }
        assert!(&seen[..read] == wanted, "{} {:?} bytes at {at}: {read} read", len, open.kind);
    }

    fn seek(&self, index: Index, at: f64, data: bool) {
        let raw: Vec<_> = self.open.iter().filter(|o| o.kind == Kind::Raw).collect();
        if raw.is_empty() {
            return;
        }
        let open = index.get(&raw);
        #[allow(clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = (at * SIZE as f64) as u64;
        let holds = |cluster: u64| open.map.get(&cluster).is_some_and(Option::is_some);
        let mut clusters = at / CLUSTER..SIZE.div_ceil(CLUSTER);
        let place = |cluster: u64| (cluster * CLUSTER).max(at);
        let (wanted, from) = if data {
            (clusters.find(|c| holds(*c)).map(place), rustix::fs::SeekFrom::Data(at))
        } else {
            (Some(clusters.find(|c| !holds(*c)).map_or(SIZE, place)), rustix::fs::SeekFrom::Hole(at))
        };
        let wanted = wanted.filter(|_| at < SIZE);
        assert_eq!(rustix::fs::seek(&open.file, from).ok(), wanted, "data: {data}, from {at}");
    }

    fn look(&self, of: &Manifest, kind: Kind) {
        let found = fs::metadata(self.path(&of.name, kind));
        if kind == Kind::Raw {
            let found = found.unwrap();
            assert_eq!((found.len(), found.modified().unwrap()), (SIZE, of.taken.into()));
        }
    }

    fn remove(&mut self, of: &Manifest) {
        let spec = format!("web1/{}", of.name).parse().unwrap();
        let removed = quietly(|control| remove::run(&self.f.store, &[spec], false, control));
        let is_read = |o: &&Open| o.kind != Kind::Manifest;
        let of_it = self.open.iter().filter(is_read).any(|o| o.backup == of.name);
        let any = self.open.iter().any(|o| is_read(&o));
        match removed {
            Ok(_) => assert!(!of_it, "it is open"),
            // Or what would be deleted with it is.
            Err(error) if of.state == BackupState::BackedUp => {
                let error = error.to_string();
                assert!(any && error.contains("open in the mount at"), "{error}");
            }
            Err(_) => assert_eq!(of.state, BackupState::Removed),
        }
        let there = self.there();
        for open in self.open.iter().filter(is_read) {
            assert!(there.iter().any(|m| m.name == open.backup), "what is open is not deleted");
        }
        self.listing_is_right();
    }

    fn compress(&mut self, of: &Manifest) {
        // It would wait for that handle.
        if of.state != BackupState::BackedUp || self.is_open(&of.name, Kind::Stored) {
            return;
        }
        let done = quietly(|control| compress::run(&self.f.store, &self.f.vm.name, &of.name, control));
        if let Err(error) = done {
            assert!(error.to_string().contains("compressed already"), "{error}");
        }
    }

    fn call(&mut self, call: Call) {
        match call {
            Call::Open(index, kind) => {
                if let Some(of) = self.pick(index) {
                    self.open(&of, kind);
                }
            }
            Call::Close(index) => {
                if !self.open.is_empty() {
                    self.open.swap_remove(index.index(self.open.len()));
                    // The kernel tells of it a moment later.
                    let wanted = self.leases();
                    eventually("leases end with their handles", || self.seen_leases() == wanted);
                }
            }
            Call::Read(index, at, len) => self.read(index, at, len),
            Call::Seek(index, at, data) => self.seek(index, at, data),
            Call::Look(index, kind) => {
                if let Some(of) = self.pick(index) {
                    self.look(&of, kind);
                }
            }
            Call::NoSuch(index, name) => {
                let names = ["root.raw", "root.qcow2", "manifest.json", "domain.xml", "."];
                if let Some(of) = self.pick(index).filter(|_| !names.contains(&name.as_str()) && name != "..")
                {
                    let path = self.path(&of.name, Kind::Raw).with_file_name(name);
                    let error = fs::metadata(&path).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::NotFound, "{}", path.display());
                }
            }
            Call::List => self.listing_is_right(),
            Call::Backup(layer, full) => self.backup(layer, full),
            Call::Remove(index) => {
                if let Some(of) = self.pick(index) {
                    self.remove(&of);
                }
            }
            Call::Compress(index) => {
                if let Some(of) = self.pick(index) {
                    self.compress(&of);
                }
            }
        }
    }

    /// Backups with an open disk, and with an open stored file.
    fn leases(&self) -> Vec<usize> {
        let of = |name: &BackupName| {
            usize::from(self.is_open(name, Kind::Raw)) + usize::from(self.is_open(name, Kind::Stored))
        };
        self.there().iter().map(|m| of(&m.name)).collect()
    }

    fn seen_leases(&self) -> Vec<usize> {
        self.there().iter().map(|m| self.f.store.leases(m.id).unwrap().len()).collect()
    }

    fn end(&self) {
        for (n, open) in self.open.iter().enumerate() {
            let mut seen = vec![0; open.bytes.len()];
            open.file.read_exact_at(&mut seen, 0).unwrap();
            assert!(seen == open.bytes, "handle {n} at the end");
        }
        for of in self.there() {
            let backup = self.backups.iter().find(|b| b.name == of.name).unwrap();
            assert!(
                fs::read(self.path(&of.name, Kind::Raw)).unwrap() == Self::bytes(&backup.map),
                "{}",
                of.name
            );
            assert_eq!(self.manifest(&of.name).id, of.id);
        }
        assert_eq!(
            fs::read_to_string(self.f.mnt().join(".knibfs/damage")).unwrap(),
            "",
            "nothing is damaged"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_calls_see_what_the_model_says(
        first in any_layer(),
        calls in prop::collection::vec(any_call(), 10..60),
    ) {
        let mut model = Model::new(first);
        for call in calls {
            model.call(call);
        }
        model.end();
    }
}

/// Every call that would change something, and what it said.
fn writers(mnt: &Path, dir: &Path, file: &Path) -> Vec<(&'static str, io::Result<()>)> {
    let new = dir.join("new");
    let path = |p: &Path| p.to_path_buf();
    let open = |name, options: &mut OpenOptions, path: &Path| (name, options.open(path).map(drop));
    let mode = Mode::from_bits_truncate(0o600);
    let far = Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
    };
    let node = |kind| rustix::fs::mknodat(CWD, dir.join("new"), kind, mode, 0).map_err(io::Error::from);
    let temporary = OFlags::TMPFILE | OFlags::WRONLY;
    vec![
        open("open to write", OpenOptions::new().write(true), file),
        open("open to read and write", OpenOptions::new().read(true).write(true), file),
        open("open to append", OpenOptions::new().append(true), file),
        open("open and truncate", OpenOptions::new().write(true).truncate(true), file),
        open("create", OpenOptions::new().write(true).create(true), &new),
        open(
            "create to read",
            OpenOptions::new().read(true).custom_flags(OFlags::CREATE.bits() as i32),
            &new,
        ),
        open("create a new one", OpenOptions::new().write(true).create_new(true), &new),
        ("an unnamed file", rustix::fs::open(dir, temporary, mode).map(drop).map_err(io::Error::from)),
        ("truncate", rustix::fs::open(file, OFlags::WRONLY, mode).map(drop).map_err(io::Error::from)),
        ("unlink", fs::remove_file(file)),
        ("rmdir", fs::remove_dir(dir)),
        ("rename", fs::rename(file, &new)),
        ("rename to elsewhere", fs::rename(file, mnt.join("new"))),
        (
            "exchange",
            rustix::fs::renameat_with(CWD, file, CWD, mnt.join("vms/web1/latest"), RenameFlags::EXCHANGE)
                .map_err(io::Error::from),
        ),
        ("mkdir", fs::create_dir(path(&new))),
        ("link", fs::hard_link(file, &new)),
        ("symlink", std::os::unix::fs::symlink("x", &new)),
        ("chmod", fs::set_permissions(file, fs::Permissions::from_mode(0o777))),
        ("chown", std::os::unix::fs::chown(file, Some(1), Some(1))),
        ("utimens", rustix::fs::utimensat(CWD, file, &far, AtFlags::empty()).map_err(io::Error::from)),
        (
            "setxattr",
            rustix::fs::setxattr(file, "user.x", b"y", XattrFlags::empty()).map_err(io::Error::from),
        ),
        ("removexattr", rustix::fs::removexattr(file, "user.x").map_err(io::Error::from)),
        ("mkfifo", node(FileType::Fifo)),
        ("mksock", node(FileType::Socket)),
        ("mknod", node(FileType::RegularFile)),
    ]
}

#[test]
fn all_that_writes_is_told_that_it_is_read_only_also_when_it_is_mounted_again_as_writable() {
    let f = Fixture::chain(SIZE, true, &[(0..9).map(|n| (n, Shape::Compressed)).collect()]);
    let _mount = f.mount(&[]);
    let before = fs::read(f.stored(0)).unwrap();
    for again in [false, true] {
        if again {
            rustix::mount::mount_remount(f.mnt(), rustix::mount::MountFlags::empty(), "").unwrap();
        }
        let folder = f.in_mount(0, "");
        for (dir, file) in [
            (folder.clone(), folder.join("root.raw")),
            (folder.clone(), folder.join("root.qcow2")),
            (f.mnt().join("vms/web1"), folder.join("domain.xml")),
            (f.mnt().join(".knibfs"), f.mnt().join(".knibfs/status")),
            (f.mnt().join("by-id"), folder.join("manifest.json")),
        ] {
            for (call, said) in writers(&f.mnt(), &dir, &file) {
                let error = said.expect_err(call);
                // An unnamed file needs a file system that knows them; the kernel says so before anyone is asked.
                let is_told = error.kind() == io::ErrorKind::ReadOnlyFilesystem
                    || (again && call == "an unnamed file" && error.kind() == io::ErrorKind::Unsupported);
                assert!(is_told, "{call} of {}, again: {again}: {error}", file.display());
            }
        }
        // Through a handle that reads.
        let file = File::open(folder.join("root.raw")).unwrap();
        assert!(file.set_len(0).is_err() && file.write_at(b"x", 0).is_err());
        let cut = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096);
        assert_eq!(cut, Err(rustix::io::Errno::BADF));
        file.set_permissions(fs::Permissions::from_mode(0o777)).unwrap_err();
    }
    assert!(fs::read(f.stored(0)).unwrap() == before);
    assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize));
}
