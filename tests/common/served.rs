//! A mount whose server can be looked at.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use super::server;

/// A mount that is served in the foreground, so that its server can be looked at.
pub struct ServedMount {
    child: Child,
    at: PathBuf,
}

impl ServedMount {
    /// Runs `knibfs mount -f …`, which the mount point is added to, until it is ready.
    pub fn new(mut command: Command, at: &Path) -> Self {
        let mut child = command.arg(at).spawn().unwrap();
        while !at.join("vms").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the mount ended");
            std::thread::yield_now();
        }
        Self { child, at: at.into() }
    }

    pub fn at(&self) -> &Path {
        &self.at
    }

    /// The process that serves.
    pub fn server(&self) -> u32 {
        server::pid(&self.at)
    }

    /// The most that its processes ever held, in bytes.
    pub fn peak(&self) -> u64 {
        server::own(self.child.id()) + server::peak(self.server())
    }
}

impl Drop for ServedMount {
    fn drop(&mut self) {
        let server = server::serving(&self.at);
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(server) = server {
            server::kill(server);
        }
    }
}
