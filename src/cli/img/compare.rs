//! `img compare`: whether two images show the same bytes.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Layers, Status};

use super::options::{Given, flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, say, threads};
use crate::img::Failure;
use crate::img::open::{Following, Mode, Opened, open};

/// They differ.
const DIFFERENT: u8 = 1;
/// One could not be opened.
const NOT_OPENED: u8 = 2;
/// What is allocated could not be found out.
const NO_STATUS: u8 = 3;
/// Data could not be read.
const NOT_READ: u8 = 4;
/// Offsets of differences are those of sectors.
const SECTOR: u64 = 512;

pub const COMMAND: Command = Command {
    name: "compare",
    about: "Compare what two images show",
    usage: "[OPTIONS] FILENAME1 FILENAME2",
    options: &[
        value('f', "a-format", "FMT", "format of the first image: raw or qcow2"),
        value('F', "b-format", "FMT", "format of the second image"),
        flag('s', "strict", "sizes and what is allocated must be the same too"),
        value('T', "cache", "CACHE_MODE", "accepted; reads go through the page cache"),
        flag('p', "progress", "show progress"),
        flag('q', "quiet", "print errors only"),
        flag('U', "force-share", "read though another process may write"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let [first, second] = given.words.as_slice() else {
        return Err(Failure::usage("Expecting two image file names"));
    };
    // Its line ends without the full hundred, as the result stands before it.
    let progress = Progress::of(given, 2.0);
    check_cache(given, "cache").map_err(|f| f.with_code(NOT_OPENED))?;
    let share = given.has("force-share");
    let opened = |name, of| -> Result<Opened, Failure> {
        open(name, given.text(of)?, Mode::reading(share)).map_err(|f| f.with_code(NOT_OPENED))
    };
    let (a, b) = (opened(first, "a-format")?, opened(second, "b-format")?);
    let gate = Following::new(share);
    let chain = |o: &Opened| o.chain(&gate).map_err(|f| f.with_code(NOT_OPENED));
    let (left, right) = (chain(&a)?, chain(&b)?);
    let tell = |text: &str| if given.has("quiet") { Ok(()) } else { say(text) };
    // QEMU's sizes are whole sectors.
    let sizes = (left.size().next_multiple_of(SECTOR), right.size().next_multiple_of(SECTOR));
    let strict = given.has("strict");
    progress.begin();
    if strict && sizes.0 != sizes.1 {
        tell("Strict mode: Image size mismatch!\n")?;
        return Ok(DIFFERENT);
    }
    let status = if strict { differing_status(&a, &b, &gate)? } else { None };
    let cancel = AtomicBool::new(false);
    let total = sizes.0.max(sizes.1);
    let control = Control {
        threads: threads(None),
        rate_limit: None,
        cancel: &cancel,
        progress: &|done| progress.at(done, total),
    };
    let found = match knib_qcow::compare(&left, &right, false, &control) {
        Ok(found) => found,
        // What is known to differ is told, though the rest cannot be read.
        Err(_) if status.is_some() => None,
        Err(e) => {
            let code = if has_status(&a, &gate) && has_status(&b, &gate) { NOT_READ } else { NO_STATUS };
            return Err(Failure::from(e).with_code(code));
        }
    };
    let content = found.map(|d| d.offset() / SECTOR * SECTOR);
    let common = sizes.0.min(sizes.1);
    let result = match (status, content) {
        (Some(status), content) if content.is_none_or(|c| status <= c) => {
            Err(format!("Strict mode: Offset {status} block status mismatch!\n"))
        }
        (_, Some(content)) => Err(format!("Content mismatch at offset {content}!\n")),
        (_, None) => Ok("Images are identical.\n"),
    };
    if sizes.0 != sizes.1 && content.is_none_or(|c| c >= common) {
        tell("Warning: Image size mismatch!\n")?;
    }
    match &result {
        Ok(text) => tell(text)?,
        Err(text) => tell(text)?,
    }
    Ok(if result.is_ok() { 0 } else { DIFFERENT })
}

/// Where the two first disagree about what is allocated, in bytes.
fn differing_status(a: &Opened, b: &Opened, gate: &Following) -> Result<Option<u64>, Failure> {
    let failed = |e: knib_qcow::Error| Failure::from(e).with_code(NO_STATUS);
    let layers = |o: &Opened| Layers::from_storage(o.storage.clone(), o.format, gate).map_err(failed);
    let (left, right) = (layers(a)?, layers(b)?);
    let end = left.size().min(right.size());
    let says = |s: &Status| (s.present, s.zero, s.data, s.compressed, s.offset.is_some());
    let mut at = 0;
    while at < end {
        let (x, y) = (left.status_at(at, end).map_err(failed)?, right.status_at(at, end).map_err(failed)?);
        if says(&x) != says(&y) {
            return Ok(Some(at));
        }
        at += x.len.min(y.len).max(1);
    }
    Ok(None)
}

/// Whether all of an image's tables say what is allocated: if so, it is data that could not be read.
fn has_status(image: &Opened, gate: &Following) -> bool {
    let Ok(layers) = Layers::from_storage(image.storage.clone(), image.format, gate) else { return false };
    let (mut at, end) = (0, layers.size());
    while at < end {
        match layers.status_at(at, end) {
            Ok(status) => at += status.len.max(1),
            Err(_) => return false,
        }
    }
    true
}
