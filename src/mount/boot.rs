//! A disk that notes what a booting guest reads, and has what the last one read decoded ahead.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use knib_fuse::{File, FirstReads, FsResult, Plan};
use parking_lot::Mutex;

use super::moving::OpenDisk;
use crate::store::boot_trace::{BootTrace, Parts};
use crate::store::{Store, VmName, VolumeId};

/// A boot ends after this: what is read later is the guest's work, and no two days of it are the same.
const BOOT: Duration = Duration::from_secs(120);
/// Of the parts that a reader reads first…
const LOOKED_AT: usize = 8;
/// … so many must be of the last boot's, to take it for a boot.
const ALIKE: usize = 3;

/// A flat disk of a backup while it may be booted from.
pub struct BootDisk {
    file: OpenDisk,
    store: Store,
    vm: VmName,
    volume: VolumeId,
    known: Known,
    /// Reads are noted.
    noting: AtomicBool,
    kept: AtomicBool,
    notes: Mutex<Notes>,
}

/// The last boot's trace. Every handle has one, so it is small: twelve bytes a part.
struct Known {
    parts: Arc<[u32]>,
    /// Each part and where it stands in the trace, sorted.
    places: Box<[(u32, u32)]>,
}

impl Known {
    fn new(parts: Arc<[u32]>) -> Self {
        let mut places: Box<[_]> = parts.iter().copied().zip(0..).collect();
        places.sort_unstable();
        Self { parts, places }
    }

    /// Where the part stands; the first of its places, if a damaged trace names it twice.
    fn place(&self, part: u32) -> Option<usize> {
        let at = self.places.partition_point(|(known, _)| *known < part);
        let (known, place) = self.places.get(at)?;
        (*known == part).then_some(*place as usize)
    }
}

#[derive(Default)]
struct Notes {
    first: FirstReads,
    since: Option<Instant>,
    alike: usize,
    plan: Option<Arc<Plan>>,
    /// The place in the trace that the reader reached.
    reached: usize,
}

/// Reads jump ahead in the trace and come back; only what is this near says where the reader is.
const NEAR: usize = 64;

impl BootDisk {
    /// The disk, with what is known of the volume's last boot.
    pub fn new(file: OpenDisk, store: &Store, vm: &VmName, volume: VolumeId) -> Self {
        let trace = store.boot_trace(vm, volume).filter(|t| t.part_bits == FirstReads::PART_BITS);
        let known = Known::new(trace.map(|t| t.parts.0).unwrap_or_default().into());
        Self {
            file,
            store: store.clone(),
            vm: vm.clone(),
            volume,
            known,
            noting: AtomicBool::new(true),
            kept: AtomicBool::new(false),
            notes: Mutex::default(),
        }
    }

    fn note(&self, offset: u64, len: usize) {
        let mut notes = self.notes.lock();
        let notes = &mut *notes;
        if notes.since.get_or_insert_with(Instant::now).elapsed() > BOOT {
            return self.noting.store(false, Ordering::Relaxed);
        }
        let before = notes.first.parts().len();
        let (known, mut at) = (&self.known, None);
        notes.first.note(offset, len, |part| at = known.place(part).or(at));
        if notes.first.is_full() {
            self.noting.store(false, Ordering::Relaxed);
        }
        let Some(at) = at else { return };
        if (notes.reached..notes.reached.saturating_add(NEAR)).contains(&at) {
            notes.reached = at;
        }
        if before < LOOKED_AT {
            notes.alike += 1;
            if notes.alike == ALIKE {
                notes.plan = Some(self.file.foresee(self.known.parts.clone(), notes.reached));
            }
        }
        if let Some(plan) = notes.plan.as_ref().filter(|plan| !plan.is_done()) {
            plan.reached(notes.reached);
        }
    }

    /// Keeps what was noted, where it was a boot's and says something new. Once.
    fn keep(&self) {
        if self.kept.swap(true, Ordering::Relaxed) {
            return;
        }
        let notes = std::mem::take(&mut *self.notes.lock());
        let parts = notes.first.parts();
        if !notes.first.look_like_a_boot() || !says_something_new(&self.known, parts) {
            return;
        }
        let (volume, part_bits) = (self.volume, FirstReads::PART_BITS);
        let trace = BootTrace { volume, part_bits, parts: Parts(parts.to_vec()) };
        if let Err(error) = self.store.keep_boot_trace(&self.vm, &trace) {
            tracing::debug!("what a boot of {} read is not kept: {error}", self.vm);
        }
    }
}

/// Whether what was read is worth keeping in place of what is known. What the kernel holds from the last boot is not read
/// again: a small part of what is known says less, not something new.
fn says_something_new(known: &Known, new: &[u32]) -> bool {
    let alike = new.iter().filter(|part| known.place(**part).is_some()).count();
    let is_part_of_it = alike * 4 >= new.len() * 3 && new.len() * 2 < known.parts.len();
    *known.parts != *new && !is_part_of_it
}

impl Drop for BootDisk {
    fn drop(&mut self) {
        self.keep();
    }
}

impl File for BootDisk {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        if self.noting.load(Ordering::Relaxed) {
            self.note(offset, buf.len());
        }
        self.file.read(offset, buf)
    }

    fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.file.lock()
    }

    fn waits(&self) -> bool {
        self.file.waits()
    }

    fn replied(&self) {
        self.file.replied();
        // A VM runs for days: what was noted is kept as soon as that ends.
        if !self.noting.load(Ordering::Relaxed) && !self.kept.load(Ordering::Relaxed) {
            self.keep();
        }
    }

    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        self.file.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        self.file.next_hole(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_where_they_stand_in_the_trace() {
        let known = Known::new([7, 5, u32::MAX, 0, 5].as_slice().into());
        let places = [0, 1, 5, 7, u32::MAX].map(|part| known.place(part));
        assert_eq!(places, [Some(3), None, Some(1), Some(0), Some(2)]);
        assert_eq!(Known::new([].as_slice().into()).place(0), None);
    }

    #[test]
    fn a_trace_is_replaced_by_another_boot_and_not_by_what_little_was_not_in_the_page_cache() {
        let says = |old: &[u32], new: &[u32]| says_something_new(&Known::new(old.into()), new);
        let old: Vec<u32> = (0..100).collect();
        assert!(says(&[], &old));
        assert!(!says(&old, &old));
        assert!(!says(&old, &old[10..50]), "less of the same");
        assert!(says(&old, &old[10..70]), "most of the same: a guest that reads less now");
        assert!(says(&old, &(200..240).collect::<Vec<_>>()), "another guest");
    }
}
