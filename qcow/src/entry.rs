//! Entries of the L1 and L2 tables. Source: the qcow2 specification, "Cluster mapping".

use crate::Header;

/// The longest L1 table, in bytes: QEMU opens no image with a longer one.
pub const L1_MAX: u64 = 32 << 20;
/// Bits 9–55 hold an offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62: compressed.
pub const COMPRESSED: u64 = 1 << 62;

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2 {
    /// Nothing: the backing file shows.
    Unallocated,
    /// Reads as zeros; a cluster may be kept for it.
    Zero {
        /// Host offset of the cluster that is kept.
        allocated: Option<u64>,
    },
    /// Data at a host offset in bytes.
    Data(u64),
    /// A compressed cluster.
    Compressed {
        /// Host offset in bytes, not aligned.
        offset: u64,
        /// At most so many stored bytes.
        max_len: u64,
    },
}

impl L2 {
    /// Decodes a standard entry (or the first word of an extended one). The error is the reason.
    pub fn decode(entry: u64, header: &Header) -> Result<L2, String> {
        let cluster = header.cluster_size();
        if entry & COMPRESSED != 0 {
            let x = 62 - (header.cluster_bits - 8);
            let offset = entry & ((1 << x) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> x;
            if header.external_data() {
                return Err("a compressed cluster in an image with an external data file".into());
            }
            return Ok(L2::Compressed { offset, max_len: (sectors + 1) * 512 - (offset & 511) });
        }
        let offset = entry & OFFSET_MASK;
        // A division costs more than all the rest here.
        if offset & (cluster - 1) != 0 {
            return Err(format!("the host offset {offset:#x} is not aligned to a cluster"));
        }
        let held = offset != 0 || (header.external_data() && entry & COPIED != 0);
        if entry & 1 != 0 && !header.extended_l2() {
            if header.version < 3 {
                return Err("a zero flag in a version 2 image".into());
            }
            return Ok(L2::Zero { allocated: held.then_some(offset) });
        }
        Ok(if held { L2::Data(offset) } else { L2::Unallocated })
    }

    /// Whether a compressed cluster lies in a file of `file_len` bytes: its sectors may reach past the end, but not by a
    /// whole cluster, as for QEMU. Whoever gives it up gives back every cluster that they touch, so each is counted.
    pub fn compressed_is_inside(offset: u64, max_len: u64, file_len: u64, header: &Header) -> bool {
        offset < file_len && (offset + max_len).saturating_sub(file_len) < header.cluster_size()
    }

    /// Encodes a compressed cluster of `len` stored bytes at `offset`.
    pub fn compressed(offset: u64, len: u64, cluster_bits: u32) -> u64 {
        let x = 62 - (cluster_bits - 8);
        let sectors = ((offset & 511) + len).div_ceil(512).max(1) - 1;
        COMPRESSED | (sectors << x) | offset
    }
}
