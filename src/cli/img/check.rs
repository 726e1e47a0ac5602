//! `img check`: whether an image's metadata holds together.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Format, Image, Repair, Report};

use super::json::Json;
use super::options::{Given, flag, value};
use super::{Command, Done, Output, check_cache, say, warn};
use crate::img::Failure;
use crate::img::open::{Following, Mode, open};

/// Nothing is wrong but lost space.
const LEAKS: u8 = 3;
/// The image is corrupt.
const CORRUPT: u8 = 2;
/// The format has nothing to check.
const NO_CHECKS: u8 = 63;

pub const COMMAND: Command = Command {
    name: "check",
    about: "Check that an image's metadata holds together",
    usage: "[OPTIONS] FILENAME",
    options: &[
        value('f', "format", "FMT", "format of the image: raw or qcow2"),
        flag('q', "quiet", "print errors only"),
        value(
            'r',
            "repair",
            "leaks|all",
            "give back lost space, or repair all that refcounts and flags allow",
        ),
        value('T', "cache", "CACHE_MODE", "accepted; reads go through the page cache"),
        flag('U', "force-share", "read though another process may write"),
        Output::OPTION,
    ],
    run,
};

fn run(given: &Given) -> Done {
    let name = given.one_name()?;
    let output = Output::of(given)?;
    check_cache(given, "cache")?;
    let share = given.has("force-share");
    let repair = match given.text("repair")? {
        None => None,
        Some("leaks") => Some(Repair::Leaks),
        Some("all") => Some(Repair::All),
        Some(other) => {
            return Err(Failure::usage(format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")));
        }
    };
    if repair.is_some() && share {
        let name = name.to_string_lossy();
        return Err(Failure::new(format!(
            "Could not open '{name}': force-share=on can only be used with read-only images"
        )));
    }
    let mode = if repair.is_some() { Mode::Write } else { Mode::reading(share) };
    let opened = open(name, given.text("format")?, mode)?;
    if opened.format == Format::Raw {
        return Err(Failure::new("This image format does not support checks").with_code(NO_CHECKS));
    }
    let cancel = AtomicBool::new(false);
    let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let (report, fixed) = match repair {
        None => {
            let gate = Following::new(share);
            let image = Image::open_tables(opened.storage.clone()).map_err(|e| opened.wrong(&e))?;
            if image.header().external_data() {
                // The data file must be there, as for QEMU.
                drop(Image::open(opened.storage.clone(), &gate).map_err(|e| opened.wrong(&e))?);
            }
            (knib_qcow::check(&image, &control)?, None)
        }
        Some(what) => {
            // What only needs space given back keeps its refcounts where they are.
            let mut repaired = knib_qcow::repair(opened.storage.clone(), Repair::Leaks, &control)?;
            // Where only copied flags are wrong `-r leaks` puts them right too, as QEMU does.
            let left = &repaired.after;
            let flags = if left.leaks == 0 && left.corruptions == left.flags { left.flags } else { 0 };
            if what == Repair::All && left.corruptions > 0 || flags > 0 {
                repaired.after = knib_qcow::repair(opened.storage.clone(), Repair::All, &control)?.after;
            }
            for message in &repaired.before.messages {
                warn(message);
            }
            if what == Repair::Leaks && repaired.after.uncounted > 0 {
                return Err(Failure::new(format!(
                    "Check failed: {} clusters in use have a refcount of 0, and only -r all makes refcounts anew",
                    repaired.after.uncounted
                )));
            }
            if what == Repair::Leaks && repaired.after.blocks > 0 {
                return Err(Failure::new(format!(
                    "Check failed: {} refcount blocks cannot be used as they are, and only -r all makes refcounts anew",
                    repaired.after.blocks
                )));
            }
            let fixed = Fixed::of(&repaired.before, &repaired.after, flags);
            (repaired.after, Some(fixed).filter(|f| f.leaks > 0 || f.corruptions > 0))
        }
    };
    for message in &report.messages {
        warn(message);
    }
    if !given.has("quiet") {
        match output {
            Output::Human => {
                if let Some(fixed) = &fixed {
                    say(&format!(
                        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...\n",
                        fixed.leaks, fixed.corruptions
                    ))?;
                }
                say(&human(&report))?;
            }
            Output::Json => {
                let file = opened.path.to_string_lossy();
                say(&format!("{}\n", json(&file, &report, fixed.as_ref()).pretty()))?;
            }
        }
    }
    Ok(if report.corruptions > 0 {
        CORRUPT
    } else if report.leaks > 0 {
        LEAKS
    } else {
        0
    })
}

/// What a repair put right, counted as QEMU counts it.
struct Fixed {
    leaks: u64,
    corruptions: u64,
}

impl Fixed {
    /// `flags` are the flags that were wrong by themselves.
    fn of(before: &Report, after: &Report, flags: u64) -> Self {
        let leaks = before.leaks.saturating_sub(after.leaks);
        let mut corruptions = before.corruptions.saturating_sub(after.corruptions);
        // A flag that was wrong because of its refcount is right once that is.
        if leaks > 0 || corruptions > before.flags {
            corruptions = corruptions.saturating_sub(before.flags.saturating_sub(flags));
        }
        Self { leaks, corruptions }
    }
}

#[allow(clippy::cast_precision_loss)] // two digits are shown
fn human(report: &Report) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    let usage = &report.usage;
    if usage.total != 0 && usage.allocated != 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            usage.allocated,
            usage.total,
            share(usage.allocated, usage.total),
            share(usage.fragmented, usage.allocated),
            share(usage.compressed, usage.allocated),
        );
    }
    if usage.end_offset > 0 {
        text += &format!("Image end offset: {}\n", usage.end_offset);
    }
    text
}

fn json(file: &str, report: &Report, fixed: Option<&Fixed>) -> Json {
    let usage = &report.usage;
    let mut members =
        vec![("filename", file.into()), ("format", "qcow2".into()), ("check-errors", 0u64.into())];
    for (key, count) in [
        ("image-end-offset", usage.end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", fixed.map_or(0, |f| f.corruptions)),
        ("leaks-fixed", fixed.map_or(0, |f| f.leaks)),
        ("total-clusters", usage.total),
        ("allocated-clusters", usage.allocated),
        ("fragmented-clusters", usage.fragmented),
        ("compressed-clusters", usage.compressed),
    ] {
        if count > 0 {
            members.push((key, count.into()));
        }
    }
    Json::Object(members)
}
