//! What is mounted where: `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number, `major:minor`.
    pub device: String,
    /// Where.
    pub mount_point: PathBuf,
    /// Type with its subtype, `fuse.knibfs`.
    pub fs_type: String,
    /// Source as `mount` shows it.
    pub source: String,
}

/// All mounts, in the order in which they were made.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount exactly at `path`, which is absolute and without links.
pub fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|m| m.mount_point == path))
}

/// proc(5): `36 35 98:0 /root /mount/point options optional… - type source super-options`; spaces are `\040`.
fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n')
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
            let dash = fields.iter().skip(6).position(|f| *f == b"-")? + 6;
            let text = |at: usize| Some(String::from_utf8_lossy(&unescape(fields.get(at)?)).into_owned());
            Some(MountEntry {
                device: text(2)?,
                mount_point: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
                fs_type: text(dash + 1)?,
                source: text(dash + 2)?,
            })
        })
        .collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        match octal {
            Some(digits) => {
                out.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_with_hard_names_and_optional_fields_are_read() {
        let text =
            b"36 35 0:42 / /mnt/a\\040b\\134c ro,nosuid shared:7 master:1 - fuse.knibfs knib\\040fs ro\n\
                     37 35 0:43 / /mnt/c rw - ext4 /dev/vda rw\nnonsense\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].mount_point, Path::new("/mnt/a b\\c"));
        assert_eq!((found[0].fs_type.as_str(), found[0].source.as_str()), ("fuse.knibfs", "knib fs"));
        assert_eq!(found[0].device, "0:42");
        assert_eq!(found[1].fs_type, "ext4");
    }
}
