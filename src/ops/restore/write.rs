//! Writing a disk of a backup to primary, every byte of it verified.

use std::path::Path;
use std::sync::atomic::Ordering;

use knib_qcow::{
    Access, Control, FileStorage, Format, Locking, NewImage, NoObserver, Storage as _, write_image, write_raw,
};

use super::RestoreError;
use crate::ops::control::{Event, OpControl};
use crate::ops::disk_source::DiskSource;
use crate::store::atomic;
use crate::store::manifest::ImageFormat;
use crate::store::restore_op::RestoreDisk;

/// Cluster size of new images, as QEMU's: 64 KiB.
const CLUSTER_BITS: u32 = 16;
/// A device is cleared in parts of so many bytes, so that a stop is noticed.
const CLEAR: u64 = 1 << 30;

/// Writes a new image, or overwrites a block device; durable when it returns.
pub(super) fn whole(
    source: &DiskSource,
    disk: &RestoreDisk,
    rate: Option<u64>,
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    let path = if disk.in_place { &disk.path } else { &disk.fresh };
    let failed = |e| RestoreError::write(path, e);
    let what = format!("restoring {}", disk.from);
    (control.progress)(Event::Begin { what: what.clone(), total: source.size() });
    let progress = |done| (control.progress)(Event::Advance { what: what.clone(), done });
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(16);
    let how = Control { threads, rate_limit: rate, cancel: control.cancel, progress: &progress };
    let dest = if disk.in_place {
        let device = FileStorage::open_with(path, Access::ReadWrite, Locking::Writer).map_err(failed)?;
        clear(&device, control)?;
        device
    } else {
        // What an earlier attempt left.
        atomic::remove(path)?;
        let file = FileStorage::create_new(path).map_err(failed)?;
        set_access(path, disk)?;
        file
    };
    match disk.format {
        ImageFormat::Raw => write_raw(dest.clone(), disk.size, source, &how).map(drop),
        ImageFormat::Qcow2 => {
            let new =
                NewImage { size: disk.size, cluster_bits: CLUSTER_BITS, compression: None, backing: None };
            write_image(dest.clone(), &new, source, &NoObserver, &how).map(drop)
        }
    }
    .and_then(|()| dest.sync().map_err(|e| knib_qcow::Error::io(path, "syncing", e)))
    .map_err(failed)?;
    if !disk.in_place {
        atomic::sync_parent(path)?;
    }
    (control.progress)(Event::End { what });
    Ok(())
}

/// Makes an empty image that shows `below`, a raw image.
pub(super) fn overlay(disk: &RestoreDisk, below: &Path) -> Result<(), RestoreError> {
    let path = &disk.fresh;
    let failed = |e| RestoreError::write(path, e);
    let name = below.to_str().ok_or_else(|| {
        RestoreError::cannot(
            &disk.from,
            format!("{} is no UTF-8, which a header cannot hold", below.display()),
        )
    })?;
    let new = NewImage {
        size: disk.size,
        cluster_bits: CLUSTER_BITS,
        compression: None,
        backing: Some((name.to_owned(), Format::Raw)),
    };
    atomic::remove(path)?;
    let file = FileStorage::create_new(path).map_err(failed)?;
    set_access(path, disk)?;
    knib_qcow::create(file, &new).map_err(failed)?;
    Ok(atomic::sync_parent(path)?)
}

fn clear(device: &FileStorage, control: &OpControl<'_>) -> Result<(), RestoreError> {
    let io = |e| RestoreError::write(device.path(), knib_qcow::Error::io(device.path(), "clearing", e));
    let size = device.len().map_err(io)?;
    let mut at = 0;
    while at < size {
        if control.cancel.load(Ordering::Relaxed) {
            return Err(RestoreError::Cancelled);
        }
        device.punch(at, CLEAR.min(size - at)).map_err(io)?;
        at += CLEAR.min(size - at);
    }
    Ok(())
}

/// As the image that it replaces; a new one is its owner's only.
fn set_access(path: &Path, disk: &RestoreDisk) -> Result<(), RestoreError> {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    let (uid, gid, mode) = disk.access.map_or((None, None, 0o600), |(u, g, m)| (Some(u), Some(g), m));
    let set = chown(path, uid, gid)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o7777)));
    Ok(set.map_err(crate::store::StoreError::io("set the owner of", path))?)
}
