//! A file in memory that loses what was not synced.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use knib_qcow::Storage;

use super::Random;

/// A file in memory that remembers what was written since the last sync.
pub struct Volatile {
    state: Mutex<State>,
    pub ops: AtomicU64,
    /// The power fails before operation number `cut`.
    cut: u64,
    path: PathBuf,
}

#[derive(Default)]
struct State {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

fn apply(file: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[at as usize..end].copy_from_slice(bytes);
}

impl Volatile {
    pub fn new(bytes: Vec<u8>, cut: u64) -> Arc<Self> {
        let state = State { now: bytes.clone(), durable: bytes, pending: Vec::new() };
        Arc::new(Self { state: Mutex::new(state), ops: AtomicU64::new(0), cut, path: "volatile".into() })
    }
    fn op(&self) -> io::Result<()> {
        if self.ops.fetch_add(1, Ordering::Relaxed) >= self.cut {
            return Err(io::Error::other("the power failed"));
        }
        Ok(())
    }
    /// What is on the disk after the power failed: of what was not synced, any part, by sectors.
    pub fn survivor(&self, random: &mut Random) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut file = state.durable.clone();
        for (at, bytes) in &state.pending {
            for (i, sector) in bytes.chunks(512).enumerate() {
                if random.below(2) == 0 {
                    apply(&mut file, at + i as u64 * 512, sector);
                }
            }
        }
        file
    }
}

impl Storage for Volatile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.state.lock().unwrap();
        let from = (offset as usize).min(state.now.len());
        let n = buf.len().min(state.now.len() - from);
        buf[..n].copy_from_slice(&state.now[from..from + n]);
        Ok(n)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.op()?;
        let mut state = self.state.lock().unwrap();
        apply(&mut state.now, offset, buf);
        state.pending.push((offset, buf.to_vec()));
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().now.len() as u64)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::Error::other("not used when an image is changed in place"))
    }
    fn sync(&self) -> io::Result<()> {
        self.op()?;
        let mut state = self.state.lock().unwrap();
        state.durable = state.now.clone();
        state.pending.clear();
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = (offset + len).min(self.len()?);
        if end > offset { self.write_at(&vec![0; (end - offset) as usize], offset) } else { Ok(()) }
    }
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.set_len(self.len()?.max(offset + len))
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
        &self.path
    }
}
