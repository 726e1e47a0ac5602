//! Operations that end when their time is up, as if the caller had asked them to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::control::OpControl;

/// How often the caller's flag is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Runs `work` with a flag that is also set after `limit`; whether that is why it was set.
pub fn within<T>(
    control: &OpControl<'_>,
    limit: Duration,
    work: impl FnOnce(&OpControl<'_>) -> T,
) -> (T, bool) {
    let (stop, expired) = (AtomicBool::new(control.is_cancelled()), AtomicBool::new(false));
    let end = Instant::now().checked_add(limit);
    let done = std::thread::scope(|scope| {
        let (over, heard) = channel::<()>();
        scope.spawn({
            let (stop, expired) = (&stop, &expired);
            move || {
                while heard.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    let late = end.is_some_and(|end| Instant::now() >= end);
                    if late && !stop.load(Ordering::Relaxed) {
                        expired.store(true, Ordering::Relaxed);
                    }
                    if late || control.is_cancelled() {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            }
        });
        let done = work(&OpControl { cancel: &stop, ..*control });
        drop(over);
        done
    });
    (done, expired.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_told_to_stop_when_time_is_up_or_the_caller_says_so() {
        let cancel = AtomicBool::new(false);
        let control = OpControl { cancel: &cancel, progress: &|_| {} };
        let wait = |control: &OpControl<'_>| {
            while !control.is_cancelled() {
                std::thread::yield_now();
            }
        };
        assert!(within(&control, Duration::from_millis(1), wait).1);
        assert!(!within(&control, Duration::from_secs(3600), |_| ()).1);
        cancel.store(true, Ordering::Relaxed);
        assert!(!within(&control, Duration::from_secs(3600), wait).1);
    }
}
