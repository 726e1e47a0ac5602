//! What a domain is now.

use std::path::PathBuf;

use virt::domain::{DomainPausedReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt::sys;

use super::Session;
use crate::hypervisor::header::extend_chain;
use crate::hypervisor::xml::{self, DiskSource, DiskXml, DomainXml, Fate};
use crate::hypervisor::{
    Guest, GuestVolume, HypervisorError, ImageFormat, ImageRef, NotTaken, Power, Result,
};

pub(super) fn inspect(session: &Session) -> Result<Guest> {
    let power = power(session)?;
    let persistent = session.ask("look at the state", |domain| domain.is_persistent())?;
    let managed_save =
        power == Power::Off && session.ask("look at the state", move |domain| domain.has_managed_save(0))?;
    let definition = match (power, persistent) {
        (_, true) => persistent_text(session)?,
        (_, false) => text(session, sys::VIR_DOMAIN_XML_SECURE)?,
    };
    let now = current(session, power)?;
    let mut guest = Guest {
        uuid: Some(session.uuid),
        name: session.name.clone(),
        power,
        persistent,
        managed_save,
        volumes: Vec::new(),
        skipped: Vec::new(),
        refused: Vec::new(),
        xml: definition,
        nvram: now.nvram.clone(),
        tpm_state: tpm_state(session, &now),
    };
    for disk in &now.disks {
        let not_taken = |reason: &str| NotTaken { target: disk.target.clone(), reason: reason.to_owned() };
        match &disk.fate {
            Fate::Skipped(why) => guest.skipped.push(not_taken(why)),
            Fate::Refused(why) => guest.refused.push(not_taken(why)),
            Fate::Taken => match chain(disk) {
                Ok(chain) => guest.volumes.push(volume(disk, chain)),
                Err(why) => guest.refused.push(not_taken(&format!("has a chain that cannot be used: {why}"))),
            },
        }
    }
    Ok(guest)
}

/// The definition that holds now: the live one of a domain that runs.
pub(super) fn current(session: &Session, power: Power) -> Result<DomainXml> {
    let text = if power == Power::Off {
        persistent_text(session)?
    } else {
        text(session, 0 as sys::virDomainXMLFlags)?
    };
    parse(session, &text)
}

pub(super) fn persistent_text(session: &Session) -> Result<String> {
    text(session, sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)
}

fn text(session: &Session, flags: sys::virDomainXMLFlags) -> Result<String> {
    session.ask("read the definition", move |domain| domain.xml_desc(flags))
}

pub(super) fn parse(session: &Session, text: &str) -> Result<DomainXml> {
    xml::parse(text).map_err(|why| HypervisorError::BadDefinition {
        domain: session.name.clone(),
        why: format!("it {why}"),
    })
}

pub(super) fn power(session: &Session) -> Result<Power> {
    if !session.ask("look at the state", |domain| domain.is_active())? {
        return Ok(Power::Off);
    }
    let (state, _) = session.ask("look at the state", |domain| domain.state())?;
    let stopped = [DomainState::Paused, DomainState::PMSuspended, DomainState::Crashed];
    Ok(if state.is_any(stopped.to_vec()) { Power::Paused } else { Power::Running })
}

/// Whether QEMU paused it because a disk could not be read or written.
pub(super) fn is_stopped_by_error(session: &Session) -> Result<bool> {
    let (_, reason) = session.ask("look at the state", |domain| domain.state())?;
    let error = Enum::Known(DomainPausedReason::IOError);
    Ok(matches!(reason, Enum::Known(DomainStateReason::Paused(why)) if why == error))
}

/// A disk's images: as the definition lists them, and from where it stops as the headers do.
pub(super) fn chain(disk: &DiskXml) -> Result<Vec<ImageRef>> {
    let layers = std::iter::once((&disk.source, disk.driver_type.as_deref()))
        .chain(disk.backing.iter().map(|b| (&b.source, b.format.as_deref())));
    let mut chain = Vec::new();
    for (source, format) in layers {
        let unknown = |what: String| HypervisorError::Header { path: PathBuf::from(&disk.target), what };
        let path = source.path().ok_or_else(|| unknown("a layer is no file or block device".into()))?;
        // libvirt takes an image without a format for raw; it never probes.
        let name = format.unwrap_or("raw");
        let format =
            xml::image_format(name).ok_or_else(|| unknown(format!("the format {name} is not known")))?;
        chain.push(ImageRef { path: path.to_owned(), format });
    }
    if !disk.terminated && chain.last().is_some_and(|last| last.format == ImageFormat::Qcow2) {
        extend_chain(&mut chain)?;
    }
    Ok(chain)
}

fn volume(disk: &DiskXml, chain: Vec<ImageRef>) -> GuestVolume {
    GuestVolume {
        target: disk.target.clone(),
        serial: disk.serial.clone(),
        chain,
        block_device: matches!(disk.source, DiskSource::Block(_)),
        mirror: disk.mirror.as_ref().map(|m| m.job.clone()),
    }
}

/// The folder of the TPM's state: where the definition says, or where libvirt keeps it.
fn tpm_state(session: &Session, now: &DomainXml) -> Option<PathBuf> {
    let tpm = now.tpm.as_ref()?;
    let folder = match &tpm.source {
        Some(path) => path.clone(),
        None => PathBuf::from("/var/lib/libvirt/swtpm").join(session.uuid.to_string()),
    };
    folder.is_dir().then_some(folder)
}
