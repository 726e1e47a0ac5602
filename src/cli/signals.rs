//! Ctrl-C: the first asks the operation to stop cleanly, the second ends the program at once (`recover` cleans up).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// A flag that is set when the program is asked to end.
pub fn cancel_flag() -> std::io::Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: the first signal finds the flag unset and only sets it.
        flag::register_conditional_shutdown(signal, 1, cancel.clone())?;
        flag::register(signal, cancel.clone())?;
    }
    Ok(cancel)
}
