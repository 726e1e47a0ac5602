//! How an operation hears that it should stop, and says how far it is.

use std::sync::atomic::{AtomicBool, Ordering};

/// What the caller of an operation holds.
#[derive(Clone, Copy)]
pub struct OpControl<'a> {
    /// Set when the operation is to stop: it undoes what it began and ends with an error.
    pub cancel: &'a AtomicBool,
    /// Called with what happens, from any thread.
    pub progress: &'a (dyn Fn(Event) + Sync),
}

/// What happens in an operation, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Something was begun or done; a short sentence without a full stop.
    Step(String),
    /// Something that a person should know, though the operation goes on.
    Warning(String),
    /// Work on one thing (a disk, a file) began.
    Begin {
        /// What: "copying root".
        what: String,
        /// Bytes to do; 0 where it is not known.
        total: u64,
    },
    /// How far it is.
    Advance {
        /// The same as in `Begin`.
        what: String,
        /// Bytes done so far.
        done: u64,
    },
    /// It is done.
    End {
        /// The same as in `Begin`.
        what: String,
    },
}

impl OpControl<'_> {
    /// Whether the operation is to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Says what is being done.
    pub fn step(&self, text: impl Into<String>) {
        (self.progress)(Event::Step(text.into()));
    }

    /// Says what a person should know.
    pub fn warn(&self, text: impl Into<String>) {
        (self.progress)(Event::Warning(text.into()));
    }
}

impl std::fmt::Debug for OpControl<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpControl").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}
