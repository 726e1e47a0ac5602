//! Layers of a chain, and the paths of new ones.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::{Guest, GuestVolume, HypervisorError, ImageRef, Result};

/// Where `top` and `base` are in the chain of `volume` of the VM that errors call `vm`.
pub(super) fn place(volume: &GuestVolume, vm: &str, top: &Path, base: &Path) -> Result<(usize, usize)> {
    let find = |path: &Path| {
        // By name first: a symbolic link may lead elsewhere by now.
        let named = volume.chain.iter().position(|i| i.path == path);
        named.or_else(|| volume.chain.iter().position(|i| same_file(&i.path, path)))
    };
    match (find(top), find(base)) {
        (Some(above), Some(below)) if above < below => Ok((above, below)),
        _ => Err(HypervisorError::NotInChain {
            vm: vm.to_owned(),
            target: volume.target.clone(),
            top: top.to_owned(),
            base: base.to_owned(),
            chain: volume.chain.iter().map(|i| i.path.display().to_string()).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// A chain without its layers from `above` to just over `below`.
pub(super) fn without(chain: &[ImageRef], above: usize, below: usize) -> Vec<ImageRef> {
    let kept = |i: &usize| *i < above || *i >= below;
    chain.iter().enumerate().filter(|(i, _)| kept(i)).map(|(_, image)| image.clone()).collect()
}

/// The volume of that name.
pub(crate) fn volume<'a>(guest: &'a Guest, target: &str) -> Result<&'a GuestVolume> {
    guest.volumes.iter().find(|v| v.target == target).ok_or_else(|| {
        let there: Vec<_> = guest.volumes.iter().map(|v| v.target.as_str()).collect();
        HypervisorError::NoSuchVolume {
            vm: format!("\"{}\"", guest.name),
            target: target.to_owned(),
            there: if there.is_empty() { "none".into() } else { there.join(", ") },
        }
    })
}

/// A path that QEMU and libvirt take as it is, in a folder that is there, and nothing at it.
pub(super) fn check_new(path: &Path) -> Result<()> {
    let bad = |why: &str| {
        Err(HypervisorError::NotNow {
            what: format!("{} cannot be a new image's path: {why}", path.display()),
        })
    };
    if !path.is_absolute() {
        return bad("it is not absolute");
    }
    match path.to_str() {
        None => return bad("it is no UTF-8"),
        Some(text) if text.contains([':', ',', '\n']) => {
            return bad(
                "QEMU would misread its colon, comma or line break; choose another folder with --delta-dir",
            );
        }
        Some(_) => {}
    }
    if path.symlink_metadata().is_ok() {
        return bad("there is something already; if an earlier backup was interrupted, run `knibfs recover`");
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return bad("its folder is not there");
    }
    Ok(())
}

/// Whether two paths are the same file, by name or by what they lead to.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    a == b || identity(a).is_some_and(|a| Some(a) == identity(b))
}

/// The device and the inode of what a path leads to; none where there is nothing.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Whether it is a block device.
pub(crate) fn is_block(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}
