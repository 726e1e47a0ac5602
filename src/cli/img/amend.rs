//! `img amend`: options of an image that is there.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Format, Preallocation, Storage};

use super::options::{Given, flag, long_flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, say, threads, warn};
use crate::img::Failure;
use crate::img::create::Wanted;
use crate::img::open::{Following, Mode, open};

/// Options that can be changed later, for the help.
const HELP: &str = "Amend options for 'qcow2':
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

pub const COMMAND: Command = Command {
    name: "amend",
    about: "Change the options of an image",
    usage: "-o OPTIONS [OPTIONS] FILENAME",
    options: &[
        value('o', "options", "OPTIONS", "compat, lazy_refcounts, size (-o help lists them)"),
        value('f', "format", "FMT", "format of the image: qcow2"),
        value('t', "cache", "CACHE", "accepted; what is written is durable at the end"),
        long_flag("force", "accepted; nothing here is unsafe"),
        flag('p', "progress", "show progress"),
        flag('q', "quiet", "print errors only"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let lists = given.texts("options")?;
    if lists.is_empty() {
        return Err(Failure::usage("Must specify options (-o)"));
    }
    if Wanted::asks_for_help(&lists) {
        say(HELP)?;
        return Ok(0);
    }
    check_cache(given, "cache")?;
    let opened = open(given.one_name()?, given.text("format")?, Mode::Write)?;
    if let Some(text) = opened.warning() {
        warn(&text);
    }
    let Some(header) = opened.header()? else {
        return Err(Failure::new("Format driver 'raw' does not support option amendment"));
    };
    let wanted = Wanted::parse(Format::Qcow2, &lists)?;
    // Everything is looked at before anything is changed.
    let mut version = header.version;
    for key in wanted.keys() {
        let text = wanted.get(key).unwrap_or("");
        match key {
            "compat" => match text {
                "v3" | "1.1" => version = 3,
                "v2" | "0.10" if header.version == 2 => {}
                "v2" | "0.10" => {
                    return Err(Failure::new(
                        "an image of version 3 is not made one of version 2 in place: use convert -o compat=0.10",
                    ));
                }
                other => return Err(Failure::new(format!("Unknown compatibility level {other}"))),
            },
            "lazy_refcounts" | "size" => {}
            "refcount_bits" if text.parse() == Ok(1u64 << header.refcount_order) => {}
            "refcount_bits" => {
                return Err(Failure::new(format!(
                    "refcounts of {} bits are not made others in place: use convert -o refcount_bits={text}",
                    1u64 << header.refcount_order
                )));
            }
            "backing_file" | "backing_fmt" => {
                return Err(Failure::new("Cannot amend the backing file\nYou can use 'rebase' instead."));
            }
            "data_file" | "data_file_raw" => {
                return Err(Failure::new("the data file of an image is not changed in place: use convert"));
            }
            _ => {
                return Err(Failure::new(format!(
                    "Invalid parameter '{key}'\nThis option is only supported for image creation"
                )));
            }
        }
    }
    let lazy = wanted.get("lazy_refcounts").map(|_| wanted.is_on("lazy_refcounts"));
    if lazy == Some(true) && version < 3 {
        return Err(Failure::new(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ));
    }
    let progress = Progress::begin(given.has("progress") && !given.has("quiet"));
    let storage: Arc<dyn Storage> = opened.storage.clone();
    if version > header.version {
        knib_qcow::upgrade(&storage)?;
    }
    if let Some(lazy) = lazy {
        knib_qcow::set_lazy_refcounts(&storage, lazy)?;
    }
    if let Some(size) = wanted.bytes("size") {
        let cancel = AtomicBool::new(false);
        let control =
            Control { threads: threads(None), rate_limit: None, cancel: &cancel, progress: &|_| {} };
        knib_qcow::resize(storage, &Following::new(false), size, true, Preallocation::Off, &control)?;
    }
    progress.end();
    Ok(0)
}
