//! What several tests need.

#![allow(dead_code, missing_docs)]
// The test that includes this allows `unwrap_used` and `panic` for itself and for these.
#![allow(clippy::new_ret_no_self)]

pub mod disk_lab;
pub mod failpoints;
pub mod guest;
pub mod guest_files;
pub mod kept;
pub mod killed;
pub mod lab;
pub mod own_libvirt;
pub mod qemu_images;
pub mod served;
pub mod server;
pub mod sound;
pub mod stall;
#[cfg(feature = "libvirt")]
pub mod table;
