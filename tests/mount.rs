//! A store mounted by the real program, read as programs read it. Needs root, /dev/fuse, qemu-img and qemu-io.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;
#[path = "common/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

use knib_fuse::{Ino, Tree as _};
use knibfs::mount::{Access, StoreTree, TreeConfig};
use knibfs::store::manifest::BackupState;
use mounted_store::{CLUSTER, Fixture, Layer, Shape, command};
use proptest::prelude::*;

const SIZE: u64 = 40 << 20;

fn layers() -> Vec<Layer> {
    let shape =
        |n: u64| [Shape::Compressed, Shape::Plain, Shape::Plain, Shape::Compressed][(n / 3 % 4) as usize];
    let full: Layer = (0..600).filter(|n| n % 7 < 5).map(|n| (n, shape(n))).collect();
    let some: Layer = (0..600)
        .filter(|n| n % 5 == 0)
        .map(|n| (n, if n % 3 == 0 { Shape::Zero } else { shape(n + 3) }))
        .collect();
    let few: Layer =
        [(0, Shape::Plain), (1, Shape::Compressed), (2, Shape::Zero), (639, Shape::Plain)].into();
    vec![full, some, few]
}

fn ok(command: &mut Command) -> String {
    let output = command.output().expect("install qemu-utils");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out.into_owned()
}

fn refused(fixture: &Fixture, arguments: &[&str]) -> String {
    let output = fixture.knibfs(arguments);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
    assert_eq!(message.trim_end().lines().count(), 1, "one sentence: {message}");
    message
}

#[test]
fn flat_disks_and_stored_files_are_what_was_backed_up() {
    for zstd in [true, false] {
        let f = Fixture::chain(SIZE, zstd, &layers());
        let _mount = f.mount(&[]);
        for of in 0..3 {
            assert_eq!(fs::read(f.in_mount(of, "root.qcow2")).unwrap(), fs::read(f.stored(of)).unwrap());
            let raw = fs::read(f.in_mount(of, "root.raw")).unwrap();
            assert!(raw == f.expected(of, 0, SIZE as usize), "backup {of}");
            // And QEMU sees the same in the store, in the mounted chain and in the flat view.
            ok(Command::new("qemu-img")
                .args(["compare", "-f", "raw", "-F", "qcow2"])
                .arg(f.in_mount(of, "root.raw"))
                .arg(f.stored(of)));
            ok(Command::new("qemu-img")
                .args(["compare", "-f", "qcow2", "-F", "qcow2"])
                .arg(f.in_mount(of, "root.qcow2"))
                .arg(f.stored(of)));
            ok(Command::new("qemu-img").args(["check", "-q"]).arg(f.stored(of)));
        }
    }
}

#[test]
fn the_tree_is_as_described() {
    let f = Fixture::chain(SIZE, true, &layers());
    let _mount = f.mount(&[]);
    let names = |path: &Path| -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&f.mnt()), [".knibfs", "by-id", "vms"]);
    assert_eq!(names(&f.mnt().join("vms")), ["web1"]);
    assert_eq!(names(&f.in_mount(0, "")), ["domain.xml", "manifest.json", "root.qcow2", "root.raw"]);
    let vm = f.mnt().join("vms/web1");
    assert_eq!(names(&vm).len(), 4);
    assert_eq!(fs::read_link(vm.join("latest")).unwrap(), Path::new(f.backups[2].name.as_str()));
    for backup in &f.backups {
        let link = f.mnt().join("by-id").join(backup.id.to_string());
        assert_eq!(link.canonicalize().unwrap(), vm.join(backup.name.as_str()));
    }
    let manifest = fs::read(f.in_mount(1, "manifest.json")).unwrap();
    assert_eq!(manifest, fs::read(f.store.manifest_path(&f.vm.name, &f.backups[1].name)).unwrap());
    let secret = fs::metadata(f.in_mount(1, "domain.xml")).unwrap();
    assert_eq!(secret.permissions().mode() & 0o777, 0o600);
    let raw = fs::metadata(f.in_mount(0, "root.raw")).unwrap();
    assert_eq!(raw.len(), SIZE);
    assert_eq!(raw.blocks() * 512, f.layers[0].len() as u64 * CLUSTER);
    assert_eq!(raw.modified().unwrap(), std::time::SystemTime::from(f.backups[0].taken));
    let stored = fs::metadata(f.in_mount(0, "root.qcow2")).unwrap();
    assert_eq!((stored.len(), stored.blocks()), {
        let below = fs::metadata(f.stored(0)).unwrap();
        (below.len(), below.blocks())
    });
    for bad in ["vms/nobody", "vms/web1/2020-01-01T00-00-00Z", "vms/web1/..x", "by-id/x", "nothing"] {
        assert_eq!(fs::metadata(f.mnt().join(bad)).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
}

#[test]
fn a_backup_taken_while_mounted_shows_up_and_a_removed_one_hides_but_stays_a_parent() {
    let mut f = Fixture::chain(SIZE, true, &layers()[..1]);
    let mount = f.mount(&[]);
    std::mem::forget(mount); // the fixture is changed below; unmounted at the end
    let vm = f.mnt().join("vms/web1");
    let count = || fs::read_dir(&vm).unwrap().count();
    assert_eq!(count(), 2);
    f.add(layers()[1].clone());
    while count() != 3 {
        std::thread::yield_now();
    }
    assert!(fs::read(f.in_mount(1, "root.raw")).unwrap() == f.expected(1, 0, SIZE as usize));
    let mut first = f.backups[0].clone();
    first.state = BackupState::Removed;
    f.store.save_manifest(&first).unwrap();
    while count() != 2 {
        std::thread::yield_now();
    }
    assert!(!f.mnt().join("by-id").join(first.id.to_string()).exists());
    ok(Command::new("qemu-img")
        .args(["compare", "-f", "qcow2", "-F", "raw"])
        .arg(f.in_mount(1, "root.qcow2"))
        .arg(f.in_mount(1, "root.raw")));
    knib_fuse::unmount(&f.mnt()).unwrap();
}

#[test]
fn node_numbers_are_the_same_after_mounting_again() {
    let f = Fixture::chain(SIZE, true, &layers());
    let numbers = || {
        let files = ["", "root.raw", "root.qcow2", "manifest.json", "domain.xml"];
        files.map(|file| fs::metadata(f.in_mount(1, file)).unwrap().ino())
    };
    let before = {
        let _mount = f.mount(&[]);
        numbers()
    };
    let _mount = f.mount(&[]);
    assert_eq!(before, numbers());
}

/// After a server's death the kernel asks the next one for numbers that it knows from the last, many at once.
#[test]
fn a_new_server_knows_the_nodes_of_the_last_one_whoever_asks_first() {
    let f = Fixture::chain(SIZE, true, &layers());
    let tree = || {
        let (access, mounted_at) = (Access::only_me(), "/mnt".to_owned());
        let (held_by, restarts, passthrough) = (std::process::id(), 0, false);
        let config = TreeConfig { access, cache_size: 1 << 20, mounted_at, held_by, restarts, passthrough };
        StoreTree::new(f.store.clone(), config).unwrap()
    };
    let known = tree();
    let mut node = Ino::ROOT;
    for name in ["vms", "web1", f.backups[1].name.as_str(), "root.raw"] {
        node = known.lookup(node, name.as_ref()).unwrap().ino;
    }
    for round in 0..50 {
        let (next, all) = (tree(), Barrier::new(4));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    all.wait();
                    assert!(next.open(node).is_ok(), "round {round}");
                });
            }
        });
    }
}

#[test]
fn every_flipped_byte_is_an_error_for_just_the_bytes_it_hits() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let good = fs::read(f.stored(0)).unwrap();
    // The first plain and the first compressed cluster of the file.
    let compressed = CLUSTER as usize + 10;
    let plain = {
        let wanted = mounted_store::content(0, 3);
        (0..good.len()).step_by(CLUSTER as usize).find(|at| good[*at..].starts_with(&wanted)).unwrap()
    };
    for (at, clusters) in [(compressed, 0..1u64), (plain + 8192 + 5, 3..4)] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(f.stored(0), &bad).unwrap();
        let mount = f.mount(&[]);
        let raw = File::open(f.in_mount(0, "root.raw")).unwrap();
        let stored = File::open(f.in_mount(0, "root.qcow2")).unwrap();
        let mut errors = Vec::new();
        for page in 0..600 * 16 {
            let mut seen = [0; 4096];
            match raw.read_exact_at(&mut seen, page * 4096) {
                Ok(()) => assert!(seen[..] == f.expected(0, page * 4096, 4096), "page {page}"),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(5));
                    errors.push(page);
                }
            }
        }
        // A compressed cluster is read whole, a plain one by 4 KiB.
        let wanted: Vec<u64> = if at == compressed { (0..16).collect() } else { vec![3 * 16 + 2] };
        assert_eq!(errors, wanted, "clusters {clusters:?}");
        let mut seen = vec![0; 4096];
        let page = at as u64 / 4096 * 4096;
        assert_eq!(stored.read_exact_at(&mut seen, page).unwrap_err().raw_os_error(), Some(5));
        stored.read_exact_at(&mut seen, page + 64 * 4096).unwrap();
        let told = fs::read_to_string(f.mnt().join(".knibfs/damage")).unwrap();
        assert!(told.contains("root.qcow2 is damaged"), "{told}");
        assert!(f.log().contains("is not as it was written"), "{}", f.log());
        drop((raw, stored, mount));
    }
}

#[test]
fn cut_missing_and_foreign_files_are_errors_and_the_others_read_on() {
    type Accident = (&'static str, fn(&Path));
    let accidents: [Accident; 5] = [
        ("cut", |p| File::options().write(true).open(p).unwrap().set_len(100_000).unwrap()),
        ("deleted", |p| fs::remove_file(p).unwrap()),
        ("no sums", |p| fs::remove_file(p.with_extension("sums")).unwrap()),
        ("cut sums", |p| {
            File::options().write(true).open(p.with_extension("sums")).unwrap().set_len(90).unwrap()
        }),
        ("empty sums", |p| fs::write(p.with_extension("sums"), b"").unwrap()),
    ];
    for (name, accident) in accidents {
        let f = Fixture::chain(SIZE, true, &layers());
        accident(&f.stored(1));
        let _mount = f.mount(&[]);
        for file in ["root.raw", "root.qcow2"] {
            assert_eq!(fs::read(f.in_mount(1, file)).unwrap_err().raw_os_error(), Some(5), "{name} {file}");
        }
        assert_eq!(fs::read(f.in_mount(2, "root.raw")).unwrap_err().raw_os_error(), Some(5), "{name}");
        assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize), "{name}");
    }
}

#[test]
fn a_header_that_names_another_parent_is_never_followed() {
    let f = Fixture::chain(SIZE, true, &layers());
    // Whole and well formed, yet another backup's image: put in with its sums and its digest.
    let (from, to) = (f.stored(2), f.stored(1));
    fs::copy(&from, &to).unwrap();
    fs::copy(from.with_extension("sums"), to.with_extension("sums")).unwrap();
    let mut manifest = f.backups[1].clone();
    manifest.disks[0].sums_digest.clone_from(&f.backups[2].disks[0].sums_digest);
    manifest.disks[0].file_size = f.backups[2].disks[0].file_size;
    f.store.save_manifest(&manifest).unwrap();
    let _mount = f.mount(&[]);
    assert_eq!(fs::read(f.in_mount(1, "root.raw")).unwrap_err().raw_os_error(), Some(5));
    assert!(f.log().contains("its header names"), "{}", f.log());
}

#[test]
fn a_sparse_disk_of_a_tebibyte_opens_and_maps_without_a_walk() {
    let size = 1u64 << 40;
    let last = size / CLUSTER - 1;
    let f = Fixture::chain(size, true, &[[(5, Shape::Plain), (last, Shape::Compressed)].into()]);
    let _mount = f.mount(&[]);
    let raw = File::open(f.in_mount(0, "root.raw")).unwrap();
    let mut edges = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&raw, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&raw, rustix::fs::SeekFrom::Hole(data)).unwrap();
        edges.push((data / CLUSTER, at / CLUSTER));
    }
    assert_eq!(edges, [(5, 6), (last, last + 1)]);
    let map = ok(Command::new("qemu-img")
        .args(["map", "-f", "raw", "--output=json"])
        .arg(f.in_mount(0, "root.raw")));
    assert_eq!(map.matches("\"data\": true").count(), 2, "{map}");
    let mut seen = vec![0; 4096];
    raw.read_exact_at(&mut seen, size - 4096).unwrap();
    assert_eq!(seen, f.expected(0, size - 4096, 4096));
}

#[test]
fn qemu_reads_an_overlay_on_both_views_past_the_cache_with_every_aio() {
    let f = Fixture::chain(SIZE, true, &layers());
    let _mount = f.mount(&[]);
    for (file, format) in [("root.raw", "raw"), ("root.qcow2", "qcow2")] {
        let overlay = f.dir.path().join(format!("overlay-{format}.qcow2"));
        ok(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .arg(f.in_mount(2, file))
            .arg(&overlay));
        for aio in ["threads", "native", "io_uring"] {
            let output = Command::new("qemu-io")
                .args(["-f", "qcow2", "-t", "none", "-i", aio, "-c", "read 0 4M", "-c", "write 64k 64k"])
                .arg(&overlay)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success() && text.contains("read 4194304/4194304"),
                "{aio}: {text}{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

#[test]
fn the_status_tells_what_was_read_and_what_is_damaged() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let mut bad = fs::read(f.stored(0)).unwrap();
    bad[CLUSTER as usize + 10] ^= 1; // cluster 0, compressed
    fs::write(f.stored(0), &bad).unwrap();
    let _mount = f.mount(&["--cache-size", "32M"]);
    let status = || fs::read_to_string(f.mnt().join(".knibfs/status")).unwrap();
    let value = |name: &str| -> u64 {
        let text = status();
        let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|l| l.starts_with([' ', '{'])));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert_eq!((value("knibfs_mount_open_files"), value("knibfs_mount_reads_total")), (0, 0));
    assert_eq!(value("knibfs_mount_cache_limit_bytes"), 32 << 20);
    let raw = File::open(f.in_mount(0, "root.raw")).unwrap();
    raw.read_exact_at(&mut [0; 4096], CLUSTER).unwrap();
    assert!(raw.read_exact_at(&mut [0; 4096], 0).is_err());
    assert_eq!(value("knibfs_mount_open_files"), 1);
    assert!(value("knibfs_mount_reads_total") > 0 && value("knibfs_mount_read_bytes_total") >= 4096);
    assert!(value("knibfs_mount_read_errors_total") > 0);
    let named = format!("knibfs_mount_damage_total{{file=\"{}\"}}", f.stored(0).display());
    assert!(status().contains(&named), "{}", status());
    // By the name that readers know it by, and no other is named.
    let text = status();
    let value_in = |start: &str| text.lines().find_map(|l| l.strip_prefix(start)?.parse::<u64>().ok());
    let of_file =
        format!("knibfs_mount_file_read_errors_total{{file=\"vms/web1/{}/root.raw\"}} ", f.backups[0].name);
    assert_eq!(value_in(&of_file), value_in("knibfs_mount_read_errors_total "), "{text}");
    assert_eq!(text.matches("knibfs_mount_file_read_errors_total{").count(), 1, "{text}");
    // Asked for once and again it is decoded; then it is found.
    let ratio = || -> f64 {
        let text = status();
        text.lines().find_map(|l| l.strip_prefix("knibfs_mount_cache_hit_ratio ")).unwrap().parse().unwrap()
    };
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let past = File::options().read(true).custom_flags(direct).open(f.in_mount(0, "root.raw")).unwrap();
    let mut space = vec![0u8; 2 * 4096];
    let from = space.as_ptr().align_offset(4096);
    (0..500).for_each(|_| past.read_exact_at(&mut space[from..from + 4096], CLUSTER).unwrap());
    assert!(ratio() > 0.5, "{}", status());
    drop(past);
    drop(raw);
    while value("knibfs_mount_open_files") > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn mount_by_the_helpers_name_takes_fstabs_options() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let helper = f.dir.path().join("mount.fuse.knibfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_knibfs"), &helper).unwrap();
    let log = f.dir.path().join("log");
    let options = format!("rw,nofail,x-systemd.automount,mode=444,cache-size=32M,log-dir={}", log.display());
    ok(Command::new(&helper).arg(f.store.root()).arg(f.mnt()).args(["-o", &options]));
    assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize));
    assert_eq!(fs::metadata(f.in_mount(0, "root.raw")).unwrap().mode() & 0o777, 0o444);
    f.unmount();
    let output =
        Command::new(&helper).arg(f.store.root()).arg(f.mnt()).args(["-o", "colour=red"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && message.contains("colour=red"), "{message}");
}

#[test]
fn the_second_mount_is_refused_and_so_are_places_in_the_store() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let mnt = f.mnt().display().to_string();
    let inside = f.store.root().join("vms").display().to_string();
    let above = f.dir.path().display().to_string();
    assert!(refused(&f, &["mount", &inside]).contains("lies in the store"));
    assert!(refused(&f, &["mount", &above]).contains("would hide it"));
    assert!(refused(&f, &["mount", "/no/such/place"]).contains("create it first"));
    assert!(refused(&f, &["mount", "/etc/passwd"]).contains("is not a folder"));
    assert!(refused(&f, &["umount", &mnt]).contains("no knibfs store is mounted"));
    let _mount = f.mount(&[]);
    assert!(refused(&f, &["mount", &mnt]).contains("already mounted"));
    assert!(f.in_mount(0, "root.raw").exists());
}

#[test]
fn what_a_mount_hides_is_said() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let mine = f.mnt().join("mine");
    fs::write(&mine, "").unwrap();
    let log = f.dir.path().join("log");
    let output = f.knibfs(&["mount", "--log-dir", log.to_str().unwrap(), f.mnt().to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("is hidden until `knibfs umount`"), "{said}");
    assert!(!mine.exists() && f.in_mount(0, "root.raw").exists());
    f.unmount();
    assert!(mine.exists());
}

#[test]
fn umount_names_who_holds_it() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let _mount = f.mount(&[]);
    let open = File::open(f.in_mount(0, "root.raw")).unwrap();
    let mnt = f.mnt().display().to_string();
    let message = refused(&f, &["umount", &mnt]);
    assert!(message.contains(&format!("(pid {})", std::process::id())), "{message}");
    drop(open);
    // The kernel tells of the last close a moment later.
    while !f.knibfs(&["umount", &mnt]).status.success() {
        std::thread::yield_now();
    }
    assert!(!f.mnt().join("vms").exists());
}

#[test]
fn a_user_who_may_not_is_told_the_way_out() {
    use std::os::unix::process::CommandExt as _;
    const NOBODY: u32 = 65534;
    fn give(path: &Path) {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        if path.is_dir() {
            fs::read_dir(path).unwrap().for_each(|e| give(&e.unwrap().path()));
        }
    }
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let program = f.dir.path().join("knibfs");
    fs::copy(env!("CARGO_BIN_EXE_knibfs"), &program).unwrap();
    give(f.dir.path());
    let output = Command::new(&program)
        .args(["mount", "--allow-other", "--log-dir"])
        .args([f.dir.path().join("log"), f.mnt()])
        .env("KNIBFS_STORE", f.store.root())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    let for_all = fs::metadata("/dev/fuse").unwrap().mode() & 0o006 == 0o006;
    let wanted = if for_all { "add the line `user_allow_other`" } else { "let users open /dev/fuse" };
    assert!(message.contains(wanted) && message.trim_end().lines().count() == 1, "{message}");
}

fn keeper(f: &Fixture) -> (std::process::Child, std::path::PathBuf) {
    let err = f.dir.path().join("server.err");
    let child = command(f.store.root(), f.dir.path())
        .args(["mount", "-f"])
        .arg(f.mnt())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap();
    while !f.mnt().join("vms").exists() {
        std::thread::yield_now();
    }
    (child, err)
}

fn signal(child: &std::process::Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn a_signal_ends_an_idle_mount() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let (mut child, _) = keeper(&f);
    signal(&child);
    assert!(child.wait().unwrap().success());
    assert!(!f.mnt().join("vms").exists());
}

#[test]
fn a_signal_waits_for_open_files_and_the_second_detaches_under_them() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let (mut child, err) = keeper(&f);
    let open = File::open(f.in_mount(0, "root.raw")).unwrap();
    signal(&child);
    while !fs::read_to_string(&err).unwrap().contains("is in use by") {
        std::thread::yield_now();
    }
    assert!(fs::read_to_string(&err).unwrap().contains(&format!("(pid {})", std::process::id())));
    assert!(f.mnt().join("vms").exists());
    signal(&child);
    while f.mnt().join("vms").exists() {
        std::thread::yield_now();
    }
    let mut seen = vec![0; 100_000];
    open.read_exact_at(&mut seen, 300_000).unwrap();
    assert!(seen == f.expected(0, 300_000, 100_000));
    drop(open);
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}: {}", fs::read_to_string(&err).unwrap());
}

/// An unmount races with the threads that wait for requests: about one in sixty once ended as a failure.
#[test]
fn every_mount_ends_well() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    for round in 0..40 {
        let (mut child, err) = keeper(&f);
        let read = File::open(f.in_mount(0, "root.raw")).unwrap();
        read.read_exact_at(&mut [0; 4096], 0).unwrap();
        if round % 2 == 0 {
            drop(read);
            ok(Command::new("umount").arg(f.mnt()));
        } else {
            // The last close ends it.
            ok(Command::new("umount").arg("-l").arg(f.mnt()));
            drop(read);
        }
        let status = child.wait().unwrap();
        assert!(status.success(), "round {round}: {status}: {}", fs::read_to_string(&err).unwrap());
    }
}

#[test]
fn the_systemd_unit_is_sound() {
    let dir = tempfile::tempdir().unwrap();
    let unit =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/knibfs-mount.service")).unwrap();
    assert!(unit.contains("/usr/bin/knibfs mount --foreground") && unit.contains("Type=notify"));
    let path = dir.path().join("knibfs-mount.service");
    // The program must be there; all else is checked as it is.
    fs::write(&path, unit.replace("/usr/bin/knibfs", env!("CARGO_BIN_EXE_knibfs"))).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().expect("install systemd");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("knibfs-mount.service:"), "{said}");
}

#[test]
fn what_a_killed_server_left_is_cleaned_up_by_the_next_mount() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let (mut child, _) = keeper(&f);
    let serving = server::pid(&f.mnt());
    // The keeper first: it would start another server.
    child.kill().unwrap();
    child.wait().unwrap();
    server::kill(serving);
    server::wait("the mount to be dead", || {
        rustix::fs::statfs(f.mnt()).err() == Some(rustix::io::Errno::NOTCONN)
    });
    let _mount = f.mount(&[]);
    assert!(fs::read(f.in_mount(0, "root.raw")).unwrap() == f.expected(0, 0, SIZE as usize));
}

#[test]
fn what_is_open_is_leased() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let _mount = f.mount(&[]);
    let id = f.backups[0].id;
    assert_eq!(f.store.leases(id).unwrap().len(), 0);
    let open = ["root.raw", "root.raw", "root.qcow2"].map(|name| File::open(f.in_mount(0, name)).unwrap());
    let leases = f.store.leases(id).unwrap();
    assert_eq!(leases.len(), 2, "one for all flat disks, one for all stored files");
    assert!(leases.iter().all(|l| l.purpose.contains(&f.mnt().display().to_string())));
    // A swap of the stored file waits for its readers alone.
    let flat = leases.iter().filter(|l| l.purpose.starts_with(knibfs::store::lease::RAW_VIEW));
    assert_eq!(flat.count(), 1);
    drop(open);
    while !f.store.leases(id).unwrap().is_empty() {
        std::thread::yield_now();
    }
}

#[test]
fn owner_group_and_mode_are_as_asked() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    let seen = |file: &str| {
        let m = fs::metadata(f.in_mount(0, file)).unwrap();
        (m.uid(), m.gid(), m.mode() & 0o777)
    };
    {
        let _mount = f.mount(&[]);
        assert_eq!((seen("root.raw"), seen("")), ((0, 0, 0o400), (0, 0, 0o500)));
    }
    let _mount = f.mount(&["--allow-other", "--uid", "12", "--gid", "34", "--mode", "640"]);
    assert_eq!((seen("root.raw"), seen("")), ((12, 34, 0o440), (12, 34, 0o550)));
    assert_eq!(seen("domain.xml").2, 0o600);
}

#[test]
fn memory_stays_under_the_cache_and_64_mib_with_32_readers() {
    let layer: Layer =
        (0..8192).map(|n| (n, if n % 3 == 0 { Shape::Plain } else { Shape::Compressed })).collect();
    let f = Fixture::chain(512 << 20, true, &[layer]);
    let cache: u64 = 64 << 20;
    let (mut child, _) = {
        let child = command(f.store.root(), f.dir.path())
            .args(["mount", "-f", "--cache-size", "64M", "--threads", "32"])
            .arg(f.mnt())
            .spawn()
            .unwrap();
        while !f.mnt().join("vms").exists() {
            std::thread::yield_now();
        }
        (child, ())
    };
    let raw = f.in_mount(0, "root.raw");
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    std::thread::scope(|scope| {
        for reader in 0..32u64 {
            let raw = &raw;
            scope.spawn(move || {
                let file = File::options().read(true).custom_flags(direct).open(raw).unwrap();
                let mut space = vec![0u8; (1 << 20) + 4096];
                let from = space.as_ptr().align_offset(4096);
                for step in 0..64u64 {
                    let at = (step * 7919 + reader * 104_729) * 65_536 % (511 << 20) / 4096 * 4096;
                    let len = if step % 2 == 0 { 1 << 20 } else { 4096 };
                    file.read_exact_at(&mut space[from..from + len], at).unwrap();
                }
            });
        }
    });
    let peak = server::own(child.id()) + server::peak(server::pid(&f.mnt()));
    signal(&child);
    child.wait().unwrap();
    assert!(peak < cache + (64 << 20), "{} MiB", peak >> 20);
}

#[test]
fn more_threads_than_the_memory_is_promised_for_are_refused() {
    let f = Fixture::chain(SIZE, true, &layers()[..1]);
    for wrong in ["0", "33", "256", "99999", "many"] {
        let output = f.knibfs(&["mount", "--threads", wrong, f.mnt().to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains("give 1 to 32"), "{wrong}: {said}");
    }
    let _mount = f.mount(&["--threads", "32"]);
}

#[test]
fn a_chain_as_deep_as_allowed_reads_right() {
    let mut layers: Vec<Layer> = vec![(0..200).map(|n| (n, Shape::Compressed)).collect()];
    layers.extend(
        (1..200).map(|n| Layer::from([(n, if n % 2 == 0 { Shape::Plain } else { Shape::Compressed })])),
    );
    let f = Fixture::chain(SIZE, true, &layers);
    let _mount = f.mount(&[]);
    assert!(fs::read(f.in_mount(199, "root.raw")).unwrap() == f.expected(199, 0, SIZE as usize));
}

fn any_layer() -> impl Strategy<Value = Layer> {
    let shape = prop_oneof![Just(Shape::Plain), Just(Shape::Compressed), Just(Shape::Zero)];
    // Two regions of 16 MiB and an odd tail.
    prop::collection::btree_map(0u64..530, shape, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_chain_reads_as_its_model(
        layers in prop::collection::vec(any_layer(), 1..5),
        zstd in any::<bool>(),
        cut in 1u64..65_536,
        reads in prop::collection::vec((0.0f64..1.0, 1usize..300_000), 1..30),
    ) {
        let size = 530 * CLUSTER - cut / 512 * 512;
        let f = Fixture::chain(size, zstd, &layers);
        let _mount = f.mount(&["--cache-size", "1M"]);
        let top = layers.len() - 1;
        let raw = File::open(f.in_mount(top, "root.raw")).unwrap();
        for (place, len) in reads {
            #[allow(clippy::cast_sign_loss)]
            let at = (place * (size - 1) as f64) as u64;
            let len = len.min((size - at) as usize);
            let mut seen = vec![0; len];
            raw.read_exact_at(&mut seen, at).unwrap();
            prop_assert!(seen == f.expected(top, at, len), "{} bytes at {}", len, at);
        }
        let held: BTreeMap<u64, Shape> = layers.iter().flat_map(|l| l.clone()).collect();
        let first = held.iter().find(|(_, s)| **s != Shape::Zero).map(|(c, _)| *c * CLUSTER);
        let found = rustix::fs::seek(&raw, rustix::fs::SeekFrom::Data(0)).ok();
        prop_assert_eq!(found, first);
    }
}
