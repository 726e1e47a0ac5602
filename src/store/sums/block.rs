//! Records of clusters: one block of them for each region of the guest.

use super::format::{Fields, PIECE, RECORD_LEN, Strong, clusters_per_region, fast, pieces, strong};

const DATA: u8 = 1;
const COMPRESSED: u8 = 2;
const ZERO: u8 = 3;

/// Where a stored cluster lies in the qcow2 file. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// As it is; `len` is a cluster.
    Data {
        /// Host offset.
        offset: u64,
        /// Stored length.
        len: u64,
    },
    /// Compressed.
    Compressed {
        /// Host offset of the first byte.
        offset: u64,
        /// Stored length, exactly.
        len: u64,
    },
    /// Reads as zeros; nothing is stored.
    Zero,
}

impl Place {
    /// Host offset and length of the stored bytes; none for zeros.
    pub fn stored(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Data { offset, len } | Self::Compressed { offset, len } => Some((offset, len)),
            Self::Zero => None,
        }
    }
}

/// The record of one stored cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Guest cluster index.
    pub cluster: u64,
    /// Where it lies.
    pub place: Place,
    /// Hash of the guest's bytes.
    pub strong: Strong,
    pub(super) fasts: &'a [u32],
}

impl Record<'_> {
    /// Fast checksums of its stored bytes, one for each [`PIECE`].
    pub fn fasts(&self) -> &[u32] {
        self.fasts
    }

    /// Whether stored bytes that begin `offset` bytes into the cluster are as they were written.
    ///
    /// `offset` is a multiple of [`PIECE`] and `bytes` ends at a piece's end or the cluster's; anything else is false.
    pub fn matches_stored(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some((_, len)) = self.place.stored() else { return false };
        let whole = offset
            .checked_add(bytes.len() as u64)
            .is_some_and(|end| end == len || (end < len && end % PIECE == 0));
        if !whole || !offset.is_multiple_of(PIECE) {
            return false;
        }
        let first = usize::try_from(offset / PIECE).unwrap_or(usize::MAX);
        let Some(wanted) = self.fasts.get(first..) else { return false };
        bytes.chunks(PIECE as usize).zip(wanted).all(|(piece, wanted)| fast(piece) == *wanted)
    }

    /// Whether the guest's bytes are as they were; shorter at the end of the disk.
    pub fn matches_guest(&self, guest: &[u8], cluster_size: u64) -> bool {
        strong(guest, cluster_size) == self.strong
    }
}

/// All records of one region, decoded.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Region {
    rows: Vec<Row>,
    fasts: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    cluster: u64,
    place: Place,
    strong: Strong,
    fasts: (u32, u32),
}

impl Region {
    /// The record of a cluster, if it is stored.
    pub fn get(&self, cluster: u64) -> Option<Record<'_>> {
        let at = self.rows.binary_search_by_key(&cluster, |r| r.cluster).ok()?;
        self.rows.get(at).map(|row| self.record(row))
    }

    /// All records, in guest order.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        self.rows.iter().map(|row| self.record(row))
    }

    /// The stored records that touch the host range, in guest order.
    pub(super) fn in_host(&self, start: u64, end: u64) -> impl Iterator<Item = Record<'_>> {
        self.records().filter(move |r| r.place.stored().is_some_and(|(at, len)| at < end && at + len > start))
    }

    fn record(&self, row: &Row) -> Record<'_> {
        let (from, to) = (row.fasts.0 as usize, row.fasts.1 as usize);
        Record {
            cluster: row.cluster,
            place: row.place,
            strong: row.strong,
            fasts: self.fasts.get(from..to).unwrap_or_default(),
        }
    }

    /// Bytes of memory, about.
    pub(super) fn weight(&self) -> usize {
        self.rows.len() * size_of::<Row>() + self.fasts.len() * 4 + 128
    }

    /// Host range of its stored clusters; none where all are zeros.
    pub(super) fn host_range(&self) -> Option<(u64, u64)> {
        let stored = || self.rows.iter().filter_map(|r| r.place.stored());
        let start = stored().map(|(start, _)| start).min()?;
        let end = stored().map(|(start, len)| start.saturating_add(len)).max()?;
        Some((start, end))
    }

    pub(super) fn decode(
        region: u64,
        cluster_bits: u32,
        image_len: u64,
        bytes: &[u8],
    ) -> Result<Self, String> {
        let span = clusters_per_region(cluster_bits);
        let first = region.checked_mul(span).ok_or("a region past the end")?;
        let mut fields = Fields(bytes);
        let mut decoded = Self::default();
        let (mut host, mut ascending) = (0, true);
        while !fields.0.is_empty() {
            let row = decoded.decode_row(&mut fields, first, span, cluster_bits)?;
            if decoded.rows.last().is_some_and(|last| last.cluster >= row.cluster) {
                return Err("records out of order".into());
            }
            if let Some((offset, len)) = row.place.stored() {
                let end = offset
                    .checked_add(len)
                    .filter(|end| *end <= image_len)
                    .ok_or("a record past the image's end")?;
                ascending &= offset >= host;
                host = end;
            }
            decoded.rows.push(row);
        }
        if !ascending {
            let mut stored: Vec<(u64, u64)> = decoded.rows.iter().filter_map(|r| r.place.stored()).collect();
            stored.sort_unstable();
            if stored.windows(2).any(|w| matches!(w, [(start, len), (next, _)] if start + len > *next)) {
                return Err("records that overlap".into());
            }
        }
        Ok(decoded)
    }

    fn decode_row(
        &mut self,
        fields: &mut Fields<'_>,
        first: u64,
        span: u64,
        cluster_bits: u32,
    ) -> Result<Row, String> {
        let cut = || "a cut record".to_owned();
        let index = u64::from(fields.u16().ok_or_else(cut)?);
        let [kind, _] = fields.array().ok_or_else(cut)?;
        let len = u64::from(fields.u32().ok_or_else(cut)?);
        let offset = fields.u64().ok_or_else(cut)?;
        let strong = fields.array().ok_or_else(cut)?;
        let cluster_size = 1u64 << cluster_bits;
        let place = match kind {
            DATA if len == cluster_size => Place::Data { offset, len },
            COMPRESSED if len > 0 && len <= cluster_size => Place::Compressed { offset, len },
            ZERO if len == 0 && offset == 0 => Place::Zero,
            _ => return Err("a record of an unknown kind or an impossible length".into()),
        };
        if index >= span {
            return Err("a record outside its region".into());
        }
        let from = self.fasts.len();
        for _ in 0..pieces(len) {
            self.fasts.push(fields.u32().ok_or_else(cut)?);
        }
        let fasts = (from as u32, self.fasts.len() as u32);
        Ok(Row { cluster: first + index, place, strong, fasts })
    }
}

/// Appends one record to a block.
pub(super) fn encode(out: &mut Vec<u8>, index: u16, place: Place, strong: &Strong, fasts: &[u32]) {
    let (kind, offset, len) = match place {
        Place::Data { offset, len } => (DATA, offset, len),
        Place::Compressed { offset, len } => (COMPRESSED, offset, len),
        Place::Zero => (ZERO, 0, 0),
    };
    out.reserve(RECORD_LEN + fasts.len() * 4);
    out.extend_from_slice(&index.to_le_bytes());
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(&(len as u32).to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(strong);
    for fast in fasts {
        out.extend_from_slice(&fast.to_le_bytes());
    }
}
