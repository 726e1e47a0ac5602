//! `restore`: the VM's own volumes, as the backup has them.

use std::path::PathBuf;

use super::look::{self, Lies};
use super::{Options, RestoreError, Restored, access_of, carry_out, fresh_name, planned, quick, short_id};
use crate::chain::restore::{Action, DiskNow, Into, Place, Restore, restore};
use crate::hypervisor::xml::new::{Likeness, free_target, new_disk, targets};
use crate::hypervisor::{Guest, ImageRef, Power};
use crate::ops::control::OpControl;
use crate::ops::hypervisor::{is_block, target};
use crate::ops::{detached, whereabouts};
use crate::store::manifest::{Disk, ImageFormat, Manifest};
use crate::store::restore_op::{RestoreDisk, RestoreInto};
use crate::store::vm::{Source, VmState, Volume};
use crate::store::{BackupSpec, DiskName, Store, VmRecord};
use crate::verified::VerifiedReader;

/// Restores all volumes of a backup to the VM that it is of.
///
/// # Errors
/// All is as before, unless the error is [`RestoreError::Unfinished`].
pub fn run(
    store: &Store,
    spec: &BackupSpec,
    options: &Options,
    control: &OpControl<'_>,
) -> Result<Restored, RestoreError> {
    let vm = &spec.vm;
    store.vm(vm)?;
    let _lock = store.lock_vm(vm, &format!("restore {spec}"))?;
    super::refuse_unfinished(store, vm)?;
    // Read again under the lock.
    let mut record = store.vm_in_care(vm)?;
    let manifest = store.resolve(spec)?;
    super::check_options(store, options, &manifest)?;
    let is_files = matches!(record.source, Source::Disks { .. });
    if is_files && options.storage.is_some() {
        let why = "plain disk files are known by their paths: restore without --storage, or with create-vm";
        return Err(RestoreError::cannot(vm, why));
    }
    let _lease = store.lease(manifest.id, &format!("restore of {vm}"))?;
    let hypervisor = whereabouts::find(store, &mut record)?;
    let guest = hypervisor.inspect()?;
    let reader = VerifiedReader::new(store.clone(), "a restore");
    let (backup, sources) = look::backup(store, &reader, &manifest, None);

    let mut found: Vec<Option<Lies>> = Vec::new();
    let mut disks = Vec::new();
    for disk in &manifest.disks {
        let volume = record.volumes.iter().find(|v| v.id == disk.volume);
        let lies = volume.and_then(|v| Some((v, look::lies(&record, &guest, v)?)));
        let (others, mut snapshots) = match &lies {
            // One that runs is refused for that, and holds its images by right.
            Some((volume, lies)) if guest.power == Power::Off => {
                look::users(store, &record, &guest, &*hypervisor, &target(volume), lies)?
            }
            _ => Default::default(),
        };
        let known = volume.into_iter().flat_map(|v| record.snapshots_of(v.id));
        snapshots.extend(known.map(|s| s.name.to_string()));
        // One is found with each of its images.
        snapshots.sort();
        snapshots.dedup();
        let wanted = look::wanted(options, &disk.name);
        let own = lies.as_ref().and_then(|(_, l)| l.own()).map(|l| l.image.clone());
        let place = match own {
            None => Place::Nowhere,
            Some(own) if is_block(&own.path) && options.storage.is_none() => {
                let size = look::device_size(&own.path)?;
                Place::Block { path: own.path, size }
            }
            Some(_) => Place::File,
        };
        disks.push(DiskNow {
            name: disk.name.clone(),
            size: disk.virtual_size,
            wanted,
            place,
            others,
            snapshots,
        });
        found.push(lies.map(|(_, lies)| lies));
    }
    let (host, uri) = look::asked_host(store, options, &record)?;
    let mut asked = Restore {
        into: Into::SameVm,
        quick: options.quick,
        host,
        backup,
        vm: look::vm(store, &record, Some(&guest))?,
        disks,
        room: Vec::new(),
    };
    // What can be refused without a look at all data is refused before it.
    let actions = restore(&asked)?;
    detached::settle(store, &mut record, &guest, &*hypervisor, control)?;
    let plan = Plan { record: &record, guest: &guest, manifest: &manifest, options };
    let mut volumes = plan.disks(&found, &actions)?;
    let mut wanted = Vec::new();
    for (disk, source) in volumes.iter().zip(&sources).filter(|(d, _)| !d.in_place) {
        let folder = disk.path.parent().unwrap_or(&disk.path).to_path_buf();
        wanted.push((folder, look::data(source).map_err(|e| RestoreError::write(&disk.path, e))?));
    }
    asked.room = look::room(&wanted)?;
    restore(&asked)?;

    plan.models(store, &mut volumes)?;
    for layer in found.iter().flatten().filter(|_| !is_files).flat_map(|l| l.layers.iter().take(l.own)) {
        if layer.owner.is_none() {
            let path = layer.image.path.display();
            control.warn(format!("{path} was not made by knibfs, so it is left, of no use any more"));
        }
    }
    let left = plan.left();
    for name in &left {
        control.step(format!("{name} stays as it is: the backup does not know it"));
    }
    super::keep_error_policies(&mut volumes, &guest.xml);
    let mount = options.quick.then(|| quick::place(store));
    let after = plan.record_after(&volumes);
    let in_place = volumes.iter().any(|d| d.in_place);
    let move_to = uri.filter(|_| asked.host.as_ref().is_some_and(|h| !h.is_own));
    let operation = planned(RestoreInto::SameVm, &manifest, options, mount, move_to, after, volumes);
    let journal = store.begin(vm, operation)?;
    let state = if in_place { VmState::RestoreError } else { VmState::Restoring };
    store.save_vm(&VmRecord { state, ..record.clone() })?;
    carry_out(store, journal, &sources, left, control)
}

struct Plan<'a> {
    record: &'a VmRecord,
    guest: &'a Guest,
    manifest: &'a Manifest,
    options: &'a Options,
}

impl Plan<'_> {
    fn disks(&self, found: &[Option<Lies>], actions: &[Action]) -> Result<Vec<RestoreDisk>, RestoreError> {
        let id = short_id();
        let beside = found.iter().flatten().filter_map(Lies::own).map(|l| l.image.path.as_path()).next();
        let mut made: Vec<RestoreDisk> = Vec::new();
        for ((disk, lies), action) in self.manifest.disks.iter().zip(found).zip(actions) {
            let volume = self.record.volumes.iter().find(|v| v.id == disk.volume);
            let name = volume.map_or_else(|| disk.name.to_string(), target);
            let wanted = look::wanted(self.options, &disk.name).unwrap_or(disk.virtual_size);
            let mut new = RestoreDisk {
                from: disk.name.clone(),
                volume: disk.volume,
                target: name,
                in_place: *action == Action::InPlace,
                fresh: PathBuf::new(),
                path: PathBuf::new(),
                format: ImageFormat::Qcow2,
                size: wanted,
                drop: Vec::new(),
                model: None,
                errors: Default::default(),
                access: None,
                outcome: Default::default(),
            };
            match (action, lies) {
                (Action::Swap | Action::InPlace, Some(lies)) => self.over(&mut new, lies, &id),
                _ => {
                    let (folder, format) = self.place_of_lost(volume, disk, beside)?;
                    new.format = format;
                    new.path = match volume.filter(|_| self.is_files()) {
                        Some(volume) => volume.path.clone(),
                        None => self.new_file(&folder, &disk.name, format, &id, &made),
                    };
                }
            }
            new.fresh = fresh_name(&new.path, &id);
            made.push(new);
        }
        Ok(made)
    }

    fn is_files(&self) -> bool {
        matches!(self.record.source, Source::Disks { .. })
    }

    /// A volume that is there: its own image is replaced, its deltas are dropped.
    fn over(&self, new: &mut RestoreDisk, lies: &Lies, id: &str) {
        let Some(own) = lies.own() else { return };
        let deltas = || lies.layers.iter().take(lies.own).filter(|l| l.owner.is_some());
        new.drop = deltas().map(|l| l.image.path.clone()).collect();
        new.access = access_of(&own.image.path);
        new.format = own.image.format;
        new.path.clone_from(&own.image.path);
        if self.is_files() {
            // The given path is the live image, and the old one below has a name of ours.
            if let Some(live) = lies.layers.first() {
                new.path.clone_from(&live.image.path);
                new.format = live.image.format;
            }
            new.drop = lies.replaced().skip(1).map(|l| l.image.path.clone()).collect();
            return;
        }
        if let Some(folder) = &self.options.storage {
            new.access = None;
            new.format = if self.options.quick { ImageFormat::Qcow2 } else { new.format };
            new.path = self.new_file(folder, &new.from, new.format, id, &[]);
        } else if self.options.quick && new.format == ImageFormat::Raw {
            // An overlay is qcow2, and a file that is called raw should not be.
            new.drop.push(own.image.path.clone());
            new.format = ImageFormat::Qcow2;
            let folder = own.image.path.parent().unwrap_or(&own.image.path);
            new.path = self.new_file(folder, &new.from, new.format, id, &[]);
        }
    }

    fn place_of_lost(
        &self,
        volume: Option<&Volume>,
        disk: &Disk,
        beside: Option<&std::path::Path>,
    ) -> Result<(PathBuf, ImageFormat), RestoreError> {
        match volume.filter(|_| self.is_files()) {
            Some(volume) => Ok((volume.path.clone(), volume.format)),
            None => look::new_place(self.options, disk, beside),
        }
    }

    fn new_file(
        &self,
        folder: &std::path::Path,
        disk: &DiskName,
        format: ImageFormat,
        id: &str,
        made: &[RestoreDisk],
    ) -> PathBuf {
        let vm = &self.record.name;
        let plain = folder.join(format!("{vm}-{disk}.{format}"));
        let taken = plain.symlink_metadata().is_ok() || made.iter().any(|d| d.path == plain);
        if taken { folder.join(format!("{vm}-{disk}-{id}.{format}")) } else { plain }
    }

    /// The `<disk>`s of volumes that the domain does not have, under their old devices where these are free.
    fn models(&self, store: &Store, volumes: &mut [RestoreDisk]) -> Result<(), RestoreError> {
        if self.is_files() {
            return Ok(());
        }
        let bad = |why: String| RestoreError::cannot(&self.record.name, format!("its definition {why}"));
        let mut taken = targets(&self.guest.xml).map_err(bad)?;
        let path = store.backup_dir(&self.manifest.vm, &self.manifest.name).join("domain.xml");
        let like = std::fs::read_to_string(&path).ok();
        for disk in volumes.iter_mut() {
            let volume = self.record.volumes.iter().find(|v| v.id == disk.volume);
            if volume.is_some_and(|v| look::lies(self.record, self.guest, v).is_some()) {
                continue;
            }
            let was = disk.target.clone();
            if taken.contains(&disk.target) {
                disk.target = free_target(&taken, &was);
            }
            taken.push(disk.target.clone());
            let image = ImageRef { path: disk.path.clone(), format: disk.format };
            let model = |address| {
                let keep = Likeness { address, serial: true };
                new_disk(like.as_deref(), &was, &disk.target, std::slice::from_ref(&image), keep, &is_block)
            };
            let with = model(was == disk.target).map_err(bad)?;
            // An address that another device has by now would make libvirt refuse the whole definition.
            let address = with.find("<address").and_then(|from| {
                let to = with.get(from..)?.find("/>")? + from;
                with.get(from..to)
            });
            let in_use = address.is_some_and(|a| self.guest.xml.contains(a.trim()));
            disk.model = Some(if in_use { model(false).map_err(bad)? } else { with });
        }
        Ok(())
    }

    /// The volumes that the VM has and the backup does not know.
    fn left(&self) -> Vec<DiskName> {
        let has = |v: &&Volume| self.guest.volumes.iter().any(|g| g.target == target(v));
        let known = |v: &&Volume| self.manifest.disk_of(v.id).is_none();
        self.record.volumes.iter().filter(has).filter(known).map(|v| v.name.clone()).collect()
    }

    fn record_after(&self, disks: &[RestoreDisk]) -> VmRecord {
        let mut record = self.record.clone();
        // Section 3, "Ending a chain early": restore.
        record.tracking.current = None;
        record.tracking.end_of_chain = true;
        record.state = VmState::Ready;
        for disk in disks {
            record.tracking.volumes.remove(&disk.volume);
            let from = format!("{}/{}", self.manifest.vm, self.manifest.name);
            record.tracking.restored.insert(disk.volume, from);
            let serial = self.guest.volumes.iter().find(|v| v.target == disk.target);
            let after = Volume {
                id: disk.volume,
                name: disk.from.clone(),
                path: disk.path.clone(),
                format: disk.format,
                target: (!self.is_files()).then(|| disk.target.clone()),
                serial: serial.and_then(|v| v.serial.clone()),
                block_device: disk.in_place,
                detached: false,
            };
            match record.volumes.iter_mut().find(|v| v.id == disk.volume) {
                Some(known) => {
                    let (name, serial) = (known.name.clone(), after.serial.clone().or(known.serial.take()));
                    *known = Volume { name, serial, ..after };
                }
                None => record.volumes.push(after),
            }
        }
        record
    }
}
