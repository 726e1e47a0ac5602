//! One stored image: its file, its checksums, and a header that must agree with the manifests.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use knib_fuse::{FsError, FsResult};
use knib_qcow::CompressionType;

use super::around::Around;
use super::damage::Damage;
use crate::store::sums::{HostPiece, Sums, SumsCache};
use crate::store::{Manifest, Store, StoreError, disk_file, manifest};

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
        let sums = Sums::open_checked(&sums_path, &disk.sums_digest, sums_cache)
            .map_err(|e| damage.of_store(&missing_is_damage(e)))?;
        let file = File::open(&path).map_err(|e| {
            damage.of_store(&missing_is_damage(StoreError::Io {
                doing: "open",
                path: path.clone(),
                source: e,
            }))
        })?;
        let info = sums.info();
        let len = file.metadata().map_err(|e| FsError::io("look at an image", &e))?.len();
        let mut image = Self {
            number: image_number(of, disk),
            path,
            sums,
            codec: CompressionType::Deflate,
            cluster_bits: info.cluster_size.trailing_zeros(),
            virtual_size: info.virtual_size,
            len,
            file,
            around: Around::new(),
            damage,
        };
        if len != info.image_len {
            return Err(image.damaged(&format!(
                "it has {len} bytes instead of {}: it is cut or was written to",
                info.image_len
            )));
        }
        image.check_header(disk, below)?;
        Ok(image)
    }

    fn check_header(&mut self, disk: &manifest::Disk, below: Option<&Manifest>) -> FsResult<()> {
        let mut bytes = vec![0; self.len.min(4096) as usize];
        self.read_verified(0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|what| self.damaged(&what))?;
        if header.cluster_bits != self.cluster_bits || header.size != self.virtual_size {
            return Err(self.damaged("its header and its checksums disagree about its size"));
        }
        let wanted = below.map(|parent| format!("../{}/{}", parent.name, disk_file(&disk.name)));
        let named = match header.backing {
            None => None,
            Some((offset, len)) => {
                let mut name = vec![0; len];
                self.read_verified(offset, &mut name)?;
                Some(String::from_utf8_lossy(&name).into_owned())
            }
        };
        if named != wanted {
            let show = |name: Option<String>| name.map_or("no backing file".to_owned(), |n| format!("{n:?}"));
            let what = format!("its header names {}, its manifest {}", show(named), show(wanted));
            return Err(self.damaged(&what));
        }
        self.codec = header.codec;
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
        self.damage.report(StoreError::damaged(&self.path, what).to_string())
    }

    /// The store's error as the reader's.
    pub fn of_store(&self, error: &StoreError) -> FsError {
        self.damage.of_store(error)
    }
}

/// A file that the manifest names and that is not there is damage, not a name that never was.
fn missing_is_damage(error: StoreError) -> StoreError {
    match error {
        StoreError::Io { path, source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            StoreError::damaged(&path, "it is missing")
        }
        other => other,
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

/// What of a qcow2 header matters here.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    cluster_bits: u32,
    size: u64,
    codec: CompressionType,
    backing: Option<(u64, usize)>,
}

const COMPRESSION_TYPE: u64 = 1 << 3;
/// QEMU takes no longer name. Bytes.
const LONGEST_BACKING: u32 = 1023;

impl Header {
    /// QEMU's docs/interop/qcow2.txt, section "Header"; big-endian.
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let short = || "its header is cut".to_owned();
        let u32_at = |at: usize| -> Result<u32, String> {
            let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).ok_or_else(short)?;
            Ok(u32::from_be_bytes(field))
        };
        let u64_at = |at: usize| Ok::<_, String>(u64::from(u32_at(at)?) << 32 | u64::from(u32_at(at + 4)?));
        if u32_at(0)? != 0x5146_49fb {
            return Err("it is no qcow2 file".into());
        }
        let version = u32_at(4)?;
        let (incompatible, header_len) = match version {
            2 => (0, 72),
            3 => (u64_at(72)?, u32_at(100)?),
            _ => return Err(format!("it has the unknown version {version}")),
        };
        if incompatible & !COMPRESSION_TYPE != 0 {
            return Err(format!("it has features that stored images never have ({incompatible:#x})"));
        }
        let kind = if header_len > 104 { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        let codec = match kind {
            0 => CompressionType::Deflate,
            1 => CompressionType::Zstd,
            _ => return Err(format!("it has the unknown compression type {kind}")),
        };
        let (offset, len) = (u64_at(8)?, u32_at(16)?);
        if len > LONGEST_BACKING {
            return Err("its backing file's name is too long".into());
        }
        let backing = (offset != 0 && len != 0).then_some((offset, len as usize));
        Ok(Self { cluster_bits: u32_at(20)?, size: u64_at(24)?, codec, backing })
    }
}
