//! Real guests of a real libvirt: what they are, snapshots, merges, freezing.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use common::guest::{Disk, Guest, uri};
use common::qemu_images::{QemuImages, has_pattern, qemu_img, qemu_io};
use common::stall;
use knibfs::hypervisor::xml;
use knibfs::hypervisor::{
    Definition, Hypervisor, HypervisorError, ImageFormat, ImageRef, JobControl, JobProgress, LibvirtDomain,
    NewOverlay, Power, Quiesce,
};

static GO_ON: AtomicBool = AtomicBool::new(false);
const CONTROL: JobControl<'static> = JobControl { cancel: &GO_ON, progress: &|_| {}, rate_limit: None };
const LIMIT: Duration = Duration::from_secs(30);

fn overlay(target: &str, path: PathBuf) -> NewOverlay {
    NewOverlay { target: target.into(), path }
}

fn image(path: impl AsRef<Path>, format: ImageFormat) -> ImageRef {
    ImageRef { path: path.as_ref().to_owned(), format }
}

/// The chain of a volume as `inspect` sees it.
fn chain(vm: &LibvirtDomain, target: &str) -> Vec<PathBuf> {
    let guest = vm.inspect().unwrap();
    let volume = guest.volumes.into_iter().find(|v| v.target == target).unwrap();
    volume.chain.into_iter().map(|i| i.path).collect()
}

/// The source of a disk in a definition.
fn source(text: &str, target: &str) -> PathBuf {
    let parsed = xml::parse(text).unwrap();
    parsed.disks.iter().find(|d| d.target == target).unwrap().source.path().unwrap().to_owned()
}

#[test]
fn a_guest_is_seen_as_it_is() {
    let base = tempfile::tempdir().unwrap();
    let template = base.path().join("template.raw");
    qemu_img(&["create", "-q", "-f", "raw", template.to_str().unwrap(), "64M"]).unwrap();
    let clone = base.path().join("clone.qcow2");
    let names = [clone.to_str().unwrap(), template.to_str().unwrap()];
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", names[1], "-F", "raw", names[0]]).unwrap();
    let guest = Guest::new("inspect")
        .disk("vda", Disk::Existing(clone.clone(), "qcow2"))
        .disk("vdb", Disk::raw("8M"))
        .disk("vdc", Disk::block("8M"))
        .disk(
            "sda",
            Disk::Xml("<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>".into()),
        )
        .define();
    let vm = guest.hypervisor();
    for power in [Power::Off, Power::Running, Power::Paused] {
        match power {
            Power::Off => {}
            Power::Running => guest.start(),
            Power::Paused => guest.pause(),
        }
        let seen = vm.inspect().unwrap();
        assert_eq!(seen.power, power);
        assert_eq!(seen.name, guest.name());
        assert_eq!(seen.uuid, Some(guest.uuid()));
        assert!(seen.persistent && !seen.managed_save);
        let [vda, vdb, vdc] = seen.volumes.as_slice() else { panic!("{:?}", seen.volumes) };
        assert_eq!(vda.chain, [image(&clone, ImageFormat::Qcow2), image(&template, ImageFormat::Raw)]);
        assert_eq!(vda.serial.as_deref(), Some("serial-vda"));
        assert_eq!(vdb.chain, [image(guest.path("vdb.raw"), ImageFormat::Raw)]);
        assert!(vdc.block_device && !vdb.block_device);
        assert_eq!(seen.skipped.len(), 1, "the cdrom: {:?}", seen.skipped);
        assert!(seen.xml.starts_with("<domain type="), "the definition of the next run");
    }
}

/// Two snapshots, a merge in the middle, a merge of the live layer; the VM in any state that has a QEMU, or none.
fn snapshots_and_merges(name: &str, power: Power) {
    let guest = Guest::new(name)
        .disk("vda", Disk::qcow2("64M"))
        .disk("vdb", Disk::raw("64M"))
        .disk("vdc", Disk::block("64M"))
        .disk(
            "sda",
            Disk::Xml("<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>".into()),
        )
        .define();
    qemu_io(&guest.path("vda.qcow2"), "qcow2", "write -P 1 0 8M");
    if power != Power::Off {
        guest.start();
    }
    if power == Power::Paused {
        guest.pause();
    }
    let vm = guest.hypervisor();
    let before: Vec<_> = ["vda", "vdb", "vdc"].map(|t| chain(&vm, t)).to_vec();
    let disks = ["vda", "vdb", "vdc"];
    for delta in ["d1", "d2"] {
        let new: Vec<_> = disks.map(|t| overlay(t, guest.path(&format!("{t}.{delta}")))).to_vec();
        let taken = vm.snapshot(&new, Quiesce::No).unwrap();
        assert!(!taken.frozen);
        assert_eq!(taken.volumes.len(), 3);
        for target in disks {
            let expected = guest.path(&format!("{target}.{delta}"));
            let volume = taken.volumes.iter().find(|v| v.target == target).unwrap();
            assert_eq!(volume.chain[0], image(&expected, ImageFormat::Qcow2));
            assert_eq!(source(&guest.persistent_xml(), target), expected);
            assert_eq!(source(&guest.live_xml(), target), expected);
        }
    }
    // Middle layer.
    for (target, old) in disks.iter().zip(&before) {
        let (d1, d2) = (guest.path(&format!("{target}.d1")), guest.path(&format!("{target}.d2")));
        assert_eq!(chain(&vm, target), [d2.clone(), d1.clone(), old[0].clone()]);
        let left = vm.commit(target, &d1, &old[0], &CONTROL).unwrap();
        assert_eq!(left.iter().map(|i| &i.path).collect::<Vec<_>>(), [&d2, &old[0]]);
        assert_eq!(chain(&vm, target), [d2.clone(), old[0].clone()]);
        assert!(d1.exists(), "nothing is unlinked");
        assert_eq!(vm.users_of(&d1).unwrap(), []);
        assert!(!vm.users_of(&d2).unwrap().is_empty());
        assert!(has_pattern(&d2, "qcow2", if *target == "vda" { 1 } else { 0 }, "0", "8M"));
    }
    // Live layer.
    for (target, old) in disks.iter().zip(&before) {
        let d2 = guest.path(&format!("{target}.d2"));
        vm.commit(target, &d2, &old[0], &CONTROL).unwrap();
        assert_eq!(chain(&vm, target), *old);
        assert_eq!(source(&guest.persistent_xml(), target), old[0]);
        assert_eq!(vm.users_of(&d2).unwrap(), []);
    }
    // What is defined starts.
    if power != Power::Off {
        guest.destroy();
    }
    guest.start();
    assert_eq!(disks.map(|t| chain(&vm, t)).to_vec(), before);
}

#[test]
fn a_running_guest_is_snapshot_and_merged() {
    snapshots_and_merges("running", Power::Running);
}

#[test]
fn a_paused_guest_is_snapshot_and_merged() {
    snapshots_and_merges("paused", Power::Paused);
}

#[test]
fn a_guest_that_is_off_is_snapshot_and_merged() {
    snapshots_and_merges("off", Power::Off);
}

#[test]
fn a_guest_that_was_snapshot_running_starts_again_from_its_overlay() {
    let guest = Guest::new("restart").disk("vda", Disk::qcow2("16M")).start();
    let vm = guest.hypervisor();
    vm.snapshot(&[overlay("vda", guest.path("d1"))], Quiesce::No).unwrap();
    guest.destroy();
    assert_eq!(chain(&vm, "vda"), [guest.path("d1"), guest.path("vda.qcow2")]);
    guest.start();
    assert_eq!(chain(&vm, "vda"), [guest.path("d1"), guest.path("vda.qcow2")]);
}

#[test]
fn a_disk_that_is_not_named_takes_no_part() {
    let guest = Guest::new("part").disk("vda", Disk::qcow2("8M")).disk("vdb", Disk::qcow2("8M")).start();
    let vm = guest.hypervisor();
    vm.snapshot(&[overlay("vdb", guest.path("d1"))], Quiesce::No).unwrap();
    assert_eq!(chain(&vm, "vda"), [guest.path("vda.qcow2")]);
    assert_eq!(chain(&vm, "vdb"), [guest.path("d1"), guest.path("vdb.qcow2")]);
}

#[test]
fn a_snapshot_that_fails_changes_nothing() {
    let guest = Guest::new("fails").disk("vda", Disk::qcow2("8M")).disk("vdb", Disk::qcow2("8M")).define();
    let vm = guest.hypervisor();
    std::fs::write(guest.path("taken"), b"mine").unwrap();
    for power in [Power::Off, Power::Running] {
        if power == Power::Running {
            guest.start();
        }
        let before = (guest.live_xml(), guest.persistent_xml());
        for wrong in
            [guest.path("taken"), guest.path("no/such/folder"), guest.path("a:b"), PathBuf::from("d1")]
        {
            let new = [overlay("vda", guest.path("d1")), overlay("vdb", wrong.clone())];
            let error = vm.snapshot(&new, Quiesce::No).unwrap_err();
            assert!(matches!(error, HypervisorError::NotNow { .. }), "{error}");
        }
        let error = vm.snapshot(&[overlay("vdz", guest.path("d1"))], Quiesce::No).unwrap_err();
        assert!(error.to_string().contains("vda, vdb"), "names what there is: {error}");
        assert_eq!((guest.live_xml(), guest.persistent_xml()), before);
        assert!(!guest.path("d1").exists());
        assert_eq!(std::fs::read(guest.path("taken")).unwrap(), b"mine");
    }
}

#[test]
fn only_neighbours_in_the_chain_are_merged() {
    let guest = Guest::new("order").disk("vda", Disk::qcow2("8M")).start();
    let vm = guest.hypervisor();
    let d1 = guest.path("d1");
    vm.snapshot(&[overlay("vda", d1.clone())], Quiesce::No).unwrap();
    let base = guest.path("vda.qcow2");
    for (top, bottom) in [(&base, &d1), (&d1, &d1), (&guest.path("else"), &base)] {
        let error = vm.commit("vda", top, bottom, &CONTROL).unwrap_err();
        assert!(matches!(error, HypervisorError::NotInChain { .. }), "{error}");
    }
    assert_eq!(chain(&vm, "vda"), [d1, base]);
}

#[test]
fn a_base_that_others_stand_on_is_never_written() {
    for running in [true, false] {
        let base = tempfile::tempdir().unwrap();
        let template = base.path().join("template.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", template.to_str().unwrap(), "8M"]).unwrap();
        let clone = |name: &str| {
            let path = base.path().join(name);
            let (p, t) = (path.to_str().unwrap(), template.to_str().unwrap());
            qemu_img(&["create", "-q", "-f", "qcow2", "-b", t, "-F", "qcow2", p]).unwrap();
            path
        };
        let (one, two) = (clone("one"), clone("two"));
        let guest = Guest::new("shared").disk("vda", Disk::Existing(one.clone(), "qcow2")).define();
        let other = Guest::new("neighbour").disk("vda", Disk::Existing(two, "qcow2")).define();
        if running {
            guest.start();
        }
        let vm = guest.hypervisor();
        let users = vm.users_of(&template).unwrap();
        let neighbours: Vec<_> = users.iter().filter(|u| u.uuid == Some(other.uuid())).collect();
        assert_eq!(neighbours.len(), 1, "{users:?}");
        assert_eq!((neighbours[0].depth, &neighbours[0].definition), (1, &Definition::Persistent));
        let error = vm.commit("vda", &one, &template, &CONTROL).unwrap_err();
        assert!(matches!(error, HypervisorError::Shared { .. }), "{error}");
        assert!(error.to_string().contains(other.name()), "says who: {error}");
        assert_eq!(chain(&vm, "vda"), [one, template]);
    }
}

#[test]
fn users_are_found_under_another_name() {
    let guest = Guest::new("names").disk("vda", Disk::qcow2("8M")).define();
    let vm = guest.hypervisor();
    let link = guest.path("link");
    std::os::unix::fs::symlink(guest.path("vda.qcow2"), &link).unwrap();
    assert_eq!(vm.users_of(&link).unwrap().len(), 1);
    assert_eq!(vm.users_of(&guest.path("nothing")).unwrap(), []);
}

#[test]
fn a_merge_can_be_stopped_and_taken_up_again() {
    let guest = Guest::new("stop").disk("vda", Disk::qcow2("64M")).define();
    let vm = guest.hypervisor();
    let (d1, base) = (guest.path("d1"), guest.path("vda.qcow2"));
    vm.snapshot(&[overlay("vda", d1.clone())], Quiesce::No).unwrap();
    qemu_io(&d1, "qcow2", "write -P 5 0 32M");
    guest.start();

    let cancel = AtomicBool::new(false);
    let stop_at_first = |_: JobProgress| cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    let slow = JobControl { cancel: &cancel, progress: &stop_at_first, rate_limit: Some(1 << 20) };
    let error = vm.commit("vda", &d1, &base, &slow).unwrap_err();
    assert!(matches!(error, HypervisorError::Cancelled { .. }), "{error}");
    assert_eq!(chain(&vm, "vda"), [d1.clone(), base.clone()]);

    // As after a crash of knibfs: libvirt's job runs on by itself, and is taken over.
    let virsh =
        ["-c", uri(), "blockcommit", guest.name(), "vda", "--active", "--base", base.to_str().unwrap()];
    assert!(std::process::Command::new("virsh").args(virsh).status().unwrap().success());
    vm.commit("vda", &d1, &base, &CONTROL).unwrap();
    assert_eq!(chain(&vm, "vda"), std::slice::from_ref(&base));
    assert!(has_pattern(&base, "qcow2", 5, "0", "32M"));
}

#[test]
fn a_definition_that_went_stale_is_not_built_upon() {
    let guest = Guest::new("stale").disk("vda", Disk::qcow2("8M")).start();
    let vm = guest.hypervisor();
    let stale = guest.persistent_xml().replace("vda.qcow2", "gone.qcow2");
    guest.raw().0.define_domain_xml(&stale).unwrap();
    let error = vm.snapshot(&[overlay("vda", guest.path("d1"))], Quiesce::No).unwrap_err();
    assert!(error.to_string().contains("gone.qcow2"), "{error}");
    assert_eq!(chain(&vm, "vda"), [guest.path("vda.qcow2")]);
}

#[test]
fn a_guest_whose_memory_is_saved_keeps_its_disks() {
    let guest = Guest::new("saved").disk("vda", Disk::qcow2("8M")).start();
    let vm = guest.hypervisor();
    guest.raw().1.managed_save(0).unwrap();
    assert!(vm.inspect().unwrap().managed_save);
    let error = vm.snapshot(&[overlay("vda", guest.path("d1"))], Quiesce::No).unwrap_err();
    assert!(error.to_string().contains("managedsave-remove"), "{error}");
    assert!(!guest.path("d1").exists());
}

#[test]
fn what_is_wrong_is_said_with_the_way_out() {
    let images = Arc::new(QemuImages);
    let error =
        LibvirtDomain::open("qemu+unix:///system?socket=/nowhere/sock", "x", images.clone()).unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("systemctl start libvirtd"), "{error}");
    let error = LibvirtDomain::open(uri(), "no-such-domain", images).unwrap_err();
    assert!(error.to_string().contains("no domain \"no-such-domain\""), "{error}");
}

#[test]
fn quiesce_without_an_agent_changes_nothing() {
    let guest = Guest::new("noagent").disk("vda", Disk::qcow2("8M")).start();
    let vm = guest.hypervisor();
    let required = Quiesce::Required { limit: LIMIT };
    let error = vm.snapshot(&[overlay("vda", guest.path("d1"))], required).unwrap_err();
    assert!(matches!(error, HypervisorError::AgentMissing { .. }), "{error}");
    assert!(error.to_string().contains("qemu-guest-agent"), "{error}");
    assert!(!guest.path("d1").exists());
    assert_eq!(chain(&vm, "vda"), [guest.path("vda.qcow2")]);

    let best = Quiesce::BestEffort { limit: LIMIT };
    let taken = vm.snapshot(&[overlay("vda", guest.path("d1"))], best).unwrap();
    assert!(!taken.frozen);
    assert_eq!(taken.notes.len(), 1, "{:?}", taken.notes);
}

#[test]
fn a_frozen_snapshot_holds_a_clean_file_system_and_the_guest_goes_on() {
    let guest = Guest::new("quiesce").disk("vda", Disk::qcow2("128M")).with_system().start();
    guest.wait_for_agent();
    guest.mkfs("vda");
    guest.write("/mnt/vda/before", b"before");
    let vm = guest.hypervisor();
    vm.agent_ping(LIMIT).unwrap();
    let taken = vm.snapshot(&[overlay("vda", guest.path("d1"))], Quiesce::Required { limit: LIMIT }).unwrap();
    assert!(taken.frozen, "{:?}", taken.notes);
    assert!(!guest.is_frozen());
    guest.write("/mnt/vda/after", b"after");
    // A frozen ext4 has an empty journal: it need not be recovered.
    let raw = guest.path("frozen.raw");
    let base = guest.path("vda.qcow2");
    let args = ["convert", "-U", "-f", "qcow2", "-O", "raw", base.to_str().unwrap(), raw.to_str().unwrap()];
    qemu_img(&args).unwrap();
    let out = std::process::Command::new("dumpe2fs").arg("-h").arg(&raw).output().unwrap();
    let head = String::from_utf8_lossy(&out.stdout);
    assert!(head.contains("Filesystem features") && !head.contains("needs_recovery"), "{head}");

    vm.commit("vda", &guest.path("d1"), &base, &CONTROL).unwrap();
    guest.destroy();
    guest.start();
    guest.wait_for_agent();
    assert_eq!(guest.read("/mnt/vda/before"), b"before");
    assert_eq!(guest.read("/mnt/vda/after"), b"after");
}

#[test]
fn a_guest_that_refuses_to_freeze_is_thawed_and_not_snapshot() {
    let guest = Guest::new("refuses").disk("vda", Disk::qcow2("64M")).with_system().start();
    guest.wait_for_agent();
    guest.mkfs("vda");
    // The agent refuses a second freeze.
    guest.agent(serde_json::json!({"execute": "guest-fsfreeze-freeze"})).unwrap();
    let vm = guest.hypervisor();
    let required = Quiesce::Required { limit: LIMIT };
    let error = vm.snapshot(&[overlay("vda", guest.path("d1"))], required).unwrap_err();
    assert!(matches!(error, HypervisorError::Freeze { thawed: true, .. }), "{error}");
    assert!(!guest.is_frozen());
    assert_eq!(chain(&vm, "vda"), [guest.path("vda.qcow2")]);
    assert!(!guest.path("d1").exists());
}

#[test]
fn a_guest_is_thawed_when_the_program_that_froze_it_is_killed() {
    let guest = Guest::new("killed").disk("vda", Disk::qcow2("64M")).with_system().start();
    guest.wait_for_agent();
    guest.mkfs("vda");
    // The helper, as knibfs starts it, and then the end of the pipe without a word.
    let guard = knibfs::hypervisor::thaw_guard::ThawGuard::start(
        Path::new(env!("CARGO_BIN_EXE_knibfs")),
        uri(),
        &guest.uuid().to_string(),
        Duration::from_secs(600),
    )
    .unwrap();
    guest.agent(serde_json::json!({"execute": "guest-fsfreeze-freeze"})).unwrap();
    assert!(guest.is_frozen());
    drop(guard);
    guest.wait("the thaw", || !guest.is_frozen());

    // And its own limit, with the pipe still open.
    let guard = knibfs::hypervisor::thaw_guard::ThawGuard::start(
        Path::new(env!("CARGO_BIN_EXE_knibfs")),
        uri(),
        &guest.uuid().to_string(),
        Duration::from_secs(1),
    )
    .unwrap();
    guest.agent(serde_json::json!({"execute": "guest-fsfreeze-freeze"})).unwrap();
    guest.wait("the thaw", || !guest.is_frozen());
    drop(guard);
}

#[test]
fn the_guest_sees_no_error_and_its_data_stay_whole_through_snapshots_and_merges() {
    let guest = Guest::new("stall").disk("vda", Disk::qcow2("128M")).with_system().start();
    guest.wait_for_agent();
    guest.mkfs("vda");
    guest.write("/mnt/vda/file", b"kept");
    let vm = guest.hypervisor();
    let base = guest.path("vda.qcow2");
    let ((), stall) = stall::measure(&guest, "/mnt/vda", || {
        vm.snapshot(&[overlay("vda", guest.path("d1"))], Quiesce::No).unwrap();
        vm.snapshot(&[overlay("vda", guest.path("d2"))], Quiesce::No).unwrap();
        vm.commit("vda", &guest.path("d1"), &base, &CONTROL).unwrap();
        vm.commit("vda", &guest.path("d2"), &base, &CONTROL).unwrap();
    });
    eprintln!("longest write during two snapshots and two merges: {:?} of {}", stall.longest, stall.writes);
    assert_eq!(stall.errors, 0);
    assert_eq!(chain(&vm, "vda"), std::slice::from_ref(&base));
    guest.destroy();
    guest.start();
    guest.wait_for_agent();
    assert_eq!(guest.read("/mnt/vda/file"), b"kept");
    let format = "qcow2";
    guest.destroy();
    qemu_img(&["check", "-q", "-f", format, base.to_str().unwrap()]).unwrap();
}
