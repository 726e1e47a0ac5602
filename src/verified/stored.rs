//! `<disk>.qcow2`: a stored image as it lies there, every byte checked that is read here.

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
    passthrough: bool,
}

impl VerifiedFile {
    /// A handle on it.
    pub(super) fn new(image: Arc<StoredImage>, lease: Option<Arc<Lease>>) -> Self {
        Self { image, lease, passthrough: false }
    }

    /// Whether the kernel may read it by itself: nobody checks those bytes.
    #[must_use]
    pub fn with_passthrough(self, passthrough: bool) -> Self {
        Self { passthrough, ..self }
    }
}

impl File for VerifiedFile {
    fn len(&self) -> u64 {
        self.image.len
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lease.as_deref().map(AsFd::as_fd)
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.passthrough.then(|| self.image.as_fd())
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        self.image.read_verified(offset, buf)
    }

    fn waits(&self) -> bool {
        is_anyone_waiting()
    }
}
