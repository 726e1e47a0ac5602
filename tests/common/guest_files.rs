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
    /// `KNIBFS_TEST_KERNEL` and `KNIBFS_TEST_INITRD`, else built if it is not there yet.
    pub fn get() -> Self {
        static BUILT: OnceLock<GuestSystem> = OnceLock::new();
        BUILT.get_or_init(build).clone()
    }
}

fn build() -> GuestSystem {
    let given = |name| std::env::var_os(name).map(PathBuf::from);
    if let (Some(kernel), Some(initrd)) = (given("KNIBFS_TEST_KERNEL"), given("KNIBFS_TEST_INITRD")) {
        return GuestSystem { kernel, initrd };
    }
    let mut paths = script("guest-small", &["KERNEL", "INITRD"]).into_iter().map(PathBuf::from);
    GuestSystem { kernel: paths.next().unwrap(), initrd: paths.next().unwrap() }
}

/// Runs one of `scripts/` and gives the values that it prints as `KEY=value`; fails where it fails.
pub fn script(name: &str, keys: &[&str]) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name);
    let out = Command::new(&path).output().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "scripts/{name} failed; run scripts/install-deps first: {err}");
    let text = String::from_utf8(out.stdout).unwrap();
    let value = |key: &&str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("scripts/{name} printed no {key}: {text}")).to_owned()
    };
    keys.iter().map(value).collect()
}
