//! The image engine's part played by `qemu-img`: an independent engine, so that tests of the hypervisor test nothing else.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use knibfs::hypervisor::{HypervisorError, ImageRef, Images, JobControl, Result};

#[derive(Debug, Clone, Copy, Default)]
pub struct QemuImages;

/// Runs `qemu-img`; its standard output, or its complaint.
pub fn qemu_img(args: &[&str]) -> std::result::Result<String, String> {
    run("qemu-img", args)
}

/// Runs `qemu-io` with one command on an image.
pub fn qemu_io(path: &Path, format: &str, command: &str) {
    let path = path.to_str().unwrap();
    let said = run("qemu-io", &["-f", format, "-c", command, path]).unwrap_or_else(|e| panic!("{e}"));
    assert!(!said.contains("failed"), "{command} on {path}: {said}");
}

/// Whether all of a range has the value `pattern`, seen through the whole chain, also while a QEMU has it open.
pub fn has_pattern(path: &Path, format: &str, pattern: u8, offset: &str, len: &str) -> bool {
    let command = format!("read -P {pattern} {offset} {len}");
    let args = ["-U", "-r", "-f", format, "-c", &command, path.to_str().unwrap()];
    // qemu-io reports a mismatch in words, and by its exit code.
    run("qemu-io", &args).is_ok_and(|said| !said.contains("verification failed"))
}

fn run(program: &str, args: &[&str]) -> std::result::Result<String, String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}; install qemu-utils (scripts/install-deps)"));
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let both = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Err(format!("{program} {args:?}: {both}"))
}

fn engine(doing: &'static str, path: &Path) -> impl FnOnce(String) -> HypervisorError {
    let path = path.to_owned();
    move |why| HypervisorError::Engine { doing, path, why }
}

impl Images for QemuImages {
    fn check_unused(&self, image: &ImageRef) -> Result<()> {
        match qemu_img(&["info", "-f", image.format_name(), image.path.to_str().unwrap()]) {
            Err(who) if who.contains("lock") => Err(HypervisorError::InUse { path: image.path.clone(), who }),
            Err(why) => Err(engine("look at", &image.path)(why)),
            Ok(_) => Ok(()),
        }
    }

    fn create_overlay(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let (name, base) = (path.to_str().unwrap(), backing.path.to_str().unwrap());
        assert!(!path.exists(), "{name} is there");
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", backing.format_name(), name])
            .map(drop)
            .map_err(engine("make an overlay at", path))
    }

    fn commit(
        &self,
        target: &str,
        layers: &[ImageRef],
        base: &ImageRef,
        control: &JobControl<'_>,
    ) -> Result<()> {
        if control.cancel.load(Ordering::Relaxed) {
            return Err(HypervisorError::Cancelled { target: target.to_owned() });
        }
        let top = &layers[0].path;
        qemu_img(&["commit", "-q", "-d", "-b", base.path.to_str().unwrap(), top.to_str().unwrap()])
            .map(drop)
            .map_err(engine("merge", top))
    }

    fn set_backing(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        let base = backing.path.to_str().unwrap();
        qemu_img(&[
            "rebase",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            base,
            "-F",
            backing.format_name(),
            path.to_str().unwrap(),
        ])
        .map(drop)
        .map_err(engine("change the backing file of", path))
    }
}
