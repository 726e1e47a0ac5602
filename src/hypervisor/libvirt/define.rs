//! Where a domain's disks lie, changed from outside: other images, new disks, other hosts.

use std::sync::Arc;

use virt::connect::Connect;
use virt::error::ErrorNumber;
use virt::sys;

use super::{LibvirtDomain, Session, inspect, snapshot};
use crate::failpoint;
use crate::hypervisor::layers::is_block;
use crate::hypervisor::xml;
use crate::hypervisor::{DiskPlace, Guest, HypervisorError, Images, Power, Result};

/// Makes the definition of a domain that is off name these images, in one change.
pub(super) fn place(session: &Session, disks: &[DiskPlace]) -> Result<()> {
    let guest = inspect::inspect(session)?;
    snapshot::check_off(&guest)?;
    if guest.power != Power::Off {
        // Started since it was placed, after a crash: it is as it should be.
        return if is_placed(&guest, disks) { Ok(()) } else { Err(running(session)) };
    }
    let old = inspect::persistent_text(session)?;
    let there = xml::new::targets(&old).map_err(bad(session))?;
    let mut new = old.clone();
    for disk in disks {
        new = if there.contains(&disk.target) {
            xml::set_disk(&new, &disk.target, &disk.chain, &is_block).map_err(bad(session))?
        } else if let Some(model) = &disk.model {
            let mut added = model.clone();
            added = set_source(&added, disk).map_err(bad(session))?;
            xml::new::add_disk(&new, &added).map_err(bad(session))?
        } else {
            return Err(bad(session)(format!("has no disk {}", disk.target)));
        };
    }
    if new == old {
        return Ok(());
    }
    define(session, &new)?;
    failpoint::hit("disks-placed");
    // It may have been started between the look and the change: then it runs on the old images.
    if inspect::power(session)? != Power::Off && !is_placed(&inspect::inspect(session)?, disks) {
        define(session, &old)?;
        return Err(running(session));
    }
    Ok(())
}

fn is_placed(guest: &Guest, disks: &[DiskPlace]) -> bool {
    disks.iter().all(|d| {
        let found = guest.volumes.iter().find(|v| v.target == d.target);
        found.and_then(|v| v.chain.first()).map(|i| &i.path) == d.chain.first().map(|i| &i.path)
    })
}

fn set_source(disk: &str, place: &DiskPlace) -> std::result::Result<String, String> {
    let keep = xml::new::Likeness { address: true, serial: true };
    let whole = format!("<domain><devices>{disk}</devices></domain>");
    xml::new::new_disk(Some(&whole), &place.target, &place.target, &place.chain, keep, &is_block)
}

/// Adds a disk, to the run that goes on and to the next one, unless it is there.
pub(super) fn attach(session: &Session, disk: &DiskPlace) -> Result<()> {
    let power = inspect::power(session)?;
    let persistent = session.domain.is_persistent().map_err(session.refused("look at the state"))?;
    let Some(model) = &disk.model else { return Ok(()) };
    let text = set_source(model, disk).map_err(bad(session))?;
    let mut flags = 0;
    if power != Power::Off {
        let live = inspect::current(session, power)?;
        if live.disks.iter().all(|d| d.target != disk.target) {
            flags |= sys::VIR_DOMAIN_AFFECT_LIVE;
        }
    }
    if persistent {
        let there = xml::new::targets(&inspect::persistent_text(session)?).map_err(bad(session))?;
        if !there.contains(&disk.target) {
            flags |= sys::VIR_DOMAIN_AFFECT_CONFIG;
        }
    }
    if flags != 0 {
        session.domain.attach_device_flags(&text, flags).map_err(session.refused("attach a disk"))?;
    }
    Ok(())
}

/// Starts it, if it is off.
pub(super) fn start(session: &Session) -> Result<()> {
    if inspect::power(session)? != Power::Off {
        return Ok(());
    }
    session.domain.create().map_err(session.refused("start"))
}

/// Defines it on another host as it is here; here it stays until [`undefine`].
pub(super) fn copy_to(own: &LibvirtDomain, session: &Session, uri: &str) -> Result<LibvirtDomain> {
    new_domain(uri, &inspect::persistent_text(session)?, own.images.clone())
}

/// Defines a domain on a host.
pub(crate) fn new_domain(uri: &str, definition: &str, images: Arc<dyn Images>) -> Result<LibvirtDomain> {
    let connect = connect(uri)?;
    let domain = connect.define_domain_xml(definition).map_err(|e| HypervisorError::Libvirt {
        doing: format!("make the definition on {uri}"),
        domain: xml::parse(definition).map(|d| d.name).unwrap_or_default(),
        why: e.message().to_owned(),
    })?;
    let uuid = domain.uuid().map_err(|e| unreachable(uri, e.message()))?;
    Ok(LibvirtDomain { uri: uri.to_owned(), uuid, images, program: None })
}

/// Forgets the definition of a domain that is off; its disks and its firmware variables stay.
pub(super) fn undefine(session: &Session) -> Result<()> {
    let flags = sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM;
    match session.domain.undefine_flags(flags) {
        Err(e) if !e.code().is(ErrorNumber::NoDomain) => Err(session.refused("undefine")(e)),
        _ => Ok(()),
    }
}

/// Saves its memory and starts it again from there: all images are opened anew, and the guest sees just a pause.
pub(super) fn reopen(session: &Session) -> Result<()> {
    session.domain.managed_save(0).map_err(session.refused("save the memory"))?;
    failpoint::hit("reopen-saved");
    session.domain.create().map_err(session.refused("start from its saved memory"))
}

/// Whether a host answers.
pub(crate) fn reach_host(uri: &str) -> Result<()> {
    connect(uri).map(drop)
}

/// Whether a host has a domain of that name.
pub(crate) fn has_domain(uri: &str, name: &str) -> Result<bool> {
    match connect(uri)?.lookup_domain_by_name(name) {
        Ok(_) => Ok(true),
        Err(e) if e.code().is(ErrorNumber::NoDomain) => Ok(false),
        Err(e) => Err(unreachable(uri, e.message())),
    }
}

fn connect(uri: &str) -> Result<Connect> {
    virt::error::clear_error_callback();
    Connect::open(Some(uri)).map_err(|e| unreachable(uri, e.message()))
}

fn unreachable(uri: &str, why: &str) -> HypervisorError {
    HypervisorError::Unreachable { uri: uri.to_owned(), why: why.to_owned(), changing: false }
}

fn define(session: &Session, text: &str) -> Result<()> {
    session.connect.define_domain_xml(text).map_err(session.refused("change the definition"))?;
    Ok(())
}

fn running(session: &Session) -> HypervisorError {
    HypervisorError::NotNow {
        what: format!("domain \"{}\" is running: shut it down and try again", session.name),
    }
}

fn bad(session: &Session) -> impl Fn(String) -> HypervisorError {
    let domain = session.name.clone();
    move |why| HypervisorError::BadDefinition { domain: domain.clone(), why: format!("it {why}") }
}
