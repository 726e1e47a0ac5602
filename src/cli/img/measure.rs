//! `img measure`: how large the file of a new image will be.

use std::sync::Arc;

use knib_qcow::{Format, Layers, Preallocation, Storage, bitmap};

use super::create::format_named;
use super::json::Json;
use super::options::{Given, flag, long_value, value};
use super::{Command, Done, Output, say};
use crate::img::create::Wanted;
use crate::img::open::{Following, Mode, Opened, open};
use crate::img::{Failure, size, snapshots};

pub const COMMAND: Command = Command {
    name: "measure",
    about: "Tell how large the file of a new image will be",
    usage: "[OPTIONS] (--size SIZE | FILENAME)",
    options: &[
        value('O', "target-format", "FMT", "format of the new image: raw (default) or qcow2"),
        value('o', "options", "OPTIONS", "options of the new image, as for create"),
        value('s', "size", "SIZE", "size of the disk that it is for"),
        value('f', "format", "FMT", "format of FILENAME: raw or qcow2"),
        value('l', "snapshot", "SNAPSHOT", "measure this snapshot of FILENAME"),
        long_value("output", "human|json", "how the result is printed (human)"),
        flag('U', "force-share", "read though another process may write"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let output = Output::of(given)?;
    let bytes = given.text("size")?.map(|text| {
        size::parse(text).map_err(|_| Failure::new(format!("Invalid image size specified: '{text}'.")))
    });
    let bytes = bytes.transpose()?;
    let name = match given.words.as_slice() {
        [] => None,
        [name] => Some(name),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    if name.is_none() && (given.has("format") || given.has("snapshot")) {
        return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
    }
    if bytes.is_some() == name.is_some() {
        return Err(Failure::new(if name.is_some() {
            "--size N cannot be used together with a filename."
        } else {
            "Either --size N or one filename must be specified."
        }));
    }
    let share = given.has("force-share");
    let opened = name.map(|n| open(n, given.text("format")?, Mode::reading(share))).transpose()?;
    let target = match given.text("target-format")?.unwrap_or("raw") {
        known @ ("raw" | "qcow2") => format_named(known, "")?,
        other => {
            format_named(other, "").map_err(|f| Failure::new(f.text))?;
            return Err(Failure::new(format!("Block driver '{other}' does not support size measurement")));
        }
    };
    let mut wanted = Wanted::parse(target, &given.texts("options")?).map_err(|f| {
        Failure::new(format!("{}\nInvalid options for file format '{}'", f.text, target.name()))
    })?;
    let layers = opened.as_ref().map(|o| source(o, given)).transpose()?;
    // The source's size counts, whatever the options say.
    if let Some(bytes) = layers.as_ref().map(Layers::size).or(bytes) {
        wanted.set("size", &bytes.to_string())?;
    }
    let (required, full, of_bitmaps) = match target {
        Format::Raw => {
            let whole = wanted.bytes("size").unwrap_or(0).next_multiple_of(512);
            (whole, whole, None)
        }
        Format::Qcow2 => {
            let new = wanted.shape()?;
            if !new.shape.is_possible() {
                return Err(Failure::new("The image size is too large (try using a larger cluster size)"));
            }
            let cluster = 1u64 << new.shape.cluster_bits;
            let (whole, full) = (new.shape.size.next_multiple_of(cluster), new.shape.fully_allocated());
            // How much a backing file will save is not known.
            let all = matches!(new.preallocation, Preallocation::Falloc | Preallocation::Full)
                || new.has_backing && layers.is_some();
            let data = match &layers {
                _ if all => whole,
                Some(layers) => data(layers, cluster)?.min(whole),
                None => 0,
            };
            (full - whole + data, full, (new.version >= 3).then_some(cluster))
        }
    };
    let bitmaps = match (&opened, of_bitmaps) {
        (Some(o), Some(cluster)) => bitmap_bytes(o, cluster)?,
        _ => None,
    };
    match output {
        Output::Human => {
            let mut text = format!("required size: {required}\nfully allocated size: {full}\n");
            if let Some(bitmaps) = bitmaps {
                text += &format!("bitmaps size: {bitmaps}\n");
            }
            say(&text)?;
        }
        Output::Json => {
            let mut members = vec![("required", required.into()), ("fully-allocated", full.into())];
            members.extend(bitmaps.map(|b| ("bitmaps", b.into())));
            say(&(Json::Object(members).pretty() + "\n"))?;
        }
    }
    Ok(0)
}

fn source(opened: &Opened, given: &Given) -> Result<Layers, Failure> {
    let gate = Following::new(given.has("force-share"));
    let storage: Arc<dyn Storage> = match given.text("snapshot")? {
        Some(wanted) => {
            snapshots::find(opened, &snapshots::Wanted::parse(wanted))?.view(opened.storage.clone())
        }
        None => opened.storage.clone(),
    };
    Layers::from_storage(storage, opened.format, &gate).map_err(|e| opened.wrong(&e))
}

/// Bytes of the clusters in which there is data.
fn data(layers: &Layers, cluster: u64) -> Result<u64, Failure> {
    let (end, mut at, mut data) = (layers.size(), 0, 0);
    while at < end {
        let status = layers.status_at(at, end)?;
        let mut next = at + status.len.max(1);
        if status.data && !status.zero {
            next = next.next_multiple_of(cluster);
            data += next - at / cluster * cluster;
        }
        at = next;
    }
    Ok(data)
}

/// What the image's bitmaps take in clusters of the new size; `None` where its format has none.
fn bitmap_bytes(opened: &Opened, cluster: u64) -> Result<Option<u64>, Failure> {
    let Some(header) = opened.header()?.filter(|h| h.version >= 3) else { return Ok(None) };
    let (mut bytes, mut directory) = (0, 0);
    for b in &bitmap::list(&*opened.storage)? {
        let bits = header.size.div_ceil(b.granularity);
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + b.name.len() as u64).next_multiple_of(8);
    }
    Ok(Some(bytes + directory.next_multiple_of(cluster)))
}
