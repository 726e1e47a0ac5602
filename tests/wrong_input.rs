//! What a person may get wrong: each gets one sentence with the way out, a failing exit code, and nothing is changed
//! in the store, on primary or in the domain.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::guest::{Disk, Guest, uri};
use common::lab::{Lab, SmallDisk, sentence, tool};
use common::qemu_images::{qemu_img, qemu_io};

fn lab() -> (tempfile::TempDir, Lab) {
    let dir = tempfile::Builder::new().prefix("knib-wrong-").tempdir().unwrap();
    let lab = Lab::at(dir.path());
    (dir, lab)
}

/// A store and the disk file `root.qcow2` of 16 MiB with 4 MiB of data.
fn lab_with_disk() -> (tempfile::TempDir, Lab, PathBuf) {
    let (dir, lab) = lab();
    let lab = lab.init();
    let disk = lab.path("root.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "16M"]).unwrap();
    qemu_io(&disk, "qcow2", "write -P 1 0 4M");
    (dir, lab, disk)
}

/// A command that fails with one sentence and changes nothing.
fn refused(lab: &Lab, arguments: &[&str], words: &[&str]) {
    let before = lab.seen();
    lab.refused(arguments, words);
    before.assert_same(&lab.seen(), &arguments.join(" "));
}

fn refused_as_disk(lab: &Lab, path: &Path, words: &[&str]) {
    let disk = format!("root={}", path.display());
    for track in ["scan", "overlay"] {
        refused(lab, &["vm", "add", "web1", "--track", track, "--disk", &disk], words);
    }
}

#[test]
fn no_such_vm() {
    let (_dir, lab, _) = lab_with_disk();
    for arguments in [
        &["backup", "web9"][..],
        &["backup", "web9", "--isolated", "--quiesce"],
        &["vm", "show", "web9"],
        &["list", "web9"],
        &["show", "web9/latest"],
        &["check", "web9"],
        &["compress", "web9/latest"],
        &["export", "web9/latest/root", "out.raw"],
    ] {
        refused(&lab, arguments, &["there is no VM \"web9\"", "`knibfs vm list` shows those that are"]);
    }
    let add = ["vm", "add", "web9", "--domain", "no-such-domain", "--uri", uri()];
    refused(&lab, &add, &["there is no domain \"no-such-domain\"", "list --all` shows what there is"]);
}

#[test]
fn a_store_that_is_not_initialised() {
    let (_dir, lab) = lab();
    fs::create_dir(lab.store()).unwrap();
    fs::create_dir(lab.path("mnt")).unwrap();
    for arguments in [
        &["backup", "web1"][..],
        &["list"],
        &["recover"],
        &["check"],
        &["vm", "list"],
        &["vm", "add", "web1", "--domain", "x"],
        &["setting", "list"],
        &["mount", "mnt"],
    ] {
        refused(&lab, arguments, &["is not a knibfs store", "make one with `knibfs init"]);
    }
    fs::remove_dir(lab.store()).unwrap();
    refused(&lab, &["list"], &["cannot open the store", "No such file", "knibfs init"]);
    let mut nameless = lab.command(&["list"]);
    let said = sentence(&nameless.env_remove("KNIBFS_STORE").output().unwrap(), 2);
    assert!(said.contains("use `-s STORE` or set KNIBFS_STORE"), "{said}");
}

#[test]
fn a_store_on_a_full_disk() {
    let (_dir, lab, disk) = lab_with_disk();
    let small = SmallDisk::new(lab.path("small"), "8M");
    let lab = lab.clone().with_store(small.path().join("store"));
    small.fill();
    let words = ["the file system is full: free space where", "then try again"];
    refused(&lab, &["init", lab.store().to_str().unwrap()], &words);
    assert!(!lab.store().exists());

    fs::remove_file(small.path().join("filler")).unwrap();
    let lab = lab.init();
    let disk = format!("root={}", disk.display());
    small.fill();
    refused(&lab, &["vm", "add", "web1", "--disk", &disk], &words);
    fs::remove_file(small.path().join("filler")).unwrap();
    lab.ok(&["vm", "add", "web1", "--disk", &disk]);
    small.fill();
    refused(&lab, &["backup", "web1"], &words);
    fs::remove_file(small.path().join("filler")).unwrap();
    lab.backup(&[]);
}

/// Runs `backup web1` of a store that has no room for what changed; its last line is the sentence.
fn fills_up(lab: &Lab) {
    let before = lab.seen();
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
    let sentences: Vec<_> = said.lines().filter(|l| l.starts_with("knibfs: ")).collect();
    assert_eq!(sentences.len(), 1, "{said}");
    assert_eq!(said.lines().last(), Some(sentences[0]), "{said}");
    for words in ["copying the disk", "No space left", "free space where", "nothing was changed"] {
        assert!(said.contains(words), "no \"{words}\" in {said}");
    }
    before.assert_same(&lab.seen(), "a backup that filled its store");
    assert!(!lab.ok(&["vm", "list"]).contains("BackingUp"));
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn a_store_that_fills_up_during_a_backup_of_disk_files() {
    for track in ["scan", "overlay"] {
        let (_dir, lab, disk) = lab_with_disk();
        let small = SmallDisk::new(lab.path("small"), "7M");
        let lab = lab.clone().with_store(small.path().join("store")).init();
        lab.ok(&["vm", "add", "web1", "--track", track, "--disk", &format!("root={}", disk.display())]);
        let full = lab.backup(&[]);
        qemu_io(&disk, "qcow2", "write -P 2 8M 6M");
        fills_up(&lab);
        assert_eq!(lab.json(&["list"])["vms"][0]["backups"].as_array().unwrap().len(), 1);
        // With room it goes on where it was.
        tool("mount", &["-o", "remount,size=64M", small.path().to_str().unwrap()]);
        let next = lab.backup(&[]);
        assert_eq!(lab.manifest(&next)["parent"]["name"], full.file_name().unwrap().to_str().unwrap());
    }
}

#[test]
fn a_store_that_fills_up_during_a_backup_of_a_running_domain() {
    let guest = Guest::new("wrong-full").disk("vda", Disk::qcow2("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 2 0 8M");
    guest.start();
    let lab = Lab::at(guest.dir());
    let small = SmallDisk::new(guest.path("small"), "4M");
    let lab = lab.with_store(small.path().join("store")).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    let xml = definitions(&guest);
    fills_up(&lab);
    assert_eq!(definitions(&guest), xml);
    tool("mount", &["-o", "remount,size=64M", small.path().to_str().unwrap()]);
    lab.backup(&[]);
}

/// The live and the persistent definition, without what changes with each block device that QEMU opens.
fn definitions(guest: &Guest) -> (String, String) {
    let live = if guest.is_running() { guest.live_xml() } else { String::new() };
    let lines = live.lines().map(|line| match (line.find(" index='"), line.rfind('/')) {
        (Some(from), Some(to)) => format!("{}{}", &line[..from], &line[to..]),
        _ => line.to_owned(),
    });
    (lines.collect::<Vec<_>>().join("\n"), guest.persistent_xml())
}

#[test]
fn a_disk_that_a_running_vm_uses() {
    let guest =
        Guest::new("wrong-used").disk("vda", Disk::qcow2("16M")).disk("vdb", Disk::raw("16M")).define();
    let lab = Lab::at(guest.dir()).init();
    let disk = format!("root={}", guest.path("vda.qcow2").display());
    lab.ok(&["vm", "add", "off", "--track", "overlay", "--disk", &disk]);
    lab.ok(&["backup", "off"]);
    guest.start();
    let xml = definitions(&guest);
    for name in ["vda.qcow2", "vdb.raw"] {
        let disk = format!("root={}", guest.path(name).display());
        let words = ["is in use", "stop the VM", "--domain"];
        refused(&lab, &["vm", "add", "web1", "--disk", &disk], &words);
    }
    refused(&lab, &["backup", "off"], &["is in use", "stop what uses it first"]);
    assert_eq!(definitions(&guest), xml);
}

#[test]
fn an_image_with_a_backing_loop() {
    let (_dir, lab, disk) = lab_with_disk();
    let other = lab.path("other.qcow2");
    let (disk_text, other_text) = (disk.to_str().unwrap(), other.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", disk_text, "-F", "qcow2", other_text]).unwrap();
    qemu_img(&["rebase", "-u", "-b", other_text, "-F", "qcow2", disk_text]).unwrap();
    let words = ["a loop", "qemu-img rebase"];
    refused_as_disk(&lab, &disk, &words);
    refused_as_disk(&lab, &other, &words);
    let own = lab.path("own.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", own.to_str().unwrap(), "1M"]).unwrap();
    qemu_img(&["rebase", "-u", "-b", "own.qcow2", "-F", "qcow2", own.to_str().unwrap()]).unwrap();
    refused_as_disk(&lab, &own, &words);
}

#[test]
fn a_disk_that_became_a_loop_since_it_was_added() {
    let (_dir, lab, disk) = lab_with_disk();
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", disk.display())]);
    lab.backup(&[]);
    qemu_img(&["rebase", "-u", "-b", "root.qcow2", "-F", "qcow2", disk.to_str().unwrap()]).unwrap();
    refused(
        &lab,
        &["backup", "web1"],
        &["disk root", "is a loop", "put back what is missing or was changed"],
    );
}

#[test]
fn a_luks_image() {
    let (_dir, lab, _) = lab_with_disk();
    let secret = ["--object", "secret,id=s,data=abc"];
    let within = lab.path("within.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "-o", options, within.to_str().unwrap(), "1M"];
    qemu_img(&[&create[..1], &secret, &create[1..]].concat()).unwrap();
    let whole = lab.path("whole.luks");
    let create =
        ["create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=10", whole.to_str().unwrap(), "1M"];
    qemu_img(&[&create[..1], &secret, &create[1..]].concat()).unwrap();
    for image in [&within, &whole] {
        refused_as_disk(&lab, image, &["encrypted with LUKS", "exclude"]);
    }
    let above = lab.path("above.qcow2");
    let (luks, text) = (within.to_str().unwrap(), above.to_str().unwrap());
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", luks, "-F", "qcow2", text, "1M"]).unwrap();
    refused_as_disk(&lab, &above, &["encrypted with LUKS"]);
}

#[test]
fn a_truncated_image() {
    let (_dir, lab, disk) = lab_with_disk();
    let bytes = fs::read(&disk).unwrap();
    for keep in [0, 40, 111, 65536, bytes.len() / 2, bytes.len() - 65536] {
        let cut = lab.path("cut.qcow2");
        fs::write(&cut, &bytes[..keep]).unwrap();
        let words: &[&str] = if keep == 0 { &["it is empty"] } else { &["repair it first", "another image"] };
        refused_as_disk(&lab, &cut, words);
    }
}

#[test]
fn a_disk_that_was_truncated_since_it_was_added() {
    let (_dir, lab, disk) = lab_with_disk();
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", disk.display())]);
    lab.backup(&[]);
    let length = fs::metadata(&disk).unwrap().len();
    fs::File::options().write(true).open(&disk).unwrap().set_len(length / 2).unwrap();
    let before = lab.seen();
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(
        last.starts_with("knibfs: copying the disk root failed") && last.contains("qemu-img check"),
        "{said}"
    );
    before.assert_same(&lab.seen(), "a backup of a truncated image");
}

/// A loop device that is taken away when the test ends.
struct LoopDevice(String);

impl LoopDevice {
    fn over(file: &Path, more: &[&str]) -> Self {
        let arguments = [&["--show", "-f"], more, &[file.to_str().unwrap()]].concat();
        Self(tool("losetup", &arguments).trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_disk_that_a_loop_device_may_write_to() {
    let (_dir, lab) = lab();
    let lab = lab.init();
    let path = lab.path("root.raw");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    {
        let device = LoopDevice::over(&path, &[]);
        let disk = format!("root={}", path.display());
        let detach = format!("losetup -d {}", device.0);
        refused(&lab, &["vm", "add", "web1", "--disk", &disk], &["is in use", &detach]);
    }
    // One that only reads disturbs nobody.
    let _reads = LoopDevice::over(&path, &["-r"]);
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", path.display())]);
    lab.backup(&[]);
    let device = LoopDevice::over(&path, &[]);
    refused(&lab, &["backup", "web1"], &["is in use", &format!("losetup -d {}", device.0)]);
}

#[test]
fn taking_a_vm_off_an_offering_that_it_has_not() {
    let (_dir, lab, disk) = lab_with_disk();
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", disk.display())]);
    refused(&lab, &["vm", "unassign", "web1"], &["is assigned to no offering", "`knibfs vm remove web1`"]);
}

#[test]
fn a_rate_of_nothing() {
    let (_dir, lab, _) = lab_with_disk();
    let output = lab.command(&["restore", "web1/latest", "--rate", "0"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("leave it out for no limit"), "{said}");
}

fn is_mounted(path: &Path) -> bool {
    knib_fuse::mount_at(&path.canonicalize().unwrap()).unwrap().is_some()
}

/// `mount` in the foreground and in the background, both refused.
fn mount_refused(lab: &Lab, mnt: &Path, words: &[&str]) {
    let (mnt_text, log) = (mnt.to_str().unwrap(), lab.path("log"));
    for foreground in [&["-f"][..], &[]] {
        let arguments =
            [&["mount", "--log-dir", log.to_str().unwrap()][..], foreground, &[mnt_text]].concat();
        refused(lab, &arguments, words);
    }
}

#[test]
fn a_mount_point_in_the_store_and_a_store_in_the_mount_point() {
    let (dir, lab, _) = lab_with_disk();
    let inside = lab.store().join("vms");
    mount_refused(&lab, &inside, &["lies in the store", "mount somewhere else"]);
    mount_refused(&lab, lab.store(), &["lies in the store", "mount somewhere else"]);
    mount_refused(&lab, dir.path(), &["would hide it", "mount somewhere else"]);
    // Under another name, too.
    let link = lab.path("link");
    std::os::unix::fs::symlink(&inside, &link).unwrap();
    mount_refused(&lab, &link, &["lies in the store"]);
    assert!(!is_mounted(&inside) && !is_mounted(lab.store()) && !is_mounted(dir.path()));
}

#[test]
fn mounting_twice() {
    let (_dir, lab, _) = lab_with_disk();
    let (mnt, log) = (lab.path("mnt"), lab.path("log"));
    fs::create_dir(&mnt).unwrap();
    lab.ok(&["mount", "--log-dir", log.to_str().unwrap(), mnt.to_str().unwrap()]);
    mount_refused(&lab, &mnt, &["already mounted at", "`knibfs umount` it first"]);
    assert!(mnt.join("vms").is_dir());
    lab.ok(&["umount", mnt.to_str().unwrap()]);
    refused(&lab, &["umount", mnt.to_str().unwrap()], &["no knibfs store is mounted at", "findmnt"]);
}

/// A command through which `mount` is run, and what it must say.
fn mount_through(lab: &Lab, mnt: &Path, program: &Path, prefix: &[&str], words: &[&str]) {
    for foreground in [true, false] {
        let before = lab.seen();
        let mut command = Command::new(prefix[0]);
        command.args(&prefix[1..]).arg(program).args(["mount", "--log-dir"]).arg(lab.path("log"));
        lab.environment(&mut command);
        let said = sentence(&command.args(foreground.then_some("-f")).arg(mnt).output().unwrap(), 1);
        assert!(words.iter().all(|w| said.contains(w)), "{prefix:?}: {said}");
        assert!(!is_mounted(mnt), "{prefix:?}");
        before.assert_same(&lab.seen(), "a mount without permission");
    }
}

#[test]
fn no_permission_for_dev_fuse() {
    let (dir, lab, _) = lab_with_disk();
    let mnt = lab.path("mnt");
    fs::create_dir(&mnt).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_knibfs"));
    // As root: without the device, without the right to open it, without the right to mount.
    let masked = [
        "unshare",
        "-m",
        "sh",
        "-ec",
        "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$0\" \"$@\"",
    ];
    mount_through(&lab, &mnt, program, &masked, &["there is no /dev/fuse", "modprobe fuse"]);
    let closed = "touch \"$D\" && chmod 600 \"$D\" && chown 7 \"$D\" && mount --bind \"$D\" /dev/fuse && \
                  exec setpriv --bounding-set -dac_override,-dac_read_search \"$0\" \"$@\"";
    let closed = closed.replace("$D", dir.path().join("log-device").to_str().unwrap());
    fs::write(lab.path("log-device"), "").unwrap();
    std::os::unix::fs::chown(lab.path("log-device"), Some(7), None).unwrap();
    fs::set_permissions(lab.path("log-device"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let closed = ["unshare", "-m", "sh", "-ec", &closed];
    mount_through(&lab, &mnt, program, &closed, &["no permission to open /dev/fuse", "run as root"]);
    let weak = ["setpriv", "--bounding-set", "-sys_admin"];
    mount_through(&lab, &mnt, program, &weak, &["no permission to mount", "run as root"]);

    // As a user whom the device does not let in.
    let copy = dir.path().join("log").join("knibfs");
    fs::create_dir_all(copy.parent().unwrap()).unwrap();
    fs::copy(program, &copy).unwrap();
    tool("chown", &["-R", "65534:65534", dir.path().to_str().unwrap()]);
    let shut = "mknod \"$D\" c 10 229 2>/dev/null || true; chmod 600 \"$D\"; mount --bind \"$D\" /dev/fuse; \
                exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" \"$@\"";
    let shut = shut.replace("$D", dir.path().join("log/device").to_str().unwrap());
    let shut = ["unshare", "-m", "sh", "-ec", &shut];
    mount_through(&lab, &mnt, &copy, &shut, &["open /dev/fuse", "run as root"]);
}

#[test]
fn libvirt_is_not_running() {
    let guest = Guest::new("wrong-libvirt").disk("vda", Disk::qcow2("16M")).start();
    let lab = Lab::at(guest.dir()).init();
    let nowhere = "qemu+unix:///system?socket=/nonexistent/libvirt-sock";
    let words = ["cannot reach libvirt", "systemctl start libvirtd"];
    refused(&lab, &["vm", "add", "web1", "--domain", guest.name(), "--uri", nowhere], &words);
    // It ran when the VM was added, and the last time it was backed up.
    let socket = uri().split_once("socket=").map(|(_, path)| PathBuf::from(path));
    let socket = socket.unwrap_or_else(|| PathBuf::from("/run/libvirt/libvirt-sock"));
    let link = guest.path("log");
    std::os::unix::fs::symlink(socket.parent().unwrap(), &link).unwrap();
    let through = format!("qemu+unix:///system?socket={}/libvirt-sock", link.display());
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", &through]);
    lab.backup(&[]);
    fs::remove_file(&link).unwrap();
    let xml = definitions(&guest);
    refused(&lab, &["backup", "web1"], &words);
    refused(&lab, &["backup", "web1", "--quiesce"], &words);
    assert_eq!(definitions(&guest), xml);
}

#[test]
fn the_guest_agent_is_missing_with_quiesce() {
    let channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    // No channel at all, and a channel at whose end nobody listens.
    for devices in ["", channel] {
        let guest = Guest::new("wrong-agent").disk("vda", Disk::qcow2("16M")).devices(devices).start();
        let lab = Lab::at(guest.dir()).init();
        lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
        lab.backup(&[]);
        let xml = definitions(&guest);
        let words =
            ["guest agent", "does not answer", "install and start qemu-guest-agent", "leave out --quiesce"];
        refused(&lab, &["backup", "web1", "--quiesce"], &words);
        assert_eq!(definitions(&guest), xml);
        lab.backup(&[]);
    }
}

/// A domain that is off, backed up once: its delta stands on `vda.qcow2`.
fn left_off() -> (Guest, Lab, PathBuf) {
    let guest = Guest::new("wrong-chain").disk("vda", Disk::qcow2("16M")).define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 5 0 1M");
    let lab = Lab::at(guest.dir()).init();
    lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", uri()]);
    lab.backup(&[]);
    let volume = lab.json(&["vm", "show", "web1"]);
    let delta = PathBuf::from(volume["volumes"][0]["path"].as_str().unwrap());
    assert!(delta.to_str().unwrap().ends_with(".knib.qcow2"));
    (guest, lab, delta)
}

fn refused_for(guest: &Guest, lab: &Lab, words: &[&str]) {
    let xml = definitions(guest);
    refused(lab, &["backup", "web1"], words);
    assert_eq!(definitions(guest), xml);
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn a_chain_that_cannot_be_read_any_more() {
    // A file of the chain is gone: the base, then the delta.
    let (guest, lab, delta) = left_off();
    for file in [guest.path("vda.qcow2"), delta.clone()] {
        let away = file.with_extension("away");
        fs::rename(&file, &away).unwrap();
        refused_for(&guest, &lab, &["disk vda", "No such file", "put back what is missing"]);
        fs::rename(&away, &file).unwrap();
    }
    // The delta is cut.
    let bytes = fs::read(&delta).unwrap();
    fs::write(&delta, &bytes[..50]).unwrap();
    refused_for(&guest, &lab, &["disk vda", "cut off", "put back what is missing or was changed"]);
    fs::write(&delta, &bytes).unwrap();
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental", "all was put back");
}

#[test]
fn a_chain_whose_file_is_gone_while_the_vm_runs() {
    let (guest, lab, delta) = left_off();
    guest.start();
    let away = delta.with_extension("away");
    fs::rename(&delta, &away).unwrap();
    refused_for(&guest, &lab, &[delta.to_str().unwrap(), "is gone", "put it back", "virsh blockcopy"]);
    fs::rename(&away, &delta).unwrap();
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
}

#[test]
fn a_delta_on_an_image_that_it_was_not_made_on() {
    // Another file took the base's place; or the delta was made to stand on another.
    for replaced in [true, false] {
        let (guest, lab, delta) = left_off();
        let base = guest.path("vda.qcow2");
        let other = guest.path(if replaced { "vda.qcow2" } else { "other.qcow2" });
        let kept = guest.path("kept.qcow2");
        fs::rename(&base, &kept).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", other.to_str().unwrap(), "16M"]).unwrap();
        if !replaced {
            fs::rename(&kept, &base).unwrap();
            let arguments =
                ["rebase", "-u", "-b", other.to_str().unwrap(), "-F", "qcow2", delta.to_str().unwrap()];
            qemu_img(&arguments).unwrap();
        }
        let words = ["disk vda", "put the right image back", "--isolated"];
        refused_for(&guest, &lab, &words);
        // It can be taken as it is, and then the chain begins anew.
        let isolated = lab.backup(&["--isolated"]);
        assert_eq!(lab.manifest(&isolated)["isolated"], true);
        let (kind, reason) = lab.kind(&lab.backup(&[]));
        assert_eq!(kind, "full", "{reason}");
        assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
    }
}

/// What another tool did to the layers and left readable is no error: the backup is full and says why.
#[test]
fn a_chain_that_another_tool_changed_is_taken_in_full() {
    let (guest, lab, delta) = left_off();
    guest.start();
    let domain = guest.name();
    let virsh = |arguments: &[&str]| tool("virsh", &[&["-q", "-c", uri()][..], arguments].concat());
    let snapshot = guest.path("theirs.qcow2");
    let spec = format!("vda,file={}", snapshot.display());
    virsh(&["snapshot-create-as", domain, "--disk-only", "--no-metadata", "--diskspec", &spec]);
    let output = lab.command(&["backup", "web1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let reason = "the volume's images are not as knibfs left them";
    assert!(said.contains(&format!("vda: full, because {reason}")), "{said}");
    let full = lab.store().join("vms").join(String::from_utf8(output.stdout).unwrap().trim());
    assert!(lab.kind(&full).1.contains(reason));
    assert!(lab.ok(&["show", "web1/latest"]).contains(reason));
    assert_eq!(lab.kind(&lab.backup(&[])).0, "incremental");
    // A commit by another tool, of all layers into the base.
    virsh(&["blockcommit", domain, "vda", "--active", "--pivot", "--wait"]);
    let left = lab.json(&["vm", "show", "web1"])["volumes"][0]["path"].as_str().unwrap().to_owned();
    let full = lab.backup(&[]);
    let (kind, why) = lab.kind(&full);
    assert!(kind == "full" && why.contains(reason), "{kind}: {why}");
    // What it merged lies there still: whether it is needed no one here can know, so it is said.
    let note = lab.manifest(&full)["notes"][0].as_str().unwrap().to_owned();
    assert!(note.contains(&left) && note.contains("is no part of the disk vda any more"), "{note}");
    assert!(snapshot.exists() && Path::new(&left).exists() && !delta.exists());
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let (_dir, lab, _) = lab_with_disk();
    for arguments in [
        &["backup"][..],
        &["backup", "../web1"],
        &["backup", "web1", "--no-such-option"],
        &["mount"],
        &["show", "web1"],
        &["vm", "add", "web1", "--disk", "root"],
        &["no-such-command"],
    ] {
        let before = lab.seen();
        let output = lab.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(!said.is_empty());
        before.assert_same(&lab.seen(), &arguments.join(" "));
    }
}
