//! Images by our own hand, to be harmed word by word.

use std::path::Path;
use std::sync::Arc;

use knib_qcow::{Chain, Error, Format, NoImplicit, Storage};

use super::exercise::Memory;

/// A small image by our own hand, clusters of 512 bytes: header, refcount table, refcount block, L1, L2, then data.
pub struct Maker {
    pub bytes: Vec<u8>,
}

pub const CLUSTER: usize = 512;
pub const L2: usize = 4 * CLUSTER;
pub const DATA: usize = 5 * CLUSTER;

impl Maker {
    /// A disk of 20 KiB with data in its first cluster.
    pub fn new() -> Self {
        let mut m = Self { bytes: vec![0; 6 * CLUSTER] };
        for (at, value) in [(0, 0x5146_49fb), (4, 3), (20, 9), (36, 1), (56, 1), (96, 4), (100, 104)] {
            m.put32(at, value);
        }
        m.put64(24, 20 << 10);
        m.put64(40, 3 * CLUSTER as u64);
        m.put64(48, CLUSTER as u64);
        m.put64(CLUSTER, 2 * CLUSTER as u64);
        for cluster in 0..6 {
            m.bytes[2 * CLUSTER + cluster * 2 + 1] = 1;
        }
        m.put64(3 * CLUSTER, L2 as u64 | 1 << 63);
        m.put64(L2, DATA as u64 | 1 << 63);
        m.bytes[DATA..].fill(0x42);
        m
    }
    pub fn put32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    pub fn put64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    pub fn with(mut self, changes: &[(usize, u64)]) -> Self {
        for (at, value) in changes {
            self.put64(*at, *value);
        }
        self
    }
    /// Names a backing file, and its format if one is given.
    pub fn backing(mut self, name: &str, format: Option<&str>) -> Self {
        let mut at = 104;
        if let Some(format) = format {
            at = self.extension(at, 0xe279_2aca, format.as_bytes());
        }
        self.put64(8, at as u64 + 8);
        self.put32(16, name.len() as u32);
        self.bytes[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        self
    }
    pub fn data_file(mut self, name: &str) -> Self {
        self.put64(72, 4);
        self.extension(104, 0x4441_5441, name.as_bytes());
        self
    }
    pub fn extension(&mut self, at: usize, kind: u32, data: &[u8]) -> usize {
        self.put32(at, kind);
        self.put32(at + 4, data.len() as u32);
        self.bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
        at + 8 + data.len().next_multiple_of(8)
    }
    pub fn memory(&self) -> Arc<Memory> {
        Memory::new(&self.bytes)
    }
    pub fn save(&self, path: &Path) {
        std::fs::write(path, &self.bytes).unwrap();
    }
}

pub fn read(storage: Arc<dyn Storage>) -> Result<Vec<u8>, Error> {
    let chain = Chain::from_storage(storage, Format::Qcow2, &NoImplicit)?;
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
