//! After each step of a table: every image is sound, the store can be read, the definitions name what is on disk, and
//! nothing is left over but what snapshots show.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::guest::Guest;
use super::lab::Lab;

/// An image that a guest writes to may be seen in the middle of a change; it is sound within this.
const AT_REST: Duration = Duration::from_secs(20);

/// Fails, naming the step, unless all is as it should be: see the parts of this.
pub fn assert_sound(lab: &Lab, guests: &[&Guest], step: &str) {
    let mut used = BTreeSet::new();
    for guest in guests {
        used.extend(definitions_name_what_is_on_disk(guest, step));
        records_name_what_is_live(lab, guest, step);
    }
    used.extend(images_of_snapshots(lab));
    for guest in guests {
        let on_primary: BTreeSet<PathBuf> = images_below(guest.dir(), lab.store()).into_iter().collect();
        for path in on_primary.iter().chain(&used) {
            check_image(path, guest.is_running(), step);
        }
        let strays: Vec<_> =
            on_primary.iter().filter(|p| is_made_by_knibfs(p) && !used.contains(*p)).collect();
        assert_eq!(strays, Vec::<&PathBuf>::new(), "{step}: images that nothing names");
    }
    for image in images_below(lab.store(), Path::new("")) {
        check_image(&image, false, step);
    }
    let checked = lab.command(&["check", "--read-data"]).output().unwrap();
    assert!(checked.status.success(), "{step}: {}", String::from_utf8_lossy(&checked.stderr));
    assert_eq!(lab.ok(&["recover"]), "nothing was interrupted", "{step}");
}

/// The chain of each disk as the files' headers tell it is the one of the running definition, and of the next run's as
/// far as that lists it. All images that are named.
fn definitions_name_what_is_on_disk(guest: &Guest, step: &str) -> BTreeSet<PathBuf> {
    let mut used = BTreeSet::new();
    let next = disks(&guest.persistent_xml());
    let now = if guest.is_running() { disks(&guest.live_xml()) } else { next.clone() };
    for disk in &now {
        let on_disk = chain_on_disk(&disk.images[0], &disk.format, step);
        assert_same_chain(
            &disk.images,
            &on_disk,
            guest.is_running(),
            &format!("{step}: {} now", disk.target),
        );
        if let Some(next) = next.iter().find(|n| n.target == disk.target) {
            assert_same_chain(&next.images, &on_disk, false, &format!("{step}: {} next", disk.target));
        }
        used.extend(on_disk);
    }
    used
}

/// A definition that libvirt has not run yet may list less than there is, but nothing else.
fn assert_same_chain(named: &[PathBuf], on_disk: &[PathBuf], whole: bool, what: &str) {
    let named: Vec<PathBuf> = named.iter().map(|p| real(p)).collect();
    let compared = if whole { on_disk } else { &on_disk[..named.len().min(on_disk.len())] };
    assert_eq!(named, compared, "{what}: the definition and the headers tell of different chains");
}

/// `vm.json` names the image that the guest writes to.
fn records_name_what_is_live(lab: &Lab, guest: &Guest, step: &str) {
    let disks = disks(&guest.persistent_xml());
    for record in records(lab).into_iter().filter(|r| r["id"] == guest.uuid().to_string()) {
        assert_eq!(record["state"], "Ready", "{step}");
        for volume in record["volumes"].as_array().unwrap().iter().filter(|v| v["detached"] != true) {
            let (name, path) = (volume["target"].as_str().unwrap(), volume["path"].as_str().unwrap());
            let Some(disk) = disks.iter().find(|d| d.target == name) else { continue };
            assert_eq!(real(&disk.images[0]), real(Path::new(path)), "{step}: {name} in the record");
        }
    }
}

/// What snapshots that the store knows of stand on.
fn images_of_snapshots(lab: &Lab) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let records = records(lab);
    let list = |of: &Value, key: &str| of[key].as_array().cloned().unwrap_or_default();
    let snapshots = records.iter().flat_map(|r| list(r, "snapshots"));
    for frozen in snapshots.flat_map(|s| list(&s, "volumes")) {
        let (path, format) = (&frozen["image"]["path"], &frozen["image"]["format"]);
        let name = "an image of a snapshot";
        all.extend(chain_on_disk(Path::new(path.as_str().unwrap()), format.as_str().unwrap(), name));
    }
    all
}

fn records(lab: &Lab) -> Vec<Value> {
    let vms = std::fs::read_dir(lab.store().join("vms")).unwrap().map(|e| e.unwrap().path().join("vm.json"));
    vms.filter(|p| p.exists()).map(|p| serde_json::from_slice(&std::fs::read(p).unwrap()).unwrap()).collect()
}

fn is_made_by_knibfs(path: &Path) -> bool {
    path.file_name().unwrap().to_str().unwrap().contains(".knib")
}

/// All qcow2 images below a folder, but those below `except`.
fn images_below(folder: &Path, except: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path == except || path.file_name().is_some_and(|n| n == "state" || n == "mnt") {
            continue;
        }
        if path.is_dir() {
            found.extend(images_below(&path, except));
        } else if path.extension().is_some_and(|e| e == "qcow2") {
            found.push(real(&path));
        }
    }
    found
}

/// `qemu-img check`. In an image that is open, clusters may be allocated of which nothing tells yet.
fn check_image(path: &Path, open: bool, step: &str) {
    if chain_format(path) != "qcow2" || (!open && was_checked(path)) {
        return;
    }
    let end = Instant::now() + AT_REST;
    loop {
        let args = ["check", "-U", "-q", "-f", "qcow2", path.to_str().unwrap()];
        let out = Command::new("qemu-img").args(args).output().unwrap();
        match out.status.code() {
            Some(0) => return,
            Some(3) if open => return,
            _ if open && Instant::now() < end => std::thread::sleep(Duration::from_millis(100)),
            _ => {
                let said = [out.stdout, out.stderr].concat();
                panic!("{step}: {}: {}", path.display(), String::from_utf8_lossy(&said));
            }
        }
    }
}

/// Whether it is as it was when it was asked for last: what is at rest needs no second look after each of many steps.
fn was_checked(path: &Path) -> bool {
    static CHECKED: Mutex<BTreeSet<(u64, u64, i64, i64)>> = Mutex::new(BTreeSet::new());
    let meta = path.metadata().unwrap();
    !CHECKED.lock().unwrap().insert((meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// By its magic: what lies there, whatever it is called.
fn chain_format(path: &Path) -> &'static str {
    use std::io::Read as _;
    let mut magic = Vec::new();
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.take(4).read_to_end(&mut magic).unwrap();
    if magic == *b"QFI\xfb" { "qcow2" } else { "raw" }
}

/// An image and all that it stands on, by the headers of the files, as QEMU reads them.
pub fn chain_on_disk(path: &Path, format: &str, step: &str) -> Vec<PathBuf> {
    let args = ["info", "-U", "--backing-chain", "--output=json", "-f", format, path.to_str().unwrap()];
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{step}: {}: {error}", path.display());
    let all: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
    all.iter().map(|image| real(Path::new(image["filename"].as_str().unwrap()))).collect()
}

/// The images of a guest's disk, live first, as the headers tell them.
pub fn chain(guest: &Guest, target: &str) -> Vec<PathBuf> {
    let xml = if guest.is_running() { guest.live_xml() } else { guest.persistent_xml() };
    let disk = disks(&xml).into_iter().find(|d| d.target == target);
    let disk = disk.unwrap_or_else(|| panic!("there is no disk {target}: {xml}"));
    chain_on_disk(&disk.images[0], &disk.format, target)
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A disk in a definition: its images, the live one first, as far as they are listed.
#[derive(Debug, Clone)]
pub struct Named {
    pub target: String,
    pub format: String,
    pub images: Vec<PathBuf>,
}

/// The disks of a definition that lie in files or block devices.
pub fn disks(xml: &str) -> Vec<Named> {
    let text = roxmltree::Document::parse(xml).unwrap();
    let is_disk = |n: &roxmltree::Node<'_, '_>| {
        n.has_tag_name("disk") && n.attribute("device").is_none_or(|d| d == "disk")
    };
    let mut all = Vec::new();
    for disk in text.descendants().filter(is_disk) {
        let child = |name| disk.children().find(|c| c.has_tag_name(name));
        let mut images = Vec::new();
        let mut layer = Some(disk);
        while let Some(node) = layer {
            let source = node.children().find(|c| c.has_tag_name("source"));
            let path = source.and_then(|s| s.attribute("file").or_else(|| s.attribute("dev")));
            images.extend(path.map(PathBuf::from));
            layer = node.children().find(|c| c.has_tag_name("backingStore"));
        }
        let target = child("target").and_then(|t| t.attribute("dev")).unwrap().to_owned();
        let format = child("driver").and_then(|d| d.attribute("type")).unwrap_or("raw").to_owned();
        if !images.is_empty() {
            all.push(Named { target, format, images });
        }
    }
    all
}
