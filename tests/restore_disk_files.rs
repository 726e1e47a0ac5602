//! Restores of plain disk files, through the program: the right bytes, nothing left over, and no half of it after a kill.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::failpoints;
use common::killed::{Times, at_each_name, kill};
use common::lab::{Lab as Program, tool};
use serde_json::Value;

/// A store with a VM of two disks, `root` and `data`.
struct Lab {
    dir: tempfile::TempDir,
    program: Program,
    format: &'static str,
}

impl Deref for Lab {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl Lab {
    fn new(format: &'static str, track: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Lab { program: Program::at(dir.path()).init(), dir, format };
        let mut add = vec!["vm".into(), "add".into(), "web1".into(), "--track".into(), track.to_owned()];
        for disk in ["root", "data"] {
            tool("qemu-img", &["create", "-q", "-f", format, lab.disk(disk).to_str().unwrap(), "16M"]);
            lab.write(disk, "write -P 1 0 1M");
            add.extend(["--disk".into(), format!("{disk}={}", lab.disk(disk).display())]);
        }
        lab.ok(&add.iter().map(String::as_str).collect::<Vec<_>>());
        lab
    }

    fn disk(&self, name: &str) -> PathBuf {
        std::fs::create_dir_all(self.path("images")).unwrap();
        self.path("images").join(format!("{name}.{}", self.format))
    }

    fn write(&self, disk: &str, command: &str) {
        tool("qemu-io", &["-f", self.format, "-c", command, self.disk(disk).to_str().unwrap()]);
    }

    fn try_run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let before = self.everything();
        let output = self.try_run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
        assert_eq!(self.everything(), before, "{arguments:?} changed something: {errors}");
        errors
    }

    /// Takes a backup, and keeps a copy of what the disks hold.
    fn backup(&self) -> (String, [PathBuf; 2]) {
        let name = self.ok(&["backup", "web1"]);
        let copies = ["root", "data"].map(|disk| {
            let copy = self.path(&format!("{disk}-{}.copy", name.replace('/', "-")));
            let (from, to) = (self.disk(disk), copy.to_str().unwrap());
            tool("qemu-img", &["convert", "-f", self.format, "-O", "raw", from.to_str().unwrap(), to]);
            copy
        });
        (name, copies)
    }

    fn shows(&self, image: &Path, copy: &Path) -> bool {
        let format = if image.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        if format == "qcow2" {
            tool("qemu-img", &["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
        }
        let paths = [copy.to_str().unwrap(), image.to_str().unwrap()];
        let out = Command::new("qemu-img")
            .args(["compare", "-q", "-f", "raw", "-F", format, paths[0], paths[1]])
            .output()
            .unwrap();
        out.status.success()
    }

    fn both_show(&self, copies: &[PathBuf; 2]) -> bool {
        let shown = [("root", &copies[0]), ("data", &copies[1])].map(|(d, c)| self.shows(&self.disk(d), c));
        assert_eq!(shown[0], shown[1], "the disks are of different times");
        shown[0]
    }

    fn record(&self) -> Value {
        serde_json::from_str(&self.ok(&["vm", "show", "web1", "--json"])).unwrap()
    }

    fn kinds_and_reason(&self, backup: &str) -> (String, String) {
        let path = self.path("store").join("vms").join(backup).join("manifest.json");
        let manifest: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let disk = &manifest["disks"][0];
        (disk["kind"].as_str().unwrap().into(), disk["reason"].as_str().unwrap().into())
    }

    /// Names and lengths of all files of primary and of the store, but for locks.
    fn everything(&self) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut folders = vec![self.path("images"), self.path("store")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                } else if entry.file_name() != ".lock" {
                    found.push((entry.path(), entry.metadata().unwrap().len()));
                }
            }
        }
        found.sort();
        found
    }

    fn images(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path("images")).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Table B, rows 3 and 4: restore b1, then b2; and the next backup is full.
fn back_and_forth(format: &'static str, track: &str) {
    let lab = Lab::new(format, track);
    let (first, old) = lab.backup();
    for disk in ["root", "data"] {
        lab.write(disk, "write -P 2 512k 4M");
        lab.write(disk, "write -z 0 64k");
    }
    let (second, new) = lab.backup();
    lab.write("root", "write -P 3 0 8M");

    lab.ok(&["restore", &first]);
    assert!(lab.both_show(&old), "row 3: the data of b1");
    lab.ok(&["restore", &second]);
    assert!(lab.both_show(&new), "row 4: the data is back");
    // Nothing but the disks is left: no delta, no new image beside.
    let wanted = ["data", "root"].map(|d| format!("{d}.{format}"));
    assert_eq!(lab.images(), wanted);
    assert_eq!(lab.record()["state"], "Ready");
    assert!(lab.record()["tracking"]["current"].is_null());

    let (third, _) = lab.backup();
    let (kind, reason) = lab.kinds_and_reason(&third);
    assert_eq!(kind, "full");
    assert!(reason.contains(&format!("restored from {second}")), "{reason}");
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn raw_files_are_restored_back_and_forth() {
    back_and_forth("raw", "scan");
}

#[test]
fn qcow2_files_are_restored_back_and_forth() {
    back_and_forth("qcow2", "scan");
}

#[test]
fn files_tracked_by_overlays_are_restored_back_and_forth() {
    back_and_forth("qcow2", "overlay");
}

#[test]
fn a_disk_that_is_gone_or_damaged_is_made_again_and_may_be_larger() {
    for (format, track) in [("qcow2", "overlay"), ("raw", "scan")] {
        let lab = Lab::new(format, track);
        lab.backup();
        let (backup, copies) = lab.backup();
        std::fs::remove_file(lab.disk("root")).unwrap();
        std::fs::write(lab.disk("data"), b"no image").unwrap();
        lab.ok(&["restore", &backup, "--size", "root=32M", "--rate", "1000"]);
        assert!(lab.shows(&lab.disk("data"), &copies[1]));
        let info = tool("qemu-img", &["info", "-f", format, lab.disk("root").to_str().unwrap()]);
        assert!(info.contains("virtual size: 32 MiB"), "{info}");
        tool("qemu-io", &["-f", format, "-c", "read -P 0 16M 16M", lab.disk("root").to_str().unwrap()]);
        assert!(lab.shows(&lab.disk("root"), &copies[0]), "and zeros behind");
    }
}

/// Table F for plain disk files: a disk becomes a new volume of its own VM and of another, also when its own is gone.
#[test]
fn a_disk_becomes_a_new_volume() {
    let lab = Lab::new("qcow2", "scan");
    let (backup, copies) = lab.backup();
    let disk = format!("{backup}/data");
    let said: Value =
        serde_json::from_str(&lab.ok(&["restore-volume", &disk, "--to", "web1", "--json"])).unwrap();
    assert_eq!(said["volumes"][0]["name"], "data-2");
    assert!(lab.shows(Path::new(said["volumes"][0]["path"].as_str().unwrap()), &copies[1]));
    // It is a disk of the VM now: the next backup has it, full; the others go on.
    let (next, _) = lab.backup();
    assert!(lab.path("store").join("vms").join(&next).join("data-2.qcow2").exists());
    assert_eq!(lab.kinds_and_reason(&next).0, "incremental");

    tool(
        "qemu-img",
        &["create", "-q", "-f", "raw", lab.path("images").join("x.raw").to_str().unwrap(), "1M"],
    );
    let other = format!("x={}", lab.path("images").join("x.raw").display());
    lab.ok(&["vm", "add", "web2", "--disk", &other]);
    std::fs::remove_file(lab.path("store/vms/web1/vm.json")).unwrap();
    lab.ok(&["restore-volume", &disk, "--to", "web2"]);
    assert!(lab.shows(&lab.path("images").join("web2-data.qcow2"), &copies[1]));
}

#[test]
fn a_backup_becomes_a_new_vm() {
    let lab = Lab::new("raw", "scan");
    let (backup, copies) = lab.backup();
    std::fs::create_dir(lab.path("other")).unwrap();
    lab.ok(&["create-vm", &backup, "--name", "web2", "--storage", lab.path("other").to_str().unwrap()]);
    for (disk, copy) in ["root", "data"].iter().zip(&copies) {
        assert!(lab.shows(&lab.path("other").join(format!("web2-{disk}.raw")), copy));
    }
    lab.ok(&["backup", "web2"]);
    lab.ok(&["create-vm", &backup, "--name", "web3"]);
    assert!(lab.shows(&lab.path("images").join("web3-root.raw"), &copies[0]));
    lab.ok(&["check", "--read-data"]);
}

#[test]
fn wrong_input_is_a_sentence_and_changes_nothing() {
    let lab = Lab::new("qcow2", "overlay");
    let (backup, _) = lab.backup();
    let name = backup.split_once('/').unwrap().1.to_owned();
    let disk = format!("{backup}/data");
    let none = format!("{backup}/nix");
    let missing = "web1/2020-01-01T00-00-00Z";
    let inside = lab.path("store/vms");
    let cases: &[(&[&str], &str)] = &[
        (&["restore", missing], "there is no backup"),
        (&["restore", "web9/latest"], "there is no VM"),
        (&["restore", &backup, "--host", "b"], "--host is only for quick restores"),
        (&["restore", &backup, "--quick"], "plain disk files"),
        (
            &["restore", &backup, "--quick", "--host", "b"],
            "the host b cannot be used: there is no host \"b\"",
        ),
        (&["restore", &backup, "--size", "32M"], "write --size DISK=SIZE"),
        (&["restore", &backup, "--size", "x=32M"], "the backup has root, data"),
        (&["restore", &backup, "--size", "root=1M"], "a smaller disk would lose data"),
        (&["restore", &backup, "--storage", "/nonexistent"], "name a folder that is there"),
        (&["restore", &backup, "--storage", lab.dir.path().to_str().unwrap()], "known by their paths"),
        (&["restore-volume", &disk, "--to", "web9"], "there is no VM"),
        (&["restore-volume", &none, "--to", "web1"], "it has root, data"),
        (&["create-vm", &backup, "--name", "web1"], "there already is a VM"),
        (
            &["create-vm", &backup, "--name", "web2", "--storage", inside.to_str().unwrap()],
            "lies in the store",
        ),
    ];
    for (arguments, words) in cases {
        let said = lab.refused(arguments);
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    let image = lab.path("store/vms/web1").join(&name).join("data.qcow2");
    let moved = lab.path("moved");
    std::fs::rename(&image, &moved).unwrap();
    assert!(lab.refused(&["restore", &backup]).contains("data.qcow2"));
    std::fs::rename(&moved, &image).unwrap();
    lab.ok(&["restore", &backup]);
}

#[test]
fn an_image_that_somebody_has_open_is_not_replaced() {
    let lab = Lab::new("qcow2", "scan");
    let (backup, _) = lab.backup();
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", lab.disk("data").to_str().unwrap()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    {
        use std::io::{Read as _, Write as _};
        // Its answer tells that the image is open.
        holder.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut byte = [0];
        holder.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    }
    let said = lab.refused(&["restore", &backup]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(said.contains("in use"), "{said}");
    lab.ok(&["restore", &backup]);
}

#[test]
fn a_full_disk_fails_the_restore_and_leaves_everything_as_it_was() {
    let lab = Lab::new("qcow2", "overlay");
    let (first, _) = lab.backup();
    lab.write("root", "write -P 5 0 8M");
    let (_, now) = lab.backup();
    let before = lab.images();
    // A file may not grow as large as the new images need.
    let line =
        format!("trap '' XFSZ; ulimit -f 512; exec '{}' restore {first}", env!("CARGO_BIN_EXE_knibfs"));
    let mut command = Command::new("bash");
    command
        .args(["-c", &line])
        .env("KNIBFS_STORE", lab.path("store"))
        .env("KNIBFS_STATE_DIR", lab.path("state"));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write"), "{said}");
    assert_eq!(lab.images(), before);
    assert!(lab.both_show(&now));
    assert_eq!(lab.record()["state"], "Ready");
    let (next, _) = lab.backup();
    assert_eq!(lab.kinds_and_reason(&next).0, "incremental", "the chain goes on");
}

impl Lab {
    /// What a restore is killed on: two backups of which the first is asked for, and what the disks held at each.
    fn to_be_killed(track: &str) -> Killed {
        let lab = Lab::new("qcow2", track);
        let (first, old) = lab.backup();
        lab.write("root", "write -P 9 3M 128k");
        lab.write("data", "write -P 9 3M 128k");
        let (_, new) = lab.backup();
        Killed { lab, first, old, new }
    }
}

struct Killed {
    lab: Lab,
    first: String,
    old: [PathBuf; 2],
    new: [PathBuf; 2],
}

impl Deref for Killed {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.lab.program
    }
}

impl Killed {
    /// Everything is at rest; whether both disks are of the old time, else both are of the new one.
    fn is_old(&self, step: &str) -> bool {
        let lab = &self.lab;
        assert_eq!(lab.ok(&["recover"]), "nothing was interrupted", "{step}");
        assert_eq!(lab.record()["state"], "Ready", "{step}");
        let is_old = lab.both_show(&self.old);
        assert!(is_old || lab.both_show(&self.new), "{step}");
        let strays: Vec<_> = lab.images().into_iter().filter(|n| n.ends_with("knib-new")).collect();
        assert!(strays.is_empty(), "{strays:?}: {step}");
        is_old
    }

    /// The store can be read, and the next backup be taken.
    fn goes_on(&self) {
        self.lab.ok(&["check", "--read-data"]);
        self.lab.backup();
    }

    /// Done: nothing of knibfs is left; or undone: the chain goes on.
    fn is_done_or_undone(&self, track: &str, step: &str) {
        let is_old = self.is_old(step);
        let deltas = self.lab.images().iter().filter(|n| n.ends_with(".knib.qcow2")).count();
        let wanted = if is_old || track == "scan" { 0 } else { 2 };
        assert_eq!(deltas, wanted, "{:?}: {step}", self.lab.images());
        self.goes_on();
    }
}

#[test]
fn a_restore_that_is_killed_anywhere_is_done_or_undone() {
    for (track, list) in [("overlay", failpoints::RESTORE_OVERLAY), ("scan", failpoints::RESTORE_SCAN)] {
        at_each_name(
            Times::FirstAndLast,
            list,
            |_| Lab::to_be_killed(track),
            |killed, _| format!("restore {}", killed.first),
            |killed, step| killed.is_done_or_undone(track, step),
        );
    }
}

#[test]
fn undoing_a_restore_that_is_killed_anywhere_is_done_again() {
    at_each_name(
        Times::FirstAndLast,
        failpoints::RESTORE_UNDONE,
        |_| {
            let killed = Lab::to_be_killed("overlay");
            kill(&killed, &format!("restore {}", killed.first), "restore-written#2");
            killed
        },
        |_, _| "recover".into(),
        |killed, step| {
            killed.is_done_or_undone("overlay", step);
            assert!(!killed.lab.both_show(&killed.old), "{step}: it is undone");
        },
    );
}

#[test]
fn a_new_volume_or_vm_that_is_killed_anywhere_is_there_or_not() {
    at_each_name(
        Times::FirstAndLast,
        failpoints::NEW_VOLUME,
        |_| Lab::to_be_killed("scan"),
        |killed, _| format!("restore-volume {}/data --to web1", killed.first),
        |killed, step| {
            assert!(!killed.is_old(step), "{step}");
            let known = killed.lab.record()["volumes"].as_array().unwrap().len();
            assert_eq!(known, killed.lab.images().len(), "{:?}: {step}", killed.lab.images());
            killed.goes_on();
        },
    );
    at_each_name(
        Times::FirstAndLast,
        failpoints::NEW_VM,
        |_| Lab::to_be_killed("scan"),
        |killed, _| format!("create-vm {} --name web2", killed.first),
        |killed, step| {
            assert!(!killed.is_old(step), "{step}");
            let made = killed.path("store/vms/web2").exists();
            let images = killed.lab.images();
            assert_eq!(images.len(), if made { 4 } else { 2 }, "{images:?}: {step}");
            if made {
                killed.ok(&["backup", "web2"]);
            }
            killed.goes_on();
        },
    );
}
