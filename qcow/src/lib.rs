//! A qcow2 engine: reads hostile images and long chains, writes compressed clusters, changes images in place.

pub mod chain;
pub mod codec;
pub mod entry;
mod error;
mod gate;
pub mod header;
mod image;
mod storage;
pub mod writer;

pub use chain::{Chain, Extent, ExtentKind};
pub use codec::Compression;
pub use error::{Error, Result};
pub use gate::{Gate, Implicit, NoImplicit, PlainPaths};
pub use header::{CompressionType, Format, Header};
pub use image::Image;
pub use storage::{Access, FileStorage, Storage};
pub use writer::{
    ChainSource, Control, NewImage, NoObserver, Observer, Place, Run, Source, Written, write_image, write_raw,
};
