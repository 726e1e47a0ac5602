//! `cargo bench --bench many_backups`: a store of 10,000 backups in 200 VMs, mounted: how long it takes until it can be used, until
//! a VM's folder is listed, until all is; and the memory. The store lies in memory; nothing of it is known to the mount before.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/many/mod.rs"]
mod many;
#[path = "../tests/mounted_store/mod.rs"]
mod mounted_store;
#[path = "../tests/common/served.rs"]
mod served;
#[path = "../tests/common/server.rs"]
mod server;

use std::process::Command;
use std::time::{Duration, Instant};

use many::{BACKUPS, ManyBackups, VMS};

const CACHE: u64 = 64 << 20;

fn main() {
    // `cargo test --benches` only asks whether it runs.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let many = ManyBackups::new();
    let mut rows: Vec<(&str, Duration, Vec<Duration>)> = Vec::new();
    let mut note = |row: &'static str, limit: u64, took: Duration| match rows.iter_mut().find(|r| r.0 == row)
    {
        Some((_, _, all)) => all.push(took),
        None => rows.push((row, Duration::from_millis(limit), vec![took])),
    };
    let mut peak = 0;
    for _ in 0..5 {
        let begun = Instant::now();
        let mount = many.mount(&["--cache-size", "64M"]);
        note("mount ready", 1000, begun.elapsed());
        let listed = |program: &str, arguments: &[&str], at: &str| {
            let begun = Instant::now();
            let out = Command::new(program).arg(mount.at().join(at)).args(arguments).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            (begun.elapsed(), String::from_utf8(out.stdout).unwrap().lines().count())
        };
        let (took, lines) = listed("ls", &["-l"], "vms/vm123");
        assert_eq!(lines, 1 + BACKUPS / VMS + 1);
        note("ls -l of a VM's folder", 100, took);
        let (took, lines) = listed("find", &["-maxdepth", "3"], "");
        // Itself; by-id and its links; .knibfs, damage, status; vms, VMs, backups and `latest`.
        assert_eq!(lines, 1 + 1 + BACKUPS + 3 + 1 + VMS + BACKUPS + VMS);
        note("find -maxdepth 3", 5000, took);
        let (took, _) = listed("ls", &["-l"], "by-id");
        note("ls -l of by-id", 5000, took);
        peak = peak.max(mount.peak());
    }
    println!("| {BACKUPS} backups in {VMS} VMs | median | worst | aim |\n|---|---|---|---|");
    for (row, limit, mut all) in rows {
        all.sort();
        let (median, worst) = (all[all.len() / 2], all[all.len() - 1]);
        println!("| {row} | {median:.3?} | {worst:.3?} | {limit:?} |");
    }
    let limit = CACHE + (64 << 20);
    println!("| memory of the server | | {} MiB | {} MiB |", peak >> 20, limit >> 20);
}
