//! One qcow2 file, read only: what it holds for a range of the guest's disk.

use std::sync::Arc;

use crate::entry::{L2, OFFSET_MASK};
use crate::storage::read_exact;
use crate::{Error, Gate, Header, Implicit, Result, Storage};

/// What one image says of a range of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Absent,
    Zero,
    Data(u64),
    /// Offset and greatest length of the stored bytes; the piece is one whole cluster.
    Compressed(u64, u64),
}

/// An open qcow2 image.
pub struct Image {
    storage: Arc<dyn Storage>,
    data: Arc<dyn Storage>,
    header: Header,
    l1: Vec<u64>,
    file_len: u64,
    data_len: u64,
}

impl Image {
    /// Opens an image, and through `gate` the external data file that it may name.
    pub fn open(storage: Arc<dyn Storage>, gate: &dyn Gate) -> Result<Image> {
        let header = Header::parse(&*storage)?;
        let io = |e| Error::io(storage.path(), "asking for the length", e);
        let file_len = storage.len().map_err(io)?;
        let mut bytes = vec![0u8; (header.l1_needed() * 8) as usize];
        read_exact(&*storage, &mut bytes, header.l1_offset, "the L1 table")?;
        let l1 = bytes.as_chunks::<8>().0.iter().map(|c| u64::from_be_bytes(*c)).collect();
        let data = match (&header.data_file, header.external_data()) {
            (Some(name), true) => gate.open(storage.path(), Implicit::DataFile, name, None)?.0,
            (None, true) => {
                return Err(Error::unsupported(
                    storage.path(),
                    "its external data file is not named in the header",
                ));
            }
            _ => storage.clone(),
        };
        let data_len = data.len().map_err(io)?;
        Ok(Image { storage, data, header, l1, file_len, data_len })
    }

    /// Opens an image for [`crate::check`] alone: no other file is opened, guest data cannot be read, and a refcount
    /// table that the header puts where none can be is no reason to refuse.
    pub fn open_tables(storage: Arc<dyn Storage>) -> Result<Image> {
        let header = Header::parse_for_repair(&*storage)?;
        let file_len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        let l1 = Vec::new();
        Ok(Image { data: storage.clone(), storage, header, l1, file_len, data_len: file_len })
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// The file with the tables.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
    /// The file with the guest's data: the same one, or the external data file.
    pub fn data_storage(&self) -> &Arc<dyn Storage> {
        &self.data
    }
    /// The L1 entries that the disk's size needs.
    pub fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// Calls `each(start, len, piece)` for all of `start..end` (bytes of the guest's disk, inside it), in order.
    pub(crate) fn pieces(&self, start: u64, end: u64, each: &mut dyn FnMut(u64, u64, Piece)) -> Result<()> {
        let h = &self.header;
        let (cluster, entries) = (h.cluster_size(), h.l2_entries());
        let mut at = start;
        while at < end {
            let index = at >> h.cluster_bits;
            let table_end = (index / entries + 1).saturating_mul(entries).saturating_mul(cluster);
            let stop = end.min(table_end);
            let l1 = self.l1.get((index / entries) as usize).copied().unwrap_or(0);
            let l2_offset = l1 & OFFSET_MASK;
            if l2_offset == 0 {
                each(at, stop - at, Piece::Absent);
                at = stop;
                continue;
            }
            if !l2_offset.is_multiple_of(cluster)
                || l2_offset.checked_add(cluster).is_none_or(|e| e > self.file_len)
            {
                return Err(self.damaged(format!(
                    "L1 entry {} points to {l2_offset:#x}, outside the file",
                    index / entries
                )));
            }
            let count = stop.div_ceil(cluster) - index;
            let mut bytes = vec![0u8; (count * h.l2_entry_size()) as usize];
            let from = l2_offset + (index % entries) * h.l2_entry_size();
            read_exact(&*self.storage, &mut bytes, from, "an L2 table")?;
            for entry in bytes.chunks_exact(h.l2_entry_size() as usize) {
                let next = ((at >> h.cluster_bits) + 1) << h.cluster_bits;
                self.cluster(at, next.min(end), entry, each)?;
                at = next;
            }
            at = at.min(stop);
        }
        Ok(())
    }

    /// The first word of the L2 entry of the guest byte `at`; data that lies past the end of the file is damage.
    pub(crate) fn decode(&self, word: u64, at: u64) -> Result<L2> {
        let (h, index) = (&self.header, at >> self.header.cluster_bits);
        let decoded = L2::decode(word, h)
            .map_err(|why| self.damaged(format!("the L2 entry of guest cluster {index}: {why}")))?;
        if let L2::Data(offset) = decoded
            && offset >= self.data_len
            && !h.external_data()
        {
            let what = format!("guest cluster {index} lies at {offset:#x}, past the end of the file");
            return Err(self.damaged(what));
        }
        Ok(decoded)
    }

    fn cluster(&self, at: u64, stop: u64, entry: &[u8], each: &mut dyn FnMut(u64, u64, Piece)) -> Result<()> {
        let h = &self.header;
        let within = at & (h.cluster_size() - 1);
        let word = |i: usize| entry.as_chunks::<8>().0.get(i).map_or(0, |c| u64::from_be_bytes(*c));
        let decoded = self.decode(word(0), at)?;
        if let L2::Compressed { offset, max_len } = decoded {
            if offset >= self.file_len || (h.extended_l2() && word(1) != 0) {
                return Err(self.damaged(format!("the compressed cluster of guest cluster {} lies at {offset:#x}, past the end, or has subclusters", at >> h.cluster_bits)));
            }
            each(at, stop - at, Piece::Compressed(offset, max_len));
            return Ok(());
        }
        if !h.extended_l2() {
            let piece = match decoded {
                L2::Data(offset) => Piece::Data(offset + within),
                L2::Zero { .. } => Piece::Zero,
                _ => Piece::Absent,
            };
            each(at, stop - at, piece);
            return Ok(());
        }
        let (allocated, zero) = (word(1) as u32, (word(1) >> 32) as u32);
        if allocated & zero != 0 {
            return Err(self.damaged(format!(
                "guest cluster {} has subclusters that are allocated and zero",
                at >> h.cluster_bits
            )));
        }
        let sub = h.cluster_size() / 32;
        let mut at = at;
        while at < stop {
            let inside = at & (h.cluster_size() - 1);
            let bit = 1u32 << (inside / sub);
            let next = (at / sub + 1) * sub;
            let piece = match decoded {
                _ if zero & bit != 0 => Piece::Zero,
                L2::Data(offset) if allocated & bit != 0 => Piece::Data(offset + inside),
                _ if allocated & bit != 0 => {
                    return Err(self.damaged(format!(
                        "guest cluster {} has an allocated subcluster without a cluster",
                        at >> h.cluster_bits
                    )));
                }
                _ => Piece::Absent,
            };
            each(at, next.min(stop) - at, piece);
            at = next;
        }
        Ok(())
    }

    fn damaged(&self, what: String) -> Error {
        Error::damaged(self.storage.path(), what)
    }
}
