//! Compressing stored backups: same content, smaller files, children as before, and no half of it after a kill.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod mounted_store;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::failpoints;
use common::killed::Seen;
use knibfs::store::Manifest;
use knibfs::store::manifest::CompressionState;
use mounted_store::{CLUSTER, Fixture, Layer, Shape, command};

fn chain() -> Fixture {
    let full: Layer = (0..40).map(|c| (c * 3, Shape::Plain)).collect();
    let changed =
        Layer::from([(0, Shape::Zero), (3, Shape::Plain), (4, Shape::Plain), (6, Shape::Compressed)]);
    let newest = Layer::from([(3, Shape::Zero), (7, Shape::Plain)]);
    // The last cluster, of which nothing is stored, is cut by the disk's end.
    Fixture::chain(119 * CLUSTER - 512, false, &[full, changed, newest])
}

fn qemu_img(arguments: &[&str]) {
    let said = Command::new("qemu-img").args(arguments).output().expect("install qemu-utils");
    assert!(said.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
}

fn manifest(fixture: &Fixture, of: usize) -> Manifest {
    fixture.store.manifest(&fixture.vm.name, &fixture.backups[of].name).unwrap()
}

fn spec(fixture: &Fixture, of: usize) -> String {
    format!("web1/{}", fixture.backups[of].name)
}

/// QEMU and our own check agree that all backups are whole and show what they should.
fn assert_whole(fixture: &Fixture) {
    let checked = fixture.knibfs(&["check", "--read-data"]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let wanted = fixture.dir.path().join("wanted.raw");
    for of in 0..fixture.backups.len() {
        let image = fixture.stored(of);
        qemu_img(&["check", "-q", image.to_str().unwrap()]);
        fs::write(&wanted, fixture.expected(of, 0, fixture.size as usize)).unwrap();
        let files = [wanted.to_str().unwrap(), image.to_str().unwrap()];
        qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", files[0], files[1]]);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_backup_of_a_chain_can_be_compressed_under_its_children() {
    let fixture = chain();
    for of in [0, 2, 1] {
        let before = manifest(&fixture, of);
        let done = fixture.knibfs(&["compress", &spec(&fixture, of)]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let after = manifest(&fixture, of);
        assert_eq!(after.compression, CompressionState::Compressed);
        let (old, new) = (&before.disks[0], &after.disks[0]);
        assert_eq!((old.data_clusters, old.zero_clusters), (new.data_clusters, new.zero_clusters));
        assert_eq!(new.compressed_clusters, new.data_clusters, "each is half text");
        assert_eq!(fs::metadata(fixture.stored(of)).unwrap().len(), new.file_size);
        assert_whole(&fixture);
    }
    assert!(manifest(&fixture, 0).stored_size() < fixture.backups[0].stored_size());
    assert!(fixture.store.unfinished().unwrap().is_empty());
    let again = fixture.knibfs(&["compress", &spec(&fixture, 0)]);
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("compressed already"));
}

#[test]
fn a_damaged_backup_stays_as_it_is() {
    let fixture = chain();
    let path = fixture.stored(0);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let folder = path.parent().unwrap();
    let before = names(folder);
    let done = fixture.knibfs(&["compress", &spec(&fixture, 0)]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("root.qcow2"));
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(names(folder), before);
    let after = manifest(&fixture, 0);
    assert_eq!(after.compression, CompressionState::CompressionError);
    assert_eq!(after.disks, fixture.backups[0].disks);
}

#[test]
fn killed_anywhere_it_is_the_old_or_the_new_backup() {
    let (mut ends, mut seen) = ((0, 0), Seen::default());
    for kill_at in 1.. {
        let fixture = chain();
        let state = fixture.dir.path().join("log");
        let said = command(fixture.store.root(), &state)
            .args(["compress", &spec(&fixture, 0)])
            .env(knibfs::failpoint::ENV, format!("#{kill_at}"))
            .output()
            .unwrap();
        if said.status.success() {
            break;
        }
        seen.note(&said);
        let recovered = fixture.knibfs(&["recover"]);
        assert!(recovered.status.success(), "{}", String::from_utf8_lossy(&recovered.stderr));
        assert_whole(&fixture);
        match manifest(&fixture, 0).compression {
            CompressionState::Uncompressed => ends.0 += 1,
            CompressionState::Compressed => ends.1 += 1,
            other => panic!("killed at {kill_at}: {other}"),
        }
        let left = names(fixture.stored(0).parent().unwrap());
        let hidden = |n: &&String| n.starts_with('.') && !n.ends_with(".tmp");
        assert_eq!(left.iter().find(hidden), None, "killed at {kill_at}");
    }
    assert!(ends.0 > 3 && ends.1 > 1, "{ends:?}");
    seen.assert_all(failpoints::COMPRESS);
}
