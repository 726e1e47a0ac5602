//! `export` gives what the guest saw, `check` finds what is damaged: by the real program on a real store.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod mounted_store;

use std::fs;
use std::path::Path;
use std::process::Command;

use knib_qcow::{Chain, ExtentKind, Format, PlainPaths};
use mounted_store::{CLUSTER, Fixture, Layer, Shape};

const SIZE: u64 = 40 * CLUSTER + 4096;

fn layers() -> [Layer; 2] {
    let base = (0..30).map(|c| (c, if c % 3 == 0 { Shape::Plain } else { Shape::Compressed })).collect();
    let top = [(2, Shape::Zero), (5, Shape::Compressed), (6, Shape::Plain), (40, Shape::Compressed)].into();
    [base, top]
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_exported_disk_is_what_the_guest_saw() {
    for zstd in [true, false] {
        let fixture = Fixture::chain(SIZE, zstd, &layers());
        let raw = fixture.dir.path().join("out.raw");
        let qcow2 = fixture.dir.path().join("out.qcow2");
        let (raw, qcow2) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
        for arguments in
            [&["export", "web1/latest/root", raw][..], &["export", "web1/latest/root", qcow2, "-O", "qcow2"]]
        {
            let output = fixture.knibfs(arguments);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert_eq!(fs::read(raw).unwrap(), fixture.expected(1, 0, SIZE as usize));
        qemu_img(&["check", "-q", qcow2]);
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
    }
}

/// The first bytes that an image stores for its compressed cluster `number`; all but the last few hundred, whose end its
/// table does not tell.
fn stored_bytes(image: &Path, number: u64) -> Vec<u8> {
    let chain = Chain::open(image, Format::Qcow2, &PlainPaths).unwrap();
    let ExtentKind::Compressed { offset, max_len, layer: 0, .. } =
        chain.extent_at(number * CLUSTER).unwrap().kind
    else {
        panic!("cluster {number} of {} is not compressed", image.display());
    };
    let bytes = fs::read(image).unwrap();
    bytes[offset as usize..(offset + max_len.saturating_sub(512)) as usize].to_vec()
}

#[test]
fn compressed_clusters_are_exported_as_they_are_stored() {
    let fixture = Fixture::chain(SIZE, true, &layers());
    let qcow2 = fixture.dir.path().join("out.qcow2");
    let output = fixture.knibfs(&["export", "web1/latest/root", qcow2.to_str().unwrap(), "-O", "qcow2"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The store's were made with another level, so compressing them anew would give other bytes.
    for (layer, number) in [(0, 1), (0, 29), (1, 5), (1, 40)] {
        let (old, new) = (stored_bytes(&fixture.stored(layer), number), stored_bytes(&qcow2, number));
        let len = old.len().min(new.len());
        assert!(old.len().abs_diff(new.len()) <= 512 && old[..len] == new[..len], "cluster {number}");
    }
}

#[test]
fn a_file_that_is_there_is_not_overwritten_and_a_missing_disk_is_named() {
    let fixture = Fixture::chain(SIZE, true, &layers());
    let file = fixture.dir.path().join("mine");
    fs::write(&file, "precious").unwrap();
    let output = fixture.knibfs(&["export", "web1/latest/root", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is overwritten"));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let other = fixture.dir.path().join("other");
    let output = fixture.knibfs(&["export", "web1/latest/data", other.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("has no disk data: it has root"));
    assert!(!other.exists());
}

#[test]
fn a_whole_store_passes_the_check() {
    let fixture = Fixture::chain(SIZE, true, &layers());
    let output = fixture.knibfs(&["check", "--read-data"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 backups with 2 images"));
}

#[test]
fn a_flipped_byte_is_found_and_named_and_never_exported() {
    let fixture = Fixture::chain(SIZE, true, &layers());
    let image = fixture.stored(0);
    let good = fs::read(&image).unwrap();
    for at in [0, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        fs::write(&image, &bytes).unwrap();
        let output = fixture.knibfs(&["check", "web1", "--read-data"]);
        assert_eq!(output.status.code(), Some(1), "byte {at}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("damaged: ") && said.contains("root"), "byte {at}: {said}");
    }
    let cluster = good.len() / 2;
    let mut bytes = good.clone();
    bytes[cluster..cluster + 70_000].fill(0x55);
    fs::write(&image, &bytes).unwrap();
    for form in ["raw", "qcow2"] {
        let file = fixture.dir.path().join("out");
        let output = fixture.knibfs(&["export", "web1/latest/root", file.to_str().unwrap(), "-O", form]);
        assert_eq!(output.status.code(), Some(1), "{form}");
        assert!(!file.exists());
    }
    assert_eq!(
        fs::read_dir(fixture.dir.path())
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().contains(".part"))
            .count(),
        0
    );
}

#[test]
fn a_cut_or_missing_image_is_found_without_reading_data() {
    let fixture = Fixture::chain(SIZE, true, &layers());
    let image = fixture.stored(0);
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(fixture.knibfs(&["check"]).status.code(), Some(1));
    fs::remove_file(&image).unwrap();
    assert_eq!(fixture.knibfs(&["check"]).status.code(), Some(1));
}
