//! The rules: given what is there, what may be done? Pure functions without I/O, here to be read and proved.
//!
//! Rows that a rule comes from are rows of the tables in the requirements: "Backups", "Removal", "States".

pub mod absorb;
pub mod deltas;
pub mod drawing;
mod next;
#[cfg(test)]
mod next_tests;
mod reason;
mod removal;
pub mod restore;
pub mod retention;
pub mod snapshot;
#[cfg(test)]
mod snapshot_tests;
mod trust;
pub mod whereabouts;

pub use next::{Method, Next, Plan, StoredFile, VolumeNow, VolumePlan, plan};
pub use reason::Why;
pub use removal::{Node, Refusal, Removal, removal, remove_all};
pub use trust::{ForeignBase, foreign_base};

/// "A chain is at most 200 images deep, primary's own layers included."
pub const MAX_DEPTH: u32 = 200;

/// "At 190 the next backup is full and says why."
pub const FULL_AT_DEPTH: u32 = 190;
