//! What an image stands on, read from its header alone: for definitions that leave it to the headers.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Header" and "Header extensions". Only names are read, never data, and a name
//! is followed only if it is a plain path with an explicit format.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{HypervisorError, ImageFormat, ImageRef, Result};

/// QEMU itself gives up at this depth.
pub const MAX_DEPTH: usize = 200;
/// QEMU's bound on the name's length in bytes.
const MAX_NAME: usize = 1023;
const MAGIC: &[u8] = b"QFI\xfb";
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The image at `path` and all that it stands on, top first.
///
/// # Errors
/// An image is missing or unreadable, its header is damaged, names a backing file without its format or by anything but
/// a plain path, the chain loops or is deeper than 200.
pub fn backing_chain(path: &Path, format: ImageFormat) -> Result<Vec<ImageRef>> {
    let mut chain = vec![ImageRef { path: path.to_owned(), format }];
    extend_chain(&mut chain)?;
    Ok(chain)
}

/// Adds what the last image of `chain` stands on.
pub(super) fn extend_chain(chain: &mut Vec<ImageRef>) -> Result<()> {
    let mut seen = HashSet::new();
    for image in chain.iter() {
        let file = std::fs::metadata(&image.path).map_err(HypervisorError::io("look at", &image.path))?;
        seen.insert((file.dev(), file.ino()));
    }
    loop {
        let Some(last) = chain.last() else { return Ok(()) };
        let Some(next) = backing(last)? else { return Ok(()) };
        let file = std::fs::metadata(&next.path).map_err(HypervisorError::io("look at", &next.path))?;
        let wrong = |what: &str| HypervisorError::Header { path: last.path.clone(), what: what.to_owned() };
        if !seen.insert((file.dev(), file.ino())) {
            return Err(wrong("its chain of backing files is a loop"));
        }
        if chain.len() >= MAX_DEPTH {
            return Err(wrong("its chain is deeper than 200 images; merge some"));
        }
        chain.push(next);
    }
}

/// What an image stands on, by its header.
pub(super) fn backing(image: &ImageRef) -> Result<Option<ImageRef>> {
    if image.format == ImageFormat::Raw {
        return Ok(None);
    }
    let path = &image.path;
    let file = File::open(path).map_err(HypervisorError::io("open", path))?;
    let head = read_head(&file, path)?;
    let Some((name, format)) =
        names(&head).map_err(|what| HypervisorError::Header { path: path.clone(), what })?
    else {
        return Ok(None);
    };
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    // An absolute name replaces the folder.
    Ok(Some(ImageRef { path: folder.join(name), format }))
}

/// The first cluster at most, as far as it goes: header, extensions and name lie in it.
fn read_head(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut head = vec![0; 65536];
    let mut have = 0;
    while have < head.len() {
        let Some(rest) = head.get_mut(have..) else { break };
        match file.read_at(rest, have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(HypervisorError::io("read", path)(e)),
        }
    }
    head.truncate(have);
    Ok(head)
}

fn names(head: &[u8]) -> std::result::Result<Option<(PathBuf, ImageFormat)>, String> {
    if head.get(..4) != Some(MAGIC) {
        return Err("it is no qcow2 image, though what names it says so".into());
    }
    let version = be32(head, 4)?;
    if version != 2 && version != 3 {
        return Err(format!("it is qcow2 of version {version}; 2 and 3 are known"));
    }
    if be32(head, 32)? != 0 {
        return Err("it is encrypted".into());
    }
    let offset = be64(head, 8)?;
    let len = be32(head, 16)? as usize;
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_NAME {
        return Err(format!("the name of its backing file has {len} bytes; 1023 are allowed"));
    }
    let start = usize::try_from(offset).map_err(|_| too_far())?;
    let end = start.checked_add(len).ok_or_else(too_far)?;
    let name = head.get(start..end).ok_or_else(too_far)?;
    let name =
        std::str::from_utf8(name).map_err(|_| "the name of its backing file is no UTF-8".to_owned())?;
    // QEMU takes what stands before a colon for a protocol, unless a slash comes first.
    if name.contains('\0') || name.find(':').is_some_and(|c| !name.get(..c).unwrap_or_default().contains('/'))
    {
        return Err(format!(
            "its backing file \"{name}\" is no plain path; only files and block devices are known"
        ));
    }
    let at = if version == 2 { 72 } else { be32(head, 100)? as usize };
    let format = backing_format(head, at)?.ok_or_else(|| {
        format!("it does not say which format its backing file \"{name}\" has; say it with `qemu-img rebase -u -b {name} -F FORMAT`")
    })?;
    Ok(Some((PathBuf::from(name), format)))
}

fn backing_format(head: &[u8], mut at: usize) -> std::result::Result<Option<ImageFormat>, String> {
    loop {
        let kind = be32(head, at)?;
        let len = be32(head, at.checked_add(4).ok_or_else(too_far)?)? as usize;
        let start = at.checked_add(8).ok_or_else(too_far)?;
        if kind == 0 {
            return Ok(None);
        }
        let end = start.checked_add(len).ok_or_else(too_far)?;
        if kind == BACKING_FORMAT {
            return match head.get(start..end) {
                Some(b"raw") => Ok(Some(ImageFormat::Raw)),
                Some(b"qcow2") => Ok(Some(ImageFormat::Qcow2)),
                other => Err(format!(
                    "its backing file has the format {:?}; raw and qcow2 are known",
                    String::from_utf8_lossy(other.unwrap_or_default())
                )),
            };
        }
        at = end.checked_next_multiple_of(8).ok_or_else(too_far)?;
    }
}

fn too_far() -> String {
    "its header is cut short".into()
}

fn be32(bytes: &[u8], at: usize) -> std::result::Result<u32, String> {
    let end = at.checked_add(4).ok_or_else(too_far)?;
    let field = bytes.get(at..end).and_then(|b| b.try_into().ok()).ok_or_else(too_far)?;
    Ok(u32::from_be_bytes(field))
}

fn be64(bytes: &[u8], at: usize) -> std::result::Result<u64, String> {
    Ok(u64::from(be32(bytes, at)?) << 32 | u64::from(be32(bytes, at.checked_add(4).ok_or_else(too_far)?)?))
}
