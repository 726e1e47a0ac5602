//! The checksums of a stored image: `<disk>.sums`.
//!
//! Every byte of the qcow2 file is covered, so a reader of the guest's clusters and a reader of the file as it lies
//! there can both be sure. Byte tables are in `docs/FORMAT.md`.
//!
//! * A record for each stored cluster, in guest order: where it lies, a strong hash of the guest's bytes, and a fast
//!   checksum of every 4096 stored bytes.
//! * The file's metadata as extents, with the same fast checksums.
//! * What neither covers is padding, and must be zeros.
//!
//! Records are grouped by 16 MiB of the guest, so that a reader loads a group with one `pread`.

mod block;
mod cache;
mod chain;
mod format;
mod host;
mod observer;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use block::{Place, Record, Region};
pub use cache::SumsCache;
pub use chain::SumsChain;
pub use format::{PIECE, Strong, fast, strong};
pub use host::{HostPiece, PieceKind};
pub use reader::{Sums, SumsInfo};
pub use writer::{ClusterDigest, SumsSummary, SumsWriter};
