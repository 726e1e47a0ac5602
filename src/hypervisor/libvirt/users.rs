//! Who on a host names an image.

use std::path::{Path, PathBuf};

use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use super::Session;
use crate::hypervisor::header;
use crate::hypervisor::layers::same_file;
use crate::hypervisor::xml::{self, DiskSource, DiskXml};
use crate::hypervisor::{Definition, HypervisorError, ImageRef, ImageUser, Result};

pub(super) fn users_of(session: &Session, path: &Path) -> Result<Vec<ImageUser>> {
    let mut users = Vec::new();
    let domains = session.connect.list_all_domains(0).map_err(session.refused("list the neighbours"))?;
    for domain in domains {
        match of_domain(session, &domain, path) {
            Ok(more) => users.extend(more),
            // It went away while we looked: it names nothing.
            Err(Trouble::Libvirt(e)) if e.code().is(ErrorNumber::NoDomain) => {}
            Err(Trouble::Libvirt(e)) => return Err(session.refused("read a neighbour's definition")(e)),
            Err(Trouble::Other(e)) => return Err(e),
        }
    }
    Ok(users)
}

enum Trouble {
    Libvirt(virt::error::Error),
    Other(HypervisorError),
}

impl From<virt::error::Error> for Trouble {
    fn from(e: virt::error::Error) -> Self {
        Trouble::Libvirt(e)
    }
}

fn of_domain(
    session: &Session,
    domain: &Domain,
    path: &Path,
) -> std::result::Result<Vec<ImageUser>, Trouble> {
    let name = domain.name()?;
    let uuid = domain.uuid()?;
    let mut users = Vec::new();
    let bad = |why| {
        Trouble::Other(HypervisorError::BadDefinition { domain: name.clone(), why: format!("it {why}") })
    };
    let mut add = |definition: &Definition, disks: &[DiskXml]| {
        for disk in disks {
            let depth = paths(session, disk)
                .map_err(Trouble::Other)?
                .into_iter()
                .find_map(|(depth, p)| same_file(&p, path).then_some(depth));
            if let Some(depth) = depth {
                users.push(ImageUser {
                    domain: name.clone(),
                    uuid: Some(uuid),
                    definition: definition.clone(),
                    target: disk.target.clone(),
                    depth,
                });
            }
        }
        Ok::<(), Trouble>(())
    };
    let mut firmware = Vec::new();
    let mut definitions = Vec::new();
    if domain.is_active()? {
        definitions.push((Definition::Live, domain.xml_desc(0)?));
    }
    if domain.is_persistent()? {
        definitions.push((Definition::Persistent, domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?));
    }
    for (definition, text) in definitions {
        let parsed = xml::parse(&text).map_err(bad)?;
        add(&definition, &parsed.disks)?;
        if parsed.nvram.is_some_and(|n| same_file(&n, path)) {
            firmware.push(definition);
        }
    }
    for snapshot in domain.list_all_snapshots(0)? {
        let disks = xml::parse_snapshot(&snapshot.xml_desc(0)?).map_err(bad)?;
        add(&Definition::Snapshot(snapshot.name()?), &disks)?;
    }
    users.extend(firmware.into_iter().map(|definition| ImageUser {
        domain: name.clone(),
        uuid: Some(uuid),
        definition,
        target: String::new(),
        depth: 0,
    }));
    Ok(users)
}

/// All paths that a disk leads to, with their depths.
fn paths(session: &Session, disk: &DiskXml) -> Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    let layers = std::iter::once((&disk.source, disk.driver_type.as_deref()))
        .chain(disk.backing.iter().map(|b| (&b.source, b.format.as_deref())));
    let mut last = None;
    for (depth, (source, format)) in layers.enumerate() {
        let path = match source {
            DiskSource::Volume { pool, volume } => pool_volume(session, pool, volume),
            other => other.path().map(Path::to_owned),
        };
        last = path.clone().zip(xml::image_format(format.unwrap_or("raw")));
        found.extend(path.map(|p| (depth, p)));
    }
    if let Some(mirror) = disk.mirror.as_ref().and_then(|m| m.path.clone()) {
        found.push((0, mirror));
    }
    if disk.terminated {
        return Ok(found);
    }
    let mut depth = disk.backing.len();
    while let Some((path, format)) = last.take() {
        // An image that is missing or has no sound header leads nowhere: no QEMU can open it. One that cannot be
        // looked at may lead anywhere.
        match header::backing(&ImageRef { path, format }) {
            Ok(Some(next)) if depth < header::MAX_DEPTH => {
                depth += 1;
                found.push((depth, next.path.clone()));
                last = Some((next.path, next.format));
            }
            Ok(_) | Err(HypervisorError::Header { .. }) => {}
            Err(HypervisorError::Io { ref source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn pool_volume(session: &Session, pool: &str, volume: &str) -> Option<PathBuf> {
    let pool = session.connect.lookup_storage_pool_by_name(pool).ok()?;
    pool.lookup_storage_vol_by_name(volume).ok()?.path().ok().map(PathBuf::from)
}
