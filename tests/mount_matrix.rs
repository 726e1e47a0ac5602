//! Images of every kind that QEMU makes, backed up and mounted: what the mount shows is what QEMU reads from them.
//! Needs root, /dev/fuse, qemu-img, qemu-io and fio.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mounted_store::command;

/// Length of the disks: no multiple of most clusters.
const SIZE: &str = "12586496";
/// The beginning of each disk is written by fio, so that fio can verify it.
const BY_FIO: &str = "4M";

/// What to make the image with; `-c` makes its clusters compressed.
const KINDS: [(&str, &str, bool); 16] = [
    ("plain", "compat=1.1", false),
    ("old", "compat=0.10", false),
    ("old-zlib", "compat=0.10", true),
    ("zlib", "compat=1.1", true),
    ("zstd", "compression_type=zstd", true),
    ("tiny", "cluster_size=512", false),
    ("tiny-zlib", "cluster_size=512", true),
    ("small-zstd", "cluster_size=4k,compression_type=zstd", true),
    ("large", "cluster_size=2M", false),
    ("large-zstd", "cluster_size=2M,compression_type=zstd", true),
    ("counts-1", "refcount_bits=1", false),
    ("counts-64", "refcount_bits=64", true),
    ("subclusters", "extended_l2=on", false),
    ("subclusters-zstd", "extended_l2=on,compression_type=zstd", true),
    ("data-file", "data_file=DIR/data-file.raw", false),
    ("lazy", "lazy_refcounts=on", false),
];

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: run scripts/install-deps"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out.trim().to_owned()
}

struct Lab(tempfile::TempDir);

impl Lab {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn knibfs(&self, arguments: &[&str]) -> String {
        ok(command(&self.path("store"), self.0.path()).args(arguments))
    }

    /// Zeros, holes, discarded and written places behind what fio wrote, differently in each `round`.
    fn scribble(&self, image: &Path, format: &str, round: u64) {
        let mut io = Command::new("qemu-io");
        io.args(["-f", format, "-d", "unmap"]);
        for n in 0..12u64 {
            let at = (4 << 20) + (n * 7 + round * 3) * 94_208 % (7 << 20) / 512 * 512;
            let len = 512 << (n % 9);
            let pattern = 1 + round * 16 + n;
            let what = match (n + round) % 4 {
                0 => format!("write -z {at} {len}"),
                1 => format!("discard {at} {len}"),
                _ => format!("write -P {pattern} {at} {len}"),
            };
            io.arg("-c").arg(what);
        }
        let said = ok(io.arg(image));
        assert!(!said.contains("failed"), "{said}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mnt = self.path("mnt");
        if knib_fuse::mount_at(&mnt).unwrap().is_some() {
            knib_fuse::unmount(&mnt).unwrap();
        }
    }
}

/// Where `qemu-img map` sees data that is not zeros by its kind.
fn data(image: &Path, format: &str) -> Vec<(u64, u64)> {
    let map = ok(Command::new("qemu-img").args(["map", "-f", format, "--output=json"]).arg(image));
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for run in map.iter().filter(|run| run["data"] == true && run["zero"] == false) {
        let (start, length) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
        match found.last_mut() {
            Some((_, end)) if *end == start => *end = start + length,
            _ => found.push((start, start + length)),
        }
    }
    found
}

#[test]
fn images_of_every_kind_read_through_the_mount_as_qemu_reads_them() {
    let lab = Lab(tempfile::Builder::new().prefix("knibfs-matrix").tempdir().unwrap());
    let dir = lab.0.path().display().to_string();
    lab.knibfs(&["init", lab.path("store").to_str().unwrap()]);
    let offerings = [
        vec!["offering", "create", "plain"],
        vec!["offering", "create", "zstd", "--compress"],
        vec!["offering", "create", "zlib", "--compress", "--compression-library", "zlib"],
    ]
    .map(|arguments| lab.knibfs(&arguments));

    let seed = lab.path("seed.raw");
    let fio = |rw: &str, file: &Path, more: &[&str]| {
        let file = format!("--filename={}", file.display());
        let mut run = Command::new("fio");
        run.current_dir(lab.0.path());
        run.args(["--name=v", "--bs=4k", "--size", BY_FIO, "--verify=crc32c", "--verify_fatal=1"]);
        ok(run.args([&format!("--rw={rw}"), &file]).args(more))
    };
    fio("write", &seed, &["--do_verify=0"]);
    fs::File::options().write(true).open(&seed).unwrap().set_len(SIZE.parse().unwrap()).unwrap();

    // Each image is backed up twice, each time as QEMU reads it then: (backup, what QEMU read).
    let mut expected: Vec<(String, PathBuf)> = Vec::new();
    let mut images: Vec<(String, PathBuf, &str)> = Vec::new();
    for (name, options, compressed) in KINDS {
        let image = lab.path(&format!("{name}.qcow2"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2", "-o", &options.replace("DIR", &dir)]);
        ok(convert.args(compressed.then_some("-c")).args([&seed, &image]));
        images.push((name.into(), image, "qcow2"));
    }
    // One that has internal snapshots, a chain of three over a raw file, and a raw file.
    let with_snapshots = lab.path("snapshots.qcow2");
    ok(Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([&seed, &with_snapshots]));
    ok(Command::new("qemu-img").args(["snapshot", "-c", "before"]).arg(&with_snapshots));
    images.push(("snapshots".into(), with_snapshots, "qcow2"));
    let raw = lab.path("flat.raw");
    fs::copy(&seed, &raw).unwrap();
    let (mut below, mut format) = (seed.clone(), "raw");
    for layer in 0..3 {
        let overlay = lab.path(&format!("layer{layer}.qcow2"));
        ok(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .args([&below, &overlay]));
        lab.scribble(&overlay, "qcow2", 7 + layer);
        (below, format) = (overlay, "qcow2");
    }
    images.push(("chain".into(), below, "qcow2"));
    images.push(("flat".into(), raw, "raw"));

    for (number, (name, image, format)) in images.iter().enumerate() {
        let disk = format!("root={}", image.display());
        let offering = &offerings[number % 3];
        lab.knibfs(&["vm", "add", name, "--disk", &disk, "--track", "scan", "--offering", offering]);
        for round in 0..2 {
            lab.scribble(image, format, round);
            let read = lab.path(&format!("{name}-{round}.read"));
            ok(Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw"]).args([image, &read]));
            expected.push((lab.knibfs(&["backup", name]), read));
        }
    }

    let mnt = lab.path("mnt");
    fs::create_dir(&mnt).unwrap();
    lab.knibfs(&["mount", "--log-dir", &dir, mnt.to_str().unwrap()]);
    for (backup, read) in &expected {
        let folder = mnt.join("vms").join(backup);
        let shown = fs::read(folder.join("root.raw")).unwrap();
        assert!(shown == fs::read(read).unwrap(), "{backup}: not what QEMU read");
        // The stored file, followed along its chain in the mount, is the same disk.
        ok(Command::new("qemu-img")
            .args(["compare", "-q", "-f", "raw", "-F", "qcow2"])
            .args([read, &folder.join("root.qcow2")]));
        let (flat, chain) =
            (data(&folder.join("root.raw"), "raw"), data(&folder.join("root.qcow2"), "qcow2"));
        assert_eq!(flat, chain, "{backup}: `qemu-img map` of the flat view and of the chain");
        assert!(!flat.is_empty(), "{backup}: {flat:?}");
    }
    for pair in expected.chunks(2) {
        let view = mnt.join("vms").join(&pair[1].0).join("root.raw");
        fio("randread", &view, &["--readonly", "--direct=1", "--ioengine=libaio", "--iodepth=32"]);
    }
}
