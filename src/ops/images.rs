//! The engine behind the hypervisor's wishes: overlays and merges of images that no QEMU has open.

use std::path::Path;
use std::sync::atomic::Ordering;

use knib_qcow::{Access, Chain, Control, Error, FileStorage, Format, NewImage, PlainPaths};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::hypervisor::{HypervisorError, ImageFormat, ImageRef, Images, JobControl, JobProgress, Result};

/// Byte on which a QEMU that may write an image holds a lock. Source: QEMU's block/file-posix.c, `RAW_LOCK_PERM_BASE`.
const WRITER: i64 = 101;

/// The engine of this program.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineImages;

fn format(image: &ImageRef) -> Format {
    match image.format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

fn engine(doing: &'static str, path: &Path) -> impl FnOnce(Error) -> HypervisorError {
    let path = path.to_owned();
    move |why| HypervisorError::Engine { doing, path, why: why.to_string() }
}

impl Images for EngineImages {
    fn check_unused(&self, image: &ImageRef) -> Result<()> {
        let path = &image.path;
        let file = FileStorage::open(path, Access::Read).map_err(engine("look at", path))?;
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: WRITER,
            l_len: 1,
            l_pid: 0,
        };
        // Where a file system knows no locks, nobody can hold one.
        if fcntl(file.file(), FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && lock.l_type != libc::F_UNLCK as i16
        {
            let who = "another process, a running VM perhaps, has it open for writing".to_owned();
            return Err(HypervisorError::InUse { path: path.clone(), who });
        }
        Ok(())
    }

    fn create_overlay(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let failed = "make an overlay at";
        let name = backing.path.to_string_lossy().into_owned();
        let below = path.parent().unwrap_or_else(|| Path::new("/")).join(&backing.path);
        let size = Chain::open(&below, format(backing), &PlainPaths).map_err(engine("read", &below))?.size();
        let new =
            NewImage { size, cluster_bits: 16, compression: None, backing: Some((name, format(backing))) };
        let made = FileStorage::create_new(path)
            .and_then(|file| knib_qcow::create(file.clone(), &new).map(|()| file))
            .and_then(|file| file.file().sync_all().map_err(|e| Error::io(path, "flushing", e)));
        made.map_err(engine(failed, path))
    }

    fn commit(
        &self,
        target: &str,
        layers: &[ImageRef],
        base: &ImageRef,
        control: &JobControl<'_>,
    ) -> Result<()> {
        // The lowest first: what lies above it then overwrites what it brought down.
        for layer in layers.iter().rev() {
            let progress = |done| (control.progress)(JobProgress { done, total: 0 });
            let engine_control = Control {
                threads: 1,
                rate_limit: control.rate_limit,
                cancel: control.cancel,
                progress: &progress,
            };
            if control.cancel.load(Ordering::Relaxed) {
                return Err(HypervisorError::Cancelled { target: target.to_owned() });
            }
            knib_qcow::commit(&layer.path, &base.path, format(base), &engine_control).map_err(
                |e| match e {
                    Error::Cancelled => HypervisorError::Cancelled { target: target.to_owned() },
                    e => engine("merge", &layer.path)(e),
                },
            )?;
        }
        Ok(())
    }

    fn set_backing(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let name = backing.path.to_string_lossy();
        knib_qcow::set_backing(path, Some(&name), Some(format(backing)))
            .map_err(engine("change the backing file of", path))
    }
}
