//! The store as a tree that `knib_fuse` serves: VMs, backups, stored images byte for byte, chains as flat disks.
//!
//! Reads the store and never changes it, but for leases on what is open. The checksums of a backup say where every
//! cluster lies and what it must be; they are bound to the manifest by a digest. So a flat disk is mapped from them,
//! a region at a time, and no byte is given away that does not match. What is promised is in `docs/SEMANTICS.md`.

mod access;
mod life;
mod node;
mod status;
mod text;
mod tree;

pub use access::{Access, hypervisor_access};
pub use life::{MountPoint, PlaceError, serve, unmount_unless_busy};
pub use tree::{StoreTree, TreeConfig};
