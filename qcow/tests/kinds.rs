//! Images of every kind that are made, preallocated and filled in place.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::os::unix::fs::MetadataExt as _;

use common::{Random, checked, content, history, qemu_img, qemu_io, rw, s, same_as_model, temp};
use knib_qcow::codec::Compressor;
use knib_qcow::{
    Compression, CompressionType, CreateOptions, FileStorage, Format, Preallocation, create_with,
};

fn options() -> CreateOptions {
    CreateOptions { size: 5_000_704, ..CreateOptions::default() }
}

/// Every kind that is made, with what QEMU is to say of it.
fn kinds() -> Vec<(CreateOptions, &'static [&'static str])> {
    vec![
        (options(), &["\"compat\": \"1.1\"", "\"refcount-bits\": 16", "\"compression-type\": \"zlib\""]),
        (CreateOptions { version: 2, ..options() }, &["\"compat\": \"0.10\""]),
        (CreateOptions { refcount_order: 0, cluster_bits: 9, ..options() }, &["\"refcount-bits\": 1,"]),
        (CreateOptions { refcount_order: 6, cluster_bits: 9, ..options() }, &["\"refcount-bits\": 64"]),
        (CreateOptions { lazy_refcounts: true, ..options() }, &["\"lazy-refcounts\": true"]),
        (CreateOptions { extended_l2: true, cluster_bits: 14, ..options() }, &["\"extended-l2\": true"]),
        (
            CreateOptions { compression: CompressionType::Zstd, cluster_bits: 21, ..options() },
            &["\"compression-type\": \"zstd\"", "\"cluster-size\": 2097152"],
        ),
    ]
}

#[test]
fn images_of_every_kind_are_made_and_changed() {
    let (_dir, at) = temp();
    for (n, (options, says)) in kinds().into_iter().enumerate() {
        let path = at(&format!("{n}.qcow2"));
        create_with(FileStorage::create_new(&path).unwrap(), &options).unwrap();
        checked(&path);
        let info = qemu_img(&["info", "--output=json", s(&path)]);
        for want in says {
            assert!(info.contains(want), "{want}: {info}");
        }
        history(&path, n as u64 + 5, 60, options.version);
        qemu_io(&path, &["write -P 7 1M 100k"]);
        checked(&path);
        assert!(content(&path, Format::Qcow2)[1 << 20..(1 << 20) + 102_400].iter().all(|b| *b == 7));
    }
}

#[test]
fn an_image_with_a_data_file_is_made() {
    let (_dir, at) = temp();
    for raw in [false, true] {
        let (path, data) = (at(&format!("{raw}.qcow2")), at(&format!("{raw}.data")));
        // QEMU looks for a relative name in the folder in which it runs.
        let name = s(&data).to_owned();
        std::fs::File::create_new(&data).unwrap().set_len(options().size).unwrap();
        let options = CreateOptions { data_file: Some((name, raw)), ..options() };
        create_with(FileStorage::create_new(&path).unwrap(), &options).unwrap();
        checked(&path);
        let info = qemu_img(&["info", "--output=json", s(&path)]);
        assert!(info.contains(&format!("\"data-file-raw\": {raw}")), "{info}");
        history(&path, 3, 60, 3);
        if raw {
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", s(&path), s(&data)]);
        }
    }
}

#[test]
fn what_qcow2_does_not_allow_is_refused_and_nothing_is_made() {
    let (_dir, at) = temp();
    let path = at("a");
    let dest = FileStorage::create_new(&path).unwrap();
    for wrong in [
        CreateOptions { version: 1, ..options() },
        CreateOptions { version: 2, refcount_order: 3, ..options() },
        CreateOptions { version: 2, extended_l2: true, ..options() },
        CreateOptions { version: 2, compression: CompressionType::Zstd, ..options() },
        CreateOptions { cluster_bits: 8, ..options() },
        CreateOptions { cluster_bits: 22, ..options() },
        CreateOptions { cluster_bits: 13, extended_l2: true, ..options() },
        CreateOptions { refcount_order: 7, ..options() },
        CreateOptions { size: u64::MAX, ..options() },
        CreateOptions { data_file: Some((String::new(), false)), ..options() },
        CreateOptions { data_file: Some(("x".repeat(1024), false)), ..options() },
        CreateOptions {
            data_file: Some(("d".into(), true)),
            backing: Some(("b".into(), Format::Raw)),
            ..options()
        },
    ] {
        create_with(dest.clone(), &wrong).unwrap_err();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "{wrong:?}");
    }
}

#[test]
fn preallocated_images_read_as_zeros_and_take_the_space_that_was_asked_for() {
    let (_dir, at) = temp();
    for (n, (options, _)) in kinds().into_iter().enumerate() {
        for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let path = at(&format!("{n}{how:?}.qcow2"));
            create_with(FileStorage::create_new(&path).unwrap(), &options).unwrap();
            let mut image = rw(&path).unwrap();
            image.preallocate(0..options.size, how).unwrap();
            drop(image);
            checked(&path);
            same_as_model(&path, &vec![0; options.size as usize]);
            let meta = std::fs::metadata(&path).unwrap();
            assert!(meta.len() >= options.size, "{how:?}: {}", meta.len());
            let space = meta.blocks() * 512;
            assert_eq!(space >= options.size, how != Preallocation::Metadata, "{how:?}: {space}");
            // All has its place already: writing takes no more clusters.
            qemu_io(&path, &["write -P 7 0 5000704"]);
            checked(&path);
            assert!(std::fs::metadata(&path).unwrap().len() < meta.len() + (1 << options.cluster_bits));
        }
    }
}

#[test]
fn preallocation_clears_what_free_clusters_held_and_spares_what_is_written() {
    let (_dir, at) = temp();
    let path = at("a.qcow2");
    create_with(FileStorage::create_new(&path).unwrap(), &options()).unwrap();
    let mut image = rw(&path).unwrap();
    let mut model = vec![0u8; options().size as usize];
    model[1 << 20..(1 << 20) + 70_000].fill(9);
    image.write_at(&model[1 << 20..(1 << 20) + 70_000], 1 << 20).unwrap();
    image.flush().unwrap();
    drop(image);
    // Free clusters with something in them.
    let len = std::fs::metadata(&path).unwrap().len();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(len as usize + 300_000, 0xcc);
    std::fs::write(&path, bytes).unwrap();
    let mut image = rw(&path).unwrap();
    image.preallocate(0..options().size, Preallocation::Metadata).unwrap();
    drop(image);
    same_as_model(&path, &model);
    checked(&path);
}

#[test]
fn an_overlay_is_preallocated_only_where_it_goes_on_to_show_its_backing_file() {
    let (_dir, at) = temp();
    std::fs::write(at("base"), vec![5u8; 5_000_704]).unwrap();
    let plain = CreateOptions { backing: Some(("base".into(), Format::Raw)), ..options() };
    create_with(FileStorage::create_new(&at("plain")).unwrap(), &plain).unwrap();
    let error = rw(&at("plain")).unwrap().preallocate(0..1 << 20, Preallocation::Metadata).unwrap_err();
    assert!(error.to_string().contains("extended L2"), "{error}");
    create_with(FileStorage::create_new(&at("sub")).unwrap(), &CreateOptions { extended_l2: true, ..plain })
        .unwrap();
    let mut image = rw(&at("sub")).unwrap();
    image.preallocate(0..5_000_704, Preallocation::Metadata).unwrap();
    drop(image);
    same_as_model(&at("sub"), &vec![5u8; 5_000_704]);
    checked(&at("sub"));
}

#[test]
fn compressed_clusters_are_packed_into_an_image_in_place() {
    let (_dir, at) = temp();
    let mut random = Random(5);
    for (n, (options, _)) in kinds().into_iter().enumerate() {
        let path = at(&format!("{n}.qcow2"));
        create_with(FileStorage::create_new(&path).unwrap(), &options).unwrap();
        let how = Compression { kind: options.compression, level: 3 };
        let mut compressor = Compressor::new(how).unwrap();
        let mut image = rw(&path).unwrap();
        let cluster = 1usize << options.cluster_bits;
        let mut model = vec![0u8; options.size as usize];
        let model_len = model.len();
        // Twice, so that what was written is replaced; every fifth cluster is noise, every seventh is changed plain.
        for round in 0..2 {
            for (i, part) in model.chunks_mut(cluster).enumerate() {
                for (j, byte) in part.iter_mut().enumerate() {
                    *byte = if i % 5 == 0 || j % 16 == 0 { random.next() as u8 } else { round };
                }
                image.write_compressed(&mut compressor, part, (i * cluster) as u64).unwrap();
                if i % 7 == 3 {
                    part[..100].fill(1);
                    image.write_at(&part[..100], (i * cluster) as u64).unwrap();
                }
                if i % (model_len / cluster / 8 + 3) == 2 {
                    image.flush().unwrap();
                }
            }
        }
        image.flush().unwrap();
        drop(image);
        same_as_model(&path, &model);
        checked(&path);
        let len = std::fs::metadata(&path).unwrap().len();
        assert!(
            cluster > 1 << 16 || options.refcount_order == 0 || len < options.size * 4 / 5,
            "{options:?}: {len}"
        );
    }
}
