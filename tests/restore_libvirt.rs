//! Restores to domains of a real libvirt, normal and quick, through the program: tables F and G and the restores of
//! table B of the requirements. Each step is followed by a look at everything: see [`Lab::sound`].
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::guest::{Builder, Disk, Guest, other_uri, uri};
use common::qemu_images::{has_pattern, qemu_img, qemu_io};
use knibfs::hypervisor::xml::errors::error_policy;
use knibfs::hypervisor::{ErrorPolicy, Guest as Seen, Hypervisor as _, LibvirtDomain, Power};
use serde_json::Value;

/// A guest and a store that knows it as `web1`.
struct Lab {
    guest: Guest,
}

impl Lab {
    fn new(builder: Builder) -> Self {
        let lab = Lab { guest: builder.define() };
        lab.ok(&["init", lab.store().to_str().unwrap()]);
        lab.ok(&["vm", "add", "web1", "--domain", lab.guest.name(), "--uri", uri()]);
        lab
    }

    fn store(&self) -> PathBuf {
        self.guest.path("store")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_knibfs"));
        command
            .args(arguments)
            .env("KNIBFS_STORE", self.store())
            .env("KNIBFS_STATE_DIR", self.guest.path("state"));
        command
    }

    fn try_run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn refused(&self, arguments: &[&str], words: &str) {
        let before = (self.guest.persistent_xml(), self.files());
        let output = self.try_run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
        assert!(errors.contains(words), "{arguments:?}: {errors}");
        assert_eq!((self.guest.persistent_xml(), self.files()), before, "{arguments:?} changed something");
    }

    /// Files beside the disks, sorted.
    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.guest.dir()).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| !["store", "state", "console.log"].contains(&n.as_str()));
        names.sort();
        names
    }

    fn seen(&self) -> Seen {
        self.guest.hypervisor().inspect().unwrap()
    }

    /// The images of a disk, live first.
    fn chain(&self, target: &str) -> Vec<PathBuf> {
        let volume = self.seen().volumes.into_iter().find(|v| v.target == target);
        let volume = volume.unwrap_or_else(|| panic!("there is no disk {target}"));
        volume.chain.into_iter().map(|i| i.path).collect()
    }

    fn record(&self, vm: &str) -> Value {
        serde_json::from_str(&self.ok(&["vm", "show", vm, "--json"])).unwrap()
    }

    fn kind(&self, backup: &str, disk: &str) -> String {
        self.about(backup, disk, "kind")
    }

    fn reason(&self, backup: &str, disk: &str) -> String {
        self.about(backup, disk, "reason")
    }

    fn about(&self, backup: &str, disk: &str, what: &str) -> String {
        let path = self.store().join("vms").join(backup).join("manifest.json");
        let manifest: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let disks = manifest["disks"].as_array().unwrap();
        let found =
            disks.iter().find(|d| d["name"] == disk).unwrap_or_else(|| panic!("no {disk}: {manifest}"));
        found[what].as_str().unwrap().to_owned()
    }

    /// All is as it should be: every image is sound, the store can be read, nothing is left over, the definitions name
    /// what the store thinks and what is on disk, nothing is mounted or in the journal.
    fn sound(&self, step: &str) {
        self.sound_at(step, &self.guest.hypervisor());
    }

    fn sound_at(&self, step: &str, domain: &LibvirtDomain) {
        let seen = domain.inspect().unwrap();
        assert_eq!(seen.refused, [], "{step}");
        for volume in &seen.volumes {
            for image in &volume.chain {
                assert!(image.path.exists(), "{step}: {} is gone", image.path.display());
                assert!(!image.path.starts_with(self.guest.path("state")), "{step}: it stands on the mount");
                if image.format == knibfs::hypervisor::ImageFormat::Qcow2 {
                    let path = image.path.to_str().unwrap();
                    qemu_img(&["check", "-U", "-q", "-f", "qcow2", path])
                        .unwrap_or_else(|e| panic!("{step}: {e}"));
                }
            }
        }
        let mut stored = Vec::new();
        let mut folders = vec![self.store()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "qcow2") {
                    stored.push(path);
                }
            }
        }
        for image in &stored {
            qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()])
                .unwrap_or_else(|e| panic!("{step}: {e}"));
        }
        self.ok(&["check", "--read-data"]);
        assert_eq!(self.ok(&["recover"]), "nothing was interrupted", "{step}");
        let strays: Vec<_> = self.files().into_iter().filter(|n| n.contains("knib-new")).collect();
        assert_eq!(strays, Vec::<String>::new(), "{step}");
        assert!(!self.is_mounted(), "{step}: the mount is left");
    }

    fn program(&self) -> common::lab::Lab {
        common::lab::Lab::at(self.guest.dir())
    }

    fn is_mounted(&self) -> bool {
        self.program().is_mounted()
    }

    /// The store's record, the definition and the disk agree on where the volumes are.
    fn agrees(&self, vm: &str, domain: &LibvirtDomain, step: &str) {
        let seen = domain.inspect().unwrap();
        let record = self.record(vm);
        assert_eq!(record["state"], "Ready", "{step}");
        for volume in record["volumes"].as_array().unwrap().iter().filter(|v| v["detached"] != true) {
            let target = volume["target"].as_str().unwrap();
            let found = seen.volumes.iter().find(|v| v.target == target);
            let found = found.unwrap_or_else(|| panic!("{step}: no disk {target}"));
            assert_eq!(volume["path"].as_str().unwrap(), found.chain[0].path.to_str().unwrap(), "{step}");
        }
    }
}

fn virsh(uri: &str, arguments: &[&str]) -> Output {
    Command::new("virsh").args(["-q", "-c", uri]).args(arguments).output().unwrap()
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = virsh(self.guest.uri(), &["destroy", self.guest.name()]);
        self.program().unmount();
    }
}

fn pattern(path: &Path, format: &str, byte: u8) -> bool {
    has_pattern(path, format, byte, "0", "1M")
}

/// Two data disks, of which `vdb` is raw; nothing to boot.
fn two_disks(name: &str) -> Builder {
    Guest::new(name).disk("vda", Disk::qcow2("32M")).disk("vdb", Disk::raw("32M"))
}

/// Writes to the live images of a guest that is off.
fn write(lab: &Lab, byte: u8) {
    for volume in lab.seen().volumes {
        let live = &volume.chain[0];
        qemu_io(&live.path, live.format_name(), &format!("write -P {byte} 0 1M"));
    }
}

fn shows(lab: &Lab, byte: u8, step: &str) {
    for volume in lab.seen().volumes {
        let live = &volume.chain[0];
        assert!(pattern(&live.path, live.format_name(), byte), "{step}: {} has other data", volume.target);
    }
}

/// Restores of a domain that is off: table B, rows 3, 4 and 7, and the next backup full.
#[test]
fn a_domain_that_is_off_is_restored_back_and_forth() {
    let lab = Lab::new(two_disks("restore-off"));
    write(&lab, 1);
    let first = lab.ok(&["backup", "web1"]);
    write(&lab, 2);
    let second = lab.ok(&["backup", "web1"]);
    write(&lab, 3);
    for (backup, byte, row) in [(&first, 1, "B3"), (&second, 2, "B4")] {
        lab.ok(&["restore", backup]);
        shows(&lab, byte, row);
        assert_eq!(lab.files(), ["vda.qcow2", "vdb.raw"], "{row}");
        assert_eq!(lab.chain("vda"), [lab.guest.path("vda.qcow2")], "{row}");
        assert_eq!(lab.chain("vdb"), [lab.guest.path("vdb.raw")], "{row}");
        lab.sound(row);
        lab.agrees("web1", &lab.guest.hypervisor(), row);
    }
    let third = lab.ok(&["backup", "web1"]);
    assert_eq!(lab.kind(&third, "vda"), "full");
    assert!(lab.reason(&third, "vda").contains(&format!("restored from {second}")));
    // The guest starts on it.
    lab.guest.start();
    lab.refused(&["restore", &second], "is running: shut it down");
}

/// Table G, row 1, with what was detached since and what the backup does not know.
#[test]
fn what_was_detached_is_made_again_and_what_is_unknown_stays() {
    let lab = Lab::new(two_disks("restore-detached"));
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    let name = lab.guest.name();
    virsh(uri(), &["detach-disk", name, "vdb", "--config"]);
    let extra = lab.guest.path("extra.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", extra.to_str().unwrap(), "8M"]).unwrap();
    qemu_io(&extra, "qcow2", "write -P 7 0 1M");
    virsh(uri(), &["attach-disk", name, extra.to_str().unwrap(), "vdc", "--config", "--subdriver", "qcow2"]);
    assert_eq!(lab.seen().volumes.len(), 2);
    let between = lab.ok(&["backup", "web1"]);
    assert_eq!(lab.kind(&between, "vdc"), "full");
    // The delta of the detached one was merged: its own image holds all that was written, and nothing else is left of it.
    assert!(pattern(&lab.guest.path("vdb.raw"), "raw", 1));
    assert!(
        !lab.files().iter().any(|name| name.contains("vdb") && name.contains("knib")),
        "{:?}",
        lab.files()
    );
    let (raw, vdc) = (std::fs::read(lab.guest.path("vdb.raw")).unwrap(), lab.chain("vdc"));

    lab.ok(&["restore", &backup]);
    let targets: Vec<_> = lab.seen().volumes.into_iter().map(|v| v.target).collect();
    assert_eq!(targets, ["vda", "vdb", "vdc"]);
    let made = lab.chain("vdb");
    assert_eq!(made, [lab.guest.path("web1-vdb.raw")]);
    assert!(pattern(&made[0], "raw", 1) && pattern(&lab.chain("vda")[0], "qcow2", 1));
    assert!(lab.guest.persistent_xml().contains("<serial>serial-vdb</serial>"));
    assert_eq!(std::fs::read(lab.guest.path("vdb.raw")).unwrap(), raw, "the detached one is left alone");
    assert_eq!(lab.chain("vdc"), vdc, "a volume that the backup does not know stays as it is");
    lab.sound("detached");
    lab.agrees("web1", &lab.guest.hypervisor(), "detached");
    let next = lab.ok(&["backup", "web1"]);
    assert_eq!((lab.kind(&next, "vdb"), lab.kind(&next, "vdc")), ("full".into(), "full".into()));
    // The delta of the volume that stayed was merged by that backup.
    assert_eq!(lab.chain("vdc").len(), 2);
    lab.sound("the next backup");
}

/// Quick restores of a domain with nothing to boot: it runs at once, and all data is pulled.
#[test]
fn a_quick_restore_starts_the_domain_and_pulls_the_data() {
    let lab = Lab::new(two_disks("restore-quick"));
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    write(&lab, 2);
    lab.ok(&["restore", &backup, "--quick"]);
    assert_eq!(lab.seen().power, Power::Running);
    shows(&lab, 1, "quick");
    assert_eq!(lab.chain("vda"), [lab.guest.path("vda.qcow2")]);
    assert_eq!(lab.chain("vdb"), [lab.guest.path("web1-vdb.qcow2")], "an overlay is no raw file");
    assert_eq!(lab.files(), ["vda.qcow2", "web1-vdb.qcow2"]);
    lab.sound("quick");
    lab.agrees("web1", &lab.guest.hypervisor(), "quick");
    lab.guest.destroy();
    let next = lab.ok(&["backup", "web1"]);
    assert_eq!(lab.kind(&next, "vda"), "full");
}

/// A quick restore that pulls so slowly that something can happen meanwhile.
struct Pulling<'a> {
    child: std::process::Child,
    lab: &'a Lab,
}

impl<'a> Pulling<'a> {
    /// Starts it, and waits until data of `vda` is pulled.
    fn start(lab: &'a Lab, arguments: &[&str]) -> Self {
        let mut command = lab.command(&[arguments, &["--quick", "--rate", "1"]].concat());
        let child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        lab.guest.wait("data to be pulled", || lab.is_pulling());
        Self { child, lab }
    }

    /// Its exit code and what it said.
    fn end(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        assert!(self.lab.is_mounted(), "the mount outlives the program");
    }

    fn interrupt(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    }
}

impl Lab {
    /// Changes the guest's definition, as an operator does.
    fn define(&self, xml: &str) {
        let path = self.guest.path("state/edited.xml");
        std::fs::create_dir_all(self.guest.path("state")).unwrap();
        std::fs::write(&path, xml).unwrap();
        let said = virsh(uri(), &["define", path.to_str().unwrap()]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }

    fn is_pulling(&self) -> bool {
        let said = virsh(self.guest.uri(), &["blockjob", self.guest.name(), "vda", "--info", "--raw"]);
        String::from_utf8_lossy(&said.stdout).contains("Block Pull")
    }

    /// Ends the mount's keeper and then its server.
    fn kill_mount(&self) {
        let place = self.program().mount_point().unwrap();
        let server = common::server::pid(&place);
        common::server::kill(common::server::parent(server));
        common::server::kill(server);
    }
}

/// One disk that takes a while to be pulled, restored to the state of its first backup.
fn slow(name: &str) -> (Lab, String) {
    slow_with(name, 6)
}

/// The same with so many MiB of data, and 26 without: each takes a second to be pulled.
fn slow_with(name: &str, mib: u64) -> (Lab, String) {
    let lab = Lab::new(Guest::new(name).disk("vda", Disk::qcow2(&format!("{}M", mib + 26))));
    qemu_io(&lab.chain("vda")[0], "qcow2", &format!("write -P 1 0 {mib}M"));
    let backup = lab.ok(&["backup", "web1"]);
    write(&lab, 2);
    (lab, backup)
}

fn restored(lab: &Lab, step: &str) {
    let live = lab.chain("vda");
    assert_eq!(live, [lab.guest.path("vda.qcow2")], "{step}");
    assert!(has_pattern(&live[0], "qcow2", 1, "0", "6M"), "{step}");
    lab.sound(step);
    lab.agrees("web1", &lab.guest.hypervisor(), step);
}

/// Stopped as asked: the guest runs on, the backup is kept, no backup is taken; `recover` goes on.
#[test]
fn a_quick_restore_that_is_stopped_is_resumed_by_recover() {
    let (lab, backup) = slow("restore-stop");
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    pulling.interrupt();
    let (code, said) = pulling.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("stopped as asked") && said.contains("knibfs recover"), "{said}");
    assert_eq!(lab.seen().power, Power::Running);
    assert!(lab.is_mounted() && !lab.is_pulling());
    assert_eq!(lab.record("web1")["state"], "Restoring");
    lab.refused(&["backup", "web1"], "knibfs recover");
    lab.refused(&["restore", &backup], "is not all pulled yet");
    lab.refused(&["remove", &backup], "");
    assert!(lab.ok(&["recover"]).contains("was finished"));
    restored(&lab, "recover");
}

/// Killed, with the guest running on and with the guest gone as well.
#[test]
fn a_quick_restore_that_is_killed_is_resumed_by_recover() {
    let (lab, backup) = slow("restore-kill");
    Pulling::start(&lab, &["restore", &backup]).kill();
    assert!(lab.is_pulling(), "QEMU goes on by itself");
    assert!(lab.ok(&["recover"]).contains("was finished"));
    assert_eq!(lab.seen().power, Power::Running);
    restored(&lab, "killed");

    lab.guest.destroy();
    write(&lab, 3);
    Pulling::start(&lab, &["restore", &backup]).kill();
    lab.guest.destroy();
    assert!(lab.ok(&["recover"]).contains("was finished"));
    assert_eq!(lab.seen().power, Power::Off, "nobody starts it against the operator's will");
    restored(&lab, "killed and destroyed");
}

/// `virsh destroy` in the middle: the rest is copied while it is off.
#[test]
fn a_guest_that_is_destroyed_is_pulled_to_its_end_while_it_is_off() {
    let (lab, backup) = slow("restore-destroy");
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    lab.guest.destroy();
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    restored(&lab, "destroyed");
}

/// QEMU crashes in the middle, and libvirt is asked to migrate: what was pulled is kept, the rest follows.
#[test]
fn a_guest_that_crashes_or_is_to_be_migrated_is_pulled_to_its_end() {
    let (lab, backup) = slow("restore-crash");
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    let before = lab.guest.live_xml();
    let migrated = virsh(uri(), &["migrate", "--live", "--p2p", "--unsafe", lab.guest.name(), other_uri()]);
    let said = String::from_utf8_lossy(&migrated.stderr).into_owned();
    assert!(!migrated.status.success() && said.contains("block job"), "{said}");
    assert!(lab.is_pulling() && lab.guest.live_xml() == before, "nothing changes");
    let monitor = format!("guest={},", lab.guest.name());
    let found = Command::new("pgrep").args(["-f", &monitor]).output().unwrap();
    let qemu = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    assert!(Command::new("kill").args(["-KILL", &qemu]).status().unwrap().success(), "{qemu}");
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lab.seen().power, Power::Off, "nobody starts it against the operator's will");
    restored(&lab, "crashed");
}

/// QEMU flushes what it pulled while the guest stands still: a crash just then leaves nobody stopped for ever.
#[test]
fn a_guest_that_knibfs_left_paused_is_resumed_by_recover() {
    let lab = Lab::new(two_disks("restore-paused"));
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    write(&lab, 2);
    let mut command = lab.command(&["restore", &backup, "--quick"]);
    let killed = command.env("KNIBFS_FAILPOINT", "pull-flushing").output().unwrap();
    assert!(!killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr));
    assert_eq!(lab.seen().power, Power::Paused);
    assert!(lab.ok(&["recover"]).contains("was finished"));
    assert_eq!(lab.seen().power, Power::Running);
    shows(&lab, 1, "left paused");
    lab.sound("left paused");
    // One that its operator paused stays so.
    lab.guest.destroy();
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    lab.guest.pause();
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lab.seen().power, Power::Paused);
    lab.sound("paused by its operator");
}

/// The servers of the mount are killed, one after the other, while data is pulled from it: the guest and the pull notice nothing.
#[test]
fn servers_of_the_mount_that_are_killed_do_not_disturb_the_pull() {
    let (lab, backup) = slow_with("restore-server", 120);
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    let place = lab.program().mount_point().unwrap();
    for kill in 0..100 {
        assert!(lab.is_pulling(), "the pull ended before kill {kill}");
        common::server::kill_and_wait(&place);
    }
    // The rest as fast as it can.
    let said = virsh(lab.guest.uri(), &["blockjob", lab.guest.name(), "vda", "--bandwidth", "0"]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lab.seen().power, Power::Running);
    restored(&lab, "servers killed");
    assert!(has_pattern(&lab.chain("vda")[0], "qcow2", 1, "0", "120M"));
}

/// The keeper of the mount and its server are killed under the running guest.
#[test]
fn a_mount_that_is_killed_is_mounted_again_under_the_guest() {
    let (lab, backup) = slow("restore-mount");
    let pulling = Pulling::start(&lab, &["restore", &backup]);
    lab.kill_mount();
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lab.seen().power, Power::Running);
    restored(&lab, "mount killed");
}

/// The keeper of the mount and its server are killed, and nobody mounts it again: the guest is paused, sees no error, and goes
/// on where it was after `recover`. Afterwards its definition is as it was.
#[test]
fn a_guest_that_loses_its_mount_is_paused_and_goes_on_after_recover() {
    let lab = Lab::new(with_system("restore-lost"));
    boot(&lab.guest);
    ["vda", "vdb"].iter().for_each(|d| lab.guest.mkfs(d));
    write_in(&lab.guest, "one");
    lab.guest
        .sh("head -c 8M /dev/urandom > /mnt/vda/big; sync; sha256sum < /mnt/vda/big > /mnt/vdb/sum; sync");
    lab.guest.shutdown();
    let name = lab.guest.name().to_owned();
    let edited =
        lab.guest.persistent_xml().replacen("discard='unmap'", "discard='unmap' rerror_policy='report'", 1);
    lab.define(&edited);
    let policies = || {
        let xml = lab.guest.persistent_xml();
        ["vda", "vdb"].map(|disk| error_policy(&xml, disk).unwrap())
    };
    let before = policies();
    assert_eq!(before[0].read.as_deref(), Some("report"));
    let backup = lab.ok(&["backup", "web1"]);

    let mut command = lab.command(&["restore", &backup, "--quick"]);
    let killed = command.env("KNIBFS_FAILPOINT", "restore-started").output().unwrap();
    assert!(!killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr));
    assert_eq!(policies(), [ErrorPolicy::stop(), ErrorPolicy::stop()]);
    lab.guest.wait_for_agent();
    assert_eq!(files_in(&lab.guest, &["vdb"]), ["vdb: one sum"]);
    lab.kill_mount();
    // It reads what is nowhere but in the mount, and writes into clusters of which it changes a part only.
    let line = "sha256sum < /mnt/vda/big > /mnt/vdb/again && echo two > /mnt/vda/two; echo $? > /tmp/code";
    let arguments = serde_json::json!({"path": "/bin/sh", "arg": ["-c", line]});
    // The guest may be paused before its agent has answered.
    let begin = serde_json::json!({"execute": "guest-exec", "arguments": arguments}).to_string();
    let _ = lab.guest.raw().1.qemu_agent_command(&begin, 1, 0);
    lab.guest.wait("QEMU to pause the guest", || {
        let said = virsh(uri(), &["domstate", "--reason", &name]);
        String::from_utf8_lossy(&said.stdout).contains("I/O error")
    });
    assert!(lab.ok(&["recover"]).contains("was finished"));
    assert_eq!(lab.seen().power, Power::Running);
    lab.guest.wait_for_agent();
    lab.guest
        .wait("the guest to go on", || lab.guest.try_exec(&["/bin/sh", "-c", "test -s /tmp/code"]).code == 0);
    assert_eq!(lab.guest.read("/tmp/code"), b"0\n");
    lab.guest.sh("cmp /mnt/vdb/sum /mnt/vdb/again && test \"$(cat /mnt/vda/two)\" = two");
    let log = lab.guest.sh("dmesg");
    assert!(!log.contains("I/O error") && !log.contains("EXT4-fs error"), "{log}");
    assert_eq!(policies(), before);
    lab.sound("the mount was lost");
    lab.agrees("web1", &lab.guest.hypervisor(), "the mount was lost");
}

/// Killed at every named place of a restore to a domain, normal and quick: `recover` ends it either way.
#[test]
fn a_restore_to_a_domain_that_is_killed_is_done_or_undone() {
    let normal = [
        "restore-planned",
        "restore-written",
        "restore-swap",
        "disks-placed",
        "restore-placed",
        "restore-linked",
        "restore-named",
        "restore-dropped",
        "restore-swapped",
        "restore-recorded",
        "restore-done",
    ];
    let quick = ["restore-placed", "restore-recorded", "restore-started", "pull-started", "restore-pulled"];
    let lab = Lab::new(two_disks("restore-points"));
    let places = normal.iter().map(|p| (p, &[][..])).chain(quick.iter().map(|p| (p, &["--quick"][..])));
    for (at, (place, more)) in places.enumerate() {
        let step = format!("{place} {more:?}");
        let (old, new) = (1 + 2 * at as u8, 2 + 2 * at as u8);
        write(&lab, old);
        let backup = lab.ok(&["backup", "web1"]);
        write(&lab, new);
        let arguments = [&["restore", &*backup], more].concat();
        let killed = lab.command(&arguments).env("KNIBFS_FAILPOINT", place).output().unwrap();
        assert!(
            !killed.status.success(),
            "{step} was not reached: {}",
            String::from_utf8_lossy(&killed.stderr)
        );
        lab.ok(&["recover"]);
        if lab.guest.is_running() {
            lab.guest.destroy();
        }
        let undone = ["restore-planned", "restore-written"].contains(place);
        shows(&lab, if undone { new } else { old }, &step);
        assert_eq!(lab.chain("vda").len(), if undone { 2 } else { 1 }, "{step}");
        lab.sound(&step);
        lab.agrees("web1", &lab.guest.hypervisor(), &step);
    }
}

/// `create-vm`, normal and quick, also from a backup whose VM is gone.
#[test]
fn a_backup_becomes_a_new_domain() {
    let lab = Lab::new(
        two_disks("restore-new")
            .devices("<interface type='user'><mac address='52:54:00:12:34:56'/></interface>")
            .devices("<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>"),
    );
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    write(&lab, 2);
    let extra = lab.guest.path("extra.raw");
    let names = ["new", "quick"].map(|n| format!("{}-{n}", lab.guest.name()));
    let _gone = [Gone(names[0].clone()), Gone(names[1].clone())];
    lab.refused(&["create-vm", &backup, "--name", lab.guest.name()], "there is a domain of that name");

    lab.ok(&["create-vm", &backup, "--name", &names[0], "--storage", lab.guest.dir().to_str().unwrap()]);
    let new = domain(&names[0]);
    let seen = new.inspect().unwrap();
    assert_ne!(seen.uuid, lab.seen().uuid);
    assert!(!seen.xml.contains("52:54:00:12:34:56") && seen.xml.contains("<mac address="), "{}", seen.xml);
    assert_eq!((seen.power, seen.volumes.len(), seen.skipped.len()), (Power::Off, 2, 1));
    for volume in &seen.volumes {
        assert!(pattern(&volume.chain[0].path, volume.chain[0].format_name(), 1), "{volume:?}");
    }
    shows(&lab, 2, "the VM that the backup is of stays as it is");
    lab.sound_at("create-vm", &new);
    lab.agrees(&names[0], &new, "create-vm");
    let own = lab.ok(&["backup", &names[0]]);
    assert_eq!(lab.kind(&own, "vda"), "full");

    assert!(virsh(uri(), &["undefine", lab.guest.name()]).status.success());
    let bigger = ["--size", "vda=40M", "--size", "vdb=48M"];
    lab.ok(&[&["create-vm", &backup, "--name", &names[1], "--quick"][..], &bigger[..]].concat());
    let quick = domain(&names[1]);
    assert_eq!(quick.inspect().unwrap().power, Power::Running);
    lab.sound_at("quick", &quick);
    lab.agrees(&names[1], &quick, "quick");
    virsh(uri(), &["destroy", &names[1]]);
    for (volume, size) in quick.inspect().unwrap().volumes.iter().zip(["40 MiB", "48 MiB"]) {
        assert!(pattern(&volume.chain[0].path, "qcow2", 1), "{volume:?}");
        let info = qemu_img(&["info", volume.chain[0].path.to_str().unwrap()]).unwrap();
        assert!(info.contains(&format!("virtual size: {size}")), "{info}");
    }
    assert!(!extra.exists());
}

/// What one domain has for itself besides its disks is not shared by two: the TPM's state is copied, the console's file is another.
#[test]
fn a_new_domain_has_the_state_of_the_tpm_and_a_console_of_its_own() {
    let builder = Guest::new("restore-tpm").disk("vda", Disk::qcow2("16M"));
    let folder = builder.dir().join("tpm");
    std::fs::create_dir(&folder).unwrap();
    let tpm = format!(
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='{}'/></backend></tpm>",
        folder.display()
    );
    let lab = Lab::new(builder.devices(&tpm));
    // Its first start makes the keys of a new TPM.
    lab.guest.start();
    lab.guest.destroy();
    let state = |folder: &Path| std::fs::read(folder.join("tpm2-00.permall")).unwrap();
    let keys = state(&folder);
    let backup = lab.ok(&["backup", "web1"]);
    let name = format!("{}-new", lab.guest.name());
    let own = folder.with_file_name(format!("{name}-tpm"));
    std::fs::create_dir(&own).unwrap();
    lab.refused(&["create-vm", &backup, "--name", &name], "the state of another TPM: choose another name");
    std::fs::remove_dir(&own).unwrap();

    let gone = Gone(name.clone());
    lab.ok(&["create-vm", &backup, "--name", &name]);
    assert_eq!((state(&own), state(&folder)), (keys.clone(), keys));
    let seen = domain(&name).inspect().unwrap();
    assert_eq!(seen.tpm_state.as_deref(), Some(&*own));
    let console = |name: &str| format!("'{}'", lab.guest.path(name).display());
    assert!(seen.xml.contains(&console(&format!("{name}-console.log"))), "{}", seen.xml);
    assert!(!seen.xml.contains(&console("console.log")), "{}", seen.xml);
    // Both run at once.
    lab.guest.start();
    assert!(virsh(uri(), &["start", &name]).status.success());
    drop(gone);
}

fn domain(name: &str) -> LibvirtDomain {
    LibvirtDomain::open(uri(), name, std::sync::Arc::new(common::qemu_images::QemuImages)).unwrap()
}

/// A domain that a test had made, forgotten when it ends.
struct Gone(String);

impl Drop for Gone {
    fn drop(&mut self) {
        virsh(uri(), &["destroy", &self.0]);
        virsh(uri(), &["undefine", &self.0]);
    }
}

/// A block device is overwritten in place, what reads as zeros too; interrupted, it can only be finished.
#[test]
fn a_block_device_is_restored_in_place() {
    let builder = Guest::new("restore-block").disk("vda", Disk::block("16M"));
    let (deltas, elsewhere) = (builder.dir().join("deltas"), builder.dir().join("elsewhere"));
    std::fs::create_dir(&deltas).unwrap();
    std::fs::create_dir(&elsewhere).unwrap();
    let guest = builder.define();
    let lab = Lab { guest };
    lab.ok(&["init", lab.store().to_str().unwrap()]);
    let (name, folder) = (lab.guest.name().to_owned(), deltas.to_str().unwrap());
    lab.ok(&["vm", "add", "web1", "--domain", &name, "--uri", uri(), "--delta-dir", folder]);
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    let device = lab.chain("vda")[1].clone();
    let fill = || {
        let live = lab.seen().volumes[0].chain[0].clone();
        qemu_io(&live.path, live.format_name(), "write -P 2 0 16M");
    };
    let is_restored = |step: &str| {
        assert_eq!(lab.chain("vda"), std::slice::from_ref(&device), "{step}");
        assert!(pattern(&device, "raw", 1) && has_pattern(&device, "raw", 0, "1M", "15M"), "{step}");
        assert_eq!(std::fs::read_dir(&deltas).unwrap().count(), 0, "{step}");
        lab.sound(step);
        lab.agrees("web1", &lab.guest.hypervisor(), step);
    };
    fill();
    lab.ok(&["restore", &backup]);
    is_restored("in place");

    lab.ok(&["backup", "web1"]);
    fill();
    let killed =
        lab.command(&["restore", &backup]).env("KNIBFS_FAILPOINT", "restore-device").output().unwrap();
    assert!(!killed.status.success());
    assert_eq!(lab.record("web1")["state"], "RestoreError");
    lab.ok(&["recover"]);
    is_restored("killed");

    lab.refused(&["restore", &backup, "--quick"], "--storage");
    lab.refused(&["restore", &backup, "--size", "32M"], "use a larger one");
    lab.ok(&["restore", &backup, "--quick", "--storage", elsewhere.to_str().unwrap()]);
    let now = lab.chain("vda");
    assert_eq!(now, [elsewhere.join("web1-vda.qcow2")]);
    assert!(pattern(&now[0], "qcow2", 1));
    lab.sound("elsewhere");
}

/// The rest of what is refused is in `wrong_input_restore.rs`.
#[test]
fn a_vm_with_snapshots_is_not_restored() {
    let lab = Lab::new(two_disks("restore-wrong"));
    write(&lab, 1);
    let backup = lab.ok(&["backup", "web1"]);
    let name = lab.guest.name();
    // A VM snapshot of these volumes.
    let taken = virsh(uri(), &["snapshot-create-as", name, "s1", "--disk-only"]);
    assert!(taken.status.success(), "{taken:?}");
    lab.refused(&["restore", &backup], "has snapshots (s1)");
    assert!(virsh(uri(), &["snapshot-delete", name, "s1", "--metadata"]).status.success());

    lab.ok(&["restore", &backup]);
    lab.sound("after all");
}

/// A guest with a system, with two file systems and room for more disks.
fn with_system(name: &str) -> Builder {
    let root = "<controller type='pci' index='0' model='pcie-root'/>";
    let ports: String =
        (1..=12).map(|n| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>")).collect();
    Guest::new(name)
        .disk("vda", Disk::qcow2("64M"))
        .disk("vdb", Disk::raw("64M"))
        .devices(&format!("{root}{ports}"))
        .with_system()
}

fn boot(guest: &Guest) {
    if !guest.is_running() {
        guest.start();
    }
    guest.wait_for_agent();
}

/// A guest's files, in both file systems: which of the words are there.
fn files_in(guest: &Guest, disks: &[&str]) -> Vec<String> {
    let list = |disk: &&str| {
        let said = guest.sh(&format!("cd /mnt/{disk} && ls | grep -v lost+found | tr '\\n' ' '"));
        format!("{disk}: {}", said.trim())
    };
    disks.iter().map(list).collect()
}

fn write_in(guest: &Guest, word: &str) {
    for disk in ["vda", "vdb"] {
        guest.write(&format!("/mnt/{disk}/{word}"), word.as_bytes());
    }
}

/// Tables G and B (rows 3, 4) on a real guest, its files looked at from inside.
#[test]
fn table_g_restore_backup() {
    let mut lab = Lab::new(with_system("table-g"));
    lab.ok(&["host", "add", "a", "--uri", uri()]);
    lab.ok(&["host", "add", "b", "--uri", other_uri()]);
    boot(&lab.guest);
    ["vda", "vdb"].iter().for_each(|d| lab.guest.mkfs(d));
    write_in(&lab.guest, "one");
    let first = lab.ok(&["backup", "web1"]);
    write_in(&lab.guest, "two");
    let second = lab.ok(&["backup", "web1"]);
    lab.guest.shutdown();

    // Row 1: normal.
    lab.ok(&["restore", &first]);
    lab.sound("G1");
    boot(&lab.guest);
    assert_eq!(files_in(&lab.guest, &["vda", "vdb"]), ["vda: one", "vdb: one"], "G1");
    lab.guest.shutdown();

    // Row 2: quick; what the guest writes meanwhile is kept, also when it is destroyed in the middle.
    let pulling = Pulling::start(&lab, &["restore", &second]);
    lab.guest.wait_for_agent();
    assert_eq!(files_in(&lab.guest, &["vda", "vdb"]), ["vda: one two", "vdb: one two"], "G2");
    write_in(&lab.guest, "three");
    lab.guest.destroy();
    let (code, said) = pulling.end();
    assert_eq!(code, Some(0), "{said}");
    lab.sound("G2");
    lab.agrees("web1", &lab.guest.hypervisor(), "G2");
    boot(&lab.guest);
    let all = ["vda: one three two", "vdb: one three two"];
    assert_eq!(files_in(&lab.guest, &["vda", "vdb"]), all, "G2: what the guest wrote meanwhile is there");
    lab.guest.shutdown();

    // Row 3: on another host. Row 4: the same, back on the first one, with a volume that was detached.
    for (row, host, from, to) in [("G3", "b", uri(), other_uri()), ("G4", "a", other_uri(), uri())] {
        if row == "G4" {
            assert!(
                virsh(from, &["detach-disk", lab.guest.name(), "vdb", "--config"]).status.success(),
                "{row}"
            );
        }
        lab.ok(&["restore", &second, "--quick", "--host", host]);
        assert!(
            !virsh(from, &["domid", lab.guest.name()]).status.success(),
            "{row}: it has left the other host"
        );
        lab.guest.follow(to);
        lab.guest.wait_for_agent();
        assert_eq!(files_in(&lab.guest, &["vda", "vdb"]), ["vda: one two", "vdb: one two"], "{row}");
        lab.sound(row);
        lab.agrees("web1", &lab.guest.hypervisor(), row);
        if row == "G3" {
            lab.guest.shutdown();
        }
    }
    // It is backed up where it is now.
    let next = lab.ok(&["backup", "web1"]);
    assert_eq!(lab.kind(&next, "vda"), "full");
    lab.sound("the next backup");
}

/// Table F on real guests.
#[test]
fn table_f_restore_volume() {
    let lab = Lab::new(with_system("table-f"));
    let mut other = with_system("table-f-other").define();
    lab.ok(&["vm", "add", "web2", "--domain", other.name(), "--uri", uri()]);
    lab.ok(&["host", "add", "b", "--uri", other_uri()]);
    boot(&lab.guest);
    ["vda", "vdb"].iter().for_each(|d| lab.guest.mkfs(d));
    lab.guest.write("/mnt/vda/a", b"a");
    lab.guest.write("/mnt/vdb/b", b"b");
    let backup = lab.ok(&["backup", "web1"]);
    lab.guest.shutdown();
    let volume = |disk: &str, to: &str, more: &[&str]| {
        let disk = format!("{backup}/{disk}");
        let said = lab.ok(&[&["restore-volume", &disk, "--to", to, "--json"], more].concat());
        let said: Value = serde_json::from_str(&said).unwrap();
        said["volumes"][0]["target"].as_str().unwrap().to_owned()
    };

    assert_eq!(volume("vda", "web1", &[]), "vdc", "F1: to its own stopped VM");
    lab.sound("F1");
    boot(&lab.guest);
    assert_eq!(files_in(&lab.guest, &["vda", "vdb", "vdc"]), ["vda: a", "vdb: b", "vdc: a"], "F1");
    assert_eq!(volume("vdb", "web1", &["--size", "128M"]), "vdd", "F2: to its own running VM");
    lab.guest.wait("the new disk", || lab.guest.exists("/dev/vdd"));
    lab.guest.mount("vdd");
    assert_eq!(files_in(&lab.guest, &["vdd"]), ["vdd: b"], "F2");
    assert_eq!(lab.guest.sh("cat /sys/block/vdd/size").trim(), "262144", "F2: a larger one");
    lab.sound("F2");
    lab.agrees("web1", &lab.guest.hypervisor(), "F2");

    boot(&other);
    assert_eq!(volume("vdb", "web2", &[]), "vdc", "F3: to another running VM");
    other.wait("the new disk", || other.exists("/dev/vdc"));
    other.mount("vdc");
    assert_eq!(files_in(&other, &["vdc"]), ["vdc: b"], "F3");
    lab.sound_at("F3", &other.hypervisor());
    lab.agrees("web2", &other.hypervisor(), "F3");
    lab.guest.destroy();
    assert!(virsh(uri(), &["undefine", lab.guest.name()]).status.success());
    for (row, target, more) in
        [("F4: its own VM deleted", "vdd", &[][..]), ("F5: quick", "vde", &["--quick"])]
    {
        assert_eq!(volume("vda", "web2", more), target, "{row}");
        other.wait("the new disk", || other.exists(&format!("/dev/{target}")));
        other.mount(target);
        assert_eq!(files_in(&other, &[target]), [format!("{target}: a")], "{row}");
        lab.sound_at(row, &other.hypervisor());
        lab.agrees("web2", &other.hypervisor(), row);
    }

    lab.refused_for("web2", &backup, "shut it down before it is started on another host");
    other.shutdown();
    assert_eq!(volume("vdb", "web2", &["--quick", "--host", "b"]), "vdf", "F6: quick, stopped, on a host");
    other.follow(other_uri());
    other.wait_for_agent();
    assert_eq!(
        files_in(&other, &["vdc", "vdd", "vde", "vdf"]),
        ["vdc: b", "vdd: a", "vde: a", "vdf: b"],
        "F6"
    );
    lab.sound_at("F6", &other.hypervisor());
    lab.agrees("web2", &other.hypervisor(), "F6");
}

impl Lab {
    fn refused_for(&self, to: &str, backup: &str, words: &str) {
        let disk = format!("{backup}/vdb");
        let said = self.try_run(&["restore-volume", &disk, "--to", to, "--quick", "--host", "b"]);
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.contains(words), "{said}");
    }
}
