//! `MNT/.knibfs/status`: what the mount has done so far, for a person and for a scraper (Prometheus' text format).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use knib_fuse::{CacheStats, File, FsResult, Problem};
use parking_lot::Mutex;

/// What is counted while the mount is served.
#[derive(Debug, Default)]
pub struct Counters {
    open: AtomicU64,
    /// Of these, those that the kernel reads by itself.
    passed: AtomicU64,
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    /// Of these, those of each file, by its path in the mount.
    errors_by_file: Mutex<BTreeMap<String, u64>>,
}

/// Files whose errors are counted one by one: a store that is away for a moment must not fill the memory with their names.
const MOST_FILES: usize = 4096;

impl Counters {
    fn failed(&self, file: &str) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let mut files = self.errors_by_file.lock();
        if let Some(count) = files.get_mut(file) {
            *count += 1;
        } else if files.len() < MOST_FILES {
            files.insert(file.into(), 1);
        }
    }
}

/// A file whose reads are counted.
pub struct Counted<F> {
    file: F,
    /// Its path in the mount.
    name: String,
    passed: AtomicBool,
    counters: Arc<Counters>,
}

impl<F: File> Counted<F> {
    /// `name` is its path in the mount.
    pub fn new(file: F, name: String, counters: &Arc<Counters>) -> Self {
        counters.open.fetch_add(1, Ordering::Relaxed);
        Self { file, name, passed: AtomicBool::new(false), counters: counters.clone() }
    }
}

impl<F> Drop for Counted<F> {
    fn drop(&mut self) {
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
        if *self.passed.get_mut() {
            self.counters.passed.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl<F: File> File for Counted<F> {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let result = self.file.read(offset, buf);
        match &result {
            Ok(()) => {
                self.counters.reads.fetch_add(1, Ordering::Relaxed);
                self.counters.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
            }
            Err(error) if matches!(error.problem(), Problem::Damage | Problem::Bug) => {
                self.counters.failed(&self.name);
            }
            Err(_) => {}
        }
        result
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.file.lock()
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.file.backing()
    }

    fn passed_through(&self) {
        if !self.passed.swap(true, Ordering::Relaxed) {
            self.counters.passed.fetch_add(1, Ordering::Relaxed);
        }
        self.file.passed_through();
    }

    fn waits(&self) -> bool {
        self.file.waits()
    }

    fn replied(&self) {
        self.file.replied();
    }

    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        self.file.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        self.file.next_hole(offset)
    }
}

/// Which process serves what.
pub struct ServerInfo {
    /// Id of the store.
    pub store: String,
    /// Since when.
    pub started: SystemTime,
    /// Servers that the mount had before.
    pub restarts: u64,
}

/// The text. `damage` is how often each stored file was found damaged.
pub fn text(counters: &Counters, cache: CacheStats, server: &ServerInfo, damage: &[(String, u64)]) -> String {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let started = server.started.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut out = String::new();
    let mut line = |name: &str, kind: &str, help: &str, values: &[(String, String)]| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP knibfs_mount_{name} {help}\n# TYPE knibfs_mount_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(out, "knibfs_mount_{name}{labels} {value}");
        }
    };
    let one = |value: u64| [(String::new(), value.to_string())];
    let info = format!("{{version=\"{}\",store=\"{}\"}}", env!("CARGO_PKG_VERSION"), server.store);
    line("info", "gauge", "Version of the program and id of the store.", &[(info, "1".into())]);
    line("start_time_seconds", "gauge", "When this server was started.", &one(started));
    let keeper = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().cast_unsigned());
    line("keeper_pid", "gauge", "Process that starts the next one.", &one(keeper.into()));
    line("server_pid", "gauge", "Process that serves.", &one(std::process::id().into()));
    line(
        "server_restarts_total",
        "counter",
        "Servers of this mount that died or were replaced.",
        &one(server.restarts),
    );
    line("open_files", "gauge", "Disks and stored files that are open.", &one(count(&counters.open)));
    line(
        "passed_through_files",
        "gauge",
        "Of the open files, those that the kernel reads by itself: unchecked, and not counted below.",
        &one(count(&counters.passed)),
    );
    line("reads_total", "counter", "Reads of disks and stored files.", &one(count(&counters.reads)));
    line("read_bytes_total", "counter", "Bytes of these.", &one(count(&counters.bytes)));
    line("read_errors_total", "counter", "Reads that were answered with EIO.", &one(count(&counters.errors)));
    line("cache_bytes", "gauge", "Decoded clusters in memory.", &one(cache.bytes as u64));
    line("cache_limit_bytes", "gauge", "The most of them.", &one(cache.limit as u64));
    line("cache_hits_total", "counter", "Clusters found there.", &one(cache.hits));
    line("cache_misses_total", "counter", "Clusters decoded.", &one(cache.misses));
    let asked = cache.hits.saturating_add(cache.misses).max(1);
    let ratio = format!("{:.3}", cache.hits as f64 / asked as f64);
    line(
        "cache_hit_ratio",
        "gauge",
        "Share of clusters found there, of all so far.",
        &[(String::new(), ratio)],
    );
    let escaped = |file: &str| file.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let of_file = |file: &str, n: u64| (format!("{{file=\"{}\"}}", escaped(file)), n.to_string());
    let failed: Vec<_> = counters.errors_by_file.lock().iter().map(|(file, n)| of_file(file, *n)).collect();
    line(
        "file_read_errors_total",
        "counter",
        "Of the reads with EIO, those of each file of the mount.",
        &failed,
    );
    let damage: Vec<_> = damage.iter().map(|(file, n)| of_file(file, *n)).collect();
    line("damage_total", "counter", "How often a file was found damaged; .knibfs/damage says how.", &damage);
    out
}
