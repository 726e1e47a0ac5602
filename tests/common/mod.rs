//! What several tests need.

#![allow(dead_code, missing_docs)]
// The test that includes this allows `unwrap_used` and `panic` for itself and for these.
#![allow(clippy::new_ret_no_self)]

pub mod guest;
pub mod guest_files;
pub mod lab;
pub mod qemu_images;
pub mod stall;
