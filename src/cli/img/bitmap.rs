//! `img bitmap`: persistent bitmaps of an image.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, FileStorage, Format, Image, bitmap};

use super::options::{Given, long_flag, long_value, value};
use super::{Command, Done, threads, warn};
use crate::img::open::{Following, Mode, Opened, open};
use crate::img::{Failure, size};

/// Granularity of a new bitmap where none is given: the cluster size within these bounds, in bytes.
const GRANULARITY: (u64, u64) = (4096, 65536);
/// What is done to the bitmap, in the order of the line.
const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

pub const COMMAND: Command = Command {
    name: "bitmap",
    about: "Change a persistent bitmap of an image",
    usage: "(--add | --remove | --clear | --enable | --disable | --merge SOURCE)… [OPTIONS] FILENAME BITMAP",
    options: &[
        long_flag("add", "make it; it records writes from then on"),
        value('g', "granularity", "SIZE", "bytes that a bit of it stands for (with --add)"),
        long_flag("remove", "remove it"),
        long_flag("clear", "clear its bits"),
        long_flag("enable", "let it record writes"),
        long_flag("disable", "let it record no more"),
        long_value("merge", "SOURCE", "mark in it what this bitmap marks"),
        value('b', "source-file", "FILENAME", "the image of that bitmap, if it is another one"),
        value('F', "source-format", "FMT", "format of that image: qcow2"),
        value('f', "format", "FMT", "format of the image: qcow2"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let granularity = given.text("granularity")?.map(|text| {
        size::parse(text).map_err(|_| Failure::new(format!("Invalid granularity specified: '{text}'.")))
    });
    let granularity = granularity.transpose()?;
    let [image, name] = given.words.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let name = name.to_str().ok_or_else(|| Failure::new("the name of the bitmap is not UTF-8"))?;
    let actions = given.in_order(&ACTIONS)?;
    for (wrong, why) in [
        (
            actions.is_empty(),
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ),
        (granularity.is_some() && !given.has("add"), "granularity only supported with --add"),
        (given.has("source-format") && !given.has("source-file"), "-F only supported with -b"),
        (
            given.has("source-file") && !given.has("merge"),
            "Merge bitmap source file only supported with --merge",
        ),
    ] {
        if wrong {
            return Err(Failure::new(why));
        }
    }
    let opened = open(image, given.text("format")?, Mode::Write)?;
    if let Some(text) = opened.warning() {
        warn(&text);
    }
    if opened.format == Format::Qcow2 {
        // Its data file must be there. What it stands on is not looked at: bitmaps say nothing of it.
        drop(Image::open(opened.storage.clone(), &Following::new(false)).map_err(|e| opened.wrong(&e))?);
    }
    let source = given.last("source-file").map(|n| open(n, given.text("source-format")?, Mode::Read));
    let source = source.transpose()?;
    for (action, value) in actions {
        change(&opened, name, action, value, granularity, source.as_ref())
            .map_err(|f| Failure::new(format!("Operation {action} on bitmap {name} failed: {}", f.text)))?;
    }
    Ok(0)
}

fn change(
    opened: &Opened,
    name: &str,
    action: &str,
    value: &str,
    granularity: Option<u64>,
    source: Option<&Opened>,
) -> Result<(), Failure> {
    let cluster = needs_qcow2(opened)?;
    let cancel = AtomicBool::new(false);
    let control = Control { threads: threads(None), rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let image = opened.storage.clone();
    let done = match action {
        "add" => {
            let usual = cluster.clamp(GRANULARITY.0, GRANULARITY.1);
            // 0 means the usual one, as in QEMU.
            let granularity = granularity.filter(|g| *g > 0).unwrap_or(usual);
            bitmap::add(image, name, granularity, false, &control)
        }
        "remove" => bitmap::remove(image, name, &control),
        "clear" => bitmap::clear(image, name, &control),
        "enable" => bitmap::set_enabled(image, name, true, &control),
        "disable" => bitmap::set_enabled(image, name, false, &control),
        _ => {
            let source = source.unwrap_or(opened);
            needs_qcow2(source)?;
            let from: &FileStorage = &source.storage;
            bitmap::merge(image, name, from, value, &control)
        }
    };
    Ok(done?)
}

/// The image's cluster size in bytes.
fn needs_qcow2(opened: &Opened) -> Result<u64, Failure> {
    match opened.header()? {
        Some(header) if opened.format == Format::Qcow2 => Ok(header.cluster_size()),
        _ => Err(Failure::new(format!("{}: a raw image has no bitmaps", opened.path.display()))),
    }
}
