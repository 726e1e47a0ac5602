//! `img bitmap`, and bitmaps that `img convert` copies: as `qemu-img` does it.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use std::process::Command;

use img_support::{Bench, ours};

/// What is known of the bitmaps of an image, by QEMU.
fn bitmaps(bench: &Bench, image: &str) -> serde_json::Value {
    let info = bench.qemu_img(&["info", "--output=json", image]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// The bits of each bitmap that can be trusted.
fn bits(bench: &Bench, image: &str) -> Vec<(String, Vec<std::ops::Range<u64>>)> {
    let file = knib_qcow::FileStorage::open(&bench.path(image), knib_qcow::Access::Read).unwrap();
    let all = knib_qcow::bitmap::list(&*file).unwrap();
    let usable = all.into_iter().filter(|b| !b.in_use);
    usable.map(|b| (b.name.clone(), knib_qcow::bitmap::dirty(&*file, &b.name).unwrap())).collect()
}

/// Two images with bitmaps in which bits are set, one of another size, an overlay, and images that can have none.
fn images() -> Bench {
    let bench = Bench::new();
    for (image, size) in [("a.qcow2", "40M"), ("other.qcow2", "40M"), ("small.qcow2", "8M")] {
        bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, size]);
        bench.qemu_img(&["bitmap", "--add", "-g", "512", image, "fine"]);
        bench.qemu_img(&["bitmap", "--add", "-g", "64k", image, "coarse"]);
        bench.io("qcow2", image, &["write -P 1 1000 3000", "write -P 2 5M 100k"]);
        bench.qemu_img(&["bitmap", "--add", "--disable", image, "off"]);
    }
    bench.io("qcow2", "other.qcow2", &["write -P 3 30M 1k"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "over.qcow2"]);
    bench.qemu_img(&["create", "-q", "-f", "raw", "r.raw", "1M"]);
    bench
}

/// An image whose bitmaps a writer that was killed left in use.
fn leave_in_use(bench: &Bench, image: &str) {
    let line = ["-f", "qcow2", "-c", "write 0 64k", "-c", "sigraise 9"];
    let died = Command::new("qemu-io").args(line).arg(bench.path(image)).output();
    assert!(
        !died.unwrap_or_else(|e| panic!("cannot run qemu-io: {e} (install qemu-utils)")).status.success()
    );
    assert!(bitmaps(bench, image)[0]["flags"].to_string().contains("in-use"));
}

#[test]
fn bitmaps_change_as_qemu_changes_them() {
    let bench = images();
    for line in [
        &["--add", "a.qcow2", "new"][..],
        &["--add", "-g", "0", "a.qcow2", "new"],
        &["--add", "-g", "2G", "a.qcow2", "new"],
        &["--add", "--granularity=1M", "--disable", "-f", "qcow2", "a.qcow2", "new"],
        &["--add", "--enable", "--disable", "--enable", "a.qcow2", "new"],
        &["--add", "over.qcow2", "new"],
        &["--add", "--remove", "a.qcow2", "new"],
        &["--remove", "a.qcow2", "fine"],
        &["--clear", "a.qcow2", "fine"],
        &["--disable", "a.qcow2", "fine"],
        &["--enable", "--clear", "a.qcow2", "off"],
        &["--merge", "fine", "a.qcow2", "off"],
        &["--merge", "coarse", "a.qcow2", "fine"],
        &["--merge", "fine", "a.qcow2", "fine"],
        &["--add", "--merge", "fine", "--merge", "coarse", "-g", "4k", "a.qcow2", "new"],
        &["--clear", "--merge", "fine", "-b", "other.qcow2", "-F", "qcow2", "a.qcow2", "off"],
        &["--add", "over.qcow2", "x", "--merge", "coarse", "--source-file", "other.qcow2"],
    ] {
        let line: Vec<&str> = [&["bitmap"], line].concat();
        let image = if line.contains(&"over.qcow2") { "over.qcow2" } else { "a.qcow2" };
        let (theirs, ours, said) = bench.same_changes(&line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(bitmaps(&ours, image), bitmaps(&theirs, image), "{line:?}");
        assert_eq!(bits(&ours, image), bits(&theirs, image), "{line:?}");
        ours.qemu_img(&["check", "-q", image]);
        assert!(ours.guest("qcow2", image) == bench.guest("qcow2", image), "{line:?}");
        // What QEMU writes from now on is recorded in ours as in its own.
        for b in [&ours, &theirs] {
            b.io("qcow2", image, &["write -P 9 20M 3000"]);
        }
        assert_eq!(bits(&ours, image), bits(&theirs, image), "{line:?}, written after");
    }
}

#[test]
fn wrong_wishes_are_refused_alike_and_change_nothing() {
    let bench = images();
    leave_in_use(&bench, "small.qcow2");
    let long = "x".repeat(1024);
    for line in [
        &["a.qcow2", "fine"][..],
        &["--add", "a.qcow2", "fine"],
        &["--add", "a.qcow2", ""],
        &["--add", "a.qcow2", &long],
        &["--add", "-g", "100", "a.qcow2", "new"],
        &["--add", "-g", "256", "a.qcow2", "new"],
        &["--add", "-g", "4G", "a.qcow2", "new"],
        &["--add", "-g", "x", "a.qcow2", "new"],
        &["--add", "a.qcow2"],
        &["--add", "a.qcow2", "new", "more"],
        &["--add", "-q", "a.qcow2", "new"],
        &["--add", "missing", "new"],
        &["--add", "-f", "nonsense", "a.qcow2", "new"],
        &["--add", "-f", "qcow2", "r.raw", "new"],
        &["--add", "-f", "raw", "r.raw", "new"],
        &["--add", "v2.qcow2", "new"],
        &["--clear", "-g", "64k", "a.qcow2", "fine"],
        &["--remove", "a.qcow2", "missing"],
        &["--remove", "v2.qcow2", "missing"],
        &["--enable", "a.qcow2", "missing"],
        &["--merge", "missing", "a.qcow2", "fine"],
        &["--merge", "fine", "a.qcow2", "missing"],
        &["--merge", "fine", "-F", "qcow2", "a.qcow2", "fine"],
        &["--merge", "fine", "-b", "missing", "a.qcow2", "fine"],
        &["--merge", "fine", "-b", "a.qcow2", "a.qcow2", "fine"],
        &["--merge", "fine", "-b", "r.raw", "-F", "raw", "a.qcow2", "fine"],
        &["--merge", "off", "-b", "small.qcow2", "a.qcow2", "off"],
        &["--add", "-b", "other.qcow2", "a.qcow2", "new"],
        &["--clear", "small.qcow2", "fine"],
        &["--merge", "coarse", "small.qcow2", "fine"],
        &["--disable", "small.qcow2", "coarse"],
        &["--add", "small.qcow2", "fine"],
    ] {
        let line: Vec<&str> = [&["bitmap"], line].concat();
        let (_, ours, said) = bench.same_changes(&line);
        assert_eq!(said.code, Some(1), "{line:?}");
        for image in ["a.qcow2", "other.qcow2", "small.qcow2", "v2.qcow2", "r.raw"] {
            let read = |b: &Bench| std::fs::read(b.path(image)).unwrap();
            assert!(read(&ours) == read(&bench), "{line:?} changed {image}");
        }
    }
    // What was done before the wish that failed stays, as in QEMU.
    let (theirs, ours, said) = bench.same_changes(&["bitmap", "--clear", "--merge", "x", "a.qcow2", "fine"]);
    assert_eq!(said.code, Some(1));
    assert_eq!(bits(&ours, "a.qcow2"), bits(&theirs, "a.qcow2"));
    let (_, ours, said) = bench.same_changes(&["bitmap", "--remove", "small.qcow2", "fine"]);
    assert_eq!(said.code, Some(0), "one that is in use can be removed");
    ours.qemu_img(&["check", "-q", "small.qcow2"]);
}

#[test]
fn bitmaps_are_converted_with_their_image() {
    let bench = images();
    bench.qemu_img(&["snapshot", "-c", "then", "other.qcow2"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "there.qcow2", "40M"]);
    for line in [
        &["-O", "qcow2", "a.qcow2", "out.qcow2"][..],
        &["-c", "-O", "qcow2", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=512,refcount_bits=1", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-o", "extended_l2=on,lazy_refcounts=on", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-o", "data_file=out.data", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-o", "preallocation=metadata", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-n", "a.qcow2", "there.qcow2"],
        &["-O", "qcow2", "-l", "then", "other.qcow2", "out.qcow2"],
        &["-O", "qcow2", "over.qcow2", "out.qcow2"],
        &["-O", "qcow2", "--skip-broken-bitmaps", "a.qcow2", "out.qcow2"],
    ] {
        let line: Vec<&str> = [&["convert", "--bitmaps"], line].concat();
        let (theirs, ours, said) = bench.same_changes(&line);
        assert_eq!(said.code, Some(0), "{line:?}");
        let out = *line.last().unwrap();
        assert_eq!(bitmaps(&ours, out), bitmaps(&theirs, out), "{line:?}");
        assert_eq!(bits(&ours, out), bits(&theirs, out), "{line:?}");
        ours.qemu_img(&["check", "-q", out]);
        assert!(ours.guest("qcow2", out) == theirs.guest("qcow2", out), "{line:?}");
        ours.same(&["info", out]);
        ours.same(&["info", "--output=json", out]);
        ours.same(&["measure", "-O", "qcow2", out]);
        ours.same(&["measure", "-O", "qcow2", "-o", "compat=0.10", out]);
        ours.same(&["measure", "-O", "qcow2", "-o", "cluster_size=2M", "--output=json", out]);
    }
}

#[test]
fn bitmaps_that_are_broken_or_have_no_place_are_refused_or_skipped() {
    let bench = images();
    leave_in_use(&bench, "small.qcow2");
    for line in [
        &["-O", "qcow2", "small.qcow2", "out.qcow2"][..],
        &["-O", "raw", "a.qcow2", "out.raw"],
        &["-O", "qcow2", "r.raw", "out.qcow2"],
        &["-O", "qcow2", "v2.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-o", "compat=0.10", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "a.qcow2", "a.qcow2", "out.qcow2"],
        &["-O", "qcow2", "-n", "a.qcow2", "other.qcow2"],
    ] {
        let line: Vec<&str> = [&["convert", "--bitmaps"], line].concat();
        let (_, _, said) = bench.same_changes(&line);
        assert_eq!(said.code, Some(1), "{line:?}");
    }
    bench.same(&["convert", "--skip-broken-bitmaps", "-O", "qcow2", "a.qcow2", "out.qcow2"]);
    let line = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "small.qcow2", "out.qcow2"];
    let (theirs, ours, said) = bench.same_changes(&line);
    assert_eq!(said.code, Some(0));
    assert_eq!(bitmaps(&ours, "out.qcow2"), bitmaps(&theirs, "out.qcow2"));
    bench.same(&["info", "small.qcow2"]);
    bench.same(&["measure", "-O", "qcow2", "small.qcow2"]);
    let errors = img_support::ours(&line, bench.dir.path()).1;
    for name in ["fine", "coarse", "off"] {
        assert!(errors.contains(&format!("Skipping inconsistent bitmap '{name}'")), "{errors}");
    }
}

#[test]
fn a_bitmap_changes_while_nobody_else_uses_the_image() {
    let bench = images();
    let reader = knib_qcow::FileStorage::open(&bench.path("a.qcow2"), knib_qcow::Access::ReadWrite).unwrap();
    let (said, errors) = ours(&["bitmap", "--clear", "a.qcow2", "fine"], bench.dir.path());
    assert_eq!(said.code, Some(1));
    assert!(errors.contains("in use"), "{errors}");
    drop(reader);
    bench.img(&["bitmap", "--clear", "a.qcow2", "fine"]);
}

#[test]
fn what_an_image_stands_on_is_not_needed_for_its_bitmaps() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2"]);
    bench.qemu_img(&["bitmap", "--add", "a.qcow2", "there"]);
    let lines = [
        &["bitmap", "--add", "a.qcow2", "new"][..],
        &["bitmap", "--clear", "--disable", "a.qcow2", "there"],
        &["bitmap", "--remove", "a.qcow2", "there"],
    ];
    // Another program writes to the base.
    let held = knib_qcow::FileStorage::open_with(
        &bench.path("base.qcow2"),
        knib_qcow::Access::ReadWrite,
        knib_qcow::Locking::Writer,
    )
    .unwrap();
    for line in lines {
        let copy = bench.copy();
        let name = format!("{}/base.qcow2", bench.dir.path().display());
        copy.qemu_img(&["rebase", "-u", "-b", &name, "-F", "qcow2", "a.qcow2"]);
        let (theirs, ours, said) = copy.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(bitmaps_alone(&ours), bitmaps_alone(&theirs), "{line:?}");
    }
    drop(held);
    // It is gone.
    std::fs::remove_file(bench.path("base.qcow2")).unwrap();
    for line in lines {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(bitmaps_alone(&ours), bitmaps_alone(&theirs), "{line:?}");
    }
    // A data file is another matter.
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=d", "external.qcow2", "1M"]);
    std::fs::remove_file(bench.path("d")).unwrap();
    let (_, _, said) = bench.same_changes(&["bitmap", "--add", "external.qcow2", "new"]);
    assert_eq!(said.code, Some(1));
}

/// The bitmaps of an image that cannot be opened with what it stands on.
fn bitmaps_alone(bench: &Bench) -> Vec<(String, bool, bool)> {
    let storage = knib_qcow::FileStorage::open(&bench.path("a.qcow2"), knib_qcow::Access::Read).unwrap();
    let all = knib_qcow::bitmap::list(&*storage).unwrap();
    all.into_iter().map(|b| (b.name, b.auto, b.in_use)).collect()
}
