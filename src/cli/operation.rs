//! What every command that runs an operation shares: a flag that Ctrl-C sets, and progress on standard error.

use super::Failure;
use super::progress::Progress;
use super::signals::cancel_flag;
use crate::ops::control::OpControl;

/// Runs an operation. One that fails after Ctrl-C says first that it was stopped.
pub fn operate<T, E>(run: impl FnOnce(&OpControl<'_>) -> Result<T, E>) -> Result<T, Failure>
where
    E: Into<anyhow::Error>,
{
    let cancel = cancel_flag().map_err(|e| anyhow::anyhow!("cannot watch for signals: {e}"))?;
    let progress = Progress::new();
    let control = OpControl { cancel: &cancel, progress: &|event| progress.show(event) };
    run(&control).map_err(|error| {
        let error: anyhow::Error = error.into();
        Failure::Failed(if control.is_cancelled() { error.context("stopped as asked") } else { error })
    })
}
