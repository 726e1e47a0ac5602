//! `img commit` and `img rebase` leave chains that show what they showed, as `qemu-img` leaves them.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod img_support;

use img_support::{Bench, zoo};

fn allocated(bench: &Bench, image: &str) -> u64 {
    let check = bench.qemu_img(&["check", "-f", "qcow2", image]);
    check.lines().find_map(|l| l.split_once('/')?.0.parse().ok()).unwrap_or(0)
}

#[test]
fn what_an_overlay_holds_goes_into_its_base() {
    let bench = Bench::new();
    zoo(&bench);
    for (image, base, format, line) in [
        ("top.qcow2", "over.qcow2", "qcow2", &["commit", "top.qcow2"][..]),
        ("top.qcow2", "over.qcow2", "qcow2", &["commit", "-q", "-d", "-f", "qcow2", "top.qcow2"]),
        ("top.qcow2", "plain.qcow2", "qcow2", &["commit", "-b", "plain.qcow2", "top.qcow2"]),
        ("over.qcow2", "plain.qcow2", "qcow2", &["commit", "-t", "none", "-r", "1G", "over.qcow2"]),
        ("over_raw.qcow2", "some.raw", "raw", &["commit", "over_raw.qcow2"]),
    ] {
        let before = bench.guest("qcow2", image);
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert!(ours.guest("qcow2", image) == before, "{line:?}");
        let (shown, wanted) = (ours.guest(format, base), theirs.guest(format, base));
        assert!(shown == wanted, "{line:?}: the base shows something else");
        assert_eq!(allocated(&ours, image), allocated(&theirs, image), "{line:?}: the overlay");
        if format == "qcow2" {
            ours.qemu_img(&["check", "-q", base]);
        }
    }
}

#[test]
fn the_base_of_a_commit_may_be_spelt_in_any_way() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "base", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "./mid", "-F", "qcow2", "top"]);
    bench.io("qcow2", "mid", &["write -P 1 0 64k"]);
    bench.io("qcow2", "top", &["write -P 2 64k 64k"]);
    // A name of a file that is there, but no one of the chain; a folder that a path goes through.
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "other", "1M"]);
    let run = |words: &[&str], folder: &str| {
        let (a, b) = (bench.copy(), bench.copy());
        let line = |copy: &Bench| -> Vec<String> {
            std::fs::create_dir(copy.path("d")).unwrap();
            std::os::unix::fs::symlink("base", copy.path("link")).unwrap();
            let here = copy.path("").to_str().unwrap().to_owned();
            words.iter().map(|word| word.replace("HERE/", &here)).collect()
        };
        let (left, right) = (line(&a), line(&b));
        let (wanted, _) =
            img_support::theirs(&left.iter().map(String::as_str).collect::<Vec<_>>(), &a.path(folder));
        let (said, errors) =
            img_support::ours(&right.iter().map(String::as_str).collect::<Vec<_>>(), &b.path(folder));
        assert_eq!(said, wanted, "{words:?} in {folder:?}: {errors}");
        for image in ["base", "mid", "top", "other"] {
            assert!(a.guest("qcow2", image) == b.guest("qcow2", image), "{words:?} in {folder:?}: {image}");
        }
        said.code
    };
    for (base, code) in [
        ("base", 0),
        ("./base", 0),
        ("HERE/base", 0),
        ("d/../base", 0),
        ("link", 0),
        ("mid", 0),
        ("HERE/./mid", 0),
        ("top", 1),
        ("./top", 1),
        ("other", 1),
        ("d/base", 1),
        ("", 1),
        ("file:base", 1),
    ] {
        assert_eq!(run(&["commit", "-b", base, "top"], ""), Some(code), "{base}");
        // Seen from the image, wherever the program runs.
        assert_eq!(run(&["commit", "-b", base, "../top"], "d"), Some(code), "{base} from elsewhere");
    }
    assert_eq!(run(&["commit", "-b", "../base", "../top"], "d"), Some(1));
}

#[test]
fn an_image_shows_the_same_on_another_backing_file() {
    let bench = Bench::new();
    zoo(&bench);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "other.qcow2", "8M"]);
    bench.io("qcow2", "other.qcow2", &["write -P 0x55 0 1M", "write -P 1 64k 64k", "write -P 0x56 3M 5M"]);
    let before = bench.guest("qcow2", "top.qcow2");
    for line in [
        &["rebase", "-b", "plain.qcow2", "-F", "qcow2", "top.qcow2"][..],
        &["rebase", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"],
        &["rebase", "-b", "some.raw", "-F", "raw", "-f", "qcow2", "top.qcow2"],
        &["rebase", "-b", "", "top.qcow2"],
        &["rebase", "-c", "-q", "-b", "", "top.qcow2"],
        &["rebase", "-c", "-b", "other.qcow2", "-F", "qcow2", "-t", "none", "-T", "none", "top.qcow2"],
        &["rebase", "-b", "over.qcow2", "-F", "qcow2", "top.qcow2"],
        &["rebase", "-b", "plain.qcow2", "-F", "qcow2", "sub.qcow2"],
        &["rebase", "-b", "other.qcow2", "-F", "qcow2", "v2.qcow2"],
        &["rebase", "-b", "other.qcow2", "-F", "qcow2", "external.qcow2"],
    ] {
        let image = *line.last().unwrap();
        let before = if image == "top.qcow2" { before.clone() } else { bench.guest("qcow2", image) };
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        assert!(ours.guest("qcow2", image) == before, "{line:?}");
        ours.qemu_img(&["check", "-q", image]);
        let backing = |b: &Bench| {
            let info = b.qemu_img(&["info", image]);
            info.lines().filter(|l| l.starts_with("backing file")).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(backing(&ours), backing(&theirs), "{line:?}");
        // QEMU does not write the zeros that an image of version 2 without backing file showed.
        let right = image != "v2.qcow2";
        assert!(!right || allocated(&ours, image) <= allocated(&theirs, image), "{line:?}: more was copied");
    }
}

#[test]
fn an_unsafe_rebase_changes_the_name_alone() {
    let bench = Bench::new();
    zoo(&bench);
    for line in [
        &["rebase", "-u", "-b", "missing", "-F", "raw", "top.qcow2"][..],
        &["rebase", "-u", "-b", "", "top.qcow2"],
        &["rebase", "-u", "top.qcow2"],
    ] {
        let (theirs, ours, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(0), "{line:?}");
        let info = |b: &Bench| b.qemu_img(&["info", "--output=json", "top.qcow2"]);
        let names = |text: &str| text.lines().filter(|l| l.contains("backing")).collect::<String>();
        assert_eq!(names(&info(&ours)), names(&info(&theirs)), "{line:?}");
    }
}

#[test]
fn wrong_wishes_are_refused_alike() {
    let bench = Bench::new();
    zoo(&bench);
    for line in [
        &["commit"][..],
        &["commit", "plain.qcow2"],
        &["commit", "-f", "raw", "some.raw"],
        &["commit", "-b", "missing", "top.qcow2"],
        &["commit", "-b", "some.raw", "top.qcow2"],
        &["commit", "-r", "x", "top.qcow2"],
        &["commit", "-t", "nonsense", "top.qcow2"],
        &["rebase", "top.qcow2"],
        &["rebase", "-b", "plain.qcow2", "top.qcow2"],
        &["rebase", "-u", "-b", "missing", "top.qcow2"],
        &["rebase", "-b", "missing", "-F", "qcow2", "top.qcow2"],
        &["rebase", "-b", "plain.qcow2", "-F", "nonsense", "top.qcow2"],
        &["rebase", "-b", "plain.qcow2", "-F", "qcow2", "some.raw"],
        &["rebase", "-b", "top.qcow2", "-F", "qcow2", "top.qcow2"],
    ] {
        let (_, _, said) = bench.same_changes(line);
        assert_eq!(said.code, Some(1), "{line:?}");
    }
}
