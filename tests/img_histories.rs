//! Random histories of one image: the same commands by `knibfs img` and by `qemu-img`, each in its own folder, with the same
//! writes of `qemu-io`. After each step both have done it or refused it, both images show what a model says, and QEMU finds
//! nothing wrong with ours.
//!
//! `KNIBFS_HISTORIES` is how many (4), `KNIBFS_SEED` makes others (`scripts/histories --images` does both). A failure prints its seed and
//! the shortest history that was found to fail.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

use knib_qcow::{Chain, Format, PlainPaths};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

type Done = Result<(), TestCaseError>;

const SECTOR: u64 = 512;
/// Largest disk in bytes.
const MOST: u64 = 3 << 20;

/// An image, by the words of `create -o`, and what it stands on.
#[derive(Clone, Debug)]
struct Setup {
    options: &'static str,
    size: u64,
    /// Format and size of the backing file.
    backing: Option<(&'static str, u64)>,
}

#[derive(Clone, Debug)]
enum Step {
    /// `qemu-io`: what (`write`, `write -c`, `write -z`, `discard`), where and how much, in sectors, and with what byte.
    Write(&'static str, u64, u64, u8),
    Snapshot(&'static str, u8),
    Resize(u64, &'static str),
    Bitmap(&'static str, u8),
    Amend(&'static str),
    Commit,
    /// Onto another file, or none.
    Rebase(Option<&'static str>),
    Check(&'static str),
}

fn setup() -> impl Strategy<Value = Setup> {
    let options = prop::sample::select(vec![
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=4k,compression_type=zstd",
        "cluster_size=4k,compat=0.10",
        "cluster_size=64k,refcount_bits=1",
        "cluster_size=16k,extended_l2=on,compression_type=zstd",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,data_file=data",
        "cluster_size=4k,data_file=data,extended_l2=off",
        "cluster_size=2M",
    ]);
    let backing = prop_oneof![
        2 => Just(None),
        1 => sectors().prop_map(|n| Some(("raw", n))),
        2 => sectors().prop_map(|n| Some(("qcow2", n))),
    ];
    (options, sectors(), backing).prop_map(|(options, size, backing)| Setup { options, size, backing })
}

fn sectors() -> impl Strategy<Value = u64> {
    (1..=MOST / SECTOR).prop_map(|n| n * SECTOR)
}

fn step() -> impl Strategy<Value = Step> {
    let what = prop::sample::select(vec!["write", "write", "write -c", "write -z", "discard"]);
    let at = 0..MOST / SECTOR;
    prop_oneof![
        6 => (what, at, 1..600u64, 1..255u8).prop_map(|(w, at, len, byte)| Step::Write(w, at, len, byte)),
        3 => (prop::sample::select(vec!["-c", "-c", "-a", "-d"]), 0..3u8).prop_map(|(w, n)| Step::Snapshot(w, n)),
        2 => (sectors(), prop::sample::select(vec!["off", "off", "metadata", "falloc", "full"]))
            .prop_map(|(size, how)| Step::Resize(size, how)),
        2 => (prop::sample::select(vec!["--add", "--add", "--remove", "--clear", "--disable"]), 0..3u8)
            .prop_map(|(w, n)| Step::Bitmap(w, n)),
        1 => prop::sample::select(vec![
            "compat=1.1", "compat=0.10", "refcount_bits=16", "refcount_bits=64", "lazy_refcounts=on", "lazy_refcounts=off",
        ])
        .prop_map(Step::Amend),
        1 => Just(Step::Commit),
        1 => prop::sample::select(vec![None, Some("other"), Some("base")]).prop_map(Step::Rebase),
        1 => prop::sample::select(vec!["leaks", "all"]).prop_map(Step::Check),
    ]
}

/// The two folders, and what their images are to show.
struct World {
    dir: tempfile::TempDir,
    disk: Vec<u8>,
    /// With what they show; after the backing file has changed that is for QEMU to say.
    snapshots: Vec<(String, Option<Vec<u8>>)>,
    cluster: u64,
    version_2: bool,
    data_file: bool,
    zstd: bool,
    base: Option<(&'static str, Vec<u8>)>,
    other: Vec<u8>,
}

const FOLDERS: [&str; 2] = ["ours", "theirs"];

fn run(folder: &Path, program: &str, words: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(words).current_dir(folder).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {program}: {e}; install qemu-utils"));
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.success() && !said.contains("failed: "), said)
}

fn content(path: &Path, format: Format) -> Result<Vec<u8>, TestCaseError> {
    let fail = |e: knib_qcow::Error| TestCaseError::fail(format!("{}: {e}", path.display()));
    let chain = Chain::open(path, format, &PlainPaths).map_err(fail)?;
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).map_err(fail)?;
    Ok(bytes)
}

impl World {
    fn new(setup: &Setup) -> Result<Self, TestCaseError> {
        let dir = tempfile::tempdir().unwrap();
        let base = setup
            .backing
            .map(|(format, size)| (format, (0..size).map(|n| (n / 700) as u8).collect::<Vec<_>>()));
        let other: Vec<u8> = (0..1_000_448u64).map(|n| (n / 900) as u8).collect();
        for folder in FOLDERS.map(|name| dir.path().join(name)) {
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("raw"), &other).unwrap();
            let line = ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "raw", "other"];
            prop_assert!(run(&folder, "qemu-img", &line).0);
            if let Some((format, bytes)) = &base {
                std::fs::write(folder.join("raw"), bytes).unwrap();
                prop_assert!(
                    run(&folder, "qemu-img", &["convert", "-f", "raw", "-O", format, "raw", "base"]).0
                );
            }
        }
        let number = |text: &str| text.trim_end_matches(['k', 'M']).parse::<u64>().unwrap();
        let size = setup.options.split(',').next().unwrap().trim_start_matches("cluster_size=");
        let cluster = number(size)
            << if size.ends_with('k') {
                10
            } else if size.ends_with('M') {
                20
            } else {
                0
            };
        let mut disk = base.as_ref().map_or(Vec::new(), |(_, bytes)| bytes.clone());
        disk.resize(setup.size as usize, 0);
        let world = Self {
            dir,
            disk,
            snapshots: Vec::new(),
            cluster,
            version_2: setup.options.contains("compat=0.10"),
            data_file: setup.options.contains("data_file"),
            zstd: setup.options.contains("zstd"),
            base,
            other,
        };
        let size = setup.size.to_string();
        let mut line = vec!["create", "-q", "-f", "qcow2", "-o", setup.options];
        if let Some((format, _)) = &world.base {
            line.extend(["-b", "base", "-F", format]);
        }
        line.extend(["disk", &size]);
        prop_assert!(world.both(&line)?);
        world.check()?;
        Ok(world)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same command by both: whether each did it, and what it said.
    fn each(&self, words: &[&str]) -> [(bool, String); 2] {
        let mut line = vec!["img"];
        line.extend(words);
        let ours = run(&self.folder("ours"), env!("CARGO_BIN_EXE_knibfs"), &line);
        [ours, run(&self.folder("theirs"), "qemu-img", words)]
    }

    /// The same command by both, who agree; whether it was done.
    fn both(&self, words: &[&str]) -> Result<bool, TestCaseError> {
        let [ours, theirs] = self.each(words);
        prop_assert_eq!(ours.0, theirs.0, "{:?}: ours: {}\ntheirs: {}", words, ours.1, theirs.1);
        Ok(ours.0)
    }

    fn write(&mut self, what: &str, at: u64, len: u64, byte: u8) -> Done {
        let size = self.disk.len() as u64;
        let (mut at, mut len) = (at * SECTOR, len * SECTOR);
        let whole = what == "write -c" || what == "discard";
        if whole {
            at = at / self.cluster * self.cluster;
            len = len.next_multiple_of(self.cluster);
        }
        if what == "write -c" {
            len = self.cluster;
        }
        if at + len > size {
            len = size.saturating_sub(at);
        }
        // What a discard leaves of a part of a cluster, or where version 2 cannot say it, is QEMU's to choose.
        let part = whole && !len.is_multiple_of(self.cluster);
        if len == 0 || part || what == "discard" && self.version_2 || what == "write -c" && self.data_file {
            return Ok(());
        }
        let pattern =
            if what.ends_with("write") || what == "write -c" { format!("-P {byte}") } else { String::new() };
        let command = format!("{what} {pattern} {at} {len}");
        let [ours, theirs] =
            FOLDERS.map(|f| run(&self.folder(f), "qemu-io", &["-f", "qcow2", "-c", &command, "disk"]));
        // QEMU writes no compressed cluster over one that has a place already, as preallocated ones have.
        let plainly = command.replacen("write -c", "write", 1);
        for (folder, (done, said)) in FOLDERS.into_iter().zip([ours, theirs]) {
            let done = done
                || what == "write -c"
                    && run(&self.folder(folder), "qemu-io", &["-f", "qcow2", "-c", &plainly, "disk"]).0;
            prop_assert!(done, "{folder}: {command}: {said}");
        }
        let byte = if pattern.is_empty() { 0 } else { byte };
        self.disk[at as usize..(at + len) as usize].fill(byte);
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Done {
        match step {
            Step::Write(what, at, len, byte) => self.write(what, *at, *len, *byte)?,
            Step::Snapshot(what, n) => {
                let name = format!("s{n}");
                let there = self.snapshots.iter().position(|(s, _)| *s == name);
                if *what == "-c" && there.is_some() {
                    return Ok(());
                }
                if self.both(&["snapshot", what, &name, "disk"])? {
                    match (*what, there) {
                        ("-c", _) => self.snapshots.push((name, Some(self.disk.clone()))),
                        ("-a", Some(at)) => self.disk = self.applied(self.snapshots[at].1.clone())?,
                        (_, Some(at)) => {
                            self.snapshots.remove(at);
                        }
                        _ => prop_assert!(false, "{name} is not there"),
                    }
                }
            }
            Step::Resize(size, how) => {
                let text = size.to_string();
                let grows = *size > self.disk.len() as u64;
                // In version 2 QEMU cannot hide what the backing file has there.
                if self.version_2 && self.base.as_ref().is_some_and(|(_, base)| base.len() > self.disk.len())
                {
                    return Ok(());
                }
                let mut line = vec!["resize", "-q", "--shrink", "disk", &text];
                if grows {
                    line.splice(2..2, ["--preallocation", how]);
                }
                if self.both(&line)? {
                    self.disk.resize(*size as usize, 0);
                }
            }
            Step::Bitmap(what, n) => {
                let name = format!("b{n}");
                let line = ["bitmap", what, "disk", &name];
                let [ours, theirs] = self.each(&line);
                // Bitmaps that record are marked as in use by what of ours changes the disk.
                if !ours.0 && theirs.0 && ours.1.contains("is in use or was left so") {
                    self.both(&["bitmap", "--remove", "disk", &name])?;
                } else {
                    prop_assert_eq!(ours.0, theirs.0, "{:?}: ours: {}\ntheirs: {}", line, ours.1, theirs.1);
                }
            }
            Step::Amend(option) => {
                // QEMU does it, and cannot open it then.
                if self.zstd && *option == "compat=0.10" {
                    return Ok(());
                }
                if self.both(&["amend", "-q", "-o", option, "disk"])? && option.starts_with("compat") {
                    self.version_2 = *option == "compat=0.10";
                }
            }
            Step::Commit => {
                if self.both(&["commit", "-q", "disk"])?
                    && let Some((_, base)) = &mut self.base
                {
                    self.snapshots.iter_mut().for_each(|(_, bytes)| *bytes = None);
                    base.resize(base.len().max(self.disk.len()), 0);
                    base[..self.disk.len()].copy_from_slice(&self.disk);
                }
            }
            // An image of version 2 without backing file shows other bytes when QEMU has given it one.
            Step::Rebase(_) if self.version_2 && self.base.is_none() => {}
            Step::Rebase(onto) => {
                let new = match onto {
                    None => None,
                    Some("base") => match &self.base {
                        Some(base) => Some(base.clone()),
                        None => return Ok(()),
                    },
                    Some(_) => Some(("qcow2", self.other.clone())),
                };
                let format = new.as_ref().map_or("qcow2", |(format, _)| format);
                let mut line = vec!["rebase", "-q", "-b", onto.unwrap_or(""), "-F", format, "disk"];
                if onto.is_none() {
                    line.drain(4..6);
                }
                // Only the first base is committed into.
                if self.both(&line)? {
                    self.snapshots.iter_mut().for_each(|(_, bytes)| *bytes = None);
                    match onto {
                        Some("base") => {}
                        None => self.base = None,
                        Some(_) => {
                            let (_, other) = new.unwrap();
                            self.base = Some(("qcow2", other.clone()));
                            self.other = other;
                            // From here on "base" names what it stands on.
                            for folder in FOLDERS {
                                let folder = self.folder(folder);
                                std::fs::copy(folder.join("other"), folder.join("base")).unwrap();
                                let line = ["rebase", "-u", "-b", "base", "-F", "qcow2", "disk"];
                                prop_assert!(run(&folder, "qemu-img", &line).0);
                            }
                        }
                    }
                }
            }
            Step::Check(what) => {
                self.both(&["check", "-q", "-r", what, "disk"])?;
            }
        }
        self.check()
    }

    fn applied(&self, known: Option<Vec<u8>>) -> Result<Vec<u8>, TestCaseError> {
        known.map_or_else(|| content(&self.folder("theirs").join("disk"), Format::Qcow2), Ok)
    }

    fn check(&self) -> Done {
        let ours = self.folder("ours");
        let (sound, said) = run(&ours, "qemu-img", &["check", "disk"]);
        prop_assert!(sound, "qemu-img check: {said}");
        let (sound, said) = run(&ours, env!("CARGO_BIN_EXE_knibfs"), &["img", "check", "disk"]);
        prop_assert!(sound, "img check: {said}");
        for folder in FOLDERS {
            let shows = content(&self.folder(folder).join("disk"), Format::Qcow2)?;
            prop_assert_eq!(shows.len(), self.disk.len(), "{}: the disk's size", folder);
            let odd = (0..shows.len()).find(|i| shows[*i] != self.disk[*i]);
            prop_assert_eq!(odd, None, "{}: the first byte that differs", folder);
            if let Some((format, bytes)) = &self.base {
                let format = Format::from_name(format).unwrap();
                prop_assert!(
                    content(&self.folder(folder).join("base"), format)? == *bytes,
                    "{folder}: the base"
                );
            }
        }
        std::fs::write(self.dir.path().join("model"), &self.disk).unwrap();
        let (same, said) =
            run(&ours, "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "disk", "../model"]);
        prop_assert!(same, "qemu-img compare: {said}");
        Ok(())
    }

    /// Each snapshot that is left shows what the disk showed then.
    fn end(&mut self) -> Done {
        for (name, bytes) in self.snapshots.clone() {
            // Both refuse one of another size where there are bitmaps.
            if self.both(&["snapshot", "-a", &name, "disk"])? {
                self.disk = self.applied(bytes)?;
                self.check()?;
            }
        }
        Ok(())
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn part(number_of: u64) {
    const PARTS: u64 = 2;
    let (seed, total) = (number("KNIBFS_SEED", 1), number("KNIBFS_HISTORIES", 4));
    let config = Config {
        cases: u32::try_from(total.div_ceil(PARTS)).unwrap(),
        rng_seed: RngSeed::Fixed(seed.wrapping_mul(PARTS).wrapping_add(number_of)),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let outcome =
        TestRunner::new(config).run(&(setup(), prop::collection::vec(step(), 1..10)), |(setup, steps)| {
            let mut world = World::new(&setup)?;
            for step in &steps {
                world.step(step)?;
            }
            world.end()
        });
    if let Err(error) = outcome {
        panic!("KNIBFS_SEED={seed} KNIBFS_HISTORIES={total}: {error}");
    }
}

#[test]
fn random_histories_of_an_image_agree_with_qemu_img_and_the_model_1() {
    part(0);
}

#[test]
fn random_histories_of_an_image_agree_with_qemu_img_and_the_model_2() {
    part(1);
}
