//! The power fails while several files change together: an overlay and its base, an image and its data file. And while
//! an image is made: then there is none, or all of it.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::volatile::{Volatile, WorkOnFiles, every_cut, every_cut_of};
use common::{Random, content, qemu_img, qemu_io, quiet, report_of, s, shown, temp};
use knib_qcow::{
    Access, Before, Chain, ChainSource, Compression, CompressionType, CreateOptions, Error, Format, Gate,
    Header, ImageMut, Implicit, NewImage, NoImplicit, NoObserver, Preallocation, Sink, Storage,
    commit_layers, create_with, resize, write_image, write_raw,
};

/// The files of a test, by the names that their headers give.
struct Shelf(Vec<(Arc<Volatile>, Format)>);

impl Shelf {
    fn find(&self, name: &str) -> Arc<Volatile> {
        let found = self.0.iter().find(|(file, _)| file.path() == Path::new(name));
        found.map(|(file, _)| file.clone()).unwrap_or_else(|| panic!("a header names {name}"))
    }
}

impl Gate for Shelf {
    fn open(
        &self,
        _: &Path,
        _: Implicit,
        name: &str,
        format: Option<&str>,
    ) -> knib_qcow::Result<(Arc<dyn Storage>, Format)> {
        Ok((self.find(name), format.and_then(Format::from_name).unwrap_or(Format::Raw)))
    }
    fn open_data(&self, _: &Path, name: &str, _: Access) -> knib_qcow::Result<Arc<dyn Storage>> {
        Ok(self.find(name))
    }
}

fn shelf(files: &[Arc<Volatile>]) -> Shelf {
    Shelf(files.iter().map(|file| (file.clone(), Format::Raw)).collect())
}

/// Files as they survived, and the shelf with them.
fn survivors(names: &[&str], files: Vec<Vec<u8>>) -> (Vec<Arc<Volatile>>, Shelf) {
    let power = common::volatile::Power::new(u64::MAX);
    let files: Vec<_> =
        names.iter().zip(files).map(|(name, bytes)| Volatile::named(name, bytes, &power)).collect();
    let shelf = shelf(&files);
    (files, shelf)
}

fn seen(storage: Arc<Volatile>, format: Format, gate: &dyn Gate) -> Vec<u8> {
    let chain = Chain::from_storage(storage, format, gate).unwrap();
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn sound(storage: Arc<Volatile>, gate: &dyn Gate) -> bool {
    let image = knib_qcow::Image::open(storage, gate).unwrap();
    let found = quiet(|control| knib_qcow::check(&image, control)).unwrap();
    assert_eq!(found.corruptions, 0, "{:?}", found.messages);
    found.is_clean()
}

#[test]
fn a_disk_shows_the_same_while_its_overlay_is_committed_and_emptied() {
    let (_dir, at) = temp();
    let kinds = [
        ("raw", "cluster_size=4k", "cluster_size=16k"),
        ("qcow2", "cluster_size=512,refcount_bits=64", "cluster_size=4k,compression_type=zstd"),
        ("qcow2", "cluster_size=16k,extended_l2=on", "cluster_size=512"),
        ("qcow2", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"),
    ];
    for (format, below, above) in kinds {
        let (base, top) = (at("base"), at("top"));
        if format == "raw" {
            qemu_img(&["create", "-q", "-f", "raw", s(&base), "300k"]);
            qemu_io(&base, &["write -P 1 0 200k"]);
        } else {
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", below, s(&base), "300k"]);
            qemu_io(&base, &["write -P 1 0 150k", "write -c -P 2 192k 64k"]);
            qemu_img(&["snapshot", "-c", "one", s(&base)]);
            qemu_io(&base, &["write -P 3 100k 20k"]);
        }
        let line =
            ["create", "-q", "-f", "qcow2", "-o", above, "-b", s(&base), "-F", format, s(&top), "400k"];
        qemu_img(&line);
        qemu_io(
            &top,
            &["write -P 4 10k 30k", "write -z 64k 80k", "write -c -P 5 192k 64k", "write -P 6 390k 5k"],
        );
        let model = content(&top, Format::Qcow2);
        qemu_img(&["rebase", "-u", "-b", "base", "-F", format, s(&top)]);
        let names = ["top", "base"];
        let start: Vec<(&str, Vec<u8>)> = names.map(|n| (n, std::fs::read(at(n)).unwrap())).into();
        let format = Format::from_name(format).unwrap();
        let work = |files: &[Arc<Volatile>]| {
            let gate = shelf(files);
            let chain = Chain::from_storage(files[0].clone(), Format::Qcow2, &gate)?;
            quiet(|c| commit_layers(&chain, 1, files[1].clone(), format, &gate, c))?;
            ImageMut::open_over(files[0].clone(), &gate, None)?.make_empty()
        };
        let end = every_cut_of(&start, &work, &mut |cut, files| {
            let (files, gate) = survivors(&names, files);
            sound(files[0].clone(), &gate);
            if format == Format::Qcow2 {
                sound(files[1].clone(), &gate);
            }
            assert!(seen(files[0].clone(), Format::Qcow2, &gate) == model, "{below}, {above}, cut {cut}");
        });
        let (files, gate) = survivors(&names, end);
        assert!(seen(files[1].clone(), format, &gate) == model, "{below}, {above}: not durable in the base");
        assert!(seen(files[0].clone(), Format::Qcow2, &gate) == model);
        let emptied = knib_qcow::Image::open(files[0].clone(), &gate).unwrap();
        let found = quiet(|control| knib_qcow::check(&emptied, control)).unwrap();
        assert!(found.is_clean(), "{above}: a leak");
        assert_eq!(found.usage.allocated, 0, "{above}: not durably empty");
        assert!(format == Format::Raw || sound(files[1].clone(), &gate), "{below}: a leak");
    }
}

type Work<'a> = &'a dyn Fn(Arc<dyn Storage>, &Shelf) -> Result<(), Error>;

#[test]
fn a_disk_in_an_external_data_file_shows_what_was_or_what_is_to_be() {
    let (_dir, at) = temp();
    let (path, names) = (at("image"), ["image", "data"]);
    let write = |storage: Arc<dyn Storage>, gate: &Shelf| -> Result<(), Error> {
        let mut image = ImageMut::open(storage, gate)?;
        image.write_at(&[7; 40_000], 30_000)?;
        image.flush()?;
        image.write_zeroes(100_000, 30_000)?;
        image.discard(0, 20 << 10)?;
        image.write_at(&[8; 30_000], 150_000)?;
        image.flush()
    };
    let works: [Work; 4] = [
        &write,
        &|storage, gate| quiet(|c| resize(storage, gate, 100_352, true, Preallocation::Off, c)),
        &|storage, gate| quiet(|c| resize(storage, gate, 400_384, false, Preallocation::Metadata, c)),
        &|storage, gate| ImageMut::open(storage, gate)?.make_empty(),
    ];
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=512,data_file_raw=on"]
    {
        let options = format!("{options},data_file={}", s(&at("data")));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, s(&path), "250k"]);
        qemu_io(&path, &["write -P 1 0 60k", "write -P 2 100k 40k", "write -z 20k 10k"]);
        qemu_img(&["amend", "-f", "qcow2", "-o", "data_file=data", s(&path)]);
        let start: Vec<(&str, Vec<u8>)> = names.map(|n| (n, std::fs::read(at(n)).unwrap())).into();
        for (n, work) in works.into_iter().enumerate() {
            let show = |files: Vec<Vec<u8>>| {
                let (files, gate) = survivors(&names, files);
                let clean = sound(files[0].clone(), &gate);
                (seen(files[0].clone(), Format::Qcow2, &gate), clean)
            };
            let run = |files: &[Arc<Volatile>]| work(files[0].clone(), &shelf(files));
            let (old, _) = show(start.iter().map(|(_, bytes)| bytes.clone()).collect());
            let (whole, gate) = survivors(&names, start.iter().map(|(_, bytes)| bytes.clone()).collect());
            work(whole[0].clone(), &gate).unwrap();
            let (new, _) = show(whole.iter().map(|file| file.now()).collect());
            let end = every_cut_of(&start, &run, &mut |cut, files| {
                let (shows, _) = show(files);
                let byte = |of: &[u8], at: usize| of.get(at).copied().unwrap_or(0);
                let odd =
                    (0..shows.len()).find(|i| shows[*i] != byte(&old, *i) && shows[*i] != byte(&new, *i));
                assert_eq!(odd, None, "{options}, work {n}, cut {cut}: a byte that was never there");
            });
            let (shows, clean) = show(end);
            assert!(clean && shows == new, "{options}, work {n}: not durable at the end");
        }
    }
}

#[test]
fn layers_of_which_one_has_an_external_data_file_show_the_same_while_they_are_merged_and_moved() {
    let (_dir, at) = temp();
    let names = ["top", "image", "data", "base", "other"];
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on"] {
        let path = |name: &str| s(&at(name)).to_owned();
        qemu_img(&["create", "-q", "-f", "raw", &path("base"), "200k"]);
        qemu_io(&at("base"), &["write -P 1 0 120k"]);
        qemu_img(&["create", "-q", "-f", "raw", &path("other"), "150k"]);
        qemu_io(&at("other"), &["write -P 1 0 40k", "write -P 9 100k 50k"]);
        let apart = format!("{options},data_file={}", path("data"));
        let over = ["create", "-q", "-f", "qcow2", "-b"];
        qemu_img(&[&over[..], &[&path("base"), "-F", "raw", "-o", &apart, &path("image"), "250k"]].concat());
        qemu_io(&at("image"), &["write -P 2 30k 40k", "write -z 90k 20k", "write -P 3 240k 10k"]);
        qemu_img(&[&over[..], &[&path("image"), "-F", "qcow2", "-o", options, &path("top")]].concat());
        qemu_io(&at("top"), &["write -P 4 20k 30k", "write -z 64k 10k", "write -P 5 180k 66k"]);
        let models = ["top", "image"].map(|name| content(&at(name), Format::Qcow2));
        qemu_img(&["rebase", "-u", "-b", "image", "-F", "qcow2", &path("top")]);
        qemu_img(&["rebase", "-u", "-b", "base", "-F", "raw", &path("image")]);
        qemu_img(&["amend", "-f", "qcow2", "-o", "data_file=data", &path("image")]);
        let start: Vec<(&str, Vec<u8>)> = names.map(|n| (n, std::fs::read(at(n)).unwrap())).into();
        let commit = |files: &[Arc<Volatile>], from: usize, into: usize, format| {
            let gate = shelf(files);
            let chain = Chain::from_storage(files[from].clone(), Format::Qcow2, &gate)?;
            quiet(|c| commit_layers(&chain, 1, files[into].clone(), format, &gate, c))?;
            ImageMut::open_over(files[from].clone(), &gate, None)?.make_empty()
        };
        let move_to = |files: &[Arc<Volatile>], to| {
            quiet(|c| knib_qcow::rebase(files[1].clone(), to, None, &shelf(files), c))
        };
        // With the number of the image that is to show the same.
        let works: [(usize, WorkOnFiles); 4] = [
            (0, &|files| commit(files, 0, 1, Format::Qcow2)),
            (1, &|files| commit(files, 1, 3, Format::Raw)),
            (1, &|files| move_to(files, Some(("other", Format::Raw)))),
            (1, &|files| move_to(files, None)),
        ];
        for (n, (shown, work)) in works.into_iter().enumerate() {
            let judge = |files: Vec<Vec<u8>>, when: &str| {
                let (files, gate) = survivors(&names, files);
                let clean = [0, 1].map(|n| sound(files[n].clone(), &gate));
                let shows = seen(files[shown].clone(), Format::Qcow2, &gate);
                assert!(shows == models[shown], "{options}, work {n}, {when}");
                clean == [true, true]
            };
            let end = every_cut_of(&start, work, &mut |cut, files| {
                judge(files, &format!("cut {cut}"));
            });
            assert!(judge(end, "not durable at the end"), "{options}, work {n}: a leak");
        }
    }
}

#[test]
fn an_image_in_the_making_is_none_or_whole() {
    let (_dir, at) = temp();
    let path = at("old");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", s(&path), "300k"]);
    qemu_io(&path, &["write -P 1 0 200k"]);
    let old = std::fs::read(&path).unwrap();
    let mut guest = vec![0; 300 << 10];
    guest[50_000..150_000].fill(9);
    std::fs::write(at("guest"), &guest).unwrap();
    let from = Chain::open(&at("guest"), Format::Raw, &NoImplicit).unwrap();
    // Enough to be written past the page cache, beside the work.
    let mut random = Random(7);
    let large: Vec<u8> = (0..5 << 20).map(|_| random.below(256) as u8).collect();
    std::fs::write(at("large"), &large).unwrap();
    let from_large = Chain::open(&at("large"), Format::Raw, &NoImplicit).unwrap();
    let options = CreateOptions { size: 300 << 10, cluster_bits: 9, ..CreateOptions::default() };
    let written = |from: &Chain, compression| NewImage {
        size: from.size(),
        cluster_bits: 12,
        compression,
        backing: None,
    };
    let zstd = Compression { kind: CompressionType::Zstd, level: 3 };
    let fill = |dest: Arc<dyn Storage>, from: &Chain, compression| {
        let new = written(from, compression);
        quiet(|c| write_image(dest, &new, &ChainSource::whole(from, 4096), &NoObserver, c)).map(|_| ())
    };
    type Make<'a> = (&'a dyn Fn(Arc<dyn Storage>) -> Result<(), Error>, Vec<u8>, bool);
    let works: [Make; 5] = [
        (&|dest| create_with(dest, &options), vec![0; 300 << 10], true),
        (&|dest| fill(dest, &from, None), guest.clone(), false),
        (&|dest| fill(dest, &from, Some(zstd)), guest.clone(), false),
        (&|dest| fill(dest, &from_large, None), large.clone(), false),
        (&|dest| fill(dest, &from_large, Some(zstd)), large.clone(), false),
    ];
    for (n, (work, want, over_another)) in works.into_iter().enumerate() {
        for before in [Vec::new(), old.clone()].into_iter().take(1 + usize::from(over_another)) {
            let end = every_cut(&before, &|dest| work(dest), &mut |cut, survivor| {
                if survivor == before {
                    return;
                }
                let storage = Volatile::new(survivor, u64::MAX);
                if Header::parse(&*storage).is_ok() {
                    assert_eq!(report_of(storage.clone()).unwrap().corruptions, 0, "work {n}, cut {cut}");
                    assert!(shown(storage) == want, "work {n}, cut {cut}");
                }
            });
            let end = Volatile::new(end, u64::MAX);
            assert!(report_of(end.clone()).unwrap().is_clean() && shown(end) == want, "work {n}");
        }
    }
    let source = ChainSource::whole(&from, 4096);
    let raw = |dest: Arc<dyn Storage>| quiet(|c| write_raw(dest, from.size(), &source, c)).map(|_| ());
    assert!(every_cut(&[], &raw, &mut |_, _| {}) == guest, "a raw image is not durable at the end");
    let over = |format| {
        let source = &source;
        move |dest: Arc<dyn Storage>| {
            let before = Before { zeros: false, backed: false, sparse: 4096 };
            let mut sink = Sink::new(dest, format, None, &NoImplicit)?;
            quiet(|c| sink.fill(source, 300 << 10, before, c))
        }
    };
    assert!(every_cut(&vec![5; 300 << 10], &over(Format::Raw), &mut |_, _| {}) == guest);
    let end = every_cut(&old, &over(Format::Qcow2), &mut |cut, survivor| {
        assert_eq!(report_of(Volatile::new(survivor, u64::MAX)).unwrap().corruptions, 0, "cut {cut}");
    });
    assert!(shown(Volatile::new(end, u64::MAX)) == guest);
}
