//! Compressed clusters written in place, packed one behind the other.

use crate::codec::Compressor;
use crate::entry::L2;
use crate::rw::ImageMut;
use crate::rw::tables::Entry;
use crate::{CompressionType, Error, Result};

/// Appends a cluster compressed to `stored`; the disk's last one may be cut. `false` where that is not shorter. The error
/// is the reason.
pub(crate) fn compress_cluster(
    compressor: &mut Compressor,
    guest: &[u8],
    cluster: u64,
    stored: &mut Vec<u8>,
) -> std::result::Result<bool, String> {
    if guest.len() as u64 == cluster {
        return Ok(compressor.compress(guest, stored)?.is_some());
    }
    let mut padded = guest.to_vec();
    padded.resize(cluster as usize, 0);
    Ok(compressor.compress(&padded, stored)?.is_some())
}

impl ImageMut {
    /// Writes one whole cluster compressed, where that makes it shorter, and as [`ImageMut::write_at`] does where not.
    /// `offset` is a multiple of the cluster size; the disk's last cluster may be cut. The compressor's codec must be
    /// the image's.
    pub fn write_compressed(&mut self, compressor: &mut Compressor, guest: &[u8], offset: u64) -> Result<()> {
        let kind = compressor.kind();
        self.prepare_compressed(kind, offset, guest.len() as u64)?;
        let mut stored = Vec::new();
        let shorter = compress_cluster(compressor, guest, self.header.cluster_size(), &mut stored);
        match shorter.map_err(|why| Error::unsupported(self.storage.path(), why))? {
            true => self.write_stored(kind, &stored, offset, guest.len() as u64),
            false => self.write_at(guest, offset),
        }
    }

    /// Writes one cluster that was compressed before, from `len` guest bytes by [`compress_cluster`].
    pub(crate) fn write_stored(
        &mut self,
        kind: CompressionType,
        stored: &[u8],
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.prepare_compressed(kind, offset, len)?;
        let result = self.put_compressed(offset >> self.header.cluster_bits, stored);
        self.failed |= result.is_err();
        result
    }

    fn prepare_compressed(&mut self, kind: CompressionType, offset: u64, len: u64) -> Result<()> {
        self.prepare(offset, len)?;
        let cluster = self.header.cluster_size();
        let end = offset + len;
        let whole = len == cluster || end == self.header.size && len < cluster;
        if !offset.is_multiple_of(cluster) || !whole {
            return Err(Error::out_of_range(
                self.storage.path(),
                format!("{len} bytes at {offset} are not one cluster of {cluster} bytes"),
            ));
        }
        if kind != self.header.compression || self.header.external_data() {
            return Err(Error::unsupported(
                self.storage.path(),
                "it cannot hold clusters that are compressed in this way",
            ));
        }
        Ok(())
    }

    fn put_compressed(&mut self, index: u64, stored: &[u8]) -> Result<()> {
        let entry = self.entry(index)?;
        let old = self.decode(index, entry)?;
        let len = stored.len() as u64;
        let offset = self.place_bytes(len)?;
        self.put(stored, offset)?;
        self.free(old);
        let word = L2::compressed(offset, len, self.header.cluster_bits);
        self.set_entry(index, Entry { word, sub: 0 })
    }

    /// A place for `len` bytes, less than a cluster: behind the last ones where there is room.
    fn place_bytes(&mut self, len: u64) -> Result<u64> {
        let (bits, cluster) = (self.header.cluster_bits, self.header.cluster_size());
        if let Some(at) = self.packed.take() {
            let room = at.next_multiple_of(cluster) - at;
            if len <= room && self.refcounts.add(at >> bits)? {
                self.packed = Some(at + len).filter(|end| !end.is_multiple_of(cluster));
                return Ok(at);
            }
            let next = self.new_cluster(0)?;
            let follows = next >> bits == (at >> bits) + 1;
            let offset =
                if follows && room > 0 && len > room && self.refcounts.add(at >> bits)? { at } else { next };
            self.packed = Some(offset + len).filter(|end| !end.is_multiple_of(cluster));
            return Ok(offset);
        }
        let offset = self.new_cluster(0)?;
        self.packed = Some(offset + len);
        Ok(offset)
    }
}
