//! A helper process that thaws a guest whose knibfs died while it was frozen.
//!
//! It is this program again, as `knibfs thaw-guard`, in a process group of its own. It holds the reading end of a pipe: a
//! `d` in it says that the guest is thawed; the end of the pipe without it, or too long a silence, makes it thaw.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::{HypervisorError, Result};

/// The hidden command.
pub const COMMAND: &str = "thaw-guard";
const DONE: u8 = b'd';
const READY: u8 = b'r';
/// It must have connected to libvirt by then.
const START: Duration = Duration::from_secs(20);

/// A helper that waits. Dropped without [`ThawGuard::dismiss`], it thaws.
#[derive(Debug)]
pub struct ThawGuard {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl ThawGuard {
    /// Starts the helper and waits until it is ready to thaw. `program` is this program; after `limit` the helper thaws
    /// whatever happens.
    ///
    /// # Errors
    /// It cannot be started or cannot reach the domain.
    pub fn start(program: &Path, uri: &str, domain: &str, limit: Duration) -> Result<Self> {
        let failed = |why: String| HypervisorError::ThawGuard { why };
        let mut child = Command::new(program)
            .args([COMMAND, "--uri", uri, "--domain", domain])
            .args(["--seconds", &limit.as_secs().max(1).to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C on the terminal is meant for knibfs, which thaws; the helper must outlive it.
            .process_group(0)
            .spawn()
            .map_err(|e| failed(format!("{}: {e}", program.display())))?;
        let pipe = child.stdin.take();
        let (said, heard) = mpsc::channel();
        if let Some(mut out) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut byte = [0];
                let ready = out.read_exact(&mut byte).is_ok() && byte == [READY];
                let _ = said.send(ready);
            });
        }
        if heard.recv_timeout(START) == Ok(true) {
            return Ok(Self { child, pipe });
        }
        let _ = child.kill();
        let _ = child.wait();
        Err(failed(format!("{} {COMMAND} did not report that it is ready", program.display())))
    }

    /// The guest is thawed: the helper ends without doing anything.
    pub fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(&[DONE]);
        }
        let _ = self.child.wait();
    }
}

/// The helper itself.
///
/// # Errors
/// The domain cannot be reached at the start, or could not be thawed.
#[cfg(feature = "libvirt")]
pub fn run(uri: &str, domain: &str, limit: Duration) -> Result<()> {
    super::libvirt::reach(uri, domain)?;
    let mut out = std::io::stdout();
    out.write_all(&[READY])
        .and_then(|()| out.flush())
        .map_err(HypervisorError::io("report", "standard output"))?;
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        let done = std::io::stdin().read_exact(&mut byte).is_ok() && byte == [DONE];
        let _ = said.send(done);
    });
    match heard.recv_timeout(limit) {
        Ok(true) => Ok(()),
        // The pipe's end, or time is up.
        _ => super::libvirt::thaw_after_crash(uri, domain),
    }
}
