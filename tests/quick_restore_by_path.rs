//! Quick restore by path: VMs whose disks are plain overlays on a mounted backup, booted through libvirt.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, tool};
use common::qemu_images::qemu_img;
use common::served::ServedMount;
use knibfs::store::Store;

fn mount(lab: &Lab, options: &[&str]) -> ServedMount {
    let at = lab.path("mnt");
    std::fs::create_dir(&at).unwrap();
    let mut command = lab.command(&["mount", "-f"]);
    command.args(options);
    ServedMount::new(command, &at)
}

fn file(mount: &ServedMount, backup: &Path, name: &str) -> PathBuf {
    mount.at().join("vms/web1").join(backup.file_name().unwrap()).join(name)
}

/// A disk of a domain that is an overlay made by plain `qemu-img` on a file of the mount.
///
/// `how` is its driver's: `cache='none' io='native'`.
fn overlay(guest_dir: &Path, target: &str, backing: &Path, format: &str, how: &str) -> Disk {
    let path = guest_dir.join(format!("{target}.qcow2"));
    let text = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", backing.to_str().unwrap(), "-F", format, text]).unwrap();
    Disk::Xml(format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' {how}/>\
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
    let mount = mount(&lab, &[]);

    let mut copy = Guest::new("path-copy").with_system();
    let mut seen = Vec::new();
    let hows = [
        "cache='none' io='native'",
        "cache='none' io='io_uring'",
        "cache='none' io='threads'",
        // QEMU has no native aio through the page cache.
        "cache='writeback' io='io_uring'",
        "cache='writeback' io='threads'",
    ];
    for backup in [&full, &incremental] {
        for (name, format) in [("vda.raw", "raw"), ("vda.qcow2", "qcow2")] {
            for how in hows {
                let target = format!("vd{}", char::from(b'a' + seen.len() as u8));
                let disk = overlay(copy.dir(), &target, &file(&mount, backup, name), format, how);
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
    let mut disk = std::fs::File::options().write(true).open(source.path("vdb.raw")).unwrap();
    let mut state = 1u64;
    for _ in 0..512 {
        let mut block = vec![b'k'; 1 << 20];
        for word in block.chunks_exact_mut(16) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word[..8].copy_from_slice(&state.to_le_bytes());
        }
        disk.write_all(&block).unwrap();
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

    let mount = mount(&lab, &["--cache-size", "64M"]);
    let copy = Guest::new("memory-copy").with_system();
    let disks = [("vda", "vda.raw", "raw"), ("vdb", "vdb.qcow2", "qcow2")].map(|(target, name, format)| {
        (
            target,
            overlay(copy.dir(), target, &file(&mount, &backup, name), format, "cache='none' io='native'"),
        )
    });
    let copy = disks.into_iter().fold(copy, |copy, (target, disk)| copy.disk(target, disk)).start();
    let raw = file(&mount, &backup, "vdb.raw");
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

/// A store with a VM `web1` whose one backup holds noise and its checksum.
fn with_noise(name: &str) -> (Guest, Lab, PathBuf) {
    let source = Guest::new(name).disk("vda", Disk::qcow2("64M")).with_system().start();
    source.wait_for_agent();
    let lab = Lab::at(source.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", source.name(), "--uri", uri()]);
    source.mkfs("vda");
    source
        .sh("head -c 8388608 /dev/urandom > /mnt/vda/noise; sha256sum < /mnt/vda/noise > /mnt/vda/sum; sync");
    let full = lab.backup(&["--quiesce"]);
    (source, lab, full)
}

const PAST_THE_CACHE: &str = "cache='none' io='native'";

#[test]
fn two_vms_run_from_one_backup_and_a_guest_reads_on_while_others_come_go_and_are_swapped() {
    let (source, lab, full) = with_noise("beside");
    source.write("/mnt/vda/second", b"written before the second backup");
    let second = lab.backup(&["--quiesce"]);
    let mount = mount(&lab, &["--cache-size", "4M"]);
    let two = ["beside-a", "beside-b"].map(|name| {
        let copy = Guest::new(name).with_system();
        let disk = overlay(copy.dir(), "vda", &file(&mount, &full, "vda.raw"), "raw", PAST_THE_CACHE);
        copy.disk("vda", disk).start()
    });
    for (copy, own) in two.iter().zip(["a", "b"]) {
        copy.wait_for_agent();
        copy.write("/mnt/vda/own", own.as_bytes());
        // Reads from the disk, without an end: a line for each time that all was right.
        copy.sh(
            "(while echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/vda/noise | cmp - /mnt/vda/sum; do \
             echo right >> /tmp/rounds; done; echo wrong >> /tmp/wrong) > /dev/null 2>&1 &",
        );
    }
    let all_read_on = |beside: &str| {
        for (copy, own) in two.iter().zip(["a", "b"]) {
            let rounds = || copy.sh("cat /tmp/rounds 2> /dev/null | wc -l").trim().parse::<u64>().unwrap();
            let before = rounds();
            copy.wait(beside, || rounds() >= before + 2);
            assert!(!copy.exists("/tmp/wrong"), "{}: {beside}", copy.name());
            assert_eq!(copy.read("/mnt/vda/own"), own.as_bytes(), "each writes for itself");
        }
    };
    all_read_on("nothing beside");
    source.write("/mnt/vda/third", b"written before the third backup");
    let third = lab.backup(&["--quiesce"]);
    all_read_on("a new backup");
    let spec = |backup: &Path| format!("web1/{}", backup.file_name().unwrap().to_str().unwrap());
    lab.ok(&["remove", &spec(&third)]);
    all_read_on("a removal");
    let size = |backup: &Path| std::fs::metadata(backup.join("vda.qcow2")).unwrap().len();
    let before = size(&full);
    lab.ok(&["compress", &spec(&full)]);
    lab.ok(&["compress", &spec(&second)]);
    assert_ne!(size(&full), before, "the file that both read was swapped");
    all_read_on("a compression");
    let refused = lab.command(&["remove", &spec(&full)]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.success() || said.contains("in use"), "{said}");
    all_read_on("a removal of what they read");
    let damage = std::fs::read_to_string(mount.at().join(".knibfs/damage")).unwrap();
    assert_eq!(damage, "");
    drop(two);
}

#[test]
fn the_disks_of_twenty_vms_are_open_at_once() {
    let (_source, lab, full) = with_noise("twenty");
    let mount = mount(&lab, &["--cache-size", "16M"]);
    // Nothing runs in all but one of them: QEMU opens their disks and holds them.
    let idle: Vec<_> = (0..19)
        .map(|n| {
            let guest = Guest::new(&format!("twenty-{n}"));
            let (name, format) = [("vda.raw", "raw"), ("vda.qcow2", "qcow2")][n % 2];
            let disk = overlay(guest.dir(), "vda", &file(&mount, &full, name), format, PAST_THE_CACHE);
            let guest = guest.disk("vda", disk).start();
            // Its processor would only take time from the others.
            guest.pause();
            guest
        })
        .collect();
    let last = Guest::new("twenty-last").with_system();
    let disk = overlay(last.dir(), "vda", &file(&mount, &full, "vda.raw"), "raw", PAST_THE_CACHE);
    let last = last.disk("vda", disk).start();
    last.wait_for_agent();
    last.sh("sha256sum < /mnt/vda/noise | cmp - /mnt/vda/sum");
    let status = std::fs::read_to_string(mount.at().join(".knibfs/status")).unwrap();
    let open = status.lines().find_map(|l| l.strip_prefix("knibfs_mount_open_files ")).unwrap();
    assert!(open.parse::<u64>().unwrap() >= 20, "{status}");
    assert!(idle.iter().all(Guest::is_running));
    assert!(mount.peak() <= (16 + 64) << 20, "{} MiB", mount.peak() >> 20);
}

/// What `.knibfs/status` counted.
fn counted(mount: &ServedMount, name: &str) -> u64 {
    let status = std::fs::read_to_string(mount.at().join(".knibfs/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(&format!("knibfs_mount_{name} ")));
    line.unwrap_or_else(|| panic!("no {name}: {status}")).parse().unwrap()
}

/// Through libvirt, QEMU and the guest's kernel, which reads for itself before anyone tells it to.
#[test]
fn what_one_guest_reads_first_is_decoded_ahead_for_the_next_one_from_another_backup() {
    const PLACES: u64 = 60;
    let source = Guest::new("ahead").disk("vda", Disk::raw("64M")).define();
    let mut disk = std::fs::File::options().write(true).open(source.path("vda.raw")).unwrap();
    (0..64u8).for_each(|n| disk.write_all(&vec![n + 1; 1 << 20]).unwrap());
    let lab = Lab::at(source.dir());
    lab.ok(&["init", "--write-once", lab.store().to_str().unwrap()]);
    lab.ok(&["offering", "create", "daily", "--compress"]);
    lab.ok(&["vm", "add", "web1", "--domain", source.name(), "--uri", uri(), "--offering", "daily"]);
    let both = [lab.backup(&[]), lab.backup(&[])];
    // 4 KiB of a cluster here and there, as a boot reads.
    let read = |guest: &Guest, count: u64| {
        guest.sh(&format!(
            "i=0; while [ $i -lt {count} ]; do dd if=/dev/vda of=/dev/null bs=4k count=1 \
             skip=$((i * 37 % 1000 * 16 + 2)) iflag=direct 2> /dev/null || exit 1; i=$((i + 1)); done"
        ));
    };
    let boot = |mount: &ServedMount, backup: &Path, name: &str| {
        let guest = Guest::new(name).with_system();
        let disk = overlay(guest.dir(), "vda", &file(mount, backup, "vda.raw"), "raw", PAST_THE_CACHE);
        let guest = guest.disk("vda", disk).start();
        guest.wait_for_agent();
        guest
    };
    let has_trace = || {
        let names = std::fs::read_dir(lab.store().join("vms/web1")).unwrap();
        names.flatten().any(|e| e.file_name().to_string_lossy().contains("boot"))
    };

    let first_mount = mount(&lab, &["--cache-size", "64M"]);
    let first = boot(&first_mount, &both[0], "ahead-first");
    read(&first, PLACES);
    assert!(!has_trace());
    first.destroy();
    first.wait("what it read to be kept", has_trace);
    drop(first);
    drop(first_mount);
    std::fs::remove_dir(lab.path("mnt")).unwrap();

    // Mounted anew: nothing is decoded yet.
    let mount = mount(&lab, &["--cache-size", "64M"]);
    let next = boot(&mount, &both[1], "ahead-next");
    read(&next, 8);
    // Each part of the trace counts once, whoever decodes it.
    let volume = lab.manifest(&both[0])["disks"][0]["volume"].as_str().unwrap().parse().unwrap();
    let trace = Store::open(lab.store()).unwrap().boot_trace(&"web1".parse().unwrap(), volume).unwrap();
    let parts = trace.parts.0.len() as u64;
    assert!(parts >= PLACES, "{:?}", trace.parts);
    next.wait("the rest to be decoded", || counted(&mount, "cache_misses_total") >= parts);
    let before = (counted(&mount, "cache_misses_total"), counted(&mount, "cache_hits_total"));
    read(&next, PLACES);
    let after = (counted(&mount, "cache_misses_total"), counted(&mount, "cache_hits_total"));
    // But for the first eight all were there when they were asked for.
    assert!(after.1 >= before.1 + PLACES - 8 && after.0 <= before.0 + 8, "{before:?}, {after:?}");
}
