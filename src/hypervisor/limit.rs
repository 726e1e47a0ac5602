//! The time that a libvirt may take to answer: one that hangs must not hang knibfs.
//!
//! libvirt's library has no such bound. So each call is made in a thread of its own, and one that does not come back is left to
//! itself: it ends with the program, and `recover` finds out what became of what it asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::{HypervisorError, Result};

/// Connecting takes no longer than this anywhere.
const CONNECT: Duration = Duration::from_secs(60);

/// Seconds.
static LIMIT: AtomicU64 = AtomicU64::new(43200);

/// Bounds each call to a libvirt, from now on: the setting `knib.timeout`.
pub fn set(limit: Duration) {
    LIMIT.store(limit.as_secs().max(1), Ordering::Relaxed);
}

pub(super) fn of_a_call() -> Duration {
    Duration::from_secs(LIMIT.load(Ordering::Relaxed))
}

pub(super) fn of_a_connection() -> Duration {
    CONNECT.min(of_a_call())
}

/// Calls libvirt at `uri`, for at most `limit`; `doing` follows "cannot".
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    uri: &str,
    doing: &str,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let silent = |why: String| HypervisorError::Silent { uri: uri.to_owned(), doing: doing.to_owned(), why };
    let (answer, answered) = channel();
    let spawned = std::thread::Builder::new().spawn(move || {
        // Nobody may be waiting any more.
        let _ = answer.send(call());
    });
    spawned.map_err(|e| silent(e.to_string()))?;
    answered.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => silent(format!("no answer within {} s", limit.as_secs())),
        RecvTimeoutError::Disconnected => silent("libvirt's library failed".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_does_not_come_back_is_left_to_itself() {
        let ask = |call: fn() -> u32| within(Duration::from_millis(20), "qemu:///system", "look", call);
        assert_eq!(ask(|| 7).unwrap(), 7);
        let said = ask(|| {
            loop {
                std::thread::park();
            }
        })
        .unwrap_err()
        .to_string();
        assert!(said.contains("cannot look") && said.contains("no answer within 0 s"), "{said}");
    }
}
