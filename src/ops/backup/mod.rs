//! Taking a backup of a VM.
//!
//! Each step is written to the journal before it is begun, so that [`super::recover`] can finish or undo it. Until the
//! backup is published a failure undoes everything; afterwards it only keeps deltas longer.

pub(crate) mod before;
mod copy;
mod definition;
mod error;
pub(crate) mod merge;
mod scan;

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

pub(crate) use before::primary;
pub use error::BackupError;

use super::control::OpControl;
use super::deadline::within;
use super::{deltas, detached, images, whereabouts};
use crate::chain::{Method, Plan};
use crate::failpoint;
use crate::hypervisor::{Guest, GuestVolume, Hypervisor, ImageRef, Images as _, NewOverlay, Power, Quiesce};
use crate::store::journal::{BackupOp, BackupStep, DiskOp, Journal, Operation, Outcome};
use crate::store::manifest::{BackupState, CompressionState, Manifest, Skipped, ValidationState};
use crate::store::vm::VmState;
use crate::store::{BackupId, BackupName, DiskName, Staging, Store, StoreError, VmName, VmRecord};
use before::Taken;

/// How long a guest may take to freeze its file systems.
pub(crate) const FREEZE: Duration = Duration::from_secs(30);
/// How long its agent may take to answer.
pub(crate) const AGENT: Duration = Duration::from_secs(10);

/// How a backup is to be taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Outside every chain.
    pub isolated: bool,
    /// Freeze the guest's file systems, or fail.
    pub quiesce: bool,
}

struct Run<'a> {
    store: &'a Store,
    record: VmRecord,
    control: OpControl<'a>,
    hypervisor: &'a dyn Hypervisor,
    options: Options,
    backup: BackupId,
    started: Timestamp,
}

/// Takes a backup; its manifest when it is whole in the store and everything is recorded.
///
/// # Errors
/// The VM is as it was before and nothing is left, unless the error is [`BackupError::NotUndone`] or
/// [`BackupError::Unfinished`].
pub fn run(
    store: &Store,
    vm: &VmName,
    options: Options,
    control: &OpControl<'_>,
) -> Result<Manifest, BackupError> {
    let limit = Duration::from_secs(store.settings()?.timeout());
    match within(control, limit, |control| once(store, vm, options, control)) {
        (Err(BackupError::Cancelled), true) => Err(BackupError::TimedOut { vm: vm.clone(), limit }),
        (done, _) => done,
    }
}

fn once(
    store: &Store,
    vm: &VmName,
    options: Options,
    control: &OpControl<'_>,
) -> Result<Manifest, BackupError> {
    store.vm(vm)?;
    let _lock = store.lock_vm(vm, &format!("backup {vm}"))?;
    if store.interrupted(vm)? {
        let why = "an operation on it was interrupted: run `knibfs recover` first";
        return Err(BackupError::refused(vm, why));
    }
    let mut again = true;
    loop {
        // Under the lock.
        let mut record = store.vm_in_care(vm)?;
        let hypervisor = whereabouts::find(store, &mut record)?;
        let mut run = Run {
            store,
            record,
            control: *control,
            hypervisor: &*hypervisor,
            options,
            backup: BackupId::random(),
            started: Timestamp::now(),
        };
        match run.take() {
            // With what it found recorded, the second attempt is full.
            Err(BackupError::Copy { disk, .. }) if again && run.stands_on_damage(&disk)? => {
                control.warn(format!(
                    "the checksums that {disk} was compared with are damaged: this backup is full"
                ));
                again = false;
            }
            done => return done,
        }
    }
}

impl Run<'_> {
    fn take(&mut self) -> Result<Manifest, BackupError> {
        let guest = self.hypervisor.inspect()?;
        before::check(&self.record, &guest)?;
        if self.options.quiesce && guest.power != Power::Off {
            // Before anything is begun: most guests that cannot freeze have no agent.
            self.hypervisor.agent_ping(AGENT)?;
        }
        before::refresh(&mut self.record, &guest)?;
        detached::settle(self.store, &mut self.record, &guest, self.hypervisor, &self.control)?;
        let history = self.store.backups(&self.record.name)?.manifests;
        let mut taken = before::look(self.store, &self.record, &guest, &history)?;
        before::check_bases(&self.record, &mut taken, self.options.isolated)?;
        let offering = self.record.offering.map(|id| self.store.offering(id)).transpose()?;
        let chain_size = match offering.as_ref().and_then(|o| o.chain_size) {
            Some(size) => size,
            None => self.store.settings()?.chain_size(),
        };
        let plan = before::decide(&self.record, chain_size, self.options.isolated, &history, &taken);
        let method = before::method(&self.record);
        if guest.power == Power::Off {
            for image in taken.iter().filter_map(|t| t.now.images.first()) {
                let image = ImageRef { path: image.path.clone(), format: image.format };
                images::EngineImages.check_unused(&image)?;
            }
        }
        let disks = self.disks(&taken, &plan, method)?;
        let operation = Operation::Backup(BackupOp {
            backup: self.backup,
            name: None,
            isolated: self.options.isolated,
            end_of_chain: plan.end_of_chain,
            step: BackupStep::Planned,
            disks,
            tracking: None,
        });
        let mut journal = self.store.begin(&self.record.name, operation)?;
        failpoint::hit("backup-planned");
        let staging = self.store.staging(&self.record.name, self.backup);
        let compression = offering.as_ref().filter(|o| o.compress && self.store.is_write_once());
        let compression = compression.map(|o| o.compression_library);
        let made =
            self.store.stage(&self.record.name, self.backup).map_err(BackupError::from).and_then(|_| {
                self.copy(&mut journal, &guest, &history, &taken, &plan, method, compression, &staging)
            });
        let mut manifest = match made {
            Ok(manifest) => manifest,
            Err(error) => return Err(self.undone(journal, staging, error)),
        };
        journal.update_backup(|op| op.step = BackupStep::Publish)?;
        failpoint::hit("backup-publish");
        if let Err(error) = staging.publish(self.store, &mut manifest) {
            let staging = self.store.staging(&self.record.name, self.backup);
            return Err(self.undone(journal, staging, error.into()));
        }
        failpoint::hit("backup-published");
        let finished =
            finish(self.store, &mut self.record, self.hypervisor, journal, &manifest, &self.control);
        for warning in finished.map_err(|error| BackupError::Unfinished {
            backup: format!("{}/{}", manifest.vm, manifest.name),
            error: Box::new(error),
        })? {
            self.control.warn(warning);
        }
        Ok(manifest)
    }

    fn disks(&self, taken: &[Taken], plan: &Plan, method: Method) -> Result<Vec<DiskOp>, BackupError> {
        let mut disks = Vec::new();
        for (taken, plan) in taken.iter().zip(&plan.volumes) {
            let overlay = match method {
                Method::Scan => None,
                Method::Delta => Some(self.overlay(taken)?),
            };
            disks.push(DiskOp {
                volume: taken.volume.id,
                name: taken.volume.name.clone(),
                target: taken.volume.target.clone(),
                kind: plan.kind,
                frozen: taken.now.images.clone(),
                overlay,
                copy: Outcome::Pending,
                merges: Vec::new(),
            });
        }
        Ok(disks)
    }

    /// The path of the image that the snapshot adds.
    fn overlay(&self, taken: &Taken) -> Result<PathBuf, BackupError> {
        let place = deltas::Place {
            record: &self.record,
            volume: &taken.volume,
            block_device: taken.block_device,
            live: &taken.volume.path,
        };
        let path = place.overlay(&self.backup.to_string());
        path.map_err(|why| BackupError::refused(&self.record.name, why))
    }

    #[allow(clippy::too_many_arguments)] // one caller
    fn copy(
        &self,
        journal: &mut Journal,
        guest: &Guest,
        history: &[Manifest],
        taken: &[Taken],
        plan: &Plan,
        method: Method,
        compression: Option<crate::store::manifest::Compression>,
        staging: &Staging,
    ) -> Result<Manifest, BackupError> {
        let record = &self.record;
        definition::copy(guest, staging)?;
        self.stopped()?;
        journal.update_backup(|op| op.step = BackupStep::Snapshot)?;
        failpoint::hit("backup-snapshot");
        let (after, frozen, mut notes) = self.snapshot(journal, guest)?;
        let when = Timestamp::now();
        failpoint::hit("backup-snapshotted");
        self.plan_merges(journal, taken, plan, &after)?;
        let copy = copy::Copy {
            run: self,
            history,
            method,
            parent: plan.parent.as_ref().map(|p| &p.name),
            compression,
            staging,
        };
        let mut disks = Vec::new();
        for (taken, plan) in taken.iter().zip(&plan.volumes) {
            let image = frozen_image(taken, &after, method)?;
            self.control.step(format!("{}: {}, because {}", taken.volume.name, plan.kind, plan.why));
            disks.push(copy.disk(taken, plan, &image)?);
            failpoint::hit("backup-copied");
        }
        self.stopped()?;
        let left = before::left_behind(record, taken);
        left.iter().for_each(|note| self.control.warn(note.as_str()));
        notes.extend(left);
        let skipped =
            guest.skipped.iter().map(|s| Skipped { disk: s.target.clone(), reason: s.reason.clone() });
        let excluded = record
            .exclude
            .iter()
            .filter(|name| guest.skipped.iter().all(|s| s.target != name.as_str()))
            .map(|name| Skipped { disk: name.to_string(), reason: "it is excluded".into() });
        let state =
            if compression.is_some() { CompressionState::Compressed } else { CompressionState::Uncompressed };
        Ok(Manifest {
            id: self.backup,
            name: BackupName::at(when, 1),
            vm: record.name.clone(),
            vm_id: record.id,
            sequence: next_sequence(record, history),
            parent: plan.parent.clone(),
            position: plan.position,
            isolated: self.options.isolated,
            end_of_chain: plan.end_of_chain,
            state: BackupState::BackedUp,
            compression: state,
            validation: ValidationState::NotValidated,
            started: self.started,
            taken: when,
            finished: Timestamp::now(),
            quiesced: frozen,
            source: record.source.clone(),
            disks,
            skipped: skipped.chain(excluded).collect(),
            notes,
            knibfs_version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// Freezes the state of all disks; their chains afterwards.
    fn snapshot(
        &self,
        journal: &mut Journal,
        guest: &Guest,
    ) -> Result<(Vec<GuestVolume>, bool, Vec<String>), BackupError> {
        let Operation::Backup(op) = &journal.entry().operation else { return Ok(Default::default()) };
        let overlays: Vec<NewOverlay> = op
            .disks
            .iter()
            .filter_map(|d| Some(NewOverlay { target: merge::target(d), path: d.overlay.clone()? }))
            .collect();
        let quiesce = if self.options.quiesce { Quiesce::Required { limit: FREEZE } } else { Quiesce::No };
        if overlays.is_empty() {
            journal.update_backup(|op| op.step = BackupStep::Copy)?;
            return Ok((guest.volumes.clone(), false, Vec::new()));
        }
        self.control.step("taking a snapshot of all disks");
        let snapshot = self.hypervisor.snapshot(&overlays, quiesce)?;
        Ok((snapshot.volumes, snapshot.frozen, snapshot.notes))
    }

    fn plan_merges(
        &self,
        journal: &mut Journal,
        taken: &[Taken],
        plan: &Plan,
        after: &[GuestVolume],
    ) -> Result<(), BackupError> {
        journal.update_backup(|op| {
            op.step = BackupStep::Copy;
            for disk in op.disks.iter_mut().filter(|d| d.overlay.is_some()) {
                let target = merge::target(disk);
                let Some(chain) = after.iter().find(|v| v.target == target).map(|v| &v.chain) else {
                    continue;
                };
                if taken.iter().any(|t| t.target == target) {
                    let held = deltas::held(&self.record, disk.volume);
                    disk.merges =
                        merge::plan(&disk.frozen, chain, !plan.becomes_current, plan.end_of_chain, &held);
                }
            }
        })?;
        Ok(())
    }

    /// After a scan that failed: whether the checksums that it compared with are damaged, which is recorded.
    fn stands_on_damage(&self, disk: &DiskName) -> Result<bool, BackupError> {
        let scanned = before::method(&self.record) == Method::Scan;
        let Some(volume) = self.record.volume(disk).filter(|_| scanned) else { return Ok(false) };
        let history = self.store.backups(&self.record.name)?.manifests;
        before::find_damaged_sums(self.store, &self.record, volume.id, &history)
    }

    fn stopped(&self) -> Result<(), BackupError> {
        if self.control.is_cancelled() { Err(BackupError::Cancelled) } else { Ok(()) }
    }

    /// Undoes a backup that failed before it was published; the error for the caller.
    fn undone(&mut self, journal: Journal, staging: Staging, error: BackupError) -> BackupError {
        self.control.step("undoing what was begun");
        match undo(&mut self.record, self.store, self.hypervisor, journal, staging, &self.control) {
            Ok(()) => error,
            Err(undo) => {
                self.record.state = VmState::BackupError;
                if let Err(e) = self.store.save_vm(&self.record) {
                    tracing::warn!("the VM's state could not be recorded: {e}");
                }
                BackupError::NotUndone { error: Box::new(error), undo: Box::new(undo) }
            }
        }
    }
}

fn next_sequence(record: &VmRecord, history: &[Manifest]) -> u64 {
    history.iter().map(|m| m.sequence.saturating_add(1)).fold(record.next_sequence, u64::max)
}

/// The image to copy: below the new overlay; for a scan the disk itself.
fn frozen_image(taken: &Taken, after: &[GuestVolume], method: Method) -> Result<ImageRef, BackupError> {
    let chain = after.iter().find(|v| v.target == taken.target).map(|v| v.chain.as_slice());
    let at = usize::from(method == Method::Delta);
    chain.unwrap_or_default().get(at).cloned().ok_or_else(|| {
        BackupError::Store(StoreError::Invalid(format!(
            "the snapshot of {} left no frozen image",
            taken.volume.name
        )))
    })
}

/// After the backup was published: merges, records how the VM was left, and ends the journal. What was kept, in words.
pub(super) fn finish(
    store: &Store,
    record: &mut VmRecord,
    hypervisor: &dyn Hypervisor,
    mut journal: Journal,
    manifest: &Manifest,
    control: &OpControl<'_>,
) -> Result<Vec<String>, BackupError> {
    journal.update_backup(|op| {
        op.name = Some(manifest.name.clone());
        op.step = BackupStep::Merge;
    })?;
    let kept = merge::merge_all(hypervisor, &mut journal, control)?;
    let guest = hypervisor.inspect()?;
    if let Operation::Backup(op) = &journal.entry().operation {
        merge::track(record, op, manifest, &guest)?;
    }
    record.state = VmState::Ready;
    let tracking = record.tracking.clone();
    journal.update_backup(|op| {
        op.step = BackupStep::Record;
        op.tracking = Some(tracking);
    })?;
    failpoint::hit("backup-record");
    store.save_vm(record)?;
    failpoint::hit("backup-recorded");
    journal.finish()?;
    Ok(kept)
}

/// Before the backup was published: the VM goes on without the new overlays, the store forgets what was copied.
pub(super) fn undo(
    record: &mut VmRecord,
    store: &Store,
    hypervisor: &dyn Hypervisor,
    journal: Journal,
    staging: Staging,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    let Operation::Backup(op) = &journal.entry().operation else { return Ok(()) };
    // What undoes must not stop where the backup was told to.
    let go_on = std::sync::atomic::AtomicBool::new(false);
    let control = OpControl { cancel: &go_on, ..*control };
    let overlays: Vec<NewOverlay> = op
        .disks
        .iter()
        .filter_map(|d| Some(NewOverlay { target: merge::target(d), path: d.overlay.clone()? }))
        .collect();
    if op.step >= BackupStep::Snapshot && !overlays.is_empty() {
        let guest = hypervisor.inspect()?;
        for overlay in &overlays {
            undo_disk(hypervisor, &guest, overlay, &control)?;
            failpoint::hit("backup-undone-disk");
        }
        if guest.uuid.is_none() {
            super::hypervisor::disk_files(record)?.undo_interrupted(&overlays)?;
        }
    }
    staging.discard()?;
    if record.state != VmState::Ready {
        record.state = VmState::Ready;
        store.save_vm(record)?;
    }
    journal.finish()?;
    Ok(())
}

/// The overlay that a snapshot put on a disk and what it froze, top first, if it was put there.
pub(crate) fn placed<'a>(
    guest: &'a Guest,
    target: &str,
    overlay: &Path,
) -> Option<(&'a ImageRef, &'a ImageRef)> {
    let chain = &guest.volumes.iter().find(|v| v.target == target)?.chain;
    let at = chain.iter().position(|i| i.path == overlay)?;
    match guest.uuid {
        Some(_) => chain.get(at).zip(chain.get(at + 1)),
        // A plain disk file's overlay took the given path, and `overlay` is the old image.
        None => chain.get(at.checked_sub(1)?).zip(chain.get(at)),
    }
}

/// Takes an overlay of an interrupted snapshot out of its chain; what was written to it stays.
pub(crate) fn undo_disk(
    hypervisor: &dyn Hypervisor,
    guest: &Guest,
    overlay: &NewOverlay,
    control: &OpControl<'_>,
) -> Result<(), BackupError> {
    if let Some((top, base)) = placed(guest, &overlay.target, &overlay.path) {
        let (target, top, base) = (&overlay.target, &top.path, &base.path);
        if !merge::commit(hypervisor, target, top, base, control)? {
            let what = format!("{} does not stand on {} any more", top.display(), base.display());
            return Err(StoreError::Invalid(what).into());
        }
    }
    if guest.uuid.is_some() {
        merge::unlink(hypervisor, &overlay.path)?;
    }
    Ok(())
}
