//! The image engine for volumes that no QEMU has open, with QEMU's locks around what is written.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use knib_qcow::{Chain, Control, FileStorage, Format, NewImage, PlainPaths};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::hypervisor::{HypervisorError, ImageFormat, ImageRef, Images, JobControl, JobProgress, Result};
use crate::store::atomic;

/// Cluster size of new overlays, as QEMU's: 64 KiB.
const CLUSTER_BITS: u32 = 16;

/// The workspace's own engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineImages;

impl Images for EngineImages {
    fn check_unused(&self, image: &ImageRef) -> Result<()> {
        let file = File::open(&image.path).map_err(io("open", &image.path))?;
        // Whoever may write or resize it.
        for permission in [WRITE, RESIZE] {
            refuse_if_held(&file, &image.path, IN_USE + permission)?;
        }
        Ok(())
    }

    fn create_overlay(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let below = folder.join(&backing.path);
        let doing = "make an overlay at";
        let size = Chain::open(&below, format(backing.format), &PlainPaths)
            .map_err(engine("look at", &below))?
            .size();
        let name = text(&backing.path)?;
        let new = NewImage {
            size,
            cluster_bits: CLUSTER_BITS,
            compression: None,
            backing: Some((name.to_owned(), format(backing.format))),
        };
        let file = FileStorage::create_new(path).map_err(engine(doing, path))?;
        let made = knib_qcow::create(file, &new).map_err(engine(doing, path)).and_then(|()| {
            atomic::sync_parent(path).map_err(|e| HypervisorError::Engine {
                doing,
                path: path.to_owned(),
                why: e.to_string(),
            })
        });
        if made.is_err() {
            // Nothing stands on it yet, and a later attempt must find the name free.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn commit(
        &self,
        target: &str,
        layers: &[ImageRef],
        base: &ImageRef,
        control: &JobControl<'_>,
    ) -> Result<()> {
        let Some(top) = layers.first() else { return Ok(()) };
        let _locks = layers
            .iter()
            .map(|layer| lock(&layer.path, false))
            .chain([lock(&base.path, true)])
            .collect::<Result<Vec<_>>>()?;
        let chain =
            Chain::open(&top.path, format(top.format), &PlainPaths).map_err(engine("merge", &top.path))?;
        let total = chain.size();
        drop(chain);
        let progress = |done: u64| (control.progress)(JobProgress { done: done.min(total), total });
        let control = Control {
            threads: 1,
            rate_limit: control.rate_limit,
            cancel: control.cancel,
            progress: &progress,
        };
        knib_qcow::commit(&top.path, &base.path, format(base.format), &control).map_err(|e| match e {
            knib_qcow::Error::Cancelled => HypervisorError::Cancelled { target: target.to_owned() },
            other => engine("merge", &top.path)(other),
        })
    }

    fn set_backing(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let _lock = lock(path, true)?;
        knib_qcow::set_backing(path, Some(text(&backing.path)?), Some(format(backing.format)))
            .map_err(engine("change the backing file of", path))
    }
}

/// The engine's word for a format.
pub fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| HypervisorError::Header {
        path: path.to_owned(),
        what: "its path is no UTF-8, which a header cannot hold".into(),
    })
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> HypervisorError {
    let path = path.to_owned();
    move |source| HypervisorError::Io { doing, path, source }
}

fn engine(doing: &'static str, path: &Path) -> impl FnOnce(knib_qcow::Error) -> HypervisorError {
    let path = path.to_owned();
    move |error| match error {
        knib_qcow::Error::InUse { path, what } => HypervisorError::InUse { path, who: what },
        other => HypervisorError::Engine { doing, path, why: other.to_string() },
    }
}

// QEMU's block/file-posix.c: a permission in use is a shared lock on byte 100 + its bit, one that is not shared with
// others a shared lock on byte 200 + its bit.
const IN_USE: i64 = 100;
const NOT_SHARED: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// QEMU's locks on an image, given back when dropped.
#[derive(Debug)]
struct ImageLock {
    _file: File,
}

/// Takes QEMU's locks for reading, or for writing, with no one else writing meanwhile.
fn lock(path: &Path, write: bool) -> Result<ImageLock> {
    let file = OpenOptions::new().read(true).open(path).map_err(io("open", path))?;
    let used: &[i64] = if write { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    // First the own locks, then the look for others': two that begin at once both see each other.
    for byte in used.iter().map(|p| IN_USE + p).chain([NOT_SHARED + WRITE, NOT_SHARED + RESIZE]) {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK as libc::c_short, byte))) {
            Ok(_) => {}
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => return Err(in_use(path)),
            Err(e) => return Err(io("lock", path)(e.into())),
        }
    }
    for permission in [WRITE, RESIZE] {
        refuse_if_held(&file, path, IN_USE + permission)?;
    }
    for permission in used {
        refuse_if_held(&file, path, NOT_SHARED + permission)?;
    }
    Ok(ImageLock { _file: file })
}

fn refuse_if_held(file: &File, path: &Path, byte: i64) -> Result<()> {
    let mut asked = byte_lock(libc::F_WRLCK as libc::c_short, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)).map_err(|e| io("look for locks on", path)(e.into()))?;
    if asked.l_type == libc::F_UNLCK as libc::c_short { Ok(()) } else { Err(in_use(path)) }
}

fn byte_lock(kind: libc::c_short, byte: i64) -> libc::flock {
    libc::flock { l_type: kind, l_whence: libc::SEEK_SET as libc::c_short, l_start: byte, l_len: 1, l_pid: 0 }
}

fn in_use(path: &Path) -> HypervisorError {
    HypervisorError::InUse {
        path: PathBuf::from(path),
        who: "another process holds QEMU's lock on it".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn qemu(program: &str, arguments: &[&str]) {
        let said = Command::new(program).args(arguments).output().expect("install qemu-utils");
        assert!(said.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
    }

    fn image(path: &Path, format: ImageFormat) -> ImageRef {
        ImageRef { path: path.into(), format }
    }

    #[test]
    fn an_overlay_is_made_filled_and_merged_down() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
        let (base_text, top_text) = (base.to_str().unwrap(), top.to_str().unwrap());
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", base_text, "8M"]);
        qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", base_text]);
        let below = image(&base, ImageFormat::Qcow2);
        EngineImages.create_overlay(&top, &below).unwrap();
        assert!(EngineImages.create_overlay(&top, &below).is_err(), "it is there");
        qemu("qemu-img", &["compare", "-q", base_text, top_text]);
        qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 2 512k 3M", top_text]);
        let whole = dir.path().join("whole.raw");
        qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", top_text, whole.to_str().unwrap()]);
        let cancel = AtomicBool::new(false);
        let control = JobControl { cancel: &cancel, progress: &|_| {}, rate_limit: None };
        for _ in 0..2 {
            let layers = [image(&top, ImageFormat::Qcow2)];
            EngineImages.commit("vda", &layers, &below, &control).unwrap();
            qemu("qemu-img", &["check", "-q", base_text]);
            qemu("qemu-img", &["compare", "-q", base_text, whole.to_str().unwrap()]);
        }
        let moved = dir.path().join("moved.qcow2");
        std::fs::rename(&base, &moved).unwrap();
        EngineImages.set_backing(&top, &image(Path::new("moved.qcow2"), ImageFormat::Qcow2)).unwrap();
        qemu("qemu-img", &["compare", "-q", top_text, whole.to_str().unwrap()]);
    }

    #[test]
    fn an_image_that_someone_writes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let found = image(&path, ImageFormat::Raw);
        EngineImages.check_unused(&found).unwrap();
        let held = lock(&path, true).unwrap();
        assert!(matches!(EngineImages.check_unused(&found), Err(HypervisorError::InUse { .. })));
        assert!(lock(&path, false).is_err(), "a writer shares with no reader");
        drop(held);
        let reading = lock(&path, false).unwrap();
        EngineImages.check_unused(&found).unwrap();
        assert!(lock(&path, true).is_err(), "a reader's backing file must not change");
        drop((lock(&path, false).unwrap(), reading));
        lock(&path, true).unwrap();
    }
}
