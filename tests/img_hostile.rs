//! Images that somebody made to do harm: whatever `knibfs img` is asked about them, it ends by itself, with a word and
//! without a panic, in little time and with memory that does not follow what the image claims.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use std::process::Command;

use img_support::{Bench, zoo};

/// Bytes of memory of its own that the program may have: the images are far smaller, what they claim is far larger.
const MEMORY: u64 = 128 << 20;
/// Seconds of processor time after which it counts as hung.
const SECONDS: u64 = 60;
/// What is written over a word of an image.
const VALUES: [u64; 12] = [
    0,
    1,
    512,
    0x1_0000,
    0x8000_0000_0001_0000,
    0x8000_0000_0000_0001,
    0x4000_0000_0000_0200,
    0x0000_0001_0000_0001,
    0x00ff_ffff_ffff_fe00,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_0000_0000,
    u64::MAX,
];

/// Runs `knibfs img` with limits; its exit code and errors.
fn limited(bench: &Bench, line: &[&str]) -> (Option<i32>, String) {
    let output = Command::new("prlimit")
        .args([format!("--data={MEMORY}"), format!("--cpu={SECONDS}"), "--core=0".into(), "--".into()])
        .arg(env!("CARGO_BIN_EXE_knibfs"))
        .arg("img")
        .args(line)
        .current_dir(bench.dir.path())
        .output()
        .unwrap_or_else(|e| panic!("cannot run prlimit: {e} (install util-linux)"));
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// All that is asked about an image, each on a fresh copy; what the image holds decides how each ends.
fn ask(bench: &Bench, bytes: &[u8], about: &str) {
    for line in [
        &["info", "--output=json", "hurt"][..],
        &["check", "hurt"],
        &["check", "-r", "all", "hurt"],
        &["map", "--output=json", "hurt"],
        &["measure", "-O", "qcow2", "hurt"],
        &["compare", "hurt", "plain.qcow2"],
        &["convert", "-c", "-O", "qcow2", "hurt", "out"],
        &["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "hurt", "out"],
        &["snapshot", "-c", "x", "hurt"],
        &["snapshot", "-a", "first", "hurt"],
        &["bitmap", "--add", "--merge", "since", "hurt", "x"],
        &["resize", "--shrink", "hurt", "1M"],
        &["amend", "-o", "compat=0.10", "hurt"],
    ] {
        std::fs::write(bench.path("hurt"), bytes).unwrap();
        let (code, errors) = limited(bench, line);
        assert!(code.is_some_and(|c| c <= 4), "{about}: {line:?} ended with {code:?}: {errors}");
        assert!(!errors.contains("panicked"), "{about}: {line:?}: {errors}");
        assert!(code == Some(0) || !errors.trim().is_empty() || line[0] == "compare", "{about}: {line:?}");
    }
}

/// The offset that a word of an image holds.
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn the_limits_stop_what_takes_more_and_let_sound_images_through() {
    let bench = Bench::new();
    zoo(&bench);
    let (code, errors) = limited(&bench, &["check", "states.qcow2"]);
    assert_eq!(code, Some(0), "{errors}");
    let hungry = ["--data=33554432", "--", "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"];
    let output = Command::new("prlimit").args(hungry).output().unwrap();
    assert!(!output.status.success(), "the limit limits nothing");
}

#[test]
fn claims_of_size_cost_no_memory_and_no_time() {
    let bench = Bench::new();
    zoo(&bench);
    let sound = std::fs::read(bench.path("states.qcow2")).unwrap();
    let (l1, table, snapshots) =
        (word(&sound, 40) as usize, word(&sound, 48) as usize, word(&sound, 64) as usize);
    let l2 = (word(&sound, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // The bitmaps extension: its type, and behind that the number and the directory's size and offset.
    let extension = (0..1024).step_by(8).find(|at| sound[*at..*at + 4] == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let directory = word(&sound, extension + 24) as usize;
    for (about, at, value) in [
        ("a disk of 8 EiB", 24, i64::MAX.to_be_bytes().to_vec()),
        ("a disk as large as its L1 table allows", 24, (1u64 << 51).to_be_bytes().to_vec()),
        ("an L1 table of 32 MiB", 36, (4u32 << 20).to_be_bytes().to_vec()),
        ("a refcount table of 8 MiB", 56, 128u32.to_be_bytes().to_vec()),
        ("65536 snapshots", 60, 65_536u32.to_be_bytes().to_vec()),
        ("a snapshot with an L1 table of 32 MiB", snapshots + 8, (4u32 << 20).to_be_bytes().to_vec()),
        ("a snapshot with 4 GiB of extra data", snapshots + 36, u32::MAX.to_be_bytes().to_vec()),
        ("65535 bitmaps", extension + 8, 65_535u32.to_be_bytes().to_vec()),
        ("a directory of bitmaps of 64 MiB", extension + 16, (64u64 << 20).to_be_bytes().to_vec()),
        ("a bitmap with a table of 2^32 entries", directory + 8, u32::MAX.to_be_bytes().to_vec()),
        ("a bitmap whose name is longer than the file", directory + 18, u16::MAX.to_be_bytes().to_vec()),
        (
            "a bitmap whose extra data is longer than the file",
            directory + 20,
            u32::MAX.to_be_bytes().to_vec(),
        ),
        ("a bitmap of one bit for 512 bytes", directory + 17, vec![9]),
        ("a refcount block far past the end", table, (1u64 << 55).to_be_bytes().to_vec()),
        ("a compressed cluster of 2^14 sectors", l2, u64::MAX.to_be_bytes().to_vec()),
    ] {
        let mut bytes = sound.clone();
        bytes[at..at + value.len()].copy_from_slice(&value);
        ask(&bench, &bytes, about);
    }
}

#[test]
fn words_that_are_written_over_cost_an_answer_at_most() {
    let bench = Bench::new();
    let mut seed = 0x5eed_u64;
    let mut below = |n: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % n
    };
    for (image, _) in zoo(&bench).into_iter().filter(|(_, format)| *format == "qcow2") {
        let sound = std::fs::read(bench.path(image)).unwrap();
        let used: Vec<usize> =
            (0..sound.len() / 8).map(|i| i * 8).filter(|at| word(&sound, *at) != 0).collect();
        for _ in 0..2 {
            let mut bytes = sound.clone();
            let mut about = image.to_owned();
            for _ in 0..=below(3) {
                let at = used[below(used.len().min(400) as u64) as usize];
                let value = VALUES[below(VALUES.len() as u64) as usize];
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                about += &format!(", {value:#x} at {at:#x}");
            }
            ask(&bench, &bytes, &about);
        }
    }
}
