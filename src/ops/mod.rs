//! Operations: what a command asks for, planned by `chain`, recorded by `store`, done by the engine and the hypervisor.

pub mod add_vm;
pub mod control;
