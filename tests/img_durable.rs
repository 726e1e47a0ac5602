//! What a command of `knibfs img` wrote is on the device when it ends: every file that it changed was synced after its
//! last change, and so was the folder that a new file is in, as the kernel was told.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use std::collections::BTreeMap;
use std::process::Command;

use img_support::{Bench, zoo};

/// Files in the bench's folder that a command changed, and whether each was synced after its last change. The empty name
/// is the folder itself, where it was synced.
fn synced(bench: &Bench, line: &[&str]) -> BTreeMap<String, bool> {
    let folder = std::fs::canonicalize(bench.dir.path()).unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls =
        "trace=write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,copy_file_range,ioctl,fsync,fdatasync";
    let output = Command::new("strace")
        .args(["-f", "-y", "-s", "0", "-e", "signal=none", "-e", calls, "-o"])
        .arg(log.path())
        .arg(env!("CARGO_BIN_EXE_knibfs"))
        .arg("img")
        .args(line)
        .current_dir(&folder)
        .output()
        .unwrap_or_else(|e| panic!("cannot run strace: {e} (scripts/install-deps installs it)"));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line:?}: {errors}");
    let mut files = BTreeMap::new();
    for call in std::fs::read_to_string(log.path()).unwrap().lines() {
        // `1234 pwrite64(5</folder/file>, …) = 512`; a call that another thread interrupts begins its line alike.
        let Some((name, rest)) = call.split_once(' ').and_then(|(_, c)| c.trim_start().split_once('('))
        else {
            continue;
        };
        let files_of: Vec<&str> = rest.split('<').skip(1).filter_map(|p| p.split('>').next()).collect();
        // Of two files the second is written.
        let changed = if name == "copy_file_range" { files_of.get(1) } else { files_of.first() };
        let Some(file) = changed.and_then(|f| f.strip_prefix(folder.to_str().unwrap())) else { continue };
        let file = file.trim_start_matches('/');
        let sync = matches!(name, "fsync" | "fdatasync");
        // A hole that is punched gives space back: nothing depends on when it does. Other ioctls change no file.
        let hole = rest.contains("PUNCH_HOLE") || name == "ioctl" && !rest.contains("FICLONE");
        if hole || rest.contains(" = -1 ") {
            continue;
        }
        if !sync || file.is_empty() || files.contains_key(file) {
            files.insert(file.to_owned(), sync);
        }
    }
    files
}

#[test]
fn every_file_that_a_command_changed_is_synced_before_it_ends() {
    let bench = Bench::new();
    zoo(&bench);
    for (line, changes) in [
        (&["create", "-q", "new", "1M"][..], &["new"][..]),
        (&["create", "-q", "-o", "preallocation=falloc", "new", "1M"], &["new"]),
        (&["create", "-q", "-o", "preallocation=full", "new", "1M"], &["new"]),
        (&["create", "-q", "-f", "qcow2", "new", "1M"], &["new"]),
        (&["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "new", "1M"], &["new"]),
        (&["create", "-q", "-f", "qcow2", "-o", "data_file=d", "new", "1M"], &["d", "new"]),
        (&["resize", "-q", "-f", "raw", "some.raw", "+1M"], &["some.raw"]),
        (&["resize", "-q", "-f", "raw", "--shrink", "some.raw", "1M"], &["some.raw"]),
        (&["resize", "-q", "-f", "raw", "--preallocation=full", "some.raw", "+1M"], &["some.raw"]),
        (&["resize", "-q", "-f", "raw", "--preallocation=falloc", "some.raw", "+1M"], &["some.raw"]),
        (&["resize", "-q", "plain.qcow2", "+1M"], &["plain.qcow2"]),
        (&["convert", "top.qcow2", "new"], &["new"]),
        (&["convert", "-O", "qcow2", "top.qcow2", "new"], &["new"]),
        (&["convert", "-c", "-O", "qcow2", "top.qcow2", "new"], &["new"]),
        (&["convert", "-S", "0", "top.qcow2", "new"], &["new"]),
        (&["convert", "-O", "qcow2", "-o", "refcount_bits=8", "top.qcow2", "new"], &["new"]),
        (&["convert", "-n", "top.qcow2", "some.raw"], &["some.raw"]),
        (&["convert", "-n", "-O", "qcow2", "plain.qcow2", "external.qcow2"], &["external.data"]),
        (&["convert", "--bitmaps", "-O", "qcow2", "states.qcow2", "new"], &["new"]),
        (&["commit", "-q", "top.qcow2"], &["over.qcow2", "top.qcow2"]),
        (&["commit", "-q", "over_raw.qcow2"], &["over_raw.qcow2", "some.raw"]),
        (&["rebase", "-b", "", "top.qcow2"], &["top.qcow2"]),
        (&["rebase", "-u", "-b", "plain.qcow2", "-F", "qcow2", "top.qcow2"], &["top.qcow2"]),
        (&["amend", "-o", "lazy_refcounts=on", "plain.qcow2"], &["plain.qcow2"]),
        (&["amend", "-o", "compat=0.10", "plain.qcow2"], &["plain.qcow2"]),
        (&["amend", "-o", "refcount_bits=8", "plain.qcow2"], &["plain.qcow2"]),
        (&["snapshot", "-c", "new", "plain.qcow2"], &["plain.qcow2"]),
        (&["snapshot", "-d", "first", "states.qcow2"], &["states.qcow2"]),
        (&["bitmap", "--add", "plain.qcow2", "new"], &["plain.qcow2"]),
        (&["bitmap", "--clear", "states.qcow2", "since"], &["states.qcow2"]),
    ] {
        let copy = bench.copy();
        let mut files = synced(&copy, line);
        let folder = files.remove("").is_some();
        assert_eq!(folder, changes.contains(&"new"), "{line:?}: whether the folder is synced");
        let (names, all): (Vec<&str>, Vec<bool>) = files.iter().map(|(f, s)| (f.as_str(), *s)).unzip();
        assert_eq!(names, changes, "{line:?}");
        assert!(all.iter().all(|synced| *synced), "{line:?}: {files:?}");
    }
    // The instrument sees what is left to the page cache.
    for format in ["raw", "qcow2"] {
        let files = synced(&bench.copy(), &["convert", "-t", "unsafe", "-O", format, "top.qcow2", "new"]);
        assert_eq!(files, BTreeMap::from([("new".to_owned(), false)]), "{format}");
    }
}
