//! `<disk>.raw`: a chain of stored images as one flat disk.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use knib_fuse::{BlockKey, BlockSource, FsError, FsResult, Span, SpanKind, with_buffer};
use knib_qcow::{CompressionType, decoded_len, decompress_verified};

use super::around::is_anyone_waiting;
use super::flat::{Cluster, FlatCache, FlatRegion, REGION_BITS};
use super::image::{StoredImage, number};
use crate::store::Lease;
use crate::store::sums::PIECE;

/// A chain, opened; the top first.
#[derive(Debug)]
pub struct VerifiedDisk {
    layers: Vec<Arc<StoredImage>>,
    number: u64,
    cluster_bits: u32,
    size: u64,
    flat: Arc<FlatCache>,
    /// Where the disk was last waited for: the layer in the upper 16 bits, the byte in its file and one in the others.
    waited: AtomicU64,
    /// Kept for as long as someone reads.
    lease: Option<Arc<Lease>>,
}

/// Of [`VerifiedDisk::waited`].
const LAYER_SHIFT: u32 = 48;

/// A place on the disk: region, cluster in it.
struct At {
    region: u64,
    index: usize,
}

impl VerifiedDisk {
    /// A disk over images that follow each other; the first must be there.
    pub(super) fn new(
        layers: Vec<Arc<StoredImage>>,
        flat: Arc<FlatCache>,
        lease: Option<Arc<Lease>>,
    ) -> FsResult<Self> {
        let Some(top) = layers.first() else {
            return Err(FsError::damage("a chain without images"));
        };
        let (cluster_bits, size) = (top.cluster_bits, top.virtual_size);
        if let Some(odd) = layers.iter().find(|l| l.cluster_bits != cluster_bits) {
            return Err(odd.damaged("its clusters are of another size than those above it"));
        }
        let numbers: Vec<u8> = layers.iter().flat_map(|l| l.number.to_le_bytes()).collect();
        Ok(Self {
            number: number(&[b"chain", &numbers]),
            layers,
            cluster_bits,
            size,
            flat,
            waited: AtomicU64::new(0),
            lease,
        })
    }

    fn at(&self, offset: u64) -> At {
        let region_bits = REGION_BITS.max(self.cluster_bits);
        let region = offset >> region_bits;
        At { region, index: ((offset - (region << region_bits)) >> self.cluster_bits) as usize }
    }

    fn region(&self, region: u64) -> FsResult<Arc<FlatRegion>> {
        self.flat.get(self.number, region, || {
            FlatRegion::build(&self.layers, region, self.cluster_bits).map_err(|e| {
                match self.layers.first() {
                    Some(top) => top.of_store(&e),
                    None => FsError::damage(e.to_string()),
                }
            })
        })
    }

    fn layer(&self, layer: u16) -> FsResult<&Arc<StoredImage>> {
        self.layers.get(usize::from(layer)).ok_or_else(|| FsError::damage("a map that names no layer"))
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn not_as_written(&self, image: &StoredImage, host: u64, guest: u64) -> FsError {
        image.damaged(&format!(
            "the cluster at byte {host} (byte {guest} of the disk) is not as it was written"
        ))
    }

    /// Reads whole pieces of a run of plain clusters: `from` and the length are multiples of a piece or end a cluster.
    fn read_pieces(&self, from: u64, buf: &mut [u8]) -> FsResult<()> {
        let at = self.at(from);
        let region = self.region(at.region)?;
        let Cluster::Data { layer, offset } = region.cluster(at.index) else {
            return Err(FsError::damage("a map that changed while it was read"));
        };
        let image = self.layer(layer)?;
        let within = from & (self.cluster_size() - 1);
        image.read(offset.saturating_add(within), buf)?;
        let mut index = at.index;
        let mut piece = (within / PIECE) as usize;
        let mut rest: &[u8] = buf;
        let mut room = (self.cluster_size() - within) as usize;
        while !rest.is_empty() {
            let (part, later) = rest.split_at(room.min(rest.len()));
            if !region.matches(index, piece, part) {
                let guest = from + (buf.len() - rest.len()) as u64;
                return Err(self.not_as_written(image, offset + (guest - from) + within, guest));
            }
            (index, piece, rest, room) = (index + 1, 0, later, self.cluster_size() as usize);
        }
        Ok(())
    }

    /// Appends the stored bytes of the cluster of `size` bytes at `start` to `out`, checked, where it is compressed with
    /// `kind`; says whether it is.
    ///
    /// # Errors
    /// They cannot be read, or are not as they were written.
    pub fn take_stored(
        &self,
        start: u64,
        size: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> FsResult<bool> {
        let at = self.at(start);
        if size != self.cluster_size() || !start.is_multiple_of(size) {
            return Ok(false);
        }
        let region = self.region(at.region)?;
        let Cluster::Compressed { layer, offset, len } = region.cluster(at.index) else { return Ok(false) };
        let image = self.layer(layer)?;
        if image.codec != kind {
            return Ok(false);
        }
        let from = out.len();
        out.resize(from + len as usize, 0);
        let stored = out.get_mut(from..).unwrap_or_default();
        image.read(offset, stored)?;
        if !region.matches(at.index, 0, stored) {
            return Err(self.not_as_written(image, offset, start));
        }
        Ok(true)
    }

    fn skip_regions(&self, offset: u64) -> FsResult<Option<u64>> {
        let cluster = offset >> self.cluster_bits;
        let mut next: Option<u64> = None;
        for layer in &self.layers {
            let found = layer.sums.next_stored(cluster).map_err(|e| layer.of_store(&e))?;
            next = [next, found].into_iter().flatten().min();
        }
        Ok(next.and_then(|c| c.checked_mul(self.cluster_size())).map(|at| at.max(offset)))
    }
}

impl BlockSource for VerifiedDisk {
    fn len(&self) -> u64 {
        self.size
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lease.as_deref().map(AsFd::as_fd)
    }

    fn span(&self, offset: u64) -> FsResult<Span> {
        let at = self.at(offset);
        let region = self.region(at.region)?;
        let start = offset & !(self.cluster_size() - 1);
        let run = region.run(at.index, self.cluster_size()).max(1) as u64;
        let len = run.saturating_mul(self.cluster_size());
        let kind = match region.cluster(at.index) {
            Cluster::Zero => SpanKind::Zero,
            Cluster::Data { .. } => SpanKind::Direct,
            Cluster::Compressed { layer, .. } => SpanKind::Block(BlockKey {
                image: self.layer(layer)?.number,
                block: start >> self.cluster_bits,
            }),
        };
        Ok(Span { start, len, kind })
    }

    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let piece = PIECE.min(self.cluster_size());
        let end = offset.saturating_add(buf.len() as u64);
        let (from, to) = (offset & !(piece - 1), end.next_multiple_of(piece));
        if (from, to) == (offset, end) {
            return self.read_pieces(offset, buf);
        }
        with_buffer((to - from) as usize, |wide| {
            self.read_pieces(from, wide)?;
            let skip = (offset - from) as usize;
            buf.copy_from_slice(wide.get(skip..skip + buf.len()).unwrap_or_default());
            Ok(())
        })
    }

    fn read_block(&self, start: u64, key: BlockKey, out: &mut [u8]) -> FsResult<()> {
        self.read_part(start, key, out.len(), 0, out)
    }

    fn read_part(&self, start: u64, _: BlockKey, _: usize, from: usize, buf: &mut [u8]) -> FsResult<()> {
        let at = self.at(start);
        let region = self.region(at.region)?;
        let Cluster::Compressed { layer, offset, len } = region.cluster(at.index) else {
            return Err(FsError::damage("a map that changed while it was read"));
        };
        let image = self.layer(layer)?;
        let decode = |stored: &[u8], out: &mut [u8]| {
            decompress_verified(image.codec, self.cluster_size() as usize, stored, out).map_err(|what| {
                image.damaged(&format!("the compressed cluster at byte {offset} cannot be decoded: {what}"))
            })
        };
        with_buffer(len as usize, |stored| {
            // Only for compressed clusters: the disk rests while they are decoded. Where plain ones are read it has no
            // time to spare, and reading around slows the reader down.
            if image.read(offset, stored)? && offset < (1 << LAYER_SHIFT) - 1 {
                self.waited.store(u64::from(layer) << LAYER_SHIFT | (offset + 1), Ordering::Relaxed);
            }
            if !region.matches(at.index, 0, stored) {
                return Err(self.not_as_written(image, offset, start));
            }
            let end = from.saturating_add(buf.len());
            let len = decoded_len(image.codec, self.cluster_size() as usize, end);
            if (from, end) == (0, len) {
                return decode(stored, buf);
            }
            with_buffer(len, |out| {
                decode(stored, out)?;
                buf.copy_from_slice(out.get(from..end).unwrap_or_default());
                Ok(())
            })
        })
    }

    fn waits(&self) -> bool {
        is_anyone_waiting()
    }

    fn will_need(&self, offset: u64, len: u64) {
        let at = self.at(offset);
        // Advice only: what is damaged is the reader's to meet.
        if let Ok(region) = self.region(at.region)
            && let Cluster::Data { layer, offset: host } = region.cluster(at.index)
            && let Ok(image) = self.layer(layer)
        {
            image.will_need(host.saturating_add(offset & (self.cluster_size() - 1)), len);
        }
    }

    fn replied(&self) {
        let waited = self.waited.swap(0, Ordering::Relaxed);
        let offset = waited & ((1 << LAYER_SHIFT) - 1);
        if let (Some(offset), Ok(image)) = (offset.checked_sub(1), self.layer((waited >> LAYER_SHIFT) as u16))
        {
            image.bring_in(offset);
        }
    }

    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        let mut at = offset;
        // Jumps over what no layer stores; what is stored may still be zeros.
        while let Some(found) = self.skip_regions(at)?.filter(|found| *found < self.size) {
            let span = self.span(found)?;
            if span.kind != SpanKind::Zero {
                return Ok(Some(found));
            }
            at = span.end();
        }
        Ok(None)
    }
}
