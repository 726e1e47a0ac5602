//! Pulling the data of a disk's backing files into its live image, while the domain runs.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{LibvirtDomain, Session, inspect, persistent};
use crate::failpoint;
use crate::hypervisor::block_job::Disk;
use crate::hypervisor::xml::DiskXml;
use crate::hypervisor::{HypervisorError, JobControl, JobProgress, Power, Pulled, Result};

/// libvirt's word for the job.
const KIND: &str = "Block Pull";
/// Between two looks at the job.
const LOOK: Duration = Duration::from_millis(300);
/// libvirt shows the new chain within this after QEMU ended the job.
const SETTLE: Duration = Duration::from_secs(4);
/// libvirt notices within this that QEMU is gone.
const NOTICED: Duration = Duration::from_secs(2);

/// Pulls until nothing of `target` stands on an image below `foreign`, or the domain is off.
pub(super) fn pull(
    own: &LibvirtDomain,
    session: &Session,
    target: &str,
    foreign: &Path,
    control: &JobControl<'_>,
) -> Result<Pulled> {
    let uuid = session.uuid.to_string();
    let job = Disk { uri: &own.uri, uuid: &uuid, target };
    let failed = |why: String| HypervisorError::PullFailed {
        domain: session.name.clone(),
        target: target.to_owned(),
        why,
    };
    let mut ended: Option<Instant> = None;
    loop {
        if inspect::power(session)? == Power::Off {
            return Ok(Pulled::Off);
        }
        let Some(disk) = live(session, target)? else {
            return if is_off(session)? {
                Ok(Pulled::Off)
            } else {
                Err(failed("the disk was detached".into()))
            };
        };
        let chain = inspect::chain(&disk);
        let info = match job.job()? {
            Ok(info) => info,
            Err(_) if is_off(session)? => return Ok(Pulled::Off),
            Err(why) => return Err(failed(why)),
        };
        match info {
            Some(info) if info.kind == KIND => {
                if control.cancel.load(Ordering::Relaxed) {
                    // One that has just come to its end needs no end.
                    let _ = job.abort()?;
                    return Err(HypervisorError::Cancelled { target: target.to_owned() });
                }
                (control.progress)(JobProgress { done: info.done, total: info.total });
                ended = None;
            }
            Some(info) => {
                let (domain, target) = (session.name.clone(), target.to_owned());
                return Err(HypervisorError::JobRunning { domain, target, job: info.kind });
            }
            None => {
                let chain = chain?;
                if !chain.iter().any(|i| i.path.starts_with(foreign)) {
                    persistent::make_name(session, &[(target, &chain)])?;
                    return Ok(Pulled::Done);
                }
                if control.cancel.load(Ordering::Relaxed) {
                    return Err(HypervisorError::Cancelled { target: target.to_owned() });
                }
                match ended {
                    None => {
                        match job.start_pull(control.rate_limit)? {
                            Ok(()) => {}
                            Err(_) if is_off(session)? => return Ok(Pulled::Off),
                            Err(why) => return Err(failed(why)),
                        }
                        failpoint::hit("pull-started");
                        ended = Some(Instant::now());
                        continue;
                    }
                    // It ended, or libvirt does not show the new chain yet.
                    Some(since) if since.elapsed() >= SETTLE => {
                        return Err(failed(
                            "the job ended before all was read; QEMU's log and the mount's say why".into(),
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// QEMU keeps tables of what was pulled in memory until the guest flushes, and the header does not name the backing file any
/// more: a QEMU that is killed before would lose what was pulled. A stop flushes all. Its caches first, so that the
/// guest stands still for a moment only.
pub(super) fn flush(session: &Session, path: &Path) -> Result<()> {
    std::fs::File::open(path).and_then(|f| f.sync_all()).map_err(HypervisorError::io("flush", path))?;
    match inspect::power(session)? {
        Power::Running => {
            session.ask("flush the disks", |domain| domain.suspend())?;
            failpoint::hit("pull-flushing");
            session.ask("resume", |domain| domain.resume())
        }
        // libvirt does not stop what is stopped; QEMU does, and flushes.
        Power::Paused => session.ask("flush the disks", |domain| {
            domain.qemu_monitor_command("{\"execute\":\"stop\"}", 0).map(drop)
        }),
        Power::Off => Ok(()),
    }
}

/// Lets one go on that QEMU paused because of an I/O error.
pub(super) fn resume_after_error(session: &Session) -> Result<bool> {
    let stopped = inspect::power(session)? == Power::Paused && inspect::is_stopped_by_error(session)?;
    if stopped {
        session.ask("resume", |domain| domain.resume())?;
    }
    Ok(stopped)
}

/// Lets one that is paused go on.
pub(super) fn resume(session: &Session) -> Result<()> {
    match inspect::power(session)? {
        Power::Paused => session.ask("resume", |domain| domain.resume()),
        Power::Running | Power::Off => Ok(()),
    }
}

/// Whether the domain is off, or will be in a moment: QEMU's answers fail before libvirt has noticed that it died.
fn is_off(session: &Session) -> Result<bool> {
    let until = Instant::now() + NOTICED;
    loop {
        if inspect::power(session)? == Power::Off {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn live(session: &Session, target: &str) -> Result<Option<DiskXml>> {
    let now = inspect::current(session, inspect::power(session)?)?;
    Ok(now.disks.into_iter().find(|d| d.target == target))
}
