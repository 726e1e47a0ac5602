//! The store as a tree that `knib_fuse` serves: VMs, backups, stored images byte for byte, chains as flat disks.
//!
//! Reads the store and never changes it, but for leases on what is open and notes of what boots read. The checksums of a backup say where every
//! cluster lies and what it must be; they are bound to the manifest by a digest. So a flat disk is mapped from them,
//! a region at a time, and no byte is given away that does not match. What is promised is in `docs/SEMANTICS.md`.

mod access;
mod boot;
mod catalog;
mod keeper;
mod life;
mod moving;
mod node;
mod patience;
mod server;
mod small;
mod status;
mod text;
mod tree;

pub use access::{Access, hypervisor_access};
pub use keeper::{Kept, keep};
pub use life::{MountPoint, PlaceError, unmount_unless_busy};
pub use server::serve_kept;
pub use tree::{StoreTree, TreeConfig};
