//! An image with all its backing files, as one disk. One flat map: after a region's tables are read once, finding a
//! byte costs the same at any depth.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;

use crate::codec;
use crate::image::Piece;
use crate::{Access, CompressionType, Error, FileStorage, Format, Gate, Image, Implicit, Result, Storage};

/// A chain has at most so many images.
pub const MAX_DEPTH: usize = 200;
/// Units (smallest clusters or subclusters) in a region of the map.
const REGION_UNITS: u64 = 1024;
/// The map of one chain keeps at most so many extents (about 48 bytes each).
const MAX_EXTENTS: usize = 256 * 1024;

enum Layer {
    Qcow2(Box<Image>),
    Raw { storage: Arc<dyn Storage>, len: u64 },
}

impl Layer {
    fn storage(&self) -> &Arc<dyn Storage> {
        match self {
            Layer::Qcow2(image) => image.storage(),
            Layer::Raw { storage, .. } => storage,
        }
    }
    fn data(&self) -> &Arc<dyn Storage> {
        match self {
            Layer::Qcow2(image) => image.data_storage(),
            Layer::Raw { storage, .. } => storage,
        }
    }
    fn size(&self) -> u64 {
        match self {
            Layer::Qcow2(image) => image.header().size,
            Layer::Raw { len, .. } => *len,
        }
    }
}

/// A run of the guest's disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub start: u64,
    /// Its length.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What an extent holds. Layers count from the top, 0 being the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// None of the layers asked says anything.
    Absent,
    /// Zeros, said by a layer (`None`: nothing in the whole chain).
    Zero {
        /// Which layer says so.
        layer: Option<usize>,
    },
    /// Plain bytes.
    Data {
        /// In which layer.
        layer: usize,
        /// At which offset of its data file, in bytes.
        offset: u64,
    },
    /// One compressed cluster.
    Compressed {
        /// In which layer.
        layer: usize,
        /// At which offset, in bytes.
        offset: u64,
        /// At most so many stored bytes.
        max_len: u64,
        /// Start of the cluster on the guest's disk: the extent may be a part of it.
        cluster_start: u64,
        /// Codec.
        compression: CompressionType,
    },
}

/// What a region of the disk holds.
struct Region {
    start: u64,
    unit_bits: u32,
    extents: Vec<Extent>,
    /// For each unit the number of the extent that its first byte lies in. A search among many extents would wait for
    /// memory at every step; here it is one step. Empty where there are few.
    slots: Vec<u32>,
}

/// So few extents (bytes: less than the first-level cache) are searched as fast without slots.
const FEW: usize = 16;

impl Region {
    fn new(start: u64, unit_bits: u32, extents: Vec<Extent>) -> Self {
        let mut slots = Vec::new();
        if let Some(last) = extents.last().filter(|_| extents.len() > FEW) {
            let units = (last.start + last.len - start).div_ceil(1 << unit_bits);
            let mut number = 0;
            for unit in 0..units {
                let at = start + (unit << unit_bits);
                while extents.get(number + 1).is_some_and(|next| next.start <= at) {
                    number += 1;
                }
                slots.push(number as u32);
            }
        }
        Self { start, unit_bits, extents, slots }
    }

    /// The extent that `offset` lies in, from there on.
    fn find(&self, offset: u64) -> Option<Extent> {
        let unit = (offset.checked_sub(self.start)? >> self.unit_bits) as usize;
        let slot = |unit: usize| self.slots.get(unit).map(|number| *number as usize);
        let first = slot(unit).unwrap_or(0);
        let last = slot(unit + 1).map_or(self.extents.len(), |number| number + 1);
        let among = self.extents.get(first..last)?;
        let mut found = *match among {
            [one] => one,
            _ => among.get(among.partition_point(|e| e.start <= offset).checked_sub(1)?)?,
        };
        let skip = offset.checked_sub(found.start)?;
        found.start = offset;
        found.len = found.len.checked_sub(skip).filter(|left| *left > 0)?;
        if let ExtentKind::Data { offset, .. } = &mut found.kind {
            *offset += skip;
        }
        Some(found)
    }

    /// How much of the map's room it takes, in extents.
    fn weight(&self) -> usize {
        self.extents.len() + self.slots.len() / 8
    }
}

#[derive(Default)]
struct Map {
    regions: HashMap<(usize, u64), Region>,
    extents: usize,
}

/// A chain of images, newest first.
pub struct Chain {
    layers: Vec<Layer>,
    region: u64,
    unit_bits: u32,
    map: RwLock<Map>,
}

impl Chain {
    /// Opens the image at `path` and all that it stands on.
    pub fn open(path: &Path, format: Format, gate: &dyn Gate) -> Result<Chain> {
        Self::from_storage(FileStorage::open(path, Access::Read)?, format, gate)
    }

    /// Opens an image that is already open, and all that it stands on.
    pub fn from_storage(top: Arc<dyn Storage>, format: Format, gate: &dyn Gate) -> Result<Chain> {
        let mut layers = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some((top, format));
        while let Some((storage, format)) = next.take() {
            if let Some(id) = storage.identity()
                && !seen.insert(id)
            {
                return Err(Error::damaged(
                    storage.path(),
                    "it is its own backing file (a loop): the chain cannot be read",
                ));
            }
            if layers.len() == MAX_DEPTH {
                return Err(Error::unsupported(
                    storage.path(),
                    format!("the chain is deeper than {MAX_DEPTH} images"),
                ));
            }
            match format {
                Format::Raw => {
                    let len =
                        storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
                    layers.push(Layer::Raw { storage, len });
                }
                Format::Qcow2 => {
                    let image = Image::open(storage, gate)?;
                    let h = image.header();
                    if let Some(name) = &h.backing {
                        next = Some(gate.open(
                            image.storage().path(),
                            Implicit::Backing,
                            name,
                            h.backing_format.as_deref(),
                        )?);
                    }
                    layers.push(Layer::Qcow2(Box::new(image)));
                }
            }
        }
        let unit = layers.iter().filter_map(|l| match l {
            Layer::Qcow2(i) if i.header().extended_l2() => Some(i.header().cluster_size() / 32),
            Layer::Qcow2(i) => Some(i.header().cluster_size()),
            Layer::Raw { .. } => None,
        });
        let unit = unit.min().unwrap_or(65536);
        // Never smaller than the largest cluster, so that a compressed cluster lies in one region.
        let region = (unit * REGION_UNITS).max(2 << 20);
        Ok(Chain { layers, region, unit_bits: unit.trailing_zeros(), map: RwLock::default() })
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::size)
    }
    /// How many images there are.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }
    /// The images' paths, newest first.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.layers.iter().map(|l| l.storage().path().to_owned()).collect()
    }

    /// What the whole chain holds at `offset` (bytes): from there to where the kind changes or the map's region ends.
    pub fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.find(self.layers.len(), offset)
    }

    /// The same of the newest `n` layers alone: what none of them says is [`ExtentKind::Absent`].
    pub fn top_extent_at(&self, n: usize, offset: u64) -> Result<Extent> {
        self.find(n.min(self.layers.len()), offset)
    }

    fn find(&self, n: usize, offset: u64) -> Result<Extent> {
        let size = self.size();
        let Some(top) = self.layers.first().filter(|_| offset < size) else {
            let path = self.layers.first().map_or(Path::new(""), |l| l.storage().path());
            return Err(Error::out_of_range(
                path,
                format!("offset {offset} lies past the disk's {size} bytes"),
            ));
        };
        let gap = || Error::damaged(top.storage().path(), "the map has a gap");
        let key = (n, offset / self.region);
        if let Some(region) = self.map.read().regions.get(&key) {
            return region.find(offset).ok_or_else(gap);
        }
        let start = key.1 * self.region;
        let extents = self.load(n, start, size.min(start.saturating_add(self.region)))?;
        let region = Region::new(start, self.unit_bits, extents);
        let found = region.find(offset).ok_or_else(gap)?;
        let mut map = self.map.write();
        if map.extents + region.weight() > MAX_EXTENTS {
            map.regions.clear();
            map.extents = 0;
        }
        map.extents += region.weight();
        if let Some(before) = map.regions.insert(key, region) {
            map.extents -= before.weight();
        }
        Ok(found)
    }

    fn load(&self, n: usize, start: u64, end: u64) -> Result<Vec<Extent>> {
        let mut found: Vec<Extent> = Vec::new();
        let mut gaps = vec![(start, end)];
        for (index, layer) in self.layers.iter().take(n).enumerate() {
            let mut left = Vec::new();
            for (from, to) in gaps {
                // A layer that is shorter than those above reads as zeros past its end, and hides what lies below.
                let inside = to.min(layer.size().max(from));
                if inside < to {
                    found.push(Extent {
                        start: inside,
                        len: to - inside,
                        kind: ExtentKind::Zero { layer: Some(index) },
                    });
                }
                layer.extents(index, from, inside, &mut found, &mut left)?;
            }
            gaps = left;
            if gaps.is_empty() {
                break;
            }
        }
        let rest = if n < self.layers.len() { ExtentKind::Absent } else { ExtentKind::Zero { layer: None } };
        found.extend(gaps.into_iter().map(|(from, to)| Extent { start: from, len: to - from, kind: rest }));
        found.sort_unstable_by_key(|e| e.start);
        found.dedup_by(|next, last| join(last, next));
        Ok(found)
    }

    /// Which file (device and inode) plain data lies in, and at which offset; `None` for all else.
    pub(crate) fn place(&self, extent: &Extent) -> Option<((u64, u64), u64)> {
        let ExtentKind::Data { layer, offset } = extent.kind else { return None };
        Some((self.layers.get(layer)?.data().identity()?, offset))
    }

    /// The file that plain data lies in, and at which offset; `None` for all else.
    pub(crate) fn file_of(&self, extent: &Extent) -> Option<(&dyn Storage, u64)> {
        let ExtentKind::Data { layer, offset } = extent.kind else { return None };
        Some((&**self.layers.get(layer)?.data(), offset))
    }

    /// Reads `buf.len()` bytes of the guest's disk at `offset`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let extent = self.extent_at(offset + done as u64)?;
            let n = extent.len.min((buf.len() - done) as u64) as usize;
            self.read_extent(&extent, &mut buf[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    fn read_extent(&self, extent: &Extent, out: &mut [u8]) -> Result<()> {
        match extent.kind {
            ExtentKind::Absent | ExtentKind::Zero { .. } => out.fill(0),
            ExtentKind::Data { layer, offset } => {
                let storage = self.layer(layer)?.data();
                let n = storage.read_at(out, offset).map_err(|e| {
                    Error::io(storage.path(), format!("reading {} bytes at {offset}", out.len()), e)
                })?;
                // The last cluster may be cut where the file ends: the rest reads as zeros.
                out[n..].fill(0);
            }
            ExtentKind::Compressed { layer, offset, max_len, cluster_start, compression } => {
                let Layer::Qcow2(image) = self.layer(layer)? else {
                    return Err(Error::damaged(Path::new(""), "a raw layer has no compressed clusters"));
                };
                let cluster = image.header().cluster_size() as usize;
                codec::with_buffers(|stored, whole| {
                    stored.resize(max_len as usize, 0);
                    let storage = image.storage();
                    let n = storage.read_at(stored, offset).map_err(|e| {
                        Error::io(storage.path(), format!("reading the compressed cluster at {offset}"), e)
                    })?;
                    let within = (extent.start - cluster_start) as usize;
                    let damaged = |why| {
                        Error::damaged(
                            storage.path(),
                            format!("the compressed cluster at {offset:#x}: {why}"),
                        )
                    };
                    if within == 0 && out.len() == cluster {
                        return codec::decompress(compression, &stored[..n], out).map_err(damaged);
                    }
                    whole.resize(cluster, 0);
                    codec::decompress(compression, &stored[..n], whole).map_err(damaged)?;
                    let part = whole.get(within..within + out.len());
                    out.copy_from_slice(part.ok_or_else(|| damaged("it is too short".into()))?);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// Appends the stored bytes of `extent` where it is the beginning of a cluster of `cluster` bytes compressed with
    /// `kind`, and they end where their own format says so; says whether it did.
    pub(crate) fn take_stored(
        &self,
        extent: &Extent,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let ExtentKind::Compressed { layer, offset, max_len, cluster_start, compression } = extent.kind
        else {
            return Ok(false);
        };
        let Layer::Qcow2(image) = self.layer(layer)? else { return Ok(false) };
        let same = compression == kind
            && image.header().cluster_size() == cluster
            && cluster_start == extent.start
            && (extent.len == cluster || extent.start + extent.len == self.size());
        if !same {
            return Ok(false);
        }
        let from = out.len();
        out.resize(from + max_len as usize, 0);
        let storage = image.storage();
        let n = storage.read_at(&mut out[from..], offset).map_err(|e| {
            Error::io(storage.path(), format!("reading the compressed cluster at {offset}"), e)
        })?;
        let len = codec::stored_len(kind, &out[from..from + n], cluster);
        out.truncate(from + len.unwrap_or(0));
        Ok(len.is_some())
    }

    fn layer(&self, index: usize) -> Result<&Layer> {
        self.layers.get(index).ok_or_else(|| Error::damaged(Path::new(""), "no such layer"))
    }
}

impl Layer {
    fn extents(
        &self,
        index: usize,
        from: u64,
        to: u64,
        found: &mut Vec<Extent>,
        left: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        match self {
            Layer::Qcow2(image) => {
                let h = image.header();
                image.pieces(from, to, &mut |start, len, piece| {
                    let kind = match piece {
                        Piece::Absent => {
                            match left.last_mut() {
                                Some(last) if last.1 == start => last.1 = start + len,
                                _ => left.push((start, start + len)),
                            }
                            return;
                        }
                        Piece::Zero => ExtentKind::Zero { layer: Some(index) },
                        Piece::Data(offset) => ExtentKind::Data { layer: index, offset },
                        Piece::Compressed(offset, max_len) => ExtentKind::Compressed {
                            layer: index,
                            offset,
                            max_len,
                            compression: h.compression,
                            cluster_start: start & !(h.cluster_size() - 1),
                        },
                    };
                    let next = Extent { start, len, kind };
                    if !found.last_mut().is_some_and(|last| join(last, &next)) {
                        found.push(next);
                    }
                })
            }
            Layer::Raw { storage, .. } => {
                let io = |e| Error::io(storage.path(), "looking for holes", e);
                let mut at = from;
                while at < to {
                    let data = storage.next_data(at).map_err(io)?.unwrap_or(to).clamp(at, to);
                    if data > at {
                        found.push(Extent {
                            start: at,
                            len: data - at,
                            kind: ExtentKind::Zero { layer: Some(index) },
                        });
                    }
                    if data >= to {
                        break;
                    }
                    let hole = storage.next_hole(data).map_err(io)?.clamp(data, to);
                    let hole = if hole == data { to } else { hole };
                    found.push(Extent {
                        start: data,
                        len: hole - data,
                        kind: ExtentKind::Data { layer: index, offset: data },
                    });
                    at = hole;
                }
                Ok(())
            }
        }
    }
}

/// Whether `next` continues `last`; if so, `last` grows.
fn join(last: &mut Extent, next: &Extent) -> bool {
    let same = match (last.kind, next.kind) {
        (ExtentKind::Data { layer: a, offset: x }, ExtentKind::Data { layer: b, offset: y }) => {
            a == b && x.checked_add(last.len) == Some(y)
        }
        (ExtentKind::Compressed { .. }, _) | (_, ExtentKind::Compressed { .. }) => false,
        (a, b) => a == b,
    };
    let joined = same && last.start + last.len == next.start;
    if joined {
        last.len += next.len;
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_region_finds_the_extent_that_a_byte_lies_in(
            lens in prop::collection::vec(1u64..40, 1..200),
            first in 0u64..5,
            unit_bits in 9u32..13,
            places in prop::collection::vec(any::<prop::sample::Index>(), 50),
        ) {
            let origin = first << 22;
            let (mut start, mut extents) = (origin, Vec::new());
            for len in lens {
                let kind = ExtentKind::Data { layer: 0, offset: start * 3 };
                extents.push(Extent { start, len: len * 512, kind });
                start += len * 512;
            }
            let region = Region::new(origin, unit_bits, extents.clone());
            prop_assert_eq!(region.slots.is_empty(), extents.len() <= FEW);
            for place in places {
                let at = origin + place.index((start - origin) as usize) as u64;
                let of = extents.iter().rfind(|e| e.start <= at).unwrap();
                let skip = at - of.start;
                let kind = ExtentKind::Data { layer: 0, offset: of.start * 3 + skip };
                prop_assert_eq!(region.find(at), Some(Extent { start: at, len: of.len - skip, kind }));
            }
            prop_assert_eq!(region.find(start), None);
            prop_assert_eq!(region.find(origin.wrapping_sub(1)).filter(|_| origin > 0), None);
        }
    }
}
