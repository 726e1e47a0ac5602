//! A libvirt that a test may restart, stop or let hang: no other test uses it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::lab::tool;

/// Started by `scripts/libvirt-start` under a name of its own; ended with its guests when dropped.
#[derive(Debug)]
pub struct OwnLibvirt {
    name: String,
    uri: String,
}

impl OwnLibvirt {
    pub fn start(test: &str) -> Self {
        let name = format!("{test}-{}", std::process::id());
        let out = script("libvirt-start", &name).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let uri = text.lines().find_map(|line| line.strip_prefix("URI="));
        let uri =
            uri.unwrap_or_else(|| panic!("no libvirt: {}", String::from_utf8_lossy(&out.stderr))).to_owned();
        Self { name, uri }
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    fn base(&self) -> PathBuf {
        PathBuf::from(format!("/run/knibfs-libvirt-{}", self.name))
    }

    fn pid(&self, program: &str) -> String {
        let path = self.base().join(format!("{program}.pid"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    }

    pub fn signal(&self, signal: &str) {
        tool("kill", &[signal, &self.pid("libvirtd")]);
    }

    /// Ends the daemon; its guests run on.
    pub fn end_daemon(&self) {
        let pid = self.pid("libvirtd");
        tool("kill", &["-TERM", &pid]);
        let until = Instant::now() + Duration::from_secs(60);
        while Path::new("/proc").join(&pid).exists() {
            assert!(Instant::now() < until, "libvirtd does not end");
            std::thread::yield_now();
        }
    }

    /// Starts the daemon anew, in the namespace where its folders are.
    pub fn start_daemon(&self) {
        let pid_file = self.base().join("libvirtd.pid");
        let there = self.pid("virtlogd");
        let file = pid_file.to_str().unwrap();
        tool("nsenter", &["-t", &there, "-m", "libvirtd", "-d", "-p", file]);
        let answers =
            || Command::new("virsh").args(["-q", "-c", &self.uri, "uri"]).output().unwrap().status.success();
        let until = Instant::now() + Duration::from_secs(60);
        while !answers() {
            assert!(Instant::now() < until, "libvirtd does not answer");
        }
    }
}

fn script(script: &str, name: &str) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script));
    command.arg(name).env_remove("KNIBFS_TEST_URI");
    command
}

impl Drop for OwnLibvirt {
    fn drop(&mut self) {
        // One that a failed test left stopped does not end by itself.
        if let Ok(pid) = std::fs::read_to_string(self.base().join("libvirtd.pid")) {
            let _ = Command::new("kill").args(["-CONT", pid.trim()]).output();
        }
        let _ = script("libvirt-stop", &self.name).output();
        let _ = std::fs::remove_dir_all(self.base());
    }
}
