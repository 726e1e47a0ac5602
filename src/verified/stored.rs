//! `<disk>.qcow2`: a stored image as it lies there, every byte checked.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use knib_fuse::{File, FsResult};

use super::around::is_anyone_waiting;
use super::image::StoredImage;
use crate::store::Lease;

/// A stored image, opened.
#[derive(Debug)]
pub struct VerifiedFile {
    image: Arc<StoredImage>,
    lease: Option<Arc<Lease>>,
}

impl VerifiedFile {
    /// A handle on it.
    pub(super) fn new(image: Arc<StoredImage>, lease: Option<Arc<Lease>>) -> Self {
        Self { image, lease }
    }
}

impl File for VerifiedFile {
    fn len(&self) -> u64 {
        self.image.len
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lease.as_deref().map(AsFd::as_fd)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.image.read_verified(offset, buf)
    }

    fn waits(&self) -> bool {
        is_anyone_waiting()
    }
}
