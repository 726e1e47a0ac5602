//! The image engine for volumes that no QEMU has open. The engine takes QEMU's locks on what it writes.

use std::path::Path;

use knib_qcow::{Chain, Control, FileStorage, Format, NewImage, PlainPaths};

use super::loop_devices;
use crate::hypervisor::{HypervisorError, ImageFormat, ImageRef, Images, JobControl, JobProgress, Result};
use crate::store::atomic;

/// Cluster size of new overlays, as QEMU's: 64 KiB.
const CLUSTER_BITS: u32 = 16;

/// The workspace's own engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineImages;

impl Images for EngineImages {
    fn check_unused(&self, image: &ImageRef) -> Result<()> {
        let doing = "look for locks on";
        knib_qcow::check_unused(&image.path).map_err(engine(doing, &image.path))?;
        let failed = |e: std::io::Error| HypervisorError::Engine {
            doing,
            path: image.path.clone(),
            why: e.to_string(),
        };
        let Some(device) = loop_devices::writer_of(&image.path).map_err(failed)? else { return Ok(()) };
        let device = device.display();
        let who = format!("through {device}, which `losetup -d {device}` detaches when nothing uses it");
        Err(HypervisorError::InUse { path: image.path.clone(), who })
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

fn engine(doing: &'static str, path: &Path) -> impl FnOnce(knib_qcow::Error) -> HypervisorError {
    let path = path.to_owned();
    move |error| match error {
        knib_qcow::Error::InUse { path, what } => HypervisorError::InUse { path, who: what },
        other => HypervisorError::Engine { doing, path, why: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::AtomicBool;

    use knib_qcow::Access;

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
        let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
        std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
        let below = image(&base, ImageFormat::Raw);
        EngineImages.create_overlay(&top, &below).unwrap();
        let commit = || {
            let control = JobControl { cancel: &AtomicBool::new(false), progress: &|_| {}, rate_limit: None };
            EngineImages.commit("vda", &[image(&top, ImageFormat::Qcow2)], &below, &control)
        };
        let in_use = |result: Result<()>| assert!(matches!(result, Err(HypervisorError::InUse { .. })));
        for (path, unused) in [(&base, &below), (&top, &image(&top, ImageFormat::Qcow2))] {
            let held = FileStorage::open(path, Access::ReadWrite).unwrap();
            in_use(EngineImages.check_unused(unused));
            in_use(commit());
            drop(held);
            EngineImages.check_unused(unused).unwrap();
        }
        let held = FileStorage::open(&top, Access::ReadWrite).unwrap();
        in_use(EngineImages.set_backing(&top, &below));
        drop(held);
        commit().unwrap();
    }
}
