//! `img commit`: what an overlay holds goes into an image that it stands on.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Format, ImageMut, PlainPaths};

use super::options::{Given, flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, rate, say, threads};
use crate::img::open::{Following, Mode, format, open};
use crate::img::{Failure, name};

pub const COMMAND: Command = Command {
    name: "commit",
    about: "Write what an image holds into its backing file",
    usage: "[OPTIONS] FILENAME",
    options: &[
        value('f', "format", "FMT", "format of the image: qcow2"),
        value('b', "base", "FILENAME", "write into this image of its chain instead (implies -d)"),
        flag('d', "drop", "do not empty the image afterwards"),
        value('r', "rate", "RATE", "at most so many bytes a second"),
        value('t', "cache", "CACHE", "accepted; what is written is durable at the end"),
        flag('p', "progress", "show progress"),
        flag('q', "quiet", "print errors only"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let image = given.one_name()?;
    check_cache(given, "cache")?;
    let rate = rate(given)?;
    // Nobody else may have it open; the engine takes its own locks for the work.
    let opened = open(image, given.text("format")?, Mode::Write)?;
    let progress = Progress::of(given, 1.0);
    progress.begin();
    let path = opened.path.clone();
    if opened.header()?.is_none_or(|h| h.backing.is_none()) {
        return Err(Failure::new("Image does not have a backing file"));
    }
    drop(opened);
    let wanted = given.text("base")?;
    let (base, base_format) = base(&path, wanted)?;
    let chain = open(image, Some(Format::Qcow2.name()), Mode::Read)?.chain(&Following::new(false))?;
    let total = chain.size();
    drop(chain);
    let cancel = AtomicBool::new(false);
    let control = Control {
        threads: threads(None),
        rate_limit: rate,
        cancel: &cancel,
        progress: &|done| progress.at(done, total),
    };
    knib_qcow::commit(&path, &base, base_format, &control)?;
    if wanted.is_none() && !given.has("drop") {
        let overlay = open(image, Some(Format::Qcow2.name()), Mode::Write)?;
        ImageMut::open_over(overlay.storage, &PlainPaths, None)?.make_empty()?;
    }
    progress.end();
    if !given.has("quiet") {
        say("Image committed.\n")?;
    }
    Ok(0)
}

/// The image to write into, and its format as the one above it names it: the first below, or the one that was named.
fn base(image: &Path, wanted: Option<&str>) -> Result<(PathBuf, Format), Failure> {
    let missing = |wanted: &str| {
        Failure::new(format!("Did not find '{wanted}' in the backing chain of '{}'", image.display()))
    };
    let mut at = image.to_owned();
    for _ in 0..knib_qcow::chain::MAX_DEPTH {
        let opened = open(at.as_os_str(), Some(Format::Qcow2.name()), Mode::Shared)?;
        let Some((header, backing)) = opened.header()?.and_then(|h| Some((h.clone(), h.backing?))) else {
            break;
        };
        let named = header.backing_format.ok_or_else(|| {
            Failure::new(format!(
                "'{}' names the backing file '{backing}' without its format, which is never guessed: set it with rebase -u -F FORMAT -b {backing}",
                at.display()
            ))
        })?;
        let below = name::file(name::combine(&at, &backing).as_ref())?;
        let format = format(&named)?;
        if wanted.is_none_or(|wanted| is_named(&at, &backing, wanted)) {
            return Ok((below, format));
        }
        if format == Format::Raw {
            break;
        }
        at = below;
    }
    Err(missing(wanted.unwrap_or("its backing file")))
}

/// Whether `wanted` names the backing file that `image` names `backing`: as QEMU reads it, a path is relative to the
/// image whose backing file it is, and any spelling of it will do; what has a protocol must be spelt alike.
fn is_named(image: &Path, backing: &str, wanted: &str) -> bool {
    if name::protocol(wanted).is_some() || name::protocol(backing).is_some() {
        return wanted == backing;
    }
    let real = |named: &str| std::fs::canonicalize(name::combine(image, named)).ok();
    real(wanted).is_some_and(|wanted| Some(wanted) == real(backing))
}
