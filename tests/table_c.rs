//! Table C of the requirements, its rows without snapshots: a guest with two disks is migrated live, with and without one
//! of its volumes, and gets a new one. Rows 6-16, 22 and 23 are in `table_c_snapshots.rs`.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};

use common::guest::{Guest, other_uri, uri};
use common::lab::tool;
use common::qemu_images::qemu_img;
use common::sound::chain;
use common::table::Table;

/// The kinds of a backup's disks, and the reason of one.
fn kinds(table: &Table, backup: &str) -> Vec<(String, String)> {
    let manifest = table.lab.manifest(&table.lab.store().join("vms").join(backup));
    let pair = |d: &serde_json::Value| {
        let text = |key: &str| d[key].as_str().unwrap().to_owned();
        (format!("{} {}", text("name"), text("kind")), text("reason"))
    };
    manifest["disks"].as_array().unwrap().iter().map(pair).collect()
}

fn are(table: &Table, backup: &str, expected: &[&str], row: &str) {
    let found = kinds(table, backup);
    assert_eq!(found.iter().map(|(kind, _)| kind).collect::<Vec<_>>(), expected, "{row}: {found:?}");
}

fn layers(table: &Table) -> Vec<usize> {
    table.chains().iter().map(Vec::len).collect()
}

/// Moves the running guest to another host; with a definition, where that says that it lies.
fn migrate(table: &mut Table, to: &str, more: &[&str]) {
    let socket = table.guest.path("state/migrate.sock");
    let nbd = table.guest.path("state/nbd.sock");
    let (by, disks_by) = (format!("unix://{}", socket.display()), format!("unix://{}", nbd.display()));
    let mut arguments = vec![
        "-q",
        "-c",
        table.guest.uri(),
        "migrate",
        "--live",
        "--p2p",
        "--persistent",
        "--undefinesource",
        "--unsafe",
        "--migrateuri",
        &by,
        "--disks-uri",
        &disks_by,
    ];
    arguments.extend(more);
    let name = table.guest.name().to_owned();
    arguments.extend([&*name, to]);
    tool("virsh", &arguments);
    table.guest.follow(to);
}

/// A definition to migrate with in which the disk `vdb` lies in `image`, by itself.
fn elsewhere(table: &Table, image: &Path) -> PathBuf {
    let xml = tool("virsh", &["-q", "-c", table.guest.uri(), "dumpxml", "--migratable", table.guest.name()]);
    let text = roxmltree::Document::parse(&xml).unwrap();
    let is_vdb = |n: &roxmltree::Node<'_, '_>| {
        n.has_tag_name("disk")
            && n.children().any(|c| c.has_tag_name("target") && c.attribute("dev") == Some("vdb"))
    };
    let disk = text.descendants().find(is_vdb).unwrap();
    let mut changed = xml.clone();
    let pieces: Vec<_> = disk
        .children()
        .filter(|c| c.has_tag_name("source") || c.has_tag_name("backingStore"))
        .map(|c| (c.has_tag_name("source"), c.range()))
        .collect();
    for (is_source, range) in pieces.into_iter().rev() {
        let new = if is_source { format!("<source file='{}'/>", image.display()) } else { String::new() };
        changed.replace_range(range, &new);
    }
    let path = table.guest.path("state/moved.xml");
    std::fs::write(&path, changed).unwrap();
    path
}

#[test]
fn rows_1_to_5() {
    let mut table = Table::new("table-c1");
    table.lab.ok(&["host", "add", "a", "--uri", uri()]);
    table.lab.ok(&["host", "add", "b", "--uri", other_uri()]);
    table.write("one");
    let b1 = table.lab.ok(&["backup", "web1"]);
    are(&table, &b1, &["vda full", "vdb full"], "row 1");
    migrate(&mut table, other_uri(), &[]);
    table.has(&["one"], "row 1: the guest goes on");
    assert_eq!(layers(&table), [2, 2], "row 1: both have their delta still");
    table.sound("row 1");

    table.write("two");
    let moved = table.guest.path("moved.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", moved.to_str().unwrap(), "64M"]).unwrap();
    let definition = elsewhere(&table, &moved);
    let definition = definition.to_str().unwrap();
    let left = chain(&table.guest, "vdb");
    let copy =
        ["--copy-storage-all", "--migrate-disks", "vdb", "--xml", definition, "--persistent-xml", definition];
    migrate(&mut table, uri(), &copy);
    assert_eq!(layers(&table), [2, 1], "row 2: vdb has no delta on primary, vda has one");
    assert_eq!(chain(&table.guest, "vdb"), [moved], "row 2");
    table.has(&["one", "two"], "row 2: the guest goes on");

    let b2 = table.lab.ok(&["backup", "web1"]);
    are(&table, &b2, &["vda incremental", "vdb full"], "row 3");
    assert!(kinds(&table, &b2)[1].1.contains("migrated"), "row 3: {:?}", kinds(&table, &b2));
    assert_eq!(layers(&table), [2, 2], "row 3");
    assert!(!left[0].exists() && left[1].exists(), "row 3: the delta where vdb was is merged");
    table.sound("row 3");

    for (file, row) in [("three", "row 4, first"), ("four", "row 4, second")] {
        table.write(file);
        let made = table.lab.ok(&["backup", "web1"]);
        are(&table, &made, &["vda incremental", "vdb incremental"], row);
        table.sound(row);
    }

    table.guest.shutdown();
    table.lab.ok(&["restore", &b1]);
    table.sound("row 5, off");
    table.start();
    table.has(&["one"], "row 5");
    table.sound("row 5");
}

fn files(guest: &Guest, disk: &str) -> Vec<String> {
    let listed = guest.sh(&format!("ls /mnt/{disk}"));
    listed.split_whitespace().filter(|f| *f != "lost+found").map(str::to_owned).collect()
}

#[test]
fn rows_17_to_21() {
    let ports: String =
        (1..=12).map(|n| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>")).collect();
    let table =
        Table::with("table-c17", &format!("<controller type='pci' index='0' model='pcie-root'/>{ports}"));
    let (guest, lab) = (&table.guest, &table.lab);
    let backup = || lab.ok(&["backup", "web1"]);
    let virsh = |arguments: &[&str]| tool("virsh", &[&["-q", "-c", uri()], arguments].concat());

    table.write("one");
    let b4 = backup();
    are(&table, &b4, &["vda full", "vdb full"], "row 17");
    table.sound("row 17");

    let new = guest.path("vdc.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", new.to_str().unwrap(), "64M"]).unwrap();
    let path = new.to_str().unwrap();
    virsh(&["attach-disk", guest.name(), path, "vdc", "--subdriver", "qcow2", "--live", "--config"]);
    guest.wait("the new disk", || guest.exists("/dev/vdc"));
    guest.mkfs("vdc");
    guest.write("/mnt/vdc/new", b"new");
    table.write("two");
    let b5 = backup();
    are(&table, &b5, &["vda incremental", "vdb incremental", "vdc full"], "row 18");
    table.sound("row 18");

    guest.write("/mnt/vdc/later", b"later");
    guest.shutdown();
    let said = lab.command(&["restore", &b4]).output().unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("vdc stays as it is"), "row 19: {said:?}");
    table.sound("row 19, off");
    table.start();
    table.has(&["one"], "row 19");
    assert_eq!(files(guest, "vdc"), ["later", "new"], "row 19: the new volume is untouched");
    table.sound("row 19");

    guest.shutdown();
    let live = chain(guest, "vdc");
    virsh(&["detach-disk", guest.name(), "vdc", "--config"]);
    lab.ok(&["restore", &b5]);
    let made = chain(guest, "vdc");
    assert_eq!(made.len(), 1, "row 20: {made:?}");
    assert!(!live.contains(&made[0]), "row 20: a new volume is made and attached");
    assert!(new.exists() && !live[0].exists(), "row 20: the detached one is whole, its delta merged");
    table.sound("row 20, off");
    table.start();
    table.has(&["one", "two"], "row 20");
    assert_eq!(files(guest, "vdc"), ["new"], "row 20: with its files");
    table.sound("row 20");

    let b6 = backup();
    are(&table, &b6, &["vda full", "vdb full", "vdc full"], "row 21");
    table.sound("row 21");
    // The volume that was detached holds all that its guest wrote.
    guest.shutdown();
    let copy = guest.path("vdz.qcow2");
    std::fs::copy(&new, &copy).unwrap();
    virsh(&["attach-disk", guest.name(), copy.to_str().unwrap(), "vdz", "--subdriver", "qcow2", "--config"]);
    table.start();
    let device = guest.sh("ls /dev/vd? | tail -n 1");
    let device = device.trim().trim_start_matches("/dev/").to_owned();
    assert_eq!(files(guest, &device), ["later", "new"], "row 21: the detached volume");
}
