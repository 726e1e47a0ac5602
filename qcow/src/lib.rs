//! A qcow2 engine: reads hostile images and long chains, writes compressed clusters, changes images in place.

mod amend;
pub mod bitmap;
pub mod chain;
mod check;
pub mod codec;
mod commit;
mod compare;
mod counts;
mod create;
mod decoder;
pub mod entry;
mod error;
mod gate;
mod generation;
pub mod header;
mod image;
mod lock;
pub mod measure;
mod refcount;
mod repair;
mod resize;
mod rw;
pub mod snapshot;
mod snapshot_view;
mod status;
mod storage;
pub mod writer;

pub use amend::{Amend, amend};
pub use chain::{Chain, Extent, ExtentKind};
pub use check::{Report, Usage, check};
pub use codec::Compression;
pub use commit::commit;
pub use compare::{Difference, compare};
pub use create::{CreateOptions, create, create_with, set_backing};
pub use decoder::decompress_verified;
pub use error::{Error, Result};
pub use gate::{Gate, Implicit, LockedPaths, NoImplicit, PlainPaths};
pub use header::{CompressionType, Format, Header};
pub use image::Image;
pub use lock::{Locking, check_unused};
pub use repair::{Repair, Repaired, repair};
pub use resize::resize;
pub use rw::{Backing, ImageMut, Preallocation};
pub use status::{Layers, Status};
pub use storage::{Access, FileStorage, Storage};
pub use writer::{
    ChainSource, Control, NewImage, NoObserver, Observer, Place, Run, Source, Written, write_image, write_raw,
};
