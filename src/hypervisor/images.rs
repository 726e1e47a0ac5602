//! What is asked of the image engine for volumes that no QEMU has open.

use std::path::Path;

use super::{ImageRef, JobControl, Result};

/// The image engine, as far as VMs that are off need it. Implementations take QEMU's locks on what they write and
/// refuse an image that someone has open.
pub trait Images: Send + Sync {
    /// Refuses an image that a QEMU, or anything else that honours its locks, has open for writing.
    ///
    /// # Errors
    /// [`super::HypervisorError::InUse`].
    fn check_unused(&self, image: &ImageRef) -> Result<()>;

    /// Makes an empty qcow2 image that stands on `backing` and is as large, durable when it returns. `backing.path` is
    /// written into its header as it is given; a relative one starts at the folder of `path`. Fails where `path` exists.
    ///
    /// # Errors
    /// The file cannot be made, or `backing` cannot be read.
    fn create_overlay(&self, path: &Path, backing: &ImageRef) -> Result<()>;

    /// Copies what the images of `layers` (top first, one after the other in a chain) hold into `base`, right below them,
    /// growing it where they are larger; durable when it returns. The layers stay as they are. Done again, it does the same.
    ///
    /// # Errors
    /// [`super::HypervisorError::Cancelled`], or reading or writing failed: the layers still hold all data.
    fn commit(
        &self,
        target: &str,
        layers: &[ImageRef],
        base: &ImageRef,
        control: &JobControl<'_>,
    ) -> Result<()>;

    /// Makes the header of the qcow2 image `path` name `backing` (relative as above), which shows the same data as what it stood on.
    ///
    /// # Errors
    /// The header cannot be written; the image stands on what it stood on.
    fn set_backing(&self, path: &Path, backing: &ImageRef) -> Result<()>;
}
