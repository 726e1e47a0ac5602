//! Progress as `-p` shows it: a percentage on standard output, written over itself.

use std::io::Write as _;

use parking_lot::Mutex;

use super::options::Given;

/// Where the work is; prints only if asked to. However the command ends, the line does.
#[derive(Debug)]
pub struct Progress {
    shown: Option<Mutex<f64>>,
    step: f64,
}

impl Progress {
    /// For a command that was given `-p` and not `-q`. `step` is the per cent between two lines.
    pub fn of(given: &Given, step: f64) -> Self {
        let wanted = given.has("progress") && !given.has("quiet");
        Self { shown: wanted.then(|| Mutex::new(0.0)), step }
    }

    /// Nothing is done yet.
    pub fn begin(&self) {
        if self.shown.is_some() {
            print(0.0);
        }
    }

    /// `done` of `total` bytes are done. From any thread.
    #[allow(clippy::cast_precision_loss)] // two digits are shown
    pub fn at(&self, done: u64, total: u64) {
        let Some(shown) = &self.shown else { return };
        let percent = if total == 0 { 100.0 } else { (done as f64 * 100.0 / total as f64).min(100.0) };
        let mut shown = shown.lock();
        if percent >= *shown + self.step || percent >= 100.0 && *shown < 100.0 {
            *shown = percent;
            print(percent);
        }
    }

    /// All is done.
    pub fn end(self) {
        if self.shown.is_some() {
            print(100.0);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            say_raw("\n");
        }
    }
}

fn print(percent: f64) {
    say_raw(&format!("    ({percent:3.2}/100%)\r"));
}

fn say_raw(text: &str) {
    let mut out = std::io::stdout().lock();
    // Progress that nobody reads is no failure.
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}
