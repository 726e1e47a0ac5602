//! `img compare` and `img measure` say what `qemu-img` says.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use img_support::{Bench, zoo};

#[test]
fn images_compare_alike() {
    let bench = Bench::new();
    let all = zoo(&bench);
    bench.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "top.raw"]);
    bench.qemu_img(&["convert", "-f", "qcow2", "-O", "qcow2", "-c", "top.qcow2", "packed.qcow2"]);
    for (a, b) in [("top.qcow2", "top.raw"), ("top.raw", "packed.qcow2"), ("packed.qcow2", "top.qcow2")] {
        assert_eq!(bench.same(&["compare", a, b]).code, Some(0));
        bench.same(&["compare", "-s", a, b]);
        bench.same(&["compare", "-q", a, b]);
    }
    // Each with the next: some differ in content, some in size, some in both.
    for pair in all.windows(2) {
        let ((a, f), (b, g)) = (pair[0], pair[1]);
        bench.same(&["compare", "-f", f, "-F", g, a, b]);
        bench.same(&["compare", "-s", a, b]);
    }
    bench.same(&["compare", "-U", "-T", "none", "empty.qcow2", "nothing.raw"]);
}

#[test]
fn one_changed_byte_is_found_where_qemu_finds_it() {
    let bench = Bench::new();
    zoo(&bench);
    for at in [0u64, 65_535, 70_000, 1_048_575, 3_145_727] {
        bench.qemu_img(&["convert", "-f", "qcow2", "-O", "qcow2", "top.qcow2", "other.qcow2"]);
        bench.io("qcow2", "other.qcow2", &[&format!("write -P 0x77 {at} 1")]);
        assert_eq!(bench.same(&["compare", "top.qcow2", "other.qcow2"]).code, Some(1));
        bench.same(&["compare", "-s", "other.qcow2", "top.qcow2"]);
    }
}

#[test]
fn errors_have_the_codes_of_qemu() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    for line in [
        &["compare", "a.qcow2"][..],
        &["compare", "a.qcow2", "missing"],
        &["compare", "missing", "a.qcow2"],
        &["compare", "-f", "nonsense", "a.qcow2", "a.qcow2"],
        &["compare", "-T", "nonsense", "a.qcow2", "a.qcow2"],
        &["compare", "-x", "a.qcow2", "a.qcow2"],
        &["measure"],
        &["measure", "a.qcow2", "a.qcow2"],
        &["measure", "--size", "x"],
        &["measure", "--size", "1M", "a.qcow2"],
        &["measure", "-l", "s", "--size", "1M"],
        &["measure", "-f", "qcow2", "--size", "1M"],
        &["measure", "-O", "nonsense", "--size", "1M"],
        &["measure", "-o", "nonsense=1", "--size", "1M"],
        &["measure", "-O", "qcow2", "-o", "cluster_size=1", "--size", "1M"],
        &["measure", "missing"],
        &["measure", "-O", "qcow2", "--size", "7E"],
        &["measure", "-O", "qcow2", "-o", "cluster_size=512", "--size", "129G"],
        &["measure", "-O", "qcow2", "-o", "cluster_size=512", "--size", "128G"],
        &["measure", "-O", "qcow2", "-o", "backing_file=a.qcow2,backing_fmt=qcow2", "--size", "1G"],
        &["measure", "-O", "qcow2", "-o", "backing_file=a.qcow2,backing_fmt=qcow2", "a.qcow2"],
        &["measure", "-l", "nonsense", "a.qcow2"],
    ] {
        bench.same(line);
    }
}

#[test]
fn measures_agree() {
    let bench = Bench::new();
    for (image, format) in zoo(&bench) {
        bench.same(&["measure", "-f", format, image]);
        bench.same(&["measure", "-O", "qcow2", "--output=json", image]);
        bench.same(&["measure", "-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=1", image]);
    }
    for line in [
        &["measure", "--size", "1G"][..],
        &["measure", "--size", "10G", "-O", "qcow2", "-o", "cluster_size=4k"],
        &["measure", "--size", "1T", "-O", "qcow2", "-o", "extended_l2=on"],
        &["measure", "--size", "1M", "-O", "qcow2", "-o", "preallocation=full", "--output=json"],
        &["measure", "--size", "1M", "-O", "qcow2", "-o", "preallocation=metadata"],
        &["measure", "-O", "qcow2", "-l", "first", "states.qcow2"],
        &["measure", "-O", "qcow2", "-l", "snapshot.id=2", "states.qcow2"],
        &["measure", "-O", "qcow2", "-o", "backing_file=some.raw,backing_fmt=raw", "over_raw.qcow2"],
    ] {
        bench.same(line);
    }
}

#[test]
fn a_measure_looks_only_at_the_options_that_count_for_it() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    bench.qemu_img(&["bitmap", "--add", "a.qcow2", "b"]);
    for options in [
        "data_file_raw=on",
        "data_file=x,data_file_raw=on,backing_file=y,backing_fmt=raw",
        "backing_fmt=qcow2",
        "backing_fmt=nonsense",
        "backing_file=x",
        "backing_file=,backing_fmt=raw",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,data_file=x",
        "compat=0.10,extended_l2=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,refcount_bits=8",
        "compat=0.10",
        "compat=1.1",
        "compat=v2",
        "compat=v3",
        "compat=nonsense",
        "compression_type=nonsense",
        "lazy_refcounts=nonsense",
        "cluster_size=3k",
        "refcount_bits=3",
        "refcount_bits=128",
        "extended_l2=on,cluster_size=8k",
        "preallocation=metadata,backing_file=x,backing_fmt=raw",
        "preallocation=full,backing_file=x,backing_fmt=raw",
        "preallocation=nonsense",
        "size=5M",
    ] {
        bench.same(&["measure", "-O", "qcow2", "-o", options, "--size", "1M"]);
        bench.same(&["measure", "-O", "qcow2", "-o", options, "a.qcow2"]);
    }
    for options in ["size=5M", "preallocation=metadata", "preallocation=nonsense", "nocow=on"] {
        bench.same(&["measure", "-o", options, "--size", "1M"]);
    }
}

#[test]
fn damage_ends_a_comparison_with_the_code_of_qemu() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "good.qcow2", "1M"]);
    bench.io("qcow2", "good.qcow2", &["write -P 1 0 64k", "write -c -P 1 64k 4k"]);
    let good = std::fs::read(bench.path("good.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let l1 = word(40) as usize;
    let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let stored = (word(l2 + 128) & 0x03ff_ffff_ffff_ffff) as usize;
    let entry = |value: u64| value.to_be_bytes().to_vec();
    for (what, at, bytes, code) in [
        ("a cluster that lies askew", l2 + 8, entry(word(l2 + 8) | 0x200), 3),
        ("an L2 table that lies askew", l1, entry(word(l1) | 0x200), 3),
        ("compressed bytes that are none", stored, vec![0xff; 10], 4),
        ("compressed bytes past the end", l2 + 128, entry(1 << 62 | 1 << 40), 4),
    ] {
        let mut hurt = good.clone();
        hurt[at..at + bytes.len()].copy_from_slice(&bytes);
        std::fs::write(bench.path("hurt.qcow2"), hurt).unwrap();
        for line in [
            &["compare", "hurt.qcow2", "good.qcow2"][..],
            &["compare", "good.qcow2", "hurt.qcow2"],
            &["compare", "-s", "hurt.qcow2", "good.qcow2"],
            &["compare", "-s", "good.qcow2", "hurt.qcow2"],
        ] {
            // QEMU marks an image in which it comes upon such damage.
            let (_, _, said) = bench.same_changes(line);
            assert_eq!(said.code, Some(code), "{what}: {line:?}");
        }
    }
    // What cannot be read, and is known to be stored in another way.
    bench.io("qcow2", "good.qcow2", &["write -P 1 64k 4k"]);
    std::fs::write(bench.path("hurt.qcow2"), {
        let mut hurt = good.clone();
        hurt[stored..stored + 10].fill(0xff);
        hurt
    })
    .unwrap();
    assert_eq!(bench.same(&["compare", "-s", "hurt.qcow2", "good.qcow2"]).code, Some(1));
    assert_eq!(bench.same(&["compare", "hurt.qcow2", "good.qcow2"]).code, Some(4));
}
