//! Places where a test may kill the program, as a crash of the host would.
//!
//! `KNIBFS_FAILPOINT=<name>` kills it (SIGKILL) when it comes to the place of that name, `<name>#<n>` when it comes there for
//! the n-th time, and `#<n>` at the n-th place it comes to: a test that counts n up until the program ends by itself has
//! tried them all. `stop:<name>` stops it there (SIGSTOP) until the test lets it go on (SIGCONT). `list:<file>` kills
//! nothing: each name is added to that file, a line each, when its place is passed.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable.
pub const ENV: &str = "KNIBFS_FAILPOINT";

enum Wanted {
    /// At that place, which is come to so many times.
    Name(String, u64),
    Number(u64),
    Stop(String),
    List(PathBuf),
}

fn parse(text: &str) -> Wanted {
    if let Some(name) = text.strip_prefix("stop:") {
        return Wanted::Stop(name.to_owned());
    }
    if let Some(file) = text.strip_prefix("list:") {
        return Wanted::List(file.into());
    }
    let numbered = text.rsplit_once('#').and_then(|(name, n)| Some((name, n.parse().ok()?)));
    match numbered {
        Some(("", number)) => Wanted::Number(number),
        Some((name, number)) => Wanted::Name(name.to_owned(), number),
        None => Wanted::Name(text.to_owned(), 1),
    }
}

/// The program is at the place `name`.
pub fn hit(name: &str) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    static HITS: AtomicU64 = AtomicU64::new(0);
    let count = || HITS.fetch_add(1, Ordering::Relaxed) + 1;
    let signal = |signal| {
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    };
    let now = match WANTED.get_or_init(|| std::env::var(ENV).ok().map(|text| parse(&text))) {
        None => return,
        Some(Wanted::Name(wanted, number)) => wanted == name && count() == *number,
        Some(Wanted::Number(number)) => count() == *number,
        Some(Wanted::Stop(wanted)) => {
            if wanted == name && count() == 1 {
                signal(rustix::process::Signal::STOP);
            }
            return;
        }
        Some(Wanted::List(file)) => return list(file, name),
    };
    if now {
        eprintln!("failpoint: killed at {name}");
        signal(rustix::process::Signal::KILL);
    }
}

/// In one write, so that threads do not mix their lines.
fn list(file: &Path, name: &str) {
    use std::io::Write as _;
    let open = std::fs::File::options().create(true).append(true).open(file);
    if let Err(error) = open.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes())) {
        eprintln!("failpoint: cannot list {name} in {}: {error}", file.display());
    }
}
