//! Repairs refcounts: leaks are given back in place; anything else has them rebuilt from nothing.

use std::sync::Arc;

use crate::check::{self, Counted};
use crate::generation::{self, Generation};
use crate::header::incompatible;
use crate::refcount;
use crate::storage::read_exact;
use crate::{Control, Error, Header, Report, Result, Storage, snapshot};

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clusters whose refcount is too high: only space is given back (`-r leaks`).
    Leaks,
    /// Refcounts that are too low too, missing or overlapping refcount blocks, copied flags (`-r all`).
    All,
}

/// What a check found before and after a repair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// As it was.
    pub before: Report,
    /// As it is now: what is still wrong is damage that no refcount explains.
    pub after: Report,
}

/// Repairs the image in `storage`, which nobody else writes to. New refcounts are written beside the old ones and
/// switched to by one write, so a cut leaves the image as it was or repaired. An image that has no corruption left
/// loses its marks of being dirty or corrupt.
pub fn repair(storage: Arc<dyn Storage>, what: Repair, control: &Control) -> Result<Repaired> {
    let found = look(&storage, control)?;
    let before = found.report.clone();
    let broken = before.corruptions != 0;
    let mut after = before.clone();
    if broken && what == Repair::All {
        let mut counted = found;
        // A table that moves off a place that others use too changes the flags of those: then there is another round.
        for _ in 0..4 {
            rebuild(&storage, counted)?;
            counted = look(&storage, control)?;
            after = counted.report.clone();
            if counted.report.corruptions <= counted.structural {
                break;
            }
        }
    } else if before.leaks != 0 && found.structural == 0 {
        lower(&storage, &found)?;
        after = look(&storage, control)?.report;
    }
    if after.corruptions == 0 {
        unmark(&*storage)?;
    }
    Ok(Repaired { before, after })
}

/// Readies an image for a change of all its tables: one that is marked corrupt is refused, a dirty one repaired.
pub(crate) fn sound(storage: &Arc<dyn Storage>, control: &Control) -> Result<(Header, Counted)> {
    let header = Header::parse(&**storage)?;
    refuse_corrupt(&**storage, &header)?;
    if header.incompatible & incompatible::DIRTY != 0 {
        repair(storage.clone(), Repair::All, control)?;
    }
    let counted = look(storage, control)?;
    if let Some(message) = counted.report.messages.first().filter(|_| counted.report.corruptions != 0) {
        return Err(Error::damaged(
            storage.path(),
            format!("{message}: repair it first with `qemu-img check -r all`"),
        ));
    }
    Ok((Header::parse(&**storage)?, counted))
}

pub(crate) fn refuse_corrupt(storage: &dyn Storage, header: &Header) -> Result<()> {
    if header.incompatible & incompatible::CORRUPT == 0 {
        return Ok(());
    }
    Err(Error::unsupported(
        storage.path(),
        format!(
            "it is marked corrupt and may only be read: repair it with `qemu-img check -r all {}`",
            storage.path().display()
        ),
    ))
}

fn look(storage: &Arc<dyn Storage>, control: &Control) -> Result<Counted> {
    check::count(&generation::image(storage)?, control)
}

fn rebuild(storage: &Arc<dyn Storage>, counted: Counted) -> Result<()> {
    let header = Header::parse_for_repair(&**storage)?;
    let (l1_offset, l1_size) = (header.l1_offset, header.l1_size);
    let incomplete = counted.incomplete;
    let mut next = Generation::new(storage.clone(), header, counted)?;
    let l1 = next.read_l1(l1_offset, l1_size)?;
    next.activate(l1, false, true)?;
    // A table that cannot be read keeps nothing else from its repair.
    if incomplete && snapshot::read_table(next.storage(), &next.header).is_ok() {
        snapshot::complete(&mut next)?;
    }
    next.finish().map(|_| ())
}

/// Lowers the refcounts that are too high. Each of them is right before or after, so a cut does no harm.
fn lower(storage: &Arc<dyn Storage>, counted: &Counted) -> Result<()> {
    let h = Header::parse(&**storage)?;
    let per_block = (h.cluster_size() * 8) >> h.refcount_order;
    for (number, offset) in counted.blocks.iter().enumerate().filter(|(_, offset)| **offset != 0) {
        let mut block = vec![0u8; h.cluster_size() as usize];
        read_exact(&**storage, &mut block, *offset, "a refcount block")?;
        let mut changed = false;
        for at in 0..per_block {
            let used = u64::from(counted.counts.get(number as u64 * per_block + at));
            if refcount::get(&block, h.refcount_order, at as usize) > used {
                refcount::set(&mut block, h.refcount_order, at as usize, used);
                changed = true;
            }
        }
        if changed {
            storage
                .write_at(&block, *offset)
                .map_err(|e| Error::io(storage.path(), format!("writing a refcount block at {offset}"), e))?;
        }
    }
    storage.sync().map_err(|e| Error::io(storage.path(), "syncing", e))
}

/// Takes the marks of being dirty or corrupt off the header.
fn unmark(storage: &dyn Storage) -> Result<()> {
    let header = Header::parse(storage)?;
    let marks = incompatible::DIRTY | incompatible::CORRUPT;
    if header.incompatible & marks == 0 {
        return Ok(());
    }
    storage
        .write_at(&(header.incompatible & !marks).to_be_bytes(), 72)
        .map_err(|e| Error::io(storage.path(), "writing the header", e))?;
    storage.sync().map_err(|e| Error::io(storage.path(), "syncing", e))
}
