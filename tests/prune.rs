//! `prune`: what no rule keeps is removed, what is left of it under others is merged into them, and no new full is needed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod mounted_store;

use std::os::unix::process::ExitStatusExt as _;

use common::disk_lab::DiskLab as Lab;
use common::failpoints;
use common::killed::Seen;
use common::lab::tool;
use knibfs::store::manifest::Kind::{Full, Incremental};
use mounted_store::{CLUSTER, Fixture, Layer, Shape, content};

fn name(backup: &str) -> &str {
    backup.split_once('/').unwrap().1
}

/// Backups with a flat copy of the disk at each.
fn copies(lab: &Lab, count: usize) -> Vec<(String, std::path::PathBuf)> {
    (0..count).map(|at| (lab.backup(), lab.keep(&format!("copy{at}.raw")))).collect()
}

#[test]
fn a_removed_full_backup_becomes_part_of_its_child_and_the_chain_goes_on() {
    for track in ["scan", "overlay"] {
        let lab = Lab::new(track);
        let b = copies(&lab, 5);
        let deltas = lab.deltas();
        let said = lab.ok(&["prune", "web1", "--keep-last", "2"]);
        assert_eq!(lab.listed("web1"), [b[3].0.clone(), b[4].0.clone()]);
        assert_eq!(lab.folders("web1"), [name(&b[3].0), name(&b[4].0)], "no dead file is kept");
        assert!(said.contains(&format!("into {}", name(&b[3].0))), "{said}");
        for (backup, copy) in &b[3..] {
            lab.shows(backup, copy);
        }
        let manifest = lab.manifest(&b[3].0).unwrap();
        let disk = &manifest.disks[0];
        assert_eq!((disk.kind, disk.depth, manifest.position), (Full, 1, 1));
        assert!(manifest.parent.is_none());
        let child = lab.manifest(&b[4].0).unwrap();
        assert_eq!((child.disks[0].kind, child.disks[0].depth, child.position), (Incremental, 2, 2));
        lab.check();
        assert_eq!(lab.deltas(), deltas, "primary is not touched");
        assert_eq!(lab.next_kind().0, "incremental");
        lab.check();
    }
}

#[test]
fn a_removed_incremental_becomes_part_of_its_child_which_stands_on_the_next() {
    let lab = Lab::new("scan");
    let b = copies(&lab, 4);
    lab.ok(&["remove", &b[1].0, &b[2].0]);
    assert_eq!(lab.folders("web1").len(), 4);
    lab.ok(&["prune", "web1", "--keep-last", "9"]);
    assert_eq!(lab.folders("web1"), [name(&b[0].0), name(&b[3].0)], "what was hidden before goes, too");
    let manifest = lab.manifest(&b[3].0).unwrap();
    assert_eq!((manifest.disks[0].kind, manifest.disks[0].depth, manifest.position), (Incremental, 2, 2));
    let info = tool("qemu-img", &["info", lab.folder(&b[3].0).join("root.qcow2").to_str().unwrap()]);
    assert!(info.contains(&format!("backing file: ../{}/root.qcow2", name(&b[0].0))), "{info}");
    lab.shows(&b[3].0, &b[3].1);
    lab.shows(&b[0].0, &b[0].1);
    lab.check();
}

#[test]
fn a_pruned_chain_never_needs_a_new_full() {
    let lab = Lab::new("scan");
    lab.ok(&["setting", "set", "backup.chain.size", "4"]);
    let mut kinds = Vec::new();
    for _ in 0..10 {
        kinds.push(lab.next_kind().0);
        lab.ok(&["prune", "--keep-last", "2"]);
    }
    assert!(kinds[1..].iter().all(|k| k == "incremental"), "{kinds:?}");
    assert_eq!(lab.listed("web1").len(), 2);
    lab.check();
}

#[test]
fn compressed_backups_stay_compressed() {
    let lab = Lab::new("scan");
    let b = copies(&lab, 3);
    for (backup, _) in &b {
        lab.ok(&["compress", backup]);
    }
    lab.ok(&["prune", "web1", "--keep-last", "1"]);
    let manifest = lab.manifest(&b[2].0).unwrap();
    let disk = &manifest.disks[0];
    assert!(disk.compressed_clusters > 0 && disk.compressed_clusters == disk.data_clusters, "{disk:?}");
    lab.shows(&b[2].0, &b[2].1);
    lab.check();
}

#[test]
fn compressed_clusters_are_moved_as_they_are() {
    let packed = |clusters: std::ops::Range<u64>| clusters.map(|c| (c, Shape::Compressed)).collect::<Layer>();
    let mut middle = packed(1..3);
    middle.insert(4, Shape::Zero);
    middle.insert(5, Shape::Plain);
    let fixture = Fixture::chain(10 * CLUSTER - 512, true, &[packed(0..8), middle, packed(2..3)]);
    // By another level than knibfs's own, so that what was compressed anew would show.
    let stored = |layer, cluster| zstd::bulk::compress(&content(layer, cluster), 1).unwrap();
    assert_ne!(stored(0, 0), zstd::bulk::compress(&content(0, 0), 3).unwrap());
    let done = fixture.knibfs(&["prune", "web1", "--keep-last", "1"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let merged = std::fs::read(fixture.stored(2)).unwrap();
    let holds = |bytes: Vec<u8>| merged.windows(bytes.len()).any(|w| w == bytes);
    for (layer, cluster, is) in
        [(0, 0, true), (0, 7, true), (1, 1, true), (2, 2, true), (0, 1, false), (0, 4, false)]
    {
        assert_eq!(holds(stored(layer, cluster)), is, "cluster {cluster} of {layer}");
    }
    let out = fixture.dir.path().join("out.raw");
    let spec = format!("web1/{}/root", fixture.backups[2].name);
    assert!(fixture.knibfs(&["export", &spec, out.to_str().unwrap(), "-O", "raw"]).status.success());
    assert!(std::fs::read(&out).unwrap() == fixture.expected(2, 0, fixture.size as usize));
    tool("qemu-img", &["check", "-q", fixture.stored(2).to_str().unwrap()]);
    assert!(fixture.knibfs(&["check", "--read-data"]).status.success());
}

#[test]
fn a_dry_run_says_the_same_and_does_nothing() {
    let lab = Lab::new("scan");
    copies(&lab, 4);
    let before = lab.folders("web1");
    let said = lab.ok(&["prune", "--keep-last", "1", "--dry-run", "--json"]);
    assert_eq!((lab.folders("web1"), lab.listed("web1").len()), (before, 4));
    let did = lab.ok(&["prune", "--keep-last", "1", "--json"]);
    let value = |text: &str| -> serde_json::Value { serde_json::from_str(text).unwrap() };
    let (said, did) = (value(&said), value(&did));
    for part in ["kept", "removed", "merged"] {
        assert_eq!(said[0][part], did[0][part], "{part}");
    }
    assert_eq!(did[0]["removed"].as_array().unwrap().len(), 3);
    assert_eq!(did[0]["kept"][0]["why"], serde_json::json!(["last", "current"]));
    assert_eq!(lab.listed("web1").len(), 1);
}

#[test]
fn one_in_use_is_kept_and_nothing_under_it_changes() {
    let lab = Lab::new("scan");
    let b = copies(&lab, 4);
    let lease = lab.store().lease(lab.manifest(&b[2].0).unwrap().id, "quick restore of web9").unwrap();
    let said = lab.ok(&["prune", "web1", "--keep-last", "1"]);
    assert!(said.contains("in use") && said.contains("quick restore of web9"), "{said}");
    assert_eq!(lab.listed("web1"), [b[2].0.clone(), b[3].0.clone()]);
    assert_eq!(lab.folders("web1").len(), 4, "removed ones are kept hidden");
    drop(lease);
    lab.ok(&["prune", "web1", "--keep-last", "1"]);
    assert_eq!(lab.folders("web1"), [name(&b[3].0)]);
    lab.shows(&b[3].0, &b[3].1);
}

#[test]
fn nothing_to_keep_is_a_mistake() {
    let lab = Lab::new("scan");
    let b = lab.backup();
    let output = lab.run(&["prune"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--keep-last"));
    assert_eq!(lab.listed("web1"), [b]);
    assert!(lab.fails(&["prune", "web9", "--keep-last", "1"]).contains("there is no VM"));
}

#[test]
fn a_damaged_backup_is_not_merged() {
    let lab = Lab::new("scan");
    let b = copies(&lab, 3);
    let image = lab.folder(&b[0].0).join("root.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    // In the middle of the clusters that nothing above hides.
    let at = bytes.windows(64).position(|w| w == [1; 64]).unwrap();
    bytes[at + 3 * 65536] ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    let said = lab.fails(&["prune", "web1", "--keep-last", "1"]);
    assert!(said.contains(&format!("{}/root.qcow2 is damaged", name(&b[0].0))), "{said}");
    assert!(lab.store().unfinished().unwrap().is_empty());
    assert_eq!(std::fs::read(&image).unwrap(), bytes);
    assert_eq!(lab.folders("web1").len(), 3);
}

/// Kills a prune at every place; `recover` leaves the state before or after one of its steps.
#[test]
fn killed_anywhere_it_is_recovered() {
    let (mut states, mut seen) = (std::collections::BTreeSet::new(), Seen::default());
    let made = Lab::new("scan");
    let b = copies(&made, 4);
    for number in 1.. {
        let lab = made.copy();
        let mut command = lab.command(&["prune", "web1", "--keep-last", "2"]);
        let killed = command.env("KNIBFS_FAILPOINT", format!("#{number}")).output().unwrap();
        let said = String::from_utf8_lossy(&killed.stderr).into_owned();
        assert!(killed.status.success() || killed.status.signal() == Some(9), "{said}");
        seen.note(&killed);
        lab.recover();
        lab.check();
        assert!(lab.store().unfinished().unwrap().is_empty());
        lab.shows(&b[3].0, &b[3].1);
        let hidden = |f: &String| f.starts_with('.');
        assert!(!lab.folders("web1").iter().any(hidden), "#{number}: {said}");
        let inside = std::fs::read_dir(lab.folder(&b[2].0)).unwrap();
        let inside = inside.map(|e| e.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = inside.filter(|n| n.starts_with('.') && !n.ends_with(".tmp")).collect();
        assert_eq!(left, Vec::<String>::new(), "#{number}: {said}");
        let state = (lab.listed("web1").len(), lab.folders("web1").len());
        states.insert(state);
        assert!([(4, 4), (3, 4), (2, 4), (2, 2)].contains(&state), "#{number}: {state:?}: {said}");
        if killed.status.success() {
            assert_eq!(state, (2, 2));
            break;
        }
    }
    assert!(states.len() > 2, "{states:?}");
    seen.assert_all(failpoints::PRUNE);
}
