//! What was found damaged: no backup stands on it, no operation hides or loses what is still good.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::disk_lab::DiskLab as Lab;
use common::lab::tool;

/// Turns one byte round; the same again puts it right.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

/// Where a stored image has a cluster full of `value`.
fn data(path: &Path, value: u8) -> usize {
    let bytes = fs::read(path).unwrap();
    bytes.chunks(1 << 16).position(|c| c.iter().all(|b| *b == value)).unwrap() << 16
}

#[test]
fn the_next_backup_is_full_where_a_check_found_damage_and_not_when_it_was_put_right() {
    for track in ["scan", "overlay"] {
        let lab = Lab::new(track);
        let b = lab.backups(2);
        let image = lab.folder(&b[0]).join("root.qcow2");
        let at = data(&image, 1);
        flip(&image, at);
        assert_eq!(lab.run(&["check", "web1", "--read-data"]).status.code(), Some(1));
        flip(&image, at);
        lab.ok(&["check", "web1", "--read-data"]);
        assert_eq!(lab.next_kind().0, "incremental", "{track}: a copy was put back");

        flip(&image, at);
        let newest = lab.listed("web1").pop().unwrap();
        let said = lab.run(&["check", &newest, "--read-data"]);
        assert_eq!(said.status.code(), Some(1), "{track}: what it stands on is damaged");
        assert!(String::from_utf8_lossy(&said.stdout).contains(&b[0]), "{said:?}");
        let (kind, why) = lab.next_kind();
        assert_eq!(kind, "full", "{track}");
        assert!(why.contains("or one below, is damaged: "), "{why}");
        assert_eq!(lab.next_kind().0, "incremental", "{track}: it stands on the new one");
        let newest = lab.listed("web1").pop().unwrap();
        lab.ok(&["check", &newest, "--read-data"]);
    }
}

#[test]
fn a_scan_that_finds_the_parent_s_checksums_damaged_takes_a_full_backup() {
    let lab = Lab::new("scan");
    let b = lab.backups(2);
    let sums = lab.folder(&b[0]).join("root.sums");
    // Right behind the header: a block of records.
    flip(&sums, 200);
    lab.write("web1", "write -P 77 9M 64k");
    let output = lab.run(&["backup", "web1"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("this backup is full"), "{said}");
    let made = lab.manifest("web1/latest").unwrap();
    assert_eq!(made.disks[0].kind.to_string(), "full");
    lab.shows(&format!("web1/{}", made.name), &lab.keep("now.raw"));
    assert_eq!(lab.next_kind().0, "incremental");
}

#[test]
fn an_internal_snapshot_in_a_delta_is_kept_and_the_delta_with_it() {
    let lab = Lab::new("overlay");
    lab.backup();
    let disk = lab.disk("web1");
    tool("qemu-img", &["snapshot", "-c", "mine", disk.to_str().unwrap()]);
    let output = lab.run(&["backup", "web1"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("internal snapshots (mine)"), "{said}");
    let holder = lab
        .deltas()
        .into_iter()
        .map(|name| lab.path(&name))
        .find(|p| tool("qemu-img", &["snapshot", "-U", "-l", p.to_str().unwrap()]).contains("mine"))
        .expect("the snapshot is still there");
    let (kind, _) = lab.next_kind();
    assert_eq!(kind, "incremental", "the delta that was kept is known");
    lab.shows(&lab.listed("web1").pop().unwrap(), &lab.keep("now.raw"));
    tool("qemu-img", &["snapshot", "-d", "mine", holder.to_str().unwrap()]);
    lab.backup();
    lab.shows(&lab.listed("web1").pop().unwrap(), &lab.keep("later.raw"));
    assert!(!holder.exists(), "nothing holds it any more: it was merged");
    lab.check();
}

#[test]
fn a_base_that_something_wrote_to_is_in_doubt() {
    let lab = Lab::new("overlay");
    lab.backups(2);
    assert_eq!(lab.next_kind().0, "incremental", "knibfs's own merges are no doubt");
    let base = lab.path(&lab.deltas().pop().unwrap());
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 9 12M 64k", base.to_str().unwrap()]);
    let (kind, why) = lab.next_kind();
    assert_eq!(kind, "full");
    assert!(why.contains("was written to") && why.contains(base.to_str().unwrap()), "{why}");
    lab.shows(&lab.listed("web1").pop().unwrap(), &lab.keep("now.raw"));
    assert_eq!(lab.next_kind().0, "incremental");

    // What the delta holds goes into the base, and the delta is emptied: nothing would be left of it in an incremental.
    lab.write("web1", "write -P 8 10M 64k");
    tool("qemu-img", &["commit", "-q", lab.disk("web1").to_str().unwrap()]);
    let (kind, why) = lab.next_kind();
    assert!(kind == "full" && why.contains("was written to"), "{kind}: {why}");
    lab.shows(&lab.listed("web1").pop().unwrap(), &lab.keep("later.raw"));
}

#[test]
fn what_a_prune_could_not_merge_is_listed_again() {
    let lab = Lab::new("scan");
    let b = lab.backups(3);
    let image = lab.folder(&b[1]).join("root.qcow2");
    // Only the second backup has this.
    let at = data(&image, 3);
    flip(&image, at);
    let said = lab.fails(&["prune", "web1", "--keep-last", "1"]);
    assert!(said.contains("could not be merged"), "{said}");
    assert_eq!(lab.listed("web1"), b, "the good full one above all");
    flip(&image, at);
    lab.ok(&["prune", "web1", "--keep-last", "1"]);
    assert_eq!(lab.listed("web1"), b[2..]);
    lab.check();
}
