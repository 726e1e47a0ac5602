//! Other options for an image that is there.

use std::sync::Arc;

use crate::create::{Edit, extensions, read_cluster_zero};
use crate::entry::{L2, OFFSET_MASK};
use crate::generation::Generation;
use crate::header::{EXT_BITMAPS, incompatible};
use crate::repair::sound;
use crate::rw::ImageMut;
use crate::{Control, Error, Gate, Header, Result, Storage, snapshot};

/// What is to change; `None` leaves it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// 2 (compat 0.10) or 3 (compat 1.1).
    pub version: Option<u32>,
    /// Allows writers to leave refcounts for later.
    pub lazy_refcounts: Option<bool>,
    /// log2 of the width of a refcount in bits, 0–6.
    pub refcount_order: Option<u32>,
}

/// Changes options of an image that nobody else uses. Each step takes effect by one write of the header. What version 2
/// cannot say (subclusters, zstd, external data, snapshots' sizes, bitmaps) is refused with the reason before anything
/// changes; clusters that read as zeros are made plain for it.
pub fn amend(storage: Arc<dyn Storage>, gate: &dyn Gate, what: &Amend, control: &Control) -> Result<()> {
    let (header, _) = sound(&storage, control)?;
    let version = what.version.unwrap_or(header.version);
    let order = what.refcount_order.unwrap_or(header.refcount_order);
    let lazy = what.lazy_refcounts.unwrap_or(header.compatible & 1 != 0 && version >= 3);
    refuse(&*storage, &header, version, order, lazy)?;
    if header.version < version {
        upgrade(&storage, control)?;
    }
    if order != header.refcount_order {
        let (header, counted) = sound(&storage, control)?;
        rebuild(&storage, header, counted, |next| {
            next.header.refcount_order = order;
            Ok(())
        })?;
    }
    if version >= 3 {
        let now = Header::parse(&*storage)?;
        let compatible = if lazy { now.compatible | 1 } else { now.compatible & !1 };
        if compatible != now.compatible {
            let io = |e| Error::io(storage.path(), "writing the header", e);
            storage.write_at(&compatible.to_be_bytes(), 80).map_err(io)?;
            storage.sync().map_err(io)?;
        }
    } else if header.version >= 3 {
        let mut image = ImageMut::open(storage.clone(), gate)?;
        image.expand_zeros()?;
        drop(image);
        let header = Header::parse(&*storage)?;
        let mut edit = Edit::keep(&*storage, &header)?;
        edit.version = 2;
        edit.write(&*storage, &header)?;
    }
    Ok(())
}

fn refuse(storage: &dyn Storage, header: &Header, version: u32, order: u32, lazy: bool) -> Result<()> {
    let refuse = |what: String| Err(Error::unsupported(storage.path(), what));
    if !(2..=3).contains(&version) {
        return refuse(format!("version {version} of qcow2: only 2 and 3 are known"));
    }
    if order > 6 {
        return refuse(format!("refcounts of 2^{order} bits: qcow2 allows 1 to 64 bits"));
    }
    if version >= 3 {
        return Ok(());
    }
    let zero = read_cluster_zero(storage, header)?;
    let newer = [
        (order != 4, "refcounts that are not 16 bits wide"),
        (lazy, "lazy refcounts"),
        (header.extended_l2(), "extended L2 entries"),
        (header.external_data(), "an external data file"),
        (header.incompatible & incompatible::COMPRESSION != 0, "zstd"),
        (header.version >= 3 && header.snapshot_count > 0, "internal snapshots that version 3 made"),
        (extensions(&zero, header).iter().any(|e| e.kind == EXT_BITMAPS), "bitmaps"),
    ];
    match newer.iter().find(|(there, _)| *there) {
        Some((_, what)) => refuse(format!("version 2 (compat 0.10) has no {what}")),
        None => Ok(()),
    }
}

fn upgrade(storage: &Arc<dyn Storage>, control: &Control) -> Result<()> {
    let (header, counted) = sound(storage, control)?;
    if header.snapshot_count > 0 {
        // Version 3 wants to know the disk's size in each of them.
        rebuild(storage, header, counted, snapshot::complete)?;
    }
    let header = Header::parse(&**storage)?;
    let mut edit = Edit::keep(&**storage, &header)?;
    edit.version = 3;
    edit.write(&**storage, &header)
}

fn rebuild(
    storage: &Arc<dyn Storage>,
    header: Header,
    counted: crate::check::Counted,
    change: impl FnOnce(&mut Generation) -> Result<()>,
) -> Result<()> {
    let mut next = Generation::new(storage.clone(), header, counted)?;
    change(&mut next)?;
    next.finish().map(|_| ())
}

impl ImageMut {
    /// Replaces clusters that are said to read as zeros by what says so without a flag: nothing where there is no
    /// backing file, zeros that are written where there is one. Flushes.
    fn expand_zeros(&mut self) -> Result<()> {
        let (cluster, entries) = (self.header().cluster_size(), self.header().l2_entries());
        let count = self.size().div_ceil(cluster);
        let zeros = vec![0u8; cluster as usize];
        let mut index = 0;
        while index < count {
            if self.l1_entry(index)? & OFFSET_MASK == 0 {
                index = (index / entries + 1) * entries;
                continue;
            }
            let entry = self.entry(index)?;
            if matches!(self.decode(index, entry)?, L2::Zero { .. }) {
                let start = index * cluster;
                let len = cluster.min(self.size() - start);
                if self.has_backing() {
                    self.write_at(&zeros[..len as usize], start)?;
                } else {
                    self.discard(start, len)?;
                }
            }
            index += 1;
        }
        self.flush()
    }
}
