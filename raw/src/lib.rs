//! The only unsafe code of knibfs, each block with its reason: calls about descriptors, and libvirt's library, which is
//! loaded when it is first needed. Everything else forbids it.

#![deny(unsafe_code)]

pub mod device;
#[cfg(feature = "libvirt")]
pub mod libvirt;
