//! A libvirt that is restarted or hangs while knibfs works with it, and guests that end in the middle of a pull. Each test
//! has a libvirt of its own.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use common::guest::{Builder, Disk, Guest};
use common::lab::{Lab, Running, tool};
use common::own_libvirt::OwnLibvirt;
use common::qemu_images::{has_pattern, qemu_io};
use common::sound::{assert_sound, chain};

struct World {
    guest: Guest,
    lab: Lab,
    libvirt: OwnLibvirt,
}

impl World {
    fn new(test: &str, builder: Builder) -> Self {
        let libvirt = OwnLibvirt::start(test);
        let guest = builder.at(libvirt.uri()).define();
        let lab = Lab::at(guest.dir()).init();
        lab.ok(&["vm", "add", "web1", "--domain", guest.name(), "--uri", libvirt.uri()]);
        Self { guest, lab, libvirt }
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        let out =
            Command::new("virsh").args(["-q", "-c", self.libvirt.uri()]).args(arguments).output().unwrap();
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
    }

    fn is_pulling(&self) -> bool {
        self.virsh(&["blockjob", self.guest.name(), "vda", "--info", "--raw"]).contains("Block Pull")
    }

    /// A quick restore of the last backup that has begun to pull, slowly.
    fn pulling(&self) -> Running {
        let mut running =
            Running::start(&self.lab, &["restore", "web1/latest", "--quick", "--rate", "1"], None);
        running.wait("data to be pulled", |_| self.is_pulling());
        running
    }

    /// As after a crash of the host's memory: no moment to flush anything.
    fn kill_qemu(&self) {
        let monitor = format!("guest={},", self.guest.name());
        tool("kill", &["-KILL", tool("pgrep", &["-f", &monitor]).trim()]);
    }

    /// The daemon is away for a while in which knibfs asks it.
    fn restart_libvirt(&mut self, running: &mut Running) {
        self.libvirt.end_daemon();
        // What it does meanwhile is to wait: it looks twice a second.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(2);
        running.wait("time to pass", |_| std::time::Instant::now() > until);
        self.libvirt.start_daemon();
        let uri = self.libvirt.uri().to_owned();
        self.guest.follow(&uri);
    }

    fn is_restored(&self, step: &str) {
        assert_eq!(chain(&self.guest, "vda"), [self.guest.path("vda.qcow2")], "{step}");
        assert_sound(&self.lab, &[&self.guest], step);
        assert!(!self.lab.is_mounted(), "{step}: the mount is left");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.virsh(&["destroy", self.guest.name()]);
        self.lab.unmount();
    }
}

/// What a guest writes while its data is pulled is there whatever becomes of libvirt, of the guest and of its QEMU meanwhile.
#[test]
fn what_a_guest_wrote_during_a_pull_outlives_libvirts_restart_its_crash_and_its_shutdown() {
    let builder = Guest::new("trouble-guest").disk("vda", Disk::qcow2("64M")).with_system();
    let mut world = World::new("trouble-guest", builder);
    world.guest.start();
    world.guest.wait_for_agent();
    world.guest.mkfs("vda");
    world.guest.sh("head -c 12M /dev/urandom > /mnt/vda/big; sha256sum < /mnt/vda/big > /mnt/vda/sum; sync");
    world.lab.ok(&["backup", "web1"]);
    world.guest.shutdown();

    let mut pulling = world.pulling();
    world.guest.wait_for_agent();
    world.guest.write("/mnt/vda/before", b"before");
    world.restart_libvirt(&mut pulling);
    world.guest.wait_for_agent();
    world.guest.write("/mnt/vda/after", b"after");
    // Live migration is libvirt's to refuse while the job runs: nothing changes.
    let live = world.guest.live_xml();
    let migrated = world.virsh(&[
        "migrate",
        "--live",
        "--unsafe",
        "--p2p",
        world.guest.name(),
        "qemu+unix:///system?socket=/none",
    ]);
    assert!(migrated.contains("block job"), "{migrated}");
    assert!(world.is_pulling() && world.guest.live_xml() == live);
    world.kill_qemu();
    let (done, _, said) = pulling.end();
    assert!(done, "{said}");
    assert!(!world.guest.is_running(), "nobody starts it against the operator's will");
    world.is_restored("crashed");

    let has = |files: &[&str]| {
        world.guest.start();
        world.guest.wait_for_agent();
        for file in files {
            assert_eq!(world.guest.read(&format!("/mnt/vda/{file}")), file.as_bytes());
        }
        world.guest.sh("sha256sum < /mnt/vda/big | cmp - /mnt/vda/sum");
    };
    has(&["before", "after"]);
    world.lab.ok(&["backup", "web1"]);
    world.guest.shutdown();
    let pulling = world.pulling();
    world.guest.wait_for_agent();
    world.guest.write("/mnt/vda/last", b"last");
    world.guest.shutdown();
    let (done, _, said) = pulling.end();
    assert!(done, "{said}");
    world.is_restored("shut down");
    has(&["before", "after", "last"]);
}

/// Before anything is begun, and in the middle, with a backup in the store and its parent's delta not merged yet.
#[test]
fn a_libvirt_that_hangs_ends_an_operation_with_a_sentence_and_recover_finishes_it() {
    let world = World::new("trouble-hang", Guest::new("trouble-hang").disk("vda", Disk::qcow2("16M")));
    qemu_io(&world.guest.path("vda.qcow2"), "qcow2", "write -P 1 0 1M");
    world.guest.start();
    world.lab.ok(&["backup", "web1"]);
    world.lab.ok(&["setting", "set", "knib.timeout", "1"]);
    let before = world.lab.seen();
    world.libvirt.signal("-STOP");
    for command in
        [&["backup", "web1"][..], &["vm", "remove", "web1"], &["restore", "web1/latest", "--quick"]]
    {
        world.lab.refused(command, &["hangs", "no answer within 1 s", "knib.timeout"]);
    }
    world.libvirt.signal("-CONT");
    before.assert_same(&world.lab.seen(), "operations while libvirt hangs");

    world.lab.ok(&["setting", "set", "knib.timeout", "10"]);
    let running = Running::start(&world.lab, &["backup", "web1"], Some("backup-published"));
    world.libvirt.signal("-STOP");
    running.go_on();
    let (done, _, said) = running.end();
    assert!(!done && said.contains("hangs") && said.contains("`knibfs recover`"), "{said}");
    world.libvirt.signal("-CONT");
    world.lab.ok(&["setting", "set", "knib.timeout", "43200"]);
    assert!(world.lab.ok(&["recover"]).contains("was finished"));
    assert_sound(&world.lab, &[&world.guest], "after it hung");
    let next = world.lab.backup(&[]);
    assert_eq!(world.lab.kind(&next).0, "incremental");
    assert!(has_pattern(&next.join("vda.qcow2"), "qcow2", 1, "0", "1M"));
    assert_eq!(chain(&world.guest, "vda").len(), 2);
}
