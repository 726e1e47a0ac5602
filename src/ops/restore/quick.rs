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

/// Where the store is mounted for VMs to run on it.
pub(super) fn place(store: &Store) -> PathBuf {
    store.state_dir().join("mnt")
}

/// Mounts the store where VMs can run on it, if it is not. The mount outlives this program; the journal says already that it
/// is needed.
pub(super) fn mount(store: &Store) -> Result<(), RestoreError> {
    let folder = place(store);
    let failed = |why: String| RestoreError::Mount { path: folder.clone(), why };
    std::fs::create_dir_all(&folder)
        .or_else(|e| if e.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
        .or_else(|e| if e.raw_os_error() == Some(NOTCONN) { Ok(()) } else { Err(e) })
        .map_err(|e| failed(e.to_string()))?;
    match MountPoint::check(&folder, store.root()) {
        Ok(_) => {}
        Err(PlaceError::Mounted(_)) => return Ok(()),
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
    Ok(())
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
        one(store, journal, at, control).map_err(|e| unfinished(&vm, e))?;
        flush(journal, at).map_err(|e| unfinished(&vm, e))?;
        let planned = op(journal)?;
        if let Some(disk) = planned.disks.get(at) {
            let hypervisor = super::swap::hypervisor_of(planned)?;
            hypervisor.set_error_policy(&disk.target, &disk.errors).map_err(|e| unfinished(&vm, e.into()))?;
        }
        failpoint::hit("restore-pulled");
        journal.update_restore(|op| {
            if let Some(disk) = op.disks.get_mut(at) {
                disk.outcome = Outcome::Done;
            }
        })?;
    }
    Ok(trouble)
}

/// Makes what was pulled last. The journal says so first: a crash must not leave the guest stopped.
fn flush(journal: &mut Journal, at: usize) -> Result<(), RestoreError> {
    let planned = op(journal)?.clone();
    let hypervisor = super::swap::hypervisor_of(&planned)?;
    if planned.flushing {
        hypervisor.resume()?;
    }
    let guest = hypervisor.inspect()?;
    let Some(disk) = planned.disks.get(at).filter(|_| guest.power != Power::Off) else {
        return Ok(());
    };
    let volume = crate::hypervisor::volume(&guest, &disk.target)?;
    let Some(live) = volume.chain.first() else { return Ok(()) };
    journal.update_restore(|op| op.flushing = guest.power == Power::Running)?;
    hypervisor.flush(&live.path)?;
    journal.update_restore(|op| op.flushing = false)?;
    Ok(())
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
        return switch_on(journal, &*hypervisor::of(&planned.record)?);
    };
    control.step(format!("starting {} at {uri}", planned.record.name));
    let there = match hypervisor::of(&planned.record) {
        Ok(here) => {
            let there = here.copy_to(uri)?;
            failpoint::hit("restore-copied");
            if let Err(error) = switch_on(journal, &*there) {
                // It stays where it was.
                there.undefine()?;
                return Err(error);
            }
            here.undefine()?;
            failpoint::hit("restore-moved");
            there
        }
        // It has moved already.
        Err(HypervisorError::NoSuchDomain { .. }) => hypervisor::domain(uri, &planned.record.id.to_string())?,
        Err(error) => return Err(error.into()),
    };
    switch_on(journal, &*there)?;
    journal.update_restore(|op| {
        op.move_to = None;
        if let Source::Domain { uri: own, .. } = &mut op.record.source {
            own.clone_from(uri);
        }
    })?;
    super::save(store, journal, true)
}

/// Starts it if it is off, and notes on which mount. A VM that ran already may have its images open on one that is gone.
fn switch_on(journal: &mut Journal, hypervisor: &dyn Hypervisor) -> Result<(), RestoreError> {
    if hypervisor.inspect()?.power == Power::Off {
        let opened = op(journal)?.mount.as_deref().and_then(device);
        journal.update_restore(|op| op.opened = opened)?;
        hypervisor.start()?;
    }
    Ok(())
}

/// It could not be started on another host: it stays on its own.
fn stay(journal: &mut Journal) -> Result<(), StoreError> {
    journal.update_restore(|op| op.move_to = None)
}

/// Pulls one disk, whatever the guest does meanwhile.
fn one(store: &Store, journal: &mut Journal, at: usize, control: &OpControl<'_>) -> Result<(), RestoreError> {
    let planned = op(journal)?.clone();
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
        let step = look(store, journal, disk.target.as_str(), mount, &job, control);
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
    journal: &mut Journal,
    target: &str,
    mount_point: &Path,
    job: &JobControl<'_>,
    control: &OpControl<'_>,
) -> Result<bool, RestoreError> {
    let planned = op(journal)?.clone();
    let hypervisor: Arc<dyn Hypervisor> = super::swap::hypervisor_of(&planned)?;
    // What a crash or a reboot took away is mounted again, for a VM that is off too: whoever looks at a chain looks into it.
    mount(store)?;
    let mut guest = hypervisor.inspect()?;
    if planned.reopening {
        if guest.power == Power::Off && guest.managed_save {
            switch_on(journal, &*hypervisor)?;
            guest = hypervisor.inspect()?;
        }
        // One that runs may have been started, or not have been saved: it opens them once more.
        journal.update_restore(|op| op.reopening = false)?;
    }
    if guest.power == Power::Off {
        let volume = crate::hypervisor::volume(&guest, target)?;
        let Some(live) = volume.chain.first() else { return Ok(true) };
        return pull::offline(store, &planned, target, live, mount_point, &*hypervisor, job);
    }
    open_anew(journal, &*hypervisor, mount_point, control)?;
    go_on(&planned, &*hypervisor, control)?;
    match hypervisor.pull(target, mount_point, job)? {
        Pulled::Done => go_on(&planned, &*hypervisor, control).map(|()| true),
        Pulled::Off => Ok(false),
    }
}

/// Lets a VM that had its images open on a mount that is gone open them on the one that is there.
fn open_anew(
    journal: &mut Journal,
    hypervisor: &dyn Hypervisor,
    mount_point: &Path,
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    let now = device(mount_point);
    if op(journal)?.opened.is_none_or(|opened| Some(opened) == now) {
        return Ok(());
    }
    let vm = &journal.entry().vm;
    control.step(format!("{vm} runs on a mount that died: its images are opened anew"));
    journal.update_restore(|op| op.reopening = true)?;
    hypervisor.reopen()?;
    journal.update_restore(|op| (op.reopening, op.opened) = (false, now))?;
    Ok(())
}

/// A VM that could not read its disks was paused, and goes on now that it can.
fn go_on(
    planned: &RestoreOp,
    hypervisor: &dyn Hypervisor,
    control: &OpControl<'_>,
) -> Result<(), RestoreError> {
    if hypervisor.resume_after_error()? {
        control.step(format!("{} was paused by an I/O error: it goes on", planned.record.name));
    }
    Ok(())
}

/// Device number of what is mounted there. Another mount has another one as long as a QEMU has files of the first open.
pub(super) fn device(folder: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(folder).ok().map(|m| m.dev())
}

fn is_served(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|s| s.f_type == FUSE)
}

/// `FUSE_SUPER_MAGIC`.
const FUSE: rustix::fs::FsWord = 0x6573_5546;
