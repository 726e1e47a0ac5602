//! Reads backups, every byte verified: a disk of a backup as its guest saw it, a stored image as it lies there.
//!
//! The checksums of a backup say where every cluster lies and what it must be; they are bound to the manifest by a
//! digest. So a disk is mapped from them, a region at a time, and no byte is given away that does not match. Below the
//! mount, `export`, `check` and compression alike. Changes nothing but for leases on what is read.

mod around;
mod damage;
mod flat;
mod image;
mod raw;
mod reader;
mod stored;

pub use damage::Damage;
pub use image::number;
pub use raw::VerifiedDisk;
pub use reader::VerifiedReader;
pub use stored::VerifiedFile;
