//! `<disk>.qcow2`: a stored image as it lies there, every byte checked.

use std::sync::Arc;

use knib_fuse::{File, FsResult};

use super::image::StoredImage;
use crate::store::Lease;

/// The stored file.
#[derive(Debug)]
pub struct StoredFile {
    image: Arc<StoredImage>,
    _lease: Option<Arc<Lease>>,
}

impl StoredFile {
    /// A handle on it.
    pub fn new(image: Arc<StoredImage>, lease: Option<Arc<Lease>>) -> Self {
        Self { image, _lease: lease }
    }
}

impl File for StoredFile {
    fn len(&self) -> u64 {
        self.image.len
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.image.read_verified(offset, buf)
    }
}

/// A small file that is read whole when it is opened.
#[derive(Debug)]
pub struct Text(pub Arc<[u8]>);

impl File for Text {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.0.get(from..).and_then(|b| b.get(..buf.len()));
        buf.copy_from_slice(
            bytes.ok_or_else(|| knib_fuse::FsError::new(knib_fuse::Problem::Invalid, "past the end"))?,
        );
        Ok(())
    }
}
