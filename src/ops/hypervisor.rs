//! Which hypervisor has a VM's disks.

use std::sync::Arc;

use super::images::EngineImages;
use crate::hypervisor::{DiskFiles, Hypervisor, ImageRef, Result};
use crate::store::VmRecord;
use crate::store::vm::{Source, Volume};

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

/// The domain of that name or UUID on the host `uri`.
///
/// # Errors
/// libvirt cannot be reached, or there is no such domain.
#[cfg(feature = "libvirt")]
pub fn domain(uri: &str, domain: &str) -> Result<Arc<dyn Hypervisor>> {
    let found = crate::hypervisor::LibvirtDomain::open(uri, domain, Arc::new(EngineImages))?;
    Ok(Arc::new(found))
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
