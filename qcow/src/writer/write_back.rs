//! Writing to the device, begun while the work goes on.

use std::sync::{Arc, mpsc};
use std::thread::Scope;

use crate::Storage;

/// The system is asked to begin whenever so many bytes are new, so that little is left to wait for at the end.
const BYTES: u64 = 16 << 20;

/// Asks for it from a thread of its own: handing pages to the device takes a processor's time. It ends when this is
/// dropped.
pub(crate) struct WriteBack {
    begin: mpsc::Sender<(u64, u64)>,
    /// What was written since, in bytes.
    fresh: Option<(u64, u64)>,
}

impl WriteBack {
    pub(crate) fn new<'scope>(scope: &'scope Scope<'scope, '_>, device: &Arc<dyn Storage>) -> Self {
        let (begin, ranges) = mpsc::channel::<(u64, u64)>();
        let device = device.clone();
        scope.spawn(move || {
            ranges.into_iter().for_each(|(from, to)| device.begin_write_back(from, to - from))
        });
        Self { begin, fresh: None }
    }

    /// So many bytes were written there.
    pub(crate) fn wrote(&mut self, offset: u64, len: u64) {
        let (from, to) = self.fresh.unwrap_or((offset, offset));
        let (from, to) = (from.min(offset), to.max(offset.saturating_add(len)));
        if to - from < BYTES {
            self.fresh = Some((from, to));
            return;
        }
        self.fresh = None;
        // Advice: nothing depends on who hears it.
        let _ = self.begin.send((from, to));
    }
}
