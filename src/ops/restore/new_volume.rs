//! `restore-volume`: one disk of a backup as a new volume of a VM, the same or another.

use super::{Options, RestoreError, Restored, carry_out, fresh_name, look, planned, quick, short_id};
use crate::chain::restore::{DiskNow, Into, Place, Restore, restore};
use crate::hypervisor::xml::new::{Likeness, free_target, new_disk, targets};
use crate::hypervisor::{Guest, ImageRef};
use crate::ops::control::OpControl;
use crate::ops::hypervisor::{is_block, target};
use crate::ops::whereabouts;
use crate::store::manifest::{Disk, Manifest};
use crate::store::restore_op::{RestoreDisk, RestoreInto};
use crate::store::vm::{Source, VmState, Volume};
use crate::store::{DiskName, DiskSpec, Store, StoreError, VmName, VmRecord, VolumeId};
use crate::verified::VerifiedReader;

/// Restores a disk as a new volume of `to`, running or stopped. The VM that the backup is of need not be there any more.
///
/// # Errors
/// All is as before.
pub fn run(
    store: &Store,
    spec: &DiskSpec,
    to: &VmName,
    options: &Options,
    control: &OpControl<'_>,
) -> Result<Restored, RestoreError> {
    store.vm(to)?;
    let named = format!("{}/{}", spec.backup, spec.disk);
    let _lock = store.lock_vm(to, &format!("restore-volume {named} --to {to}"))?;
    super::refuse_unfinished(store, to)?;
    let mut record = store.vm_in_care(to)?;
    // Nothing else works on the backup while the lease is taken; afterwards the lease protects it.
    let other = (spec.backup.vm != *to)
        .then(|| store.lock_vm(&spec.backup.vm, &format!("restore-volume {named} --to {to}")))
        .transpose()?;
    let manifest = store.resolve(&spec.backup)?;
    let _lease = store.lease(manifest.id, &format!("restore of a volume to {to}"))?;
    drop(other);
    let Some(disk) = manifest.disk(&spec.disk) else {
        let has = manifest.disks.iter().map(|d| d.name.to_string()).collect::<Vec<_>>().join(", ");
        return Err(RestoreError::cannot(named, format!("the backup has no such disk: it has {has}")));
    };
    let mut options = options.clone();
    // There is just one disk here.
    for (name, _) in options.sizes.iter_mut().filter(|(name, _)| name.is_none()) {
        *name = Some(disk.name.clone());
    }
    super::check_options(store, &options, &manifest)?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let guest = hypervisor.inspect()?;
    let reader = VerifiedReader::new(store.clone(), "a restore");
    let (backup, sources) = look::backup(store, &reader, &manifest, Some(&disk.name));
    let wanted = look::wanted(&options, &disk.name);
    let (host, uri) = look::asked_host(store, &options, &record)?;
    let mut asked = Restore {
        into: Into::NewVolume,
        quick: options.quick,
        host,
        backup,
        vm: look::vm(store, &record, Some(&guest))?,
        disks: vec![DiskNow {
            name: disk.name.clone(),
            size: disk.virtual_size,
            wanted,
            place: Place::Nowhere,
            others: Vec::new(),
            snapshots: Vec::new(),
        }],
        room: Vec::new(),
    };
    restore(&asked)?;
    let (mut new, after) = plan(store, &record, &guest, &manifest, disk, &options)?;
    if let Some(source) = sources.first() {
        let folder = new.path.parent().unwrap_or(&new.path).to_path_buf();
        let bytes = look::data(source).map_err(|e| RestoreError::write(&new.path, e))?;
        asked.room = look::room(&[(folder, bytes)])?;
        restore(&asked)?;
    }
    super::keep_error_policies(std::slice::from_mut(&mut new), &guest.xml);
    let mount = options.quick.then(|| quick::place(store));
    let move_to = uri.filter(|_| asked.host.as_ref().is_some_and(|h| !h.is_own));
    let operation = planned(RestoreInto::NewVolume, &manifest, &options, mount, move_to, after, vec![new]);
    let journal = store.begin(to, operation)?;
    store.save_vm(&VmRecord { state: VmState::Restoring, ..record.clone() })?;
    carry_out(store, journal, &sources, Vec::new(), control)
}

fn plan(
    store: &Store,
    record: &VmRecord,
    guest: &Guest,
    manifest: &Manifest,
    disk: &Disk,
    options: &Options,
) -> Result<(RestoreDisk, VmRecord), RestoreError> {
    let is_files = matches!(record.source, Source::Disks { .. });
    let was = disk.target.clone().unwrap_or_else(|| disk.name.to_string());
    let bad = |why: String| RestoreError::cannot(&record.name, format!("its definition {why}"));
    // A name that no volume has or had: backups know them by it.
    let mut taken: Vec<String> =
        record.volumes.iter().flat_map(|v| [target(v), v.name.to_string()]).collect();
    taken.extend(record.exclude.iter().map(ToString::to_string));
    let name = if is_files {
        let names = (2..).map(|n: u32| format!("{}-{n}", disk.name));
        let mut names = std::iter::once(disk.name.to_string()).chain(names);
        names.find(|n| !taken.contains(n)).unwrap_or_default()
    } else {
        taken.extend(targets(&guest.xml).map_err(bad)?);
        // Disks of this run only are in no definition of the next one.
        taken.extend(guest.volumes.iter().map(|v| v.target.clone()));
        taken.extend(guest.skipped.iter().chain(&guest.refused).map(|v| v.target.clone()));
        if taken.contains(&was) || !was.starts_with(['v', 's']) {
            free_target(&taken, &was)
        } else {
            was.clone()
        }
    };
    let volume_name = DiskName::new(&*name).map_err(StoreError::from)?;
    let beside = record.attached().map(|v| v.path.as_path()).find(|p| !is_block(p));
    let (folder, format) = look::new_place(options, disk, beside)?;
    let id = short_id();
    let plain = folder.join(format!("{}-{name}.{format}", record.name));
    let path = match plain.symlink_metadata() {
        Ok(_) => folder.join(format!("{}-{name}-{id}.{format}", record.name)),
        Err(_) => plain,
    };
    let model = if is_files {
        None
    } else {
        let text = store.backup_dir(&manifest.vm, &manifest.name).join("domain.xml");
        let like = std::fs::read_to_string(text).ok();
        // Two disks of one guest must not have the same serial number.
        let serial = manifest.vm_id != record.id;
        let keep = Likeness { address: false, serial };
        let image = ImageRef { path: path.clone(), format };
        Some(new_disk(like.as_deref(), &was, &name, &[image], keep, &is_block).map_err(bad)?)
    };
    let volume = VolumeId::random();
    let size = look::wanted(options, &disk.name).unwrap_or(disk.virtual_size);
    let mut after = record.clone();
    after.state = VmState::Ready;
    after.volumes.push(Volume {
        id: volume,
        name: volume_name,
        path: path.clone(),
        format,
        target: (!is_files).then(|| name.clone()),
        serial: None,
        block_device: false,
        detached: false,
    });
    after.tracking.restored.insert(volume, format!("{}/{}", manifest.vm, manifest.name));
    let new = RestoreDisk {
        from: disk.name.clone(),
        volume,
        target: name,
        in_place: false,
        fresh: fresh_name(&path, &id),
        path,
        format,
        size,
        drop: Vec::new(),
        model,
        errors: Default::default(),
        access: None,
        outcome: Default::default(),
    };
    Ok((new, after))
}
