//! Where a domain's disks lie, changed from outside: other images, new disks, other hosts.

use std::sync::Arc;
use std::time::Duration;

use virt::connect::Connect;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::{LibvirtDomain, Session, inspect, snapshot};
use crate::failpoint;
use crate::hypervisor::layers::is_block;
use crate::hypervisor::xml;
use crate::hypervisor::{DiskPlace, ErrorPolicy, Guest, HypervisorError, Images, Power, Result, limit};

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
            with_errors(xml::set_disk(&new, &disk.target, &disk.chain, &is_block), disk)
                .map_err(bad(session))?
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
    session.define("change the definition", &new)?;
    failpoint::hit("disks-placed");
    // It may have been started between the look and the change: then it runs on the old images.
    if inspect::power(session)? != Power::Off && !is_placed(&inspect::inspect(session)?, disks) {
        session.define("change the definition", &old)?;
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

/// A definition, with the policy that the disk is to have.
fn with_errors(
    text: std::result::Result<String, String>,
    disk: &DiskPlace,
) -> std::result::Result<String, String> {
    match &disk.errors {
        Some(policy) => xml::errors::set_error_policy(&text?, &disk.target, policy),
        None => text,
    }
}

/// Sets what becomes of I/O errors of a disk in the next run, where that has the disk.
pub(super) fn set_error_policy(session: &Session, target: &str, policy: &ErrorPolicy) -> Result<()> {
    if !session.ask("look at the state", |domain| domain.is_persistent())? {
        return Ok(());
    }
    let old = inspect::persistent_text(session)?;
    if !xml::new::targets(&old).map_err(bad(session))?.iter().any(|t| t == target) {
        return Ok(());
    }
    let new = xml::errors::set_error_policy(&old, target, policy).map_err(bad(session))?;
    if new == old { Ok(()) } else { session.define("change the definition", &new) }
}

fn set_source(disk: &str, place: &DiskPlace) -> std::result::Result<String, String> {
    let keep = xml::new::Likeness { address: true, serial: true };
    let whole = with_errors(Ok(format!("<domain><devices>{disk}</devices></domain>")), place)?;
    xml::new::new_disk(Some(&whole), &place.target, &place.target, &place.chain, keep, &is_block)
}

/// Adds a disk, to the run that goes on and to the next one, unless it is there.
pub(super) fn attach(session: &Session, disk: &DiskPlace) -> Result<()> {
    let power = inspect::power(session)?;
    let persistent = session.ask("look at the state", |domain| domain.is_persistent())?;
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
        session.ask("attach a disk", move |domain| domain.attach_device_flags(&text, flags))?;
    }
    Ok(())
}

/// Starts it, if it is off.
pub(super) fn start(session: &Session) -> Result<()> {
    if inspect::power(session)? != Power::Off {
        return Ok(());
    }
    session.ask("start", |domain| domain.create())
}

/// Defines it on another host as it is here; here it stays until [`undefine`].
pub(super) fn copy_to(own: &LibvirtDomain, session: &Session, uri: &str) -> Result<LibvirtDomain> {
    new_domain(uri, &inspect::persistent_text(session)?, own.images.clone())
}

/// Defines a domain on a host.
pub(crate) fn new_domain(uri: &str, definition: &str, images: Arc<dyn Images>) -> Result<LibvirtDomain> {
    let text = definition.to_owned();
    let uuid = on_host(uri, "make the definition", limit::of_a_call(), move |connect| {
        connect.define_domain_xml(&text)?.uuid()
    })?
    .map_err(|e| HypervisorError::Libvirt {
        doing: format!("make the definition on {uri}"),
        domain: xml::parse(definition).map(|d| d.name).unwrap_or_default(),
        why: e.message().to_owned(),
    })?;
    Ok(LibvirtDomain { uri: uri.to_owned(), uuid, images, program: None })
}

/// Forgets the definition of a domain that is off; its disks and its firmware variables stay.
pub(super) fn undefine(session: &Session) -> Result<()> {
    let flags = sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM;
    match session.call("undefine", move |domain| domain.undefine_flags(flags))? {
        Err(e) if !e.code().is(ErrorNumber::NoDomain) => Err(session.refused("undefine")(e)),
        _ => Ok(()),
    }
}

/// Saves its memory and starts it again from there: all images are opened anew, and the guest sees just a pause. Requests
/// that failed are saved with the memory, and done again.
pub(super) fn reopen(session: &Session) -> Result<()> {
    let by_person = inspect::power(session)? == Power::Paused && !inspect::is_stopped_by_error(session)?;
    // One that is paused by an error just now is to run as well.
    let flags = if by_person { sys::VIR_DOMAIN_SAVE_PAUSED } else { sys::VIR_DOMAIN_SAVE_RUNNING };
    session.ask("save the memory", move |domain| domain.managed_save(flags))?;
    failpoint::hit("reopen-saved");
    session.ask("start from its saved memory", |domain| domain.create())
}

/// Whether a host answers.
pub(crate) fn reach_host(uri: &str) -> Result<()> {
    on_host(uri, "connect", limit::of_a_connection(), |_| Ok(()))?.map_err(|e| unreachable(uri, &e))
}

/// Whether a host has a domain of that name.
pub(crate) fn has_domain(uri: &str, name: &str) -> Result<bool> {
    let wanted = name.to_owned();
    let found = on_host(uri, "look for the domain", limit::of_a_connection(), move |connect| {
        connect.lookup_domain_by_name(&wanted).map(drop)
    })?;
    match found {
        Ok(()) => Ok(true),
        Err(e) if e.code().is(ErrorNumber::NoDomain) => Ok(false),
        Err(e) => Err(unreachable(uri, &e)),
    }
}

/// Asks a host, over a connection of its own; what it answers, an error too.
fn on_host<T: Send + 'static>(
    uri: &str,
    doing: &str,
    bound: Duration,
    call: impl FnOnce(&Connect) -> std::result::Result<T, Error> + Send + 'static,
) -> Result<std::result::Result<T, Error>> {
    let at = uri.to_owned();
    limit::within(bound, uri, doing, move || Ok(call(&super::open(&at)?)))?
}

pub(super) fn unreachable(uri: &str, why: &Error) -> HypervisorError {
    HypervisorError::Unreachable { uri: uri.to_owned(), why: why.message().to_owned(), changing: false }
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
