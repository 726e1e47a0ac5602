//! A store of ten thousand backups in two hundred VMs: what is asked for costs what it is, not what the store holds. System
//! calls of the real program are counted, not time; `benches/many_backups.rs` measures the time.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod many;
mod mounted_store;
#[path = "common/served.rs"]
mod served;
#[path = "common/server.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use many::{BACKUPS, ManyBackups, VMS};

/// System calls that read, and what they read, of the mount's server so far.
#[derive(Debug, Clone, Copy)]
struct Reads {
    calls: u64,
    bytes: u64,
}

impl Reads {
    fn of(process: u32) -> Self {
        let text = fs::read_to_string(format!("/proc/{process}/io")).unwrap();
        let field = |name: &str| -> u64 {
            text.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().parse().unwrap()
        };
        Self { calls: field("syscr:"), bytes: field("rchar:") }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_asked_for_costs_what_it_is_and_not_what_the_store_holds() {
    let many = ManyBackups::new();
    let mount = many.mount(&["--cache-size", "16M"]);
    let reads = |what: &dyn Fn()| -> Reads {
        let before = Reads::of(mount.server());
        what();
        let after = Reads::of(mount.server());
        Reads { calls: after.calls - before.calls, bytes: after.bytes - before.bytes }
    };
    let per_vm = (BACKUPS / VMS) as u64;
    let vms = mount.at().join("vms");

    // A VM's folder, with everything of each name, as `ls -l` asks.
    let long = |vm: &str| {
        let dir = vms.join(vm);
        let all = names(&dir);
        assert_eq!(all.len() as u64, per_vm + 1);
        assert!(all.iter().all(|name| fs::symlink_metadata(dir.join(name)).is_ok()));
    };
    let first = reads(&|| long("vm007"));
    assert!(first.calls < 20 * per_vm, "{first:?} for {per_vm} backups");
    let again = reads(&|| long("vm007"));
    assert!(again.bytes < first.bytes / 4, "manifests are read once: {first:?}, then {again:?}");

    // One disk by its name.
    let one = reads(&|| {
        let last = names(&vms.join("vm100")).into_iter().rev().nth(1).unwrap();
        let read = fs::read(vms.join("vm100").join(last).join("root.raw")).unwrap();
        assert!(!read.is_empty());
    });
    assert!(one.calls < 40 * per_vm, "{one:?}");

    // One of all ids, then all of them: the store is read once, not once for each.
    let all = reads(&|| assert_eq!(names(&mount.at().join("by-id")).len(), BACKUPS));
    assert!(all.calls < 20 * BACKUPS as u64, "{all:?}");
    let links = reads(&|| {
        for name in names(&mount.at().join("by-id")) {
            fs::read_link(mount.at().join("by-id").join(name)).unwrap();
        }
    });
    assert!(links.calls < 20 * BACKUPS as u64, "{links:?}");
    assert!(links.bytes < all.bytes, "manifests are read once: {all:?}, then {links:?}");
    let none = reads(&|| {
        let unknown = mount.at().join("by-id/00000000-0000-4000-8000-000000000000");
        assert!(!unknown.exists());
    });
    assert!(none.bytes < all.bytes / 4, "an id that is nobody's costs a look at each manifest: {none:?}");

    // A backup that is taken now is seen in all of them.
    let name = many.take("vm042");
    let end = Instant::now() + Duration::from_secs(60);
    while !names(&vms.join("vm042")).contains(&name) {
        assert!(Instant::now() < end, "it is never seen");
        std::thread::yield_now();
    }
    assert!(names(&mount.at().join("by-id")).len() > BACKUPS);
    let peak = mount.peak();
    assert!(peak <= (16 + 64) << 20, "{} MiB with a cache of 16 MiB", peak >> 20);
}
