//! `knibfs vm`.

use std::fmt::Write as _;

use super::output::table;
use super::{Context, Outcome};
use crate::store::vm::{Source, VmState};
use crate::store::{Store, StoreResult, VmName, VmRecord};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List the VMs.
    List,
    /// Show what is known of a VM.
    Show {
        /// The VM.
        vm: VmName,
    },
}

pub fn run(context: &Context, command: Command) -> Outcome {
    let store = context.open_store()?;
    match command {
        Command::List => list(context, &store),
        Command::Show { vm } => show(context, &store, &vm),
    }
}

fn list(context: &Context, store: &Store) -> Outcome {
    let names = store.vms()?;
    let records: Vec<StoreResult<VmRecord>> = names.iter().map(|name| store.vm(name)).collect();
    let good: Vec<&VmRecord> = records.iter().flatten().collect();
    context.out.print(&good, || {
        let rows: Vec<_> = good.iter().map(|r| vec![r.name.to_string(), source(r)]).collect();
        table(&rows).join("\n")
    })?;
    // What can be listed is listed; then the first that cannot is the failure.
    match records.into_iter().find_map(Result::err) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

fn show(context: &Context, store: &Store, vm: &VmName) -> Outcome {
    let record = store.vm(vm)?;
    let offering = match record.offering {
        Some(id) => store.offering(id).map_or_else(|_| id.to_string(), |o| o.name),
        None => "none: the settings apply".into(),
    };
    context.out.print(&record, || text(&record, &offering))?;
    Ok(())
}

fn text(record: &VmRecord, offering: &str) -> String {
    let mut rows = vec![
        vec!["VM".to_owned(), record.name.to_string()],
        vec!["id".into(), record.id.to_string()],
        vec!["source".into(), source(record)],
        vec!["offering".into(), offering.into()],
    ];
    if record.state != VmState::Ready {
        rows.push(vec!["state".into(), format!("{:?}", record.state)]);
    }
    if let Some(dir) = &record.delta_dir {
        rows.push(vec!["deltas".into(), format!("in {}", dir.display())]);
    }
    let current = record.tracking.current.as_ref();
    rows.push(vec![
        "current".into(),
        current.map_or("none: the next backup is full".into(), |c| c.name.to_string()),
    ]);
    let mut text = table(&rows).join("\n");
    for volume in &record.volumes {
        let gone = if volume.detached { ", detached" } else { "" };
        let _ = write!(text, "\n  {}  {} ({}{gone})", volume.name, volume.path.display(), volume.format);
    }
    for name in &record.exclude {
        let _ = write!(text, "\n  {name}  excluded");
    }
    text
}

/// Where a VM's disks are found, in a few words.
pub fn source(record: &VmRecord) -> String {
    match &record.source {
        Source::Domain { uri, domain } => format!("domain {domain} on {uri}"),
        Source::Disks { track } => {
            let count = record.attached().count();
            format!("{count} disk file{}, tracked by {track}", if count == 1 { "" } else { "s" })
        }
    }
}
