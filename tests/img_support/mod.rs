//! The same command line run by `qemu-img`, by `knibfs img`, and by a link named `qemu-img` to it.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Output that must agree.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    pub stdout: String,
    pub code: Option<i32>,
}

/// A folder with images.
pub struct Bench {
    pub dir: tempfile::TempDir,
    calls: std::cell::Cell<usize>,
}

fn run(program: &Path, first: &[&str], arguments: &[&str], folder: &Path) -> (Said, String) {
    let output = Command::new(program)
        .args(first)
        .args(arguments)
        .current_dir(folder)
        .env("TZ", "UTC")
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e} (install qemu-utils)", program.display()));
    let said =
        Said { stdout: String::from_utf8_lossy(&output.stdout).into_owned(), code: output.status.code() };
    (said, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// `qemu-img` in a folder.
pub fn theirs(arguments: &[&str], folder: &Path) -> (Said, String) {
    run(Path::new("qemu-img"), &[], arguments, folder)
}

/// `knibfs img` in a folder.
pub fn ours(arguments: &[&str], folder: &Path) -> (Said, String) {
    run(Path::new(env!("CARGO_BIN_EXE_knibfs")), &["img"], arguments, folder)
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_knibfs"), dir.path().join("bin/qemu-img")).unwrap();
        Self { dir, calls: 0.into() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the real `qemu-img`, which must succeed.
    pub fn qemu_img(&self, arguments: &[&str]) -> String {
        let (said, errors) = theirs(arguments, self.dir.path());
        assert_eq!(said.code, Some(0), "qemu-img {arguments:?}: {errors}");
        said.stdout
    }

    /// Runs `knibfs img`, which must succeed.
    pub fn img(&self, arguments: &[&str]) -> String {
        let (said, errors) = ours(arguments, self.dir.path());
        assert_eq!(said.code, Some(0), "knibfs img {arguments:?}: {errors}");
        said.stdout
    }

    /// Runs `qemu-io` commands on an image.
    pub fn io(&self, format: &str, image: &str, commands: &[&str]) {
        let mut line = vec!["-f", format];
        for command in commands {
            line.extend(["-c", command]);
        }
        line.push(image);
        let output = Command::new("qemu-io").args(&line).current_dir(self.dir.path()).output();
        let output = output.unwrap_or_else(|e| panic!("cannot run qemu-io: {e} (install qemu-utils)"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !text.contains("failed"), "qemu-io {line:?}: {text}");
    }

    /// A command that changes nothing says the same and ends the same way, called by either name in turn.
    pub fn same(&self, arguments: &[&str]) -> Said {
        let folder = self.dir.path();
        let (wanted, their_errors) = theirs(arguments, folder);
        self.calls.set(self.calls.get() + 1);
        let (said, errors) = if self.calls.get().is_multiple_of(2) {
            ours(arguments, folder)
        } else {
            run(&folder.join("bin/qemu-img"), &[], arguments, folder)
        };
        assert_eq!(said, wanted, "{arguments:?}\nours: {errors}\ntheirs: {their_errors}");
        let spoke = errors.trim().len() > 10 || !said.stdout.is_empty() || arguments.contains(&"-q");
        assert!(wanted.code == Some(0) || spoke, "{arguments:?} failed without a word: {errors:?}");
        wanted
    }

    /// A command that changes images, run by each program on copies of the whole folder: it says the same and ends the
    /// same way. Returns the folders, theirs and ours.
    pub fn same_changes(&self, arguments: &[&str]) -> (Bench, Bench, Said) {
        let (a, b) = (self.copy(), self.copy());
        let (wanted, their_errors) = theirs(arguments, a.dir.path());
        let (said, errors) = ours(arguments, b.dir.path());
        assert_eq!(said, wanted, "{arguments:?}\nours: {errors}\ntheirs: {their_errors}");
        let spoke = errors.trim().len() > 10 || !said.stdout.is_empty() || arguments.contains(&"-q");
        assert!(wanted.code == Some(0) || spoke, "{arguments:?} failed without a word: {errors:?}");
        (a, b, wanted)
    }

    /// A copy of all images.
    pub fn copy(&self) -> Bench {
        let copy = Bench::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let status = Command::new("cp")
                    .args(["--sparse=always", "-p"])
                    .arg(entry.path())
                    .arg(copy.dir.path().join(entry.file_name()))
                    .status()
                    .unwrap();
                assert!(status.success());
            }
        }
        copy
    }

    /// The guest's bytes of an image.
    pub fn guest(&self, format: &str, image: &str) -> Vec<u8> {
        self.qemu_img(&["convert", "-f", format, "-O", "raw", image, "guest.tmp"]);
        let bytes = std::fs::read(self.path("guest.tmp")).unwrap();
        std::fs::remove_file(self.path("guest.tmp")).unwrap();
        bytes
    }
}

/// Images of many kinds, of a few MiB, mostly holes: (name, format).
pub fn zoo(bench: &Bench) -> Vec<(&'static str, &'static str)> {
    let make = |name: &str, options: &str, more: &[&str]| {
        let mut line = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            line.extend(["-o", options]);
        }
        line.push(name);
        line.extend(more);
        bench.qemu_img(&line);
    };
    let writes = [
        "write -P 1 64k 192k",
        "write -P 2 1M 1000",
        "write -z 1536k 100k",
        "write -P 3 2M 64k",
        "write -z 2M 64k",
    ];
    make("plain.qcow2", "", &["4M"]);
    bench.io("qcow2", "plain.qcow2", &writes);
    make("empty.qcow2", "", &["0"]);
    make("odd.qcow2", "cluster_size=512", &["1000001"]);
    bench.io("qcow2", "odd.qcow2", &["write -P 4 0 5000", "write -P 5 999001 1000"]);
    make("v2.qcow2", "compat=0.10,cluster_size=4k", &["4M"]);
    bench.io("qcow2", "v2.qcow2", &writes[..2]);
    make("big.qcow2", "cluster_size=2M,lazy_refcounts=on,refcount_bits=1", &["5M"]);
    bench.io("qcow2", "big.qcow2", &writes[..3]);
    make("zstd.qcow2", "compression_type=zstd", &["4M"]);
    bench.io("qcow2", "zstd.qcow2", &["write -c -P 6 0 64k", "write -c -P 7 64k 64k", "write -P 8 128k 64k"]);
    make("sub.qcow2", "extended_l2=on", &["4M"]);
    bench.io(
        "qcow2",
        "sub.qcow2",
        &["write -P 9 66k 4k", "write -z 128k 6k", "write -P 1 256k 64k", "discard 258k 4k"],
    );
    make("meta.qcow2", "preallocation=metadata", &["4M"]);
    make("falloc.qcow2", "preallocation=falloc", &["4M"]);
    bench.io("qcow2", "falloc.qcow2", &["write -P 1 1M 64k"]);
    make("external.qcow2", "data_file=external.data", &["4M"]);
    bench.io("qcow2", "external.qcow2", &writes);
    make("raw_external.qcow2", "data_file=raw_external.data,data_file_raw=on", &["1M"]);
    make("over.qcow2", "backing_file=plain.qcow2,backing_fmt=qcow2", &["6M"]);
    bench.io("qcow2", "over.qcow2", &["write -P 0x11 128k 64k", "write -z 192k 64k", "write -P 0x12 5M 64k"]);
    make("top.qcow2", "backing_file=over.qcow2,backing_fmt=qcow2", &["3M"]);
    bench.io("qcow2", "top.qcow2", &["write -c -P 0x13 2M 64k", "write -P 0x14 100k 1k"]);
    bench.qemu_img(&["create", "-q", "-f", "raw", "some.raw", "3M"]);
    bench.io("raw", "some.raw", &["write -P 0x15 1M 128k", "write -P 0x16 2600k 4k"]);
    make("over_raw.qcow2", "backing_file=some.raw,backing_fmt=raw", &["4M"]);
    bench.io("qcow2", "over_raw.qcow2", &["write -P 0x17 1088k 64k"]);
    make("states.qcow2", "", &["2M"]);
    bench.io("qcow2", "states.qcow2", &["write -P 0x18 0 128k"]);
    bench.qemu_img(&["snapshot", "-c", "first", "states.qcow2"]);
    bench.io("qcow2", "states.qcow2", &["write -P 0x19 64k 128k"]);
    bench.qemu_img(&["snapshot", "-c", "1", "states.qcow2"]);
    bench.qemu_img(&["bitmap", "--add", "-g", "4k", "states.qcow2", "since"]);
    bench.qemu_img(&["bitmap", "--add", "--disable", "states.qcow2", "off"]);
    bench.io("qcow2", "states.qcow2", &["write -P 0x20 1M 64k"]);
    std::fs::write(bench.path("unaligned.raw"), vec![7u8; 70_001]).unwrap();
    std::fs::write(bench.path("nothing.raw"), b"").unwrap();
    vec![
        ("plain.qcow2", "qcow2"),
        ("empty.qcow2", "qcow2"),
        ("odd.qcow2", "qcow2"),
        ("v2.qcow2", "qcow2"),
        ("big.qcow2", "qcow2"),
        ("zstd.qcow2", "qcow2"),
        ("sub.qcow2", "qcow2"),
        ("meta.qcow2", "qcow2"),
        ("falloc.qcow2", "qcow2"),
        ("external.qcow2", "qcow2"),
        ("raw_external.qcow2", "qcow2"),
        ("over.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
        ("over_raw.qcow2", "qcow2"),
        ("states.qcow2", "qcow2"),
        ("some.raw", "raw"),
        ("unaligned.raw", "raw"),
        ("nothing.raw", "raw"),
    ]
}
