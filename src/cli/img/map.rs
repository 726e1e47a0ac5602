//! `img map`: where an image's data lies, and which image of its chain it comes from.

use std::fmt::Write as _;

use knib_qcow::{Layers, Status};

use super::options::{Given, flag, value};
use super::{Command, Done, Output, say};
use crate::img::open::{Following, Mode, open};
use crate::img::{Failure, size};

pub const COMMAND: Command = Command {
    name: "map",
    about: "Show where an image's data lies",
    usage: "[OPTIONS] FILENAME",
    options: &[
        value('f', "format", "FMT", "format of the image: raw or qcow2"),
        Output::OPTION,
        value('s', "start-offset", "OFFSET", "begin here"),
        value('l', "max-length", "LENGTH", "show so much"),
        flag('U', "force-share", "read though another process may write"),
    ],
    run,
};

/// Text is printed when there is so much of it.
const FLUSH: usize = 1 << 16;

fn run(given: &Given) -> Done {
    let name = given.one_name()?;
    let output = Output::of(given)?;
    let number = |option: &str| -> Result<Option<u64>, Failure> {
        let Some(text) = given.text(option)? else { return Ok(None) };
        let parsed = size::parse(text);
        parsed.map(Some).map_err(|_| Failure::new(format!("Invalid {option} specified: '{text}'.")))
    };
    let (start, max) = (number("start-offset")?.unwrap_or(0), number("max-length")?);
    let share = given.has("force-share");
    let opened = open(name, given.text("format")?, Mode::reading(share))?;
    let gate = Following::new(share);
    let layers =
        Layers::from_storage(opened.storage.clone(), opened.format, &gate).map_err(|e| opened.wrong(&e))?;
    let end = layers.size().min(max.map_or(u64::MAX, |max| start.saturating_add(max)));
    let mut out = match output {
        Output::Human => format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"),
        Output::Json => "[".to_owned(),
    };
    let mut at = start;
    let mut run = (
        start,
        Status {
            len: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
        },
    );
    while at < end {
        let mut next = layers.status_at(at, end)?;
        if next.len == 0 {
            return Err(Failure::new(format!("the image says nothing of offset {at}")));
        }
        if output == Output::Human && (next.zero || !next.data) {
            // This table shows data only: what kind of zeros does not matter.
            (next.zero, next.data) = (true, false);
            (next.present, next.compressed, next.offset, next.depth) = (false, false, None, 0);
        }
        at += next.len;
        if run.1.len > 0 && continues(&run.1, &next) {
            run.1.len += next.len;
            continue;
        }
        if run.1.len > 0 {
            if let Err(failure) = entry(&mut out, &layers, run.0, &run.1, output) {
                say(&out)?;
                return Err(failure);
            }
            out += if output == Output::Json { ",\n" } else { "" };
        }
        run = (at - next.len, next);
        if out.len() > FLUSH {
            say(&out)?;
            out.clear();
        }
    }
    if let Err(failure) = entry(&mut out, &layers, run.0, &run.1, output) {
        say(&out)?;
        return Err(failure);
    }
    out += if output == Output::Json { "]\n" } else { "" };
    say(&out)?;
    Ok(0)
}

fn continues(run: &Status, next: &Status) -> bool {
    let offset = match (run.offset, next.offset) {
        (Some(a), Some(b)) => a.checked_add(run.len) == Some(b),
        (None, None) => true,
        _ => false,
    };
    offset && Status { len: run.len, offset: run.offset, ..*next } == *run
}

fn entry(out: &mut String, layers: &Layers, start: u64, s: &Status, output: Output) -> Result<(), Failure> {
    match output {
        Output::Human => {
            if !s.data || s.zero {
                return Ok(());
            }
            let Some(offset) = s.offset else {
                return Err(Failure::new("File contains external, encrypted or compressed clusters."));
            };
            let file =
                layers.data_path(s.depth).map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
            let _ = writeln!(out, "{:<16}{:<16}{:<16}{file}", hex(start), hex(s.len), hex(offset));
        }
        Output::Json => {
            let _ = write!(
                out,
                "{{ \"start\": {start}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
                s.len, s.depth, s.present, s.zero, s.data, s.compressed
            );
            if let Some(offset) = s.offset {
                let _ = write!(out, ", \"offset\": {offset}");
            }
            out.push('}');
        }
    }
    Ok(())
}

/// `%#x`.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}
