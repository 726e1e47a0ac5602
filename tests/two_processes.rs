//! Several knibfs processes on one store: they keep each other out, say who is at work, and nobody waits for the dead.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};

use common::disk_lab::DiskLab as Lab;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

/// A process of the program that stopped at a place and holds its lock.
struct Stopped(Child);

impl Stopped {
    fn at(lab: &Lab, place: &str, arguments: &[&str]) -> Self {
        let child = lab
            .command(arguments)
            .env("KNIBFS_FAILPOINT", format!("stop:{place}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stopped = Self(child);
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(stopped.pid()), options).unwrap().unwrap();
        assert!(status.stopped(), "it ended before {place}");
        stopped
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    fn goes_on(mut self) {
        kill_process(self.pid(), Signal::CONT).unwrap();
        assert!(self.0.wait().unwrap().success());
    }

    fn dies(mut self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn host() -> String {
    knibfs::store::hostname()
}

#[test]
fn while_one_works_on_a_vm_the_others_are_told_who_and_change_nothing() {
    let lab = Lab::new("overlay");
    lab.ok(&["offering", "create", "daily"]);
    lab.ok(&["vm", "assign", "web1", "daily"]);
    let b = lab.backups(2);
    let before = lab.folders("web1");
    let copy = lab.keep("copy.raw");
    lab.add_vm("db", "scan");
    let one = Stopped::at(&lab, "backup-snapshotted", &["backup", "web1"]);
    let holder = format!("`knibfs backup web1`, process {} on host {}", one.0.id(), host());
    for command in [
        &["backup", "web1"][..],
        &["backup", "web1", "--isolated"],
        &["remove", &b[0]],
        &["remove", "--force", &b[0]],
        &["prune", "web1", "--keep-last", "1"],
        &["compress", &b[0]],
        &["vm", "unassign", "web1"],
        &["vm", "assign", "web1", "daily"],
    ] {
        let said = lab.fails(command);
        assert!(said.contains(&holder), "{command:?}: {said}");
    }
    // Who recovers leaves it alone as well.
    let recovered = lab.run(&["recover"]);
    assert!(String::from_utf8_lossy(&recovered.stderr).contains(&holder));
    assert_eq!(lab.listed("web1"), b);
    // Readers and other VMs do not mind.
    lab.check();
    lab.ok(&["list"]);
    lab.ok(&["export", &format!("{}/root", b[1]), lab.path("out").to_str().unwrap(), "-O", "raw"]);
    lab.backup_of("db", Default::default());
    one.goes_on();
    assert_eq!(lab.listed("web1").len(), 3);
    let left: Vec<_> = lab.folders("web1").into_iter().filter(|f| !before.contains(f)).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    lab.disk_shows(&copy);
    lab.shows(&lab.listed("web1")[2], &copy);
    lab.check();
}

#[test]
fn the_lock_of_a_dead_process_is_let_go_and_its_work_recovered() {
    for (place, arguments) in [
        ("backup-snapshotted", &["backup", "web1"][..]),
        ("remove-taken", &["remove", "web1/latest"]),
        ("absorb-swap", &["prune", "web1", "--keep-last", "1"]),
    ] {
        let lab = Lab::new("overlay");
        let b = lab.backups(3);
        let copy = lab.keep("copy.raw");
        let one = Stopped::at(&lab, place, arguments);
        assert!(lab.fails(&["backup", "web1"]).contains("is in use"));
        one.dies();
        let said = lab.fails(&["backup", "web1"]);
        assert!(said.contains("knibfs recover"), "{place}: {said}");
        lab.ok(&["recover"]);
        lab.disk_shows(&copy);
        lab.shows(&b[2], &copy);
        lab.check();
        lab.backup();
        lab.check();
    }
}

#[test]
fn a_lease_ends_with_its_process() {
    let lab = Lab::new("scan");
    let b = lab.backups(2);
    let one = Stopped::at(&lab, "compress.swap", &["compress", &b[1]]);
    let id = lab.manifest(&b[1]).unwrap().id;
    let leases = lab.store().leases(id).unwrap();
    assert_eq!((leases.len(), leases[0].pid, leases[0].host.clone()), (1, one.0.id(), host()));
    one.dies();
    assert_eq!(lab.store().leases(id).unwrap(), []);
    lab.ok(&["recover"]);
    lab.ok(&["remove", &b[1]]);
}

#[test]
fn of_many_at_once_each_is_done_whole_or_refused() {
    let lab = Lab::new("overlay");
    lab.backup();
    let start = |arguments: &[&str]| {
        let mut command: Command = lab.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..8).map(|_| start(&["backup", "web1"])).collect();
    let mut made = BTreeSet::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.success() {
            true => assert!(made.insert(String::from_utf8(output.stdout).unwrap())),
            // Between two looks at the journal, another one's may be there.
            false => assert!(said.contains("is in use"), "{said}"),
        }
    }
    assert!(!made.is_empty());
    assert_eq!(lab.listed("web1").len(), made.len() + 1);
    let store = lab.store();
    let numbers = store.backups(&"web1".parse().unwrap()).unwrap().manifests;
    let numbers: BTreeSet<u64> = numbers.iter().map(|m| m.sequence).collect();
    assert_eq!(numbers.len(), made.len() + 1, "no sequence number is given twice");
    assert_eq!(lab.deltas().len(), 1);
    lab.check();
    // What belongs to no VM waits for its turn instead.
    let children: Vec<Child> = (0..8)
        .map(|n| start(&["offering", "create", &format!("offering {n}"), "--chain-size", &n.to_string()]))
        .chain((0..4).map(|n| start(&["setting", "set", "backup.chain.size", &n.to_string()])))
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(store.offerings(false).unwrap().len(), 8);
}

#[test]
fn two_that_recover_at_once_do_it_once() {
    let lab = Lab::new("overlay");
    lab.backup();
    let copy = lab.keep("copy.raw");
    Stopped::at(&lab, "backup-published", &["backup", "web1"]).dies();
    let children: Vec<Child> = (0..4)
        .map(|_| lab.command(&["recover"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    let mut said = String::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || errors.contains("is in use"), "{errors}");
        said.push_str(&String::from_utf8(output.stdout).unwrap());
    }
    assert_eq!(said.matches("was finished\n").count(), 1, "{said}");
    assert!(lab.store().unfinished().unwrap().is_empty());
    assert_eq!((lab.listed("web1").len(), lab.deltas().len()), (2, 1));
    lab.disk_shows(&copy);
    lab.check();
}
