//! What an image stands on, read from its header alone: for definitions that leave it to the headers.
//!
//! Only names are read, never data, and a name is followed only if it is a plain path with an explicit format.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use knib_qcow::{Access, FileStorage, Header};

use super::{HypervisorError, ImageFormat, ImageRef, Result};

/// QEMU itself gives up at this depth.
pub const MAX_DEPTH: usize = 200;

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
    let wrong = |what: String| HypervisorError::Header { path: path.clone(), what };
    let header = FileStorage::open(path, Access::Read).and_then(|storage| Header::parse(&*storage));
    let header = header.map_err(|e| match e {
        knib_qcow::Error::Io { source, .. } => HypervisorError::io("read", path)(source),
        knib_qcow::Error::Damaged { what, .. } | knib_qcow::Error::Unsupported { what, .. } => wrong(what),
        other => wrong(other.to_string()),
    })?;
    let Some(name) = header.backing else { return Ok(None) };
    // QEMU takes what stands before a colon for a protocol, unless a slash comes first.
    if name.find(':').is_some_and(|c| !name.get(..c).unwrap_or_default().contains('/')) {
        return Err(wrong(format!(
            "its backing file \"{name}\" is no plain path; only files and block devices are known"
        )));
    }
    let format = match header.backing_format.as_deref() {
        Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => {
            return Err(wrong(format!("its backing file has the format {other:?}; raw and qcow2 are known")));
        }
        None => {
            return Err(wrong(format!(
                "it does not say which format its backing file \"{name}\" has; say it with `qemu-img rebase -u -b {name} -F FORMAT`"
            )));
        }
    };
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    // An absolute name replaces the folder.
    Ok(Some(ImageRef { path: folder.join(name), format }))
}
