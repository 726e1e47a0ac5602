//! What `knibfs img` knows of images besides the engine: names as QEMU reads them, sizes, option lists, opening with
//! QEMU's locks. Talks to nobody.

pub mod create;
mod failure;
pub mod flat;
pub mod image_opts;
pub mod name;
pub mod open;
pub mod optlist;
pub mod size;
pub mod snapshots;
pub mod unsynced;

pub use failure::Failure;
