//! Operations: what a command asks for, planned by `chain`, recorded by `store`, done by the engine and the hypervisor.

pub mod add_vm;
pub mod backup;
pub mod check;
mod codec;
pub mod compress;
pub mod control;
mod deadline;
pub mod deltas;
mod detached;
pub mod disk_source;
pub mod export;
pub mod hypervisor;
pub mod images;
mod loop_devices;
pub mod prune;
pub mod recover;
pub mod release;
pub mod remove;
pub mod remove_vm;
pub mod restore;
pub mod snapshot;
pub mod whereabouts;
