//! `img info`, `map` and `check` say what `qemu-img` says, of images of every kind.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use std::os::unix::fs::FileExt as _;

use img_support::{Bench, ours, zoo};

#[test]
fn images_of_every_kind_look_the_same() {
    let bench = Bench::new();
    for (image, format) in zoo(&bench) {
        for line in [
            &["info"][..],
            &["info", "--output=json"],
            &["info", "-U", "--backing-chain", "--output", "json"],
            &["info", "--backing-chain", "-f", format],
            &["map", "--output=json"],
            &["map", "-f", format],
            &["map", "--output=json", "--start-offset=100k", "--max-length=1M"],
            &["check", "-U"],
            &["check", "--output=json", "-f", format],
        ] {
            let mut line = line.to_vec();
            line.push(image);
            bench.same(&line);
        }
    }
}

#[test]
fn wrong_lines_end_with_the_same_code_and_a_sentence() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    std::fs::copy(bench.path("a.qcow2"), bench.path("odd:a.qcow2")).unwrap();
    for line in [
        &[][..],
        &["nonsense"],
        &["--nonsense"],
        &["info"],
        &["info", "a.qcow2", "a.qcow2"],
        &["info", "missing"],
        &["info", "-x", "a.qcow2"],
        &["info", "-f"],
        &["info", "-f", "nonsense", "a.qcow2"],
        &["info", "-f", "vmdk", "a.qcow2"],
        &["info", "--output=xml", "a.qcow2"],
        &["info", "."],
        &["info", "nbd://localhost/x"],
        &["info", "nonsense:x"],
        &["map", "missing"],
        &["map", "--start-offset=x", "a.qcow2"],
        &["map", "--start-offset", "65537", "--max-length", "70000", "a.qcow2"],
        &["map", "--output=json", "-s", "1T", "a.qcow2"],
        &["check", "-q", "a.qcow2"],
        &["check", "missing"],
        &["check"],
        &["check", "-f", "raw", "a.qcow2"],
        &["check", "-T", "nonsense", "a.qcow2"],
        &["--", "info", "a.qcow2"],
        &["info", "file:a.qcow2"],
        &["info", "file:odd:a.qcow2"],
    ] {
        bench.same(line);
    }
}

#[test]
fn what_is_not_supported_is_said_in_a_sentence() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "vmdk", "a.vmdk", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    for (line, word) in [
        (&["info", "a.vmdk"][..], "VMDK"),
        (&["info", "--image-opts", "driver=qcow2,file.driver=nbd,file.host=h"], "nbd"),
        (
            &["info", "--image-opts", "driver=qcow2,file.filename=a.qcow2,backing.driver=raw"],
            "backing.driver",
        ),
        (&["info", "--object", "secret,id=s,data=x", "a.qcow2"], "--object"),
        (&["info", "json:{}"], "json"),
    ] {
        let (said, errors) = ours(line, bench.dir.path());
        assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{line:?}");
        assert!(errors.contains(word) && errors.contains("supported"), "{line:?}: {errors}");
    }
}

#[test]
fn images_are_named_by_options_too() {
    let bench = Bench::new();
    zoo(&bench);
    let (plain, raw) = ("driver=qcow2,file.driver=file,file.filename=plain.qcow2", "file.filename=some.raw");
    let shared = format!("{plain},force-share=on");
    for line in [
        &["info", plain][..],
        &["info", &shared],
        &["info", "--output=json", "-U", raw],
        &["check", plain],
        &["map", "driver=raw,file.filename=some.raw"],
        &["snapshot", "-l", "driver=qcow2,file.filename=states.qcow2"],
        &["measure", "-O", "qcow2", plain],
        &["compare", plain, "driver=raw,file.filename=some.raw"],
        &["compare", plain, plain],
        // What does not go together.
        &["info", "-f", "qcow2", plain],
        &["compare", "-f", "qcow2", plain, plain],
        &["compare", "driver=qcow2,file.filename=plain.qcow2,nonsense=on", plain],
        &["info", "plain.qcow2"],
        &["info", "driver=qcow2"],
        &["info", "driver=nonsense,file.filename=plain.qcow2"],
        &["info", "driver=qcow2,file.filename=plain.qcow2,nonsense=on"],
        &["info", "driver=qcow2,file.filename=missing"],
        &["create", "-f", "qcow2", "driver=qcow2,file.filename=new", "1M"],
    ] {
        let line: Vec<&str> = [&line[..1], &["--image-opts"], &line[1..]].concat();
        bench.same(&line);
    }
    for (line, image, format) in [
        (&["resize", "--image-opts", plain, "9M"][..], "plain.qcow2", "qcow2"),
        (&["bitmap", "--image-opts", "--add", plain, "b"], "plain.qcow2", "qcow2"),
        (&["amend", "--image-opts", "-o", "lazy_refcounts=on", plain], "plain.qcow2", "qcow2"),
        (&["commit", "--image-opts", "driver=qcow2,file.filename=top.qcow2"], "over.qcow2", "qcow2"),
        (&["convert", "--image-opts", "-O", "qcow2", plain, "new.qcow2"], "new.qcow2", "qcow2"),
        (&["convert", "--image-opts", plain, plain, "new.raw"], "new.raw", "raw"),
        (
            &[
                "convert",
                "-n",
                "--target-image-opts",
                "over_raw.qcow2",
                "driver=qcow2,file.filename=over.qcow2",
            ],
            "over.qcow2",
            "qcow2",
        ),
    ] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert!(ours.guest(format, image) == theirs.guest(format, image), "{line:?}");
    }
    bench.same(&["convert", "--target-image-opts", "plain.qcow2", "driver=raw,file.filename=some.raw"]);
    let target = "driver=raw,file.filename=some.raw";
    bench.same(&["convert", "-n", "-O", "qcow2", "--target-image-opts", "plain.qcow2", target]);
}

#[test]
fn damage_is_counted_as_qemu_counts_it() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    bench.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    let base = std::fs::read(bench.path("base.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(base[at..at + 8].try_into().unwrap());
    let block = word(word(48) as usize) as usize;
    let l1 = word(40) as usize;
    let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
    for (name, at, bytes) in [
        ("a refcount that is too low", block + 12, &[0, 0][..]),
        ("a leak", block + 12, &[0, 2]),
        ("the refcount of the header", block, &[0, 0]),
        ("a copied flag that is missing", l2, &[0]),
        ("the L2 table's copied flag", l1, &[0]),
        ("a cluster used twice", l2 + 8, &base[l2..l2 + 8]),
        ("a cluster past the end", l2 + 3, &[9]),
    ] {
        std::fs::copy(bench.path("base.qcow2"), bench.path("hurt.qcow2")).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(bench.path("hurt.qcow2")).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
        drop(file);
        let said = bench.same(&["check", "hurt.qcow2"]);
        assert_ne!(said.code, Some(0), "{name}");
        bench.same(&["check", "--output=json", "hurt.qcow2"]);
        bench.same(&["check", "-q", "hurt.qcow2"]);
    }
}

#[test]
fn an_image_that_is_written_is_left_alone_unless_shared() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let path = bench.path("a.qcow2");
    let writer = knib_qcow::FileStorage::open(&path, knib_qcow::Access::ReadWrite).unwrap();
    for line in [["info", "a.qcow2"], ["map", "a.qcow2"], ["check", "a.qcow2"]] {
        let said = bench.same(&line);
        assert_eq!(said.code, Some(1), "{line:?}");
        bench.same(&[line[0], "-U", line[1]]);
    }
    drop(writer);
    bench.same(&["info", "a.qcow2"]);
}

#[test]
fn help_and_version_are_there() {
    let bench = Bench::new();
    for line in [&["--help"][..], &["-h"], &["info", "--help"], &["map", "-h"]] {
        let text = bench.img(line);
        assert!(text.contains("Usage: knibfs img"), "{line:?}: {text}");
    }
    assert!(bench.img(&["--version"]).starts_with("qemu-img version 10."));
}
