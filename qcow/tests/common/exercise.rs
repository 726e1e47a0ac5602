//! Everything the engine does, on bytes that anybody may have made. Shared by tests and fuzz targets.

use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use knib_qcow::{
    Amend, Chain, Control, Format, Image, ImageMut, NoImplicit, Preallocation, Repair, Storage, amend,
    bitmap, check, repair, resize, snapshot,
};

/// A file in memory that does not grow without bound.
pub struct Memory(Mutex<Vec<u8>>);

const LIMIT: u64 = 16 << 20;

impl Memory {
    pub fn new(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(bytes.to_vec())))
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.0.lock().unwrap();
        let from = (offset.min(bytes.len() as u64)) as usize;
        let n = buf.len().min(bytes.len() - from);
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        Ok(n)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > LIMIT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = self.0.lock().unwrap();
        if (bytes.len() as u64) < end {
            bytes.resize(end as usize, 0);
        }
        bytes[offset as usize..end as usize].copy_from_slice(buf);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > LIMIT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let whole = bytes.len() as u64;
        let (from, to) = (offset.min(whole), offset.saturating_add(len).min(whole));
        bytes[from as usize..to as usize].fill(0);
        Ok(())
    }
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.set_len(self.len()?.max(offset.saturating_add(len)))
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
    fn path(&self) -> &Path {
        Path::new("hostile")
    }
}

fn quiet<T>(work: impl FnOnce(&Control) -> T) -> T {
    let cancel = AtomicBool::new(false);
    work(&Control { threads: 1, rate_limit: None, cancel: &cancel, progress: &|_| {} })
}

/// Reads, checks and lists; nothing may panic, hang or take memory that the bytes do not justify.
pub fn look(bytes: &[u8]) {
    let storage = Memory::new(bytes);
    if let Ok(chain) = Chain::from_storage(storage.clone(), Format::Qcow2, &NoImplicit) {
        let mut buf = vec![0; chain.size().min(1 << 20) as usize];
        let _ = chain.read_at(&mut buf, 0);
        let end = chain.size().saturating_sub(4096);
        let mut buf = vec![0; (chain.size() - end) as usize];
        let _ = chain.read_at(&mut buf, end);
    }
    if let Ok(image) = Image::open(storage.clone(), &NoImplicit) {
        let _ = quiet(|control| check(&image, control));
    }
    let _ = snapshot::list(&*storage);
    for found in bitmap::list(&*storage).unwrap_or_default() {
        let _ = bitmap::dirty(&*storage, &found.name);
    }
}

/// Changes in every way, each on the bytes as they were.
pub fn change(bytes: &[u8]) {
    let with = |work: &dyn Fn(Arc<Memory>)| work(Memory::new(bytes));
    with(&|s| {
        if let Ok(mut image) = ImageMut::open(s, &NoImplicit) {
            let size = image.size();
            for (at, len) in [(0, 70_000u64), (1000, 5), (size / 2, 1500), (size.saturating_sub(700), 700)] {
                let len = len.min(size.saturating_sub(at));
                let _ = image.write_at(&vec![7; len as usize], at);
                let _ = image.write_zeroes(at, len.min(600));
            }
            let _ = image.discard(0, size.min(1 << 20));
            let _ = image.flush();
        }
    });
    with(&|s| drop(quiet(|c| repair(s, Repair::Leaks, c))));
    with(&|s| {
        if quiet(|c| repair(s.clone(), Repair::All, c)).is_ok() {
            look(&s.0.lock().unwrap().clone());
        }
    });
    with(&|s| {
        drop(quiet(|c| snapshot::create(s.clone(), "new", c).and_then(|_| snapshot::apply(s, "1", c))))
    });
    with(&|s| drop(quiet(|c| snapshot::delete(s, "1", c))));
    with(&|s| drop(quiet(|c| resize(s, &NoImplicit, 5000, true, Preallocation::Off, c))));
    with(&|s| drop(quiet(|c| bitmap::add(s.clone(), "new", 512, false, c))));
    with(&|s| drop(quiet(|c| bitmap::remove(s.clone(), "b", c))));
    let order = Amend { refcount_order: Some(5), ..Amend::default() };
    with(&|s| drop(quiet(|c| amend(s, &NoImplicit, &order, c))));
}
