//! How stored clusters are compressed.

use knib_qcow::CompressionType;

use crate::store::manifest::Compression;

/// Levels that cost little against reading and writing.
const ZSTD_LEVEL: u32 = 3;
const ZLIB_LEVEL: u32 = 7;

/// The engine's word for it.
pub(super) fn codec(library: Compression) -> knib_qcow::Compression {
    let (kind, level) = match library {
        Compression::Zstd => (CompressionType::Zstd, ZSTD_LEVEL),
        Compression::Zlib => (CompressionType::Deflate, ZLIB_LEVEL),
    };
    knib_qcow::Compression { kind, level }
}
