//! Holes in the mount: what is stored is shown as data, all else as holes, and copies read and write the data only.
//! Needs root, /dev/fuse, qemu-img, rsync and tar.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod mounted_store;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use mounted_store::{CLUSTER, Fixture, Layer, Shape, take};

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: run scripts/install-deps"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out.trim().to_owned()
}

/// Runs of data by the kernel's seeks, in clusters.
fn data(file: &Path) -> Vec<(u64, u64)> {
    let file = File::open(file).unwrap();
    let (mut found, mut at) = (Vec::new(), 0);
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        assert!(data % CLUSTER == 0);
        found.push((data / CLUSTER, at.div_ceil(CLUSTER)));
    }
    found
}

#[test]
fn a_disk_that_grew_has_holes_where_neither_it_nor_the_smaller_one_below_has_data() {
    let (small, large) = (11 * CLUSTER, 300 * CLUSTER);
    let mut f = Fixture::new(small, true);
    let below: Layer =
        [(0, Shape::Plain), (3, Shape::Compressed), (5, Shape::Plain), (10, Shape::Plain)].into();
    f.add(below);
    let above: Layer = [(5, Shape::Zero), (6, Shape::Compressed), (299, Shape::Plain)].into();
    let grown = take(&f.store, &f.vm, 1, Some(&f.backups[0]), &above, large, true);
    f.backups.push(grown);
    let _mount = f.mount(&[]);
    assert_eq!(data(&f.in_mount(0, "root.raw")), [(0, 1), (3, 4), (5, 6), (10, 11)]);
    assert_eq!(data(&f.in_mount(1, "root.raw")), [(0, 1), (3, 4), (6, 7), (10, 11), (299, 300)]);
    let sizes = [0, 1].map(|of| fs::metadata(f.in_mount(of, "root.raw")).unwrap().size());
    assert_eq!(sizes, [small, large]);
    ok(Command::new("qemu-img")
        .args(["compare", "-q", "-f", "raw", "-F", "qcow2"])
        .args([f.in_mount(1, "root.raw"), f.stored(1)]));
}

/// The layer in the middle ends within a cluster, of which the one below holds more: behind that end there is nothing, also
/// for the one above, which is longer again.
#[test]
fn a_disk_that_shrank_to_within_a_cluster_and_grew_again_reads_as_qemu_reads_it() {
    let (large, small) = (40 * CLUSTER + 1024, 20 * CLUSTER + 3 * 512);
    for at_the_end in [Shape::Plain, Shape::Compressed] {
        let shape = |n: u64| if n.is_multiple_of(2) { Shape::Plain } else { Shape::Compressed };
        let mut f = Fixture::chain(large, true, &[(0..41).map(|n| (n, shape(n))).collect()]);
        let middle: Layer = [(3, Shape::Compressed), (20, at_the_end)].into();
        for (number, (layer, size)) in
            [(middle, small), ([(30, Shape::Plain)].into(), large)].iter().enumerate()
        {
            let next = take(&f.store, &f.vm, number + 1, f.backups.last(), layer, *size, true);
            f.backups.push(next);
        }
        let _mount = f.mount(&[]);
        for of in 0..3 {
            let (raw, flat) = (f.in_mount(of, "root.raw"), f.dir.path().join("flat.raw"));
            ok(Command::new("qemu-img")
                .args(["convert", "-f", "qcow2", "-O", "raw"])
                .args([&f.stored(of), &flat]));
            assert!(fs::read(&raw).unwrap() == fs::read(&flat).unwrap(), "{at_the_end:?}, backup {of}");
        }
    }
}

#[test]
fn copies_read_and_write_the_data_only() {
    // 8 GiB with 6 MiB in it, half of them compressed, at places far from each other.
    const SIZE: u64 = 8 << 30;
    const DATA: u64 = 96 * CLUSTER;
    let place = |n: u64| n / 16 * (SIZE / CLUSTER / 6) + n % 16;
    let full: Layer =
        (0..96).map(|n| (place(n), if n % 2 == 0 { Shape::Plain } else { Shape::Compressed })).collect();
    let f = Fixture::chain(SIZE, true, &[full]);
    let raw = f.in_mount(0, "root.raw");
    let to = |name: &str| f.dir.path().join(name);
    let tar = format!(
        "tar -S -c -C '{}' root.raw | tar -S -x -C '{}'",
        raw.parent().unwrap().display(),
        f.dir.path().display()
    );
    let mut cp = Command::new("cp");
    cp.arg("--sparse=auto").args([&raw, &to("cp")]);
    let mut pipe = Command::new("bash");
    pipe.args(["-c", &format!("set -o pipefail; {tar}")]);
    let mut rsync = Command::new("rsync");
    // It knows no holes: it reads them, which costs the mount no read of the store, and makes them again.
    rsync.args(["-S", "--whole-file"]).args([&raw, &to("rsync")]);
    for (copy, mut command, reads_holes) in
        [("cp", cp, false), ("root.raw", pipe, false), ("rsync", rsync, true)]
    {
        // Mounted anew: nothing of it is in the page cache.
        let mount = f.mount(&[]);
        let before = fs::metadata(&raw).unwrap();
        assert_eq!((before.size(), before.blocks() * 512), (SIZE, DATA), "st_blocks is what is stored");
        ok(&mut command);
        let read = f.counted("read_bytes_total");
        assert!(read >= DATA, "{copy}: {read} bytes");
        // The kernel reads ahead of a reader, 4 MiB at most, at each of the six places.
        assert!(reads_holes || read <= DATA + 6 * (4 << 20), "{copy}: {read} bytes were read of {DATA}");
        let made = fs::metadata(to(copy)).unwrap();
        assert_eq!(made.size(), SIZE);
        assert!(made.blocks() * 512 <= DATA + (1 << 20), "{copy} holds {} bytes", made.blocks() * 512);
        ok(Command::new("qemu-img")
            .args(["compare", "-q", "-f", "raw", "-F", "qcow2"])
            .args([to(copy), f.stored(0)]));
        fs::remove_file(to(copy)).unwrap();
        drop(mount);
    }
}
