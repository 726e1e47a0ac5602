//! Which hypervisor has a VM's disks.

use std::path::Path;
use std::sync::Arc;

use super::images::EngineImages;
use crate::hypervisor::{DiskFiles, GuestVolume, Hypervisor, ImageRef, Result};
use crate::store::vm::{Source, Volume};
use crate::store::{DiskName, VmRecord, VolumeId};

/// The hypervisor of a VM that the store knows.
///
/// # Errors
/// libvirt cannot be reached, or the domain is gone.
pub fn of(record: &VmRecord) -> Result<Arc<dyn Hypervisor>> {
    match &record.source {
        Source::Disks { .. } => disk_files(record).map(|files| Arc::new(files) as Arc<dyn Hypervisor>),
        Source::Domain { uri, .. } => domain(uri, &record.id.to_string()),
    }
}

/// The disk files of a VM without a domain.
pub(super) fn disk_files(record: &VmRecord) -> Result<DiskFiles> {
    let Source::Disks { track } = &record.source else {
        return Err(crate::hypervisor::HypervisorError::Unsupported {
            what: format!("{} is a libvirt domain, not disk files", record.name),
        });
    };
    let disks = record
        .attached()
        .filter(|v| !record.exclude.contains(&v.name))
        .map(|v| (v.name.to_string(), ImageRef { path: v.path.clone(), format: v.format }))
        .collect();
    Ok(DiskFiles::new(record.name.as_str(), disks, *track, Arc::new(EngineImages)))
}

/// What the hypervisor calls a volume.
pub fn target(volume: &Volume) -> String {
    volume.target.clone().unwrap_or_else(|| volume.name.to_string())
}

/// A disk of a domain that the store did not know.
pub(super) fn new_volume(name: DiskName, found: &GuestVolume, live: &ImageRef) -> Volume {
    Volume {
        id: VolumeId::random(),
        name,
        path: live.path.clone(),
        format: live.format,
        target: Some(found.target.clone()),
        serial: found.serial.clone(),
        block_device: found.block_device,
        detached: false,
    }
}

/// Whether two paths are the same file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    crate::hypervisor::same_file(a, b)
}

/// Whether it is a block device.
pub(super) fn is_block(path: &Path) -> bool {
    crate::hypervisor::is_block(path)
}

/// Why VMs cannot be started on the host `uri`, if so. A URI says nothing about another machine's disks, so only
/// libvirts of this machine will do: `qemu:///…` and `qemu+unix:///…`.
pub(super) fn host_trouble(uri: &str) -> Option<String> {
    let local = ["qemu:///", "qemu+unix:///"].iter().any(|prefix| uri.starts_with(prefix));
    if !local {
        return Some(format!(
            "{uri} is another machine, and knibfs does not run there: start the VM on a libvirt of this machine"
        ));
    }
    reach_host(uri).err().map(|e| e.to_string())
}

#[cfg(feature = "libvirt")]
fn reach_host(uri: &str) -> Result<()> {
    crate::hypervisor::libvirt::define::reach_host(uri)
}

#[cfg(not(feature = "libvirt"))]
fn reach_host(uri: &str) -> Result<()> {
    domain(uri, "any").map(drop)
}

/// Defines a new domain on a host; refused where it has one of that name.
///
/// # Errors
/// libvirt cannot be reached, or refuses it.
#[cfg(feature = "libvirt")]
pub(super) fn define(uri: &str, definition: &str) -> Result<Arc<dyn Hypervisor>> {
    let made = crate::hypervisor::libvirt::define::new_domain(uri, definition, Arc::new(EngineImages))?;
    Ok(Arc::new(made))
}

#[cfg(not(feature = "libvirt"))]
pub(super) fn define(uri: &str, _definition: &str) -> Result<Arc<dyn Hypervisor>> {
    domain(uri, "new")
}

/// Whether a host has a domain of that name.
///
/// # Errors
/// libvirt cannot be reached.
#[cfg(feature = "libvirt")]
pub(super) fn has_domain(uri: &str, name: &str) -> Result<bool> {
    crate::hypervisor::libvirt::define::has_domain(uri, name)
}

#[cfg(not(feature = "libvirt"))]
pub(super) fn has_domain(uri: &str, name: &str) -> Result<bool> {
    domain(uri, name).map(|_| true)
}

/// The domain of that name or UUID on the host `uri`.
///
/// # Errors
/// libvirt cannot be reached, or there is no such domain.
#[cfg(feature = "libvirt")]
pub fn domain(uri: &str, domain: &str) -> Result<Arc<dyn Hypervisor>> {
    let found = crate::hypervisor::LibvirtDomain::open(uri, domain, Arc::new(EngineImages))?;
    Ok(Arc::new(found))
}

/// Whether the domain of that name or UUID runs on the host `uri`.
///
/// # Errors
/// libvirt cannot be reached, or there is no such domain.
#[cfg(feature = "libvirt")]
pub(super) fn power(uri: &str, domain: &str) -> Result<crate::hypervisor::Power> {
    crate::hypervisor::libvirt::power(uri, domain)
}

#[cfg(not(feature = "libvirt"))]
pub(super) fn power(uri: &str, name: &str) -> Result<crate::hypervisor::Power> {
    domain(uri, name)?.inspect().map(|guest| guest.power)
}

/// Without libvirt no domain can be reached.
///
/// # Errors
/// Always.
#[cfg(not(feature = "libvirt"))]
pub fn domain(uri: &str, domain: &str) -> Result<Arc<dyn Hypervisor>> {
    Err(crate::hypervisor::HypervisorError::Unsupported {
        what: format!(
            "this knibfs was built without libvirt: the domain {domain} on {uri} cannot be reached"
        ),
    })
}
