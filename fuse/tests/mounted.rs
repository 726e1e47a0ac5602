//! A tree in memory, mounted for real and used as programs use it. Needs root and /dev/fuse.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use common::{Bytes, Kind, MemorySource, MemoryTree, Node, Panics, Together, time};
use knib_fuse::*;
use rustix::fs::SeekFrom as RawSeek;

struct Mounted {
    dir: tempfile::TempDir,
    tree: Arc<MemoryTree>,
    source: Arc<MemorySource>,
    cache: Arc<BlockCache>,
    files: Arc<OpenFiles>,
    stopper: Stopper,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

const CLUSTER: u64 = 65536;
const THREADS: usize = 4;

impl Mounted {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = Arc::new(MemoryTree::new());
        let kinds =
            (0..64).map(|n| [Kind::Block, Kind::Direct, Kind::Zero, Kind::Block][n % 4]).collect::<Vec<_>>();
        let mut source = MemorySource::new(5, CLUSTER, kinds, 64 * CLUSTER - 100);
        source.damaged.extend([20, 21]);
        let source = Arc::new(source);
        let cache = BlockCache::new(8 << 20);
        let disk = BlockFile::new(source.clone(), cache.clone(), ReadAhead::start());
        tree.add(Ino::ROOT, "disk.raw", Node::File(Arc::new(disk), 48 * CLUSTER));
        tree.add(Ino::ROOT, "panics", Node::File(Arc::new(Panics), 0));
        tree.add(Ino::ROOT, "latest", Node::Link("many/name-7".into()));
        let many = tree.add_folder(Ino::ROOT, "many");
        for n in 0..1000 {
            tree.add(many, format!("name-{n}"), Node::File(Arc::new(Bytes(vec![n as u8; n])), n as u64));
        }
        let config = MountConfig { allow_other: false, name: "knib-test".into() };
        let together = Together { wanted: THREADS, reading: Default::default(), bell: Default::default() };
        tree.add(Ino::ROOT, "together", Node::File(Arc::new(together), 0));
        let server = Server::mount(tree.clone(), dir.path(), &config, THREADS)
            .expect("this test mounts: run it as root where /dev/fuse is");
        let (files, stopper) = (server.open_files(), server.stopper().unwrap());
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, tree, source, cache, files, stopper, thread }
    }

    fn path(&self, name: impl AsRef<std::path::Path>) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.stopper.detach().unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

/// Memory that O_DIRECT can read into: the part of `space` that is aligned.
fn aligned(space: &mut [u8], len: usize) -> &mut [u8] {
    let from = space.as_ptr().align_offset(4096);
    &mut space[from..from + len]
}

#[test]
fn files_read_as_they_are_whole_in_parts_and_past_the_cache() {
    let m = Mounted::new();
    let disk = File::open(m.path("disk.raw")).unwrap();
    let direct =
        OpenOptions::new().read(true).custom_flags(libc_o_direct()).open(m.path("disk.raw")).unwrap();
    for (offset, len) in [(0, 4096), (4096, 65536), (60_000, 10_000), (3 * CLUSTER, 8 * CLUSTER as usize)] {
        let mut seen = vec![0; len];
        disk.read_exact_at(&mut seen, offset).unwrap();
        assert_eq!(seen, m.source.content(offset, len));
    }
    for (offset, len) in [(0, 4096), (8192, 512), (22 * CLUSTER, 1 << 20)] {
        let mut space = vec![0; len + 4096];
        let seen = aligned(&mut space, len);
        direct.read_exact_at(seen, offset).unwrap();
        assert_eq!(seen, m.source.content(offset, len));
    }
    // The tail: what is there, then the end.
    let mut space = vec![0; 3 * 4096];
    let tail = aligned(&mut space, 8192);
    let read = direct.read_at(tail, m.source.len - m.source.len % 4096).unwrap();
    assert_eq!(read as u64, m.source.len % 4096);
    assert_eq!(disk.read_at(&mut [0; 10], m.source.len).unwrap(), 0);
}

fn libc_o_direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits() as i32
}

/// Each read waits for all the others: with one thread fewer none would be answered.
#[test]
fn as_many_reads_are_answered_at_once_as_there_are_threads() {
    let m = Mounted::new();
    let path = m.path("together");
    std::thread::scope(|scope| {
        for reader in 0..THREADS as u64 {
            let path = &path;
            scope.spawn(move || {
                let file = OpenOptions::new().read(true).custom_flags(libc_o_direct()).open(path).unwrap();
                let mut space = [0; 2 * 4096];
                file.read_exact_at(aligned(&mut space, 4096), reader * 4096).unwrap();
            });
        }
    });
}

#[test]
fn damage_is_an_error_for_just_what_it_hits() {
    let m = Mounted::new();
    let direct =
        OpenOptions::new().read(true).custom_flags(libc_o_direct()).open(m.path("disk.raw")).unwrap();
    for cluster in 0..63 {
        let mut space = vec![0; CLUSTER as usize + 4096];
        let seen = aligned(&mut space, CLUSTER as usize);
        let read = direct.read_exact_at(seen, cluster * CLUSTER);
        if matches!(cluster, 20 | 21) {
            assert_eq!(read.unwrap_err().raw_os_error(), Some(5), "EIO");
        } else {
            read.unwrap();
            assert_eq!(seen, m.source.content(cluster * CLUSTER, CLUSTER as usize));
        }
    }
}

#[test]
fn a_handler_that_panics_answers_eio_and_the_mount_lives_on() {
    let m = Mounted::new();
    for _ in 0..10 {
        assert_eq!(fs::read(m.path("panics")).unwrap_err().raw_os_error(), Some(5));
    }
    assert_eq!(fs::read(m.path("many/name-9")).unwrap(), [9; 9]);
}

#[test]
fn folders_list_every_name_once_in_a_stable_order_also_when_names_come_and_go() {
    let m = Mounted::new();
    let names =
        || -> Vec<_> { fs::read_dir(m.path("many")).unwrap().map(|e| e.unwrap().file_name()).collect() };
    let first = names();
    assert_eq!(first.len(), 1000);
    assert_eq!(first, names());
    // A folder that is being read keeps the names that it had.
    let mut reading = fs::read_dir(m.path("many")).unwrap();
    let mut seen: Vec<_> = reading.by_ref().take(10).map(|e| e.unwrap().file_name()).collect();
    let many = m.tree.lookup(Ino::ROOT, OsStr::new("many")).unwrap().ino;
    m.tree.remove(many, "name-0");
    m.tree.add(many, "a-new-one", Node::Link("x".into()));
    seen.extend(reading.map(|e| e.unwrap().file_name()));
    seen.sort();
    seen.dedup();
    assert!(seen.len() >= 999, "{} names", seen.len());
    assert!(names().contains(&"a-new-one".into()));
}

#[test]
fn hostile_names_are_names() {
    let m = Mounted::new();
    let names: [&[u8]; 5] = [b"a\nb", b"\xff\xfe", b"-rf *", " \u{202e}gpj".as_bytes(), &[b'x'; 255]];
    for name in names {
        m.tree.add(Ino::ROOT, OsStr::from_bytes(name), Node::File(Arc::new(Bytes(name.to_vec())), 1));
    }
    for name in names {
        assert_eq!(fs::read(m.path(OsStr::from_bytes(name))).unwrap(), name);
    }
    let listed: Vec<_> = fs::read_dir(m.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|n| listed.iter().any(|l| l.as_bytes() == *n)));
    assert_eq!(fs::read(m.path("y".repeat(256))).unwrap_err().raw_os_error(), Some(36), "ENAMETOOLONG");
    assert_eq!(fs::read(m.path("no such name")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn attributes_are_real() {
    let m = Mounted::new();
    let disk = fs::metadata(m.path("disk.raw")).unwrap();
    assert_eq!((disk.len(), disk.blocks()), (64 * CLUSTER - 100, 48 * CLUSTER / 512));
    assert_eq!(disk.modified().unwrap(), time());
    assert_eq!(fs::read_link(m.path("latest")).unwrap(), PathBuf::from("many/name-7"));
    assert_eq!(fs::read(m.path("latest")).unwrap(), [7; 7]);
    let mut value = [0u8; 16];
    let none = rustix::fs::getxattr(m.path("disk.raw"), "user.x", &mut value);
    assert_eq!(none.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
    let room = rustix::fs::statvfs(m.dir.path()).unwrap();
    assert_eq!((room.f_blocks * room.f_frsize, room.f_bavail), (1 << 40, 0));
}

#[test]
fn holes_are_found_and_sparse_copies_stay_sparse() {
    let m = Mounted::new();
    let mut disk = File::open(m.path("disk.raw")).unwrap();
    let hole = rustix::fs::seek(&disk, RawSeek::Hole(0)).unwrap();
    assert_eq!(hole, 2 * CLUSTER);
    assert_eq!(rustix::fs::seek(&disk, RawSeek::Data(hole)).unwrap(), 3 * CLUSTER);
    assert_eq!(rustix::fs::seek(&disk, RawSeek::Data(1 << 40)).unwrap_err(), rustix::io::Errno::NXIO);
    assert_eq!(disk.seek(SeekFrom::End(0)).unwrap(), m.source.len);
    let tail = m.source.len - 1;
    assert_eq!(rustix::fs::seek(&disk, RawSeek::Hole(tail)).unwrap(), m.source.len);
}

#[test]
fn writers_are_told_that_it_is_read_only() {
    let m = Mounted::new();
    let read_only = |e: std::io::Error| assert_eq!(e.kind(), ErrorKind::ReadOnlyFilesystem);
    let name = m.path("many/name-5");
    read_only(OpenOptions::new().write(true).open(&name).unwrap_err());
    read_only(fs::write(m.path("new"), b"x").unwrap_err());
    read_only(fs::create_dir(m.path("new")).unwrap_err());
    read_only(fs::remove_file(&name).unwrap_err());
    read_only(fs::remove_dir(m.path("many")).unwrap_err());
    read_only(fs::rename(&name, m.path("new")).unwrap_err());
    read_only(fs::hard_link(&name, m.path("new")).unwrap_err());
    read_only(std::os::unix::fs::symlink("x", m.path("new")).unwrap_err());
    read_only(std::os::unix::fs::chown(&name, Some(1), None).unwrap_err());
    read_only(fs::set_permissions(&name, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap_err());
}

#[test]
fn even_mounted_again_as_writable_nothing_is_written() {
    let m = Mounted::new();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount_remount(m.dir.path(), flags, "").unwrap();
    let read_only = |e: std::io::Error| assert_eq!(e.kind(), ErrorKind::ReadOnlyFilesystem);
    read_only(OpenOptions::new().write(true).open(m.path("many/name-5")).unwrap_err());
    read_only(fs::write(m.path("new"), b"x").unwrap_err());
    read_only(fs::create_dir(m.path("new")).unwrap_err());
    read_only(fs::remove_file(m.path("many/name-5")).unwrap_err());
    read_only(
        fs::set_permissions(m.path("panics"), std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .unwrap_err(),
    );
}

#[test]
fn what_is_open_is_known_and_stays_readable_when_its_name_goes() {
    let m = Mounted::new();
    assert!(m.files.is_empty());
    let many = m.tree.lookup(Ino::ROOT, OsStr::new("many")).unwrap().ino;
    let mut open = File::open(m.path("many/name-200")).unwrap();
    assert_eq!(m.files.holders().len(), 1);
    assert_eq!(m.files.holders()[0].pid, std::process::id());
    m.tree.remove(many, "name-200");
    let mut seen = Vec::new();
    open.read_to_end(&mut seen).unwrap();
    assert_eq!(seen, [200; 200]);
    drop(open);
    while !m.files.is_empty() {
        m.files.wait_for_close(std::time::Duration::from_secs(60));
    }
}

#[test]
fn open_files_outlive_the_mount() {
    let m = Mounted::new();
    let open = File::open(m.path("disk.raw")).unwrap();
    m.stopper.detach().unwrap();
    assert!(!m.path("disk.raw").exists());
    let mut seen = vec![0; 5000];
    open.read_exact_at(&mut seen, 3 * CLUSTER).unwrap();
    assert_eq!(seen, m.source.content(3 * CLUSTER, 5000));
}

#[test]
fn many_readers_at_once_see_the_right_bytes_in_a_bounded_cache() {
    let m = Mounted::new();
    std::thread::scope(|scope| {
        for reader in 0..16u64 {
            let (m, disk) = (&m, File::open(m.path("disk.raw")).unwrap());
            scope.spawn(move || {
                let mut seen = vec![0; 7000];
                for step in 0..200u64 {
                    let at = (step * 7919 + reader * 104_729) * 977 % (60 * CLUSTER);
                    let damaged = at + 7000 > 20 * CLUSTER && at < 22 * CLUSTER;
                    // The kernel reads ahead of a reader, into damage too: only what was asked for counts.
                    match disk.read_exact_at(&mut seen, at) {
                        Ok(()) => assert_eq!(seen, m.source.content(at, 7000)),
                        Err(e) => assert!(damaged && e.raw_os_error() == Some(5), "{e} at {at}"),
                    }
                }
            });
        }
    });
    let stats = m.cache.stats();
    assert!(stats.bytes <= stats.limit);
}

#[test]
fn locks_work_between_readers() {
    use rustix::fs::{FlockOperation, flock};
    let m = Mounted::new();
    let (one, two) = (File::open(m.path("disk.raw")).unwrap(), File::open(m.path("disk.raw")).unwrap());
    flock(&one, FlockOperation::NonBlockingLockShared).unwrap();
    flock(&two, FlockOperation::NonBlockingLockShared).unwrap();
    assert!(flock(&two, FlockOperation::NonBlockingLockExclusive).is_err());
}

#[test]
fn mounting_where_no_folder_is_fails_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let config = MountConfig { allow_other: false, name: "knib-test".into() };
    let nowhere = dir.path().join("nowhere");
    let error = Server::mount(Arc::new(MemoryTree::new()), &nowhere, &config, 1).err().unwrap();
    assert!(error.to_string().contains("nowhere"), "{error}");
}
