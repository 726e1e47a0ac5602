//! Images by QEMU read as QEMU reads them; images that are written pass QEMU's own check and compare.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use knib_qcow::{
    Chain, ChainSource, Compression, CompressionType, Control, FileStorage, Format, NewImage, NoObserver,
    PlainPaths, write_image, write_raw,
};

fn tool(name: &str, args: &[&str]) {
    let out = Command::new(name).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{name}: {e}; install qemu-utils (scripts/install-deps does)"));
    assert!(
        out.status.success(),
        "{name} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn control<'a>(cancel: &'a AtomicBool, progress: &'a (dyn Fn(u64) + Sync)) -> Control<'a> {
    Control { threads: 2, rate_limit: None, cancel, progress }
}

/// What the engine reads of `image` as a raw file beside it.
fn flatten(image: &Path, format: Format, out: &Path) {
    let chain = Chain::open(image, format, &PlainPaths).unwrap();
    let dest = FileStorage::create_new(out).unwrap();
    let cancel = AtomicBool::new(false);
    write_raw(dest, chain.size(), &ChainSource::whole(&chain, 65536), &control(&cancel, &|_| {})).unwrap();
}

fn write_pattern(image: &Path, backing_seed: u32) {
    let s = backing_seed;
    let commands = [
        format!("write -P {} 0 100k", 1 + s),
        format!("write -P {} 300k 3000", 2 + s),
        format!("write -P {} 1M 700k", 3 + s),
        format!("write -z {}k 64k", 1100 + s * 7),
        format!("write -P {} 5000000 1234", 4 + s),
        format!("discard {}k 128k", 1400 + s * 3),
        format!("write -P {} 8380000 8000", 5 + s),
    ];
    let mut args: Vec<&str> = vec!["-f", "qcow2"];
    for c in &commands {
        args.extend(["-c", c]);
    }
    args.push(text(image));
    tool("qemu-io", &args);
}

fn case(options: &str, compress: bool) {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| -> PathBuf { dir.path().join(n) };
    let (base, top) = (at("base.qcow2"), at("top.qcow2"));
    let options = options.replace("DIR", text(dir.path()));
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options.replace("NAME", "base"), text(&base), "8M"],
    );
    write_pattern(&base, 0);
    if compress {
        let packed = at("packed.qcow2");
        tool("qemu-img", &["convert", "-q", "-c", "-O", "qcow2", "-o", &options, text(&base), text(&packed)]);
        std::fs::rename(packed, &base).unwrap();
    }
    let create = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o"];
    let upper = if options.contains("data_file") || options.contains("compat=0.10") {
        "cluster_size=4096".to_owned()
    } else {
        options.replace("NAME", "top")
    };
    tool("qemu-img", &[&create[..], &[&upper, text(&top)]].concat());
    write_pattern(&top, 10);
    for image in [&base, &top] {
        let raw = at("flat.raw");
        flatten(image, Format::Qcow2, &raw);
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(image), text(&raw)]);
        std::fs::remove_file(raw).unwrap();
    }
}

#[test]
fn every_cluster_size_reads_as_qemu_reads_it() {
    for bits in 9..=21 {
        case(&format!("cluster_size={}", 1u32 << bits), false);
    }
}

#[test]
fn every_refcount_width_and_version_reads_as_qemu_reads_it() {
    for width in [1, 2, 4, 8, 16, 32, 64] {
        case(&format!("refcount_bits={width}"), false);
    }
    case("compat=0.10", false);
    case("compat=0.10", true);
}

#[test]
fn compressed_clusters_of_both_types_and_all_sizes_read_as_qemu_reads_them() {
    for bits in [9, 12, 16, 21] {
        for kind in ["zlib", "zstd"] {
            case(&format!("cluster_size={},compression_type={kind}", 1u32 << bits), true);
        }
    }
}

#[test]
fn subclusters_and_external_data_files_read_as_qemu_reads_them() {
    case("extended_l2=on,cluster_size=16k", false);
    case("extended_l2=on,cluster_size=128k", false);
    case("extended_l2=on,cluster_size=64k", true);
    case("data_file=DIR/NAME.data", false);
}

#[test]
fn chains_of_unlike_images_read_as_qemu_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: String| -> PathBuf { dir.path().join(n) };
    let mut below = (at("base.raw".into()), Format::Raw);
    std::fs::write(&below.0, vec![0x21; 5_000_192]).unwrap();
    // Clusters and subclusters of all sizes, disks that are shorter and longer than those below them.
    for (n, (options, size)) in [
        ("cluster_size=64k", 8_388_608u64),
        ("cluster_size=512,refcount_bits=1", 8_500_224),
        ("cluster_size=2M,compression_type=zstd", 8_388_608),
        ("cluster_size=16k,extended_l2=on", 9_000_448),
        ("cluster_size=4k,refcount_bits=64,lazy_refcounts=on", 8_400_384),
        ("compat=0.10", 10_000_384),
        ("cluster_size=128k,extended_l2=on", 8_388_608),
    ]
    .into_iter()
    .enumerate()
    {
        let path = at(format!("{n}.qcow2"));
        let (backing, size) = (text(&below.0).to_owned(), size.to_string());
        let args = ["create", "-q", "-f", "qcow2", "-o", options, "-b", &backing, "-F", below.1.name()];
        tool("qemu-img", &[&args[..], &[text(&path), &size]].concat());
        write_pattern(&path, n as u32 * 11);
        let raw = at("flat.raw".into());
        flatten(&path, Format::Qcow2, &raw);
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&raw)]);
        std::fs::remove_file(raw).unwrap();
        below = (path, Format::Qcow2);
    }
}

#[test]
fn internal_snapshots_do_not_disturb_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (image, raw) = (dir.path().join("i.qcow2"), dir.path().join("i.raw"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    write_pattern(&image, 0);
    tool("qemu-img", &["snapshot", "-c", "one", text(&image)]);
    write_pattern(&image, 20);
    flatten(&image, Format::Qcow2, &raw);
    tool("qemu-img", &["compare", text(&image), text(&raw)]);
}

#[test]
fn images_that_are_written_pass_qemus_check_and_compare() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), "8M"]);
    write_pattern(&base, 0);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&top)]);
    write_pattern(&top, 30);
    let zstd = Compression { kind: CompressionType::Zstd, level: 3 };
    let zlib = Compression { kind: CompressionType::Deflate, level: 6 };
    let cancel = AtomicBool::new(false);
    for (i, (compression, bits)) in
        [(None, 16), (Some(zstd), 16), (Some(zlib), 16), (Some(zstd), 9), (Some(zlib), 21), (None, 12)]
            .into_iter()
            .enumerate()
    {
        let (full, inc) =
            (dir.path().join(format!("full{i}.qcow2")), dir.path().join(format!("inc{i}.qcow2")));
        let new = NewImage { size: 8 << 20, cluster_bits: bits, compression, backing: None };
        let chain = Chain::open(&base, Format::Qcow2, &PlainPaths).unwrap();
        let dest = FileStorage::create_new(&full).unwrap();
        let source = ChainSource::whole(&chain, 1 << bits);
        write_image(dest, &new, &source, &NoObserver, &control(&cancel, &|_| {})).unwrap();
        tool("qemu-img", &["check", "-q", text(&full)]);
        tool("qemu-img", &["compare", text(&base), text(&full)]);
        let new = NewImage { backing: Some((format!("full{i}.qcow2"), Format::Qcow2)), ..new };
        let chain = Chain::open(&top, Format::Qcow2, &PlainPaths).unwrap();
        let dest = FileStorage::create_new(&inc).unwrap();
        let source = ChainSource::top(&chain, 1, 1 << bits);
        let written = write_image(dest, &new, &source, &NoObserver, &control(&cancel, &|_| {})).unwrap();
        assert!(written.clusters > 0);
        tool("qemu-img", &["check", "-q", text(&inc)]);
        tool("qemu-img", &["compare", text(&top), text(&inc)]);
        let flat = dir.path().join("flat.raw");
        flatten(&inc, Format::Qcow2, &flat);
        tool("qemu-img", &["compare", text(&top), text(&flat)]);
        std::fs::remove_file(flat).unwrap();
    }
}

#[test]
fn a_terabyte_disk_costs_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, out) = (dir.path().join("big.raw"), dir.path().join("big.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "raw", text(&raw), "1T"]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 700G 3M", "-c", "write -P 8 5G 64k", text(&raw)]);
    let chain = Chain::open(&raw, Format::Raw, &PlainPaths).unwrap();
    let new = NewImage { size: 1 << 40, cluster_bits: 16, compression: None, backing: None };
    let cancel = AtomicBool::new(false);
    let source = ChainSource::whole(&chain, 65536);
    let dest = FileStorage::create_new(&out).unwrap();
    let written = write_image(dest, &new, &source, &NoObserver, &control(&cancel, &|_| {})).unwrap();
    assert_eq!(written.clusters, 49);
    assert!(written.file_len < 6 << 20, "{written:?}");
    tool("qemu-img", &["check", "-q", text(&out)]);
}

#[test]
fn a_loop_a_luks_image_and_a_cut_image_are_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let a = dir.path().join("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&a), "8M"]);
    write_pattern(&a, 0);
    let cut = dir.path().join("cut.qcow2");
    let bytes = std::fs::read(&a).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let chain = Chain::open(&cut, Format::Qcow2, &PlainPaths);
    let read = chain.and_then(|c| c.read_at(&mut vec![0; 8 << 20], 0));
    assert!(read.unwrap_err().to_string().contains("damaged"));
    tool("qemu-img", &["rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", text(&a)]);
    let looped = Chain::open(&a, Format::Qcow2, &PlainPaths).err().unwrap().to_string();
    assert!(looped.contains("loop"), "{looped}");
    let luks = dir.path().join("luks.qcow2");
    let secret = [
        "--object",
        "secret,id=s,data=abc",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    tool("qemu-img", &[&["create", "-q", "-f", "qcow2"][..], &secret, &[text(&luks), "1M"]].concat());
    let refused = Chain::open(&luks, Format::Qcow2, &PlainPaths).err().unwrap().to_string();
    assert!(refused.contains("LUKS"), "{refused}");
}

#[test]
fn flipped_bytes_in_an_image_give_errors_or_bytes_but_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("m.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", text(&image), "1M"]);
    tool("qemu-io", &["-c", "write -P 3 0 300k", text(&image)]);
    let good = std::fs::read(&image).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..2000 {
        let mut bytes = good.clone();
        for _ in 0..3 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            // Half of the hits go to the header, where most fields are.
            let range = if seed & 1 == 0 { 120 } else { bytes.len() };
            bytes[(seed >> 8) as usize % range] = (seed >> 40) as u8;
        }
        std::fs::write(&image, &bytes).unwrap();
        if let Ok(chain) = Chain::open(&image, Format::Qcow2, &PlainPaths) {
            let size = chain.size().min(1 << 20);
            let mut buf = vec![0; size as usize];
            let _ = chain.read_at(&mut buf, 0);
        }
    }
}
