//! Who on a host names an image.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::Session;
use crate::hypervisor::header;
use crate::hypervisor::layers::same_file;
use crate::hypervisor::xml::{self, DiskSource, DiskXml};
use crate::hypervisor::{Definition, HypervisorError, ImageRef, ImageUser, Result};

pub(super) fn users_of(session: &Session, path: &Path) -> Result<Vec<ImageUser>> {
    let doing = "read the neighbours' definitions";
    let neighbours = session.ask_host(doing, read_all)?.map_err(session.refused(doing))?;
    let mut users = Vec::new();
    for neighbour in neighbours {
        users.extend(of_domain(session, &neighbour, path)?);
    }
    Ok(users)
}

/// What a domain of the host is defined as.
struct Neighbour {
    name: String,
    uuid: Uuid,
    definitions: Vec<(Definition, String)>,
    /// With their names.
    snapshots: Vec<(String, String)>,
}

fn read_all(host: &Connect) -> std::result::Result<Vec<Neighbour>, Error> {
    let mut all = Vec::new();
    for domain in host.list_all_domains(0)? {
        match read(&domain) {
            Ok(neighbour) => all.push(neighbour),
            // It went away while we looked: it names nothing.
            Err(e) if e.code().is(ErrorNumber::NoDomain) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

fn read(domain: &Domain) -> std::result::Result<Neighbour, Error> {
    let (name, uuid) = (domain.name()?, domain.uuid()?);
    let mut definitions = Vec::new();
    if domain.is_active()? {
        definitions.push((Definition::Live, domain.xml_desc(0)?));
    }
    if domain.is_persistent()? {
        definitions.push((Definition::Persistent, domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?));
    }
    let mut snapshots = Vec::new();
    for snapshot in domain.list_all_snapshots(0)? {
        snapshots.push((snapshot.name()?, snapshot.xml_desc(0)?));
    }
    Ok(Neighbour { name, uuid, definitions, snapshots })
}

fn of_domain(session: &Session, domain: &Neighbour, path: &Path) -> Result<Vec<ImageUser>> {
    let mut users = Vec::new();
    let bad = |why| HypervisorError::BadDefinition { domain: domain.name.clone(), why: format!("it {why}") };
    let user = |definition: &Definition, target: &str, depth| ImageUser {
        domain: domain.name.clone(),
        uuid: Some(domain.uuid),
        definition: definition.clone(),
        target: target.to_owned(),
        depth,
    };
    let mut add = |definition: &Definition, disks: &[DiskXml]| {
        for disk in disks {
            let found = paths(session, disk)?;
            let depth = found.into_iter().find_map(|(depth, p)| same_file(&p, path).then_some(depth));
            users.extend(depth.map(|depth| user(definition, &disk.target, depth)));
        }
        Ok::<(), HypervisorError>(())
    };
    let mut firmware = Vec::new();
    for (definition, text) in &domain.definitions {
        let parsed = xml::parse(text).map_err(bad)?;
        add(definition, &parsed.disks)?;
        if parsed.nvram.is_some_and(|n| same_file(&n, path)) {
            firmware.push(user(definition, "", 0));
        }
    }
    for (name, text) in &domain.snapshots {
        add(&Definition::Snapshot(name.clone()), &xml::parse_snapshot(text).map_err(bad)?)?;
    }
    users.extend(firmware);
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
    let (pool, volume) = (pool.to_owned(), volume.to_owned());
    let asked = session.ask_host("look for a volume", move |host| {
        host.lookup_storage_pool_by_name(&pool)?.lookup_storage_vol_by_name(&volume)?.path()
    });
    asked.ok()?.ok().map(PathBuf::from)
}
