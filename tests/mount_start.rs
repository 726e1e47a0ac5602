//! How a mount is started by others: mount(8), fstab, systemd; and what it logs. Needs root, /dev/fuse and unshare.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use mounted_store::{CLUSTER, Fixture, Shape, command};

const SIZE: u64 = 16 * CLUSTER;

fn fixture() -> Fixture {
    Fixture::chain(SIZE, true, &[(0..9).map(|n| (n, Shape::Compressed)).collect()])
}

/// In a mount namespace of its own, with the program's link where mount(8) looks for its helpers.
#[test]
fn mount_8_and_a_line_in_fstab_find_the_helper() {
    let f = fixture();
    let dir = f.dir.path();
    fs::write(dir.join("expected"), f.expected(0, 0, SIZE as usize)).unwrap();
    let options = format!("mode=444,cache_size=16M,log-dir={}", dir.join("log").display());
    let line = format!(
        "{} {} fuse.knibfs {options},nofail,x-systemd.requires-mounts-for=/ 0 0\n",
        f.store.root().display(),
        f.mnt().display()
    );
    fs::write(dir.join("fstab"), line).unwrap();
    let script = r#"
        set -eu
        mkdir over
        mount -t tmpfs none over
        mkdir over/new over/work
        mount -t overlay -o "lowerdir=$(realpath /sbin),upperdir=$PWD/over/new,workdir=$PWD/over/work" none "$(realpath /sbin)"
        ln -s "$PROGRAM" /sbin/mount.fuse.knibfs
        check() { cmp "$MNT/vms/web1/latest/root.raw" expected; umount "$MNT"; [ ! -e "$MNT/vms" ]; }
        mount -t fuse.knibfs -o "$OPTIONS" "$KNIBFS_ROOT" "$MNT"
        check
        mount --fstab fstab "$MNT"
        check
        if mount -t fuse.knibfs -o colour=red "$KNIBFS_ROOT" "$MNT" 2>said; then exit 9; fi
        grep -q colour=red said
    "#;
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "bash", "-c", script])
        .current_dir(dir)
        .env("PROGRAM", env!("CARGO_BIN_EXE_knibfs"))
        .env("MNT", f.mnt())
        .env("KNIBFS_ROOT", f.store.root())
        .env("OPTIONS", options)
        .env("KNIBFS_STATE_DIR", dir.join("state"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

/// What is ordered behind the service finds it mounted.
#[test]
fn systemd_is_told_when_the_mount_can_be_used() {
    let f = fixture();
    let path = f.dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut keeper = command(f.store.root(), f.dir.path())
        .args(["mount", "-f"])
        .arg(f.mnt())
        .env("NOTIFY_SOCKET", &path)
        .spawn()
        .unwrap();
    let mut said = [0; 64];
    let told = socket.recv(&mut said);
    let is_there = f.in_mount(0, "root.raw").exists();
    let pid = rustix::process::Pid::from_child(&keeper);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = keeper.wait().unwrap();
    assert_eq!(&said[..told.unwrap()], b"READY=1\n");
    assert!(is_there && status.success());
}

#[test]
fn the_log_says_as_much_as_it_is_asked_to() {
    let f = fixture();
    for (level, says) in [("", false), ("info", true)] {
        let log = f.dir.path().join(format!("log-{level}"));
        let mount = command(f.store.root(), f.dir.path())
            .args(["mount", "--log-dir"])
            .args([&log, &f.mnt()])
            .env("KNIBFS_LOG", if level.is_empty() { "warn" } else { level })
            .stdin(Stdio::null())
            .status();
        assert!(mount.unwrap().success());
        f.unmount();
        let text = fs::read_to_string(log.join(format!("mount-{}.log", f.store.id()))).unwrap();
        assert_eq!(text.contains("is ready to serve"), says, "{level}: {text}");
    }
}
