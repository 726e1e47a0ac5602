//! Freezing the state of a domain's disks.

use std::path::Path;
use std::time::Duration;

use virt::sys;

use super::{LibvirtDomain, Session, inspect, persistent};
use crate::failpoint;
use crate::hypervisor::layers::{check_new, is_block, volume};
use crate::hypervisor::thaw_guard::ThawGuard;
use crate::hypervisor::xml;
use crate::hypervisor::{
    Guest, GuestVolume, HypervisorError, ImageFormat, ImageRef, NewOverlay, Power, Quiesce, Result, Snapshot,
};

/// The agent of a guest that runs answers a ping within this.
const PING: Duration = Duration::from_secs(10);
/// knibfs tries to thaw so long before it says that it could not; the helper goes on.
const THAW: Duration = Duration::from_secs(60);
/// The snapshot itself, between freeze and thaw, gets so long before the helper thaws over our head.
const SNAPSHOT: Duration = Duration::from_secs(30);

pub(super) fn snapshot(
    own: &LibvirtDomain,
    session: &Session,
    overlays: &[NewOverlay],
    quiesce: Quiesce,
) -> Result<Snapshot> {
    let guest = inspect::inspect(session)?;
    let volumes = overlays.iter().map(|o| volume(&guest, &o.target)).collect::<Result<Vec<_>>>()?;
    if overlays.is_empty() {
        return Ok(Snapshot { frozen: false, volumes: Vec::new(), notes: Vec::new() });
    }
    for overlay in overlays {
        check_new(&overlay.path)?;
    }
    for volume in &volumes {
        if let Some(job) = &volume.mirror {
            let (domain, target) = (session.name.clone(), volume.target.clone());
            return Err(HypervisorError::JobRunning { domain, target, job: job.clone() });
        }
    }
    if guest.power == Power::Off {
        return off(own, session, &guest, &volumes, overlays, quiesce);
    }
    for volume in &volumes {
        if let Some(live) = volume.chain.first() {
            persistent::check_agrees(session, &volume.target, &live.path)?;
        }
    }
    running(own, session, &guest, overlays, quiesce)
}

/// Refuses a domain whose agent cannot answer because of its power state.
pub(super) fn agent_can_answer(guest: &Guest) -> Result<()> {
    let state = match guest.power {
        Power::Running => return Ok(()),
        Power::Paused => "it is paused; resume it first",
        Power::Off => "it is off",
    };
    Err(HypervisorError::AgentMissing { domain: guest.name.clone(), why: state.into() })
}

fn running(
    own: &LibvirtDomain,
    session: &Session,
    guest: &Guest,
    overlays: &[NewOverlay],
    quiesce: Quiesce,
) -> Result<Snapshot> {
    let live = inspect::current(session, guest.power)?;
    let others: Vec<_> = live
        .disks
        .iter()
        .map(|d| d.target.as_str())
        .filter(|target| overlays.iter().all(|o| o.target != *target))
        .collect();
    let text = xml::snapshot(overlays, &others).map_err(|what| HypervisorError::NotNow { what })?;

    let mut notes = Vec::new();
    let frozen = match quiesce {
        Quiesce::No => None,
        Quiesce::Required { limit } => Some(Frozen::freeze(own, session, guest, limit)?),
        Quiesce::BestEffort { limit } => match Frozen::freeze(own, session, guest, limit) {
            Ok(frozen) => Some(frozen),
            // A guest that may hang must not be made to wait for us on top of it.
            Err(e @ HypervisorError::Freeze { thawed: false, .. }) => return Err(e),
            Err(e) => {
                notes.push(format!("the guest was not frozen: {e}"));
                None
            }
        },
    };
    failpoint::hit("snapshot-frozen");
    let flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA;
    let taken =
        session.ask("take a snapshot", move |domain| domain.create_snapshot_xml(&text, flags).map(drop));
    failpoint::hit("snapshot-taken");
    let was_frozen = frozen.map(|f| f.thaw(&mut notes));
    let changing = |error| match error {
        HypervisorError::Unreachable { uri, why, .. } => {
            HypervisorError::Unreachable { uri, why, changing: true }
        }
        other => other,
    };
    taken.map_err(changing)?;

    let after = inspect::inspect(session)?;
    let volumes = overlays
        .iter()
        .map(|overlay| {
            let volume = volume(&after, &overlay.target)?;
            if volume.chain.first().is_none_or(|top| top.path != overlay.path) {
                return Err(HypervisorError::Libvirt {
                    doing: "take a snapshot".into(),
                    domain: session.name.clone(),
                    why: format!("libvirt says so, but disk {} is not on it", overlay.target),
                });
            }
            Ok(volume.clone())
        })
        .collect::<Result<Vec<_>>>()?;
    let named: Vec<_> = volumes.iter().map(|v| (v.target.as_str(), v.chain.as_slice())).collect();
    persistent::make_name(session, &named)?;
    Ok(Snapshot { frozen: was_frozen == Some(true), volumes, notes })
}

/// A guest whose file systems are frozen, and the helper that thaws it should we die.
struct Frozen<'a> {
    session: &'a Session,
    guard: ThawGuard,
}

impl<'a> Frozen<'a> {
    fn freeze(own: &LibvirtDomain, session: &'a Session, guest: &Guest, limit: Duration) -> Result<Self> {
        agent_can_answer(guest)?;
        session.agent().ping(PING.min(limit))?;
        let program = match &own.program {
            Some(program) => program.clone(),
            None => std::env::current_exe().map_err(|e| HypervisorError::ThawGuard { why: e.to_string() })?,
        };
        let guard = ThawGuard::start(&program, &own.uri, &own.uuid.to_string(), limit + SNAPSHOT)?;
        match session.agent().freeze(limit) {
            Ok(_) => Ok(Self { session, guard }),
            Err(why) => {
                let thawed = session.agent().thaw(THAW).is_ok();
                if thawed {
                    guard.dismiss();
                }
                // Else it is dropped, and goes on trying.
                Err(HypervisorError::Freeze { domain: session.name.clone(), why, thawed })
            }
        }
    }

    /// Whether it had been frozen until now.
    fn thaw(self, notes: &mut Vec<String>) -> bool {
        match self.session.agent().thaw(THAW) {
            Ok(count) => {
                self.guard.dismiss();
                if count == 0 {
                    notes.push("the guest thawed by itself before the snapshot was known to be taken".into());
                }
                count > 0
            }
            Err(why) => {
                notes.push(format!(
                    "the guest agent did not confirm the thaw ({why}); a helper goes on trying, and `virsh domfsthaw {}` does it too",
                    self.session.name
                ));
                true
            }
        }
    }
}

/// Overlays made by the engine, then one change of the definition.
fn off(
    own: &LibvirtDomain,
    session: &Session,
    guest: &Guest,
    volumes: &[&GuestVolume],
    overlays: &[NewOverlay],
    quiesce: Quiesce,
) -> Result<Snapshot> {
    check_off(guest)?;
    for volume in volumes {
        for image in &volume.chain {
            own.images.check_unused(image)?;
        }
    }
    let mut made = Made(Vec::new());
    let mut after = Vec::new();
    for (volume, overlay) in volumes.iter().zip(overlays) {
        let Some(live) = volume.chain.first() else { continue };
        own.images.create_overlay(&overlay.path, live)?;
        made.0.push(&overlay.path);
        failpoint::hit("offline-overlay");
        let mut chain = vec![ImageRef { path: overlay.path.clone(), format: ImageFormat::Qcow2 }];
        chain.extend(volume.chain.iter().cloned());
        after.push(GuestVolume { chain, block_device: false, ..(*volume).clone() });
    }
    let old = inspect::persistent_text(session)?;
    let mut new = old.clone();
    for volume in &after {
        new = xml::set_disk(&new, &volume.target, &volume.chain, &is_block).map_err(|why| {
            HypervisorError::BadDefinition { domain: session.name.clone(), why: format!("it {why}") }
        })?;
    }
    if inspect::power(session)? != Power::Off {
        return Err(started_meanwhile(guest));
    }
    session.define("change the definition", &new)?;
    failpoint::hit("offline-defined");
    // It may have been started between the look and the change: then it runs on the old images.
    if inspect::power(session)? != Power::Off {
        let live = inspect::inspect(session)?;
        let moved =
            after.iter().all(|a| live.volumes.iter().any(|v| v.target == a.target && v.chain == a.chain));
        if !moved {
            session.define("change back the definition", &old)?;
            return Err(started_meanwhile(guest));
        }
    }
    made.0.clear();
    let notes = match quiesce {
        Quiesce::No => Vec::new(),
        _ => vec!["the VM is off: there was nothing to freeze".to_owned()],
    };
    Ok(Snapshot { frozen: false, volumes: after, notes })
}

/// Refuses a domain that is off only for now.
pub(super) fn check_off(guest: &Guest) -> Result<()> {
    if guest.managed_save {
        return Err(HypervisorError::NotNow {
            what: format!(
                "domain \"{0}\" is off with its memory saved, which would no longer fit its disks; start it, or drop the memory with `virsh managedsave-remove {0}`",
                guest.name
            ),
        });
    }
    Ok(())
}

fn started_meanwhile(guest: &Guest) -> HypervisorError {
    HypervisorError::NotNow { what: format!("domain \"{}\" was started meanwhile; try again", guest.name) }
}

/// Overlays that nothing uses yet: empty, so removing them loses nothing.
struct Made<'a>(Vec<&'a Path>);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove the unused overlay {}: {error}", path.display());
            }
        }
    }
}
