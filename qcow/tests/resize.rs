//! Disks made larger and smaller.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;

use common::volatile::{Volatile, every_cut};
use common::{
    checked, content, history, qemu_img, qemu_io, quiet, report, report_of, s, same_as_model, shown, temp,
};
use knib_qcow::{Access, Error, FileStorage, Format, PlainPaths, Preallocation, Storage, resize, snapshot};

fn size(path: &Path, size: u64, shrink: bool, how: Preallocation) -> Result<(), Error> {
    let storage = FileStorage::open(path, Access::ReadWrite).unwrap();
    quiet(|c| resize(storage, &PlainPaths, size, shrink, how, c))
}

fn clean(path: &Path) {
    checked(path);
    assert!(report(path).unwrap().is_clean());
}

const KINDS: [&str; 5] = [
    "compat=0.10",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=16k",
];

#[test]
fn a_disk_is_made_smaller_and_larger_and_shows_zeros_where_it_grew() {
    let (_dir, at) = temp();
    for (n, options) in KINDS.iter().enumerate() {
        for backing in [false, true] {
            let path = at(&format!("{n}{backing}.qcow2"));
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
            std::fs::write(at("base"), vec![0x77; 2_500_096]).unwrap();
            let base = at("base");
            if backing {
                args.extend(["-b", s(&base), "-F", "raw"]);
            }
            args.extend([s(&path), "3000320"]);
            qemu_img(&args);
            history(&path, 21 + n as u64, 25, if n == 0 { 2 } else { 3 });
            let mut model = content(&path, Format::Qcow2);
            for (to, how) in [
                (2_000_384u64, Preallocation::Off),
                (150_016, Preallocation::Off),
                (149_504, Preallocation::Off),
                (3_500_032, Preallocation::Off),
                (512, Preallocation::Off),
                (1_000_448, Preallocation::Metadata),
                (2_700_288, Preallocation::Metadata),
                (0, Preallocation::Off),
                (2_600_448, Preallocation::Off),
            ] {
                size(&path, to, true, how).unwrap();
                model.resize(to as usize, 0);
                clean(&path);
                same_as_model(&path, &model);
            }
            history(&path, 5, 15, if n == 0 { 2 } else { 3 });
            clean(&path);
        }
    }
}

#[test]
fn a_smaller_disk_gives_its_space_back() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "20M"]);
    qemu_io(&path, &["write -P 1 0 20M"]);
    let error = size(&path, 1 << 20, false, Preallocation::Off).unwrap_err().to_string();
    assert!(error.contains("loses its end"), "{error}");
    size(&path, 1 << 20, true, Preallocation::Off).unwrap();
    clean(&path);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 2 << 20, "{len}");
}

#[test]
fn a_snapshot_keeps_what_a_smaller_disk_drops() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", s(&path), "5M"]);
    qemu_io(&path, &["write -P 1 0 5M"]);
    qemu_img(&["snapshot", "-c", "whole", s(&path)]);
    size(&path, 100_352, true, Preallocation::Off).unwrap();
    clean(&path);
    quiet(|c| snapshot::apply(FileStorage::open(&path, Access::ReadWrite).unwrap(), "whole", c)).unwrap();
    clean(&path);
    same_as_model(&path, &vec![1; 5 << 20]);
}

#[test]
fn snapshots_that_do_not_know_their_size_forbid_another() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "5M"]);
    qemu_img(&["snapshot", "-c", "one", s(&path)]);
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    // Without extra data, the names follow at once.
    let extra = bytes[table + 39] as usize;
    bytes[table + 39] = 0;
    bytes.resize(table + 4096, 0);
    bytes.copy_within(table + 40 + extra..table + 60 + extra, table + 40);
    std::fs::write(&path, &bytes).unwrap();
    for to in [1 << 20, 9 << 20] {
        let error = size(&path, to, true, Preallocation::Off).unwrap_err().to_string();
        assert!(error.contains("snapshots that do not know"), "{error}");
    }
}

#[test]
fn a_data_file_takes_part() {
    let (_dir, at) = temp();
    let (path, data) = (at("a.qcow2"), at("data"));
    let options = format!("data_file={},data_file_raw=on", s(&data));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, s(&path), "5M"]);
    qemu_io(&path, &["write -P 1 0 5M"]);
    size(&path, 1_000_448, true, Preallocation::Off).unwrap();
    clean(&path);
    assert!(std::fs::read(&data).unwrap() == vec![1; 1_000_448]);
    size(&path, 2 << 20, false, Preallocation::Full).unwrap();
    clean(&path);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", s(&path), s(&data)]);
}

#[test]
fn a_cut_leaves_the_disk_with_its_old_or_its_new_size() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for options in ["cluster_size=512", "cluster_size=16k,extended_l2=on"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "200k"]);
        qemu_io(&path, &["write -P 1 0 200k"]);
        qemu_img(&["snapshot", "-c", "one", s(&path)]);
        qemu_io(&path, &["write -P 2 100k 100k"]);
        let whole = content(&path, Format::Qcow2);
        let start = std::fs::read(&path).unwrap();
        for (to, how) in [(50_176u64, Preallocation::Off), (400_384, Preallocation::Metadata)] {
            let mut want = whole.clone();
            want.resize(to as usize, 0);
            let work = |s: std::sync::Arc<dyn Storage>| quiet(|c| resize(s, &PlainPaths, to, true, how, c));
            let end = every_cut(&start, &work, &mut |cut, survivor| {
                let storage = Volatile::new(survivor, u64::MAX);
                let found = report_of(storage.clone()).unwrap();
                assert_eq!(found.corruptions, 0, "{options} {to}, cut {cut}: {:?}", found.messages);
                let shows = shown(storage);
                assert!(shows == whole || shows == want, "{options} {to}, cut {cut}");
            });
            let storage = Volatile::new(end, u64::MAX);
            assert!(shown(storage.clone()) == want);
            assert!(report_of(storage).unwrap().is_clean());
        }
    }
}
