//! `img check -r`, `resize`, `snapshot` and `amend` change images as `qemu-img` does.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use std::os::unix::fs::FileExt as _;

use img_support::{Bench, zoo};

fn size_of(bench: &Bench, image: &str) -> String {
    let info = bench.qemu_img(&["info", image]);
    info.lines().find(|l| l.starts_with("virtual size")).unwrap().to_owned()
}

#[test]
fn damaged_refcounts_are_repaired_and_told_alike() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    bench.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    let wanted = bench.guest("qcow2", "base.qcow2");
    let base = std::fs::read(bench.path("base.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(base[at..at + 8].try_into().unwrap());
    let block = word(word(48) as usize) as usize;
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    for (name, at, bytes, how) in [
        ("nothing", block + 12, &[0, 1][..], &["leaks", "all"][..]),
        ("a leak", block + 12, &[0, 2], &["leaks", "all"]),
    ] {
        std::fs::copy(bench.path("base.qcow2"), bench.path("hurt.qcow2")).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(bench.path("hurt.qcow2")).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
        drop(file);
        for how in how {
            for more in [&[][..], &["--output=json"], &["-q"]] {
                let mut line = vec!["check", "-r", how, "hurt.qcow2"];
                line.extend(more);
                let (_, ours, said) = bench.same_changes(&line);
                assert_eq!(said.code, Some(0), "{name}: {line:?}");
                ours.qemu_img(&["check", "-q", "hurt.qcow2"]);
                assert!(ours.guest("qcow2", "hurt.qcow2") == wanted, "{name}: {line:?}");
            }
        }
    }
    // What is rebuilt from nothing, or moved so that a cut does no harm, lies elsewhere than QEMU's: the outcome counts.
    for at in [block, block + 12, l2] {
        std::fs::copy(bench.path("base.qcow2"), bench.path("hurt.qcow2")).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(bench.path("hurt.qcow2")).unwrap();
        file.write_all_at(&[0, 0], at as u64).unwrap();
        drop(file);
        let text = bench.img(&["check", "-r", "all", "hurt.qcow2"]);
        assert!(text.contains("    0 leaked clusters\n    1 corruptions\n"), "{text}");
        bench.qemu_img(&["check", "-q", "hurt.qcow2"]);
        assert!(bench.guest("qcow2", "hurt.qcow2") == wanted);
    }
    // A copied flag that is wrong by itself is put right with the leaks, of which there may be none.
    for (count, how) in [(1, "leaks"), (2, "leaks"), (2, "all")] {
        std::fs::copy(bench.path("base.qcow2"), bench.path("hurt.qcow2")).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(bench.path("hurt.qcow2")).unwrap();
        file.write_all_at(&[0, 0], l2 as u64).unwrap();
        file.write_all_at(&[0, count], block as u64 + 12).unwrap();
        drop(file);
        let line = ["check", "-r", how, "hurt.qcow2"];
        let said = format!("    {} leaked clusters\n    1 corruptions\n", count - 1);
        let (theirs, _) = img_support::theirs(&line, bench.copy().dir.path());
        assert!(theirs.code == Some(0) && theirs.stdout.contains(&said), "{}", theirs.stdout);
        let text = bench.img(&line);
        assert!(text.contains(&said), "{count}, {how}: {text}");
        bench.qemu_img(&["check", "-q", "hurt.qcow2"]);
        assert!(bench.guest("qcow2", "hurt.qcow2") == wanted, "{count}, {how}");
    }
}

#[test]
fn refcount_blocks_that_share_their_place_are_told_alike_and_only_all_makes_them_anew() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "base.qcow2", "1M"]);
    bench.io("qcow2", "base.qcow2", &["write -P 1 0 64k"]);
    let wanted = bench.guest("qcow2", "base.qcow2");
    let base = std::fs::read(bench.path("base.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(base[at..at + 8].try_into().unwrap());
    let (table, l1) = (word(48) as usize, word(40));
    let block = word(table);
    let l2 = word(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let data = word(l2 as usize) & 0x00ff_ffff_ffff_fe00;
    for (what, at, value) in [
        ("the same block twice", table + 8, block),
        ("a block where the L1 table lies", table + 8, l1),
        ("a block where data lies", table + 8, data),
        ("a block whose entry has reserved bits", table, block | 1),
        ("data where the block lies", l2 as usize + 256, block),
    ] {
        let mut hurt = base.clone();
        hurt[at..at + 8].copy_from_slice(&value.to_be_bytes());
        std::fs::write(bench.path("hurt.qcow2"), hurt).unwrap();
        // A block that is used all the same is no lost space here, as it is for QEMU.
        if !what.ends_with("reserved bits") {
            assert_eq!(bench.same(&["check", "hurt.qcow2"]).code, Some(2), "{what}");
        }
        let (_, ours, said) = bench.same_changes(&["check", "-r", "leaks", "hurt.qcow2"]);
        assert_eq!(said.code, Some(1), "{what}");
        let left = |b: &Bench| std::fs::read(b.path("hurt.qcow2")).unwrap();
        assert!(left(&ours) == left(&bench), "{what}: nothing was written");
        let copy = bench.copy();
        copy.img(&["check", "-r", "all", "hurt.qcow2"]);
        copy.qemu_img(&["check", "-q", "hurt.qcow2"]);
        if !what.starts_with("data") {
            assert!(copy.guest("qcow2", "hurt.qcow2") == wanted, "{what}");
        }
    }
}

#[test]
fn a_header_that_lost_its_refcount_table_is_checked_and_repaired_alike() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    bench.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    let wanted = bench.guest("qcow2", "base.qcow2");
    // No clusters; past the end of the file; where the first refcount block lies.
    for (at, value) in [(56, 0u64), (48, 9 << 32), (48, 2 << 16)] {
        std::fs::copy(bench.path("base.qcow2"), bench.path("hurt.qcow2")).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(bench.path("hurt.qcow2")).unwrap();
        file.write_all_at(&value.to_be_bytes()[..if at == 56 { 4 } else { 8 }], at).unwrap();
        drop(file);
        assert_eq!(bench.same(&["check", "-q", "hurt.qcow2"]).code, Some(2));
        let copy = bench.copy();
        // Leaks cannot be told where clusters in use are not counted.
        let line = ["check", "-r", "leaks", "hurt.qcow2"];
        let (said, errors) = img_support::ours(&line, copy.dir.path());
        assert!(said.code == Some(1) && errors.contains("-r all"), "{errors}");
        assert_eq!(img_support::theirs(&line, bench.copy().dir.path()).0.code, Some(1));
        copy.img(&["check", "-r", "all", "hurt.qcow2"]);
        copy.qemu_img(&["check", "-q", "hurt.qcow2"]);
        assert!(copy.guest("qcow2", "hurt.qcow2") == wanted);
    }
}

#[test]
fn disks_grow_and_shrink_alike() {
    let bench = Bench::new();
    zoo(&bench);
    for (image, format, size) in [
        ("plain.qcow2", "qcow2", "8M"),
        ("plain.qcow2", "qcow2", "+1M"),
        ("plain.qcow2", "qcow2", "+0"),
        ("plain.qcow2", "qcow2", "-2M"),
        ("plain.qcow2", "qcow2", "512"),
        ("v2.qcow2", "qcow2", "5M"),
        ("odd.qcow2", "qcow2", "2M"),
        ("sub.qcow2", "qcow2", "200k"),
        ("over.qcow2", "qcow2", "7M"),
        ("top.qcow2", "qcow2", "5M"),
        ("external.qcow2", "qcow2", "5M"),
        ("zstd.qcow2", "qcow2", "64k"),
        ("some.raw", "raw", "4M"),
        ("some.raw", "raw", "-1M"),
        ("some.raw", "raw", "-1k"),
        ("unaligned.raw", "raw", "5001"),
    ] {
        let (theirs, ours, said) = bench.same_changes(&["resize", "--shrink", "-f", format, image, size]);
        assert_eq!(said.code, Some(0), "{image} {size}");
        assert_eq!(size_of(&ours, image), size_of(&theirs, image), "{image} {size}");
        assert!(ours.guest(format, image) == theirs.guest(format, image), "{image} {size}");
        if format == "qcow2" {
            ours.qemu_img(&["check", "-q", image]);
        }
    }
    for line in [&["resize", "plain.qcow2", "-1M", "--shrink"][..], &["resize", "plain.qcow2", "8M", "-q"]] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(size_of(&ours, "plain.qcow2"), size_of(&theirs, "plain.qcow2"), "{line:?}");
    }
    for how in ["metadata", "falloc", "full"] {
        let line = ["resize", "-q", "--preallocation", how, "plain.qcow2", "6M"];
        let (theirs, ours, said) = bench.same_changes(&line);
        assert_eq!(said.code, Some(0), "{how}");
        assert!(ours.guest("qcow2", "plain.qcow2") == theirs.guest("qcow2", "plain.qcow2"), "{how}");
        ours.qemu_img(&["check", "-q", "plain.qcow2"]);
    }
}

/// The list of snapshots without their dates.
fn listed(bench: &Bench, image: &str) -> Vec<String> {
    let text = bench.qemu_img(&["snapshot", "-l", image]);
    text.lines().skip(2).map(|l| l.split_whitespace().take(3).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn snapshots_are_made_applied_and_deleted_alike() {
    let bench = Bench::new();
    zoo(&bench);
    bench.same(&["snapshot", "states.qcow2"]);
    bench.same(&["snapshot", "-l", "plain.qcow2"]);
    bench.same(&["snapshot", "-l", "-U", "some.raw"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "two.qcow2", "2M"]);
    bench.io("qcow2", "two.qcow2", &["write -P 1 0 128k"]);
    bench.qemu_img(&["snapshot", "-c", "first", "two.qcow2"]);
    bench.io("qcow2", "two.qcow2", &["write -P 2 64k 128k"]);
    bench.qemu_img(&["snapshot", "-c", "1", "two.qcow2"]);
    bench.io("qcow2", "two.qcow2", &["write -P 3 1M 64k"]);
    for (image, line) in [
        ("states.qcow2", &["snapshot", "-c", "new", "states.qcow2"][..]),
        ("two.qcow2", &["snapshot", "-a", "first", "two.qcow2"]),
        ("two.qcow2", &["snapshot", "-a", "1", "two.qcow2"]),
        ("states.qcow2", &["snapshot", "-d", "first", "states.qcow2"]),
        ("states.qcow2", &["snapshot", "-q", "-d", "1", "-f", "qcow2", "states.qcow2"]),
        ("v2.qcow2", &["snapshot", "-c", "old", "v2.qcow2"]),
        ("sub.qcow2", &["snapshot", "-c", "sub", "sub.qcow2"]),
        ("zstd.qcow2", &["snapshot", "-c", "packed", "zstd.qcow2"]),
        ("top.qcow2", &["snapshot", "-c", "over", "top.qcow2"]),
    ] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert_eq!(listed(&ours, image), listed(&theirs, image), "{line:?}");
        ours.qemu_img(&["check", "-q", image]);
        assert!(ours.guest("qcow2", image) == theirs.guest("qcow2", image), "{line:?}");
        // What is written now does not reach the snapshots.
        ours.io("qcow2", image, &["write -P 0x66 0 256k"]);
        ours.qemu_img(&["check", "-q", image]);
        for snapshot in listed(&ours, image) {
            let id = snapshot.split(' ').next().unwrap();
            let of = |b: &Bench| {
                b.qemu_img(&["convert", "-l", &format!("snapshot.id={id}"), "-O", "raw", image, "then"]);
                std::fs::read(b.path("then")).unwrap()
            };
            assert!(of(&ours) == of(&theirs), "{line:?}: snapshot {id}");
        }
    }
}

#[test]
fn options_are_amended_alike() {
    let bench = Bench::new();
    zoo(&bench);
    bench.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "-b",
        "v2.qcow2",
        "-F",
        "qcow2",
        "old.qcow2",
    ]);
    let zeros =
        ["write -P 1 0 1M", "write -z 0 64k", "write -z 128k 64k", "discard 256k 64k", "write -z 2M 64k"];
    for (image, backing) in [("zeros.qcow2", false), ("zeros_over.qcow2", true), ("narrow.qcow2", false)] {
        let mut line = vec!["create", "-q", "-f", "qcow2", "-o"];
        line.push(if image == "narrow.qcow2" { "refcount_bits=8" } else { "lazy_refcounts=on" });
        if backing {
            line.extend(["-b", "plain.qcow2", "-F", "qcow2"]);
        }
        line.extend([image, "4M"]);
        bench.qemu_img(&line);
        bench.io("qcow2", image, &zeros);
        bench.qemu_img(&["snapshot", "-c", "one", image]);
        bench.io("qcow2", image, &["write -P 2 100k 64k", "write -z 512k 64k"]);
        bench.qemu_img(&["snapshot", "-c", "two", image]);
        bench.io("qcow2", image, &["write -P 3 2M 64k"]);
    }
    for (image, options) in [
        ("v2.qcow2", "compat=1.1"),
        ("old.qcow2", "compat=v3,lazy_refcounts=on"),
        ("plain.qcow2", "lazy_refcounts=on"),
        ("big.qcow2", "lazy_refcounts=off"),
        ("plain.qcow2", "size=9M,refcount_bits=16"),
        ("v2.qcow2", "compat=0.10"),
        ("states.qcow2", "compat=0.10"),
        ("zeros.qcow2", "compat=0.10"),
        ("zeros_over.qcow2", "compat=0.10"),
        ("narrow.qcow2", "compat=0.10,refcount_bits=16"),
    ] {
        let (theirs, ours, said) = bench.same_changes(&["amend", "-o", options, image]);
        assert_eq!(said.code, Some(0), "{image} {options}");
        let facts = |b: &Bench| {
            let info = b.qemu_img(&["info", image]);
            info.lines()
                .filter(|l| !l.contains("disk size") && !l.contains("file length"))
                .collect::<String>()
        };
        assert_eq!(facts(&ours), facts(&theirs), "{image} {options}");
        assert!(ours.guest("qcow2", image) == theirs.guest("qcow2", image), "{image} {options}");
        ours.qemu_img(&["check", "-q", image]);
        assert_eq!(listed(&ours, image), listed(&bench, image), "{image} {options}");
        for (n, _) in listed(&ours, image).iter().enumerate() {
            let id = format!("snapshot.id={}", n + 1);
            let then = |b: &Bench| {
                b.qemu_img(&["convert", "-l", &id, "-O", "raw", image, "then"]);
                std::fs::read(b.path("then")).unwrap()
            };
            assert!(then(&ours) == then(&bench), "{image} {options}: {id}");
        }
    }
    // A size of nothing is no size.
    let (theirs, ours, _) = bench.same_changes(&["amend", "-o", "size=0", "plain.qcow2"]);
    assert!(ours.guest("qcow2", "plain.qcow2") == theirs.guest("qcow2", "plain.qcow2"));
    // A data file under another name.
    let name = bench.qemu_img(&["info", "-U", "--output=json", "external.qcow2"]);
    let name = name.split("\"data-file\": \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    std::fs::copy(bench.path(name), bench.path("moved")).unwrap();
    let (theirs, ours, _) = bench.same_changes(&["amend", "-o", "data_file=moved", "external.qcow2"]);
    std::fs::remove_file(ours.path(name)).unwrap();
    let header = |b: &Bench| {
        let text = b.qemu_img(&["info", "external.qcow2"]);
        text.lines().filter(|line| !line.contains("disk size")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(header(&ours), header(&theirs));
    assert!(ours.guest("qcow2", "external.qcow2") == bench.guest("qcow2", "external.qcow2"));
    assert_eq!(bench.same_changes(&["amend", "-o", "data_file=moved", "plain.qcow2"]).2.code, Some(1));
    // What version 2 cannot say.
    bench.qemu_img(&["resize", "-q", "states.qcow2", "9M"]);
    for image in ["states.qcow2", "sub.qcow2", "external.qcow2", "big.qcow2"] {
        let (_, _, said) = bench.same_changes(&["amend", "-o", "compat=0.10", image]);
        assert_eq!(said.code, Some(1), "{image}");
    }
}

#[test]
fn wrong_wishes_are_refused_alike() {
    let bench = Bench::new();
    zoo(&bench);
    for line in [
        &["check", "-r", "nonsense", "plain.qcow2"][..],
        &["check", "-r", "all", "-U", "plain.qcow2"],
        &["check", "-r", "all", "missing"],
        &["resize", "plain.qcow2"],
        &["resize", "plain.qcow2", "x"],
        &["resize", "plain.qcow2", "1M"],
        &["resize", "plain.qcow2", "-1M"],
        &["resize", "plain.qcow2", "--shrink", "-1M"],
        &["resize", "-1M", "plain.qcow2"],
        &["resize", "plain.qcow2", "8M", "--preallocation"],
        &["resize", "--shrink", "plain.qcow2", "-9M"],
        &["resize", "plain.qcow2", "4194305"],
        &["resize", "--preallocation=nonsense", "plain.qcow2", "8M"],
        &["resize", "--preallocation=full", "--shrink", "plain.qcow2", "1M"],
        &["resize", "--preallocation=metadata", "-f", "raw", "some.raw", "8M"],
        &["resize", "missing", "1M"],
        &["snapshot"],
        &["snapshot", "-l", "-c", "x", "plain.qcow2"],
        &["snapshot", "-U", "-c", "x", "plain.qcow2"],
        &["snapshot", "-c", "x", "some.raw"],
        &["snapshot", "-c", "x", "external.qcow2"],
        &["snapshot", "-a", "nonsense", "states.qcow2"],
        &["snapshot", "-a", "first", "states.qcow2"],
        &["snapshot", "-d", "nonsense", "states.qcow2"],
        &["snapshot", "-d", "2", "states.qcow2"],
        &["amend", "plain.qcow2"],
        &["amend", "-o", "nonsense=1", "plain.qcow2"],
        &["amend", "-o", "cluster_size=4k", "plain.qcow2"],
        &["amend", "-o", "lazy_refcounts=on", "some.raw"],
        &["amend", "-o", "lazy_refcounts=on", "v2.qcow2"],
        &["amend", "-o", "backing_file=v2.qcow2", "plain.qcow2"],
        &["amend", "-o", "size=5000001", "plain.qcow2"],
        &["resize", "--image-opts", "driver=qcow2,file.filename=plain.qcow2,force-share=on", "9M"],
    ] {
        let (_, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(1), "{line:?}");
        for image in ["plain.qcow2", "states.qcow2", "v2.qcow2"] {
            let read = |b: &Bench| std::fs::read(b.path(image)).unwrap();
            assert!(read(&ours) == read(&bench), "{line:?} changed {image}");
        }
    }
}
