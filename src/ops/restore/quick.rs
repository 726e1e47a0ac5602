//! Quick restores: the mount that the VM runs on, its start, and pulling the data until the mount is not needed any more.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{RestoreError, op, pull};
use crate::failpoint;
use crate::hypervisor::{Hypervisor, HypervisorError, JobControl, JobProgress, Power, Pulled};
use crate::mount::{MountPoint, PlaceError, unmount_unless_busy};
use crate::ops::control::{Event, OpControl};
use crate::ops::hypervisor;
use crate::store::journal::{Journal, Operation, Outcome};
use crate::store::restore_op::{RestoreOp, RestoreStep};
use crate::store::vm::Source;
use crate::store::{Store, StoreError, VmName};

/// A libvirt that is restarted is back within this.
const LIBVIRT_BACK: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(500);

/// Mounts the store where VMs can run on it, if it is not; the folder. It outlives this program.
pub(super) fn mount(store: &Store) -> Result<PathBuf, RestoreError> {
    let folder = store.state_dir().join("mnt");
    let failed = |why: String| RestoreError::Mount { path: folder.clone(), why };
    std::fs::create_dir_all(&folder)
        .or_else(|e| if e.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
        .or_else(|e| if e.raw_os_error() == Some(NOTCONN) { Ok(()) } else { Err(e) })
        .map_err(|e| failed(e.to_string()))?;
    match MountPoint::check(&folder, store.root()) {
        Ok(_) => {}
        Err(PlaceError::Mounted(_)) => return Ok(folder),
        Err(e) => return Err(failed(e.to_string())),
    }
    let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let output = Command::new(program)
        .arg("--store")
        .arg(store.root())
        .args(["mount", "--allow-other", "--log-dir"])
        .arg(store.state_dir())
        .arg("--")
        .arg(&folder)
        // Places to be killed at are counted in this process.
        .env_remove(failpoint::ENV)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(said.trim().trim_start_matches("knibfs: ").to_owned()));
    }
    Ok(folder)
}

/// `ENOTCONN`: the server of a mount is dead.
const NOTCONN: i32 = 107;

/// Takes the mount away when no other quick restore needs it. One that somebody looks into stays.
pub(super) fn release(store: &Store, folder: &Path) {
    let needed = |op: &Operation| matches!(op, Operation::Restore(op) if op.mount.as_deref() == Some(folder));
    match store.unfinished() {
        Ok(all) if !all.iter().any(|j| needed(&j.entry().operation)) => {}
        _ => return,
    }
    if let Err(error) = unmount_unless_busy(folder) {
        tracing::warn!("the store stays mounted for quick restores: {error}");
    }
}

/// Starts the VM and pulls its data to the end. Why it could not be started, if so: the data is pulled all the same.
pub(super) fn finish(
    store: &Store,
    journal: &mut Journal,
    control: &OpControl<'_>,
) -> Result<Option<String>, RestoreError> {
    let vm = journal.entry().vm.clone();
    mount(store).map_err(|e| unfinished(&vm, e))?;
    let mut trouble = None;
    if op(journal)?.step == RestoreStep::Start {
        match start(store, journal, control) {
            Ok(()) => {}
            Err(RestoreError::Hypervisor(error)) => {
                control.warn(format!("{vm} could not be started: {error}"));
                trouble = Some(error.to_string());
                stay(journal)?;
            }
            Err(error) => return Err(unfinished(&vm, error)),
        }
        failpoint::hit("restore-started");
        journal.update_restore(|op| op.step = RestoreStep::Pull)?;
    }
    for at in 0..op(journal)?.disks.len() {
        if op(journal)?.disks.get(at).is_none_or(|d| d.outcome == Outcome::Done) {
            continue;
        }
        one(store, op(journal)?, at, control).map_err(|e| unfinished(&vm, e))?;
        failpoint::hit("restore-pulled");
        journal.update_restore(|op| {
            if let Some(disk) = op.disks.get_mut(at) {
                disk.outcome = Outcome::Done;
            }
        })?;
    }
    Ok(trouble)
}

fn unfinished(vm: &VmName, error: RestoreError) -> RestoreError {
    let left = format!(
        "{vm} stands on the mounted backup until all data is pulled: what its guest wrote is safe, and the backup is kept"
    );
    let error = match error {
        RestoreError::Cancelled | RestoreError::Hypervisor(HypervisorError::Cancelled { .. }) => {
            RestoreError::cannot(vm, "pulling its data was stopped as asked")
        }
        error => error,
    };
    RestoreError::Unfinished { error: Box::new(error), left }
}

/// Starts it, on the host that it is to be on.
fn start(store: &Store, journal: &mut Journal, control: &OpControl<'_>) -> Result<(), RestoreError> {
    let planned = op(journal)?.clone();
    let Some(uri) = &planned.move_to else {
        control.step(format!("starting {}", planned.record.name));
        return Ok(hypervisor::of(&planned.record)?.start()?);
    };
    control.step(format!("starting {} at {uri}", planned.record.name));
    let there = match hypervisor::of(&planned.record) {
        Ok(here) => {
            let there = here.copy_to(uri)?;
            failpoint::hit("restore-copied");
            if let Err(error) = there.start() {
                // It stays where it was.
                there.undefine()?;
                return Err(error.into());
            }
            here.undefine()?;
            failpoint::hit("restore-moved");
            there
        }
        // It has moved already.
        Err(HypervisorError::NoSuchDomain { .. }) => hypervisor::domain(uri, &planned.record.id.to_string())?,
        Err(error) => return Err(error.into()),
    };
    there.start()?;
    journal.update_restore(|op| {
        op.move_to = None;
        if let Source::Domain { uri: own, .. } = &mut op.record.source {
            own.clone_from(uri);
        }
    })?;
    super::save(store, journal, true)
}

/// It could not be started on another host: it stays on its own.
fn stay(journal: &mut Journal) -> Result<(), StoreError> {
    journal.update_restore(|op| op.move_to = None)
}

/// Pulls one disk, whatever the guest does meanwhile.
fn one(store: &Store, planned: &RestoreOp, at: usize, control: &OpControl<'_>) -> Result<(), RestoreError> {
    let (Some(disk), Some(mount)) = (planned.disks.get(at), planned.mount.as_deref()) else { return Ok(()) };
    let what = format!("pulling {}", disk.target);
    let begun = std::sync::atomic::AtomicBool::new(false);
    let progress = |p: JobProgress| {
        if p.total > 0 && !begun.swap(true, std::sync::atomic::Ordering::Relaxed) {
            (control.progress)(Event::Begin { what: what.clone(), total: p.total });
        }
        (control.progress)(Event::Advance { what: what.clone(), done: p.done });
    };
    let job = JobControl { cancel: control.cancel, progress: &progress, rate_limit: planned.rate };
    let mut lost = None;
    loop {
        if control.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        let step = look(store, planned, disk.target.as_str(), mount, &job, control);
        match step {
            Ok(true) => break,
            Ok(false) => {}
            Err(RestoreError::Hypervisor(HypervisorError::Unreachable { .. })) if still(&mut lost) => {
                std::thread::sleep(LOOK);
                continue;
            }
            // The job fails when the mount's server dies: the next attempt mounts anew.
            Err(RestoreError::Hypervisor(HypervisorError::PullFailed { .. })) if !is_served(mount) => {}
            Err(error) => return Err(error),
        }
        lost = None;
    }
    (control.progress)(Event::End { what });
    Ok(())
}

/// libvirt may be restarted.
fn still(lost: &mut Option<Instant>) -> bool {
    lost.get_or_insert_with(Instant::now).elapsed() < LIBVIRT_BACK
}

/// One attempt; whether all is pulled.
fn look(
    store: &Store,
    planned: &RestoreOp,
    target: &str,
    mount_point: &Path,
    job: &JobControl<'_>,
    control: &OpControl<'_>,
) -> Result<bool, RestoreError> {
    let hypervisor: Arc<dyn Hypervisor> = super::swap::hypervisor_of(planned)?;
    // Also when the server of the mount died: whoever looks at a chain looks into it.
    let mounted_anew = revive(store, mount_point)?;
    let guest = hypervisor.inspect()?;
    if guest.power == Power::Off {
        let volume = crate::hypervisor::volume(&guest, target)?;
        let Some(live) = volume.chain.first() else { return Ok(true) };
        return pull::offline(store, planned, target, live, mount_point, &*hypervisor, job);
    }
    if mounted_anew {
        control
            .step(format!("{} runs on a mount that died: its images are opened anew", planned.record.name));
        hypervisor.reopen()?;
    }
    match hypervisor.pull(target, mount_point, job)? {
        Pulled::Done => Ok(true),
        Pulled::Off => Ok(false),
    }
}

/// Mounts again what a crash or a reboot took away; whether it did.
fn revive(store: &Store, folder: &Path) -> Result<bool, RestoreError> {
    let before = is_served(folder);
    mount(store)?;
    Ok(!before)
}

fn is_served(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|s| s.f_type == FUSE)
}

/// `FUSE_SUPER_MAGIC`.
const FUSE: rustix::fs::FsWord = 0x6573_5546;
