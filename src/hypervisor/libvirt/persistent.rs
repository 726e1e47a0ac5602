//! Keeping the definition of the next run true.

use std::path::Path;

use super::{Session, inspect};
use crate::hypervisor::layers::{is_block, same_file};
use crate::hypervisor::xml::{self, DiskXml};
use crate::hypervisor::{HypervisorError, ImageRef, Result};

/// Refuses a domain whose next run would use another image than the one that is live: something left it stale, and
/// nothing that knibfs does could make that right. A disk that the next run does not have is fine.
pub(super) fn check_agrees(session: &Session, target: &str, live: &Path) -> Result<()> {
    let Some(disk) = disk(session, target)? else { return Ok(()) };
    match disk.source.path() {
        Some(path) if same_file(path, live) => Ok(()),
        other => Err(HypervisorError::NotNow {
            what: format!(
                "disk {target} of domain \"{}\" runs on {} but its definition for the next start names {}; make them agree with `virsh edit` first",
                session.name,
                live.display(),
                other.map_or("nothing".into(), |p| p.display().to_string())
            ),
        }),
    }
}

/// Makes the definition of the next run name `chain` for each disk, if it does not yet. Disks that it does not have
/// are left out: they were attached for this run only.
pub(super) fn make_name(session: &Session, volumes: &[(&str, &[ImageRef])]) -> Result<()> {
    let persistent = session.ask("look at the state", |domain| domain.is_persistent())?;
    let Some((first, chain)) = volumes.first() else { return Ok(()) };
    if !persistent {
        return Ok(());
    }
    let old = inspect::persistent_text(session)?;
    let parsed = inspect::parse(session, &old)?;
    let mut new = old.clone();
    let failed = |target: &str, chain: &[ImageRef], why: String| HypervisorError::Definition {
        domain: session.name.clone(),
        target: target.to_owned(),
        path: chain.first().map(|i| i.path.clone()).unwrap_or_default(),
        why,
    };
    for (target, chain) in volumes {
        let Some(disk) = parsed.disks.iter().find(|d| d.target == *target) else { continue };
        if !names(disk, chain) {
            new = xml::set_disk(&new, target, chain, &is_block).map_err(|why| failed(target, chain, why))?;
        }
    }
    if new == old {
        return Ok(());
    }
    session.define("change the definition", &new).map_err(|error| match error {
        HypervisorError::Libvirt { why, .. } => failed(first, chain, why),
        lost => lost,
    })
}

/// Whether a definition names these images. What it does not list, libvirt reads from the headers.
fn names(disk: &DiskXml, chain: &[ImageRef]) -> bool {
    let same = |path: Option<&Path>, image: Option<&ImageRef>| matches!((path, image), (Some(p), Some(i)) if p == i.path);
    let format = |name: Option<&str>, image: Option<&ImageRef>| {
        image.is_some_and(|i| name.unwrap_or("raw") == i.format_name())
    };
    same(disk.source.path(), chain.first())
        && format(disk.driver_type.as_deref(), chain.first())
        && disk.backing.iter().enumerate().all(|(i, b)| {
            same(b.source.path(), chain.get(i + 1)) && format(b.format.as_deref(), chain.get(i + 1))
        })
        && (!disk.terminated || disk.backing.len() + 1 == chain.len())
}

fn disk(session: &Session, target: &str) -> Result<Option<DiskXml>> {
    if !session.ask("look at the state", |domain| domain.is_persistent())? {
        return Ok(None);
    }
    let parsed = inspect::parse(session, &inspect::persistent_text(session)?)?;
    Ok(parsed.disks.into_iter().find(|d| d.target == target))
}
