//! A huge sparse disk costs what is on it: bytes that the real program reads and writes are counted, not time.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::ops::Deref;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use common::lab::{Lab as Program, tool};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// As much changes between the two backups.
const CHANGED: u64 = 64 * MIB;
/// In so many places, all over the disk.
const PLACES: u64 = 16;
/// What tables, checksums, manifests, the program and its libraries may come to.
const METADATA: u64 = 16 * MIB;

struct Lab {
    _dir: tempfile::TempDir,
    program: Program,
}

impl Deref for Lab {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

/// Bytes that a process has read and written so far, whatever it read and wrote.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    read: u64,
    written: u64,
}

impl Traffic {
    fn of(process: u32) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{process}/io")).unwrap();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok()).expect("a field of /proc/PID/io")
        };
        Self { read: field("rchar:"), written: field("wchar:") }
    }

    fn since(self, before: Self) -> Self {
        Self { read: self.read - before.read, written: self.written - before.written }
    }
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { program: Program::at(dir.path()).init(), _dir: dir };
        tool("qemu-img", &["create", "-q", "-f", "qcow2", lab.disk().to_str().unwrap(), "1T"]);
        lab.write(&["write -q -P 1 0 1M".into(), format!("write -q -P 2 {} 1M", TIB - MIB)]);
        let disk = format!("root={}", lab.disk().display());
        lab.ok(&["vm", "add", "web1", "--track", "overlay", "--disk", &disk]);
        lab
    }

    fn disk(&self) -> PathBuf {
        self.path("root.qcow2")
    }

    fn write(&self, commands: &[String]) {
        let mut arguments = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let disk = self.disk();
        arguments.push(disk.to_str().unwrap());
        tool("qemu-io", &arguments);
    }

    /// Takes a backup; its folder's name, and what that cost.
    fn backup(&self) -> (String, Traffic) {
        let mut child = self.command(&["backup", "web1"]).stdout(Stdio::piped()).spawn().unwrap();
        // Ended, but still there to be asked.
        let pid = rustix::process::Pid::from_child(&child);
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).unwrap();
        let traffic = Traffic::of(child.id());
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(child.wait().unwrap().success());
        (line.trim().to_owned(), traffic)
    }
}

/// A mount in the foreground, so that it can be asked what it reads.
struct Mounted<'a> {
    lab: &'a Lab,
    server: Child,
    at: PathBuf,
}

impl<'a> Mounted<'a> {
    fn new(lab: &'a Lab) -> Self {
        let at = lab.path("mnt");
        std::fs::create_dir(&at).unwrap();
        let mut command = lab.command(&["mount", at.to_str().unwrap(), "-f"]);
        let mut server = command.stdin(Stdio::null()).spawn().unwrap();
        while !at.join("vms").exists() {
            assert!(server.try_wait().unwrap().is_none(), "the mount ended");
            std::thread::yield_now();
        }
        Self { lab, server, at }
    }

    fn traffic(&self) -> Traffic {
        Traffic::of(self.server.id())
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = self.lab.command(&["umount", self.at.to_str().unwrap()]).output();
        let _ = self.server.wait();
    }
}

fn place(number: u64) -> u64 {
    number * (TIB / PLACES) + 3 * MIB
}

#[test]
fn an_incremental_backup_of_a_terabyte_costs_what_changed_and_its_mount_is_opened_without_a_walk() {
    let lab = Lab::new();
    let (_, full) = lab.backup();
    assert!(full.read < METADATA && full.written < METADATA, "2 MiB on 1 TiB: {full:?}");

    let each = CHANGED / PLACES;
    lab.write(
        &(0..PLACES).map(|n| format!("write -q -P {} {} {each}", n + 10, place(n))).collect::<Vec<_>>(),
    );
    let (backup, cost) = lab.backup();
    assert!(cost.read >= CHANGED && cost.written >= CHANGED, "the counters count: {cost:?}");
    assert!(cost.read <= 2 * CHANGED + METADATA, "{cost:?}");
    assert!(cost.written <= 2 * CHANGED + METADATA, "{cost:?}");
    let stored = lab.path("store").join("vms").join(&backup).join("root.qcow2");
    same(&lab.disk(), &stored);

    let mounted = Mounted::new(&lab);
    let before = mounted.traffic();
    let view = File::open(mounted.at.join("vms").join(&backup).join("root.raw")).unwrap();
    assert_eq!(view.metadata().unwrap().len(), TIB);
    let mut page = [0; 4096];
    for number in 0..PLACES {
        view.read_exact_at(&mut page, place(number) + each / 2).unwrap();
        assert!(page.iter().all(|byte| u64::from(*byte) == number + 10), "place {number}");
    }
    let seen = data_of(&view);
    assert_eq!(seen.len() as u64, PLACES + 2, "{seen:?}");
    assert!(seen.contains(&(place(7), place(7) + each)));
    // Read ahead included; the checksums of the chain alone are a few hundred kilobytes.
    let cost = mounted.traffic().since(before);
    assert!(cost.read < METADATA, "{PLACES} pages and a map of 1 TiB: {cost:?}");
}

/// Where a file holds data, as it says itself.
fn data_of(file: &File) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        found.push((start, at));
    }
    found
}

#[test]
fn zeros_over_a_terabyte_are_backed_up_as_zeros() {
    let lab = Lab::new();
    lab.backup();
    // One request for each of many gigabytes: the overlay says zeros in table after table.
    lab.write(&(0..8).map(|n| format!("write -q -z {} 1G", n * (TIB / 8))).collect::<Vec<_>>());
    let (backup, cost) = lab.backup();
    assert!(cost.read <= 2 * METADATA && cost.written <= 2 * METADATA, "{cost:?}");
    let stored = lab.path("store").join("vms").join(&backup).join("root.qcow2");
    same(&lab.disk(), &stored);
}

fn same(one: &Path, other: &Path) {
    tool("qemu-img", &["compare", "-q", "-U", one.to_str().unwrap(), other.to_str().unwrap()]);
}
