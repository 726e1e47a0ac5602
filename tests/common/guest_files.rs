//! The small Linux system that `scripts/guest-small` builds, once, into its cache.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Kernel and initial file system; it needs no disk.
#[derive(Debug, Clone)]
pub struct GuestSystem {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl GuestSystem {
    /// Builds it if it is not there yet; fails, and says how, where it cannot be built.
    pub fn get() -> Self {
        static BUILT: OnceLock<GuestSystem> = OnceLock::new();
        BUILT.get_or_init(build).clone()
    }
}

fn build() -> GuestSystem {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest-small");
    let out = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "scripts/guest-small failed; run scripts/install-deps first: {err}");
    let text = String::from_utf8(out.stdout).unwrap();
    let path = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key));
        PathBuf::from(found.unwrap_or_else(|| panic!("scripts/guest-small printed no {key}: {text}")))
    };
    GuestSystem { kernel: path("KERNEL="), initrd: path("INITRD=") }
}
