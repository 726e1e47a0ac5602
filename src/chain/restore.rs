//! Restores: what happens to each volume, and what is refused. Rows are those of section 4, "Restore".

use std::path::PathBuf;

use crate::store::DiskName;
use crate::store::manifest::{BackupState, CompressionState, ValidationState};

/// What is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// Row "restoreBackup": the VM that the backup is of.
    SameVm,
    /// Row "restoreVolume…AndAttachToVM": one disk as a new volume of a VM.
    NewVolume,
    /// Row "createVMFromBackup".
    NewVm,
}

/// What is known before a restore.
#[derive(Debug, Clone)]
pub struct Restore {
    /// What is restored.
    pub into: Into,
    /// The VM starts on the mounted backup, and the data is pulled then.
    pub quick: bool,
    /// The host that was named.
    pub host: Option<HostNow>,
    /// The backup.
    pub backup: BackupNow,
    /// The VM that gets the volumes. For a new VM only its offering and kind count.
    pub vm: VmNow,
    /// The disks that are restored.
    pub disks: Vec<DiskNow>,
    /// Where data will lie, a line for each file system.
    pub room: Vec<Room>,
}

/// The host that was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNow {
    /// Its name.
    pub name: String,
    /// Why it cannot be used, if so: unknown, down, another machine.
    pub trouble: Option<String>,
    /// It is where the VM is already.
    pub is_own: bool,
}

/// The backup as it is now.
#[derive(Debug, Clone)]
pub struct BackupNow {
    /// `VM/BACKUP`.
    pub name: String,
    /// Its state.
    pub state: BackupState,
    /// The state of its compression.
    pub compression: CompressionState,
    /// Of its validation.
    pub validation: ValidationState,
    /// What of it, or of what it stands on, cannot be read.
    pub damage: Option<String>,
}

/// The VM as it is now.
#[derive(Debug, Clone)]
pub struct VmNow {
    /// Its name.
    pub name: String,
    /// It has a QEMU: it runs or is paused.
    pub running: bool,
    /// Its memory was saved and would no longer fit its disks.
    pub saved: bool,
    /// It has a domain, which can be started.
    pub has_domain: bool,
    /// Its offering's name, and whether that allows quick restores.
    pub offering: Option<(String, bool)>,
}

/// A disk of the backup and its place on primary.
#[derive(Debug, Clone)]
pub struct DiskNow {
    /// Its name in the backup.
    pub name: DiskName,
    /// Its size in the backup, in bytes.
    pub size: u64,
    /// The size that was asked for, in bytes.
    pub wanted: Option<u64>,
    /// What there is of it on primary.
    pub place: Place,
    /// Who else has its images: other VMs.
    pub others: Vec<String>,
    /// VM snapshots that name its images.
    pub snapshots: Vec<String>,
}

/// Where a volume lies now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// It is a disk of the VM, in a file.
    File,
    /// It is a disk of the VM, on a block device of so many bytes.
    Block {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It is no disk of the VM: never was, or was detached or deleted since.
    Nowhere,
}

/// Room on a file system of primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// A folder there.
    pub folder: PathBuf,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that will be written at most.
    pub wanted: u64,
}

/// What happens to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// "File volumes are written beside and swapped."
    Swap,
    /// "Block devices in place (VM state RestoreError until done)."
    InPlace,
    /// "Volumes deleted or detached since are made again and attached", and every new volume.
    Make,
}

/// Why a restore is refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the sentences say it
pub enum Refused {
    /// "Anything else is refused": `hostId` only with `quickRestore`.
    #[error("--host is only for quick restores: add --quick, or leave out --host")]
    HostWithoutQuick,
    #[error("the host {name} cannot be used: {trouble}")]
    Host { name: String, trouble: String },
    /// Section 2: "an operation that the VM's offering does not allow is refused with a sentence that names both".
    #[error(
        "the offering \"{offering}\" of {vm} does not allow quick restores (its flag allowQuickRestore is off): restore without --quick, or assign the VM to another offering"
    )]
    QuickNotAllowed { vm: String, offering: String },
    #[error(
        "{vm} is plain disk files, so there is nothing that could be started: restore without --quick and --host"
    )]
    NoDomain { vm: String },
    /// Row "restoreBackup (VM stopped, quick too)".
    #[error("{vm} is running: shut it down first{}", if *quick { " (a quick restore starts it again at once)" } else { "" })]
    Running { vm: String, quick: bool },
    #[error("{vm} is running where it is: shut it down before it is started on another host")]
    RunningElsewhere { vm: String },
    #[error(
        "the memory of {vm} was saved by `virsh managedsave`: start it and shut it down, or `virsh managedsave-remove` it"
    )]
    Saved { vm: String },
    #[error("{backup} is {state}, not BackedUp: choose another backup")]
    State { backup: String, state: BackupState },
    #[error(
        "{backup} is being compressed: wait for it to end, or run `knibfs recover` if it was interrupted"
    )]
    Compressing { backup: String },
    #[error("{backup} is NotValid: its guest failed when it was booted; choose another backup")]
    NotValid { backup: String },
    #[error("{backup} cannot be read: {what}")]
    Damaged { backup: String, what: String },
    #[error("{backup} has no disk to restore")]
    Nothing { backup: String },
    #[error("the disk {disk} is in use by another VM: {user}; nothing of it may change under that one")]
    InUse { disk: DiskName, user: String },
    /// "Refused while VM snapshots of those volumes exist."
    #[error("the disk {disk} has snapshots ({snapshots}): remove them first")]
    Snapshots { disk: DiskName, snapshots: String },
    #[error(
        "the disk {disk} needs {size} bytes, and {wanted} were asked for: a smaller disk would lose data"
    )]
    TooSmall { disk: DiskName, size: u64, wanted: u64 },
    #[error("the disk {disk} needs {size} bytes, and the block device {} has {has}: use a larger one, or --storage", path.display())]
    DeviceTooSmall { disk: DiskName, path: PathBuf, size: u64, has: u64 },
    #[error("the disk {disk} lies on the block device {}, which cannot be quick restored in place: name a folder for it with --storage", path.display())]
    QuickOnDevice { disk: DiskName, path: PathBuf },
    #[error("there is not enough room in {}: {free} bytes are free, up to {wanted} are written; free some, or use --storage", folder.display())]
    NoRoom { folder: PathBuf, free: u64, wanted: u64 },
}

/// What happens to each disk, in the order given. Volumes of the VM that are not among them stay as they are.
pub fn restore(asked: &Restore) -> Result<Vec<Action>, Refused> {
    check_request(asked)?;
    check_backup(&asked.backup)?;
    if asked.disks.is_empty() {
        return Err(Refused::Nothing { backup: asked.backup.name.clone() });
    }
    let actions = asked.disks.iter().map(|disk| action(asked, disk)).collect::<Result<_, _>>()?;
    match asked.room.iter().find(|r| r.free < r.wanted) {
        Some(Room { folder, free, wanted }) => {
            Err(Refused::NoRoom { folder: folder.clone(), free: *free, wanted: *wanted })
        }
        None => Ok(actions),
    }
}

fn check_request(asked: &Restore) -> Result<(), Refused> {
    let vm = &asked.vm;
    // "The first two also hostId (… only with quickRestore …)"; createVMFromBackup has deployVirtualMachine's own.
    if asked.host.is_some() && !asked.quick && asked.into != Into::NewVm {
        return Err(Refused::HostWithoutQuick);
    }
    if let Some((name, trouble)) = asked.host.as_ref().and_then(|h| Some((&h.name, h.trouble.as_ref()?))) {
        return Err(Refused::Host { name: name.clone(), trouble: trouble.clone() });
    }
    if let Some((offering, false)) = vm.offering.as_ref().filter(|_| asked.quick) {
        return Err(Refused::QuickNotAllowed { vm: vm.name.clone(), offering: offering.clone() });
    }
    if !vm.has_domain && (asked.quick || asked.host.is_some()) {
        return Err(Refused::NoDomain { vm: vm.name.clone() });
    }
    let elsewhere = asked.host.as_ref().is_some_and(|h| !h.is_own);
    match asked.into {
        Into::SameVm if vm.running => Err(Refused::Running { vm: vm.name.clone(), quick: asked.quick }),
        Into::NewVolume if vm.running && elsewhere => Err(Refused::RunningElsewhere { vm: vm.name.clone() }),
        Into::SameVm | Into::NewVolume if vm.saved => Err(Refused::Saved { vm: vm.name.clone() }),
        _ => Ok(()),
    }
}

fn check_backup(backup: &BackupNow) -> Result<(), Refused> {
    let name = || backup.name.clone();
    if backup.state != BackupState::BackedUp {
        return Err(Refused::State { backup: name(), state: backup.state });
    }
    if matches!(backup.compression, CompressionState::Compressing | CompressionState::FinalizingCompression) {
        return Err(Refused::Compressing { backup: name() });
    }
    if backup.validation == ValidationState::NotValid {
        return Err(Refused::NotValid { backup: name() });
    }
    match &backup.damage {
        Some(what) => Err(Refused::Damaged { backup: name(), what: what.clone() }),
        None => Ok(()),
    }
}

fn action(asked: &Restore, disk: &DiskNow) -> Result<Action, Refused> {
    let name = || disk.name.clone();
    if let Some(user) = disk.others.first() {
        return Err(Refused::InUse { disk: name(), user: user.clone() });
    }
    if !disk.snapshots.is_empty() {
        return Err(Refused::Snapshots { disk: name(), snapshots: disk.snapshots.join(", ") });
    }
    let wanted = disk.wanted.unwrap_or(disk.size);
    if wanted < disk.size {
        return Err(Refused::TooSmall { disk: name(), size: disk.size, wanted });
    }
    match &disk.place {
        _ if asked.into != Into::SameVm => Ok(Action::Make),
        Place::Nowhere => Ok(Action::Make),
        Place::File => Ok(Action::Swap),
        Place::Block { path, .. } if asked.quick => {
            Err(Refused::QuickOnDevice { disk: name(), path: path.clone() })
        }
        Place::Block { path, size } if *size < wanted => {
            Err(Refused::DeviceTooSmall { disk: name(), path: path.clone(), size: wanted, has: *size })
        }
        Place::Block { .. } => Ok(Action::InPlace),
    }
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;
