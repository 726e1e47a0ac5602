//! A qcow2 engine: reads hostile images and long chains, writes compressed clusters, changes images in place.
//!
//! Everything in a file is checked before it is used; what breaks a rule is an [`Error`] that names the file, the table
//! and the offset. No file that a header names is opened unless the caller's [`Gate`] allows it. Whatever is changed in
//! place is changed in such an order that a power failure at any moment leaves at worst leaked clusters. QEMU's own
//! locks keep the engine and running VMs apart ([`Locking`]).
//!
//! # Make, write, read
//!
//! ```
//! use knib_qcow::{Access, Chain, CreateOptions, FileStorage, Format, ImageMut, NoImplicit, create_with};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! create_with(FileStorage::create_new(&path)?, &CreateOptions { size: 1 << 30, ..CreateOptions::default() })?;
//!
//! let mut image = ImageMut::open(FileStorage::open(&path, Access::ReadWrite)?, &NoImplicit)?;
//! image.write_at(b"hello", 1 << 20)?;
//! image.flush()?;
//! drop(image);
//!
//! let chain = Chain::open(&path, Format::Qcow2, &NoImplicit)?;
//! let mut bytes = [0; 7];
//! chain.read_at(&mut bytes, 1 << 20)?;
//! assert_eq!(&bytes, b"hello\0\0");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A chain, flattened and compressed
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//!
//! use knib_qcow::{
//!     Chain, ChainSource, Compression, CompressionType, Control, CreateOptions, FileStorage, Format, NewImage,
//!     NoObserver, PlainPaths, compare, create_with, write_image,
//! };
//!
//! let dir = tempfile::tempdir()?;
//! let at = |name: &str| dir.path().join(name);
//! std::fs::write(at("base.raw"), vec![7; 1 << 20])?;
//! let overlay = CreateOptions {
//!     size: 1 << 20,
//!     backing: Some(("base.raw".into(), Format::Raw)),
//!     ..CreateOptions::default()
//! };
//! create_with(FileStorage::create_new(&at("top.qcow2"))?, &overlay)?;
//!
//! // Backing files are followed where they are plain paths with a format.
//! let chain = Chain::open(&at("top.qcow2"), Format::Qcow2, &PlainPaths)?;
//! assert_eq!(chain.depth(), 2);
//!
//! // Work is done by threads, tells of its progress, can be slowed down and cancelled.
//! let cancel = AtomicBool::new(false);
//! let control = Control { threads: 2, rate_limit: None, cancel: &cancel, progress: &|_| {} };
//! let zstd = Compression { kind: CompressionType::Zstd, level: 3 };
//! let new = NewImage { size: chain.size(), cluster_bits: 16, compression: Some(zstd), backing: None };
//! let flat = at("flat.qcow2");
//! let source = ChainSource::whole(&chain, 1 << new.cluster_bits);
//! write_image(FileStorage::create_new(&flat)?, &new, &source, &NoObserver, &control)?;
//!
//! let flat = Chain::open(&flat, Format::Qcow2, &PlainPaths)?;
//! assert_eq!(compare(&chain, &flat, false, &control)?, None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Check, repair, snapshots
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//!
//! use knib_qcow::{
//!     Access, Control, CreateOptions, FileStorage, Image, NoImplicit, Repair, check, create_with, repair, snapshot,
//! };
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! create_with(FileStorage::create_new(&path)?, &CreateOptions { size: 1 << 30, ..CreateOptions::default() })?;
//! let cancel = AtomicBool::new(false);
//! let control = Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} };
//!
//! let storage = FileStorage::open(&path, Access::ReadWrite)?;
//! snapshot::create(storage.clone(), "before the upgrade", &control)?;
//! assert_eq!(snapshot::list(&*storage)?.len(), 1);
//!
//! let report = check(&Image::open(storage.clone(), &NoImplicit)?, &control)?;
//! assert_eq!((report.corruptions, report.leaks), (0, 0));
//! let repaired = repair(storage, Repair::All, &control)?;
//! assert_eq!(repaired.after.corruptions, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
mod page_buf;
mod rebase;
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
pub use commit::{commit, commit_layers};
pub use compare::{Difference, compare};
pub use create::{CreateOptions, create, create_with, set_backing, set_data_file};
pub use decoder::{decoded_len, decompress_verified};
pub use error::{Error, Result};
pub use gate::{Gate, Implicit, LockedPaths, NoImplicit, PlainPaths};
pub use header::{CompressionType, Format, Header};
pub use image::Image;
pub use lock::{Locking, check_unused};
pub use page_buf::PageBuf;
pub use rebase::rebase;
pub use repair::{Repair, Repaired, repair};
pub use resize::resize;
pub use rw::{Backing, ImageMut, Preallocation};
pub use status::{Layers, Status};
pub use storage::{Access, FileStorage, Storage};
pub use writer::{
    Before, ChainSource, Control, NewImage, NoObserver, Observer, Place, Run, Sink, Source, Written,
    write_image, write_raw,
};
