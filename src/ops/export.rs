//! `export`: a disk of a backup as a file of its own, every byte checked on the way.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use knib_fuse::FsError;
use knib_qcow::{Control, FileStorage, NewImage, NoObserver, Storage as _, write_image, write_raw};

use super::codec::codec;
use super::control::{Event, OpControl};
use super::disk_source::DiskSource;
use crate::store::manifest::{self, ImageFormat};
use crate::store::{DiskSpec, Store, StoreError};
use crate::verified::VerifiedReader;

const CLUSTER_BITS: u32 = 16;

/// Why nothing was exported. The file is not there.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such disk.
    #[error("{backup} has no disk {disk}: it has {has}")]
    NoDisk {
        /// The backup.
        backup: String,
        /// The name that was given.
        disk: String,
        /// The names that there are.
        has: String,
    },
    /// The file is there already.
    #[error("{} is there already, and nothing is overwritten: name another file or remove it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The chain could not be read.
    #[error("cannot read {disk}: {why}")]
    Read {
        /// The disk.
        disk: String,
        /// What is wrong, and with which file.
        why: FsError,
    },
    /// The file could not be written, or the data not read.
    #[error("cannot export to {}: {source}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: knib_qcow::Error,
    },
    /// The file could not be given its name.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// What was exported.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Exported {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Size that a guest sees, in bytes.
    pub virtual_size: u64,
}

/// Writes the disk that `spec` names to `file`, which must not be there, beside it and renamed when it is whole. A qcow2
/// file stands on nothing, and is compressed as the backup is.
///
/// # Errors
/// [`ExportError`]; nothing is left behind.
pub fn run(
    store: &Store,
    spec: &DiskSpec,
    file: &Path,
    format: ImageFormat,
    control: &OpControl<'_>,
) -> Result<Exported, ExportError> {
    let of = store.resolve(&spec.backup)?;
    let Some(disk) = of.disk(&spec.disk) else {
        let has = of.disks.iter().map(|d| d.name.to_string()).collect::<Vec<_>>().join(", ");
        return Err(ExportError::NoDisk {
            backup: format!("{}/{}", of.vm, of.name),
            disk: spec.disk.to_string(),
            has,
        });
    };
    if fs::symlink_metadata(file).is_ok() {
        return Err(ExportError::Exists { path: file.to_owned() });
    }
    let reader = VerifiedReader::new(store.clone(), "an export");
    let read = |why| ExportError::Read { disk: format!("{}/{}", spec.backup, spec.disk), why };
    let source = DiskSource::open(store, &reader, &of, &spec.disk).map_err(read)?;
    let mut beside = file.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let beside = PathBuf::from(beside);
    let copied = copy(&source, &beside, format, disk, control).map_err(|source| {
        let _ = fs::remove_file(&beside);
        ExportError::Copy { path: file.to_owned(), source }
    });
    copied?;
    // A link, not a rename: what came to be there in the meantime is not overwritten.
    let named = fs::hard_link(&beside, file).or_else(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Err(e),
        _ => fs::rename(&beside, file),
    });
    let _ = fs::remove_file(&beside);
    named.map_err(|source| ExportError::Io { doing: "make", path: file.to_owned(), source })?;
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(|source| ExportError::Io {
        doing: "flush",
        path: folder.to_owned(),
        source,
    })?;
    Ok(Exported { path: file.to_owned(), format, virtual_size: source.size() })
}

fn copy(
    source: &DiskSource,
    beside: &Path,
    format: ImageFormat,
    disk: &manifest::Disk,
    control: &OpControl<'_>,
) -> knib_qcow::Result<()> {
    let what = format!("exporting {}", disk.name);
    (control.progress)(Event::Begin { what: what.clone(), total: source.size() });
    let progress = |done| (control.progress)(Event::Advance { what: what.clone(), done });
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let how = Control { threads, rate_limit: None, cancel: control.cancel, progress: &progress };
    let dest = FileStorage::create_new(beside)?;
    match format {
        ImageFormat::Raw => {
            write_raw(dest, source.size(), source, &how)?;
        }
        ImageFormat::Qcow2 => {
            let compression = disk.compression.map(codec);
            let new =
                NewImage { size: source.size(), cluster_bits: CLUSTER_BITS, compression, backing: None };
            write_image(dest.clone(), &new, source, &NoObserver, &how)?;
            dest.sync().map_err(|e| knib_qcow::Error::io(beside, "syncing", e))?;
        }
    }
    (control.progress)(Event::End { what });
    Ok(())
}
