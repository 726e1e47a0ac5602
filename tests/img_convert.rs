//! `img convert` copies what `qemu-img convert` copies, into the same kinds of image.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use img_support::{Bench, ours, theirs, zoo};

/// What a guest would see, and whether the metadata holds together.
fn seen(bench: &Bench, format: &str, image: &str) -> Vec<u8> {
    if format == "qcow2" {
        bench.qemu_img(&["check", "-q", "-f", "qcow2", image]);
    }
    bench.guest(format, image)
}

#[test]
fn images_of_every_kind_convert_into_raw_and_qcow2() {
    let bench = Bench::new();
    for (image, format) in zoo(&bench) {
        let wanted = bench.guest(format, image);
        bench.img(&["convert", "-f", format, image, "out.raw"]);
        assert!(std::fs::read(bench.path("out.raw")).unwrap() == wanted, "{image}");
        bench.img(&["convert", "-O", "qcow2", image, "out.qcow2"]);
        assert!(seen(&bench, "qcow2", "out.qcow2") == wanted, "{image}");
        bench.img(&["convert", "-c", "-O", "qcow2", "-W", "-m", "0x4", image, "out.qcow2"]);
        assert!(seen(&bench, "qcow2", "out.qcow2") == wanted, "{image} compressed");
    }
}

#[test]
fn the_output_is_of_the_kind_that_was_asked_for() {
    let bench = Bench::new();
    zoo(&bench);
    let wanted = bench.guest("qcow2", "top.qcow2");
    for options in [
        "compat=0.10",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,lazy_refcounts=on",
        "extended_l2=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=full",
        "data_file=out.data",
        "data_file=out.data,data_file_raw=on",
    ] {
        for compress in [false, true] {
            let mut line = vec!["convert", "-O", "qcow2", "-o", options, "top.qcow2", "out.qcow2"];
            if compress {
                line.push("-c");
            }
            if compress && (options.contains("data_file") || options.contains("prealloc")) {
                continue;
            }
            let (theirs, ours, said) = bench.same_changes(&line);
            assert_eq!(said.code, Some(0), "{line:?}");
            assert!(seen(&ours, "qcow2", "out.qcow2") == wanted, "{line:?}");
            let facts = |b: &Bench| {
                let info = b.qemu_img(&["info", "out.qcow2"]);
                info.lines()
                    .filter(|l| !l.contains("disk size") && !l.contains("file length"))
                    .collect::<String>()
            };
            assert_eq!(facts(&ours), facts(&theirs), "{line:?}");
        }
    }
}

#[test]
fn an_existing_image_shows_the_source_whatever_it_held() {
    let bench = Bench::new();
    zoo(&bench);
    let wanted = bench.guest("qcow2", "top.qcow2");
    std::fs::write(bench.path("full.raw"), vec![9u8; 4 << 20]).unwrap();
    bench.qemu_img(&["convert", "-O", "qcow2", "full.raw", "full.qcow2"]);
    bench.qemu_img(&["convert", "-O", "qcow2", "-o", "compat=0.10", "full.raw", "full2.qcow2"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "full.qcow2", "-F", "qcow2", "overlay.qcow2"]);
    for (target, format) in
        [("full.raw", "raw"), ("full2.qcow2", "qcow2"), ("overlay.qcow2", "qcow2"), ("full.qcow2", "qcow2")]
    {
        for more in [&[][..], &["-S", "0"], &["-S", "64k"], &["-r", "1G", "-p"]] {
            let copy = bench.copy();
            let mut line = vec!["convert", "-n", "-O", format, "top.qcow2", target];
            line.extend(more);
            copy.img(&line);
            let shown = seen(&copy, format, target);
            assert!(shown[..wanted.len()] == wanted, "{line:?}");
            assert!(shown[wanted.len()..].iter().all(|b| *b == 9), "{line:?}: more was written");
        }
        if format == "qcow2" {
            let copy = bench.copy();
            copy.img(&["convert", "-n", "-c", "-O", format, "top.qcow2", target]);
            assert!(seen(&copy, format, target)[..wanted.len()] == wanted, "{target} compressed");
        }
    }
}

#[test]
fn a_zlib_image_is_not_larger_than_qemu_imgs_by_more_than_a_hundredth() {
    let bench = Bench::new();
    // A program: in such files matches of three bytes matter.
    let mut program = std::fs::read(env!("CARGO_BIN_EXE_knibfs")).unwrap();
    program.truncate(32 << 20);
    std::fs::write(bench.path("program.raw"), program).unwrap();
    let size = |out: &str| std::fs::metadata(bench.path(out)).unwrap().len() as f64;
    let line = ["convert", "-c", "-f", "raw", "-O", "qcow2", "program.raw"];
    assert_eq!(theirs(&[&line[..], &["theirs.qcow2"]].concat(), bench.dir.path()).0.code, Some(0));
    assert_eq!(ours(&[&line[..], &["ours.qcow2"]].concat(), bench.dir.path()).0.code, Some(0));
    // What is left of the last cluster is padding, which qemu-img leaves out.
    let (ours, theirs) = (size("ours.qcow2") - 65536.0, size("theirs.qcow2"));
    assert!(ours <= 1.01 * theirs, "{ours} bytes beside {theirs}");
    assert!(seen(&bench, "qcow2", "ours.qcow2") == seen(&bench, "raw", "program.raw"));
}

#[test]
fn sparse_detection_allocates_all_or_little() {
    let bench = Bench::new();
    std::fs::write(bench.path("a.raw"), vec![0u8; 1 << 20]).unwrap();
    for (line, allocated) in [
        (&["convert", "-O", "qcow2", "a.raw", "out"][..], false),
        (&["convert", "-O", "qcow2", "-S", "0", "a.raw", "out"], true),
        (&["convert", "-O", "raw", "a.raw", "out"], false),
        (&["convert", "-O", "raw", "-S", "0", "a.raw", "out"], true),
    ] {
        bench.img(line);
        let map = bench.qemu_img(&["map", "-f", line[2], "--output=json", "out"]);
        assert_eq!(map.contains("\"data\": true"), allocated, "{line:?}: {map}");
    }
}

#[test]
fn an_output_on_a_backing_file_holds_what_differs() {
    let bench = Bench::new();
    zoo(&bench);
    let wanted = bench.guest("qcow2", "top.qcow2");
    // The middle image is not among the output's, so its clusters are copied too.
    for (backing, most) in [("over.qcow2", 3), ("plain.qcow2", 6)] {
        for compress in [&[][..], &["-c"], &["-o", "compat=0.10"], &["-o", "extended_l2=on"]] {
            let mut line =
                vec!["convert", "-O", "qcow2", "-B", backing, "-F", "qcow2", "top.qcow2", "out.qcow2"];
            line.extend(compress);
            bench.img(&line);
            assert!(seen(&bench, "qcow2", "out.qcow2") == wanted, "{line:?}");
            let info = bench.qemu_img(&["info", "out.qcow2"]);
            assert!(info.contains(&format!("backing file: {backing}\n")), "{info}");
            let check = bench.qemu_img(&["check", "out.qcow2"]);
            let allocated: u64 = check.lines().find_map(|l| l.split_once('/')?.0.parse().ok()).unwrap();
            assert!(allocated <= most, "{line:?}: {check}");
        }
    }
}

#[test]
fn a_snapshot_or_several_images_in_a_row_are_copied() {
    let bench = Bench::new();
    zoo(&bench);
    for (line, out) in [
        (&["convert", "-l", "first", "states.qcow2", "out"][..], "raw"),
        (&["convert", "-l", "1", "states.qcow2", "out"], "raw"),
        (&["convert", "-l", "snapshot.name=1", "states.qcow2", "out"], "raw"),
        (
            &["convert", "-l", "snapshot.id=2,snapshot.name=1", "-c", "-O", "qcow2", "states.qcow2", "out"],
            "qcow2",
        ),
        (&["convert", "unaligned.raw", "plain.qcow2", "some.raw", "out"], "raw"),
        (&["convert", "-O", "qcow2", "-c", "unaligned.raw", "plain.qcow2", "odd.qcow2", "out"], "qcow2"),
        (&["convert", "-O", "qcow2", "-o", "cluster_size=2M", "odd.qcow2", "odd.qcow2", "out"], "qcow2"),
    ] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert!(seen(&ours, out, "out") == theirs.guest(out, "out"), "{line:?}");
    }
}

#[test]
fn a_block_device_is_written_and_read() {
    let bench = Bench::new();
    zoo(&bench);
    let wanted = bench.guest("qcow2", "top.qcow2");
    std::fs::write(bench.path("disk"), vec![7u8; 6 << 20]).unwrap();
    let disk = bench.path("disk");
    let device = std::process::Command::new("losetup").args(["-f", "--show"]).arg(&disk).output().unwrap();
    assert!(device.status.success(), "losetup: {}", String::from_utf8_lossy(&device.stderr));
    let device = String::from_utf8(device.stdout).unwrap().trim().to_owned();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bench.img(&["convert", "-O", "raw", "top.qcow2", &device]);
        assert!(bench.guest("raw", &device)[..wanted.len()] == wanted);
        bench.img(&["convert", "-f", "raw", "-O", "qcow2", &device, "back.qcow2"]);
        assert!(bench.guest("qcow2", "back.qcow2")[..wanted.len()] == wanted);
        bench.img(&["convert", "-O", "qcow2", "top.qcow2", &device]);
        assert!(seen(&bench, "qcow2", &device) == wanted);
        bench.same(&["info", &device]);
        bench.same(&["map", "-f", "raw", "--output=json", &device]);
    }));
    std::process::Command::new("losetup").args(["-d", &device]).status().unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn what_cannot_be_read_is_zeros_only_when_salvaged() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    bench.io("qcow2", "a.qcow2", &["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 128k 64k"]);
    let wanted = bench.guest("qcow2", "a.qcow2");
    let map = std::fs::read(bench.path("a.qcow2")).unwrap();
    let at = map.len();
    // The first compressed cluster is overwritten.
    let word = |at: usize| u64::from_be_bytes(map[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let stored = (word(l2) & ((1 << 54) - 1)) as usize;
    let mut bytes = map.clone();
    bytes[stored..(stored + 40).min(at)].fill(0xff);
    std::fs::write(bench.path("a.qcow2"), &bytes).unwrap();
    let (said, errors) = ours(&["convert", "a.qcow2", "out.raw"], bench.dir.path());
    assert_eq!(said.code, Some(1), "{errors}");
    assert!(errors.contains("compressed cluster"), "{errors}");
    let (said, errors) = ours(&["convert", "--salvage", "a.qcow2", "out.raw"], bench.dir.path());
    assert_eq!(said.code, Some(0), "{errors}");
    assert!(errors.contains("error while reading offset 0"), "{errors}");
    let shown = std::fs::read(bench.path("out.raw")).unwrap();
    assert!(shown[..64 << 10].iter().all(|b| *b == 0) && shown[64 << 10..] == wanted[64 << 10..]);
}

#[test]
fn wrong_wishes_are_refused_alike() {
    let bench = Bench::new();
    zoo(&bench);
    bench.qemu_img(&["create", "-q", "small.raw", "1M"]);
    for line in [
        &["convert"][..],
        &["convert", "top.qcow2"],
        &["convert", "missing", "out"],
        &["convert", "-S", "100", "top.qcow2", "out"],
        &["convert", "-S", "x", "top.qcow2", "out"],
        &["convert", "-m", "0", "top.qcow2", "out"],
        &["convert", "-m", "17", "top.qcow2", "out"],
        &["convert", "-m", "0x11", "top.qcow2", "out"],
        &["convert", "-c", "top.qcow2", "out"],
        &["convert", "-c", "-O", "qcow2", "-o", "preallocation=metadata", "top.qcow2", "out"],
        &["convert", "-C", "-c", "-O", "qcow2", "top.qcow2", "out"],
        &["convert", "-C", "-S", "4k", "top.qcow2", "out"],
        &["convert", "--target-is-zero", "top.qcow2", "out"],
        &["convert", "--skip-broken-bitmaps", "-O", "qcow2", "top.qcow2", "out"],
        &["convert", "--bitmaps", "states.qcow2", "out"],
        &["convert", "-l", "nonsense", "states.qcow2", "out"],
        &["convert", "-l", "first", "states.qcow2", "plain.qcow2", "out"],
        &["convert", "-O", "qcow2", "-B", "over.qcow2", "top.qcow2", "out"],
        &["convert", "-O", "qcow2", "-B", "over.qcow2", "-F", "qcow2", "top.qcow2", "plain.qcow2", "out"],
        &["convert", "-O", "qcow2", "-B", "missing", "-F", "qcow2", "top.qcow2", "out"],
        &["convert", "-O", "qcow2", "-F", "qcow2", "top.qcow2", "out"],
        &["convert", "-B", "over.qcow2", "-F", "qcow2", "top.qcow2", "out"],
        &["convert", "-n", "top.qcow2", "missing"],
        &["convert", "-n", "top.qcow2", "small.raw"],
        &["convert", "-n", "-o", "size=1M", "top.qcow2", "small.raw"],
        &["convert", "-r", "x", "top.qcow2", "out"],
        &["convert", "-O", "nonsense", "top.qcow2", "out"],
        &["convert", "-o", "nonsense=1", "top.qcow2", "out"],
        &["convert", "-t", "nonsense", "top.qcow2", "out"],
        &["convert", "-T", "nonsense", "top.qcow2", "out"],
        &["convert", "top.qcow2", "top.qcow2"],
        &["convert", "top.qcow2", "missing_folder/out"],
    ] {
        let (_, _, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(1), "{line:?}");
    }
}

#[test]
fn progress_is_percentages_that_end_at_a_hundred() {
    let bench = Bench::new();
    zoo(&bench);
    let shown = bench.img(&["convert", "-p", "top.qcow2", "out"]);
    assert!(shown.starts_with("    (0.00/100%)\r") && shown.ends_with("    (100.00/100%)\r\n"), "{shown:?}");
    assert_eq!(bench.img(&["convert", "-p", "-q", "top.qcow2", "out"]), "");
}

#[test]
fn progress_begins_and_ends_as_qemus() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base", "8M"]);
    bench.io("qcow2", "base", &["write -P 1 0 4M"]);
    std::fs::copy(bench.path("base"), bench.path("same")).unwrap();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]);
    bench.io("qcow2", "top", &["write -P 2 4M 3M"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "empty", "0"]);
    // How far each step goes depends on who works; what stands around the steps does not.
    let ends = |text: &str| {
        let lines: Vec<&str> = text.split_inclusive('\r').collect();
        let steps = lines.iter().filter(|l| l.starts_with("    (") && l.ends_with("/100%)\r")).count();
        let first = lines.first().copied().unwrap_or("").to_owned();
        let last = lines.last().copied().unwrap_or("").to_owned();
        assert!(steps + 1 >= lines.len(), "{text:?}");
        (first, text.contains("    (100.00/100%)\r"), last)
    };
    for line in [
        &["convert", "-O", "qcow2", "top", "out"][..],
        &["convert", "empty", "out"],
        &["convert", "missing", "out"],
        &["convert", "-O", "nonsense", "base", "out"],
        &["convert", "-t", "nonsense", "base", "out"],
        &["convert", "-S", "7", "base", "out"],
        &["convert", "base", "missing/out"],
        &["convert", "base"],
        &["compare", "base", "same"],
        &["compare", "-s", "empty", "base"],
        &["compare", "-T", "nonsense", "base", "same"],
        &["compare", "missing", "base"],
        &["compare", "base"],
        &["commit", "top"],
        &["commit", "-d", "top"],
        &["commit", "base"],
        &["commit", "missing"],
        &["commit", "-f", "raw", "base"],
        &["commit", "-b", "missing", "top"],
        &["commit", "-t", "nonsense", "top"],
        &["rebase", "-b", "same", "-F", "qcow2", "top"],
        &["rebase", "-u", "-b", "same", "-F", "qcow2", "top"],
        &["rebase", "-b", "missing", "-F", "qcow2", "top"],
        &["rebase", "-t", "nonsense", "-b", "same", "-F", "qcow2", "top"],
        &["rebase", "missing"],
        &["amend", "-o", "lazy_refcounts=on", "base"],
        &["amend", "-o", "compat=0.10", "top"],
        &["amend", "-o", "compat=1.1", "missing"],
        &["amend", "-t", "nonsense", "-o", "compat=1.1", "base"],
    ] {
        let line = [line, &["-p"]].concat();
        let (a, b) = (bench.copy(), bench.copy());
        let (wanted, _) = img_support::theirs(&line, a.dir.path());
        let (said, errors) = img_support::ours(&line, b.dir.path());
        assert_eq!(said.code, wanted.code, "{line:?}: {errors}");
        assert_eq!(ends(&said.stdout), ends(&wanted.stdout), "{line:?}");
    }
}
