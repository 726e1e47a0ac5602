//! `img create` makes what `qemu-img create` makes, and refuses what it refuses.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use img_support::Bench;

/// What qemu-img says of the image that was made, without what depends on how space is laid out.
fn facts(bench: &Bench, image: &str) -> String {
    let info = bench.qemu_img(&["info", "--output=json", image]);
    let of_layout = |l: &&str| l.contains("actual-size") || l.contains("     \"virtual-size\"");
    info.lines().filter(|l| !of_layout(l)).collect()
}

#[test]
fn images_of_every_kind_are_made_alike() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    bench.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    for line in [
        &["-f", "qcow2", "new.qcow2", "1025"][..],
        &["-f", "qcow2", "new.qcow2", "0"],
        &["-f", "qcow2", "new.qcow2", "1.5G"],
        &["-f", "qcow2", "-o", "size=3M", "new.qcow2"],
        &["-qf", "qcow2", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=512,refcount_bits=1", "new.qcow2", "64M"],
        &["-f", "qcow2", "-o", "cluster_size=2M,refcount_bits=64,lazy_refcounts=yes", "new.qcow2", "1T"],
        &["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "compat=v3,compression_type=zstd,nolazy_refcounts", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "extended_l2=on", "-o", "cluster_size=16k", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "preallocation=metadata", "new.qcow2", "40M"],
        &[
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata,cluster_size=512,refcount_bits=64",
            "new.qcow2",
            "700k",
        ],
        &["-f", "qcow2", "-o", "preallocation=metadata,extended_l2=on", "new.qcow2", "3M"],
        &["-f", "qcow2", "-o", "preallocation=falloc", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "preallocation=full,nocow=off,extent_size_hint=1M", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "data_file=new.data", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "encryption=off", "new.qcow2", "1M"],
        &["-f", "qcow2", "-o", "data_file=new,,data,data_file_raw=on", "new.qcow2", "1M"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2", "8M"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "raw", "new.qcow2"],
        &["-f", "qcow2", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "new.qcow2", "1M"],
        &["-f", "qcow2", "-u", "-b", "missing", "-F", "qcow2", "new.qcow2", "1M"],
        &[
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,preallocation=metadata",
            "-Fqcow2",
            "-bbase.qcow2",
            "new.qcow2",
        ],
    ] {
        let mut full = vec!["create"];
        full.extend(line);
        let (theirs, ours, said) = bench.same_changes(&full);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(facts(&ours, "new.qcow2"), facts(&theirs, "new.qcow2"), "{line:?}");
        if !line.contains(&"-u") {
            ours.qemu_img(&["check", "-q", "new.qcow2"]);
        }
        if !line.contains(&"-u") && !line.contains(&"1T") {
            let zeros = |b: &Bench| b.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "new.qcow2", "out"]);
            zeros(&ours);
            zeros(&theirs);
            ours.qemu_img(&[
                "compare",
                "-f",
                "raw",
                "-F",
                "raw",
                "out",
                theirs.path("out").to_str().unwrap(),
            ]);
        }
    }
}

#[test]
fn raw_files_are_made_alike() {
    let bench = Bench::new();
    std::fs::write(bench.path("old.raw"), "what was there before").unwrap();
    for line in [
        &["create", "new.raw", "1000"][..],
        &["create", "-f", "raw", "old.raw", "5k"],
        &["create", "-f", "raw", "-o", "preallocation=falloc", "new.raw", "1M"],
        &["create", "-f", "raw", "-o", "preallocation=full,size=1M,nocow=on", "new.raw"],
    ] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        for name in ["new.raw", "old.raw"] {
            let read = |b: &Bench| std::fs::read(b.path(name)).ok();
            assert!(read(&ours) == read(&theirs), "{line:?} {name}");
        }
    }
}

#[test]
fn wrong_wishes_are_refused_alike() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    for line in [
        &["create"][..],
        &["create", "new.raw"],
        &["create", "new.raw", "1Z"],
        &["create", "new.raw", "9E"],
        &["create", "new.raw", "-1"],
        &["create", "new.raw", "1M", "more"],
        &["create", "-f", "nonsense", "new", "1M"],
        &["create", "-b", "base.qcow2", "-F", "qcow2", "new.raw"],
        &["create", "-o", "preallocation=metadata", "new.raw", "1M"],
        &["create", "-o", "cluster_size=4k", "new.raw", "1M"],
        &["create", "-f", "qcow2", "-b", "base.qcow2", "new"],
        &["create", "-f", "qcow2", "-b", "missing", "-F", "qcow2", "new"],
        &["create", "-f", "qcow2", "-u", "-b", "missing", "-F", "qcow2", "new"],
        &["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "nonsense", "new"],
        &["create", "-f", "qcow2", "-b", "", "new", "1M"],
        &["create", "-f", "qcow2", "-F", "qcow2", "new", "1M"],
        &["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "base.qcow2"],
        &["create", "-f", "qcow2", "-o", "size=1M", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "nonsense=1", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "size=1M,", "new"],
        &["create", "-f", "qcow2", "-o", "lazy_refcounts=2", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=x", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=100", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=4M", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=512", "new", "200T"],
        &["create", "-f", "qcow2", "-o", "refcount_bits=3", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "refcount_bits=128", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=2", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=0.10,refcount_bits=1", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=0.10,extended_l2=on", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=v2,compression_type=zstd", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=v2,data_file=d", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "compression_type=nonsense", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=4k", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "preallocation=nonsense", "new", "1M"],
        &["create", "-f", "qcow2", "-o", "preallocation=metadata", "-F", "qcow2", "-b", "base.qcow2", "new"],
        &["create", "-f", "qcow2", "-o", "data_file_raw=on", "new", "1M"],
        &["create", "-f", "qcow2", "missing_folder/new", "1M"],
        &["create", "nonsense:new", "1M"],
    ] {
        let (_, _, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(1), "{line:?}");
    }
}

#[test]
fn a_link_to_nothing_becomes_its_target_and_a_refused_size_leaves_no_file() {
    for line in [
        &["create", "-f", "qcow2", "link", "1M"][..],
        &["create", "link", "1M"],
        &["create", "-f", "qcow2", "too_large", "7E"],
    ] {
        let (a, b) = (Bench::new(), Bench::new());
        for bench in [&a, &b] {
            std::os::unix::fs::symlink("there", bench.path("link")).unwrap();
        }
        let (wanted, _) = img_support::theirs(line, a.dir.path());
        let (said, errors) = img_support::ours(line, b.dir.path());
        assert_eq!(said, wanted, "{line:?}: {errors}");
        for name in ["there", "too_large"] {
            let len = |bench: &Bench| std::fs::metadata(bench.path(name)).map(|m| m.is_file()).ok();
            assert_eq!(len(&b), len(&a), "{line:?} {name}");
        }
    }
}

#[test]
fn options_of_raw_files_are_listed_as_qemu_lists_them() {
    let bench = Bench::new();
    bench.same(&["create", "-f", "raw", "-o", "help"]);
    bench.same(&["create", "-f", "raw", "-o", "help", "new.raw"]);
    let text = bench.img(&["create", "-f", "qcow2", "-o", "help", "new"]);
    let theirs = bench.qemu_img(&["create", "-f", "qcow2", "-o", "help", "new"]);
    // Encryption is not offered; every other line is.
    let wanted: String =
        theirs.lines().filter(|l| !l.contains("encrypt")).map(|l| format!("{l}\n")).collect();
    assert_eq!(text, wanted);
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let before = std::fs::read(bench.path("a.qcow2")).unwrap();
    let reader = knib_qcow::FileStorage::open_with(
        &bench.path("a.qcow2"),
        knib_qcow::Access::Read,
        knib_qcow::Locking::Reader,
    );
    let (said, errors) = img_support::ours(&["create", "-q", "a.qcow2", "2M"], bench.dir.path());
    assert_eq!(said.code, Some(1));
    assert!(errors.contains("in use"), "{errors}");
    assert_eq!(std::fs::read(bench.path("a.qcow2")).unwrap(), before);
    drop(reader);
    bench.img(&["create", "-q", "a.qcow2", "2M"]);
}
