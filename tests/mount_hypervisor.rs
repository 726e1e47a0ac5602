//! What QEMU and libvirt expect of a file system, one by one. VMs that run from the mount: `quick_restore_by_path.rs`.
//! Needs root, /dev/fuse, qemu-img, qemu-io and the user that libvirt runs QEMU as.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;
#[path = "common/server.rs"]
mod server;

use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use mounted_store::{CLUSTER, Fixture, Shape};

const SIZE: u64 = 64 * CLUSTER;

/// All plain, so one after the other in the stored file.
fn fixture() -> Fixture {
    Fixture::chain(SIZE, true, &[(0..SIZE / CLUSTER).map(|n| (n, Shape::Plain)).collect()])
}

/// libvirt gives an image to QEMU's user before it starts it, and goes on where it is told that the file system is read-only.
#[test]
fn it_is_mounted_read_only_without_devices_and_programs_and_the_kernel_checks_who_may() {
    let f = fixture();
    let _mount = f.mount(&["--allow-other"]);
    let place = f.mnt().canonicalize().unwrap().display().to_string();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(place.as_str())).unwrap();
    let (mount, file_system) = line.split_once(" - ").unwrap();
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(mount.split([' ', ',']).any(|o| o == option), "{option}: {line}");
    }
    for option in ["ro", "default_permissions", "allow_other"] {
        assert!(file_system.split([' ', ',']).any(|o| o == option), "{option}: {line}");
    }
    let given = std::os::unix::fs::chown(f.in_mount(0, "root.raw"), Some(1), Some(1)).unwrap_err();
    assert_eq!(given.raw_os_error(), Some(30), "EROFS");
}

#[test]
fn the_kernel_reads_far_ahead_and_has_many_requests_on_their_way() {
    let f = fixture();
    let _mount = f.mount(&[]);
    let device = fs::metadata(f.mnt()).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let ahead = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap();
    assert_eq!(ahead.trim(), "4096");
    // Not everywhere mounted: in a place of our own it is.
    let control = f.dir.path().join("control");
    fs::create_dir(&control).unwrap();
    let nothing = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &control, "fusectl", nothing, None).unwrap();
    let background = fs::read_to_string(control.join(minor.to_string()).join("max_background"));
    rustix::mount::unmount(&control, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(background.unwrap().trim(), "64");
}

#[test]
fn what_was_read_is_in_the_page_cache_when_the_disk_is_opened_again() {
    let f = fixture();
    let _mount = f.mount(&[]);
    for name in ["root.raw", "root.qcow2"] {
        let before = fs::read(f.in_mount(0, name)).unwrap();
        let read = f.counted("read_bytes_total");
        assert!(read >= before.len() as u64);
        assert!(fs::read(f.in_mount(0, name)).unwrap() == before);
        assert_eq!(f.counted("read_bytes_total"), read, "{name}: nothing is asked for again");
    }
}

/// System calls of the server that read.
fn reads(f: &Fixture) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", server::pid(&f.mnt()))).unwrap();
    io.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap().parse().unwrap()
}

#[test]
fn clusters_that_lie_one_after_the_other_are_read_at_once() {
    const LEN: usize = 1 << 20;
    let f = fixture();
    let _mount = f.mount(&[]);
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let raw = File::options().read(true).custom_flags(direct).open(f.in_mount(0, "root.raw")).unwrap();
    let mut space = vec![0u8; LEN + 4096];
    let from = space.as_ptr().align_offset(4096);
    let mut read = |at: u64| raw.read_exact_at(&mut space[from..from + LEN], at).unwrap();
    // The map of the disk is made by the first read.
    read(0);
    let before = reads(&f);
    let count = 64;
    (0..count).for_each(|n| read(n % (SIZE / LEN as u64) * LEN as u64));
    // Taking a request, a look for the next that finds none, and what is stored: not one for each of 16 clusters.
    let calls = reads(&f) - before;
    assert!(calls < 5 * count, "{calls} system calls for {count} reads of {LEN} bytes");
}

/// QEMU with the image as a VM's disk, not started, until it is told to quit.
fn qemu(path: &Path) -> Child {
    let disk = format!("file={},format=raw,if=virtio,readonly=on,cache=none,aio=native", path.display());
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-S", "-nodefaults", "-display", "none", "-monitor", "stdio", "-drive", &disk]);
    let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("install qemu-system");
    let mut said = BufReader::new(qemu.stdout.as_mut().unwrap());
    qemu.stdin.as_mut().unwrap().write_all(b"info status\n").unwrap();
    let mut line = String::new();
    while !line.contains("paused") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "QEMU ended");
    }
    qemu
}

/// First bytes of the locks of open files on `file`, as the kernel lists them.
fn locks(file: &Path) -> Vec<u64> {
    let mark = format!(":{} ", fs::metadata(file).unwrap().ino());
    let all = fs::read_to_string("/proc/locks").unwrap();
    let ours = all.lines().filter(|line| line.contains("OFDLCK ADVISORY  READ") && line.contains(&mark));
    ours.map(|line| line.rsplit(' ').nth(1).unwrap().parse().unwrap()).collect()
}

#[test]
fn qemus_locks_lie_in_the_kernel_side_by_side_and_outlive_the_server() {
    let f = fixture();
    let _mount = f.mount(&[]);
    let raw = f.in_mount(0, "root.raw");
    let mut one = qemu(&raw);
    let of_one = locks(&raw);
    // From 100 on what it does, from 200 on what it lets no other do (QEMU's block/file-posix.c).
    assert!(of_one.contains(&100) && of_one.iter().any(|at| *at > 200), "{of_one:?}");
    let mut two = qemu(&raw);
    assert_eq!(locks(&raw).len(), 2 * of_one.len());
    server::kill_and_wait(&f.mnt());
    assert_eq!(locks(&raw).len(), 2 * of_one.len());
    for qemu in [&mut one, &mut two] {
        qemu.stdin.as_mut().unwrap().write_all(b"quit\n").unwrap();
        assert!(qemu.wait().unwrap().success());
    }
    assert!(locks(&raw).is_empty());
}

/// A number of a user of the system: `field` 2 is its own, 3 its group's.
fn user(name: &str, field: usize) -> Option<u32> {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split(':').nth(field)?.parse().ok()
}

#[test]
fn with_allow_other_libvirts_user_reads_disks_but_no_secrets_and_others_nothing() {
    let names = ["libvirt-qemu", "qemu"];
    let qemu = names.iter().find_map(|name| Some((user(name, 2)?, user(name, 3)?)));
    let qemu = qemu.expect("run scripts/install-deps: there is no user of QEMU");
    let nobody = (65534, 65534);
    let f = fixture();
    // The folders above the mount are for all.
    fs::set_permissions(f.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let reads = |(uid, gid): (u32, u32), file: &str| {
        let mut command = Command::new("cat");
        command.arg(f.in_mount(0, file)).uid(uid).gid(gid).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap().success()
    };
    let seen = |who| ["root.raw", "root.qcow2", "manifest.json", "domain.xml"].map(|file| reads(who, file));
    {
        let _mount = f.mount(&["--allow-other"]);
        assert_eq!(seen((0, 0)), [true; 4]);
        assert_eq!(seen(qemu), [true, true, true, false]);
        assert_eq!(seen(nobody), [false; 4]);
        // As libvirt starts it: past the cache, with its locks.
        let mut info = Command::new("qemu-io");
        info.args(["-r", "-f", "raw", "-t", "none", "-i", "native", "-c", "read 0 1M"]);
        let said = info.arg(f.in_mount(0, "root.raw")).uid(qemu.0).gid(qemu.1).output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("read 1048576/1048576"), "{said}");
    }
    let _mount = f.mount(&[]);
    assert_eq!((seen(qemu), seen(nobody)), ([false; 4], [false; 4]));
}
