//! Decoded records, shared by all sums files of a process and bounded in bytes.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Region;

/// A cache of regions. No lock is held while a region is read or decoded.
#[derive(Debug)]
pub struct SumsCache {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<(u64, u64), Held>,
    bytes: usize,
    clock: u64,
}

#[derive(Debug)]
struct Held {
    region: Arc<Region>,
    used: u64,
}

impl SumsCache {
    /// A cache of at most `limit` bytes (and always of one region).
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::new(State::default()) })
    }

    pub(super) fn get(&self, file: u64, region: u64) -> Option<Arc<Region>> {
        let mut state = self.state.lock();
        state.clock += 1;
        let now = state.clock;
        let held = state.held.get_mut(&(file, region))?;
        held.used = now;
        Some(held.region.clone())
    }

    pub(super) fn put(&self, file: u64, region: u64, decoded: &Arc<Region>) {
        let mut state = self.state.lock();
        state.clock += 1;
        let held = Held { region: decoded.clone(), used: state.clock };
        state.bytes += decoded.weight();
        if let Some(old) = state.held.insert((file, region), held) {
            state.bytes -= old.region.weight();
        }
        if state.bytes > self.limit {
            state.make_room(self.limit);
        }
    }

    /// Drops what belongs to a file that is closed.
    pub(super) fn forget(&self, file: u64) {
        let mut state = self.state.lock();
        state.held.retain(|(of, _), _| *of != file);
        state.bytes = state.held.values().map(|h| h.region.weight()).sum();
    }

    /// Bytes held now.
    pub fn bytes(&self) -> usize {
        self.state.lock().bytes
    }
}

impl State {
    /// Drops the least used until a quarter is free: sorting now and then is cheaper than a list on every hit.
    fn make_room(&mut self, limit: usize) {
        let mut by_use: Vec<_> = self.held.iter().map(|(key, held)| (held.used, *key)).collect();
        by_use.sort_unstable();
        by_use.pop(); // the newest stays, whatever its size
        for (_, key) in by_use {
            if self.bytes <= limit / 4 * 3 {
                break;
            }
            if let Some(old) = self.held.remove(&key) {
                self.bytes -= old.region.weight();
            }
        }
    }
}
