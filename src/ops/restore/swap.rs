//! The new images take their places: the point from which a restore is only ever finished.

use std::path::Path;
use std::sync::Arc;

use super::{RestoreError, new_vm, op, raw_view, settle};
use crate::failpoint;
use crate::hypervisor::{DiskPlace, ErrorPolicy, Hypervisor, HypervisorError, ImageFormat, ImageRef};
use crate::ops::backup::merge::unlink;
use crate::ops::control::OpControl;
use crate::ops::hypervisor::{self, same_file};
use crate::store::journal::Journal;
use crate::store::restore_op::{RestoreDisk, RestoreInto, RestoreOp};
use crate::store::vm::Source;
use crate::store::{Store, StoreError, atomic};

/// Swaps all volumes. Done again after a crash, it goes on where it was.
pub(super) fn all(store: &Store, journal: &mut Journal, control: &OpControl<'_>) -> Result<(), RestoreError> {
    let planned = op(journal)?.clone();
    let is_domain = matches!(planned.record.source, Source::Domain { .. });
    control.step("putting the restored volumes in place");
    match planned.into {
        RestoreInto::SameVm if is_domain => return same_domain(journal, &planned, control),
        RestoreInto::NewVm => {
            rename_all(&planned)?;
            return new_vm::define(store, &planned);
        }
        RestoreInto::SameVm | RestoreInto::NewVolume => rename_all(&planned)?,
    }
    let hypervisor = hypervisor::of(&planned.record)?;
    if is_domain {
        for disk in &planned.disks {
            hypervisor.attach(&place(&planned, disk, &disk.path))?;
            failpoint::hit("restore-attached");
        }
    }
    drop_old(&*hypervisor, &planned, control)
}

/// Whether the VM was asked to take a new volume, and has it neither in this run nor in the next: that can be undone.
pub(super) fn is_refused(planned: &RestoreOp, error: &RestoreError) -> bool {
    if planned.into != RestoreInto::NewVolume || !matches!(error, RestoreError::Hypervisor(_)) {
        return false;
    }
    let Ok(guest) = hypervisor::of(&planned.record).and_then(|h| h.inspect()) else { return false };
    let skipped = guest.skipped.iter().chain(&guest.refused).map(|d| &d.target);
    let now: Vec<&String> = guest.volumes.iter().map(|v| &v.target).chain(skipped).collect();
    let next = crate::hypervisor::xml::new::targets(&guest.xml).unwrap_or_default();
    // What it cannot be asked about may be there.
    !guest.xml.is_empty()
        && planned.disks.iter().all(|d| !now.contains(&&d.target) && !next.contains(&d.target))
}

/// Nobody has any of these files open, and each name has its old or its new image at every moment.
fn rename_all(planned: &RestoreOp) -> Result<(), RestoreError> {
    for disk in planned.disks.iter().filter(|d| !d.in_place && d.fresh.exists()) {
        atomic::rename(&disk.fresh, &disk.path)?;
    }
    Ok(())
}

/// The definition is first made to name the new images where they are, in one change for all volumes: until then the VM
/// starts on the old ones, from then on with the new. Then each takes the path of the old one, as a second name.
fn same_domain(
    journal: &mut Journal,
    planned: &RestoreOp,
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    let hypervisor = hypervisor::of(&planned.record)?;
    let mut planned = planned.clone();
    let fresh = |d: &RestoreDisk| !d.in_place && d.path != d.fresh && d.fresh.exists();
    if planned.disks.iter().any(fresh) {
        let places = |at_fresh: bool, planned: &RestoreOp| -> Vec<DiskPlace> {
            let path = |d: &RestoreDisk| if at_fresh && fresh(d) { d.fresh.clone() } else { d.path.clone() };
            planned.disks.iter().map(|d| place(planned, d, &path(d))).collect()
        };
        hypervisor.place(&places(true, &planned))?;
        failpoint::hit("restore-placed");
        let mut stay = Vec::new();
        for (at, disk) in planned.disks.iter().enumerate().filter(|(_, d)| fresh(d)) {
            if let Err(error) = second_name(&disk.fresh, &disk.path) {
                // Not every file system has hard links.
                control.warn(format!("{} keeps that name: {error}", disk.fresh.display()));
                stay.push(at);
            }
            failpoint::hit("restore-linked");
        }
        keep_fresh(journal, &mut planned, &stay)?;
        match hypervisor.place(&places(false, &planned)) {
            Ok(()) => {}
            Err(HypervisorError::NotNow { .. }) => {
                // It was started in between, and runs on the new names.
                let all: Vec<usize> = (0..planned.disks.len()).collect();
                for disk in planned.disks.iter().filter(|d| fresh(d) && same_file(&d.fresh, &d.path)) {
                    atomic::remove(&disk.path)?;
                }
                keep_fresh(journal, &mut planned, &all)?;
                hypervisor.place(&places(false, &planned))?;
            }
            Err(error) => return Err(error.into()),
        }
        failpoint::hit("restore-named");
        for disk in planned.disks.iter().filter(|d| fresh(d)) {
            atomic::remove(&disk.fresh)?;
        }
    } else {
        let places: Vec<_> = planned.disks.iter().map(|d| place(&planned, d, &d.path)).collect();
        hypervisor.place(&places)?;
    }
    drop_old(&*hypervisor, &planned, control)
}

/// These disks stay under the names that they were written under.
fn keep_fresh(journal: &mut Journal, planned: &mut RestoreOp, which: &[usize]) -> Result<(), RestoreError> {
    let mut changed = false;
    for at in which {
        let Some(disk) = planned.disks.get_mut(*at).filter(|d| !d.in_place && d.fresh.exists()) else {
            continue;
        };
        if disk.path != disk.fresh {
            // What lies at its old path is the old image still.
            if !same_file(&disk.path, &disk.fresh) {
                disk.drop.push(disk.path.clone());
            }
            disk.path = disk.fresh.clone();
            changed = true;
            settle(&mut planned.record, disk, &disk.path);
        }
    }
    if changed {
        let now = planned.clone();
        journal.update_restore(|op| *op = now)?;
    }
    Ok(())
}

/// Makes `path` a second name of `fresh`, in one step where something else is there.
fn second_name(fresh: &Path, path: &Path) -> Result<(), StoreError> {
    if same_file(fresh, path) {
        return Ok(());
    }
    let mut third = fresh.as_os_str().to_owned();
    third.push("2");
    let third = Path::new(&third);
    atomic::remove(third)?;
    std::fs::hard_link(fresh, third).map_err(StoreError::io("give another name to", fresh))?;
    atomic::rename(third, path)
}

/// Deltas of the old images, and whatever else is of no use any more.
fn drop_old(
    hypervisor: &dyn Hypervisor,
    planned: &RestoreOp,
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    for path in planned.disks.iter().flat_map(|d| &d.drop) {
        // The restore stands, whatever becomes of them.
        if let Err(error) = unlink(hypervisor, path) {
            control.warn(format!("{} is of no use any more but was kept: {error}", path.display()));
        }
        failpoint::hit("restore-dropped");
    }
    Ok(())
}

/// Where a disk lies when its image is at `path`.
pub(super) fn place(planned: &RestoreOp, disk: &RestoreDisk, path: &Path) -> DiskPlace {
    let mut chain = vec![ImageRef { path: path.to_owned(), format: disk.format }];
    if let Some(mount) = &planned.mount {
        chain.push(ImageRef { path: raw_view(mount, planned, disk), format: ImageFormat::Raw });
    }
    // A guest on the mount must not see it go.
    let errors = planned.mount.as_ref().map(|_| ErrorPolicy::stop());
    DiskPlace { target: disk.target.clone(), chain, model: disk.model.clone(), errors }
}

/// The VM that has, or will have, the volumes.
pub(super) fn hypervisor_of(planned: &RestoreOp) -> Result<Arc<dyn Hypervisor>, RestoreError> {
    Ok(hypervisor::of(&planned.record)?)
}
