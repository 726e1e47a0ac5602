//! Other options for an image that is there.

use std::sync::Arc;

use crate::create::{Edit, extensions, read_cluster_zero};
use crate::entry::{L2, OFFSET_MASK};
use crate::generation::Generation;
use crate::header::{EXT_BITMAPS, incompatible};
use crate::repair::sound;
use crate::rw::ImageMut;
use crate::{Control, Error, Gate, Header, Result, Storage, bitmap, snapshot};

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
/// cannot say (subclusters, zstd, external data, snapshots of other sizes) is refused with the reason before anything
/// changes; clusters that read as zeros are made plain for it, and bitmaps, which it does not have, are removed.
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
        let zero = read_cluster_zero(&*storage, &header)?;
        if extensions(&zero, &header).iter().any(|e| e.kind == EXT_BITMAPS) {
            bitmap::remove_all(storage.clone(), control)?;
        }
        let mut image = ImageMut::open(storage.clone(), gate)?;
        image.expand_zeros()?;
        drop(image);
        if header.snapshot_count > 0 {
            let (header, counted) = sound(&storage, control)?;
            rebuild(&storage, header, counted, expand_snapshots)?;
        }
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
    // Version 2 does not say how large the disk was in a snapshot, nor that a VM's state is 4 GiB or more.
    let fits = |s: &snapshot::Snapshot| s.disk_size == header.size && s.vm_state_size <= u64::from(u32::MAX);
    let snapshots = if header.version >= 3 { snapshot::list(storage)? } else { Vec::new() };
    let newer = [
        (order != 4, "refcounts that are not 16 bits wide"),
        (lazy, "lazy refcounts"),
        (header.extended_l2(), "extended L2 entries"),
        (header.external_data(), "an external data file"),
        (header.incompatible & incompatible::COMPRESSION != 0, "zstd"),
        (!snapshots.iter().all(fits), "internal snapshots of another disk size, or with a large VM state"),
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

/// Replaces clusters of internal snapshots that are said to read as zeros by what says so without a flag.
fn expand_snapshots(next: &mut Generation) -> Result<()> {
    let mut all = snapshot::read_table(next.storage(), &next.header)?;
    for snapshot in &mut all {
        let mut l1 = next.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
        let mut changed = false;
        for entry in &mut l1 {
            let Some((offset, mut words)) = next.read_l2(*entry)? else { continue };
            if expand_table(next, &mut words)? {
                *entry = next.move_l2(offset, &words)?;
                changed = true;
            }
        }
        if changed {
            next.drop_bytes(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            snapshot.l1_offset = next.place((bytes.len() as u64).div_ceil(next.header.cluster_size()))?;
            next.write(snapshot.l1_offset, &bytes, "the L1 table of a snapshot")?;
        }
    }
    snapshot::put_table(next, &all)?;
    // What the snapshots shared with the disk may be its own now.
    let l1 = next.read_l1(next.header.l1_offset, next.header.l1_size)?;
    next.activate(l1, false, true)
}

/// The same in one L2 table (without subclusters, which version 2 has not); whether there was such a cluster.
fn expand_table(next: &mut Generation, words: &mut [u64]) -> Result<bool> {
    let zeros = vec![0u8; next.header.cluster_size() as usize];
    let mut changed = false;
    for word in words {
        if !matches!(L2::decode(*word, &next.header), Ok(L2::Zero { .. })) {
            continue;
        }
        next.refer_entry(*word, false);
        *word = 0;
        if next.header.backing.is_some() {
            *word = next.place(1)?;
            next.write(*word, &zeros, "zeros")?;
        }
        changed = true;
    }
    Ok(changed)
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
