//! Quick restore by path: VMs whose disks are plain overlays on a mounted backup, booted through libvirt.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, tool};
use common::qemu_images::qemu_img;

/// A mount that is served by a child, so that its memory can be seen.
struct Mount {
    child: Child,
    at: PathBuf,
}

impl Mount {
    fn new(lab: &Lab, options: &[&str]) -> Self {
        let at = lab.path("mnt");
        std::fs::create_dir(&at).unwrap();
        let mut command = lab.command(&["mount", "-f"]);
        let mut child = command.args(options).arg(&at).spawn().unwrap();
        while !at.join("vms").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the mount ended");
            std::thread::yield_now();
        }
        Self { child, at }
    }

    fn file(&self, backup: &Path, name: &str) -> PathBuf {
        self.at.join("vms/web1").join(backup.file_name().unwrap()).join(name)
    }

    /// The most that it ever held, in bytes.
    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A disk of a domain that is an overlay made by plain `qemu-img` on a file of the mount.
fn overlay(guest_dir: &Path, target: &str, backing: &Path, format: &str, io: &str) -> Disk {
    let path = guest_dir.join(format!("{target}.qcow2"));
    let text = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", backing.to_str().unwrap(), "-F", format, text]).unwrap();
    Disk::Xml(format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='{io}'/>\
         <source file='{text}'/><target dev='{target}' bus='virtio'/></disk>"
    ))
}

#[test]
fn a_vm_boots_from_each_form_of_each_backup_past_the_cache_with_every_aio() {
    let source = Guest::new("path").disk("vda", Disk::qcow2("64M")).with_system().start();
    source.wait_for_agent();
    let lab = Lab::at(source.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", source.name(), "--uri", uri()]);
    source.mkfs("vda");
    source.write("/mnt/vda/first", b"written before the full backup");
    source
        .sh("head -c 8388608 /dev/urandom > /mnt/vda/noise; sha256sum < /mnt/vda/noise > /mnt/vda/sum; sync");
    let full = lab.backup(&["--quiesce"]);
    source.write("/mnt/vda/second", b"written before the incremental backup");
    let incremental = lab.backup(&["--quiesce"]);
    source.write("/mnt/vda/third", b"written after all backups");
    let mount = Mount::new(&lab, &[]);

    let mut copy = Guest::new("path-copy").with_system();
    let mut seen = Vec::new();
    for backup in [&full, &incremental] {
        for (name, format) in [("vda.raw", "raw"), ("vda.qcow2", "qcow2")] {
            for io in ["native", "io_uring", "threads"] {
                let target = format!("vd{}", char::from(b'a' + seen.len() as u8));
                let disk = overlay(copy.dir(), &target, &mount.file(backup, name), format, io);
                copy = copy.disk(&target, disk);
                seen.push((target, backup == &incremental));
            }
        }
    }
    let copy = copy.start();
    copy.wait_for_agent();
    for (target, second) in seen {
        let at = |name: &str| format!("/mnt/{target}/{name}");
        assert_eq!(copy.read(&at("first")), b"written before the full backup", "{target}");
        assert_eq!(copy.exists(&at("second")), second, "{target}");
        assert!(!copy.exists(&at("third")), "{target}");
        copy.sh(&format!("sha256sum < {} | cmp - {}", at("noise"), at("sum")));
        // It can be written, and reads what was written.
        copy.write(&at("own"), target.as_bytes());
        copy.sh("echo 3 > /proc/sys/vm/drop_caches");
        assert_eq!(copy.read(&at("own")), target.as_bytes());
    }
    drop(copy);
    drop(mount);
    assert!(lab.ok(&["check", "--read-data"]).contains("2 backups"), "the backups are as they were");
}

#[test]
fn the_mount_keeps_to_its_memory_while_a_guest_boots_from_it_and_fio_reads_with_32_jobs() {
    const CACHE: u64 = 64 << 20;
    let source = Guest::new("memory").disk("vda", Disk::qcow2("64M")).disk("vdb", Disk::raw("512M")).define();
    // Much more than the cache, half of it noise.
    let mut file = std::fs::File::options().write(true).open(source.path("vdb.raw")).unwrap();
    let mut state = 1u64;
    for _ in 0..512 {
        let mut block = vec![b'k'; 1 << 20];
        for word in block.chunks_exact_mut(16) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word[..8].copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
    tool("mkfs.ext4", &["-q", "-F", source.path("fs.raw").to_str().unwrap(), "32M"]);
    let (fs, vda) = (source.path("fs.raw"), source.path("vda.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", fs.to_str().unwrap(), vda.to_str().unwrap()]).unwrap();
    let lab = Lab::at(source.dir());
    lab.ok(&["init", "--write-once", lab.store().to_str().unwrap()]);
    lab.ok(&["offering", "create", "daily", "--compress"]);
    lab.ok(&["vm", "add", "web1", "--domain", source.name(), "--uri", uri(), "--offering", "daily"]);
    let backup = lab.backup(&[]);
    assert_eq!(lab.manifest(&backup)["compression"], "Compressed");

    let mount = Mount::new(&lab, &["--cache-size", "64M"]);
    let copy = Guest::new("memory-copy").with_system();
    let disks = [("vda", "vda.raw", "raw"), ("vdb", "vdb.qcow2", "qcow2")].map(|(target, file, format)| {
        (target, overlay(copy.dir(), target, &mount.file(&backup, file), format, "native"))
    });
    let copy = disks.into_iter().fold(copy, |copy, (target, disk)| copy.disk(target, disk)).start();
    let raw = mount.file(&backup, "vdb.raw");
    for (size, depth, direct) in [("4k", "8", "1"), ("1m", "2", "1"), ("64k", "1", "0")] {
        let out = Command::new("fio")
            .args(["--name=readers", "--readonly", "--rw=randread", "--numjobs=32", "--ioengine=libaio"])
            .args(["--size=512m", "--io_size=24m", "--norandommap", "--group_reporting"])
            .args([format!("--bs={size}"), format!("--iodepth={depth}"), format!("--direct={direct}")])
            .arg(format!("--filename={}", raw.display()))
            .output()
            .expect("install fio");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    copy.wait_for_agent();
    assert!(copy.exists("/mnt/vda/lost+found"));
    copy.sh("dd if=/dev/vdb of=/dev/null bs=1M count=64 iflag=direct");
    let peak = mount.peak();
    assert!(peak <= CACHE + (64 << 20), "{} MiB resident, with a cache of 64 MiB", peak >> 20);
    assert!(peak > CACHE / 2, "the readers filled the cache: {} MiB", peak >> 20);
    println!("{} MiB at most", peak >> 20);
}
