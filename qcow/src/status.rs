//! What each image of a chain says of a range, in the words of QEMU's block status: allocated or not, zeros or data,
//! compressed, and where on the host. This is what `img map` prints; to read bytes, use [`crate::Chain`].

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::chain::MAX_DEPTH;
use crate::entry::{L2, OFFSET_MASK};
use crate::refcount::Refcounts;
use crate::storage::read_exact;
use crate::{Error, Format, Gate, Image, Implicit, Result, Storage};

/// What one image, or a chain, says of a run of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Length of the run in bytes.
    pub len: u64,
    /// How many backing files lie between the top and the image that says so.
    pub depth: usize,
    /// Whether an image says so itself (a hole that shows nothing at all is not present).
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// Bytes are stored for it.
    pub data: bool,
    /// They are compressed.
    pub compressed: bool,
    /// Host offset in bytes, where there is one.
    pub offset: Option<u64>,
}

enum Kind {
    Raw,
    Qcow2(Box<Image>),
}

/// An L2 table in memory: its offset and bytes.
type Table = (u64, Arc<Vec<u8>>);

struct Layer {
    storage: Arc<dyn Storage>,
    size: u64,
    kind: Kind,
    /// The L2 table that was read last.
    table: Mutex<Option<Table>>,
    /// Whether many of its data clusters are holes of the file.
    preallocated: OnceLock<bool>,
}

/// The images of a chain, newest first.
pub struct Layers {
    layers: Vec<Layer>,
}

impl Layers {
    /// Takes an image that is open, and all that it stands on through `gate`.
    pub fn from_storage(top: Arc<dyn Storage>, format: Format, gate: &dyn Gate) -> Result<Self> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some((top, format));
        while let Some((storage, format)) = next.take() {
            if storage.identity().is_some_and(|id| !seen.insert(id)) {
                return Err(Error::damaged(storage.path(), "it is its own backing file (a loop)"));
            }
            if layers.len() == MAX_DEPTH {
                return Err(Error::unsupported(
                    storage.path(),
                    format!("the chain is deeper than {MAX_DEPTH} images"),
                ));
            }
            let (size, kind) = match format {
                Format::Raw => {
                    let io = |e| Error::io(storage.path(), "asking for the length", e);
                    // As QEMU does, in whole sectors.
                    (storage.len().map_err(io)?.next_multiple_of(512), Kind::Raw)
                }
                Format::Qcow2 => {
                    let image = Image::open(storage.clone(), gate)?;
                    let h = image.header();
                    if let Some(name) = &h.backing {
                        let format = h.backing_format.as_deref();
                        next = Some(gate.open(storage.path(), Implicit::Backing, name, format)?);
                    }
                    (h.size, Kind::Qcow2(Box::new(image)))
                }
            };
            layers.push(Layer {
                storage,
                size,
                kind,
                table: Mutex::default(),
                preallocated: OnceLock::new(),
            });
        }
        Ok(Self { layers })
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |l| l.size)
    }

    /// The file that holds the data of the image at this depth.
    pub fn data_path(&self, depth: usize) -> Option<&Path> {
        self.layers.get(depth).map(|l| match &l.kind {
            Kind::Raw => l.storage.path(),
            Kind::Qcow2(image) => image.data_storage().path(),
        })
    }

    /// What the chain says from `offset` on, up to `end` at most (both in bytes, inside the disk).
    pub fn status_at(&self, offset: u64, end: u64) -> Result<Status> {
        let mut end = end;
        let mut depth = 0;
        loop {
            let Some(layer) = self.layers.get(depth) else {
                return Err(Error::damaged(Path::new(""), "a chain without images"));
            };
            let mut status = layer.status(offset, end.min(layer.size))?;
            status.depth = depth;
            if status.zero || status.data {
                return Ok(status);
            }
            end = offset + status.len;
            match self.layers.get(depth + 1) {
                Some(below) if offset < below.size => depth += 1,
                // Nothing below shows: zeros, which nobody says.
                _ => return Ok(Status { zero: true, ..status }),
            }
        }
    }
}

impl Layer {
    fn status(&self, offset: u64, end: u64) -> Result<Status> {
        match &self.kind {
            Kind::Raw => hole_or_data(&*self.storage, offset, end),
            Kind::Qcow2(image) => {
                let mut status = self.qcow2(image, offset, end)?;
                if let (true, false, Some(host)) = (status.data, status.compressed, status.offset)
                    && self.is_preallocated(image)?
                {
                    let below = hole_or_data(&**image.data_storage(), host, host + status.len)?;
                    status.zero |= below.zero;
                    status.len = below.len;
                }
                Ok(status)
            }
        }
    }

    /// The run of entries of the same kind from `offset` on, within one L2 table.
    fn qcow2(&self, image: &Image, offset: u64, end: u64) -> Result<Status> {
        let h = image.header();
        let (cluster, entries) = (h.cluster_size(), h.l2_entries());
        let nothing = Status {
            len: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
        };
        let table_of = |at: u64| ((at >> h.cluster_bits) / entries) as usize;
        let number = table_of(offset);
        let span = entries * cluster;
        let stop = end.min((number as u64 + 1).saturating_mul(span));
        let l2 = image.l1().get(number).copied().unwrap_or(0) & OFFSET_MASK;
        if l2 == 0 {
            return Ok(Status { len: stop - offset, ..nothing });
        }
        let table = self.table(image, l2, number)?;
        let sub = if h.extended_l2() { cluster / 32 } else { cluster };
        let mut run: Option<Status> = None;
        let mut at = offset;
        while at < stop {
            let index = (at >> h.cluster_bits) % entries;
            let next = ((at / sub + 1) * sub).min(stop);
            let from = (index * h.l2_entry_size()) as usize;
            let entry = table.get(from..from + h.l2_entry_size() as usize).unwrap_or(&[]);
            let found = self.entry(image, entry, at)?;
            match &mut run {
                None => run = Some(Status { len: next - at, ..found }),
                Some(run) => {
                    let follows = match (run.offset, found.offset) {
                        (Some(a), Some(b)) => a.checked_add(run.len) == Some(b),
                        (None, None) => true,
                        _ => false,
                    };
                    let same = Status { len: run.len, offset: run.offset, ..found } == *run;
                    if !same || !follows {
                        break;
                    }
                    run.len += next - at;
                }
            }
            at = next;
        }
        Ok(run.unwrap_or(nothing))
    }

    fn entry(&self, image: &Image, entry: &[u8], at: u64) -> Result<Status> {
        let h = image.header();
        let word = |i: usize| entry.as_chunks::<8>().0.get(i).map_or(0, |c| u64::from_be_bytes(*c));
        let within = at & (h.cluster_size() - 1);
        let decoded = image.decode(word(0), at)?;
        let (host, mut zero, mut data, compressed) = match decoded {
            L2::Unallocated => (None, false, false, false),
            L2::Zero { allocated } => (allocated, true, false, false),
            L2::Data(host) => (Some(host), false, true, false),
            L2::Compressed { .. } => (None, false, true, true),
        };
        if h.extended_l2() && !compressed {
            let bit = 1u32 << (within / (h.cluster_size() / 32));
            let (allocated, zeros) = (word(1) as u32, (word(1) >> 32) as u32);
            let wrong = match host {
                _ if allocated & zeros != 0 => Some("that are allocated and zero"),
                None if allocated != 0 => Some("that are allocated without a cluster"),
                _ => None,
            };
            if let Some(wrong) = wrong {
                let index = at >> h.cluster_bits;
                let what = format!("guest cluster {index} has subclusters {wrong}");
                return Err(Error::damaged(self.storage.path(), what));
            }
            zero = zeros & bit != 0;
            data = allocated & bit != 0;
        }
        let present = zero || data;
        Ok(Status { len: 0, depth: 0, present, zero, data, compressed, offset: host.map(|h| h + within) })
    }

    fn table(&self, image: &Image, offset: u64, number: usize) -> Result<Arc<Vec<u8>>> {
        let mut kept = self.table.lock();
        if let Some((at, table)) = &*kept
            && *at == offset
        {
            return Ok(table.clone());
        }
        let cluster = image.header().cluster_size();
        if !offset.is_multiple_of(cluster) {
            let what = format!("L1 entry {number} points to {offset:#x}, which is not aligned");
            return Err(Error::damaged(self.storage.path(), what));
        }
        let mut bytes = vec![0u8; cluster as usize];
        read_exact(&*self.storage, &mut bytes, offset, "an L2 table")?;
        let table = Arc::new(bytes);
        *kept = Some((offset, table.clone()));
        Ok(table)
    }

    /// Whether markedly more clusters are in use than the file has on disk, so that holes of the file are looked for:
    /// by the rule of QEMU's qcow2 driver, a ninth more and at least two.
    fn is_preallocated(&self, image: &Image) -> Result<bool> {
        if let Some(known) = self.preallocated.get() {
            return Ok(*known);
        }
        let h = image.header();
        let io = |e| Error::io(self.storage.path(), "asking for the length", e);
        let clusters = self.storage.len().map_err(io)?.div_ceil(h.cluster_size());
        let on_disk = self.storage.allocated().map_err(io)? >> h.cluster_bits;
        let threshold = (on_disk * 10 / 9).max(on_disk + 2);
        let mut used = 0;
        if clusters >= threshold {
            let mut refcounts = Refcounts::open(self.storage.clone(), h)?;
            for cluster in 0..clusters {
                used += u64::from(refcounts.get(cluster)? > 0);
                if used >= threshold {
                    break;
                }
            }
        }
        Ok(*self.preallocated.get_or_init(|| used >= threshold))
    }
}

/// A run of data or a hole of a file; what lies past its end reads as zeros.
fn hole_or_data(storage: &dyn Storage, offset: u64, end: u64) -> Result<Status> {
    let io = |e| Error::io(storage.path(), "looking for holes", e);
    let file_end = storage.len().map_err(io)?;
    let mut status = Status {
        len: end.saturating_sub(offset),
        depth: 0,
        present: true,
        zero: true,
        data: false,
        compressed: false,
        offset: Some(offset),
    };
    let data = storage.next_data(offset).map_err(io)?.unwrap_or(end);
    if data > offset || offset >= file_end {
        status.len = data.max(offset).min(end) - offset;
    } else {
        let hole = storage.next_hole(offset).map_err(io)?;
        let hole = if hole > offset { hole } else { file_end };
        status.len = hole.min(end) - offset;
        (status.zero, status.data) = (false, true);
    }
    Ok(status)
}
