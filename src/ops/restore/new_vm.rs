//! `create-vm`: all disks of a backup as a new VM.

use std::path::{Path, PathBuf};

use super::{Options, RestoreError, Restored, carry_out, fresh_name, look, planned, quick, short_id, tpm};
use crate::chain::restore::{DiskNow, Into, Place, Restore, restore};
use crate::failpoint;
use crate::hypervisor::xml::new::{new_domain, remove_disk};
use crate::hypervisor::xml::{self, Fate};
use crate::hypervisor::{HypervisorError, ImageRef};
use crate::ops::control::OpControl;
use crate::ops::hypervisor::{self, is_block};
use crate::store::restore_op::{RestoreDisk, RestoreInto, RestoreOp};
use crate::store::vm::{Source, VmState, Volume};
use crate::store::{
    BackupSpec, Manifest, Store, StoreError, StoreResult, VmId, VmName, VmRecord, VolumeId, atomic,
};
use crate::verified::VerifiedReader;

/// Makes the VM `name` of a backup: its definition with another identity, its disks, its firmware's variables. The VM
/// that the backup is of need not be there any more.
///
/// # Errors
/// Nothing is left.
pub fn run(
    store: &Store,
    spec: &BackupSpec,
    name: &VmName,
    options: &Options,
    control: &OpControl<'_>,
) -> Result<Restored, RestoreError> {
    super::refuse_unfinished(store, name)?;
    if store.vm_dir(name).exists() {
        return Err(StoreError::Exists {
            article_what: "a VM",
            name: name.to_string(),
            store: store.root().to_path_buf(),
        }
        .into());
    }
    let command = format!("create-vm {spec} --name {name}");
    let other = store.lock_vm(&spec.vm, &command)?;
    let manifest = store.resolve(spec)?;
    let _lease = store.lease(manifest.id, &format!("restore to the new VM {name}"))?;
    drop(other);
    super::check_options(store, options, &manifest)?;
    let reader = VerifiedReader::new(store.clone(), "a restore");
    let (backup, sources) = look::backup(store, &reader, &manifest, None);
    let own = match &manifest.source {
        Source::Domain { uri, .. } => Some(uri.clone()),
        Source::Disks { .. } => None,
    };
    let (host, uri) = match &options.host {
        Some(host) => {
            let (host, uri) = look::host(store, host, own.as_deref())?;
            (Some(host), uri)
        }
        None => (None, own.clone()),
    };
    let record = blank(store, &manifest, name, uri.as_deref())?;
    let disk = |disk: &crate::store::manifest::Disk| DiskNow {
        name: disk.name.clone(),
        size: disk.virtual_size,
        wanted: look::wanted(options, &disk.name),
        place: Place::Nowhere,
        others: Vec::new(),
        snapshots: Vec::new(),
    };
    let mut asked = Restore {
        into: Into::NewVm,
        quick: options.quick,
        host,
        backup,
        vm: look::vm(store, &record, None)?,
        disks: manifest.disks.iter().map(disk).collect(),
        room: Vec::new(),
    };
    restore(&asked)?;
    let (mut disks, record) = plan(&manifest, record, options)?;
    let mut wanted = Vec::new();
    for (disk, source) in disks.iter().zip(&sources) {
        let folder = disk.path.parent().unwrap_or(&disk.path).to_path_buf();
        wanted.push((folder, look::data(source).map_err(|e| RestoreError::write(&disk.path, e))?));
    }
    asked.room = look::room(&wanted)?;
    restore(&asked)?;
    if let Some(uri) = &uri {
        if hypervisor::has_domain(uri, name.as_str())? {
            let why = format!("there is a domain of that name at {uri}: choose another");
            return Err(RestoreError::cannot(name, why));
        }
        super::keep_error_policies(&mut disks, &old_definition(store, &manifest)?.1);
        let (text, left_out) = definition(store, &manifest, &record, &disks, None)?;
        tpm::refuse_taken(&store.backup_dir(&manifest.vm, &manifest.name), &text)?;
        for dropped in left_out {
            control.warn(format!("the new VM does not get the disk {dropped}, which is not in the backup"));
        }
    }
    let mount = options.quick.then(|| quick::place(store));
    let operation = planned(RestoreInto::NewVm, &manifest, options, mount, None, record.clone(), disks);
    // Before the record: a VM without a journal would be one that nobody cleans up.
    let journal = store.begin(name, operation)?;
    let made = store
        .create_vm(&VmRecord { state: VmState::Restoring, volumes: Vec::new(), ..record })
        .and_then(|()| store.lock_vm(name, &command));
    let _lock = match made {
        Ok(lock) => lock,
        Err(error) => {
            journal.finish()?;
            return Err(error.into());
        }
    };
    carry_out(store, journal, &sources, Vec::new(), control)
}

/// The new VM's record, without its volumes.
fn blank(
    store: &Store,
    manifest: &Manifest,
    name: &VmName,
    uri: Option<&str>,
) -> Result<VmRecord, RestoreError> {
    let source = match (&manifest.source, uri) {
        (Source::Domain { .. }, Some(uri)) => {
            Source::Domain { uri: uri.to_owned(), domain: name.to_string() }
        }
        (source, _) => source.clone(),
    };
    // As the VM that it comes from, where that is known still.
    let offering = store.vm(&manifest.vm).ok().and_then(|old| old.offering);
    Ok(VmRecord { offering, ..VmRecord::new(VmId::random(), name.clone(), source) })
}

fn plan(
    manifest: &Manifest,
    mut record: VmRecord,
    options: &Options,
) -> Result<(Vec<RestoreDisk>, VmRecord), RestoreError> {
    let is_files = matches!(record.source, Source::Disks { .. });
    let id = short_id();
    let mut disks = Vec::new();
    for disk in &manifest.disks {
        let (folder, format) = look::new_place(options, disk, None)?;
        let plain = folder.join(format!("{}-{}.{format}", record.name, disk.name));
        let path = match plain.symlink_metadata() {
            Ok(_) => folder.join(format!("{}-{}-{id}.{format}", record.name, disk.name)),
            Err(_) => plain,
        };
        let target = disk.target.clone().unwrap_or_else(|| disk.name.to_string());
        let volume = VolumeId::random();
        record.volumes.push(Volume {
            id: volume,
            name: disk.name.clone(),
            path: path.clone(),
            format,
            target: disk.target.clone().filter(|_| !is_files),
            serial: None,
            block_device: false,
            detached: false,
        });
        disks.push(RestoreDisk {
            from: disk.name.clone(),
            volume,
            target,
            in_place: false,
            fresh: fresh_name(&path, &id),
            path,
            format,
            size: look::wanted(options, &disk.name).unwrap_or(disk.virtual_size),
            drop: Vec::new(),
            model: None,
            errors: Default::default(),
            access: None,
            outcome: Default::default(),
        });
    }
    Ok((disks, record))
}

/// The definition in the backup, and where that lies.
fn old_definition(store: &Store, of: &Manifest) -> Result<(PathBuf, String), StoreError> {
    let path = store.backup_dir(&of.vm, &of.name).join("domain.xml");
    let text = std::fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
    Ok((path, text))
}

/// The definition, and the disks of the old one that are left out: whoever has the backup must not share them.
fn definition(
    store: &Store,
    of: &Manifest,
    record: &VmRecord,
    disks: &[RestoreDisk],
    op: Option<&RestoreOp>,
) -> Result<(String, Vec<String>), RestoreError> {
    let folder = store.backup_dir(&of.vm, &of.name);
    let (path, old) = old_definition(store, of)?;
    let bad = |why: String| RestoreError::cannot(&record.name, format!("{} {why}", path.display()));
    let parsed = xml::parse(&old).map_err(bad)?;
    let nvram = nvram_path(&folder, &record.name, parsed.nvram.as_deref());
    let mut new = new_domain(&old, record.name.as_str(), record.id.uuid(), nvram.as_deref()).map_err(bad)?;
    let mut dropped = Vec::new();
    for disk in &parsed.disks {
        let Some(restored) = disks.iter().find(|d| d.target == disk.target) else {
            let keep = match &disk.fate {
                Fate::Skipped(why) => {
                    ["is a cdrom", "is a floppy", "is read-only", "is shareable", "has no medium"]
                        .contains(&why.as_str())
                }
                _ => false,
            };
            if !keep {
                new = remove_disk(&new, &disk.target).map_err(bad)?;
                dropped.push(disk.target.clone());
            }
            continue;
        };
        let (chain, errors) = match op.map(|op| super::swap::place(op, restored, &restored.path)) {
            Some(place) => (place.chain, place.errors),
            None => (vec![ImageRef { path: restored.path.clone(), format: restored.format }], None),
        };
        new = xml::set_disk(&new, &disk.target, &chain, &is_block).map_err(bad)?;
        if let Some(policy) = errors {
            new = xml::errors::set_error_policy(&new, &disk.target, &policy).map_err(bad)?;
        }
    }
    if let Some(lost) = disks.iter().find(|d| parsed.disks.iter().all(|p| p.target != d.target)) {
        return Err(bad(format!("has no disk {}", lost.target)));
    }
    Ok((new, dropped))
}

/// Beside the old variables; none where the backup has none.
fn nvram_path(backup: &Path, name: &VmName, old: Option<&Path>) -> Option<PathBuf> {
    let folder = old.filter(|_| backup.join("nvram.fd").exists())?.parent()?;
    Some(folder.join(format!("{name}_VARS.fd")))
}

/// Gives the new VM its firmware's variables, the state of its TPM and its definition.
pub(super) fn define(store: &Store, planned: &RestoreOp) -> Result<(), RestoreError> {
    let Source::Domain { uri, .. } = &planned.record.source else { return Ok(()) };
    match hypervisor::of(&planned.record) {
        // It was defined before a crash.
        Ok(_) => return Ok(()),
        Err(HypervisorError::NoSuchDomain { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    let manifest = store.manifest(&planned.of, &planned.name)?;
    let (text, _) = definition(store, &manifest, &planned.record, &planned.disks, Some(planned))?;
    let saved = store.backup_dir(&planned.of, &planned.name).join("nvram.fd");
    let wanted = xml::parse(&text).ok().and_then(|d| d.nvram);
    if let Some(nvram) = wanted.filter(|_| saved.exists()) {
        let bytes = std::fs::read(&saved).map_err(StoreError::io("read", &saved))?;
        atomic::write(&nvram, &bytes, 0o600)?;
    }
    tpm::copy(&store.backup_dir(&planned.of, &planned.name), &old_definition(store, &manifest)?.1, &text)?;
    hypervisor::define(uri, &text)?;
    failpoint::hit("restore-defined");
    Ok(())
}

/// Removes what the store knows of a new VM that was not made.
pub(super) fn forget(store: &Store, vm: &VmName) -> StoreResult<()> {
    let folder = store.vm_dir(vm);
    if !folder.exists() {
        return Ok(());
    }
    // Never a VM that somebody backed up.
    if !store.backup_names(vm)?.is_empty() {
        return Ok(());
    }
    std::fs::remove_dir_all(&folder).map_err(StoreError::io("delete", &folder))?;
    atomic::sync_parent(&folder)
}
