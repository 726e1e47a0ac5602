//! Larger and smaller disks.

use std::sync::Arc;

use crate::generation::Generation;
use crate::repair::sound;
use crate::rw::{ImageMut, mark_bitmaps};
use crate::{Access, Control, Error, Gate, Header, Preallocation, Result, Storage, snapshot};

/// Gives the disk another size in bytes. A larger disk shows zeros in its new part, which is preallocated as `how`
/// says. A smaller one loses what lay past its new end: that is refused unless `shrink` says that it is meant.
pub fn resize(
    storage: Arc<dyn Storage>,
    gate: &dyn Gate,
    size: u64,
    shrink: bool,
    how: Preallocation,
    control: &Control,
) -> Result<()> {
    let header = Header::parse(&*storage)?;
    let old = header.size;
    let all = snapshot::list(&*storage)?;
    if size != old && all.iter().any(|s| s.extra.len() < 16) {
        return Err(Error::unsupported(
            storage.path(),
            "it has internal snapshots that do not know the disk's size: delete them first, or make the image one of version 3",
        ));
    }
    if size >= old {
        let mut image = ImageMut::open(storage, gate)?;
        image.grow(size)?;
        return image.preallocate_zeros(old..size, how);
    }
    if !shrink {
        return Err(Error::unsupported(
            storage.path(),
            format!("a disk of {old} bytes made {size} bytes small loses its end: say that this is meant"),
        ));
    }
    let data = match (&header.data_file, header.external_data()) {
        (Some(name), true) => Some(gate.open_data(storage.path(), name, Access::ReadWrite)?),
        _ => None,
    };
    cut(&storage, size, control)?;
    let end = sink(&storage, control)?;
    let shorten = |s: &dyn Storage, end: u64| {
        let io = |e| Error::io(s.path(), format!("shortening to {end} bytes"), e);
        if s.len().map_err(io)? > end { s.set_len(end).map_err(io) } else { Ok(()) }
    };
    shorten(&*storage, end)?;
    if let Some(data) = data {
        shorten(&*data, size)?;
    }
    Ok(())
}

/// Moves tables that lie high in the file into the space that became free below; where the file may end then.
fn sink(storage: &Arc<dyn Storage>, control: &Control) -> Result<u64> {
    let (header, counted) = sound(storage, control)?;
    let (offset, l1_size) = (header.l1_offset, header.l1_size);
    let used = (counted.counts.used().count() as u64) << header.cluster_bits;
    let mut next = Generation::new(storage.clone(), header, counted)?;
    next.move_from = used;
    let l1 = next.read_l1(offset, l1_size)?;
    next.activate(l1, offset >= used, true)?;
    next.finish()
}

/// Drops everything past `size`.
fn cut(storage: &Arc<dyn Storage>, size: u64, control: &Control) -> Result<()> {
    let (mut header, counted) = sound(storage, control)?;
    mark_bitmaps(&**storage, &mut header)?;
    let (offset, entries, l1_size) = (header.l1_offset, header.l2_entries(), header.l1_size);
    let step = (header.l2_entry_size() / 8) as usize;
    let clusters = size.div_ceil(header.cluster_size());
    let mut next = Generation::new(storage.clone(), header, counted)?;
    let mut l1 = next.read_l1(offset, l1_size)?;
    next.header.size = size;
    let keep = (next.header.l1_needed() as usize).min(l1.len());
    let past = l1.split_off(keep);
    next.refer(&past, false)?;
    // The last table may reach past the end.
    let inside = (clusters - (keep as u64).saturating_sub(1) * entries).min(entries) as usize;
    if let Some(last) = l1.last_mut()
        && let Some((at, mut words)) = next.read_l2(*last)?
    {
        let tail = words.get_mut(inside * step..).unwrap_or_default();
        if tail.iter().any(|w| *w != 0) {
            for word in tail.iter().step_by(step) {
                next.refer_entry(*word, false);
            }
            tail.fill(0);
            *last = (*last & !crate::entry::OFFSET_MASK) | next.move_l2(at, &words)?;
        }
    }
    l1.resize(keep.max(1), 0);
    next.activate(l1, true, true)?;
    next.finish().map(|_| ())
}
