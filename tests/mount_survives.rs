//! No single death: servers of the mount are killed, crash and are replaced under programs and guests that read from it.
//! Needs root, /dev/fuse, fio and libvirt.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod mounted_store;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::guest::{Disk, Guest, uri};
use common::kept::{Mount, Stop, install, installed};
use common::lab::{Lab, tool};
use common::server;
use mounted_store::{CLUSTER, Fixture, Layer, Shape};
use rustix::process::Signal;

const KILLS: usize = 100;

fn fio(file: &Path, more: &[&str]) -> Result<(), String> {
    let mut run = Command::new("fio");
    run.args([
        "--name=v",
        "--bs=4k",
        "--size=32m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--ioengine=libaio",
    ]);
    run.current_dir(file.parent().unwrap()).arg(format!("--filename={}", file.display()));
    let output = run.args(more).output().expect("install fio");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[test]
fn a_server_that_is_killed_a_hundred_times_is_not_noticed_by_fio() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::at(dir.path()).init();
    let disk = lab.path("disk.raw");
    fio(&disk, &["--rw=write", "--do_verify=0"]).unwrap();
    lab.ok(&["offering", "create", "zstd", "--compress"]);
    lab.ok(&["vm", "add", "web1", "--offering", "zstd", "--disk", &format!("root={}", disk.display())]);
    let backup = lab.ok(&["backup", "web1"]);
    let mnt = lab.path("mnt");
    fs::create_dir(&mnt).unwrap();
    let mount = Mount::new(lab.command(&[]), &mnt, &["--cache-size", "1M"]);
    let folder = mnt.join("vms").join(&backup);
    let held = File::open(folder.join("root.raw")).unwrap();
    let done = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let again = |more: &'static [&'static str]| {
            let (folder, done, rounds) = (&folder, &done, &rounds);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let more = [&["--readonly"], more].concat();
                    fio(&folder.join("root.raw"), &more).unwrap();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let readers = [
            again(&["--rw=randread", "--direct=1", "--iodepth=16"]),
            again(&["--rw=read", "--direct=0", "--bs=4k", "--invalidate=1"]),
        ];
        let stop = Stop(&done);
        for round in 0..KILLS {
            if readers.iter().any(|reader| reader.is_finished()) {
                break;
            }
            let before = server::pid(&mnt);
            server::kill(before);
            // Nobody can take away what is open, also while no server is there.
            if round % 10 == 0 {
                lab.refused(&["remove", &backup], &["in use", &format!("process {} on", mount.keeper.id())]);
            }
            server::wait("the next server", || server::pid(&mnt) != before);
        }
        drop(stop);
    });
    assert!(rounds.load(Ordering::Relaxed) >= 2);
    let said = mount.said();
    assert_eq!(said.matches("was ended by signal 9").count(), KILLS, "{said}");
    // A handle from before the first death still reads the disk.
    let (mut seen, mut wanted) = (vec![0; 32 << 20], Vec::new());
    held.read_exact_at(&mut seen, 0).unwrap();
    std::io::Read::read_to_end(&mut File::open(&disk).unwrap(), &mut wanted).unwrap();
    assert!(seen == wanted);
    drop(held);
    server::wait("the lease to end", || lab.command(&["remove", &backup]).status().unwrap().success());
}

#[test]
fn a_guest_boots_and_reads_while_servers_are_killed() {
    let source = Guest::new("survive").disk("vda", Disk::qcow2("64M")).define();
    let (fs, vda) = (source.path("fs.raw"), source.path("vda.qcow2"));
    tool("mkfs.ext4", &["-q", "-F", fs.to_str().unwrap(), "64M"]);
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", fs.to_str().unwrap(), vda.to_str().unwrap()]);
    let lab = Lab::at(source.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", source.name(), "--uri", uri()]);
    let backup = lab.backup(&[]);
    let mnt = lab.path("mnt");
    std::fs::create_dir(&mnt).unwrap();
    let mount = Mount::new(lab.command(&[]), &mnt, &["--allow-other", "--cache-size", "1M"]);
    let backing = mnt.join("vms/web1").join(backup.file_name().unwrap()).join("vda.raw");
    let copy = Guest::new("survive-copy").with_system();
    let overlay = copy.dir().join("vda.qcow2");
    let text = overlay.to_str().unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", backing.to_str().unwrap(), "-F", "raw", text]);
    let disk = Disk::Xml(format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'/>\
         <source file='{text}'/><target dev='vda' bus='virtio'/></disk>"
    ));
    let done = AtomicBool::new(false);
    let kills = std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut kills = 0;
            while !done.load(Ordering::Relaxed) || kills < KILLS {
                server::kill_and_wait(&mnt);
                kills += 1;
            }
            kills
        });
        let stop = Stop(&done);
        let copy = copy.disk("vda", disk).start();
        copy.wait_for_agent();
        copy.sh("cd /mnt/vda && head -c 8388608 /dev/urandom > noise && sha256sum noise > sum && sync");
        for _ in 0..5 {
            copy.sh("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M iflag=direct");
            copy.sh("cd /mnt/vda && sha256sum -c sum");
        }
        // An error of the disk would be there: ext4 and the block layer both say so.
        assert_eq!(copy.sh("dmesg | grep -ci 'i/o error' || true").trim(), "0");
        drop(stop);
        killer.join().unwrap()
    });
    assert!(kills >= KILLS);
    drop(mount);
}

const SIZE: u64 = 8 << 20;

fn layer() -> Layer {
    (0..SIZE / CLUSTER).map(|n| (n, if n % 2 == 0 { Shape::Compressed } else { Shape::Plain })).collect()
}

fn fixture() -> Fixture {
    Fixture::chain(SIZE, true, &[layer()])
}

fn mounted(f: &Fixture, options: &[&str]) -> Mount {
    Mount::new(mounted_store::command(f.store.root(), f.dir.path()), &f.mnt(), options)
}

/// Before Linux 6.9 what a dead server had taken is lost: its readers get an error, once, and read on.
#[test]
fn where_requests_cannot_be_resent_readers_get_an_error_once_and_read_on() {
    let f = fixture();
    let mount = mounted(&f, &["--no-resend", "--cache-size", "64K"]);
    let whole = f.expected(0, 0, SIZE as usize);
    let (errors, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let answered: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for (reader, answered) in answered.iter().enumerate() {
            let (f, whole, errors, done) = (&f, &whole, &errors, &done);
            scope.spawn(move || {
                let path = f.in_mount(0, "root.raw");
                let file = File::options().read(true).custom_flags(direct).open(&path).unwrap();
                let mut space = vec![0u8; (256 << 10) + 4096];
                let from = space.as_ptr().align_offset(4096);
                let mut step = reader as u64;
                while !done.load(Ordering::Relaxed) {
                    step += 1;
                    let at = (step * 7919 % 31) * (256 << 10);
                    let buffer = &mut space[from..from + (256 << 10)];
                    if file.read_exact_at(buffer, at).is_err() {
                        errors.fetch_add(1, Ordering::Relaxed);
                        file.read_exact_at(buffer, at).expect("the second try goes to the next server");
                    }
                    assert!(*buffer == whole[at as usize..at as usize + (256 << 10)]);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&done);
        let mut kills = 0;
        while errors.load(Ordering::Relaxed) == 0 && kills < 1000 {
            // Each has read from this server: none is at its second try.
            let before: Vec<u64> = answered.iter().map(|a| a.load(Ordering::Relaxed)).collect();
            server::wait("all readers to read", || {
                answered.iter().zip(&before).all(|(a, before)| a.load(Ordering::Relaxed) > *before)
            });
            server::kill_and_wait(&mount.at);
            kills += 1;
        }
    });
    assert!(errors.load(Ordering::Relaxed) > 0, "no request was ever lost: this kernel resends by itself?");
}

fn mounted_by(f: &Fixture, program: &Path) -> Mount {
    let mut command = Command::new(program);
    command.env("KNIBFS_STORE", f.store.root()).env("KNIBFS_STATE_DIR", f.dir.path());
    Mount::new(command, &f.mnt(), &[])
}

#[test]
fn a_new_version_takes_over_on_sigusr1_and_one_that_cannot_start_changes_nothing() {
    let f = fixture();
    let program = installed(f.dir.path());
    let mount = mounted_by(&f, &program);
    let open = File::open(f.in_mount(0, "root.raw")).unwrap();
    let status = File::open(mount.at.join(".knibfs/status")).unwrap();
    let first = server::pid(&mount.at);
    install(&program, None);
    mount.replace();
    server::wait("the new version", || server::pid(&mount.at) != first);
    let second = server::pid(&mount.at);
    // The file that lies there now, not the one that was started first.
    assert_eq!(fs::read_link(format!("/proc/{second}/exe")).unwrap(), program);
    let mut seen = vec![0; SIZE as usize];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == f.expected(0, 0, SIZE as usize));
    let said = std::io::read_to_string(status).unwrap();
    assert!(said.contains(&format!("knibfs_mount_server_pid {second}\n")), "who serves now: {said}");

    install(&program, Some("#!/bin/sh\nexit 7\n"));
    mount.replace();
    server::wait("its failure", || mount.said().contains("the one before goes on"));
    assert_eq!(server::pid(&mount.at), second);
    assert!(mount.said().contains("exit status: 7"), "{}", mount.said());
}

#[test]
fn servers_that_die_at_once_are_given_up_with_a_sentence() {
    let f = fixture();
    let program = installed(f.dir.path());
    let mut mount = mounted_by(&f, &program);
    let serving = server::pid(&mount.at);
    install(&program, Some("#!/bin/sh\nexit 7\n"));
    server::kill(serving);
    let status = mount.keeper.wait().unwrap();
    let said = mount.said();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("given up") && said.matches("exit status: 7").count() == 7, "{said}");
    assert!(!mount.at.join("vms").exists(), "the mount is taken away");
}

#[test]
fn a_server_whose_keeper_is_killed_goes_on_and_ends_on_a_signal() {
    let f = fixture();
    let mut mount = mounted(&f, &[]);
    let open = File::open(f.in_mount(0, "root.raw")).unwrap();
    let serving = server::pid(&mount.at);
    mount.keeper.kill().unwrap();
    mount.keeper.wait().unwrap();
    server::wait("the server to know", || mount.said().contains("the keeper of the mount"));
    let mut seen = vec![0; SIZE as usize];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == f.expected(0, 0, SIZE as usize));
    assert_eq!(f.store.leases(f.backups[0].id).unwrap().len(), 1);
    server::signal(serving, Signal::TERM);
    server::wait("the holders to be named", || mount.said().contains("is in use by"));
    drop(open);
    server::wait("the server to end", || server::serving(&mount.at).is_none());
    assert!(!mount.at.join("vms").exists());
}
