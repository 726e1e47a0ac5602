//! knibfs: native incremental backups of KVM guests in a store of plain qcow2 files that mounts as a filesystem.
//!
//! Data flows one way: the command line calls an operation, which asks the pure rules what may be done, records it in
//! the store and has the hypervisor and the qcow2 engine do it. The mount reads the store and never changes it.

pub mod chain;
pub mod cli;
pub mod failpoint;
pub mod hypervisor;
pub mod img;
pub mod mount;
pub mod ops;
pub mod store;
pub mod verified;
