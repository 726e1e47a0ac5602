//! `img amend`: options of an image that is there.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use knib_qcow::{Amend, Control, Format, Preallocation, Storage, bitmap};

use super::options::{Given, flag, long_flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, say, threads, warn};
use crate::img::Failure;
use crate::img::create::Wanted;
use crate::img::open::{Following, Mode, open};

/// Options that can be changed later, for the help.
const HELP: &str = "Amend options for 'qcow2':
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file=<str>        - File name of an external data file
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

pub const COMMAND: Command = Command {
    name: "amend",
    about: "Change the options of an image",
    usage: "-o OPTIONS [OPTIONS] FILENAME",
    options: &[
        value(
            'o',
            "options",
            "OPTIONS",
            "compat, data_file, lazy_refcounts, refcount_bits, size (-o help lists them)",
        ),
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
    let name = given.one_name()?;
    let progress = Progress::of(given, 1.0);
    check_cache(given, "cache")?;
    let opened = open(name, given.text("format")?, Mode::Write)?;
    if let Some(text) = opened.warning() {
        warn(&text);
    }
    let Some(header) = opened.header()? else {
        return Err(Failure::new("Format driver 'raw' does not support option amendment"));
    };
    let wanted = Wanted::parse(Format::Qcow2, &lists)?;
    // Everything is looked at before anything is changed.
    let (mut version, mut order) = (header.version, None);
    for key in wanted.keys() {
        let text = wanted.get(key).unwrap_or("");
        match key {
            "compat" => match text {
                "v3" | "1.1" => version = 3,
                "v2" | "0.10" => version = 2,
                other => return Err(Failure::new(format!("Unknown compatibility level {other}"))),
            },
            "lazy_refcounts" | "size" => {}
            "refcount_bits" => {
                let bits: u64 = text.parse().unwrap_or(0);
                if !bits.is_power_of_two() || bits > 64 {
                    return Err(Failure::new(
                        "Refcount width must be a power of two and may not exceed 64 bits",
                    ));
                }
                order = Some(bits.trailing_zeros());
            }
            "backing_file" | "backing_fmt" => {
                return Err(Failure::new("Cannot amend the backing file\nYou can use 'rebase' instead."));
            }
            "data_file" if !header.external_data() => {
                return Err(Failure::new(
                    "data-file can only be set for images that use an external data file",
                ));
            }
            "data_file" => {}
            "data_file_raw" => {
                return Err(Failure::new(
                    "whether the data file of an image is raw is not changed in place: use convert",
                ));
            }
            _ => {
                return Err(Failure::new(format!(
                    "Invalid parameter '{key}'\nThis option is only supported for image creation"
                )));
            }
        }
    }
    // 0 leaves the size as it is, as in QEMU.
    let size = wanted.bytes("size").filter(|size| *size > 0);
    if size.is_some_and(|size| !size.is_multiple_of(512)) {
        return Err(Failure::new("The new size must be a multiple of 512"));
    }
    let lazy = wanted.get("lazy_refcounts").map(|_| wanted.is_on("lazy_refcounts"));
    if lazy == Some(true) && version < 3 {
        return Err(Failure::new(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ));
    }
    progress.begin();
    let storage: Arc<dyn Storage> = opened.storage.clone();
    let cancel = AtomicBool::new(false);
    let control = Control { threads: threads(None), rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let gate = Following::new(false);
    let changed = version != header.version || lazy.is_some() || order.is_some();
    if changed {
        let bitmaps = bitmap::list(&*storage).map_err(|e| opened.wrong(&e))?;
        for gone in bitmaps.iter().filter(|_| version < 3) {
            warn(&format!("warning: bitmap '{}' is removed: compat=0.10 has no bitmaps", gone.name));
        }
        let what = Amend { version: Some(version), lazy_refcounts: lazy, refcount_order: order };
        knib_qcow::amend(storage.clone(), &gate, &what, &control)?;
    }
    if let Some(name) = wanted.get("data_file") {
        knib_qcow::set_data_file(&*storage, name).map_err(|e| opened.wrong(&e))?;
    }
    if let Some(size) = size {
        knib_qcow::resize(storage, &gate, size, true, Preallocation::Off, &control)?;
    }
    progress.end();
    Ok(0)
}
