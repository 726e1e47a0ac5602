//! `<disk>.qcow2`: a stored image as it lies there, every byte checked.

use std::sync::Arc;

use knib_fuse::{File, FsResult};

use super::image::StoredImage;
use crate::store::Lease;

/// A stored image, opened.
#[derive(Debug)]
pub struct VerifiedFile {
    image: Arc<StoredImage>,
    _lease: Option<Arc<Lease>>,
}

impl VerifiedFile {
    /// A handle on it.
    pub(super) fn new(image: Arc<StoredImage>, lease: Option<Arc<Lease>>) -> Self {
        Self { image, _lease: lease }
    }
}

impl File for VerifiedFile {
    fn len(&self) -> u64 {
        self.image.len
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.image.read_verified(offset, buf)
    }
}
