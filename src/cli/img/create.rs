//! `img create`: a new image.

use std::ffi::OsStr;
use std::path::Path;

use knib_qcow::Format;

use super::options::{Given, flag, value};
use super::{Command, Done, say};
use crate::img::create::Wanted;
use crate::img::open::{Following, Mode, format, open};
use crate::img::{Failure, name, size};

pub const COMMAND: Command = Command {
    name: "create",
    about: "Make a new image",
    usage: "[OPTIONS] FILENAME [SIZE]",
    options: &[
        value('f', "format", "FMT", "format of the new image: raw (default) or qcow2"),
        value('o', "options", "FMT_OPTS", "options of the format (-o help lists them)"),
        value('b', "backing", "FILENAME", "let it stand on this image"),
        value('F', "backing-format", "FMT", "format of that image; it is never guessed"),
        flag('u', "backing-unsafe", "do not look at that image; the size must be given"),
        flag('q', "quiet", "print errors only"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let of = format_named(given.text("format")?.unwrap_or("raw"), "")?;
    let lists = given.texts("options")?;
    if Wanted::asks_for_help(&lists) {
        say(&Wanted::help(of, !given.words.is_empty()))?;
        return Ok(0);
    }
    let (file, wanted_size) = match given.words.as_slice() {
        [] => return Err(Failure::usage("Expecting image file name")),
        [file] => (file, None),
        [file, bytes] => (file, Some(parse_size(bytes)?)),
        [_, _, more, ..] => {
            return Err(Failure::usage(format!("Unexpected argument: {}", more.to_string_lossy())));
        }
    };
    let shown = file.to_string_lossy().into_owned();
    let about = |f: Failure| Failure { text: format!("{shown}: {}", f.text), ..f };
    let path = name::file(file).map_err(about)?;
    let mut wanted = Wanted::parse(of, &lists).map_err(about)?;
    for (option, key) in [("backing", "backing_file"), ("backing-format", "backing_fmt")] {
        if let Some(value) = given.text(option)? {
            if of == Format::Raw {
                let what = if option == "backing" { "file" } else { "format" };
                return Err(about(Failure::new(format!(
                    "Backing {what} not supported for file format 'raw'"
                ))));
            }
            wanted.set(key, value).map_err(about)?;
        }
    }
    match (wanted_size, wanted.get("size")) {
        (Some(_), Some(_)) => {
            return Err(about(Failure::new("The image size must be specified only once")));
        }
        (Some(bytes), None) => wanted.set("size", &bytes.to_string()).map_err(about)?,
        (None, _) => {}
    }
    stand_on(&mut wanted, &path, given.has("backing-unsafe")).map_err(about)?;
    if wanted.get("size").is_none() {
        return Err(about(Failure::new("Image creation needs a size parameter")));
    }
    if !given.has("quiet") {
        say(&wanted.describe(&shown))?;
    }
    wanted.plan().and_then(|plan| plan.make(&path)).map_err(about)?;
    Ok(0)
}

/// The format, or what QEMU says of an unknown one when it writes.
pub fn format_named(of: &str, file: &str) -> Result<Format, Failure> {
    format(of).map_err(|f| {
        let before = if file.is_empty() { String::new() } else { format!("{file}: ") };
        Failure::new(format!("{before}{}", f.text.replace("Unknown driver", "Unknown file format")))
    })
}

fn parse_size(text: &OsStr) -> Result<u64, Failure> {
    let shown = text.to_string_lossy();
    size::parse(&shown).map_err(|e| match e {
        size::NoSize::Malformed => Failure::new(format!("Invalid image size specified: '{shown}'.")),
        size::NoSize::TooLarge => {
            Failure::new(format!("Invalid image size specified. Must be between 0 and {}.", i64::MAX))
        }
    })
}

/// Checks the backing file, and takes its size where none was given.
fn stand_on(wanted: &mut Wanted, image: &Path, unsafely: bool) -> Result<(), Failure> {
    let Some(backing) = wanted.get("backing_file").map(str::to_owned) else {
        return Ok(());
    };
    if backing.is_empty() {
        return Err(Failure::new("Expected backing file name, got empty string"));
    }
    let full = name::combine(image, &backing);
    if Path::new(&full) == image {
        return Err(Failure::new(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    let Some(of) = wanted.get("backing_fmt").map(str::to_owned) else {
        return Err(Failure::new(
            "Backing file specified without backing format: give it with -F, since it is never guessed",
        ));
    };
    if unsafely {
        return format(&of).map(|_| ());
    }
    let opened = open(full.as_ref(), Some(&of), Mode::Read)
        .and_then(|o| o.chain(&Following::new(false)))
        .map_err(|f| Failure::new(format!("{}\nCould not open backing image.", f.text)))?;
    if wanted.get("size").is_none() {
        wanted.set("size", &opened.size().to_string())?;
    }
    Ok(())
}
