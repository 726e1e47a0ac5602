//! `-o passthrough`: the kernel reads stored files by itself, where it was asked to and can.
//! Needs root, /dev/fuse, Linux 6.9 or later, fio and fusermount3.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod mounted_store;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::kept::{Mount, Stop, install, installed};
use common::lab::{Lab, SmallDisk, tool};
use common::server;
use knibfs::store::manifest::CompressionState;
use mounted_store::{CLUSTER, Fixture, Layer, Shape, command};
use rustix::process::Signal;

const SIZE: u64 = 40 * CLUSTER;
/// Where the first cluster lies in a stored file of these tests: behind the header's.
const FIRST: u64 = CLUSTER;

fn chain() -> Fixture {
    let full: Layer =
        (0..32).map(|n| (n, if n % 2 == 0 { Shape::Plain } else { Shape::Compressed })).collect();
    Fixture::chain(SIZE, true, &[full, [(3, Shape::Plain), (35, Shape::Compressed)].into()])
}

/// Mounts as mount(8) does.
fn passed(f: &Fixture) -> mounted_store::Mount<'_> {
    let helper = f.dir.path().join("mount.fuse.knibfs");
    symlink(env!("CARGO_BIN_EXE_knibfs"), &helper).unwrap();
    let options = format!("rw,nofail,passthrough,log-dir={}", f.dir.path().join("log").display());
    let [store, mnt] = [f.store.root().to_str().unwrap(), f.mnt().to_str().unwrap()].map(str::to_owned);
    tool(helper.to_str().unwrap(), &[&store, &mnt, "-o", &options]);
    mounted_store::Mount(f)
}

/// Past the page cache, in a buffer that begins at a page.
fn direct(path: &Path) -> File {
    File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .unwrap()
}

/// Whole pages from `at` on.
fn pages(file: &File, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut space = vec![0u8; len + 4096];
    let from = space.as_ptr().align_offset(4096);
    file.read_exact_at(&mut space[from..from + len], at)?;
    Ok(space[from..from + len].to_vec())
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

fn is_eio<T>(result: std::io::Result<T>) -> bool {
    result.err().and_then(|e| e.raw_os_error()) == Some(rustix::io::Errno::IO.raw_os_error())
}

#[test]
fn the_kernel_reads_stored_files_without_the_server_and_all_else_is_read_through_it() {
    let f = chain();
    let _mount = passed(&f);
    let stored = [0, 1].map(|of| fs::read(f.stored(of)).unwrap());
    let open = [0, 1].map(|of| direct(&f.in_mount(of, "root.qcow2")));
    // The server stands still: it answers nothing.
    let serving = server::pid(&f.mnt());
    server::signal(serving, Signal::STOP);
    let seen = std::panic::catch_unwind(|| [0, 1].map(|of| pages(&open[of], 0, stored[of].len()).unwrap()));
    server::signal(serving, Signal::CONT);
    assert!(seen.unwrap() == stored);
    assert_eq!((f.counted("passed_through_files"), f.counted("open_files")), (2, 2));
    for of in [0, 1] {
        let path = f.in_mount(of, "root.qcow2");
        assert!(fs::read(&path).unwrap() == stored[of], "buffered");
        let (name, size) = (format!("--filename={}", path.display()), format!("--size={}", stored[of].len()));
        for engine in ["--ioengine=mmap", "--ioengine=libaio", "--ioengine=io_uring"] {
            let direct = if engine == "--ioengine=mmap" { "--direct=0" } else { "--direct=1" };
            let more =
                [engine, direct, &size, &name, "--bs=4k", "--iodepth=8", "--rw=randread", "--readonly"];
            tool("fio", &[&["--name=r", "--allow_file_create=0"], &more[..]].concat());
        }
        tool("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    }
    assert_eq!((f.counted("reads_total"), f.counted("read_bytes_total")), (0, 0));
    // Of the chain, through relative names, beside the flat disk.
    let (image, flat) = (f.in_mount(1, "root.qcow2"), f.in_mount(1, "root.raw"));
    let (image, flat_path) = (image.to_str().unwrap(), flat.to_str().unwrap());
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, flat_path]);
    let read = f.counted("reads_total");
    assert!(read > 0, "the flat disk is read through the server");
    let _flat = File::open(&flat).unwrap();
    assert!(fs::read(&flat).unwrap() == f.expected(1, 0, SIZE as usize));
    assert_eq!((f.counted("passed_through_files"), f.counted("open_files")), (2, 3));
    drop(open);
    server::wait("both to be closed", || f.counted("passed_through_files") == 0);
    assert!(!f.log().contains("no passthrough"), "{}", f.log());
}

#[test]
fn a_flipped_byte_of_a_stored_file_is_an_error_unless_it_is_passed_through_and_of_a_flat_disk_always() {
    let f = chain();
    // The first is plain, of the second a byte in the middle is hit.
    let stored = fs::read(f.stored(0)).unwrap();
    let hit = FIRST + 100;
    flip(&f.stored(0), hit);
    let read_at = |name: &str, at: u64| {
        let mut byte = [0];
        File::open(f.in_mount(0, name)).and_then(|file| file.read_exact_at(&mut byte, at)).map(|()| byte[0])
    };
    {
        let _mount = f.mount(&[]);
        let _open = File::open(f.in_mount(0, "root.qcow2")).unwrap();
        assert!(is_eio(read_at("root.qcow2", hit)) && is_eio(read_at("root.raw", 100)));
        assert_eq!(read_at("root.qcow2", 0).unwrap(), stored[0]);
        assert_eq!((f.counted("passed_through_files"), f.counted("open_files")), (0, 1));
        assert!(f.counted("reads_total") > 0);
    }
    let _mount = passed(&f);
    assert_eq!(read_at("root.qcow2", hit).unwrap(), !stored[hit as usize]);
    assert_eq!(f.counted("read_errors_total"), 0);
    assert!(is_eio(read_at("root.raw", 100)));
    // What is seen when it is opened is seen all the same.
    flip(&f.stored(1), 0);
    assert!(is_eio(File::open(f.in_mount(1, "root.qcow2"))));
}

/// What a mount does that asked for passthrough and does not get it. `run` reads a file of the mount, as who may.
fn assert_checked(f: &Fixture, log: impl Fn() -> String, why: &str, run: impl Fn(&Path) -> Option<Vec<u8>>) {
    let path = f.in_mount(0, "root.qcow2");
    for _ in 0..2 {
        assert!(run(&path).unwrap() == fs::read(f.stored(0)).unwrap());
    }
    let status = String::from_utf8(run(&f.mnt().join(".knibfs/status")).unwrap()).unwrap();
    assert!(status.contains("knibfs_mount_passed_through_files 0\n"), "{status}");
    assert!(!status.contains("knibfs_mount_reads_total 0\n"), "{status}");
    let log = log();
    let said: Vec<_> = log.lines().filter(|line| line.contains("no passthrough")).collect();
    assert!(said.len() == 1 && said[0].contains("every byte checked") && said[0].contains(why), "{log}");
    // Of the other backup: no page of its file was read before.
    flip(&f.stored(1), FIRST + 100);
    assert!(run(&f.in_mount(1, "root.qcow2")).is_none(), "damage is found");
}

/// The keeper of a mount in a mount namespace of its own, and its server.
struct Apart(Child, PathBuf);

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        if let Some(left) = server::serving(&self.1) {
            server::kill(left);
        }
    }
}

/// A user's mount: the kernel lets root only pass files through.
#[test]
fn without_the_privilege_stored_files_are_read_through_the_server_and_the_log_says_why() {
    let f = chain();
    // Where a user can start it, and not in a folder that he may not enter.
    let program = installed(f.dir.path());
    tool("chown", &["-R", "65534:65534", f.dir.path().to_str().unwrap()]);
    // Not every machine lets users open /dev/fuse.
    let script = "mknod -m 666 device c 10 229 && mount --bind device /dev/fuse && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" mount -f --passthrough \"$1\"";
    let log = f.dir.path().join("log");
    let mut mount = Command::new("unshare");
    mount.args(["--mount", "--propagation", "private", "sh", "-ec", script]).args([&program, &f.mnt()]);
    mount.env("KNIBFS_STORE", f.store.root()).env("KNIBFS_STATE_DIR", f.dir.path());
    mount.current_dir(f.dir.path()).stderr(File::create(&log).unwrap());
    let mut mount = Apart(mount.spawn().unwrap(), f.mnt());
    let log = || fs::read_to_string(&log).unwrap();
    let inside = format!("--mount=/proc/{}/ns/mnt", mount.0.id());
    let cat = |path: &Path| {
        let mut cat = Command::new("nsenter");
        cat.args([
            inside.as_str(),
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "cat",
        ]);
        let output = cat.arg(path).output().unwrap();
        output.status.success().then_some(output.stdout)
    };
    while cat(&f.mnt().join(".knibfs/status")).is_none() {
        assert!(mount.0.try_wait().unwrap().is_none(), "the mount ended: {}", log());
    }
    assert_checked(&f, log, "only root", cat);
    server::signal(mount.0.id(), Signal::TERM);
    assert!(mount.0.wait().unwrap().success(), "{}", log());
}

/// Takes a mount of the test away.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn of_a_store_on_overlayfs_stored_files_are_read_through_the_server_and_the_log_says_why() {
    let f = chain();
    let [upper, work] = ["upper", "work"].map(|name| f.dir.path().join(name));
    [&upper, &work].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let store = f.store.root();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", store.display(), upper.display(), work.display());
    let options = CString::new(options).unwrap();
    let none = rustix::mount::MountFlags::empty();
    rustix::mount::mount("knibfs-test", store, "overlay", none, options.as_c_str()).unwrap();
    let _over = Mounted(store.into());
    let _mount = f.mount(&["--passthrough"]);
    assert_checked(&f, || f.log(), "overlayfs", |path| fs::read(path).ok());
    f.unmount();
}

/// A store in a file system of its own, with a backup of 8 MiB of noise.
fn backed_up(dir: &Path) -> (Lab, SmallDisk, String, Vec<u8>) {
    let small = SmallDisk::new(dir.join("small"), "64M");
    let lab = Lab::at(dir).with_store(small.path().join("store")).init();
    let disk = lab.path("disk.raw");
    let noise: Vec<u8> = (0..128).flat_map(|n| mounted_store::content(9, n)).collect();
    fs::write(&disk, noise).unwrap();
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", disk.display())]);
    let backup = lab.ok(&["backup", "web1"]);
    let stored = fs::read(lab.store().join("vms").join(&backup).join("root.qcow2")).unwrap();
    fs::create_dir(lab.path("mnt")).unwrap();
    (lab, small, backup, stored)
}

fn used(small: &SmallDisk) -> u64 {
    let found = rustix::fs::statvfs(small.path()).unwrap();
    (found.f_blocks - found.f_bfree) * found.f_frsize
}

fn counted(mnt: &Path, name: &str) -> u64 {
    let status = fs::read_to_string(mnt.join(".knibfs/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(&format!("knibfs_mount_{name} ")));
    line.unwrap().parse().unwrap()
}

/// The backup can be removed, and the room of its file is free: nobody holds it, and neither does the kernel.
fn assert_removed_and_free(lab: &Lab, small: &SmallDisk, backup: &str, stored: &[u8]) {
    server::wait("the lease to end", || lab.command(&["remove", backup]).output().unwrap().status.success());
    server::wait("its room to be free", || used(small) < stored.len() as u64);
}

#[test]
fn what_is_passed_through_reads_on_without_a_server_and_the_next_ones_know_it() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, small, backup, stored) = backed_up(dir.path());
    let (mnt, program) = (lab.path("mnt"), installed(dir.path()));
    let mut command = Command::new(&program);
    lab.environment(&mut command);
    let mount = Mount::new(command, &mnt, &["--passthrough"]);
    let path = mnt.join("vms").join(&backup).join("root.qcow2");
    let first = direct(&path);
    let half = (stored.len() / 2) & !4095;
    assert!(pages(&first, 0, half).unwrap() == stored[..half]);

    // The next server waits until it is told to begin.
    let (real, gate) = (dir.path().join("real"), dir.path().join("gate"));
    fs::copy(&program, &real).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &gate, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let script = format!("#!/bin/sh\nread line < {}\nexec {} \"$@\"\n", gate.display(), real.display());
    install(&program, Some(&script));
    let serving = server::pid(&mnt);
    server::kill(serving);
    server::wait("the server's end", || !Path::new(&format!("/proc/{serving}")).exists());
    assert!(pages(&first, half as u64, half).unwrap() == stored[half..2 * half], "without a server");
    lab.refused(&["remove", &backup], &["in use"]);
    fs::write(&gate, "go\n").unwrap();

    // It knows what the kernel reads: another file in its place would be refused.
    let second = direct(&path);
    assert!(pages(&second, 0, half).unwrap() == stored[..half]);
    assert_eq!(counted(&mnt, "passed_through_files"), 2);
    fs::rename(&real, &program).unwrap();
    server::kill_and_wait(&mnt);
    drop(first);
    let third = File::open(&path).unwrap();
    server::wait("the first to be closed", || counted(&mnt, "passed_through_files") == 2);
    assert!(pages(&third, 0, half).unwrap() == stored[..half]);
    assert_eq!(counted(&mnt, "reads_total"), 0);
    drop((second, third));
    assert_removed_and_free(&lab, &small, &backup, &stored);
    drop(mount);
}

/// Two at once, one after the other, and while servers die between the kernel's question and its answer.
#[test]
fn files_are_opened_and_closed_while_servers_are_killed_and_nothing_is_left_behind() {
    const KILLS: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let (lab, small, backup, stored) = backed_up(dir.path());
    let mnt = lab.path("mnt");
    let mount = Mount::new(lab.command(&[]), &mnt, &["--passthrough"]);
    let path = mnt.join("vms").join(&backup).join("root.qcow2");
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3u64)
            .map(|reader| {
                let (done, rounds, path, stored) = (&done, &rounds, &path, &stored);
                scope.spawn(move || {
                    let mut round = reader;
                    while !done.load(Ordering::Relaxed) {
                        round += 1;
                        let at = (round * 7919 % 2000 * 4096) as usize;
                        // One past the page cache, one not: both are the same node.
                        let file = if round % 2 == 0 { direct(path) } else { File::open(path).unwrap() };
                        let seen = pages(&file, at as u64, 4096).unwrap();
                        assert!(seen == stored[at..at + 4096]);
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let stop = Stop(&done);
        for _ in 0..KILLS {
            let before = rounds.load(Ordering::Relaxed);
            server::wait("readers to read", || {
                rounds.load(Ordering::Relaxed) > before + 20 || readers.iter().any(|r| r.is_finished())
            });
            if readers.iter().any(|reader| reader.is_finished()) {
                break;
            }
            server::kill_and_wait(&mnt);
        }
        drop(stop);
    });
    let said = mount.said();
    assert_eq!(said.matches("was ended by signal 9").count(), KILLS, "{said}");
    assert!(!said.contains("the kernel keeps a file") && !said.contains("no passthrough"), "{said}");
    server::wait("all to be closed", || counted(&mnt, "open_files") == 0);
    assert_eq!(counted(&mnt, "reads_total"), 0);
    assert_removed_and_free(&lab, &small, &backup, &stored);
}

#[test]
fn the_swap_of_a_file_that_is_passed_through_waits_for_its_handle() {
    let f = chain();
    let _mount = passed(&f);
    let open = direct(&f.in_mount(0, "root.qcow2"));
    let before = fs::read(f.stored(0)).unwrap();
    let spec = format!("web1/{}", f.backups[0].name);
    let errors = f.dir.path().join("errors");
    let mut compress = command(f.store.root(), &f.dir.path().join("state-c"))
        .args(["compress", &spec])
        .stderr(File::create(&errors).unwrap())
        .spawn()
        .unwrap();
    let said = || fs::read_to_string(&errors).unwrap();
    server::wait("it to wait and to say for whom", || said().contains("stored file open in"));
    assert!(compress.try_wait().unwrap().is_none());
    assert!(pages(&open, 0, before.len()).unwrap() == before);
    drop(open);
    assert!(compress.wait().unwrap().success(), "{}", said());
    let manifest = f.store.manifest(&f.vm.name, &f.backups[0].name).unwrap();
    assert_eq!(manifest.compression, CompressionState::Compressed);
    // The new file is another node, and is passed through as well.
    let new = fs::read(f.stored(0)).unwrap();
    server::wait("the mount to see it", || fs::read(f.in_mount(0, "root.qcow2")).unwrap() == new);
    assert_eq!(f.counted("reads_total"), 0);
}

/// A server that has lost its keeper passes no other file through; what is open reads on, and can be opened again.
#[test]
fn without_a_keeper_what_is_open_is_passed_through_and_all_else_is_checked() {
    let f = chain();
    let mut mount = Mount::new(command(f.store.root(), f.dir.path()), &f.mnt(), &["--passthrough"]);
    let path = f.in_mount(0, "root.qcow2");
    let (stored, first) = (fs::read(f.stored(0)).unwrap(), File::open(f.in_mount(0, "root.qcow2")).unwrap());
    let serving = server::pid(&f.mnt());
    mount.keeper.kill().unwrap();
    mount.keeper.wait().unwrap();
    server::wait("the server to know", || mount.said().contains("the keeper of the mount"));
    assert!(fs::read(&path).unwrap() == stored);
    assert_eq!(f.counted("reads_total"), 0);
    assert!(fs::read(f.in_mount(1, "root.qcow2")).unwrap() == fs::read(f.stored(1)).unwrap());
    assert!(f.counted("reads_total") > 0);
    drop(first);
    server::wait("it to be closed", || f.counted("open_files") == 0);
    let _open = File::open(&path).unwrap();
    assert!(fs::read(&path).unwrap() == stored);
    assert_eq!(f.counted("passed_through_files"), 0);
    server::signal(serving, Signal::TERM);
}
