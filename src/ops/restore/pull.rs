//! Pulling the data of a VM that is off: the engine copies what the overlay does not hold yet, straight from the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use knib_qcow::{
    Access, Backing, Chain, ExtentKind, FileStorage, Format, Gate, ImageMut, Implicit, Locking, Source as _,
    Storage, set_backing,
};

use super::RestoreError;
use crate::failpoint;
use crate::hypervisor::{DiskPlace, Hypervisor, ImageRef, JobControl, JobProgress};
use crate::ops::disk_source::DiskSource;
use crate::store::Store;
use crate::store::restore_op::RestoreOp;
use crate::verified::VerifiedReader;

/// Bytes that are copied at once.
const STEP: u64 = 1 << 20;

/// Copies what is missing and drops the name of the backing file. Whether it is done: false where the VM was started
/// before the image could be locked.
pub(super) fn offline(
    store: &Store,
    planned: &RestoreOp,
    target: &str,
    live: &ImageRef,
    mount: &Path,
    hypervisor: &dyn Hypervisor,
    job: &JobControl<'_>,
) -> Result<bool, RestoreError> {
    let Some(disk) = planned.disks.iter().find(|d| d.target == target) else { return Ok(true) };
    let path = &live.path;
    let failed = |e| RestoreError::write(path, e);
    let storage = match FileStorage::open_with(path, Access::ReadWrite, Locking::Writer) {
        Ok(storage) => storage,
        Err(knib_qcow::Error::InUse { .. }) => {
            std::thread::sleep(Duration::from_millis(200));
            return Ok(false);
        }
        Err(e) => return Err(failed(e)),
    };
    let own = Chain::from_storage(storage.clone(), Format::Qcow2, &NothingBelow).map_err(failed)?;
    let below = knib_qcow::Header::parse(&*storage).map_err(failed)?.backing;
    // One that names nothing may be of a QEMU that was killed before it had written all that it had pulled: what it does
    // not hold is copied as well.
    if below.as_ref().is_some_and(|name| !Path::new(name).starts_with(mount)) {
        // Someone put an image of their own between; that one is to be merged first.
        return Err(RestoreError::cannot(
            &planned.record.name,
            format!(
                "{} does not stand on the mounted backup: was a snapshot taken? merge it first",
                path.display()
            ),
        ));
    }
    let manifest = store.manifest(&planned.of, &planned.name)?;
    let reader = VerifiedReader::new(store.clone(), "a restore");
    let open = || {
        DiskSource::open(store, &reader, &manifest, &disk.from)
            .map_err(|why| RestoreError::Read { disk: disk.from.clone(), why })
    };
    copy(&storage, &own, &open()?, Below(open()?), job).map_err(failed)?;
    drop((own, storage));
    failpoint::hit("restore-copied-offline");
    if below.is_some() {
        set_backing(path, None, None).map_err(failed)?;
    }
    failpoint::hit("restore-flat");
    let place = DiskPlace {
        target: target.to_owned(),
        chain: vec![live.clone()],
        model: None,
        errors: Some(disk.errors.clone()),
    };
    hypervisor.place(&[place])?;
    Ok(true)
}

fn copy(
    storage: &Arc<FileStorage>,
    own: &Chain,
    source: &DiskSource,
    below: Below,
    job: &JobControl<'_>,
) -> knib_qcow::Result<()> {
    let mut image = ImageMut::open_over(storage.clone(), &NothingBelow, Some(Box::new(below)))?;
    let end = source.size().min(image.size());
    let (mut at, mut copied, begun) = (0, 0u64, Instant::now());
    let mut buf = knib_qcow::PageBuf::default();
    let stopped = || job.cancel.load(Ordering::Relaxed);
    while let Some(run) = source.next(at)?.filter(|r| r.start < end) {
        at = run.start;
        let stop = (run.start + run.len).min(end);
        while at < stop {
            if stopped() {
                image.flush()?;
                return Err(knib_qcow::Error::Cancelled);
            }
            let extent = own.top_extent_at(1, at)?;
            let len = extent.len.min(stop - at).min(STEP);
            if extent.kind == ExtentKind::Absent {
                buf.set_len(len as usize);
                source.read(at, &mut buf)?;
                if buf.iter().any(|b| *b != 0) {
                    image.write_at(&buf, at)?;
                }
                copied += len;
                pace(job, begun, copied);
            }
            at += len;
            (job.progress)(JobProgress { done: at, total: end });
        }
    }
    image.flush()
}

/// Waits until `done` bytes fit the rate.
fn pace(job: &JobControl<'_>, begun: Instant, done: u64) {
    let Some(rate) = job.rate_limit.filter(|r| *r > 0) else { return };
    #[allow(clippy::cast_precision_loss)] // a pause, not an amount
    let due = Duration::from_secs_f64(done as f64 / rate as f64);
    while let Some(left) = due.checked_sub(begun.elapsed()).filter(|_| !job.cancel.load(Ordering::Relaxed)) {
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// The disk of the backup, as what the overlay shows where it holds nothing.
struct Below(DiskSource);

impl Backing for Below {
    fn read(&self, buf: &mut [u8], offset: u64) -> knib_qcow::Result<()> {
        let inside = self.0.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (front, past) = buf.split_at_mut(inside);
        past.fill(0);
        if front.is_empty() { Ok(()) } else { self.0.read(offset, front) }
    }

    fn size(&self) -> u64 {
        self.0.size()
    }
}

/// What the header names is not opened: only what the image itself holds is asked for.
struct NothingBelow;

impl Gate for NothingBelow {
    fn open(
        &self,
        _: &Path,
        _: Implicit,
        name: &str,
        _: Option<&str>,
    ) -> knib_qcow::Result<(Arc<dyn Storage>, Format)> {
        Ok((Arc::new(Empty(PathBuf::from(name))), Format::Raw))
    }
}

/// A file of no bytes.
struct Empty(PathBuf);

impl Storage for Empty {
    fn read_at(&self, _: &mut [u8], _: u64) -> std::io::Result<usize> {
        Ok(0)
    }
    fn write_at(&self, _: &[u8], _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn len(&self) -> std::io::Result<u64> {
        Ok(0)
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn reserve(&self, _: u64, _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn next_data(&self, _: u64) -> std::io::Result<Option<u64>> {
        Ok(None)
    }
    fn next_hole(&self, offset: u64) -> std::io::Result<u64> {
        Ok(offset)
    }
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
    fn path(&self) -> &Path {
        &self.0
    }
}
