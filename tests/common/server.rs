//! The processes of a mount: the keeper that holds it, and the server that it starts again.
#![allow(dead_code)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Waits for a condition, at most two minutes.
pub fn wait(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < until, "waited too long for {what}");
        std::thread::yield_now();
    }
}

/// The server of the mount at `mnt`, as it says itself.
pub fn pid(mnt: &Path) -> u32 {
    try_pid(mnt).unwrap()
}

fn try_pid(mnt: &Path) -> std::io::Result<u32> {
    let status = fs::read_to_string(mnt.join(".knibfs/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("knibfs_mount_server_pid ")).unwrap();
    Ok(line.parse().unwrap())
}

/// The server of the mount at `mnt`, as the list of processes says; none while none is running.
pub fn serving(mnt: &Path) -> Option<u32> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|process| {
        let line = fs::read(process.path().join("cmdline")).ok()?;
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        let serves = words.iter().any(|w| w.starts_with(b"--serve-for-keeper"));
        let here = words.contains(&mnt.as_os_str().as_encoded_bytes());
        process.file_name().to_str()?.parse().ok().filter(|_| serves && here)
    })
}

/// The process that started it.
pub fn parent(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|l| l.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

/// The most memory that a process ever held, in bytes.
pub fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// What a process holds now that is its own: not the program's text, which the keeper shares with the server. In bytes.
pub fn own(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Sends a signal; a process that is gone is fine.
pub fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal);
}

/// `kill -9`.
pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Kills the server of the mount at `mnt`, and waits until the next one serves.
pub fn kill_and_wait(mnt: &Path) {
    let before = pid(mnt);
    kill(before);
    // Where requests are not resent, this one may fail.
    wait("the next server", || try_pid(mnt).is_ok_and(|now| now != before));
}
