//! The store on disk: layout, records, atomic writes, locks, journal, checksums.
//!
//! Knows where everything lies and what a record may say. Knows no rule about what may be done with a backup (that is
//! `chain`), no hypervisor and no command line. The format is described in `docs/FORMAT.md`.

pub mod atomic;
pub mod boot_trace;
mod damage;
mod error;
mod hosts;
pub mod ids;
pub mod journal;
pub mod journal_removal;
#[cfg(test)]
pub(crate) use layout::tests as layout_fixtures;
mod layout;
pub mod lease;
mod lock;
pub mod manifest;
pub mod names;
mod offering;
pub mod plain;
mod probe;
mod record;
pub mod restore_op;
pub mod settings;
pub mod snapshot;
pub mod staging;
pub mod sums;
mod trash;
pub mod vm;

pub use damage::{DamagedImage, KnownDamage};
pub use error::{StoreError, StoreResult};
pub use hosts::Host;
pub use ids::{BackupId, OfferingId, OpId, SnapshotId, StoreId, VmId, VolumeId};
pub use journal::{Journal, Operation};
pub use layout::{Backups, FORMAT, Store, StoreConfig, disk_file, sums_file};
pub use lease::{Lease, LeaseInfo};
pub use lock::{ConfigLock, VmLock, hostname};
pub use manifest::Manifest;
pub use names::{BackupName, BackupSpec, DiskName, DiskSpec, SnapshotName, VmName};
pub use offering::Offering;
pub use record::Record;
pub use settings::Settings;
pub use staging::Staging;
pub use trash::Trash;
pub use vm::VmRecord;
