//! `img rebase`: another backing file.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Compression, CompressionType, Control, Format};

use super::options::{Given, flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, threads, warn};
use crate::img::open::{Following, Mode, format, open};
use crate::img::{Failure, name};

/// Level of clusters that are compressed.
const LEVEL: u32 = 3;

pub const COMMAND: Command = Command {
    name: "rebase",
    about: "Give an image another backing file",
    usage: "[OPTIONS] -b BACKING_FILENAME -F BACKING_FMT FILENAME",
    options: &[
        value('f', "format", "FMT", "format of the image: qcow2"),
        value('b', "backing", "FILENAME", "the new backing file; '' for none"),
        value('F', "backing-format", "FMT", "its format; it is never guessed"),
        flag('u', "backing-unsafe", "only change the name: nothing is read or copied"),
        flag('c', "compress", "compress the clusters that are copied"),
        value('t', "cache", "CACHE", "accepted; what is written is durable at the end"),
        value('T', "backing-cache", "CACHE", "accepted; reads go through the page cache"),
        flag('p', "progress", "show progress"),
        flag('q', "quiet", "print errors only"),
        flag('U', "force-share", "accepted with -u alone"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let image = given.one_name()?;
    let backing = given.text("backing")?;
    let unsafely = given.has("backing-unsafe");
    if backing.is_none() && !unsafely {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let progress = Progress::of(given, 1.0);
    progress.begin();
    check_cache(given, "cache")?;
    check_cache(given, "backing-cache")?;
    let backing = backing.filter(|b| !b.is_empty());
    let of = given.text("backing-format")?;
    let known = of
        .map(format)
        .transpose()
        .map_err(|_| Failure::new(format!("Invalid format name: '{}'", of.unwrap_or(""))))?;
    let opened = open(image, given.text("format")?, Mode::Write)?;
    if let Some(text) = opened.warning() {
        warn(&text);
    }
    let refused = |why: &str| {
        Failure::new(format!("Could not change the backing file to '{}': {why}", backing.unwrap_or("")))
    };
    if opened.format == Format::Raw {
        return Err(refused("Operation not supported (a raw image has none)"));
    }
    let new = match (backing, known) {
        (None, _) => None,
        (Some(file), Some(format)) => Some((file, format)),
        (Some(_), None) => return Err(refused("backing format must be specified (-F)")),
    };
    if unsafely {
        // The engine opens it anew.
        let path = opened.path.clone();
        drop(opened);
        knib_qcow::set_backing(&path, new.map(|(file, _)| file), new.map(|(_, format)| format))?;
        progress.end();
        return Ok(0);
    }
    if let Some((file, format)) = new {
        let full = name::combine(&opened.path, file);
        drop(
            open(full.as_ref(), Some(format.name()), Mode::Read)
                .map_err(|f| Failure::new(format!("Could not open new backing file '{file}': {}", f.text)))?,
        );
    }
    let gate = Following::new(false);
    let total = opened.header()?.map_or(0, |h| h.size);
    let cancel = AtomicBool::new(false);
    let control = Control {
        threads: threads(None),
        rate_limit: None,
        cancel: &cancel,
        progress: &|done| progress.at(done, total),
    };
    let compression =
        given.has("compress").then_some(Compression { kind: CompressionType::Deflate, level: LEVEL });
    knib_qcow::rebase(opened.storage.clone(), new, compression, &gate, &control)
        .map_err(|e| opened.wrong(&e))?;
    progress.end();
    Ok(0)
}
