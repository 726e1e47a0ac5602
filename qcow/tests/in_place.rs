//! Images made, changed in place and committed, with `qemu-img` and `qemu-io` as oracles.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{Random, checked, content, history, qemu_img, qemu_io, rw, s, same_as_model, temp, tool};

use knib_qcow::{
    Access, Compression, CompressionType, Control, Error, FileStorage, Format, Header, NewImage, commit,
    create, set_backing,
};

fn empty(path: &Path, size: u64, cluster_bits: u32, backing: Option<(&str, Format)>) {
    let new =
        NewImage { size, cluster_bits, compression: None, backing: backing.map(|(n, f)| (n.to_owned(), f)) };
    create(FileStorage::create_new(path).unwrap(), &new).unwrap();
}

fn control(cancel: &AtomicBool) -> Control<'_> {
    Control { threads: 1, rate_limit: None, cancel, progress: &|_| {} }
}

fn commit_into(overlay: &Path, base: &Path, format: Format) -> Result<(), Error> {
    commit(overlay, base, format, &control(&AtomicBool::new(false)))
}

#[test]
fn empty_images_of_any_size_pass_qemu_img_check() {
    let (_dir, at) = temp();
    for (i, (size, bits)) in
        [(0, 16), (512, 9), (1 << 30, 9), (100 << 30, 9), (1 << 20, 21), (5_000_000_512, 12), (64 << 40, 16)]
            .into_iter()
            .enumerate()
    {
        let path = at(&format!("{i}.qcow2"));
        empty(&path, size, bits, None);
        checked(&path);
        let info = qemu_img(&["info", "--output=json", s(&path)]);
        assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
        assert!(info.contains(&format!("\"cluster-size\": {}", 1u64 << bits)), "{info}");
    }
}

#[test]
fn an_image_too_large_for_its_clusters_is_refused() {
    let (_dir, at) = temp();
    let new = NewImage { size: 1 << 40, cluster_bits: 9, compression: None, backing: None };
    let error = create(FileStorage::create_new(&at("a")).unwrap(), &new).unwrap_err();
    assert!(error.to_string().contains("larger clusters"), "{error}");
}

#[test]
fn an_overlay_shows_its_backing_file_and_takes_writes_of_qemu() {
    let (_dir, at) = temp();
    std::fs::write(at("base"), vec![7u8; 1 << 20]).unwrap();
    let new = NewImage {
        size: 1 << 20,
        cluster_bits: 16,
        compression: Some(Compression { kind: CompressionType::Zstd, level: 3 }),
        backing: Some(("base".into(), Format::Raw)),
    };
    create(FileStorage::create_new(&at("top")).unwrap(), &new).unwrap();
    qemu_img(&["compare", "-F", "raw", "-f", "qcow2", s(&at("top")), s(&at("base"))]);
    qemu_io(&at("top"), &["write -P 9 70000 1000"]);
    checked(&at("top"));
    assert_eq!(content(&at("top"), Format::Qcow2)[70_000], 9);
}

#[test]
fn a_backing_name_is_replaced_again_and_again_and_other_extensions_stay() {
    let (_dir, at) = temp();
    qemu_img(&["create", "-q", "-f", "raw", s(&at("base")), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", s(&at("top"))]);
    qemu_io(&at("top"), &["write -P 9 0 64k"]);
    qemu_img(&["bitmap", "--add", s(&at("top")), "b0"]);
    let long = "x".repeat(1000);
    for (name, format) in [
        (Some("a/much/longer/name/than/it/had.qcow2"), Some(Format::Qcow2)),
        (Some("s"), Some(Format::Raw)),
        (Some(long.as_str()), Some(Format::Raw)),
        (None, None),
        (Some("base"), Some(Format::Raw)),
    ] {
        set_backing(&at("top"), name, format).unwrap();
        let header = Header::parse(&*FileStorage::open(&at("top"), Access::Read).unwrap()).unwrap();
        assert_eq!(header.backing.as_deref(), name);
        assert_eq!(header.backing_format.as_deref(), format.map(Format::name));
        let info = qemu_img(&["info", "-U", s(&at("top"))]);
        assert!(info.contains("b0"), "the bitmap is kept: {info}");
    }
    checked(&at("top"));
    assert_eq!(content(&at("top"), Format::Qcow2)[5], 9);
    set_backing(&at("top"), Some("base"), None).unwrap_err();
    set_backing(&at("top"), Some(&"x".repeat(1024)), Some(Format::Raw)).unwrap_err();
}

#[test]
fn a_name_that_does_not_fit_a_small_cluster_is_refused_and_nothing_changes() {
    let (_dir, at) = temp();
    empty(&at("top"), 1 << 20, 9, Some(("base", Format::Raw)));
    let before = std::fs::read(at("top")).unwrap();
    set_backing(&at("top"), Some(&"x".repeat(500)), Some(Format::Raw)).unwrap_err();
    assert!(std::fs::read(at("top")).unwrap() == before);
}

#[test]
fn random_changes_match_the_model_for_every_version_cluster_size_and_refcount_width() {
    let (_dir, at) = temp();
    let mut n = 0;
    for (cluster, size) in [(512u64, 300_032u64), (4096, 1_000_448), (65536, 3_000_320), (2 << 20, 9_000_448)]
    {
        for (compat, width) in [("0.10", 16), ("1.1", 1), ("1.1", 4), ("1.1", 16), ("1.1", 64)] {
            for backing in [false, true] {
                n += 1;
                let path = at(&format!("{n}.qcow2"));
                let options = format!("compat={compat},cluster_size={cluster},refcount_bits={width}");
                let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
                let base = at("base");
                if backing {
                    // Shorter than the disk above it.
                    std::fs::write(&base, vec![0x5a; size as usize - 100_352]).unwrap();
                    args.extend(["-b", s(&base), "-F", "raw"]);
                }
                let size = size.to_string();
                args.extend([s(&path), &size]);
                qemu_img(&args);
                history(&path, n * 7919, 60, if compat == "1.1" { 3 } else { 2 });
            }
        }
    }
}

#[test]
fn random_changes_of_images_with_subclusters_match_the_model() {
    let (_dir, at) = temp();
    let base = at("base");
    for (n, (cluster, size)) in
        [("16k", 300_032u64), ("64k", 1_000_448), ("2M", 9_000_448)].into_iter().enumerate()
    {
        for backing in [false, true] {
            let path = at(&format!("{n}{backing}.qcow2"));
            let options = format!("cluster_size={cluster},extended_l2=on,refcount_bits=8");
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
            if backing {
                std::fs::write(&base, vec![0x5a; size as usize - 100_352]).unwrap();
                args.extend(["-b", s(&base), "-F", "raw"]);
            }
            let size = size.to_string();
            args.extend([s(&path), &size]);
            qemu_img(&args);
            // What QEMU wrote is changed, compressed clusters are split up, a snapshot's clusters are kept.
            let packed = format!("write -c -P 3 0 {cluster}");
            qemu_io(&path, &[&packed, "write -P 9 200k 3k", "write -z 250k 20k"]);
            history(&path, 31 + n as u64, 60, 3);
            qemu_img(&["snapshot", "-c", "one", s(&path)]);
            let before = content(&path, Format::Qcow2);
            history(&path, 47 + n as u64, 60, 3);
            qemu_img(&["snapshot", "-a", "one", s(&path)]);
            same_as_model(&path, &before);
            checked(&path);
        }
    }
}

#[test]
fn compressed_clusters_are_freed_when_they_are_overwritten() {
    let (_dir, at) = temp();
    let mut random = Random(3);
    let bytes: Vec<u8> = (0..2_000_384).map(|i| if i % 7 == 0 { random.next() as u8 } else { 3 }).collect();
    std::fs::write(at("raw"), &bytes).unwrap();
    for (name, options) in
        [("z.qcow2", "compression_type=zlib,cluster_size=4096"), ("s.qcow2", "compression_type=zstd")]
    {
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, s(&at("raw")), s(&at(name))]);
        history(&at(name), 11, 80, 3);
    }
}

#[test]
fn what_an_internal_snapshot_holds_stays_when_the_disk_changes() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    for (cluster, size) in [("512", "200k"), ("64k", "3M")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={cluster}"), s(&path), size]);
        qemu_io(&path, &["write -P 1 0 100k"]);
        qemu_img(&["snapshot", "-c", "before", s(&path)]);
        let before = content(&path, Format::Qcow2);
        history(&path, 5, 60, 3);
        qemu_img(&["snapshot", "-a", "before", s(&path)]);
        checked(&path);
        same_as_model(&path, &before);
    }
}

#[test]
fn guest_data_goes_into_an_external_data_file() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    let data = at("a.data");
    for (raw, more) in [("off", ""), ("on", ""), ("off", ",extended_l2=on"), ("on", ",extended_l2=on")] {
        let options = format!("data_file={},data_file_raw={raw}{more}", s(&data));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, s(&path), "3M"]);
        history(&path, 17, 60, 3);
        if raw == "on" {
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", s(&path), s(&data)]);
        }
    }
}

#[test]
fn refcount_blocks_and_table_grow_with_the_image() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    // A table of one cluster of 512 bytes has 64 entries of 64 counts (64 bits wide): 2 MiB.
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", s(&path), "8M"]);
    let mut random = Random(99);
    let model: Vec<u8> = (0..8 << 20).map(|_| random.next() as u8).collect();
    let mut image = rw(&path).unwrap();
    for (i, part) in model.chunks(100_000).enumerate() {
        image.write_at(part, i as u64 * 100_000).unwrap();
    }
    image.flush().unwrap();
    drop(image);
    same_as_model(&path, &model);
    checked(&path);
}

#[test]
fn a_disk_grows_past_its_l1_table_and_hides_what_a_longer_backing_file_holds_there() {
    let (_dir, at) = temp();
    std::fs::write(at("base"), vec![0xee; 1 << 20]).unwrap();
    for (i, size) in [10_000u64, 32_768, 100_352].into_iter().enumerate() {
        let path = at(&format!("{i}.qcow2"));
        empty(&path, size, 9, Some(("base", Format::Raw)));
        let mut image = rw(&path).unwrap();
        image.write_at(&[1; 600], size - 600).unwrap();
        image.grow(4 << 20).unwrap();
        image.write_at(&[2; 600], 3 << 20).unwrap();
        image.flush().unwrap();
        drop(image);
        let mut model = vec![0; 4 << 20];
        model[..size as usize].fill(0xee);
        model[size as usize - 600..size as usize].fill(1);
        model[3 << 20..(3 << 20) + 600].fill(2);
        same_as_model(&path, &model);
        checked(&path);
    }
}

#[test]
fn an_image_that_is_marked_corrupt_is_refused_with_the_way_out() {
    let (_dir, at) = temp();
    qemu_img(&["create", "-q", "-f", "qcow2", s(&at("a")), "1M"]);
    let mut marked = std::fs::read(at("a")).unwrap();
    marked[79] |= 2;
    std::fs::write(at("a"), marked).unwrap();
    let error = rw(&at("a")).err().unwrap().to_string();
    assert!(error.contains("qemu-img check -r all"), "{error}");
    set_backing(&at("a"), None, None).unwrap_err();
}

#[test]
fn persistent_bitmaps_are_marked_in_use_by_the_first_write() {
    let (_dir, at) = temp();
    qemu_img(&["create", "-q", "-f", "qcow2", s(&at("a")), "1M"]);
    qemu_img(&["bitmap", "--add", s(&at("a")), "b0"]);
    let mut image = rw(&at("a")).unwrap();
    image.write_at(&[1], 0).unwrap();
    image.flush().unwrap();
    drop(image);
    checked(&at("a"));
    let info = qemu_img(&["info", s(&at("a"))]);
    assert!(info.contains("in-use"), "{info}");
}

/// An overlay over `base` with writes, zeros and compressed clusters; returns what the guest sees.
fn overlay_with_everything(base: &Path, format: Format, overlay: &Path, size: u64) -> Vec<u8> {
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        s(base),
        "-F",
        format.name(),
        s(overlay),
        &size.to_string(),
    ]);
    qemu_io(
        overlay,
        &[
            "write -P 9 1000 200000",
            "write -z 512k 256k",
            "write -z 900000 1000",
            "write -c -P 4 1M 64k",
            "discard 300k 64k",
        ],
    );
    qemu_io(overlay, &[&format!("write -P 8 {} 512", size - 512)]);
    content(overlay, Format::Qcow2)
}

#[test]
fn an_overlay_is_committed_into_raw_and_qcow2_bases_and_shorter_ones_grow() {
    let (_dir, at) = temp();
    for (n, (format, options)) in [
        (Format::Raw, ""),
        (Format::Qcow2, "cluster_size=65536"),
        (Format::Qcow2, "cluster_size=512"),
        (Format::Qcow2, "cluster_size=2M,compat=0.10"),
        (Format::Qcow2, "extended_l2=on"),
    ]
    .into_iter()
    .enumerate()
    {
        for base_size in [2_000_384u64, 3 << 20] {
            let (base, overlay) = (at(&format!("b{n}-{base_size}")), at(&format!("o{n}-{base_size}")));
            let mut args = vec!["create", "-q", "-f", format.name()];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            let text = base_size.to_string();
            args.extend([s(&base), &text]);
            qemu_img(&args);
            let fill = format!("write -P 1 0 {base_size}");
            assert_eq!(tool("qemu-io", &["-f", format.name(), "-c", &fill, s(&base)]).0, 0);
            let size = 2_500_096;
            let want = overlay_with_everything(&base, format, &overlay, size);
            commit_into(&overlay, &base, format).unwrap();
            let got = content(&base, format);
            assert!(got[..size as usize] == want, "{format:?} {options} {base_size}");
            assert!(got[size as usize..].iter().all(|b| *b == 1), "what lies past the overlay stays");
            if format == Format::Qcow2 {
                checked(&base);
            }
            // Through the overlay nothing changed, so the commit can be repeated.
            assert!(content(&overlay, Format::Qcow2) == want);
            checked(&overlay);
        }
    }
}

#[test]
fn two_overlays_are_committed_at_once_into_the_base_below_them() {
    let (_dir, at) = temp();
    qemu_img(&["create", "-q", "-f", "raw", s(&at("lowest")), "3M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", s(&at("lowest")), "-F", "raw", s(&at("base"))]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", s(&at("base")), "-F", "qcow2", s(&at("mid"))]);
    qemu_io(&at("mid"), &["write -P 3 0 700k"]);
    let want = overlay_with_everything(&at("mid"), Format::Qcow2, &at("top"), 3 << 20);
    commit_into(&at("top"), &at("base"), Format::Qcow2).unwrap();
    same_as_model(&at("base"), &want);
    checked(&at("base"));
    assert!(content(&at("lowest"), Format::Raw).iter().all(|b| *b == 0));
}

#[test]
fn a_commit_into_a_file_that_the_overlay_does_not_stand_on_is_refused() {
    let (_dir, at) = temp();
    for name in ["base", "other"] {
        qemu_img(&["create", "-q", "-f", "raw", s(&at(name)), "1M"]);
    }
    empty(&at("top"), 1 << 20, 16, Some(("base", Format::Raw)));
    let error = commit_into(&at("top"), &at("other"), Format::Raw).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

#[test]
fn a_cancelled_commit_leaves_a_sound_base_and_the_same_disk() {
    let (_dir, at) = temp();
    qemu_img(&["create", "-q", "-f", "qcow2", s(&at("base")), "8M"]);
    empty(&at("top"), 8 << 20, 16, Some(("base", Format::Qcow2)));
    qemu_io(&at("top"), &["write -P 5 0 8M"]);
    let cancel = AtomicBool::new(false);
    let stop = |done: u64| cancel.store(done >= 2 << 20, std::sync::atomic::Ordering::Relaxed);
    let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &stop };
    let error = commit(&at("top"), &at("base"), Format::Qcow2, &control).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    checked(&at("base"));
    assert!(content(&at("top"), Format::Qcow2).iter().all(|b| *b == 5));
    commit_into(&at("top"), &at("base"), Format::Qcow2).unwrap();
    assert!(content(&at("base"), Format::Qcow2).iter().all(|b| *b == 5));
}
