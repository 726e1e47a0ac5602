//! Restoring backups: a VM's own volumes, one disk as a new volume, or all as a new VM; normal or quick.
//!
//! Each step is written to the journal before it is begun. Until the new images take their places a failure undoes
//! everything (but for block devices, which are overwritten: that is finished); afterwards [`recover`] finishes.

mod error;
mod look;
mod new_vm;
mod new_volume;
mod pull;
mod quick;
mod same_vm;
mod swap;
mod tpm;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

pub use error::RestoreError;
pub use new_vm::run as new_vm;
pub use new_volume::run as new_volume;
pub use same_vm::run as same_vm;

use super::control::OpControl;
use super::disk_source::DiskSource;
use crate::failpoint;
use crate::hypervisor::xml::errors::error_policy;
use crate::store::journal::{Journal, Operation, Outcome};
use crate::store::restore_op::{RestoreDisk, RestoreInto, RestoreOp, RestoreStep};
use crate::store::vm::VmState;
use crate::store::{BackupName, DiskName, Manifest, Store, VmName, VmRecord};
use crate::verified::VerifiedReader;

/// How something is to be restored.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// On the mounted backup, at once; the data is pulled then.
    pub quick: bool,
    /// The name of the host that the VM is to start on.
    pub host: Option<String>,
    /// Bytes per second, at most.
    pub rate: Option<u64>,
    /// Sizes of disks in bytes, by their names in the backup; without a name that of the only disk.
    pub sizes: Vec<(Option<DiskName>, u64)>,
    /// Folder for new images, instead of where the volumes are or were.
    pub storage: Option<PathBuf>,
}

/// What was restored.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Restored {
    /// The VM that has the volumes.
    pub vm: VmName,
    /// The backup, as `VM/BACKUP`.
    pub backup: String,
    /// The volumes.
    pub volumes: Vec<RestoredVolume>,
    /// Volumes that the backup does not know, which stayed as they are.
    pub left: Vec<DiskName>,
}

/// One volume.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RestoredVolume {
    /// The disk of the backup.
    pub disk: DiskName,
    /// The volume's name.
    pub name: DiskName,
    /// Device in the guest, of a domain.
    pub target: Option<String>,
    /// Its image.
    pub path: PathBuf,
}

/// Refuses a VM with an operation that was interrupted, or that is pulled still.
fn refuse_unfinished(store: &Store, vm: &VmName) -> Result<(), RestoreError> {
    let mut found = None;
    for journal in store.unfinished()?.into_iter().filter(|j| j.entry().vm == *vm) {
        if !store.is_compressing(journal.entry())? {
            found.get_or_insert(journal);
        }
    }
    let Some(journal) = found else { return Ok(()) };
    let why = match &journal.entry().operation {
        Operation::Restore(op) if op.mount.is_some() && op.step > RestoreStep::Swap => {
            "the data of a quick restore is not all pulled yet: run `knibfs recover`, which goes on with it"
        }
        _ => "an operation on it was interrupted: run `knibfs recover` first",
    };
    Err(RestoreError::cannot(vm, why))
}

/// Checks sizes and the folder before anything else is looked at.
fn check_options(store: &Store, options: &Options, manifest: &Manifest) -> Result<(), RestoreError> {
    let backup = format!("{}/{}", manifest.vm, manifest.name);
    for (name, _) in &options.sizes {
        let has = || manifest.disks.iter().map(|d| d.name.to_string()).collect::<Vec<_>>().join(", ");
        match name {
            Some(name) if manifest.disk(name).is_none() => {
                let why = format!("--size names the disk {name}, and the backup has {}", has());
                return Err(RestoreError::cannot(backup, why));
            }
            None if manifest.disks.len() > 1 => {
                let why = format!("it has several disks ({}): write --size DISK=SIZE", has());
                return Err(RestoreError::cannot(backup, why));
            }
            _ => {}
        }
    }
    if let Some(folder) = &options.storage {
        let refuse = |why: &str| Err(RestoreError::cannot(backup, format!("{} {why}", folder.display())));
        match folder.to_str() {
            _ if !folder.is_absolute() || !folder.is_dir() => {
                return refuse("is no folder: name one that is there with --storage");
            }
            _ if folder.starts_with(store.root()) => {
                return refuse("lies in the store: name a folder on primary with --storage");
            }
            Some(text) if !text.contains([':', ',']) && !text.chars().any(char::is_control) => {}
            _ => return refuse("holds a colon, a comma or a control character, which QEMU cannot take"),
        }
    }
    Ok(())
}

/// The operation of a journal that is a restore.
fn op(journal: &Journal) -> Result<&RestoreOp, RestoreError> {
    match &journal.entry().operation {
        Operation::Restore(op) => Ok(op),
        _ => Err(RestoreError::cannot(&journal.entry().vm, "its journal is of another operation")),
    }
}

/// A restore that was planned, from its first write to its end.
fn carry_out(
    store: &Store,
    mut journal: Journal,
    sources: &[DiskSource],
    left: Vec<DiskName>,
    control: &OpControl<'_>,
) -> Result<Restored, RestoreError> {
    failpoint::hit("restore-planned");
    let written = mount(store, &mut journal).and_then(|()| write_all(&mut journal, sources, control));
    if let Err(error) = written {
        return Err(give_up(store, journal, error, control));
    }
    forward(store, journal, left, control)
}

/// Mounts the store, for a quick restore. The journal is there first: a mount that nobody knows of would stay for ever.
fn mount(store: &Store, journal: &mut Journal) -> Result<(), RestoreError> {
    let Some(mount) = op(journal)?.mount.clone() else { return Ok(()) };
    quick::mount(store)?;
    Ok(journal.update_restore(|op| op.opened = quick::device(&mount))?)
}

/// Writes the new images and overwrites the devices. Files come first: they can be given up.
fn write_all(
    journal: &mut Journal,
    sources: &[DiskSource],
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    let planned = op(journal)?.clone();
    let stopped = || if control.is_cancelled() { Err(RestoreError::Cancelled) } else { Ok(()) };
    let rate = planned.rate;
    for in_place in [false, true] {
        for (at, (disk, source)) in planned.disks.iter().zip(sources).enumerate() {
            if disk.in_place != in_place {
                continue;
            }
            stopped()?;
            if in_place {
                journal.update_restore(|op| begin_device(op, at))?;
                failpoint::hit("restore-device");
            }
            match planned.mount.as_ref() {
                Some(mount) => write::overlay(disk, &raw_view(mount, &planned, disk))?,
                None => write::whole(source, disk, rate, control)?,
            }
            failpoint::hit("restore-written");
        }
    }
    stopped()
}

fn begin_device(op: &mut RestoreOp, at: usize) {
    if let Some(disk) = op.disks.get_mut(at) {
        disk.outcome = Outcome::Begun;
    }
}

/// Where the mount shows a disk of the backup as its guest saw it.
fn raw_view(mount: &Path, op: &RestoreOp, disk: &RestoreDisk) -> PathBuf {
    mount.join("vms").join(&op.of).join(&op.name).join(format!("{}.raw", disk.from))
}

/// After a failure before anything was swapped: undone, unless a device was overwritten.
fn give_up(store: &Store, journal: Journal, error: RestoreError, control: &OpControl<'_>) -> RestoreError {
    let begun = op(&journal).is_ok_and(|op| op.disks.iter().any(|d| d.outcome != Outcome::Pending));
    if begun {
        let left =
            "a block device is overwritten in part, so the VM must not start (its state is RestoreError)";
        return RestoreError::Unfinished { error: Box::new(error), left: left.into() };
    }
    control.step("undoing what was begun");
    match undo(store, journal) {
        Ok(()) => error,
        Err(undo) => RestoreError::Unfinished {
            error: Box::new(error),
            left: format!("new images could not be removed: {undo}"),
        },
    }
}

/// Removes the new images; nothing names them yet.
fn undo(store: &Store, journal: Journal) -> Result<(), RestoreError> {
    let planned = op(&journal)?.clone();
    for disk in planned.disks.iter().filter(|d| !d.in_place) {
        crate::store::atomic::remove(&disk.fresh)?;
        failpoint::hit("restore-undone-disk");
    }
    let vm = journal.entry().vm.clone();
    if planned.into == RestoreInto::NewVm {
        new_vm::forget(store, &vm)?;
    } else {
        let mut record = store.vm(&vm)?;
        if record.state != VmState::Ready {
            record.state = VmState::Ready;
            store.save_vm(&record)?;
        }
    }
    release_mount(store, journal)
}

/// Everything after the new images are whole; also what `recover` does with a restore that came so far.
fn forward(
    store: &Store,
    mut journal: Journal,
    left: Vec<DiskName>,
    control: &OpControl<'_>,
) -> Result<Restored, RestoreError> {
    // What is begun here is finished, whatever the caller wants, until data is pulled.
    let go_on = AtomicBool::new(false);
    let firm = OpControl { cancel: &go_on, ..*control };
    if op(&journal)?.step <= RestoreStep::Swap {
        journal.update_restore(|op| op.step = RestoreStep::Swap)?;
        failpoint::hit("restore-swap");
        if let Err(error) = swap::all(store, &mut journal, &firm) {
            return Err(match swap::is_refused(op(&journal)?, &error) {
                true => not_attached(store, journal, error),
                false => error,
            });
        }
        failpoint::hit("restore-swapped");
        end_chain(store, &journal)?;
        save(store, &journal, op(&journal)?.mount.is_some())?;
        failpoint::hit("restore-recorded");
        journal.update_restore(|op| op.step = RestoreStep::Start)?;
    }
    let trouble = match op(&journal)?.mount.is_some() {
        true => quick::finish(store, &mut journal, control)?,
        false => None,
    };
    save(store, &journal, false)?;
    failpoint::hit("restore-done");
    let done = op(&journal)?.clone();
    let vm = journal.entry().vm.clone();
    release_mount(store, journal)?;
    if let Some(why) = trouble {
        let why = format!("its volumes are restored, all data is there, but it was not started: {why}");
        return Err(RestoreError::cannot(&vm, why));
    }
    let volumes = done.disks.iter().filter_map(|disk| {
        let volume = done.record.volumes.iter().find(|v| v.id == disk.volume)?;
        Some(RestoredVolume {
            disk: disk.from.clone(),
            name: volume.name.clone(),
            target: volume.target.clone(),
            path: volume.path.clone(),
        })
    });
    Ok(Restored { vm, backup: format!("{}/{}", done.of, done.name), volumes: volumes.collect(), left })
}

/// The VM does not get the new volume, and nothing of it is left.
fn not_attached(store: &Store, journal: Journal, error: RestoreError) -> RestoreError {
    let removed = op(&journal)
        .and_then(|op| Ok(op.disks.iter().try_for_each(|disk| crate::store::atomic::remove(&disk.path))?))
        .and_then(|()| undo(store, journal));
    match removed {
        Ok(()) => RestoreError::NotAttached { error: Box::new(error) },
        Err(undo) => RestoreError::Unfinished {
            error: Box::new(error),
            left: format!("the new volume could not be removed: {undo}"),
        },
    }
}

/// Ends the journal, and takes the mount away where nothing else needs it.
fn release_mount(store: &Store, journal: Journal) -> Result<(), RestoreError> {
    let mount = op(&journal)?.mount.clone();
    journal.finish()?;
    if let Some(mount) = mount {
        quick::release(store, &mount);
    }
    Ok(())
}

/// Section 3, "Ending a chain early": nothing stands on what was the current backup.
fn end_chain(store: &Store, journal: &Journal) -> Result<(), RestoreError> {
    let vm = &journal.entry().vm;
    if op(journal)?.into != RestoreInto::SameVm {
        return Ok(());
    }
    let Some(current) = store.vm(vm)?.tracking.current else { return Ok(()) };
    match store.manifest(vm, &current.name) {
        Ok(mut manifest) if manifest.id == current.id && !manifest.end_of_chain => {
            manifest.end_of_chain = true;
            store.save_manifest(&manifest)?;
        }
        // A damaged one ends its chain by itself.
        _ => {}
    }
    Ok(())
}

fn save(store: &Store, journal: &Journal, restoring: bool) -> Result<(), RestoreError> {
    let mut record = op(journal)?.record.clone();
    record.state = if restoring { VmState::Restoring } else { VmState::Ready };
    Ok(store.save_vm(&record)?)
}

/// Finishes or undoes a restore that was interrupted. The caller holds the VM's lock. What was done, in words.
///
/// # Errors
/// It could be neither finished nor undone; it can be called again.
pub fn recover(store: &Store, mut journal: Journal, control: &OpControl<'_>) -> Result<String, RestoreError> {
    let planned = op(&journal)?.clone();
    let (vm, backup) = (journal.entry().vm.clone(), format!("{}/{}", planned.of, planned.name));
    if planned.step == RestoreStep::Write {
        if planned.disks.iter().all(|d| d.outcome == Outcome::Pending) {
            control.step(format!("undoing an interrupted restore of {backup}"));
            undo(store, journal)?;
            return Ok(format!("an interrupted restore of {backup} to {vm} was undone"));
        }
        control.step(format!("overwriting the devices of {vm} again, from {backup}"));
        let manifest = store.manifest(&planned.of, &planned.name)?;
        let reader = VerifiedReader::new(store.clone(), "a restore");
        let sources = planned
            .disks
            .iter()
            .map(|disk| {
                DiskSource::open(store, &reader, &manifest, &disk.from)
                    .map_err(|why| RestoreError::Read { disk: disk.from.clone(), why })
            })
            .collect::<Result<Vec<_>, _>>()?;
        write_all(&mut journal, &sources, control)?;
    }
    control.step(format!("finishing the restore of {backup} to {vm}"));
    match forward(store, journal, Vec::new(), control) {
        Ok(_) => {}
        Err(error @ RestoreError::NotAttached { .. }) => {
            return Ok(format!("an interrupted restore of {backup} to {vm} was undone: {error}"));
        }
        Err(error) => return Err(error),
    }
    Ok(format!("the restore of {backup} to {vm} was finished"))
}

/// A new name beside `path` that nothing has.
fn fresh_name(path: &Path, id: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{id}.knib-new"))
}

/// A short piece of a random identity, for names.
fn short_id() -> String {
    crate::store::OpId::random().to_string().chars().take(8).collect()
}

/// Who owns an image and who may read it.
fn access_of(path: &Path) -> Option<(u32, u32, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).ok().map(|m| (m.uid(), m.gid(), m.mode() & 0o7777))
}

/// The record as it is when a volume lies elsewhere.
fn settle(record: &mut VmRecord, disk: &RestoreDisk, path: &Path) {
    if let Some(volume) = record.volumes.iter_mut().find(|v| v.id == disk.volume) {
        path.clone_into(&mut volume.path);
    }
}

/// What is to become of I/O errors when the mount is not needed any more: as `text` says it, which has the disks.
fn keep_error_policies(disks: &mut [RestoreDisk], text: &str) {
    for disk in disks {
        let new = disk.model.as_ref().map(|disk| format!("<domain><devices>{disk}</devices></domain>"));
        disk.errors = error_policy(new.as_deref().unwrap_or(text), &disk.target).unwrap_or_default();
    }
}

/// The operation as the journal has it, with what every kind has in common.
#[allow(clippy::too_many_arguments)] // three callers, all of this module
fn planned(
    into: RestoreInto,
    manifest: &Manifest,
    options: &Options,
    mount: Option<PathBuf>,
    move_to: Option<String>,
    record: VmRecord,
    disks: Vec<RestoreDisk>,
) -> Operation {
    let name: BackupName = manifest.name.clone();
    Operation::Restore(Box::new(RestoreOp {
        backup: manifest.id,
        of: manifest.vm.clone(),
        name,
        into,
        step: RestoreStep::Write,
        move_to,
        rate: options.rate,
        flushing: false,
        opened: None,
        mount,
        reopening: false,
        record,
        disks,
    }))
}
