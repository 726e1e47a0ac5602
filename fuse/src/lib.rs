//! A read-only tree of immutable files, a read engine with a bounded cache, and the adapter that serves both over FUSE.
//!
//! Knows nodes and bytes. Knows nothing of qcow2 or of how a store is laid out: a [`Tree`] says what is there, a
//! [`BlockSource`] where a file's bytes come from.
//!
//! ```text
//! kernel → adapter → Tree → File          (stored files: read as they lie)
//!                          └ BlockFile → BlockSource   (zeros, direct reads)
//!                                      └ BlockCache → BlockSource::read_block (decoded blocks, one decoding at a time)
//! ```

#![forbid(unsafe_code)]

mod adapter;
mod ahead;
mod awake;
mod block_file;
mod buffers;
mod cache;
mod device;
mod error;
mod first_reads;
mod handles;
mod link;
mod mount;
mod mountinfo;
mod plan;
mod pool;
mod source;
mod touched;
mod tree;
mod workers;

pub use ahead::ReadAhead;
pub use block_file::BlockFile;
pub use buffers::with_buffer;
pub use cache::{BlockCache, CacheStats};
pub use device::{Device, MountConfig, MountError};
pub use error::{FsError, FsResult, Problem};
pub use first_reads::FirstReads;
pub use handles::{Holder, OpenFiles};
pub use link::{Link, PROTOCOL, ToKeeper, ToServer};
pub use mount::{Server, Stopper, unmount};
pub use mountinfo::{MountEntry, mount_at, mounts};
pub use plan::Plan;
pub use source::{BlockKey, BlockSource, Span, SpanKind};
pub use tree::{Attr, DirEntry, File, Ino, NodeKind, Statfs, Tree};
