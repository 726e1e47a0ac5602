//! The header of a new image. Source: the qcow2 specification, "Header" and "Header extensions".

use crate::header::{EXT_BACKING_FORMAT, MAGIC, incompatible};
use crate::writer::NewImage;
use crate::{CompressionType, Error, Result, Storage};

/// The bytes of a version 3 header with its extensions and the backing file's name.
pub(super) fn header(
    new: &NewImage,
    l1_offset: u64,
    l1_size: u32,
    table_offset: u64,
    table_clusters: u32,
    dest: &dyn Storage,
) -> Result<Vec<u8>> {
    let zstd = new.compression.is_some_and(|c| c.kind == CompressionType::Zstd);
    let mut h = Vec::with_capacity(1024);
    let put32 = |h: &mut Vec<u8>, v: u32| h.extend_from_slice(&v.to_be_bytes());
    let put64 = |h: &mut Vec<u8>, v: u64| h.extend_from_slice(&v.to_be_bytes());
    put32(&mut h, MAGIC);
    put32(&mut h, 3);
    put64(&mut h, 0);
    put32(&mut h, 0);
    put32(&mut h, new.cluster_bits);
    put64(&mut h, new.size);
    put32(&mut h, 0);
    put32(&mut h, l1_size);
    put64(&mut h, l1_offset);
    put64(&mut h, table_offset);
    put32(&mut h, table_clusters);
    put32(&mut h, 0);
    put64(&mut h, 0);
    put64(&mut h, if zstd { incompatible::COMPRESSION } else { 0 });
    put64(&mut h, 0);
    put64(&mut h, 0);
    put32(&mut h, 4);
    put32(&mut h, 112);
    h.extend_from_slice(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    if let Some((_, format)) = &new.backing {
        let name = format.name().as_bytes();
        put32(&mut h, EXT_BACKING_FORMAT);
        put32(&mut h, name.len() as u32);
        h.extend_from_slice(name);
        h.resize(h.len().next_multiple_of(8), 0);
    }
    put64(&mut h, 0);
    if let Some((name, _)) = &new.backing {
        let (offset, len) = (h.len() as u64, name.len() as u32);
        if len > 1023 || name.contains('\0') {
            return Err(Error::unsupported(
                dest.path(),
                "the backing file's name is longer than 1023 bytes or holds a NUL byte",
            ));
        }
        h[8..16].copy_from_slice(&offset.to_be_bytes());
        h[16..20].copy_from_slice(&len.to_be_bytes());
        h.extend_from_slice(name.as_bytes());
    }
    if h.len() as u64 > 1 << new.cluster_bits {
        return Err(Error::unsupported(
            dest.path(),
            "the backing file's name does not fit the first cluster: take larger clusters",
        ));
    }
    Ok(h)
}
