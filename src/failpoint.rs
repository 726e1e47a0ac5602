//! Places where a test may kill the program, as a crash of the host would.
//!
//! `KNIBFS_FAILPOINT=<name>` kills it (SIGKILL) when it comes to the place of that name, `KNIBFS_FAILPOINT=#<n>` at the
//! n-th place it comes to: a test that counts n up until the program ends by itself has tried them all.
//! `KNIBFS_FAILPOINT=stop:<name>` stops it there (SIGSTOP) until the test lets it go on (SIGCONT).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable.
pub const ENV: &str = "KNIBFS_FAILPOINT";

enum Wanted {
    Name(String),
    Number(u64),
    Stop(String),
}

/// The program is at the place `name`.
pub fn hit(name: &str) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    static HITS: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var(ENV).ok()?;
        Some(match (text.strip_prefix('#').and_then(|n| n.parse().ok()), text.strip_prefix("stop:")) {
            (Some(number), _) => Wanted::Number(number),
            (None, Some(name)) => Wanted::Stop(name.to_owned()),
            (None, None) => Wanted::Name(text),
        })
    });
    let now = match wanted {
        None => return,
        Some(Wanted::Name(wanted)) => wanted == name,
        Some(Wanted::Stop(wanted)) => {
            if wanted == name && HITS.fetch_add(1, Ordering::Relaxed) == 0 {
                let _ =
                    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
            }
            return;
        }
        Some(Wanted::Number(number)) => HITS.fetch_add(1, Ordering::Relaxed) + 1 == *number,
    };
    if now {
        eprintln!("failpoint: killed at {name}");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
