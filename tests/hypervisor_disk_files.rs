//! Image files that no domain owns: what is done to them, step by step, and what a crash leaves.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "common/qemu_images.rs"]
#[allow(dead_code)]
mod qemu_images;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use knibfs::hypervisor::{
    DiskFiles, Hypervisor, HypervisorError, ImageFormat, ImageRef, Images, JobControl, NewOverlay, Quiesce,
    Result, backing_chain,
};
use knibfs::store::vm::Track;
use qemu_images::{QemuImages, has_pattern, qemu_img, qemu_io};

static GO_ON: AtomicBool = AtomicBool::new(false);
const CONTROL: JobControl<'static> = JobControl { cancel: &GO_ON, progress: &|_| {}, rate_limit: None };

struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new qcow2 image with a pattern.
    fn image(&self, name: &str, pattern: u8) -> PathBuf {
        let path = self.path(name);
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8M"]).unwrap();
        qemu_io(&path, "qcow2", &format!("write -P {pattern} 0 1M"));
        path
    }

    fn on(&self, name: &str, base: &Path, format: &str) -> PathBuf {
        let path = self.path(name);
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            base.to_str().unwrap(),
            "-F",
            format,
            path.to_str().unwrap(),
        ];
        qemu_img(&args).unwrap();
        path
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn new_overlay(&self, target: &str, name: &str) -> NewOverlay {
        NewOverlay { target: target.into(), path: self.path(name) }
    }
}

fn vm(disks: &[(&str, &Path)], track: Track, images: Arc<dyn Images>) -> DiskFiles {
    let disks = disks
        .iter()
        .map(|(name, path)| {
            let image = ImageRef { path: (*path).to_owned(), format: ImageFormat::Qcow2 };
            ((*name).to_owned(), image)
        })
        .collect();
    DiskFiles::new("files", disks, track, images)
}

fn chain(vm: &DiskFiles, target: &str) -> Vec<PathBuf> {
    let guest = vm.inspect().unwrap();
    let volume = guest.volumes.into_iter().find(|v| v.target == target).unwrap();
    volume.chain.into_iter().map(|i| i.path).collect()
}

#[test]
fn an_overlay_takes_the_given_path_and_gives_it_back() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    let vm = vm(&[("root", &path)], Track::Overlay, Arc::new(QemuImages));
    let (f1, f2) = (disks.path("root.1"), disks.path("root.2"));

    let taken = vm.snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No).unwrap();
    assert_eq!(taken.volumes[0].chain.iter().map(|i| &i.path).collect::<Vec<_>>(), [&path, &f1]);
    assert_eq!(chain(&vm, "root"), [path.clone(), f1.clone()]);
    assert_eq!(disks.files(), ["root.1", "root.qcow2"]);
    qemu_io(&path, "qcow2", "write -P 2 1M 1M");

    vm.snapshot(&[disks.new_overlay("root", "root.2")], Quiesce::No).unwrap();
    assert_eq!(chain(&vm, "root"), [path.clone(), f2.clone(), f1.clone()]);
    qemu_io(&path, "qcow2", "write -P 3 2M 1M");

    // The first delta into what it stands on; then the live one, which ends the tracking.
    vm.commit("root", &f2, &f1, &CONTROL).unwrap();
    assert_eq!(chain(&vm, "root"), [path.clone(), f1.clone()]);
    assert!(f2.exists(), "nothing is unlinked");
    assert_eq!(vm.users_of(&f2).unwrap(), []);
    assert_eq!(vm.users_of(&f1).unwrap()[0].depth, 1);
    vm.commit("root", &path, &f1, &CONTROL).unwrap();
    assert_eq!(chain(&vm, "root"), std::slice::from_ref(&path));
    for (pattern, at) in [(1, "0"), (2, "1M"), (3, "2M"), (0, "3M")] {
        assert!(has_pattern(&path, "qcow2", pattern, at, "1M"), "{pattern} at {at}");
    }
}

#[test]
fn a_folder_moved_as_a_whole_still_holds_together() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 7);
    vm(&[("root", &path)], Track::Overlay, Arc::new(QemuImages))
        .snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No)
        .unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("moved");
    std::fs::rename(disks.dir.path(), &moved).unwrap();
    assert!(has_pattern(&moved.join("root.qcow2"), "qcow2", 7, "0", "1M"));
    std::fs::rename(&moved, disks.dir.path()).unwrap();
}

#[test]
fn owner_and_mode_stay() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    vm(&[("root", &path)], Track::Overlay, Arc::new(QemuImages))
        .snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No)
        .unwrap();
    let (new, old) = (path.metadata().unwrap(), disks.path("root.1").metadata().unwrap());
    assert_eq!(new.mode(), old.mode());
    assert_eq!((new.uid(), new.gid()), (old.uid(), old.gid()));
}

#[test]
fn scan_touches_nothing() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    let vm = vm(&[("root", &path)], Track::Scan, Arc::new(QemuImages));
    assert_eq!(vm.snapshot(&[], Quiesce::No).unwrap().volumes, []);
    let error = vm.snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No).unwrap_err();
    assert!(error.to_string().contains("tracked by scan"), "{error}");
    assert_eq!(disks.files(), ["root.qcow2"]);
}

#[test]
fn what_cannot_take_an_overlay_is_left_alone() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    let link = disks.path("link.qcow2");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let images: Arc<dyn Images> = Arc::new(QemuImages);
    let linked = vm(&[("root", &link)], Track::Overlay, images.clone());
    let error = linked.snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");

    let vm = vm(&[("root", &path)], Track::Overlay, images);
    let elsewhere = tempfile::tempdir().unwrap();
    let away = NewOverlay { target: "root".into(), path: elsewhere.path().join("root.1") };
    assert!(vm.snapshot(&[away], Quiesce::No).unwrap_err().to_string().contains("within its folder"));
    assert!(matches!(
        vm.snapshot(&[disks.new_overlay("root", "root.qcow2")], Quiesce::No),
        Err(HypervisorError::NotNow { .. })
    ));
    assert!(vm.agent_ping(Duration::from_secs(1)).is_err());
    assert_eq!(disks.files(), ["link.qcow2", "root.qcow2"]);
}

/// Fails to make the overlay of one disk.
struct FailsAt(&'static str);

impl Images for FailsAt {
    fn check_unused(&self, image: &ImageRef) -> Result<()> {
        QemuImages.check_unused(image)
    }
    fn create_overlay(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        if path.to_str().unwrap().contains(self.0) {
            let why = "the disk is full".into();
            return Err(HypervisorError::Engine { doing: "write", path: path.to_owned(), why });
        }
        QemuImages.create_overlay(path, backing)
    }
    fn commit(
        &self,
        target: &str,
        layers: &[ImageRef],
        base: &ImageRef,
        control: &JobControl<'_>,
    ) -> Result<()> {
        QemuImages.commit(target, layers, base, control)
    }
    fn set_backing(&self, path: &Path, backing: &ImageRef) -> Result<()> {
        QemuImages.set_backing(path, backing)
    }
}

#[test]
fn when_one_of_several_disks_fails_none_is_changed() {
    let disks = Disks::new();
    let (a, b) = (disks.image("a.qcow2", 1), disks.image("b.qcow2", 2));
    let vm = vm(&[("a", &a), ("b", &b)], Track::Overlay, Arc::new(FailsAt("b.qcow2")));
    let new = [disks.new_overlay("a", "a.1"), disks.new_overlay("b", "b.1")];
    assert!(vm.snapshot(&new, Quiesce::No).is_err());
    assert_eq!(disks.files(), ["a.qcow2", "b.qcow2"]);
    assert!(has_pattern(&a, "qcow2", 1, "0", "1M"));
}

#[test]
fn an_image_in_use_is_refused() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    let vm = vm(&[("root", &path)], Track::Overlay, Arc::new(QemuImages));
    // A qemu-io that waits for commands holds QEMU's locks.
    let mut holder = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    {
        use std::io::{Read as _, Write as _};
        // It answers once it has the image open.
        holder.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = [0; 16];
        assert!(holder.stdout.as_mut().unwrap().read(&mut answer).unwrap() > 0);
    }
    let refused = vm.snapshot(&[disks.new_overlay("root", "root.1")], Quiesce::No);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(matches!(refused, Err(HypervisorError::InUse { .. })), "{refused:?}");
    assert_eq!(disks.files(), ["root.qcow2"]);
}

#[test]
fn what_an_interrupted_snapshot_prepared_is_removed_and_a_finished_one_is_kept() {
    let disks = Disks::new();
    let path = disks.image("root.qcow2", 1);
    let vm = vm(&[("root", &path)], Track::Overlay, Arc::new(QemuImages));
    let new = [disks.new_overlay("root", "root.1")];
    // As a crash before the swap leaves it: two names, and an overlay under a third.
    std::fs::hard_link(&path, &new[0].path).unwrap();
    std::fs::write(disks.path("root.qcow2.knib-new"), b"half an overlay").unwrap();
    vm.undo_interrupted(&new).unwrap();
    assert_eq!(disks.files(), ["root.qcow2"]);
    assert!(has_pattern(&path, "qcow2", 1, "0", "1M"));

    vm.snapshot(&new, Quiesce::No).unwrap();
    vm.undo_interrupted(&new).unwrap();
    assert_eq!(disks.files(), ["root.1", "root.qcow2"]);
    assert!(has_pattern(&path, "qcow2", 1, "0", "1M"));
}

#[test]
fn chains_are_followed_by_their_headers() {
    let disks = Disks::new();
    let raw = disks.path("base.raw");
    qemu_img(&["create", "-q", "-f", "raw", raw.to_str().unwrap(), "8M"]).unwrap();
    let middle = disks.on("middle", &raw, "raw");
    // Relative names start at the image's own folder.
    let top = disks.on("top", Path::new("middle"), "qcow2");
    let found = backing_chain(&top, ImageFormat::Qcow2).unwrap();
    let found: Vec<_> = found.iter().map(|i| (i.path.clone(), i.format)).collect();
    let (q, r) = (ImageFormat::Qcow2, ImageFormat::Raw);
    assert_eq!(found, [(top.clone(), q), (middle.clone(), q), (raw.clone(), r)]);
    // An older version of the format has no length in its header.
    let old = disks.path("old");
    qemu_img(&[
        "convert",
        "-O",
        "qcow2",
        "-o",
        "compat=0.10",
        "-B",
        "middle",
        "-F",
        "qcow2",
        top.to_str().unwrap(),
        old.to_str().unwrap(),
    ])
    .unwrap();
    assert_eq!(backing_chain(&old, q).unwrap()[1].path, middle);
}

#[test]
fn chains_that_cannot_be_trusted_are_refused() {
    let disks = Disks::new();
    let base = disks.image("base", 1);
    let q = ImageFormat::Qcow2;
    let says = |path: &Path| backing_chain(path, q).unwrap_err().to_string();

    let rebase = |path: &Path, to: &str, format: &[&str]| {
        let mut args = vec!["rebase", "-q", "-u", "-f", "qcow2", "-b", to];
        args.extend(format);
        args.push(path.to_str().unwrap());
        qemu_img(&args)
    };
    let top = disks.on("top", &base, "qcow2");
    rebase(&base, top.to_str().unwrap(), &["-F", "qcow2"]).unwrap();
    assert!(says(&top).contains("loop"), "{}", says(&top));

    rebase(&base, "nbd:localhost:1", &["-F", "raw"]).unwrap();
    assert!(says(&top).contains("no plain path"), "{}", says(&top));

    rebase(&base, "json:{}", &["-F", "raw"]).unwrap();
    assert!(says(&top).contains("no plain path"), "{}", says(&top));

    rebase(&base, "gone", &["-F", "raw"]).unwrap();
    assert!(says(&top).contains("gone"), "{}", says(&top));

    rebase(&base, "other", &["-F", "vmdk"]).unwrap();
    assert!(says(&top).contains("vmdk"), "{}", says(&top));

    std::fs::write(&base, b"no image").unwrap();
    assert!(says(&top).contains("as a qcow2 file does"), "{}", says(&top));

    // Every cut of a header is a sentence, never a crash.
    let whole = std::fs::read(disks.on("cut", &disks.image("under", 1), "qcow2")).unwrap();
    for len in 0..600 {
        let cut = disks.path("cut");
        std::fs::write(&cut, &whole[..len]).unwrap();
        let _ = backing_chain(&cut, q);
    }
    // Every byte of it flipped, too.
    for at in 0..600 {
        let mut bytes = whole[..4096].to_vec();
        bytes[at] ^= 0xff;
        let bent = disks.path("cut");
        std::fs::write(&bent, &bytes).unwrap();
        let _ = backing_chain(&bent, q);
    }
}
