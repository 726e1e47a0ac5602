//! Table A of the requirements: disk-only VM snapshots of a guest, each row with its assertions, files looked at inside the
//! guest, and everything looked at after each row.
#![cfg(feature = "libvirt")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::table::Table;

#[test]
fn table_a() {
    let table = Table::new("table-a");
    let disks = table.chains();

    table.write("f1");
    table.snapshot("create", "s1");
    let first = table.chains();
    assert_eq!(table.below(), disks, "row 1: the guest goes on in an overlay");
    table.has(&["f1"], "row 1");
    table.sound("row 1");

    table.write("f2");
    table.snapshot("create", "s2");
    let second = table.chains();
    assert_eq!(table.below(), first, "row 2: the guest goes on in another overlay");
    table.has(&["f1", "f2"], "row 2");
    table.sound("row 2");

    table.write("f3");
    table.guest.shutdown();
    table.snapshot("revert", "s2");
    assert_eq!(table.below(), first, "row 3: the right deltas");
    table.start();
    table.has(&["f1", "f2"], "row 3");
    for chain in &second {
        assert!(!chain[0].exists(), "row 3: what was written since s2 is gone");
    }
    table.sound("row 3");

    table.write("f4");
    let third = table.chains();
    table.guest.shutdown();
    table.snapshot("revert", "s1");
    assert_eq!(table.below(), disks, "row 4: the right deltas");
    table.start();
    table.has(&["f1"], "row 4");
    for (dropped, kept) in third.iter().zip(&first) {
        assert!(!dropped[0].exists() && kept[0].exists(), "row 4: only what was written since is gone");
    }
    table.sound("row 4");

    table.write("f5");
    let fourth = table.chains();
    let s3 = table.lab.json(&["vm-snapshot", "create", "web1", "s3", "--quiesce"]);
    assert_eq!((&s3["quiesced"], table.guest.is_frozen()), (&true.into(), false), "row 5");
    assert_eq!(table.below(), fourth, "row 5: s3 is beside s2");
    table.has(&["f1", "f5"], "row 5");
    assert_eq!(table.listed(), ["s1", "s2", "s3"], "row 5");
    table.sound("row 5");

    table.write("f6");
    let fifth = table.chains();
    let said = table.snapshot("remove", "s1");
    assert!(said.contains("marked removed"), "row 6: {said}");
    assert_eq!(table.listed(), ["-s1", "s2", "s3"], "row 6: marked removed");
    assert_eq!(table.chains(), fifth, "row 6: still on storage");
    table.has(&["f1", "f5", "f6"], "row 6");
    table.sound("row 6");

    table.snapshot("remove", "s3");
    assert_eq!(table.chains(), fourth, "row 7: merged with the current volume");
    assert!(fifth.iter().all(|chain| !chain[0].exists()), "row 7: its delta is gone");
    assert_eq!(table.listed(), ["-s1", "s2"], "row 7");
    table.has(&["f1", "f5", "f6"], "row 7");
    table.sound("row 7");

    table.snapshot("remove", "s2");
    assert_eq!(table.chains(), disks, "row 8: s1 is merged with the current volume");
    assert!(first.iter().chain(&fourth).all(|chain| !chain[0].exists()), "row 8: s2 is gone");
    assert_eq!(table.listed(), Vec::<String>::new(), "row 8");
    table.has(&["f1", "f5", "f6"], "row 8");
    table.sound("row 8");

    table.guest.shutdown();
    table.start();
    table.has(&["f1", "f5", "f6"], "after another boot");
}
