//! A mount whose keeper is a child of the test, and a program that can be replaced under it.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;

use super::server;

/// A mount whose keeper is a child of the test.
pub struct Mount {
    pub keeper: Child,
    pub at: PathBuf,
    pub log: PathBuf,
}

impl Mount {
    pub fn new(mut command: Command, at: &Path, options: &[&str]) -> Self {
        let log = at.with_extension("log");
        command.args(["mount", "-f"]).args(options).arg(at).stderr(File::create(&log).unwrap());
        let mut mount = Self { keeper: command.spawn().unwrap(), at: at.into(), log };
        while !at.join("vms").exists() {
            assert!(mount.keeper.try_wait().unwrap().is_none(), "the mount ended: {}", mount.said());
            std::thread::yield_now();
        }
        mount
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn replace(&self) {
        server::signal(self.keeper.id(), Signal::USR1);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(std::process::Stdio::null()).status();
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        if let Some(left) = server::serving(&self.at) {
            server::kill(left);
        }
    }
}

/// Tells the readers to stop, also when the test fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The program in a folder of its own, where it can be replaced.
pub fn installed(dir: &Path) -> PathBuf {
    let program = dir.join("installed");
    fs::copy(env!("CARGO_BIN_EXE_knibfs"), &program).unwrap();
    program
}

/// As a package manager does it: beside, and then renamed.
pub fn install(program: &Path, text: Option<&str>) {
    let beside = program.with_extension("new");
    match text {
        Some(text) => File::create(&beside).unwrap().write_all(text.as_bytes()).unwrap(),
        None => drop(fs::copy(env!("CARGO_BIN_EXE_knibfs"), &beside).unwrap()),
    }
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&beside, program).unwrap();
}
