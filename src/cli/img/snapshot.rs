//! `img snapshot`: internal snapshots.

use std::sync::atomic::AtomicBool;

use knib_qcow::{Control, Format, bitmap, snapshot};

use super::info::snapshot_table;
use super::options::{Given, flag, value};
use super::{Command, Done, say, threads};
use crate::img::Failure;
use crate::img::open::{Mode, open};

pub const COMMAND: Command = Command {
    name: "snapshot",
    about: "List or change the internal snapshots of an image",
    usage: "[-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] [OPTIONS] FILENAME",
    options: &[
        flag('l', "list", "list them (the default)"),
        value('a', "apply", "SNAPSHOT", "make the disk what it was at this snapshot"),
        value('c', "create", "SNAPSHOT", "make a snapshot with this name"),
        value('d', "delete", "SNAPSHOT", "delete this snapshot"),
        value('f', "format", "FMT", "format of the image: qcow2"),
        flag('q', "quiet", "print errors only"),
        flag('U', "force-share", "list though another process may write"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let actions: Vec<&str> =
        ["list", "apply", "create", "delete"].into_iter().filter(|a| given.has(a)).collect();
    if actions.len() > 1 {
        return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let image = given.one_name()?;
    let action = actions.first().copied().unwrap_or("list");
    let share = given.has("force-share");
    if action == "list" {
        let opened = open(image, given.text("format")?, Mode::reading(share))?;
        if opened.format == Format::Qcow2 {
            let all = snapshot::list(&*opened.storage).map_err(|e| opened.wrong(&e))?;
            if !all.is_empty() {
                say(&format!("Snapshot list:\n{}", snapshot_table(&all)))?;
            }
        }
        return Ok(0);
    }
    if share {
        return Err(Failure::new(format!(
            "Could not open '{}': force-share=on can only be used with read-only images",
            image.to_string_lossy()
        )));
    }
    let wanted = given.text(action)?.unwrap_or("");
    let refused = |why: String| Failure::new(format!("Could not {action} snapshot '{wanted}': {why}"));
    let opened = open(image, given.text("format")?, Mode::Write)?;
    if opened.format == Format::Raw {
        return Err(refused("a raw image has none".into()));
    }
    let cancel = AtomicBool::new(false);
    let control = Control { threads: threads(None), rate_limit: None, cancel: &cancel, progress: &|_| {} };
    let storage = opened.storage.clone();
    if action == "apply" && !bitmap::list(&*storage).map_err(|e| opened.wrong(&e))?.is_empty() {
        return Err(refused(
            "it has persistent bitmaps, which would no longer be true: remove them first".into(),
        ));
    }
    let done = match action {
        "create" => snapshot::create(storage, wanted, &control).map(|_| ()),
        "apply" => snapshot::apply(storage, wanted, &control),
        // Deleted by name alone, the first of those that have it.
        _ => {
            let all = snapshot::list(&*storage).map_err(|e| opened.wrong(&e))?;
            let found = all.iter().find(|s| s.name == wanted);
            let found = found.ok_or_else(|| refused("snapshot not found".into()))?;
            snapshot::delete(storage, &found.id, &control)
        }
    };
    done.map_err(|e| refused(e.to_string()))?;
    Ok(0)
}
