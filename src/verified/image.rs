//! One stored image: its file, its checksums, and a header that must agree with the manifests.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use knib_fuse::{FsError, FsResult};
use knib_qcow::header::incompatible;
use knib_qcow::{CompressionType, Header, Storage};
use parking_lot::Mutex;

use super::around::Around;
use super::damage::Damage;
use crate::store::plain::swap_name;
use crate::store::sums::{HostPiece, Sums, SumsCache};
use crate::store::{Manifest, Store, StoreError, StoreResult, disk_file, manifest, plain};

/// An opened image of a backup. Its file stays readable when its name goes.
#[derive(Debug)]
pub struct StoredImage {
    /// Derived from what it holds: the same after it is opened again.
    pub number: u64,
    pub path: PathBuf,
    pub sums: Sums,
    pub codec: CompressionType,
    pub cluster_bits: u32,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub len: u64,
    file: File,
    around: Around,
    damage: Arc<Damage>,
}

impl AsFd for StoredImage {
    /// Its file.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl StoredImage {
    /// Opens a disk of a backup. `below` is the backup that its header must name, and no other is ever opened.
    pub fn open(
        store: &Store,
        of: &Manifest,
        disk: &manifest::Disk,
        below: Option<&Manifest>,
        sums_cache: Arc<SumsCache>,
        damage: Arc<Damage>,
    ) -> FsResult<Self> {
        let path = store.disk_path(&of.vm, &of.name, &disk.name);
        let sums_path = store.sums_path(&of.vm, &of.name, &disk.name);
        let found = Candidate::find(&path, &sums_path, &disk.sums_digest, &sums_cache);
        let Candidate { file, sums } = found.map_err(|error| {
            // Compressed or merged into another since its manifest was read: not damage.
            let is_another =
                |now: Manifest| now.disk(&disk.name).is_none_or(|d| d.sums_digest != disk.sums_digest);
            match store.manifest(&of.vm, &of.name).map(is_another) {
                Ok(true) => FsError::stale(),
                Ok(false) => damage.of_store(&error),
                Err(gone) if gone.is_not_found() => FsError::stale(),
                Err(_) => damage.of_store(&error),
            }
        })?;
        let info = sums.info();
        let stated = (disk.virtual_size, disk.file_size, disk.cluster_size);
        if stated != (info.virtual_size, info.image_len, info.cluster_size) {
            let manifest = store.manifest_path(&of.vm, &of.name);
            let what = format!("it and the checksums disagree about the size of {}", disk.name);
            return Err(damage.of_store(&StoreError::damaged(&manifest, what)));
        }
        let mut image = Self {
            number: image_number(of, disk),
            path,
            sums,
            codec: CompressionType::Deflate,
            cluster_bits: info.cluster_size.trailing_zeros(),
            virtual_size: info.virtual_size,
            len: info.image_len,
            file,
            around: Around::new(),
            damage,
        };
        image.check_header(disk, below)?;
        Ok(image)
    }

    fn check_header(&mut self, disk: &manifest::Disk, below: Option<&Manifest>) -> FsResult<()> {
        let checked = Checked { image: self, refused: Mutex::default() };
        let header = Header::parse(&checked).map_err(|e| {
            // A byte that is not as it was written is reported as such, and once.
            checked.refused.into_inner().unwrap_or_else(|| self.damaged(&what_is_wrong(e)))
        })?;
        if header.cluster_bits != self.cluster_bits || header.size != self.virtual_size {
            return Err(self.damaged("its header and its checksums disagree about its size"));
        }
        if header.incompatible & !incompatible::COMPRESSION != 0 {
            let what = format!("it has features that stored images never have ({:#x})", header.incompatible);
            return Err(self.damaged(&what));
        }
        let wanted = below.map(|parent| format!("../{}/{}", parent.name, disk_file(&disk.name)));
        if header.backing != wanted {
            let show = |name: Option<String>| name.map_or("no backing file".to_owned(), |n| format!("{n:?}"));
            let what = format!("its header names {}, its manifest {}", show(header.backing), show(wanted));
            return Err(self.damaged(&what));
        }
        self.codec = header.compression;
        Ok(())
    }

    /// Reads stored bytes without checking them. True when the disk had to be waited for.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<bool> {
        self.around.read(&self.file, offset, buf).map_err(|e| match e.kind() {
            std::io::ErrorKind::StaleNetworkFileHandle => FsError::io("read an image", &e),
            _ => self.damaged(&format!("it cannot be read at byte {offset}: {e}")),
        })
    }

    /// Has the system read what lies around `offset`, without waiting for it.
    pub fn bring_in(&self, offset: u64) {
        self.around.bring_in(&self.file, offset);
    }

    /// Has the system read a range that is needed soon, without waiting for it.
    pub fn will_need(&self, offset: u64, len: u64) {
        self.around.will_need(&self.file, offset, len);
    }

    /// Reads any range of the file, every byte checked.
    pub fn read_verified(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let len = buf.len() as u64;
        let pieces = self.sums.host_pieces(offset, len).map_err(|e| self.damage.of_store(&e))?;
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
            return if buf.is_empty() { Ok(()) } else { Err(self.damaged("a read past its end")) };
        };
        let (start, end) = (first.offset, last.end());
        if start > offset || end < offset.saturating_add(len) {
            return Err(self.damaged("a read past its end"));
        }
        if start == offset && end == offset + len {
            self.read(start, buf)?;
            return self.verify(&pieces, start, buf);
        }
        // Pieces reach beyond what was asked for: at the edges, or because a large gap is padding.
        knib_fuse::with_buffer((end - start) as usize, |wide| {
            self.read(start, wide)?;
            self.verify(&pieces, start, wide)?;
            let from = (offset - start) as usize;
            buf.copy_from_slice(wide.get(from..from + buf.len()).unwrap_or_default());
            Ok(())
        })
    }

    fn verify(&self, pieces: &[HostPiece], start: u64, bytes: &[u8]) -> FsResult<()> {
        for piece in pieces {
            let from = (piece.offset - start) as usize;
            let part = bytes.get(from..from.saturating_add(piece.len as usize)).unwrap_or_default();
            if !piece.matches(part) {
                return Err(self.damaged(&format!(
                    "bytes {} to {} are not as they were written",
                    piece.offset,
                    piece.end()
                )));
            }
        }
        Ok(())
    }

    /// An error that names the file; the reason is kept.
    pub fn damaged(&self, what: &str) -> FsError {
        self.damage.report_file(&self.path, StoreError::damaged(&self.path, what).to_string())
    }

    /// The store's error as the reader's.
    pub fn of_store(&self, error: &StoreError) -> FsError {
        self.damage.of_store(error)
    }
}

/// A file and the checksums that are its own.
struct Candidate {
    file: File,
    sums: Sums,
}

/// How often in a row a file is expected to be replaced while it is opened.
const TRIES: usize = 20;

impl Candidate {
    /// The files that belong to a digest. While new ones take the names (the image first, then the checksums, then the manifest
    /// tells of them), the old ones are there by other names; which is which does not show in an image's length.
    fn find(path: &Path, sums_path: &Path, digest: &str, cache: &Arc<SumsCache>) -> StoreResult<Self> {
        for _ in 0..TRIES {
            if let Some(found) = Self::look(path, sums_path, digest, cache)? {
                return Ok(found);
            }
        }
        Err(StoreError::damaged(path, "it is replaced again and again"))
    }

    /// None where the names changed hands meanwhile.
    fn look(
        path: &Path,
        sums_path: &Path,
        digest: &str,
        cache: &Arc<SumsCache>,
    ) -> StoreResult<Option<Self>> {
        let inode = || std::fs::symlink_metadata(sums_path).ok().map(|m| m.ino());
        let open = |path: &Path| Sums::open_checked(path, digest, cache.clone());
        let (old, old_sums) = (swap_name(path, "old"), swap_name(sums_path, "old"));
        let before = inode();
        let (file, sums) = match open(sums_path) {
            Err(error) => (plain::open(&old), open(&old_sums).map_err(|_| error)?),
            Ok(sums) => {
                let named = plain::open(path);
                let kept = plain::open(&old).ok().filter(|_| open(&old_sums).is_ok());
                match kept {
                    Some(kept) => (Ok(kept), sums),
                    None if inode() == before => (named, sums),
                    None => return Ok(None),
                }
            }
        };
        let (file, wanted) = (file?, sums.info().image_len);
        let len = file.metadata().map_err(StoreError::io("look at", path))?.len();
        if len != wanted {
            let what = format!("it has {len} bytes instead of {wanted}: it is cut or was written to");
            return Err(StoreError::damaged(path, what));
        }
        Ok(Some(Self { file, sums }))
    }
}

/// What identifies the content of a stored image.
pub fn image_number(of: &Manifest, disk: &manifest::Disk) -> u64 {
    number(&[b"image", of.id.uuid().as_bytes(), disk.name.as_str().as_bytes(), disk.sums_digest.as_bytes()])
}

/// 63 bits of a hash over parts: never 0 or 1, which mean something to FUSE.
pub fn number(parts: &[&[u8]]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    (u64::from_le_bytes(first) >> 1) | 2
}

/// An image as the engine reads one: its header is parsed there, from bytes that are verified here.
struct Checked<'a> {
    image: &'a StoredImage,
    /// Why a read was refused: the engine knows no such errors.
    refused: Mutex<Option<FsError>>,
}

impl Storage for Checked<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.image.len.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let (part, _) = buf.split_at_mut(len);
        match self.image.read_verified(offset, part) {
            Ok(()) => Ok(len),
            Err(error) => {
                let told = io::Error::other(error.to_string());
                *self.refused.lock() = Some(error);
                Err(told)
            }
        }
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.image.len)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.image.len).then_some(offset))
    }
    fn next_hole(&self, _: u64) -> io::Result<u64> {
        Ok(self.image.len)
    }
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
    fn path(&self) -> &Path {
        &self.image.path
    }
}

/// The engine's reason without the file's name, which stands before it already.
fn what_is_wrong(error: knib_qcow::Error) -> String {
    match error {
        knib_qcow::Error::Damaged { what, .. } | knib_qcow::Error::Unsupported { what, .. } => what,
        other => other.to_string(),
    }
}
