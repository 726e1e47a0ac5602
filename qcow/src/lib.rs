//! A qcow2 engine: reads hostile images and long chains, writes compressed clusters, changes images in place.

pub mod entry;
mod error;
mod gate;
pub mod header;
mod storage;

pub use error::{Error, Result};
pub use gate::{Gate, Implicit, NoImplicit, PlainPaths};
pub use header::{CompressionType, Format, Header};
pub use storage::{Access, FileStorage, Storage};
