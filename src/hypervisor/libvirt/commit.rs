//! Merging layers of a disk.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{LibvirtDomain, Session, inspect, persistent, snapshot, users};
use crate::failpoint;
use crate::hypervisor::block_job::{Commit, Disk};
use crate::hypervisor::layers::{self, place, without};
use crate::hypervisor::xml::DiskXml;
use crate::hypervisor::{
    Definition, Guest, GuestVolume, HypervisorError, ImageRef, JobControl, JobProgress, Power, Result,
};

/// Between two looks at a job: short at first, for jobs that are done at once.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOK: Duration = Duration::from_millis(500);
/// libvirt shows the new chain within this after QEMU ended the job.
const SETTLE: Duration = Duration::from_secs(10);

pub(super) fn commit(
    own: &LibvirtDomain,
    session: &Session,
    target: &str,
    top: &Path,
    base: &Path,
    control: &JobControl<'_>,
) -> Result<Vec<ImageRef>> {
    let guest = inspect::inspect(session)?;
    let volume = layers::volume(&guest, target)?;
    let (above, below) = place(volume, &guest.name, top, base)?;
    check_unshared(session, volume, below)?;
    let chain = match guest.power {
        Power::Off => off(own, session, &guest, volume, (above, below), control)?,
        _ => Merge { session, target, volume, above, below, control }.run(own)?,
    };
    persistent::make_name(session, &[(target, &chain)])?;
    Ok(chain)
}

/// Refuses to change an image that anything but this disk stands on.
fn check_unshared(session: &Session, volume: &GuestVolume, below: usize) -> Result<()> {
    let Some(base) = volume.chain.get(below) else { return Ok(()) };
    let other = users::users_of(session, &base.path)?.into_iter().find(|user| {
        user.uuid != Some(session.uuid)
            || user.target != volume.target
            || matches!(user.definition, Definition::Snapshot(_))
    });
    match other {
        Some(user) => Err(HypervisorError::Shared { base: base.path.clone(), user: user.to_string() }),
        None => Ok(()),
    }
}

/// A merge in a domain that runs.
struct Merge<'a> {
    session: &'a Session,
    target: &'a str,
    volume: &'a GuestVolume,
    above: usize,
    below: usize,
    control: &'a JobControl<'a>,
}

impl Merge<'_> {
    fn run(&self, own: &LibvirtDomain) -> Result<Vec<ImageRef>> {
        let uuid = self.session.uuid.to_string();
        let job = Disk { uri: &own.uri, uuid: &uuid, target: self.target };
        let active = self.above == 0;
        let live = self.live_disk()?;
        if !self.running_already(&job, &live)? {
            let (top, base) = (self.name(&live, self.above), self.name(&live, self.below));
            let commit = Commit { top: &top, base: &base, active, rate_limit: self.control.rate_limit };
            job.start_commit(&commit)?.map_err(|why| self.failed(why))?;
        }
        failpoint::hit("commit-started");
        let mut look = FIRST_LOOK;
        loop {
            if self.control.cancel.load(std::sync::atomic::Ordering::Relaxed) {
                return self.stop(&job);
            }
            let Some(info) = job.job()?.map_err(|why| self.failed(why))? else {
                return self.settled();
            };
            (self.control.progress)(JobProgress { done: info.done, total: info.total });
            if active && self.live_disk()?.mirror.is_some_and(|m| m.ready) {
                failpoint::hit("commit-ready");
                match job.pivot()? {
                    Ok(()) => return self.settled(),
                    // The guest wrote in between: it has to catch up once more.
                    Err(why) if why.contains("not ready") => {}
                    Err(why) => return Err(self.failed(why)),
                }
            }
            std::thread::sleep(look);
            look = (look * 2).min(LAST_LOOK);
        }
    }

    /// Whether an earlier call left just this job running.
    fn running_already(&self, job: &Disk<'_>, live: &DiskXml) -> Result<bool> {
        let Some(info) = job.job()?.map_err(|why| self.failed(why))? else { return Ok(false) };
        let base = self.volume.chain.get(self.below).map(|i| i.path.as_path());
        let ours = match &live.mirror {
            Some(mirror) => {
                self.above == 0 && mirror.job == "active-commit" && mirror.path.as_deref() == base
            }
            // libvirt does not say between which layers; what it did is seen when it has ended.
            None => self.above > 0 && info.kind == "Block Commit",
        };
        if ours {
            return Ok(true);
        }
        let (domain, target) = (self.session.name.clone(), self.target.to_owned());
        Err(HypervisorError::JobRunning { domain, target, job: info.kind })
    }

    /// The job has ended: well, if the chain is what it should be.
    fn settled(&self) -> Result<Vec<ImageRef>> {
        let wanted = self.wanted();
        let end = Instant::now() + SETTLE;
        loop {
            let live = self.live_disk()?;
            if live.mirror.is_none() && inspect::chain(&live)? == wanted {
                return Ok(wanted);
            }
            if Instant::now() >= end {
                return Err(
                    self.failed("the job ended but the layers are still there; QEMU's log says why".into())
                );
            }
            std::thread::sleep(FIRST_LOOK);
        }
    }

    fn stop(&self, job: &Disk<'_>) -> Result<Vec<ImageRef>> {
        let stopped = job.abort()?;
        // It may have come to its end just before.
        let chain = inspect::chain(&self.live_disk()?)?;
        match stopped {
            _ if chain == self.wanted() => Ok(chain),
            Ok(()) => Err(HypervisorError::Cancelled { target: self.target.to_owned() }),
            Err(_) if job.job()?.is_ok_and(|j| j.is_none()) => {
                Err(HypervisorError::Cancelled { target: self.target.to_owned() })
            }
            Err(why) => Err(self.failed(format!("it could not be stopped: {why}"))),
        }
    }

    /// The chain without what is merged.
    fn wanted(&self) -> Vec<ImageRef> {
        without(&self.volume.chain, self.above, self.below)
    }

    fn live_disk(&self) -> Result<DiskXml> {
        let now = inspect::current(self.session, inspect::power(self.session)?)?;
        now.disks
            .into_iter()
            .find(|d| d.target == self.target)
            .ok_or_else(|| self.failed("the disk was detached".into()))
    }

    /// libvirt's exact name of a layer, else its path.
    fn name(&self, live: &DiskXml, layer: usize) -> String {
        let index =
            layer.checked_sub(1).map_or(live.index, |below| live.backing.get(below).and_then(|b| b.index));
        match (index, self.volume.chain.get(layer)) {
            (Some(index), _) => format!("{}[{index}]", self.target),
            (None, Some(image)) => image.path.display().to_string(),
            (None, None) => String::new(),
        }
    }

    fn failed(&self, why: String) -> HypervisorError {
        HypervisorError::JobFailed {
            domain: self.session.name.clone(),
            target: self.target.to_owned(),
            top: self.volume.chain.get(self.above).map(|i| i.path.clone()).unwrap_or_default(),
            why,
        }
    }
}

fn off(
    own: &LibvirtDomain,
    session: &Session,
    guest: &Guest,
    volume: &GuestVolume,
    (above, below): (usize, usize),
    control: &JobControl<'_>,
) -> Result<Vec<ImageRef>> {
    snapshot::check_off(guest)?;
    for image in &volume.chain {
        own.images.check_unused(image)?;
    }
    let (Some(layers), Some(base)) = (volume.chain.get(above..below), volume.chain.get(below)) else {
        return Ok(volume.chain.clone());
    };
    own.images.commit(&volume.target, layers, base, control)?;
    failpoint::hit("offline-merged");
    if inspect::power(session)? != Power::Off {
        return Err(HypervisorError::NotNow {
            what: format!("domain \"{}\" was started meanwhile; try again", guest.name),
        });
    }
    if let Some(image) = above.checked_sub(1).and_then(|i| volume.chain.get(i)) {
        own.images.set_backing(&image.path, base)?;
        failpoint::hit("offline-rebased");
    }
    Ok(without(&volume.chain, above, below))
}
