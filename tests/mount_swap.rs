//! Handles on the mount and what happens to their backups beside them: compression, removal, the death of the mount, other hosts.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use knibfs::store::manifest::CompressionState;
use mounted_store::{CLUSTER, Fixture, Layer, Shape, command};

const SIZE: u64 = 64 * CLUSTER;

fn chain() -> Fixture {
    let full: Layer = (0..50).map(|n| (n, Shape::Plain)).collect();
    Fixture::chain(SIZE, true, &[full, [(3, Shape::Plain), (60, Shape::Plain)].into()])
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// A mount of the store that is served in the foreground, as another host does: with a state folder of its own.
struct Host {
    child: Child,
    mnt: PathBuf,
}

impl Host {
    fn new(f: &Fixture, name: &str) -> Self {
        let mnt = f.dir.path().join(format!("mnt-{name}"));
        fs::create_dir(&mnt).unwrap();
        let state = f.dir.path().join(format!("state-{name}"));
        let child = command(f.store.root(), &state)
            .args(["mount", "-f", "--cache-size", "1M"])
            .arg(&mnt)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("it is mounted", || mnt.join("vms").exists());
        Self { child, mnt }
    }

    fn file(&self, f: &Fixture, of: usize, name: &str) -> PathBuf {
        self.mnt.join("vms/web1").join(f.backups[of].name.as_str()).join(name)
    }

    /// The program and whatever it started, the oldest first.
    fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.child.id()];
        let mut at = 0;
        while let Some(parent) = all.get(at) {
            let tasks = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
            let lists: Vec<_> =
                tasks.map(|t| fs::read_to_string(t.path().join("children")).unwrap_or_default()).collect();
            all.extend(
                lists.iter().flat_map(|l| l.split_whitespace()).filter_map(|pid| pid.parse::<u32>().ok()),
            );
            at += 1;
        }
        all
    }

    /// Files that the processes hold though they have no name any more.
    fn nameless(&self) -> Vec<PathBuf> {
        let fds = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let files = self.processes().into_iter().flat_map(fds).filter_map(|fd| fs::read_link(fd.path()).ok());
        files.filter(|file| file.to_string_lossy().ends_with(".qcow2 (deleted)")).collect()
    }

    fn kill(&mut self) {
        for pid in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        self.child.wait().unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mnt).status();
        self.kill();
    }
}

fn spec(f: &Fixture, of: usize) -> String {
    format!("web1/{}", f.backups[of].name)
}

fn compression(f: &Fixture, of: usize) -> CompressionState {
    f.store.manifest(&f.vm.name, &f.backups[of].name).unwrap().compression
}

fn assert_reads(file: &File, f: &Fixture, of: usize, what: &str) {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut seen = vec![0; SIZE as usize];
    file.read_exact_at(&mut seen, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(seen == f.expected(of, 0, SIZE as usize), "{what}");
}

#[test]
fn open_flat_disks_move_to_the_compressed_files_and_the_old_ones_are_let_go() {
    let f = chain();
    let host = Host::new(&f, "a");
    // Of the backup itself, and of its child, which reads the same file.
    let open = [0, 1].map(|of| File::open(host.file(&f, of, "root.raw")).unwrap());
    open.iter().enumerate().for_each(|(of, file)| assert_reads(file, &f, of, "before"));
    let done = f.knibfs(&["compress", &spec(&f, 0)]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(compression(&f, 0), CompressionState::Compressed);
    open.iter().enumerate().for_each(|(of, file)| assert_reads(file, &f, of, "just after"));
    eventually("both have moved to the new file", || host.nameless().is_empty());
    open.iter().enumerate().for_each(|(of, file)| assert_reads(file, &f, of, "moved"));
    // It is the new file that they read: what is damaged there is an error now, in both.
    let path = f.stored(0);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad.iter_mut().skip(CLUSTER as usize).for_each(|b| *b ^= 0x55);
    File::options().write(true).open(&path).unwrap().write_all_at(&bad, 0).unwrap();
    for file in &open {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        // All but the few clusters that the mount has decoded already.
        let error = file.read_exact_at(&mut vec![0; 50 * CLUSTER as usize], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
    }
}

#[test]
fn the_swap_waits_for_a_handle_on_the_stored_file_also_of_another_host_and_of_one_that_was_killed() {
    for killed in [false, true] {
        let f = chain();
        let mut host = Host::new(&f, "a");
        let other = Host::new(&f, "b");
        let stored = File::open(host.file(&f, 0, "root.qcow2")).unwrap();
        let before = fs::read(f.stored(0)).unwrap();
        let errors = f.dir.path().join("errors");
        let mut compress = command(f.store.root(), &f.dir.path().join("state-c"))
            .args(["compress", &spec(&f, 0)])
            .stderr(File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        let waits = || fs::read_to_string(&errors).unwrap().contains("stored file open in");
        eventually("it waits and says for whom", waits);
        assert!(compress.try_wait().unwrap().is_none());
        assert_eq!(fs::read(other.file(&f, 0, "root.qcow2")).unwrap(), before);
        let mut seen = vec![0; before.len()];
        stored.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == before, "the handle reads the file that it opened");
        if killed {
            host.kill();
        } else {
            drop(stored);
        }
        assert!(compress.wait().unwrap().success(), "{}", fs::read_to_string(&errors).unwrap());
        assert_eq!(compression(&f, 0), CompressionState::Compressed);
    }
}

#[test]
fn removal_is_refused_while_any_host_reads_and_not_longer() {
    let f = chain();
    let (mut host, other) = (Host::new(&f, "a"), Host::new(&f, "b"));
    let remove = |of: usize| {
        let output =
            command(f.store.root(), &f.dir.path().join("state-c")).args(["remove", &spec(&f, of)]).output();
        let output = output.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (first, second) =
        (File::open(host.file(&f, 1, "root.raw")).unwrap(), other.file(&f, 1, "root.qcow2"));
    let second = File::open(second).unwrap();
    let (done, said) = remove(1);
    assert!(!done && said.contains(&host.mnt.display().to_string()), "{said}");
    host.kill();
    let (done, said) = remove(1);
    assert!(!done && said.contains(&other.mnt.display().to_string()), "{said}");
    assert!(!said.contains(&host.mnt.display().to_string()), "the dead hold nothing: {said}");
    drop((first, second));
    let id = f.backups[1].id;
    eventually("the last lease ends with its handle", || f.store.leases(id).unwrap().is_empty());
    let (done, said) = remove(1);
    assert!(done, "{said}");
    eventually("it is gone from the mount", || !other.file(&f, 1, "root.raw").exists());
    assert!(fs::read(other.file(&f, 0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize));
}

#[test]
fn what_was_taken_away_by_force_reads_on_or_is_stale_and_never_another_s() {
    let mut f = chain();
    let host = Host::new(&f, "a");
    let names = ["root.raw", "root.qcow2", "manifest.json", "domain.xml"];
    let open: Vec<_> = names.iter().map(|name| File::open(host.file(&f, 1, name)).unwrap()).collect();
    let expected: Vec<_> = names.iter().map(|name| fs::read(host.file(&f, 1, name)).unwrap()).collect();
    // The folder goes without asking anyone, and another backup takes its name.
    let (folder, name) = (f.store.backup_dir(&f.vm.name, &f.backups[1].name), f.backups[1].name.clone());
    fs::remove_dir_all(&folder).unwrap();
    f.backups.pop();
    f.layers.pop();
    assert_eq!(f.add([(3, Shape::Plain), (7, Shape::Compressed), (61, Shape::Plain)].into()), name);
    let new = f.expected(1, 0, SIZE as usize);
    eventually("the name leads to the new one", || {
        fs::read(host.file(&f, 1, "root.raw")).is_ok_and(|seen| seen == new)
    });
    for (n, file) in open.iter().enumerate() {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut seen = vec![0; expected[n].len()];
        match file.read_exact_at(&mut seen, 0) {
            Ok(()) => assert!(seen == expected[n], "{} is not as it was opened", names[n]),
            Err(e) => assert_eq!(e.raw_os_error(), Some(116), "{}", names[n]),
        }
    }
}

/// Opens and reads without an end while `beside` runs; how often it did.
fn readers(paths: Vec<(PathBuf, Vec<u8>)>, beside: impl FnOnce()) -> usize {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = |(path, wanted): (PathBuf, Vec<u8>)| {
            let done = &done;
            scope.spawn(move || {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) || count == 0 {
                    // A file that is replaced between looking its name up and opening it is stale: the name is looked up again.
                    match File::open(&path) {
                        Ok(file) => {
                            let len = file.metadata().unwrap().len();
                            assert_eq!(len, wanted.len() as u64);
                            let mut seen = vec![0; wanted.len()];
                            file.read_exact_at(&mut seen, 0).unwrap();
                            assert!(seen == wanted, "{}", path.display());
                            count += 1;
                        }
                        Err(e) => {
                            let damage = path.ancestors().nth(4).unwrap().join(".knibfs/damage");
                            let damage = fs::read_to_string(damage).unwrap();
                            assert_eq!(e.raw_os_error(), Some(116), "{}: {damage}", path.display());
                        }
                    }
                }
                count
            })
        };
        let all: Vec<_> = paths.into_iter().map(reader).collect();
        beside();
        done.store(true, Ordering::Relaxed);
        all.into_iter().map(|reader| reader.join().unwrap()).sum()
    })
}

#[test]
fn opening_at_any_moment_of_a_swap_finds_a_whole_file_and_reports_no_damage() {
    let f = chain();
    let _mount = f.mount(&["--cache-size", "1M"]);
    let paths = |of: &[usize]| -> Vec<_> {
        of.iter().map(|of| (f.in_mount(*of, "root.raw"), f.expected(*of, 0, SIZE as usize))).collect()
    };
    let read = readers(paths(&[0, 1]), || {
        for of in [0, 1] {
            let done = f.knibfs(&["compress", &spec(&f, of)]);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
    });
    assert!(read > 2, "{read} times");
    let damage = fs::read_to_string(f.mnt().join(".knibfs/damage")).unwrap();
    assert_eq!(damage, "");
}

#[test]
fn a_swap_that_was_killed_anywhere_reads_as_before_without_recover() {
    for place in ["compress.swap", "compress.swapped", "compress.recorded"] {
        let f = chain();
        let killed = command(f.store.root(), &f.dir.path().join("log"))
            .args(["compress", &spec(&f, 0)])
            .env("KNIBFS_FAILPOINT", place)
            .output()
            .unwrap();
        assert!(!killed.status.success(), "{place} was not hit");
        let _mount = f.mount(&[]);
        for of in [0, 1] {
            let seen = fs::read(f.in_mount(of, "root.raw")).unwrap_or_else(|e| panic!("{place}: {e}"));
            assert!(seen == f.expected(of, 0, SIZE as usize), "{place}, backup {of}");
        }
        assert_eq!(fs::read_to_string(f.mnt().join(".knibfs/damage")).unwrap(), "", "{place}");
    }
}
