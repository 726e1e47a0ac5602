//! `--image-opts` and `--target-image-opts`: names of images that are lists of options become files and formats.

use std::ffi::OsString;

use super::Command;
use super::options::Given;
use crate::img::{Failure, image_opts};

/// The options that hold the formats of a command's images, in their order; the last one is that of the rest.
fn formats(command: &str) -> &'static [&'static str] {
    match command {
        "compare" => &["a-format", "b-format"],
        "convert" => &["source-format"],
        _ => &["format"],
    }
}

/// Reads the words of a line as lists of options where it says so.
pub fn resolve(command: &Command, given: &mut Given) -> Result<(), Failure> {
    let (all, target) = (given.has("image-opts"), given.has("target-image-opts"));
    if !(all || target) {
        return Ok(());
    }
    let takes_target = command.name == "convert";
    if command.name == "create" || target && !takes_target {
        let option = if target { "target-image-opts" } else { "image-opts" };
        return Err(Failure::usage(format!("unrecognized option '--{option}'")));
    }
    let formats = formats(command.name);
    let code = if command.name == "compare" { 2 } else { 1 };
    if all && formats.iter().any(|f| given.has(f)) {
        return Err(Failure::new("--image-opts and --format are mutually exclusive").with_code(code));
    }
    if target && given.has("target-format") {
        return Err(Failure::new("--target-image-opts and --target-format are mutually exclusive"));
    }
    if target && !given.has("no-create") {
        return Err(Failure::new("--target-image-opts requires use of -n flag"));
    }
    let may_share = command.options.iter().any(|o| o.long == "force-share");
    let count = given.words.len();
    let sources = match command.name {
        "convert" => count.saturating_sub(1),
        "compare" => 2,
        _ => 1,
    };
    let mut common: Vec<Option<Option<String>>> = vec![None; formats.len()];
    for at in (0..sources.min(count)).filter(|_| all) {
        let format = name(given, at, may_share).map_err(|f| f.with_code(code))?;
        let of = at.min(formats.len() - 1);
        match common.get_mut(of) {
            Some(known @ None) => *known = Some(format),
            Some(Some(known)) if *known != format => {
                return Err(Failure::new(
                    "--image-opts with sources of different formats is not supported: convert them one by one",
                ));
            }
            _ => {}
        }
    }
    for (option, format) in formats.iter().zip(common) {
        if let Some(format) = format.flatten() {
            given.set(option, format.into());
        }
    }
    if target && count > 0 {
        let format = name(given, count - 1, false)?.ok_or_else(|| {
            Failure::new("--target-image-opts needs the target's format: driver=raw or driver=qcow2")
        })?;
        given.set("target-format", format.into());
    }
    Ok(())
}

/// Replaces a word by the file that it names; the format that it gives. What is written is not shared.
fn name(given: &mut Given, at: usize, may_share: bool) -> Result<Option<String>, Failure> {
    let Some(word) = given.words.get_mut(at) else { return Ok(None) };
    let text = word.to_str().ok_or_else(|| Failure::new("--image-opts: the options are not UTF-8"))?;
    let named = image_opts::parse(text)?;
    *word = named.file.into();
    if named.share && !may_share {
        return Err(Failure::new(format!(
            "Could not open '{}': force-share=on can only be used with read-only images",
            word.to_string_lossy()
        )));
    }
    if named.share {
        given.set("force-share", OsString::new());
    }
    Ok(named.format)
}
