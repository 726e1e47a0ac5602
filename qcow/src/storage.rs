//! Where an image's bytes lie: a file or block device, or a stand-in that tests make fail.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::lock::{self, Locking};
use crate::{Error, Result};

/// Bytes at offsets; shared by threads.
pub trait Storage: Send + Sync {
    /// Reads at `offset` (bytes); fewer bytes than asked for only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `buf` at `offset`, growing the file where needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether there are no bytes at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or grows to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes all that was written durable.
    fn sync(&self) -> io::Result<()>;
    /// Whether [`Storage::write_past_cache`] does what its name says.
    fn writes_past_cache(&self) -> bool {
        false
    }
    /// Writes all of `buf` without leaving it in the page cache, where the system can do that with this piece: its address,
    /// length and offset are multiples of 4096. Not durable before [`Storage::sync`] either.
    fn write_past_cache(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }
    /// Asks the system to begin with writing a range to the device, without waiting: less is left for [`Storage::sync`].
    fn begin_write_back(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
    /// Has the system copy `len` bytes at `from` of another file to `offset`, without them passing through this process;
    /// on file systems that can share space they take none. Returns how many it did, from the first on: what is left, all
    /// of it where it cannot do this, is for the caller to read and write, who is then told of errors.
    fn copy_from(&self, source: &dyn Storage, from: u64, offset: u64, len: u64) -> u64 {
        let _ = (source, from, offset, len);
        0
    }
    /// The file, where the system may copy out of it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Makes a range read as zeros, and frees its space where the file system can.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves space for a range, whose bytes stay what they are, and grows the file where it is shorter.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The first byte at or after `offset` that may hold data; `None` when only a hole follows.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// The first byte at or after `offset` that lies in a hole (the end of the file is one).
    fn next_hole(&self, offset: u64) -> io::Result<u64>;
    /// Bytes that the file occupies on its file system.
    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
    /// Device and inode, by which a loop of backing files is noticed.
    fn identity(&self) -> Option<(u64, u64)>;
    /// The path, for messages.
    fn path(&self) -> &Path;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read only.
    Read,
    /// To read and write.
    ReadWrite,
}

/// A file or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    block_device: bool,
    /// The same file without the page cache, once it was asked for and unless that failed.
    direct: OnceLock<Option<File>>,
    /// A write that way failed, and no more are tried.
    direct_failed: AtomicBool,
    /// It was made here, and its name in its folder is not durable yet.
    unnamed: AtomicBool,
}

impl FileStorage {
    /// Opens a file that exists: to read without locks, to write with a writer's ([`Error::InUse`] when another
    /// process has it open).
    pub fn open(path: &Path, access: Access) -> Result<Arc<Self>> {
        let locking = if access == Access::ReadWrite { Locking::Writer } else { Locking::Off };
        Self::open_with(path, access, locking)
    }

    /// Opens a file that exists, with the locks that the caller wants on it until it is dropped.
    pub fn open_with(path: &Path, access: Access, locking: Locking) -> Result<Arc<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(path)
            .map_err(|e| Error::io(path, "opening", e))?;
        Self::from_file(file, path, locking)
    }

    /// Makes a file that must not exist yet, with a writer's locks. Its name is durable when [`Storage::sync`] has returned.
    pub fn create_new(path: &Path) -> Result<Arc<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| Error::io(path, "creating", e))?;
        let storage = Self::from_file(file, path, Locking::Writer)?;
        storage.unnamed.store(true, Ordering::Relaxed);
        Ok(storage)
    }

    fn from_file(file: File, path: &Path, locking: Locking) -> Result<Arc<Self>> {
        let meta = file.metadata().map_err(|e| Error::io(path, "reading the attributes", e))?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(Error::unsupported(
                path,
                "is neither a file nor a block device, so it cannot be an image",
            ));
        }
        locking.take(&file, path)?;
        Ok(Arc::new(Self {
            file,
            path: path.to_owned(),
            block_device,
            direct: OnceLock::new(),
            direct_failed: AtomicBool::new(false),
            unnamed: AtomicBool::new(false),
        }))
    }

    fn direct(&self) -> Option<&File> {
        if self.direct_failed.load(Ordering::Relaxed) {
            return None;
        }
        let open = || {
            let flags = rustix::fs::fcntl_getfl(&self.file).ok()?;
            if !flags.contains(rustix::fs::OFlags::RDWR) {
                return None;
            }
            // By the descriptor: the path may lead elsewhere by now.
            let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
            OpenOptions::new().write(true).custom_flags(flags).open(same).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// Whether it is a block device, whose length is fixed.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        lock::release(&self.file);
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            return rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0)).map_err(Into::into);
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            return if len <= self.len()? {
                Ok(())
            } else {
                Err(io::Error::new(io::ErrorKind::StorageFull, "the block device is too small"))
            };
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        if self.unnamed.load(Ordering::Relaxed) {
            let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            match File::open(folder)?.sync_all() {
                // There are file systems that know no flush of a folder.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                done => done?,
            }
            self.unnamed.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    fn writes_past_cache(&self) -> bool {
        self.direct().is_some()
    }

    fn write_past_cache(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self.direct().map(|file| file.write_all_at(buf, offset)) {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) => {
                // File systems differ in what they take that way. An error that is one comes up again.
                self.direct_failed.store(true, Ordering::Relaxed);
                self.write_at(buf, offset)
            }
            None => self.write_at(buf, offset),
        }
    }

    fn begin_write_back(&self, offset: u64, len: u64) {
        // What this advice does first is to start writing what is dirty; it waits for nothing and may be ignored.
        let len = std::num::NonZeroU64::new(len);
        let _ = rustix::fs::fadvise(&self.file, offset, len, rustix::fs::Advice::DontNeed);
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, offset: u64, len: u64) -> u64 {
        let Some(source) = source.descriptor() else { return 0 };
        let (mut from, mut to, mut left) = (from, offset, len);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let copied =
                rustix::fs::copy_file_range(source, Some(&mut from), &self.file, Some(&mut to), most);
            match copied {
                Ok(n) if n > 0 => left = left.saturating_sub(n as u64),
                Err(rustix::io::Errno::INTR) => {}
                // The end of the source, files that lie too far apart, or an error that will come up again.
                _ => break,
            }
        }
        len - left
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags as F;
        let end = offset.saturating_add(len).min(self.len()?);
        if end <= offset {
            return Ok(());
        }
        if rustix::fs::fallocate(&self.file, F::PUNCH_HOLE | F::KEEP_SIZE, offset, end - offset).is_ok() {
            return Ok(());
        }
        // Not every file system and device can punch holes; zeros that are written read the same.
        let zeros = vec![0u8; 1 << 20];
        let mut at = offset;
        while at < end {
            let n = (end - at).min(zeros.len() as u64) as usize;
            self.write_at(&zeros[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.block_device || len == 0 {
            return Ok(());
        }
        rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), offset, len)
            .map_err(Into::into)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let end = self.len()?;
        if offset >= end {
            return Ok(None);
        }
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A block device or file system without the call holds data everywhere.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(e) => Err(e.into()),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(offset)) {
            Ok(at) => Ok(at),
            Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                self.len()
            }
            Err(e) => Err(e.into()),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.file.metadata().ok().map(|m| (m.dev(), m.ino()))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads exactly `buf.len()` bytes; an image that ends before is damaged.
pub(crate) fn read_exact(storage: &dyn Storage, buf: &mut [u8], offset: u64, what: &str) -> Result<()> {
    let n = storage.read_at(buf, offset).map_err(|e| {
        Error::io(storage.path(), format!("reading {} bytes of {what} at {offset}", buf.len()), e)
    })?;
    if n < buf.len() {
        return Err(Error::damaged(
            storage.path(),
            format!("{what} at {offset} runs past the end of the file (the file is truncated?)"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_copies_what_the_source_has_and_says_how_much_that_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| FileStorage::create_new(&dir.path().join(name)).unwrap();
        let (from, to) = (file("from"), file("to"));
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n / 7) as u8).collect();
        from.write_at(&bytes, 0).unwrap();
        to.write_at(&[9; 300_000], 0).unwrap();
        assert_eq!(to.copy_from(&*from, 50_000, 200_000, 10_000), 10_000);
        assert_eq!(to.copy_from(&*from, 90_000, 0, 65_536), 10_000, "the source ends there");
        assert_eq!(to.copy_from(&*from, 100_000, 0, 1), 0);
        let mut all = vec![0; 300_000];
        assert_eq!(to.read_at(&mut all, 0).unwrap(), 300_000);
        assert_eq!(all[200_000..210_000], bytes[50_000..60_000]);
        assert_eq!(all[..10_000], bytes[90_000..]);
        assert!(all[10_000..200_000].iter().chain(&all[210_000..]).all(|b| *b == 9));
    }
}
