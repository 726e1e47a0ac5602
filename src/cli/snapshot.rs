//! `knibfs vm-snapshot` and `knibfs volume-snapshot`.

use super::operation::operate;
use super::output::{Colour, table};
use super::{Context, Outcome};
use crate::ops::snapshot::{self, Listed, Options, Scope};
use crate::store::{DiskName, SnapshotName, VmName};

#[derive(Debug, clap::Subcommand)]
pub enum VmCommand {
    /// Take a snapshot of all disks of a VM, running or off; prints its name.
    Create {
        /// The VM.
        vm: VmName,
        /// The snapshot's name [default: the time].
        name: Option<SnapshotName>,
        /// Freeze the guest's file systems meanwhile, or fail.
        #[arg(long)]
        quiesce: bool,
    },
    /// Make the disks of a VM that is off what they were; what was written since is dropped.
    Revert {
        /// The VM.
        vm: VmName,
        /// The snapshot.
        name: SnapshotName,
    },
    /// Remove a snapshot; what others stand on is kept until they are removed.
    Remove {
        /// The VM.
        vm: VmName,
        /// The snapshot.
        name: SnapshotName,
    },
    /// List the snapshots of a VM; `*` is the one that its disks stand on.
    List {
        /// The VM.
        vm: VmName,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum VolumeCommand {
    /// Take a snapshot of a disk of a VM, running or off; prints its name.
    Create {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: DiskName,
        /// The snapshot's name [default: the time].
        name: Option<SnapshotName>,
        /// Freeze the guest's file systems meanwhile, or fail.
        #[arg(long)]
        quiesce: bool,
    },
    /// Make the disk of a VM that is off what it was; what was written to it since is dropped.
    Revert {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: DiskName,
        /// The snapshot.
        name: SnapshotName,
    },
    /// Remove a snapshot; what others stand on is kept until they are removed.
    Remove {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: DiskName,
        /// The snapshot.
        name: SnapshotName,
    },
    /// List the snapshots of a VM's disks, or of one of them; `*` is the one that they stand on.
    List {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: Option<DiskName>,
    },
}

/// What both have in common.
enum Do {
    Create(Options),
    Revert(SnapshotName),
    Remove(SnapshotName),
    List,
}

pub fn run_vm(context: &Context, command: VmCommand) -> Outcome {
    let (vm, what) = match command {
        VmCommand::Create { vm, name, quiesce } => (vm, Do::Create(Options { name, quiesce })),
        VmCommand::Revert { vm, name } => (vm, Do::Revert(name)),
        VmCommand::Remove { vm, name } => (vm, Do::Remove(name)),
        VmCommand::List { vm } => (vm, Do::List),
    };
    run(context, &Scope { vm, disk: None }, what, false)
}

pub fn run_volume(context: &Context, command: VolumeCommand) -> Outcome {
    let (vm, disk, what) = match command {
        VolumeCommand::Create { vm, disk, name, quiesce } => {
            (vm, Some(disk), Do::Create(Options { name, quiesce }))
        }
        VolumeCommand::Revert { vm, disk, name } => (vm, Some(disk), Do::Revert(name)),
        VolumeCommand::Remove { vm, disk, name } => (vm, Some(disk), Do::Remove(name)),
        VolumeCommand::List { vm, disk } => (vm, disk, Do::List),
    };
    run(context, &Scope { vm, disk }, what, true)
}

fn run(context: &Context, scope: &Scope, what: Do, of_disks: bool) -> Outcome {
    let store = context.open_store()?;
    match what {
        Do::Create(options) => {
            let taken = operate(|control| snapshot::create(&store, scope, &options, control))?;
            context.out.print(&taken, || taken.name.to_string())?;
        }
        Do::Revert(name) => {
            let to = operate(|control| snapshot::revert(&store, scope, &name, control))?;
            context.out.print(&to, || format!("{scope} is what it was at {:.0}", to.created))?;
        }
        Do::Remove(name) => {
            let kept = operate(|control| snapshot::remove(&store, scope, &name, control))?;
            context.out.print(&kept, || match &kept {
                Some(_) => format!("{name} is kept, marked removed, for what stands on it"),
                None => format!("{name} was removed"),
            })?;
        }
        Do::List => {
            let all = snapshot::list(&store, scope, of_disks)?;
            context.out.print(&all, || text(context, &all))?;
        }
    }
    Ok(())
}

/// As a tree: each below the one that it stands on.
fn text(context: &Context, all: &[Listed]) -> String {
    let mut rows = Vec::new();
    let roots = all.iter().filter(|s| !all.iter().any(|p| Some(p.id) == s.parent));
    for root in roots {
        branch(all, root, 0, &mut rows);
    }
    let lines = table(&rows).into_iter();
    let painted = lines.map(|line| match line.ends_with("removed") {
        true => context.out.paint(Colour::Dim, &line),
        false => line,
    });
    painted.collect::<Vec<_>>().join("\n")
}

fn branch(all: &[Listed], snapshot: &Listed, depth: usize, rows: &mut Vec<Vec<String>>) {
    let mark = if snapshot.current { "*" } else { " " };
    let missing: Vec<_> = snapshot.volumes.iter().filter(|v| v.missing).map(|v| v.name.as_str()).collect();
    let state = match (snapshot.removed, missing.is_empty()) {
        (true, _) => "removed".to_owned(),
        (false, true) => String::new(),
        (false, false) => format!("its image of {} is missing", missing.join(", ")),
    };
    rows.push(vec![
        format!("{mark} {}{}", "  ".repeat(depth), snapshot.name),
        snapshot.disk.as_ref().map_or_else(|| "VM".to_owned(), |d| format!("disk {d}")),
        format!("{:.0}", snapshot.created),
        state,
    ]);
    // A hostile record may go round in circles.
    if depth < all.len() {
        for child in all.iter().filter(|c| c.parent == Some(snapshot.id)) {
            branch(all, child, depth + 1, rows);
        }
    }
}
