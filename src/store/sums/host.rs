//! Verifying the image as it lies there: any host range is covered by pieces.

use super::Sums;
use super::format::{Fields, PIECE, fast, pieces};
use crate::store::StoreResult;

/// Host ranges of the image's metadata with their checksums, sorted.
#[derive(Debug)]
pub(super) struct Metadata(Vec<Extent>);

#[derive(Debug)]
struct Extent {
    offset: u64,
    len: u64,
    fasts: Vec<u32>,
}

/// A part of the image that is verified at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPiece {
    /// Host offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it must be.
    pub kind: PieceKind,
}

/// What a piece must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    /// Bytes of a cluster, with their fast checksum.
    Cluster(u32),
    /// Bytes of the metadata, with their fast checksum.
    Metadata(u32),
    /// Nothing was written here: zeros.
    Padding,
}

impl HostPiece {
    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether `bytes`, the whole piece, is as it was written.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.len
            && match self.kind {
                PieceKind::Cluster(sum) | PieceKind::Metadata(sum) => fast(bytes) == sum,
                PieceKind::Padding => bytes.iter().all(|b| *b == 0),
            }
    }
}

impl Metadata {
    pub fn decode(bytes: &[u8], image_len: u64) -> Result<Self, String> {
        let mut fields = Fields(bytes);
        let mut extents: Vec<Extent> = Vec::new();
        let mut covered = 0;
        while !fields.0.is_empty() {
            let cut = || "its list of metadata is cut".to_owned();
            let offset = fields.u64().ok_or_else(cut)?;
            let len = fields.u64().ok_or_else(cut)?;
            let end = offset.checked_add(len).filter(|end| *end <= image_len && len > 0);
            if offset < covered || end.is_none() {
                return Err("its list of metadata names impossible places".into());
            }
            covered = end.unwrap_or_default();
            let count = usize::try_from(pieces(len)).map_err(|_| cut())?;
            let sums = fields.bytes(count.checked_mul(4).ok_or_else(cut)?).ok_or_else(cut)?;
            let fasts = sums.chunks_exact(4).map(|c| c.try_into().map_or(0, u32::from_le_bytes)).collect();
            extents.push(Extent { offset, len, fasts });
        }
        Ok(Self(extents))
    }

    fn pieces_in(&self, start: u64, end: u64, out: &mut Vec<HostPiece>) {
        let from = self.0.partition_point(|e| e.offset + e.len <= start);
        for extent in self.0.get(from..).unwrap_or_default() {
            if extent.offset >= end {
                break;
            }
            push_pieces(extent.offset, extent.len, &extent.fasts, PieceKind::Metadata, (start, end), out);
        }
    }
}

fn push_pieces(
    offset: u64,
    len: u64,
    fasts: &[u32],
    kind: fn(u32) -> PieceKind,
    (start, end): (u64, u64),
    out: &mut Vec<HostPiece>,
) {
    let first = start.saturating_sub(offset) / PIECE;
    for (at, sum) in (first..).zip(fasts.iter().skip(first as usize)) {
        let from = at * PIECE;
        if offset + from >= end {
            break;
        }
        out.push(HostPiece { offset: offset + from, len: PIECE.min(len - from), kind: kind(*sum) });
    }
}

impl Sums {
    /// The pieces that cover a host range of the image, in order and without gaps; the first and the last may reach
    /// beyond it. Empty past the image's end.
    pub fn host_pieces(&self, offset: u64, len: u64) -> StoreResult<Vec<HostPiece>> {
        let end = offset.saturating_add(len).min(self.header.image_len);
        if offset >= end {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        self.metadata()?.pieces_in(offset, end, &mut found);
        let from = self.directory.partition_point(|e| e.host_end <= offset);
        for at in from..self.directory.partition_point(|e| e.host_start < end) {
            for record in self.load(at)?.in_host(offset, end) {
                if let Some((start, len)) = record.place.stored() {
                    push_pieces(start, len, record.fasts, PieceKind::Cluster, (offset, end), &mut found);
                }
            }
        }
        found.sort_by_key(|p| p.offset);
        self.fill_gaps(found, offset, end)
    }

    fn fill_gaps(&self, found: Vec<HostPiece>, offset: u64, end: u64) -> StoreResult<Vec<HostPiece>> {
        let mut whole = Vec::with_capacity(found.len() + 2);
        let mut at = found.first().map_or(offset, |p| p.offset.min(offset));
        for piece in found {
            if piece.offset < at {
                return Err(self.damage("a cluster and metadata overlap in it"));
            }
            if piece.offset > at {
                whole.push(HostPiece { offset: at, len: piece.offset - at, kind: PieceKind::Padding });
            }
            at = piece.end();
            whole.push(piece);
        }
        if at < end {
            whole.push(HostPiece { offset: at, len: end - at, kind: PieceKind::Padding });
        }
        Ok(whole)
    }
}
