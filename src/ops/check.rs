//! `check`: every backup can be read, and with `read_data` every stored byte is as it was written.

use knib_fuse::{File as _, FsError};

use super::control::{Event, OpControl};
use crate::store::{BackupName, Manifest, Store, StoreResult, VmName};
use crate::verified::VerifiedReader;

/// Bytes that are read at once.
const STEP: usize = 4 << 20;

/// What was checked and found.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Checked {
    /// Backups that were looked at.
    pub backups: u64,
    /// Images in them.
    pub images: u64,
    /// Bytes of images that were read and verified.
    pub bytes: u64,
    /// What is damaged, a sentence each.
    pub damage: Vec<String>,
}

/// Checks all VMs of the store, one, or one backup of it.
///
/// # Errors
/// The store cannot be read at all, or there is no such VM or backup. Damage is no error here: it is in the report.
pub fn run(
    store: &Store,
    vm: Option<&VmName>,
    backup: Option<&BackupName>,
    read_data: bool,
    control: &OpControl<'_>,
) -> StoreResult<Checked> {
    let vms = match vm {
        Some(vm) => vec![store.vm(vm)?.name],
        None => store.vms()?,
    };
    let reader = VerifiedReader::new(store.clone(), "a check");
    let mut report = Checked::default();
    for vm in &vms {
        let manifests = match backup {
            Some(name) => with_all_below(store, vm, store.manifest(vm, name)?)?,
            None => {
                if let Err(error) = store.vm(vm) {
                    report.damage.push(error.to_string());
                }
                let found = store.backups(vm)?;
                report
                    .damage
                    .extend(found.damaged.iter().map(|(name, error)| format!("{vm}/{name}: {error}")));
                found.manifests
            }
        };
        for manifest in &manifests {
            report.backups += 1;
            for disk in &manifest.disks {
                if control.is_cancelled() {
                    return Ok(report);
                }
                report.images += 1;
                let named = format!("{vm}/{}/{}", manifest.name, disk.name);
                let found =
                    image(&reader, manifest, &disk.name, read_data.then_some(&named), control, &mut report);
                if control.is_cancelled() {
                    return Ok(report);
                }
                let damage = found.err().map(|error| error.to_string());
                // Only who read all of it can say that it is whole again.
                if read_data {
                    let known = store.note_damage(vm, manifest.id, &disk.name, damage.as_deref());
                    if let Err(error) = known {
                        control.warn(format!(
                            "what was found in {named} cannot be recorded, so the next backup may stand on it: {error}"
                        ));
                    }
                }
                report.damage.extend(damage.map(|error| format!("{named}: {error}")));
            }
        }
    }
    Ok(report)
}

/// A backup and what its disks stand on: it can only be read with them.
fn with_all_below(store: &Store, vm: &VmName, backup: Manifest) -> StoreResult<Vec<Manifest>> {
    let mut all = store.backups(vm)?.manifests;
    let mut found = vec![backup];
    while let Some(parent) = found.last().and_then(|m| m.parent.as_ref()) {
        // One that is missing is found when the disk is mapped.
        let Some(at) = all.iter().position(|m| m.id == parent.id) else { break };
        found.push(all.swap_remove(at));
    }
    Ok(found)
}

fn image(
    reader: &VerifiedReader,
    of: &Manifest,
    disk: &crate::store::DiskName,
    read_as: Option<&String>,
    control: &OpControl<'_>,
    report: &mut Checked,
) -> Result<(), FsError> {
    // Opening maps the whole chain by the manifests: each file is there and is the one that its manifest means.
    reader.disk(of, disk, reader.lease_disk(of.id))?;
    let file = reader.file(of, disk, reader.lease_file(of.id))?;
    let Some(named) = read_as else { return Ok(()) };
    let what = format!("reading {named}");
    (control.progress)(Event::Begin { what: what.clone(), total: file.len() });
    let mut buf = knib_qcow::PageBuf::default();
    buf.set_len(STEP);
    let mut at = 0;
    let mut result = Ok(());
    while at < file.len() && !control.is_cancelled() {
        let len = (file.len() - at).min(STEP as u64) as usize;
        // The rest of the file is read too: all that can be counted as good is.
        match file.read(at, &mut buf[..len]) {
            Ok(()) => report.bytes += len as u64,
            Err(error) if result.is_ok() => result = Err(error),
            Err(_) => {}
        }
        at += len as u64;
        (control.progress)(Event::Advance { what: what.clone(), done: at });
    }
    (control.progress)(Event::End { what });
    result
}
