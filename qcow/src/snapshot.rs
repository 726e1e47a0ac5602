//! Internal snapshots. Source: the qcow2 specification, "Snapshots".

use crate::storage::read_exact;
use crate::{Error, Header, Result, Storage};

/// QEMU opens no image with more extra data than this in a snapshot, in bytes.
const EXTRA_MAX: usize = 1024;
/// Length of the part of an entry that is always there, in bytes.
const FIXED: u64 = 40;
/// Longest table of snapshots in bytes.
const TABLE_MAX: u64 = 64 << 20;

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
    if u64::from(l1_size) * 8 > 32 << 20 {
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
