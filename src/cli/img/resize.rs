//! `img resize`: a larger or smaller disk.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Format, Preallocation, Storage as _};

use super::options::{Given, flag, long_flag, long_value, value};
use super::{Command, Done, say, threads, warn};
use crate::img::create::{fill, preallocation};
use crate::img::open::{Following, Mode, open};
use crate::img::{Failure, size};

pub const COMMAND: Command = Command {
    name: "resize",
    about: "Give an image another size",
    usage: "[OPTIONS] FILENAME [+|-]SIZE",
    options: &[
        value('f', "format", "FMT", "format of the image: raw or qcow2"),
        long_flag("shrink", "make it smaller, and lose what lies past its new end"),
        long_value(
            "preallocation",
            "PREALLOC",
            "off, metadata, falloc or full: what is reserved for the new part",
        ),
        flag('q', "quiet", "print errors only"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let [image, wanted] = given.words.as_slice() else {
        return Err(Failure::usage("Expecting image file name and size"));
    };
    let wanted = wanted.to_string_lossy();
    let (sign, number) = match wanted.split_at_checked(1) {
        Some(("+", number)) => (1, number),
        Some(("-", number)) => (-1, number),
        _ => (0, wanted.as_ref()),
    };
    let bytes = size::parse(number).map_err(|_| {
        Failure::new(
            "Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        )
    })?;
    let reserve = given.text("preallocation")?;
    let reserve = reserve
        .map(|text| {
            preallocation(text).map_err(|_| Failure::new(format!("Invalid preallocation mode '{text}'")))
        })
        .transpose()?
        .unwrap_or_default();
    let opened = open(image, given.text("format")?, Mode::Write)?;
    if let Some(text) = opened.warning() {
        warn(&text);
    }
    let current = match opened.header()? {
        Some(header) => header.size,
        None => opened.storage.len()?.next_multiple_of(512),
    };
    let total = match sign {
        0 => i128::from(bytes),
        sign => i128::from(current) + sign * i128::from(bytes),
    };
    let total = u64::try_from(total).ok().filter(|n| *n > 0 && *n <= i64::MAX as u64);
    let total = total.ok_or_else(|| Failure::new("New image size must be positive"))?;
    if total <= current && reserve != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if total < current && !given.has("shrink") {
        return Err(Failure::new(
            "Use the --shrink option to perform a shrink operation.\nwarning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.",
        ));
    }
    match opened.format {
        Format::Raw => {
            if opened.storage.is_block_device() && total != current {
                return Err(Failure::new("a block device keeps its size: resize it with what made it"));
            }
            if reserve == Preallocation::Metadata {
                return Err(Failure::new("Unsupported preallocation mode 'metadata'"));
            }
            opened.storage.set_len(total)?;
            fill(&opened.storage, current.min(total), total.saturating_sub(current), reserve)?;
        }
        Format::Qcow2 => {
            if !total.is_multiple_of(512) {
                return Err(Failure::new("The new size must be a multiple of 512"));
            }
            let cancel = AtomicBool::new(false);
            let control =
                Control { threads: threads(None), rate_limit: None, cancel: &cancel, progress: &|_| {} };
            let (storage, gate) = (opened.storage.clone(), Following::new(false));
            knib_qcow::resize(storage, &gate, total, given.has("shrink"), reserve, &control)?;
        }
    }
    if !given.has("quiet") {
        say("Image resized.\n")?;
    }
    Ok(0)
}
