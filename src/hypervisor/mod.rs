//! The running side of a VM: what its disks are, freezing their state, merging deltas.
//!
//! Knows domains, disks and images on primary. Knows no store, no backup and no rule about what may be merged: `ops`
//! asks for a step, and gets it done whole or an error that says what is left. Two implementations:
//! [`LibvirtDomain`] for a domain (running, paused or off) and [`DiskFiles`] for image files that no domain owns.
//!
//! Nothing here deletes an image that held data: after a commit the merged file lies there until `ops` has made sure,
//! with [`Hypervisor::users_of`], that nothing names it.

#[cfg(feature = "libvirt")]
mod agent;
#[cfg(feature = "libvirt")]
mod block_job;
mod error;
mod header;
mod images;
mod layers;
#[cfg(feature = "libvirt")]
pub(crate) mod libvirt;
// Nothing but libvirt is waited for.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub mod limit;
mod offline;
pub mod thaw_guard;
pub mod xml;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use uuid::Uuid;

pub use crate::store::manifest::ImageFormat;
pub use crate::store::restore_op::ErrorPolicy;
pub use error::{HypervisorError, Result};
pub use header::backing_chain;
pub use images::Images;
pub(crate) use layers::{identity, is_block, same_file, volume};
#[cfg(feature = "libvirt")]
pub use libvirt::LibvirtDomain;
pub use offline::DiskFiles;

/// What can be done with one VM. All calls are safe from any thread; `ops` holds the VM's lock around those that change.
pub trait Hypervisor: Send + Sync {
    /// What the VM is and what its disks stand on, as it is now. Changes nothing.
    ///
    /// # Errors
    /// libvirt cannot be reached, the domain is gone, an image's header cannot be read.
    fn inspect(&self) -> Result<Guest>;

    /// Freezes the state of the named volumes in one transaction: each goes on in a new, empty qcow2 overlay.
    ///
    /// Every volume that `overlays` names takes part; all others are left as they are. With an empty list nothing is
    /// done. Afterwards the live and the persistent definition name what is on disk.
    ///
    /// What [`NewOverlay::path`] names differs: for a domain it is the new overlay, which becomes the live image. For
    /// [`DiskFiles`] the given path stays the live one, so it is the new name of the old image.
    ///
    /// # Errors
    /// Nothing was changed: the VM runs on as before, thawed, and no file was left. The exceptions are
    /// [`HypervisorError::Definition`] and a lost connection ([`HypervisorError::Unreachable`] with `changing`): then
    /// call [`Hypervisor::inspect`] and look which image is live.
    fn snapshot(&self, overlays: &[NewOverlay], quiesce: Quiesce) -> Result<Snapshot>;

    /// Merges image `top` of volume `target`, and what lies between, into `base`, and takes it out of the chain.
    ///
    /// `top` is the live image: an active commit, then the volume goes on in `base`. Else a middle layer: what stands on
    /// `top` stands on `base` afterwards. Both definitions name what is on disk then. Nothing is unlinked. A job that an
    /// earlier call, killed since, left running is taken over. Returns the chain afterwards, top first.
    ///
    /// For [`DiskFiles`] with `top` as the live image, `base` takes the given path and its own name is gone.
    ///
    /// # Errors
    /// [`HypervisorError::NotInChain`] when `top` and `base` are not both in the chain in this order;
    /// [`HypervisorError::Cancelled`] after `control.cancel`: the chain is as before. Whatever the error, the guest sees
    /// the same data as before.
    fn commit(
        &self,
        target: &str,
        top: &Path,
        base: &Path,
        control: &JobControl<'_>,
    ) -> Result<Vec<ImageRef>>;

    /// Who on this host names `path` or has it in a backing chain: definitions live and persistent, libvirt's snapshots,
    /// of all domains, this one included. Empty: nothing does. A path is also found under another name (hard link,
    /// symbolic link). [`DiskFiles`] knows of no domain and looks at its own chains only.
    ///
    /// # Errors
    /// A definition or header that cannot be read, so that the answer is not known.
    fn users_of(&self, path: &Path) -> Result<Vec<ImageUser>>;

    /// Makes the disks of a VM that is off lie in other images, or adds them, in one change of its definition.
    ///
    /// # Errors
    /// It is not off; the definition is as it was.
    fn place(&self, _disks: &[DiskPlace]) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Adds a disk to a VM, running or off, for this run and the next. One that is there already is left as it is.
    ///
    /// # Errors
    /// libvirt refused.
    fn attach(&self, _disk: &DiskPlace) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Starts the VM, if it is off.
    ///
    /// # Errors
    /// libvirt's or QEMU's reason.
    fn start(&self) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Reads the data of a running VM's disk into its live image until no image below the folder `foreign` is in its
    /// chain. A job that an earlier call, killed since, left running is taken over. What was pulled lasts after
    /// [`Hypervisor::flush`].
    ///
    /// # Errors
    /// [`HypervisorError::Cancelled`], [`HypervisorError::PullFailed`]: the guest sees the same data as before.
    fn pull(&self, _target: &str, _foreign: &Path, _control: &JobControl<'_>) -> Result<Pulled> {
        Err(HypervisorError::no_domain())
    }

    /// Makes what was pulled into the live image `path` last, however QEMU ends. A VM that runs stands still for a moment: one
    /// that is found paused after a crash in this is to be resumed.
    ///
    /// # Errors
    /// libvirt's reason.
    fn flush(&self, _path: &Path) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Lets the processors of a VM that is paused go on; others are left as they are.
    ///
    /// # Errors
    /// libvirt's reason.
    fn resume(&self) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Lets a VM go on that QEMU paused because a disk could not be read or written; whether it was one. What failed is
    /// done again, and the guest notices nothing but a pause.
    ///
    /// # Errors
    /// libvirt's reason.
    fn resume_after_error(&self) -> Result<bool> {
        Err(HypervisorError::no_domain())
    }

    /// Sets in the definition of the next run what becomes of I/O errors of a disk. The run that goes on keeps what it has.
    ///
    /// # Errors
    /// libvirt's reason.
    fn set_error_policy(&self, _target: &str, _policy: &ErrorPolicy) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Opens all images of a running VM anew, by saving its memory and starting it from there. One that I/O errors paused runs
    /// then; one that a person paused stays so.
    ///
    /// # Errors
    /// libvirt's reason; saved memory is used by the next start.
    fn reopen(&self) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Defines the VM on another host, too, and returns it as it is there. Where it has a definition there, that is replaced.
    ///
    /// # Errors
    /// The host cannot be reached, or refuses the definition.
    fn copy_to(&self, _uri: &str) -> Result<Arc<dyn Hypervisor>> {
        Err(HypervisorError::no_domain())
    }

    /// Forgets the definition of a VM that is off. Its disks stay.
    ///
    /// # Errors
    /// libvirt refused.
    fn undefine(&self) -> Result<()> {
        Err(HypervisorError::no_domain())
    }

    /// Whether the guest agent answers within `limit`.
    ///
    /// # Errors
    /// [`HypervisorError::AgentMissing`] with what to do about it.
    fn agent_ping(&self, limit: Duration) -> Result<()>;
}

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The domain's UUID; none for plain disk files.
    pub uuid: Option<Uuid>,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub power: Power,
    /// It has a definition that outlives its run. False for transient domains and plain disk files.
    pub persistent: bool,
    /// Memory was saved by `virsh managedsave`: its disks must not change until it runs again.
    pub managed_save: bool,
    /// The volumes that can be backed up, in the definition's order.
    pub volumes: Vec<GuestVolume>,
    /// Disks that are never part of a backup, and why: cdrom, floppy, read-only, shareable, transient, passed-through LUN.
    pub skipped: Vec<NotTaken>,
    /// Disks that should be part but cannot be: network, encrypted, pool volumes. The backup is refused unless `--exclude-disk`.
    pub refused: Vec<NotTaken>,
    /// The persistent definition with its secrets (the live one of a transient domain); empty for plain disk files.
    pub xml: String,
    /// File of the firmware's variables.
    pub nvram: Option<PathBuf>,
    /// Folder of the emulated TPM's state, if it is there.
    pub tpm_state: Option<PathBuf>,
}

/// Whether a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Its processors run.
    Running,
    /// QEMU holds its disks, its processors are stopped (paused, suspended).
    Paused,
    /// No QEMU.
    Off,
}

/// One disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestVolume {
    /// Device in the guest (`vda`), or the name given for a plain disk file.
    pub target: String,
    /// The disk's serial number.
    pub serial: Option<String>,
    /// Its images with explicit formats, the live one first; never empty.
    pub chain: Vec<ImageRef>,
    /// The live image is a block device.
    pub block_device: bool,
    /// libvirt's name of a job that mirrors it now (`active-commit`, `copy`): what an interrupted commit may leave.
    pub mirror: Option<String>,
}

/// An image on primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its format: from the definition or the header above it, never guessed.
    pub format: ImageFormat,
}

/// A disk that is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotTaken {
    /// Device in the guest.
    pub target: String,
    /// Why, as it follows "because it": "is a cdrom".
    pub reason: String,
}

/// A volume that takes part in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOverlay {
    /// Which volume.
    pub target: String,
    /// The file that will be made; see [`Hypervisor::snapshot`]. Absolute, not there yet.
    pub path: PathBuf,
}

/// Whether the guest's file systems are frozen while the snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quiesce {
    /// No: the snapshot is as after a power cut.
    No,
    /// Yes, through the guest agent, or the snapshot is not taken.
    Required {
        /// How long the guest may take to freeze.
        limit: Duration,
    },
    /// If the guest agent does it; else the snapshot is taken all the same and the notes say why it is not frozen.
    BestEffort {
        /// How long the guest may take to freeze.
        limit: Duration,
    },
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The file systems were frozen from before to after it. With [`Quiesce::Required`] this is false only where the VM
    /// is off, or where the guest thawed by itself in between; then a note says so.
    pub frozen: bool,
    /// The volumes that took part, with their chains afterwards: `chain[0]` is the overlay, `chain[1]` what was frozen.
    pub volumes: Vec<GuestVolume>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Who names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageUser {
    /// Name of the domain, or of the plain disk file.
    pub domain: String,
    /// The domain's UUID.
    pub uuid: Option<Uuid>,
    /// Where.
    pub definition: Definition,
    /// The disk; empty where it is no disk (firmware variables).
    pub target: String,
    /// 0: the live image itself; 1: what it stands on, and so on.
    pub depth: usize,
}

/// Where a domain names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Definition {
    /// In the definition of the run that goes on.
    Live,
    /// In the definition of the next run.
    Persistent,
    /// In a snapshot that libvirt knows, with its name.
    Snapshot(String),
    /// No domain: plain disk files.
    DiskFiles,
}

impl std::fmt::Display for ImageUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let where_ = match &self.definition {
            Definition::Live => "running definition".to_owned(),
            Definition::Persistent => "definition".into(),
            Definition::Snapshot(name) => format!("snapshot \"{name}\""),
            Definition::DiskFiles => return write!(f, "disk file {}", self.target),
        };
        write!(f, "disk {} in the {where_} of domain \"{}\"", self.target, self.domain)
    }
}

/// Where a disk is to lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlace {
    /// Device in the guest.
    pub target: String,
    /// Its images, live one first.
    pub chain: Vec<ImageRef>,
    /// The `<disk>` that is added where the VM has no such disk.
    pub model: Option<String>,
    /// What becomes of I/O errors; none leaves that as it is.
    pub errors: Option<ErrorPolicy>,
}

/// How pulling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulled {
    /// All data is in the live image, and both definitions say so.
    Done,
    /// The VM went off; what was pulled stays pulled.
    Off,
}

/// How the caller steers a merge and hears of it.
#[derive(Clone, Copy)]
pub struct JobControl<'a> {
    /// Set when it is to stop.
    pub cancel: &'a AtomicBool,
    /// Called now and then, from the calling thread.
    pub progress: &'a (dyn Fn(JobProgress) + Sync),
    /// Bytes per second; none is no limit.
    pub rate_limit: Option<u64>,
}

/// How far a merge is. `total` may grow while the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobProgress {
    /// Bytes done.
    pub done: u64,
    /// Bytes to do.
    pub total: u64,
}
