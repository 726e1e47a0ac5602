//! Table B of the requirements: the life of backups with `backup.chain.size`=3, on a guest whose files are looked at from
//! inside. Each row has its assertions, and everything is looked at after each row.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use common::table::{DISKS, Table};

/// The folder of `VM/BACKUP`.
fn folder(table: &Table, backup: &str) -> PathBuf {
    table.lab.store().join("vms").join(backup)
}

/// All disks of a backup are of that kind.
fn is(table: &Table, backup: &str, kind: &str, row: &str) {
    let manifest = table.lab.manifest(&folder(table, backup));
    let disks = manifest["disks"].as_array().unwrap();
    assert_eq!(disks.len(), DISKS.len(), "{row}");
    for disk in disks {
        assert_eq!(disk["kind"], kind, "{row}: {}: {}", disk["name"], disk["reason"]);
    }
}

fn state(table: &Table, backup: &str) -> String {
    table.lab.manifest(&folder(table, backup))["state"].as_str().unwrap().to_owned()
}

/// The backups that are listed.
fn listed(table: &Table) -> BTreeSet<String> {
    let all = table.lab.json(&["list", "web1"]);
    let names = all["vms"][0]["backups"].as_array().unwrap();
    names.iter().map(|b| format!("web1/{}", b["name"].as_str().unwrap())).collect()
}

fn set(backups: &[&String]) -> BTreeSet<String> {
    backups.iter().map(|b| (*b).clone()).collect()
}

/// How many images each disk has on primary: 2 with a delta, 1 without.
fn layers(table: &Table) -> Vec<usize> {
    table.chains().iter().map(Vec::len).collect()
}

#[test]
fn table_b() {
    let table = Table::new("table-b");
    let (guest, lab) = (&table.guest, &table.lab);
    let backup = || lab.ok(&["backup", "web1"]);
    lab.ok(&["setting", "set", "backup.chain.size", "3"]);
    lab.ok(&["offering", "create", "gold"]);
    lab.ok(&["vm", "assign", "web1", "gold"]);

    guest.shutdown();
    let b1 = backup();
    is(&table, &b1, "full", "row 1");
    assert_eq!(layers(&table), [2, 2], "row 1: one delta a disk");
    table.sound("row 1");

    table.start();
    table.write("one");
    let b2 = backup();
    is(&table, &b2, "incremental", "row 2");
    assert_eq!(layers(&table), [2, 2], "row 2: still one delta a disk");
    table.has(&["one"], "row 2: the guest goes on");
    table.sound("row 2");

    guest.shutdown();
    lab.ok(&["restore", &b1]);
    assert_eq!(layers(&table), [1, 1], "row 3: no delta on primary");
    table.sound("row 3, off");
    table.start();
    table.has(&[], "row 3: no data");
    table.sound("row 3");

    guest.shutdown();
    lab.ok(&["restore", &b2]);
    table.sound("row 4, off");
    table.start();
    table.has(&["one"], "row 4: the data is back");
    table.sound("row 4");

    let mut chain = Vec::new();
    for (file, kind) in [("b3", "full"), ("b4", "incremental"), ("b5", "incremental"), ("b6", "full")] {
        table.write(file);
        let made = backup();
        is(&table, &made, kind, &format!("row 5: {file}"));
        if file == "b3" {
            let why = lab.manifest(&folder(&table, &made))["disks"][0]["reason"].to_string();
            assert!(why.contains(&format!("restored from {b2} since")), "row 5: {why}");
        }
        let left = if file == "b5" { [1, 1] } else { [2, 2] };
        assert_eq!(layers(&table), left, "row 5: {file}: the last of a chain leaves no delta");
        table.sound(&format!("row 5: {file}"));
        chain.push(made);
    }
    let [b3, b4, b5, b6] = &chain[..] else { panic!("{chain:?}") };
    table.has(&["b3", "b4", "b5", "b6", "one"], "row 5");

    table.write("late");
    lab.ok(&["remove", b6]);
    assert_eq!(layers(&table), [1, 1], "row 6: the delta on primary is merged");
    assert!(!folder(&table, b6).exists(), "row 6");
    table.has(&["b3", "b4", "b5", "b6", "late", "one"], "row 6: the guest runs on with its data");
    table.sound("row 6");

    lab.ok(&["remove", b4]);
    assert_eq!(state(&table, b4), "Removed", "row 7: marked removed");
    assert!(folder(&table, b4).join("vda.qcow2").exists(), "row 7: kept, as b5 stands on it");
    assert_eq!(listed(&table), set(&[&b1, &b2, b3, b5]), "row 7");
    table.sound("row 7: b4 removed");
    guest.shutdown();
    lab.ok(&["restore", b5]);
    table.start();
    table.has(&["b3", "b4", "b5", "one"], "row 7: restore of b5 works");
    table.sound("row 7: b5 restored");
    lab.ok(&["remove", b5]);
    assert!(!folder(&table, b5).exists() && !folder(&table, b4).exists(), "row 7: both are deleted");
    assert_eq!(listed(&table), set(&[&b1, &b2, b3]), "row 7");
    table.sound("row 7: b5 removed");

    lab.ok(&["remove", &b2, b3, &b1]);
    assert_eq!(listed(&table), BTreeSet::new(), "row 8: all gone");
    let left: Vec<_> = std::fs::read_dir(lab.store().join("vms/web1"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "vm.json" && name != ".lock")
        .collect();
    assert_eq!(left, Vec::<String>::new(), "row 8: nothing is left of them");
    table.sound("row 8");

    table.write("nine");
    let b9 = backup();
    is(&table, &b9, "full", "row 9");
    assert_eq!(layers(&table), [2, 2], "row 9");
    table.sound("row 9");

    table.write("ten");
    lab.ok(&["vm", "unassign", "web1"]);
    assert_eq!(layers(&table), [1, 1], "row 10: deltas merged on primary");
    assert_eq!(lab.json(&["vm", "show", "web1"])["offering"], serde_json::Value::Null, "row 10");
    table.has(&["b3", "b4", "b5", "nine", "one", "ten"], "row 10: the guest runs on with its data");
    table.sound("row 10");

    lab.ok(&["remove", &b9]);
    assert_eq!(listed(&table), BTreeSet::new(), "row 11");
    assert_eq!(layers(&table), [1, 1], "row 11");
    table.sound("row 11");
    guest.shutdown();
    table.start();
    table.has(&["b3", "b4", "b5", "nine", "one", "ten"], "it starts from what is left");
}
