//! Progress on standard error: bars on a terminal, now and then a line elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output::size;
use crate::ops::control::Event;

/// Seconds between two lines about the same thing where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

const BAR: &str = "{msg:24!} {bar:30} {bytes:>10} of {total_bytes} {binary_bytes_per_sec:>12}, {eta} left";
const SPINNER: &str = "{msg:24!} {spinner} {bytes:>10} {binary_bytes_per_sec:>12}";

/// Shows events.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    bars: MultiProgress,
    shown: Mutex<HashMap<String, Shown>>,
}

#[derive(Debug)]
struct Shown {
    bar: Option<ProgressBar>,
    total: u64,
    told: Instant,
}

impl Progress {
    /// Bars where standard error is a terminal.
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            bars: MultiProgress::new(),
            shown: Mutex::new(HashMap::new()),
        }
    }

    /// Shows what happens; from any thread.
    pub fn show(&self, event: Event) {
        match event {
            Event::Step(text) => self.line(&text),
            Event::Warning(text) => self.line(&format!("warning: {text}")),
            Event::Begin { what, total } => self.begin(what, total),
            Event::Advance { what, done } => self.advance(&what, done),
            Event::End { what } => self.end(&what),
        }
    }

    fn line(&self, text: &str) {
        // Above the bars, so that they stay whole.
        self.bars.suspend(|| eprintln!("{text}"));
    }

    fn begin(&self, what: String, total: u64) {
        let bar = self.terminal.then(|| {
            let template = if total == 0 { SPINNER } else { BAR };
            let style =
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar =
                ProgressBar::new(total).with_style(style.progress_chars("━╸ ")).with_message(what.clone());
            self.bars.add(bar)
        });
        let shown = Shown { bar, total, told: Instant::now() };
        self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(what, shown);
    }

    fn advance(&self, what: &str, done: u64) {
        let mut all = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(shown) = all.get_mut(what) else { return };
        match &shown.bar {
            Some(bar) => bar.set_position(done),
            None if shown.told.elapsed() >= LINE_EVERY => {
                shown.told = Instant::now();
                let text = describe(what, done, shown.total);
                drop(all);
                self.line(&text);
            }
            None => {}
        }
    }

    fn end(&self, what: &str) {
        let ended = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(what);
        if let Some(bar) = ended.and_then(|s| s.bar) {
            bar.finish_and_clear();
            self.bars.remove(&bar);
        }
    }
}

fn describe(what: &str, done: u64, total: u64) -> String {
    match done.saturating_mul(100).checked_div(total) {
        Some(percent) => format!("{what}: {} of {} ({}%)", size(done), size(total), percent.min(100)),
        None => format!("{what}: {}", size(done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_of_how_much() {
        assert_eq!(describe("copying root", 512 << 20, 1 << 30), "copying root: 512 MiB of 1.0 GiB (50%)");
        assert_eq!(describe("copying root", 1 << 20, 0), "copying root: 1.0 MiB");
    }

    #[test]
    fn the_bars_templates_are_right() {
        for template in [BAR, SPINNER] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
