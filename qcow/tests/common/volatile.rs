//! A file in memory that loses what was not synced.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use knib_qcow::{Error, Storage};

use super::Random;

/// What files that lose power together have in common.
pub struct Power {
    pub ops: AtomicU64,
    /// It fails before operation number `cut`.
    cut: u64,
}

impl Power {
    pub fn new(cut: u64) -> Arc<Self> {
        Arc::new(Self { ops: AtomicU64::new(0), cut })
    }
}

/// A file in memory that remembers what was written since the last sync.
pub struct Volatile {
    state: Mutex<State>,
    pub power: Arc<Power>,
    path: PathBuf,
}

#[derive(Default)]
struct State {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Writes, and cuts to a length, since the last sync.
    pending: Vec<(u64, Option<Vec<u8>>)>,
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
        Self::named("volatile", bytes, &Power::new(cut))
    }
    pub fn named(name: &str, bytes: Vec<u8>, power: &Arc<Power>) -> Arc<Self> {
        let state = State { now: bytes.clone(), durable: bytes, pending: Vec::new() };
        Arc::new(Self { state: Mutex::new(state), power: power.clone(), path: name.into() })
    }
    fn op(&self) -> io::Result<()> {
        if self.power.ops.fetch_add(1, Ordering::Relaxed) >= self.power.cut {
            return Err(io::Error::other("the power failed"));
        }
        Ok(())
    }
    /// What a reader sees now.
    pub fn now(&self) -> Vec<u8> {
        self.state.lock().unwrap().now.clone()
    }
    /// What was synced, and not a byte more.
    pub fn durable(&self) -> Vec<u8> {
        self.state.lock().unwrap().durable.clone()
    }
    /// What is on the disk after the power failed: of what was not synced, any part, by sectors.
    pub fn survivor(&self, random: &mut Random) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut file = state.durable.clone();
        for (at, bytes) in &state.pending {
            let Some(bytes) = bytes else {
                if random.below(2) == 0 {
                    file.resize(*at as usize, 0);
                }
                continue;
            };
            for (i, sector) in bytes.chunks(512).enumerate() {
                if random.below(2) == 0 {
                    apply(&mut file, at + i as u64 * 512, sector);
                }
            }
        }
        file
    }
    /// The same where of what was written only the last has arrived, and the file has its length: what a pointer is worth
    /// that overtakes what it points to.
    pub fn only_the_last(&self) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut file = state.durable.clone();
        for (len, bytes) in &state.pending {
            if bytes.is_none() {
                file.resize(*len as usize, 0);
            }
        }
        if let Some((at, Some(bytes))) = state.pending.last() {
            apply(&mut file, *at, bytes);
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
        state.pending.push((offset, Some(buf.to_vec())));
        Ok(())
    }
    fn writes_past_cache(&self) -> bool {
        true
    }
    fn write_past_cache(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert!([buf.as_ptr().addr(), buf.len(), offset as usize].iter().all(|n| n.is_multiple_of(4096)));
        // Who does not wait for it goes on without it.
        std::thread::sleep(std::time::Duration::from_millis(2));
        self.write_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().now.len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.op()?;
        let mut state = self.state.lock().unwrap();
        state.now.resize(len as usize, 0);
        state.pending.push((len, None));
        Ok(())
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

/// Has `work` done on a disk with `start` that loses power before each of its operations; hands what survives to
/// `judge`, with the number of the operation. Returns what the disk holds when the power fails right after the work.
pub fn every_cut(
    start: &[u8],
    work: &dyn Fn(Arc<dyn Storage>) -> Result<(), Error>,
    judge: &mut dyn FnMut(u64, Vec<u8>),
) -> Vec<u8> {
    let only = |mut files: Vec<Vec<u8>>| files.remove(0);
    let end =
        every_cut_of(&[("volatile", start.to_vec())], &|files| work(files[0].clone()), &mut |cut, files| {
            judge(cut, only(files))
        });
    only(end)
}

pub type WorkOnFiles<'a> = &'a dyn Fn(&[Arc<Volatile>]) -> Result<(), Error>;

/// The same with files that lose power together.
pub fn every_cut_of(
    start: &[(&str, Vec<u8>)],
    work: WorkOnFiles<'_>,
    judge: &mut dyn FnMut(u64, Vec<Vec<u8>>),
) -> Vec<Vec<u8>> {
    let files = |power: &Arc<Power>| -> Vec<Arc<Volatile>> {
        start.iter().map(|(name, bytes)| Volatile::named(name, bytes.clone(), power)).collect()
    };
    let power = Power::new(u64::MAX);
    let whole = files(&power);
    work(&whole).unwrap();
    let ops = power.ops.load(Ordering::Relaxed);
    let mut random = Random(ops.max(1));
    // Where there are few cuts, each has several outcomes looked at: one throw may miss what a sync is for.
    let rounds = (60 / ops.max(1)).clamp(1, 10);
    for cut in 0..ops {
        let files = files(&Power::new(cut));
        let error = work(&files).unwrap_err();
        assert!(error.to_string().contains("the power failed"), "{error}");
        judge(cut, files.iter().map(|file| file.only_the_last()).collect());
        for _ in 0..rounds {
            judge(cut, files.iter().map(|file| file.survivor(&mut random)).collect());
        }
    }
    whole.iter().map(|file| file.durable()).collect()
}
