//! A file that is left to the page cache: what is written to it may be lost when the power fails.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use knib_qcow::{FileStorage, Storage};

/// A file whose syncs do nothing, for `-t unsafe`.
pub struct Unsynced(pub Arc<FileStorage>);

impl Storage for Unsynced {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn copy_from(&self, source: &dyn Storage, from: u64, offset: u64, len: u64) -> u64 {
        self.0.copy_from(source, from, offset, len)
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.descriptor()
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.reserve(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.0.next_hole(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
    fn identity(&self) -> Option<(u64, u64)> {
        self.0.identity()
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}
