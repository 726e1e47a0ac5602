//! Internal snapshots. Source: the qcow2 specification, "Snapshots".

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::entry::L1_MAX;
use crate::generation::Generation;
use crate::repair::sound;
use crate::rw::mark_bitmaps;
use crate::storage::read_exact;
use crate::{Control, Error, Header, Result, Storage};

/// QEMU opens no image with more extra data than this in a snapshot, in bytes.
pub(crate) const EXTRA_MAX: usize = 1024;
/// Version 3 wants as much of it: how large the VM's state and the disk are.
pub(crate) const EXTRA_MIN: usize = 16;
/// Length of the part of an entry that is always there, in bytes.
const FIXED: u64 = 40;
/// Longest table of snapshots in bytes.
pub(crate) const TABLE_MAX: u64 = 64 << 20;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made: seconds since 1970 and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    /// Size of the VM's saved state in bytes, 0 for none.
    pub vm_state_size: u64,
    /// Size of the guest's disk in bytes.
    pub disk_size: u64,
    /// Instructions that were executed, where record/replay counted them.
    pub icount: Option<u64>,
    /// Offset of its L1 table in bytes.
    pub(crate) l1_offset: u64,
    /// Entries in its L1 table.
    pub(crate) l1_size: u32,
    /// The names as they stand in the table.
    pub(crate) raw_id: Vec<u8>,
    pub(crate) raw_name: Vec<u8>,
    /// Extra data as it stands in the table.
    pub(crate) extra: Vec<u8>,
    pub(crate) vm_state_low: u32,
}

impl Snapshot {
    /// Bytes of its entry in the table, padding included.
    pub(crate) fn entry_len(&self) -> u64 {
        (FIXED + (self.extra.len() + self.raw_id.len() + self.raw_name.len()) as u64).next_multiple_of(8)
    }
}

/// The internal snapshots of an image, oldest first.
pub fn list(storage: &dyn Storage) -> Result<Vec<Snapshot>> {
    read_table(storage, &Header::parse(storage)?)
}

/// Reads and checks the table; the L1 tables that it names are not looked at.
pub(crate) fn read_table(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshot_count {
        let snapshot = read_entry(storage, header, at, number)?;
        at += snapshot.entry_len();
        if at - header.snapshots_offset > TABLE_MAX {
            return Err(Error::damaged(
                storage.path(),
                format!("the snapshot table at {:#x} is longer than 64 MiB", header.snapshots_offset),
            ));
        }
        found.push(snapshot);
    }
    Ok(found)
}

fn read_entry(storage: &dyn Storage, header: &Header, at: u64, number: u32) -> Result<Snapshot> {
    let damaged =
        |what: String| Error::damaged(storage.path(), format!("snapshot {number} at {at:#x}: {what}"));
    let mut fixed = [0u8; FIXED as usize];
    read_exact(storage, &mut fixed, at, "the snapshot table")?;
    let word = |bytes: &[u8], from: usize, len: usize| {
        bytes.get(from..from + len).unwrap_or(&[]).iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
    };
    let field = |from, len| word(&fixed, from, len);
    let (id_len, name_len, extra_len) = (field(12, 2) as usize, field(14, 2) as usize, field(36, 4) as usize);
    if extra_len > EXTRA_MAX {
        return Err(damaged(format!("it has {extra_len} bytes of extra data, above {EXTRA_MAX}")));
    }
    let (l1_offset, l1_size) = (field(0, 8), field(8, 4) as u32);
    if u64::from(l1_size) * 8 > L1_MAX {
        return Err(damaged(format!("its L1 table has {l1_size} entries, above 32 MiB")));
    }
    if !l1_offset.is_multiple_of(header.cluster_size()) {
        return Err(damaged(format!("its L1 table's offset {l1_offset:#x} is not aligned")));
    }
    let mut rest = vec![0u8; extra_len + id_len + name_len];
    read_exact(storage, &mut rest, at.saturating_add(FIXED), "the snapshot table")?;
    let raw_name = rest.split_off(extra_len + id_len);
    let raw_id = rest.split_off(extra_len);
    let extra = rest;
    let long = |from: usize| (extra.len() >= from + 8).then(|| word(&extra, from, 8));
    // What an old writer left out is what it was when the field did not exist.
    let vm_state_low = field(32, 4) as u32;
    Ok(Snapshot {
        id: String::from_utf8_lossy(&raw_id).into_owned(),
        name: String::from_utf8_lossy(&raw_name).into_owned(),
        date: (field(16, 4) as u32, field(20, 4) as u32),
        vm_clock: field(24, 8),
        vm_state_size: long(0).unwrap_or(u64::from(vm_state_low)),
        disk_size: long(8).unwrap_or(header.size),
        icount: long(16).filter(|n| *n != u64::MAX),
        l1_offset,
        l1_size,
        raw_id,
        raw_name,
        extra,
        vm_state_low,
    })
}

/// Which of an image's snapshots is meant.
fn find(storage: &dyn Storage, all: &[Snapshot], wanted: &str) -> Result<usize> {
    let place = all.iter().position(|s| s.id == wanted).or_else(|| all.iter().position(|s| s.name == wanted));
    place.ok_or_else(|| {
        Error::unsupported(storage.path(), format!("it has no snapshot with the id or name {wanted:?}"))
    })
}

fn refuse_data_file(storage: &dyn Storage, header: &Header) -> Result<()> {
    if !header.external_data() {
        return Ok(());
    }
    Err(Error::unsupported(
        storage.path(),
        "its data lies in an external file, of which internal snapshots are not possible",
    ))
}

/// Makes an internal snapshot of the disk as it is, named `name`. Like [`apply`] and [`delete`] it changes the image by
/// one write of its header: a cut leaves the image with or without the snapshot. `control` cancels the check that
/// comes first.
pub fn create(storage: Arc<dyn Storage>, name: &str, control: &Control) -> Result<Snapshot> {
    let (header, counted) = sound(&storage, control)?;
    refuse_data_file(&*storage, &header)?;
    let mut all = read_table(&*storage, &header)?;
    if name.is_empty() || name.len() > usize::from(u16::MAX) || name.contains('\0') {
        return Err(Error::unsupported(storage.path(), "a snapshot's name has 1 to 65535 bytes and no NUL"));
    }
    let last = all.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0);
    let id = (last + 1).to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let extra = [0u64, header.size, u64::MAX].into_iter().flat_map(u64::to_be_bytes).collect();
    let new = Snapshot {
        raw_id: id.clone().into_bytes(),
        raw_name: name.as_bytes().to_vec(),
        id,
        name: name.to_owned(),
        date: (now.as_secs() as u32, now.subsec_nanos()),
        vm_clock: 0,
        vm_state_size: 0,
        disk_size: header.size,
        icount: None,
        l1_offset: header.l1_offset,
        l1_size: header.l1_size,
        extra,
        vm_state_low: 0,
    };
    all.push(new.clone());
    let (offset, size) = (header.l1_offset, header.l1_size);
    let mut next = Generation::new(storage, header, counted)?;
    let l1 = next.read_l1(offset, size)?;
    // The snapshot keeps the tables as they are; the disk gets its own where flags change.
    next.refer(&l1, true)?;
    next.activate(l1, true, false)?;
    put_table(&mut next, &all)?;
    next.finish()?;
    Ok(new)
}

/// Makes the disk what it was when the snapshot with the id or name `wanted` was made, its size too. What was written
/// since is lost; persistent bitmaps are marked as in use, since they do not know of it.
pub fn apply(storage: Arc<dyn Storage>, wanted: &str, control: &Control) -> Result<()> {
    let (mut header, counted) = sound(&storage, control)?;
    refuse_data_file(&*storage, &header)?;
    let all = read_table(&*storage, &header)?;
    let snapshot = all.get(find(&*storage, &all, wanted)?).cloned();
    let Some(snapshot) = snapshot else { return Ok(()) };
    mark_bitmaps(&*storage, &mut header)?;
    let (offset, size) = (header.l1_offset, header.l1_size);
    let mut next = Generation::new(storage, header, counted)?;
    let given_up = next.read_l1(offset, size)?;
    next.refer(&given_up, false)?;
    let mut l1 = next.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
    next.refer(&l1, true)?;
    next.header.size = snapshot.disk_size;
    let needed = next.header.l1_needed().max(l1.len() as u64);
    // The size is the image's word: a table for it is made only where there may be one.
    if needed * 8 > L1_MAX {
        return Err(Error::damaged(
            next.path(),
            format!(
                "snapshot {wanted:?} has a disk of {} bytes, more than clusters of {} bytes allow",
                snapshot.disk_size,
                next.header.cluster_size()
            ),
        ));
    }
    l1.resize(needed as usize, 0);
    next.activate(l1, true, true)?;
    next.finish().map(|_| ())
}

/// Deletes the snapshot with the id or name `wanted`, and gives back the space that only it used.
pub fn delete(storage: Arc<dyn Storage>, wanted: &str, control: &Control) -> Result<()> {
    let (header, counted) = sound(&storage, control)?;
    let mut all = read_table(&*storage, &header)?;
    let gone = all.remove(find(&*storage, &all, wanted)?);
    let (offset, size) = (header.l1_offset, header.l1_size);
    let mut next = Generation::new(storage, header, counted)?;
    let l1 = next.read_l1(gone.l1_offset, gone.l1_size)?;
    next.refer(&l1, false)?;
    next.drop_bytes(gone.l1_offset, u64::from(gone.l1_size) * 8);
    let l1 = next.read_l1(offset, size)?;
    next.activate(l1, false, true)?;
    put_table(&mut next, &all)?;
    next.finish().map(|_| ())
}

/// Writes the table anew, with the size of the disk in every entry.
pub(crate) fn complete(next: &mut Generation) -> Result<()> {
    let all = read_table(next.storage(), &next.header)?;
    put_table(next, &all)
}

/// Writes the table of snapshots in place of the present one.
pub(crate) fn put_table(next: &mut Generation, all: &[Snapshot]) -> Result<()> {
    let path = next.path().to_owned();
    let old = read_table(next.storage(), &next.header)?.iter().map(Snapshot::entry_len).sum();
    next.drop_bytes(next.header.snapshots_offset, old);
    next.header.snapshot_count = all.len() as u32;
    next.header.snapshots_offset = 0;
    if all.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::new();
    for s in all {
        let mut extra = s.extra.clone();
        if extra.len() < EXTRA_MIN {
            extra = [s.vm_state_size, s.disk_size].into_iter().flat_map(u64::to_be_bytes).collect();
        }
        bytes.extend(s.l1_offset.to_be_bytes());
        bytes.extend(s.l1_size.to_be_bytes());
        bytes.extend((s.raw_id.len() as u16).to_be_bytes());
        bytes.extend((s.raw_name.len() as u16).to_be_bytes());
        bytes.extend(s.date.0.to_be_bytes());
        bytes.extend(s.date.1.to_be_bytes());
        bytes.extend(s.vm_clock.to_be_bytes());
        bytes.extend(s.vm_state_low.to_be_bytes());
        bytes.extend((extra.len() as u32).to_be_bytes());
        bytes.extend(&extra);
        bytes.extend(&s.raw_id);
        bytes.extend(&s.raw_name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    if all.len() > 65_536 || bytes.len() as u64 > TABLE_MAX {
        return Err(Error::unsupported(
            &path,
            "it holds as many snapshots as qcow2 allows: delete one first",
        ));
    }
    let clusters = (bytes.len() as u64).div_ceil(next.header.cluster_size());
    let offset = next.place(clusters)?;
    next.write(offset, &bytes, "the snapshot table")?;
    next.header.snapshots_offset = offset;
    Ok(())
}
