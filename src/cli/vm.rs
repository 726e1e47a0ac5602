//! `knibfs vm`.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::operation::operate;
use super::output::table;
use super::{Context, Outcome};
use crate::ops::add_vm::{self, NewVm};
use crate::ops::whereabouts::{self, Presence};
use crate::ops::{release, remove_vm};
use crate::store::vm::{Source, Track, VmState};
use crate::store::{DiskName, Store, StoreResult, VmName, VmRecord};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a VM: a libvirt domain, or image files that no domain owns.
    Add(Add),
    /// List the VMs, and say of domains that have moved or are gone.
    List {
        /// Those, too, that were removed and whose backups are kept.
        #[arg(long)]
        show_removed: bool,
    },
    /// Show what is known of a VM.
    Show {
        /// The VM.
        vm: VmName,
    },
    /// Take a VM out of knibfs's care: its deltas on primary are merged, its backups are kept.
    Remove {
        /// The VM.
        vm: VmName,
        /// Also where its host cannot be asked: its deltas stay on primary.
        #[arg(long)]
        force: bool,
    },
    /// Assign a VM to an offering.
    Assign {
        /// The VM.
        vm: VmName,
        /// The offering, by name or id.
        offering: String,
    },
    /// Take a VM off its offering: its deltas on primary are merged, and the next backup is full.
    Unassign {
        /// The VM.
        vm: VmName,
    },
}

#[derive(Debug, clap::Args)]
pub struct Add {
    /// Its name in the store.
    name: VmName,

    /// An image file or block device; once for each disk.
    #[arg(long = "disk", value_name = "NAME=PATH", value_parser = parse_disk, required_unless_present = "domain", conflicts_with = "domain")]
    disks: Vec<(DiskName, PathBuf)>,

    /// A libvirt domain, by name or UUID: all its disks.
    #[arg(long)]
    domain: Option<String>,

    /// The domain's host.
    #[arg(long, default_value = "qemu:///system", requires = "domain")]
    uri: String,

    /// How changes of image files are found: by comparing contents, touching nothing, or by an overlay (qcow2 only).
    #[arg(long, value_enum, default_value = "scan", conflicts_with = "domain")]
    track: TrackName,

    /// The offering that it is assigned to, by name or id.
    #[arg(long)]
    offering: Option<String>,

    /// A disk that is not backed up; may be given several times.
    #[arg(long = "exclude-disk", value_name = "DISK")]
    exclude: Vec<DiskName>,

    /// Folder for deltas, instead of beside each volume.
    #[arg(long, value_name = "DIR")]
    delta_dir: Option<PathBuf>,
}

/// Ways to find changes.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum TrackName {
    /// Compare contents with the last backup's checksums.
    Scan,
    /// Put an overlay in the disk's place.
    Overlay,
}

fn parse_disk(text: &str) -> Result<(DiskName, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write it as NAME=PATH")?;
    if path.is_empty() {
        return Err("the path is empty".into());
    }
    Ok((DiskName::new(name).map_err(|e| e.to_string())?, path.into()))
}

fn add(context: &Context, store: &Store, args: Add) -> Outcome {
    let track = match args.track {
        TrackName::Scan => Track::Scan,
        TrackName::Overlay => Track::Overlay,
    };
    let new =
        NewVm { name: args.name, offering: args.offering, exclude: args.exclude, delta_dir: args.delta_dir };
    let record = match &args.domain {
        Some(domain) => {
            let guest = crate::ops::hypervisor::domain(&args.uri, domain)?.inspect()?;
            add_vm::add_domain(store, &new, &args.uri, &guest)?
        }
        None => add_vm::add_disks(store, &new, &args.disks, track)?,
    };
    context.out.print(&record, || record.name.to_string())?;
    Ok(())
}

pub fn run(context: &Context, command: Command) -> Outcome {
    let store = context.open_store()?;
    match command {
        Command::Add(args) => add(context, &store, args),
        Command::List { show_removed } => list(context, &store, show_removed),
        Command::Remove { vm, force } => remove(context, &store, &vm, force),
        Command::Show { vm } => show(context, &store, &vm),
        Command::Assign { vm, offering } => {
            let record = release::assign(&store, &vm, &offering)?;
            context.out.print(&record, String::new)?;
            Ok(())
        }
        Command::Unassign { vm } => {
            let record = operate(|control| release::unassign(&store, &vm, control))?;
            context.out.print(&record, String::new)?;
            Ok(())
        }
    }
}

/// What is known of a VM, with its state as it is now.
#[derive(serde::Serialize)]
struct VmNow {
    #[serde(flatten)]
    record: VmRecord,
    /// An operation on it was begun and nobody works on it.
    interrupted: bool,
    /// Where its domain is.
    presence: Presence,
}

impl VmNow {
    fn look(store: &Store, vm: &VmName) -> StoreResult<Self> {
        let mut record = store.vm(vm)?;
        let (state, interrupted) = store.state_of(&record)?;
        record.state = state;
        Ok(Self { record, interrupted, presence: Presence::Here })
    }

    /// Finds out where the domains are.
    fn seek(store: &Store, all: &mut [&mut Self]) {
        let records: Vec<&VmRecord> = all.iter().map(|now| &now.record).collect();
        let found = whereabouts::look(store, &records);
        for (now, presence) in all.iter_mut().zip(found) {
            now.presence = presence;
        }
    }

    /// Empty where there is nothing to say.
    fn state(&self) -> String {
        let way_out = if self.interrupted { ", interrupted: run `knibfs recover`" } else { "" };
        let state = match self.record.state {
            VmState::Ready => String::new(),
            state => format!("{state:?}{way_out}"),
        };
        let presence = match &self.presence {
            Presence::Here => String::new(),
            Presence::Moved { host, .. } => format!("moved to the host {host}"),
            Presence::Gone { unasked } if unasked.is_empty() => "gone: no known host has its domain".into(),
            Presence::Gone { unasked } => {
                format!("gone: no host that answers has its domain (no answer: {})", unasked.join(", "))
            }
            Presence::Unknown { why } => format!("its host does not answer: {why}"),
            Presence::Removed => "removed; its backups are kept".into(),
        };
        [state, presence].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

fn remove(context: &Context, store: &Store, vm: &VmName, force: bool) -> Outcome {
    let done = operate(|control| remove_vm::run(store, vm, force, control))?;
    for note in &done.notes {
        eprintln!("{note}");
    }
    for left in &done.left {
        eprintln!("{} is a delta that was left on primary: no backup needs it, its VM may", left.display());
    }
    context.out.print(&done, || match done.backups {
        0 => format!("{vm} was removed; it had no backups"),
        1 => format!("{vm} was removed; its backup is kept"),
        count => format!("{vm} was removed; its {count} backups are kept"),
    })?;
    Ok(())
}

fn list(context: &Context, store: &Store, show_removed: bool) -> Outcome {
    let names = store.vms()?;
    let mut records: Vec<StoreResult<VmNow>> = names.iter().map(|name| VmNow::look(store, name)).collect();
    records.retain(|now| show_removed || now.as_ref().map_or(true, |now| now.record.removed.is_none()));
    VmNow::seek(store, &mut records.iter_mut().flatten().collect::<Vec<_>>());
    let good: Vec<&VmNow> = records.iter().flatten().collect();
    context.out.print(&good, || {
        let cells = |now: &&VmNow| vec![now.record.name.to_string(), source(&now.record), now.state()];
        table(&good.iter().map(cells).collect::<Vec<_>>()).join("\n")
    })?;
    // What can be listed is listed; then the first that cannot is the failure.
    match records.into_iter().find_map(Result::err) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

fn show(context: &Context, store: &Store, vm: &VmName) -> Outcome {
    let mut now = VmNow::look(store, vm)?;
    VmNow::seek(store, &mut [&mut now]);
    let record = &now.record;
    let offering = match record.offering {
        Some(id) => store.offering(id).map_or_else(|_| id.to_string(), |o| o.name),
        None => "none: the settings apply".into(),
    };
    context.out.print(&now, || text(record, &now.state(), &offering))?;
    Ok(())
}

fn text(record: &VmRecord, state: &str, offering: &str) -> String {
    let mut rows = vec![
        vec!["VM".to_owned(), record.name.to_string()],
        vec!["id".into(), record.id.to_string()],
        vec!["source".into(), source(record)],
        vec!["offering".into(), offering.into()],
    ];
    if !state.is_empty() {
        rows.push(vec!["state".into(), state.into()]);
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
