//! `remove`, row by row of the table "Removal", on the real program.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use common::disk_lab::DiskLab as Lab;
use common::failpoints::{self, List};
use common::killed::Seen;
use knibfs::store::manifest::BackupState::{BackedUp, Error, Removed};
use knibfs::store::manifest::Kind::{Full, Incremental};
use rustix::mount::{MountFlags, UnmountFlags};

fn name(backup: &str) -> &str {
    backup.split_once('/').unwrap().1
}

#[test]
fn one_with_a_living_child_is_hidden_and_its_files_are_kept() {
    let lab = Lab::new("scan");
    let b = lab.backups(3);
    let copy = lab.keep("copy.raw");
    let said = lab.ok(&["remove", &b[1]]);
    assert!(said.contains("hidden"), "{said}");
    assert_eq!(lab.state(&b[1]), Some(Removed));
    assert_eq!(lab.listed("web1"), [b[0].clone(), b[2].clone()]);
    assert!(lab.folder(&b[1]).join("root.qcow2").exists());
    lab.shows(&b[2], &copy);
    lab.check();
    assert_eq!(lab.next_kind().0, "incremental");
    let again = lab.fails(&["remove", &b[1]]);
    assert!(again.contains("removed already"), "{again}");
}

#[test]
fn the_current_one_has_its_deltas_merged_and_its_parent_ends_its_chain() {
    for track in ["scan", "overlay"] {
        let lab = Lab::new(track);
        let b = lab.backups(2);
        lab.write("web1", "write -P 77 9M 64k");
        let copy = lab.keep("copy.raw");
        assert_eq!(lab.deltas().len(), usize::from(track == "overlay"));
        lab.ok(&["remove", &b[1]]);
        assert_eq!(lab.deltas(), Vec::<String>::new(), "merged into the volume");
        lab.disk_shows(&copy);
        assert_eq!(lab.folders("web1"), [name(&b[0])]);
        assert!(lab.manifest(&b[0]).unwrap().end_of_chain);
        assert_eq!(lab.record("web1").tracking.current, None);
        let (kind, why) = lab.next_kind();
        assert_eq!((kind.as_str(), why.contains("ended")), ("full", true), "{why}");
        lab.check();
    }
}

#[test]
fn a_leaf_goes_with_each_removed_ancestor_up_to_the_first_living_one() {
    let lab = Lab::new("overlay");
    let b = lab.backups(4);
    lab.ok(&["remove", &b[1]]);
    lab.ok(&["remove", &b[2]]);
    assert_eq!(lab.folders("web1").len(), 4);
    let said = lab.ok(&["remove", &b[3]]);
    assert!(said.contains(&format!("{}, which was kept", b[2])), "{said}");
    assert_eq!(lab.folders("web1"), [name(&b[0])]);
    assert!(lab.manifest(&b[0]).unwrap().end_of_chain, "the first living one ends its chain");
    assert_eq!(lab.state(&b[0]), Some(BackedUp));
    lab.check();
}

#[test]
fn a_leaf_that_is_not_current_leaves_the_living_chain_alone() {
    let lab = Lab::new("overlay");
    lab.ok(&["setting", "set", "backup.chain.size", "2"]);
    let b = lab.backups(3);
    let deltas = lab.deltas();
    lab.ok(&["remove", &b[1]]);
    assert_eq!(lab.deltas(), deltas);
    assert_eq!(lab.listed("web1"), [b[0].clone(), b[2].clone()]);
    assert_eq!(lab.next_kind().0, "incremental");
}

#[test]
fn an_isolated_one_is_just_deleted() {
    let lab = Lab::new("overlay");
    lab.backup();
    let isolated = lab.isolated();
    let deltas = lab.deltas();
    lab.ok(&["remove", &isolated]);
    assert!(lab.manifest(&isolated).is_none());
    assert_eq!(lab.deltas(), deltas);
    assert_eq!(lab.next_kind().0, "incremental");
}

#[test]
fn the_only_one_leaves_a_vm_whose_next_backup_is_its_first() {
    let lab = Lab::new("overlay");
    let only = lab.backup();
    lab.ok(&["remove", "web1/latest"]);
    assert!(lab.manifest(&only).is_none());
    assert_eq!((lab.folders("web1"), lab.deltas()), (vec![], vec![]));
    let (kind, why) = lab.next_kind();
    assert_eq!((kind.as_str(), why.contains("first")), ("full", true), "{why}");
}

#[test]
fn a_batch_is_any_set_in_any_order() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let lab = Lab::new("overlay");
        let b = lab.backups(4);
        let targets: Vec<&str> = order.iter().map(|at| b[*at].as_str()).collect();
        lab.ok(&[&["remove"], targets.as_slice()].concat());
        assert_eq!((lab.folders("web1"), lab.deltas()), (vec![], vec![]), "all gone");
    }
    // Not the last: what it stands on is kept hidden, what nothing stands on is gone.
    let lab = Lab::new("scan");
    lab.ok(&["setting", "set", "backup.chain.size", "3"]);
    let b = lab.backups(5);
    lab.ok(&["remove", &b[0], &b[3], &b[2], &b[0]]);
    let states: Vec<_> = b.iter().map(|b| lab.state(b)).collect();
    assert_eq!(states, [Some(Removed), Some(BackedUp), None, Some(Removed), Some(BackedUp)]);
    assert!(lab.manifest(&b[1]).unwrap().end_of_chain);
    lab.check();
}

#[test]
fn a_batch_over_several_vms_is_removed_or_refused_as_a_whole() {
    let lab = Lab::new("scan");
    lab.add_vm("db", "scan");
    let (web, db) = (lab.backup(), lab.backup_of("db", Default::default()));
    let refused = lab.fails(&["remove", &db, &web, "web1/2020-01-01T00-00-00Z"]);
    assert!(refused.contains("there is no backup \"web1/2020-01-01T00-00-00Z\""), "{refused}");
    assert!(lab.manifest(&web).is_some() && lab.manifest(&db).is_some(), "nothing was removed");
    lab.ok(&["remove", &web, &db]);
    assert_eq!((lab.folders("web1"), lab.folders("db")), (vec![], vec![]));
}

#[test]
fn table_b_rows_6_to_8() {
    let lab = Lab::new("overlay");
    lab.ok(&["setting", "set", "backup.chain.size", "3"]);
    lab.ok(&["offering", "create", "daily"]);
    let mut b = lab.backups(2);
    // The restores of rows 3 and 4 end the chain; so does taking the VM off its offering.
    lab.ok(&["vm", "assign", "web1", "daily"]);
    lab.ok(&["vm", "unassign", "web1"]);
    b.extend(lab.backups(4));
    let kinds: Vec<_> = b.iter().map(|b| lab.manifest(b).unwrap().disks[0].kind).collect();
    assert_eq!(kinds, [Full, Incremental, Full, Incremental, Incremental, Full], "5: b3 and b6 are full");
    assert_eq!(lab.deltas().len(), 1);
    lab.ok(&["remove", &b[5]]);
    assert_eq!(lab.deltas(), Vec::<String>::new(), "6: remove b6: the delta on primary is merged");
    lab.ok(&["remove", &b[3]]);
    assert_eq!(lab.state(&b[3]), Some(Removed), "7: remove b4: kept, as b5 stands on it");
    let out = lab.path("b5.raw");
    lab.ok(&["export", &format!("{}/root", b[4]), out.to_str().unwrap(), "-O", "raw"]);
    lab.ok(&["remove", &b[4]]);
    assert!(lab.manifest(&b[4]).is_none() && lab.manifest(&b[3]).is_none(), "7: both are deleted");
    lab.ok(&["remove", &b[2], &b[0], &b[1]]);
    assert_eq!(lab.folders("web1"), Vec::<String>::new(), "8: remove the rest in one batch: all gone");
}

#[test]
fn one_in_use_is_refused_and_its_user_named() {
    let lab = Lab::new("scan");
    let b = lab.backups(3);
    let lease = lab.store().lease(lab.manifest(&b[2]).unwrap().id, "quick restore of web9").unwrap();
    let before = lab.folders("web1");
    for force in [&[][..], &["--force"]] {
        let refused = lab.fails(&[&["remove", b[2].as_str()], force].concat());
        assert!(refused.contains("quick restore of web9"), "{refused}");
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    }
    assert_eq!(lab.folders("web1"), before);
    // A removed ancestor that would be deleted with the leaf counts as well.
    drop(lease);
    lab.ok(&["remove", &b[1]]);
    let lease = lab.store().lease(lab.manifest(&b[1]).unwrap().id, "mounted at /mnt").unwrap();
    let refused = lab.fails(&["remove", &b[2]]);
    assert!(refused.contains("mounted at /mnt"), "{refused}");
    assert_eq!(lab.folders("web1"), before);
    drop(lease);
    lab.ok(&["remove", &b[2]]);
    assert_eq!(lab.folders("web1"), [name(&b[0])]);
}

/// A file that is a mount point cannot be deleted, by root neither.
struct Pinned(std::path::PathBuf);

impl Pinned {
    fn new(path: &Path) -> Self {
        rustix::mount::mount_bind(path, path).expect("bind mounts need root: run the tests as root");
        Self(path.to_owned())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn files_that_cannot_be_deleted_leave_the_backup_in_state_error() {
    let lab = Lab::new("overlay");
    let b = lab.backups(3);
    lab.ok(&["remove", &b[1]]);
    let pin = Pinned::new(&lab.folder(&b[2]).join("root.qcow2"));
    let said = lab.fails(&["remove", &b[2], &b[0]]);
    assert!(said.contains(&b[2]) && said.contains("state Error") && said.contains("--force"), "{said}");
    assert_eq!(lab.state(&b[2]), Some(Error));
    assert_eq!(lab.state(&b[1]), Some(Removed), "nothing that it stands on is deleted");
    assert_eq!(lab.state(&b[0]), Some(Removed), "it was asked for, and is needed");
    assert!(lab.ok(&["list"]).contains("Error"));
    assert!(lab.store().unfinished().unwrap().is_empty(), "nothing is left to recover");
    drop(pin);
    lab.ok(&["remove", &b[2]]);
    assert_eq!(lab.folders("web1"), Vec::<String>::new());
}

#[test]
fn forced_drops_the_record_and_reports_what_is_left() {
    let lab = Lab::new("scan");
    let b = lab.backups(2);
    let pin = Pinned::new(&lab.folder(&b[1]).join("root.qcow2"));
    let said = lab.ok(&["remove", "--force", &b[1]]);
    let id = said.lines().find_map(|l| l.strip_prefix("left: ")).unwrap();
    assert!(id.ends_with("/root.qcow2") && Path::new(id).exists(), "{said}");
    assert_eq!(lab.listed("web1"), [b[0].clone()]);
    assert!(lab.manifest(&b[1]).is_none());
    lab.check();
    // The path moved with its folder.
    let moved = Pinned(Path::new(id).to_owned());
    std::mem::forget(pin);
    drop(moved);
    assert!(lab.ok(&["recover"]).contains("what was left of a deleted backup"));
    assert_eq!(lab.folders("web1"), [name(&b[0])]);
}

#[test]
fn a_damaged_manifest_is_refused_and_forced() {
    let lab = Lab::new("scan");
    let b = lab.backups(3);
    std::fs::write(lab.folder(&b[1]).join("manifest.json"), "{}").unwrap();
    let said = lab.fails(&["remove", &b[1]]);
    assert!(said.contains("damaged") && said.contains("--force"), "{said}");
    // Its image says what it stands on: that one is not deleted under it.
    lab.ok(&["remove", &b[0]]);
    assert_eq!(lab.state(&b[0]), Some(Removed));
    let said = lab.fails(&["remove", "--force", &b[1]]);
    assert!(said.contains("other backups stand on it"), "{said}");
    lab.ok(&["remove", "--force", &b[1], &b[2]]);
    assert_eq!(lab.folders("web1"), Vec::<String>::new());
}

#[test]
fn nothing_is_deleted_under_a_damaged_backup_that_might_stand_on_it() {
    let lab = Lab::new("scan");
    let b = lab.backups(2);
    for file in ["manifest.json", "root.qcow2"] {
        std::fs::write(lab.folder(&b[1]).join(file), "{}").unwrap();
    }
    let said = lab.fails(&["remove", &b[0]]);
    assert!(said.contains(&b[1]) && said.contains("cannot be told"), "{said}");
    lab.ok(&["remove", "--force", &b[1]]);
    lab.ok(&["remove", &b[0]]);
    assert_eq!(lab.folders("web1"), Vec::<String>::new());
}

#[test]
fn a_primary_that_is_gone_refuses_the_current_one_unless_forced() {
    let lab = Lab::new("overlay");
    let b = lab.backups(2);
    std::fs::rename(lab.disk("web1"), lab.path("away.img")).unwrap();
    let said = lab.fails(&["remove", &b[1]]);
    assert!(said.contains("deltas") && said.contains("--force"), "{said}");
    assert_eq!(lab.listed("web1"), b);
    let said = lab.ok(&["remove", "--force", &b[1]]);
    assert!(said.contains("were left"), "{said}");
    assert_eq!(lab.listed("web1"), [b[0].clone()]);
    std::fs::rename(lab.path("away.img"), lab.disk("web1")).unwrap();
    let copy = lab.keep("copy.raw");
    lab.disk_shows(&copy);
    let (kind, _) = lab.next_kind();
    assert_eq!((kind.as_str(), lab.deltas().len()), ("full", 1), "the delta that was left was merged");
}

#[test]
fn a_delta_on_an_image_that_it_was_not_made_on_is_never_merged() {
    let lab = Lab::new("overlay");
    let b = lab.backups(2);
    let base = lab.path(&lab.deltas()[0]);
    let bytes = std::fs::read(&base).unwrap();
    std::fs::rename(&base, lab.path("right.img")).unwrap();
    std::fs::write(&base, &bytes).unwrap();
    let said = lab.fails(&["remove", &b[1]]);
    assert!(said.contains("another file than the one that it was made on"), "{said}");
    assert_eq!((std::fs::read(&base).unwrap(), lab.listed("web1")), (bytes, b.clone()));
    std::fs::rename(lab.path("right.img"), &base).unwrap();
    lab.ok(&["remove", &b[1]]);
    assert_eq!(lab.deltas(), Vec::<String>::new());
}

#[test]
fn what_is_not_there_is_said_and_changes_nothing() {
    let lab = Lab::new("scan");
    let b = lab.backup();
    let cases =
        [("web1/2020-01-01T00-00-00Z", "there is no backup"), ("web9/latest", "there is no VM \"web9\"")];
    for (target, words) in cases {
        let said = lab.fails(&["remove", &b, target]);
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(lab.run(&["remove"]).status.code(), Some(2));
    assert_eq!(lab.run(&["remove", "web1"]).status.code(), Some(2));
    assert_eq!(lab.listed("web1"), [b]);
}

/// The store on a file system of its own.
struct Disk(std::path::PathBuf);

impl Disk {
    fn new(path: &Path, size: &std::ffi::CStr) -> Self {
        std::fs::create_dir(path).unwrap();
        rustix::mount::mount("knibfs-test", path, "tmpfs", MountFlags::empty(), Some(size))
            .expect("mounting a tmpfs needs root: run the tests as root");
        Self(path.to_owned())
    }

    fn fill(&self) {
        let block = vec![1; 65536];
        let mut written = 0;
        for size in [65536, 4096] {
            while std::fs::write(self.0.join(format!("filler{written}")), &block[..size]).is_ok() {
                written += 1;
            }
        }
        assert!(written > 0);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_store_is_where_removal_is_needed_most() {
    let lab = Lab::new("scan");
    std::fs::remove_dir_all(lab.path("store")).unwrap();
    let disk = Disk::new(&lab.path("store"), c"size=16m");
    lab.ok(&["init", lab.path("store").to_str().unwrap()]);
    lab.ok(&["vm", "add", "web1", "--disk", &format!("root={}", lab.disk("web1").display())]);
    let b = lab.backups(3);
    disk.fill();
    assert!(lab.fails(&["backup", "web1"]).contains("full"));
    // Hiding frees nothing, and says so before anything changes.
    let said = lab.fails(&["remove", &b[0]]);
    assert!(said.contains("the file system is full"), "{said}");
    assert_eq!(lab.listed("web1"), b);
    assert!(lab.store().unfinished().unwrap().is_empty());
    lab.ok(&["remove", &b[2], &b[0]]);
    assert_eq!(lab.listed("web1"), [b[1].clone()]);
    assert!(lab.manifest(&b[1]).unwrap().end_of_chain);
    lab.check();
    lab.ok(&["remove", &b[1]]);
    assert_eq!(lab.folders("web1"), Vec::<String>::new());
}

#[test]
fn a_read_only_store_refuses_and_stays_as_it_is() {
    let lab = Lab::new("overlay");
    let b = lab.backups(2);
    let deltas = lab.deltas();
    let store = lab.path("store");
    let _pin = Pinned::new(&store);
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount(&store, read_only, c"").unwrap();
    for force in [&[][..], &["--force"]] {
        let said = lab.fails(&[&["remove", b[1].as_str()], force].concat());
        assert!(said.contains("the file system is read-only"), "{said}");
    }
    assert_eq!((lab.listed("web1"), lab.deltas()), (b, deltas));
    assert!(lab.store().unfinished().unwrap().is_empty());
}

#[test]
fn the_mount_drops_what_is_removed_and_keeps_what_is_open() {
    let lab = Lab::new("scan");
    let b = lab.backups(3);
    let mnt = lab.path("mnt");
    std::fs::create_dir(&mnt).unwrap();
    let log = lab.path("state");
    lab.ok(&["mount", "--log-dir", log.to_str().unwrap(), mnt.to_str().unwrap()]);
    let mounted = Disk(mnt.clone());
    let shown = || {
        let names = std::fs::read_dir(mnt.join("vms/web1")).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| n != "latest");
        names.sort();
        names
    };
    let all: Vec<_> = b.iter().map(|b| name(b).to_owned()).collect();
    assert_eq!(shown(), all);
    let open = std::fs::File::open(mnt.join("vms").join(&b[2]).join("root.raw")).unwrap();
    let said = lab.fails(&["remove", &b[2]]);
    assert!(said.contains("mount"), "{said}");
    lab.ok(&["remove", &b[1]]);
    assert_eq!(shown(), [all[0].clone(), all[2].clone()]);
    drop(open);
    // The kernel tells the mount of a close a little later.
    let removed = || lab.run(&["remove", &b[2]]).status.success();
    assert!((0..200).any(|_| removed() || {
        std::thread::yield_now();
        false
    }));
    assert_eq!(shown(), [all[0].clone()]);
    assert_eq!(std::fs::read_link(mnt.join("vms/web1/latest")).unwrap(), Path::new(&all[0]));
    lab.ok(&["umount", mnt.to_str().unwrap()]);
    drop(mounted);
}

/// Kills a removal at every place where a crash is foreseen; `recover` finishes or undoes each.
fn killed_anywhere(list: List, track: &str, backups: usize, targets: &[usize], hidden: &[usize]) {
    let mut seen = Seen::default();
    let (mut undone, mut finished) = (0, 0);
    for number in 1.. {
        let lab = Lab::new(track);
        let b = lab.backups(backups);
        for at in hidden {
            lab.remove(&[&b[*at]]);
        }
        let before = (lab.folders("web1"), lab.listed("web1"));
        lab.write("web1", "write -P 77 9M 64k");
        let copy = lab.keep("copy.raw");
        let targets: Vec<&str> = targets.iter().map(|at| b[*at].as_str()).collect();
        let mut command = lab.command(&[&["remove"], targets.as_slice()].concat());
        let killed = command.env("KNIBFS_FAILPOINT", format!("#{number}")).output().unwrap();
        let said = String::from_utf8_lossy(&killed.stderr).into_owned();
        assert!(killed.status.success() || killed.status.signal() == Some(9), "{said}");
        seen.note(&killed);
        lab.recover();
        lab.check();
        lab.disk_shows(&copy);
        assert!(lab.store().unfinished().unwrap().is_empty());
        let listed = lab.listed("web1");
        if listed == before.1 {
            assert_eq!(lab.folders("web1"), before.0, "#{number}: {said}");
            undone += 1;
            lab.remove(&targets);
        } else {
            finished += 1;
        }
        let left: Vec<_> = lab.listed("web1");
        assert!(left.iter().all(|l| !targets.contains(&l.as_str())), "#{number}: {left:?}: {said}");
        assert!(lab.folders("web1").iter().all(|f| !f.starts_with('.')), "#{number}: {said}");
        let record = lab.record("web1");
        let images = record.tracking.volumes.values().flat_map(|v| &v.images);
        assert_eq!(lab.deltas().len(), images.filter(|i| i.owner.is_some()).count(), "#{number}: {said}");
        lab.backup();
        lab.check();
        if killed.status.success() {
            break;
        }
    }
    assert!(undone > 3 && finished > 3, "{undone} undone, {finished} finished");
    seen.assert_all(list);
}

#[test]
fn the_removal_of_the_current_backup_that_is_killed_anywhere_is_recovered() {
    killed_anywhere(failpoints::REMOVE_OVERLAY, "overlay", 3, &[2], &[1]);
}

#[test]
fn a_batch_that_is_killed_anywhere_is_recovered() {
    killed_anywhere(failpoints::REMOVE_BATCH, "scan", 4, &[3, 1], &[]);
}
