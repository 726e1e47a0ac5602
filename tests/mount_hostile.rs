//! A store that someone else has been at: names, manifests and files that no knibfs wrote, and damage at every place. The mount
//! lives, says what is wrong, and never gives away another file's bytes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use knibfs::store::{BackupId, Manifest};
use mounted_store::{CLUSTER, Fixture, Layer, Shape};
use serde_json::{Value, json};

const SIZE: u64 = 24 * CLUSTER;
/// What must never come out of the mount.
const ELSEWHERE: &[u8] = b"another file's bytes, which nobody asked for";

fn layers() -> [Layer; 3] {
    let full: Layer =
        (0..20).map(|n| (n, if n % 2 == 0 { Shape::Plain } else { Shape::Compressed })).collect();
    [full, [(1, Shape::Plain), (2, Shape::Zero)].into(), [(3, Shape::Compressed)].into()]
}

fn pipe(path: &Path) {
    let mode = rustix::fs::Mode::from_bits_truncate(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

fn device(path: &Path) {
    let mode = rustix::fs::Mode::from_bits_truncate(0o600);
    let zero = rustix::fs::makedev(1, 5);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::CharacterDevice, mode, zero).unwrap();
}

/// Every file that can be read below a folder, links not followed. What cannot is an error that a person can look up.
fn all_files(dir: &Path, found: &mut Vec<(PathBuf, io::Result<Vec<u8>>)>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => all_files(&entry.path(), found),
            kind if kind.is_file() => found.push((entry.path(), fs::read(entry.path()))),
            _ => {}
        }
    }
}

/// The first backup is as it was, and nothing of `ELSEWHERE` is to be seen anywhere.
fn assert_harmless(f: &Fixture, what: &str) {
    let mut found = Vec::new();
    all_files(&f.mnt().join("vms"), &mut found);
    for (path, read) in found {
        match read {
            Ok(bytes) => assert!(
                !bytes.windows(ELSEWHERE.len()).any(|w| w == ELSEWHERE),
                "{what}: {} shows what lies elsewhere",
                path.display()
            ),
            Err(e) => {
                assert!(matches!(e.raw_os_error(), Some(5 | 13 | 116)), "{what}: {}: {e}", path.display())
            }
        }
    }
    assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize), "{what}");
}

fn damage(f: &Fixture) -> String {
    fs::read_to_string(f.mnt().join(".knibfs/damage")).unwrap()
}

#[test]
fn names_that_cannot_be_ours_are_not_shown() {
    let f = Fixture::chain(SIZE, true, &layers());
    let outside = f.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    for file in ["domain.xml", "vm.json", "manifest.json", "nvram.fd"] {
        fs::write(outside.join(file), ELSEWHERE).unwrap();
    }
    let (vms, vm) = (f.store.vms_dir(), f.store.vm_dir(&f.vm.name));
    let names: [&[u8]; 12] = [
        b"...",
        b".hidden",
        b"-rf",
        b"a\nb",
        b"\xff\xfe",
        b"a:b",
        b"a,b",
        b"a\\b",
        b" x",
        b"\x1b[31m",
        &[b'x'; 255],
        "\u{202e}gpj".as_bytes(),
    ];
    for name in names {
        for folder in [&vms, &vm] {
            let dir = folder.join(OsStr::from_bytes(name));
            fs::create_dir(&dir).unwrap();
            fs::copy(f.store.vm_path(&f.vm.name), dir.join("vm.json")).unwrap();
            fs::write(dir.join("manifest.json"), ELSEWHERE).unwrap();
        }
    }
    // Links to folders elsewhere, where a VM and a backup could be.
    symlink(&outside, vms.join("linked")).unwrap();
    symlink(&outside, vm.join("2027-01-01T00-00-00Z")).unwrap();
    pipe(&vms.join("pipe"));
    pipe(&vm.join("2027-01-02T00-00-00Z"));
    fs::write(vms.join("file"), ELSEWHERE).unwrap();
    let _mount = f.mount(&[]);
    let listed = |dir: &str| -> Vec<_> {
        let names = fs::read_dir(f.mnt().join(dir)).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    // The one name among them that may be a VM's is one that can be read: it has a right-to-left mark, no control character.
    assert_eq!(listed("vms"), ["web1", "\u{202e}gpj"]);
    assert_eq!(listed("vms/web1").len(), 4);
    assert_eq!(listed("by-id").len(), 3);
    for name in names.iter().filter(|n| !n.starts_with("\u{202e}".as_bytes())) {
        assert!(!f.mnt().join("vms").join(OsStr::from_bytes(name)).exists());
        assert!(!f.mnt().join("vms/web1").join(OsStr::from_bytes(name)).exists());
    }
    for path in [
        "vms/linked",
        "vms/pipe",
        "vms/file",
        "vms/web1/2027-01-01T00-00-00Z",
        "vms/web1/2027-01-02T00-00-00Z",
    ] {
        assert!(!f.mnt().join(path).exists(), "{path}");
    }
    assert_harmless(&f, "names");
}

/// A manifest as someone would forge it: changed, and sealed as a real one is.
fn forge(f: &Fixture, of: usize, change: impl FnOnce(&mut Value)) {
    let path = f.store.manifest_path(&f.vm.name, &f.backups[of].name);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let object = value.as_object_mut().unwrap();
    object.remove("checksum");
    change(&mut value);
    let checksum = blake3::hash(canonical(&value).as_bytes()).to_hex()[..32].to_owned();
    value["checksum"] = checksum.into();
    fs::write(&path, value.to_string()).unwrap();
}

/// docs/FORMAT.md: keys sorted, no white space, a comma behind each.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            let all =
                entries.into_iter().map(|(k, v)| format!("{}:{},", Value::from(k.as_str()), canonical(v)));
            format!("{{{}}}", all.collect::<String>())
        }
        Value::Array(all) => format!("[{}]", all.iter().map(|v| canonical(v) + ",").collect::<String>()),
        scalar => scalar.to_string(),
    }
}

#[test]
fn a_forged_manifest_is_read_as_one_so_that_the_next_test_is_not_about_its_seal() {
    let f = Fixture::chain(SIZE, true, &layers());
    forge(&f, 1, |m| m["knibfs_version"] = json!("forged"));
    let found: Manifest = f.store.manifest(&f.vm.name, &f.backups[1].name).unwrap();
    assert_eq!(found.knibfs_version, "forged");
}

#[test]
fn a_forged_manifest_shows_nothing_of_others_and_what_does_not_stand_on_it_reads_on() {
    type Forgery = (&'static str, fn(&mut Value));
    let forgeries: [Forgery; 30] = [
        ("name ..", |m| m["name"] = json!("..")),
        ("name with a slash", |m| m["name"] = json!("../x")),
        ("VM ..", |m| m["vm"] = json!("..")),
        ("another VM", |m| m["vm"] = json!("web2")),
        ("parent ..", |m| m["parent"]["name"] = json!("..")),
        ("parent with a slash", |m| m["parent"]["name"] = json!("../../../outside")),
        ("parent with NUL", |m| m["parent"]["name"] = json!("a\0b")),
        ("parent with a newline", |m| m["parent"]["name"] = json!("a\nb")),
        ("a long parent", |m| m["parent"]["name"] = json!("x".repeat(5000))),
        ("parent that is not there", |m| m["parent"]["name"] = json!("2020-01-01T00-00-00Z")),
        ("parent of another id", |m| m["parent"]["id"] = json!(BackupId::random().to_string())),
        ("itself as parent", |m| m["parent"]["name"] = m["name"].clone()),
        ("no parent", |m| m["parent"] = Value::Null),
        ("disk ..", |m| m["disks"][0]["name"] = json!("..")),
        ("disk with a slash", |m| m["disks"][0]["name"] = json!("../../../../outside/domain")),
        ("disk with NUL", |m| m["disks"][0]["name"] = json!("a\0b")),
        ("the disk twice", |m| {
            let disk = m["disks"][0].clone();
            m["disks"].as_array_mut().unwrap().push(disk);
        }),
        ("no disks", |m| m["disks"] = json!([])),
        ("a huge disk", |m| m["disks"][0]["virtual_size"] = json!(u64::MAX)),
        ("a disk as large as can be", |m| m["disks"][0]["virtual_size"] = json!(i64::MAX)),
        ("a negative size", |m| m["disks"][0]["virtual_size"] = json!(-1)),
        ("a fractional size", |m| m["disks"][0]["file_size"] = json!(1.5)),
        ("a huge file", |m| m["disks"][0]["file_size"] = json!(i64::MAX)),
        ("clusters of no size", |m| m["disks"][0]["cluster_size"] = json!(0)),
        ("huge clusters", |m| m["disks"][0]["cluster_size"] = json!(u64::MAX)),
        ("many clusters", |m| m["disks"][0]["data_clusters"] = json!(u64::MAX)),
        ("depth 0", |m| m["disks"][0]["depth"] = json!(0)),
        ("full with a parent's data", |m| {
            m["disks"][0]["kind"] = json!("full");
            m["disks"][0]["depth"] = json!(1);
        }),
        ("no digest", |m| m["disks"][0]["sums_digest"] = json!("")),
        ("a time before all times", |m| m["taken"] = json!("-009999-01-02T01:59:59Z")),
    ];
    let f = Fixture::chain(SIZE, true, &layers());
    let outside = f.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    for file in ["domain.qcow2", "domain.sums", "domain.xml"] {
        fs::write(outside.join(file), ELSEWHERE).unwrap();
    }
    let path = f.store.manifest_path(&f.vm.name, &f.backups[1].name);
    let good = fs::read(&path).unwrap();
    let _mount = f.mount(&[]);
    for (what, forgery) in forgeries {
        forge(&f, 1, forgery);
        assert_harmless(&f, what);
        // What stands on it is right or an error, and never anything else.
        for of in [1, 2] {
            match fs::read(f.in_mount(of, "root.raw")) {
                Ok(bytes) => {
                    assert!(bytes == f.expected(of, 0, SIZE as usize), "{what}: wrong bytes of {of}")
                }
                Err(e) => assert!(
                    matches!(e.raw_os_error(), Some(2 | 5 | 116))
                        && (of == 2 || e.raw_os_error() != Some(116)),
                    "{what}: {e} of {of}"
                ),
            }
        }
        fs::write(&path, &good).unwrap();
    }
    assert!(damage(&f).contains("manifest.json"), "it says what is wrong: {}", damage(&f));
    while fs::read(f.in_mount(2, "root.raw")).is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn loops_of_parents_and_manifests_without_an_end_are_damage() {
    let f = Fixture::chain(SIZE, true, &layers());
    // 1 stands on 2, which stands on 1.
    let (id, name) = (f.backups[2].id.to_string(), f.backups[2].name.to_string());
    forge(&f, 1, |m| {
        m["parent"] = json!({"id": id, "name": name});
    });
    let _mount = f.mount(&["--cache-size", "16M"]);
    for of in [1, 2] {
        assert_eq!(fs::read(f.in_mount(of, "root.raw")).unwrap_err().raw_os_error(), Some(5));
    }
    assert!(damage(&f).contains("longer than 200"), "{}", damage(&f));
    // 100 MB that begin as JSON does, a hundred thousand brackets, no JSON, and nothing.
    let path = f.store.manifest_path(&f.vm.name, &f.backups[2].name);
    let long = File::create(&path).unwrap();
    long.write_all_at(b"{\"format\":1,\"notes\":\"", 0).unwrap();
    long.set_len(100 << 20).unwrap();
    assert!(fs::read(f.in_mount(2, "root.raw")).is_err());
    assert_harmless(&f, "100 MB");
    assert!(damage(&f).contains("larger than"), "{}", damage(&f));
    for text in [vec![b'['; 100_000], b"{".to_vec(), b"\0\0".to_vec(), b"null".to_vec(), vec![]] {
        fs::write(&path, &text).unwrap();
        assert_harmless(&f, "no manifest");
    }
}

#[test]
fn links_pipes_devices_and_folders_in_the_place_of_files_are_damage_and_nothing_waits() {
    type Put = (&'static str, fn(&Path, &Path));
    let puts: [Put; 4] = [
        ("a link", |place, outside| symlink(outside, place).unwrap()),
        ("a pipe", |place, _| pipe(place)),
        ("a device", |place, _| device(place)),
        ("a folder", |place, _| fs::create_dir(place).unwrap()),
    ];
    for (what, put) in puts {
        let f = Fixture::chain(SIZE, true, &layers());
        let outside = f.dir.path().join("outside");
        fs::write(&outside, ELSEWHERE).unwrap();
        let folder = f.store.backup_dir(&f.vm.name, &f.backups[1].name);
        let _mount = f.mount(&[]);
        for file in ["root.qcow2", "root.sums", "domain.xml", "nvram.fd", "manifest.json"] {
            let place = folder.join(file);
            let kept = f.dir.path().join("kept");
            let was_there = fs::rename(&place, &kept).is_ok();
            put(&place, &outside);
            assert_harmless(&f, &format!("{what} as {file}"));
            let shown = if file == "root.sums" { "root.raw" } else { file };
            let error = fs::read(f.in_mount(1, shown)).unwrap_err();
            // A folder is not told from a file that was never there.
            let told = matches!(error.raw_os_error(), Some(5)) || (!was_there && what == "a folder");
            assert!(told || error.kind() == io::ErrorKind::NotFound, "{what} as {file}: {error}");
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
            if was_there {
                fs::rename(&kept, &place).unwrap();
            }
        }
        assert!(damage(&f).contains("it is not a regular file"), "{what}: {}", damage(&f));
    }
}

#[test]
fn secrets_of_a_backup_are_for_their_owner_and_lie_in_the_mount() {
    let f = Fixture::chain(SIZE, true, &layers());
    let folder = f.store.backup_dir(&f.vm.name, &f.backups[0].name);
    fs::write(folder.join("nvram.fd"), [7; 5000]).unwrap();
    fs::create_dir_all(folder.join("tpm/tpm2")).unwrap();
    fs::write(folder.join("tpm/tpm2/tpm2-00.permall"), b"keys").unwrap();
    fs::write(folder.join("tpm/tpm2/.lock"), b"").unwrap();
    let outside = f.dir.path().join("outside");
    fs::write(&outside, ELSEWHERE).unwrap();
    symlink(&outside, folder.join("tpm/tpm2/link")).unwrap();
    symlink(f.dir.path(), folder.join("tpm/away")).unwrap();
    pipe(&folder.join("tpm/pipe"));
    let _mount = f.mount(&["--allow-other", "--mode", "444"]);
    let mode = |file: &str| fs::metadata(f.in_mount(0, file)).unwrap().permissions().mode() & 0o777;
    for (file, wanted) in [
        ("domain.xml", 0o600),
        ("nvram.fd", 0o600),
        ("tpm", 0o700),
        ("tpm/tpm2", 0o700),
        ("tpm/tpm2/tpm2-00.permall", 0o600),
        ("manifest.json", 0o444),
    ] {
        assert_eq!(mode(file), wanted, "{file}");
    }
    assert_eq!(fs::read(f.in_mount(0, "nvram.fd")).unwrap(), [7; 5000]);
    assert_eq!(fs::read(f.in_mount(0, "tpm/tpm2/tpm2-00.permall")).unwrap(), b"keys");
    let names = |dir: &str| fs::read_dir(f.in_mount(0, dir)).unwrap().count();
    assert_eq!((names("tpm"), names("tpm/tpm2"), names("")), (1, 1, 6));
    assert_eq!(fs::canonicalize(f.in_mount(0, "tpm/tpm2/..")).unwrap(), f.in_mount(0, "tpm"));
    for gone in ["tpm/away/outside", "tpm/tpm2/link", "tpm/pipe", "tpm/tpm2/.lock"] {
        assert_eq!(fs::read(f.in_mount(0, gone)).unwrap_err().kind(), io::ErrorKind::NotFound, "{gone}");
    }
    assert_harmless(&f, "tpm");
}

/// Where bytes of a file are hit.
fn places(len: u64) -> [u64; 5] {
    [0, len / 4, len / 2, len - len / 4, len - 1]
}

#[test]
fn damage_at_every_place_of_every_file_is_eio_or_the_right_bytes() {
    type Accident = (&'static str, fn(&Path, u64));
    let accidents: [Accident; 3] = [
        ("flip", |path, at| {
            let file = File::options().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x41], at).unwrap();
        }),
        ("cut", |path, at| File::options().write(true).open(path).unwrap().set_len(at).unwrap()),
        ("delete", |path, _| fs::remove_file(path).unwrap()),
    ];
    let f = Fixture::chain(SIZE, true, &layers());
    let _mount = f.mount(&["--cache-size", "1M"]);
    let stored: Vec<_> = (0..3).map(|of| fs::read(f.stored(of)).unwrap()).collect();
    let mut hit = 0;
    for of in [0, 1] {
        for file in ["root.qcow2", "root.sums", "manifest.json"] {
            let path = f.store.backup_dir(&f.vm.name, &f.backups[of].name).join(file);
            let good = fs::read(&path).unwrap();
            for (what, accident) in accidents {
                for at in places(good.len() as u64) {
                    accident(&path, at);
                    hit += usize::from(!reads_are_right(
                        &f,
                        &stored,
                        of,
                        &format!("{what} {file} of {of} at {at}"),
                    ));
                    fs::remove_file(&path)
                        .or_else(|e| if what == "delete" { Ok(()) } else { Err(e) })
                        .unwrap();
                    fs::write(&path, &good).unwrap();
                    if what == "delete" {
                        break;
                    }
                }
            }
        }
    }
    assert!(hit > 40, "most accidents were noticed: {hit}");
}

/// Reads everything by pieces, each new from the store; whether nothing was an error. Those that do not need backup `of` are
/// never one.
fn reads_are_right(f: &Fixture, stored: &[Vec<u8>], of: usize, what: &str) -> bool {
    let mut whole = true;
    for (reader, as_it_lies) in stored.iter().enumerate() {
        for name in ["root.raw", "root.qcow2"] {
            let path = f.in_mount(reader, name);
            let wanted = match name {
                "root.raw" => f.expected(reader, 0, SIZE as usize),
                _ => as_it_lies.clone(),
            };
            let mut failed = |e: &io::Error| {
                let told = matches!(e.raw_os_error(), Some(5 | 116));
                assert!(
                    told || (reader == of && e.kind() == io::ErrorKind::NotFound),
                    "{what}: {e} of {reader}"
                );
                // A stored file is the business of its own backup and the name of the one below.
                assert!(reader >= of, "{what}: {} has nothing to do with it", path.display());
                whole = false;
            };
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) => {
                    failed(&e);
                    continue;
                }
            };
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            for (n, piece) in wanted.chunks(CLUSTER as usize).enumerate() {
                let mut seen = vec![0; piece.len()];
                match file.read_exact_at(&mut seen, n as u64 * CLUSTER) {
                    Ok(()) => assert!(seen == piece, "{what}: wrong bytes of {reader}"),
                    Err(e) => failed(&e),
                }
            }
        }
    }
    whole
}
