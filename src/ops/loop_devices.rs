//! Loop devices: they write to files without any lock that says so.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The device that may write to a file now, if there is one.
pub(super) fn writer_of(path: &Path) -> io::Result<Option<PathBuf>> {
    let file = fs::metadata(path)?;
    // Without them in this kernel, or without /sys, there is nothing to find.
    let devices = if file.is_file() { fs::read_dir("/sys/block").ok() } else { None };
    let writes = |name: &str| {
        let about = |what: &str| fs::read_to_string(format!("/sys/block/{name}/{what}"));
        let Ok(backing) = about("loop/backing_file") else { return false };
        let is_same = |found: Metadata| (found.dev(), found.ino()) == (file.dev(), file.ino());
        fs::metadata(backing.trim_end_matches('\n')).is_ok_and(is_same)
            && about("ro").is_ok_and(|ro| ro.trim() == "0")
    };
    let mut names = devices.into_iter().flatten().flatten().filter_map(|d| d.file_name().into_string().ok());
    Ok(names.find(|name| name.starts_with("loop") && writes(name)).map(|name| Path::new("/dev").join(name)))
}
