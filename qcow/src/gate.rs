//! Who may open the files that a header names: the caller's policy, never the image's wish.

use std::path::Path;
use std::sync::Arc;

use crate::{Access, Error, FileStorage, Format, Locking, Result, Storage};

/// What a header names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implicit {
    /// A backing file.
    Backing,
    /// An external data file.
    DataFile,
}

/// A policy for files that images name.
pub trait Gate: Send + Sync {
    /// Opens what `from`'s header calls `name`, or refuses. `format` is the header's word for it.
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        name: &str,
        format: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format)>;

    /// Opens the external data file `name` of `from`, an image that is being written, or refuses as [`Gate::open`] does: for writing,
    /// with the writer's locks, or for reading beside that.
    fn open_data(&self, from: &Path, name: &str, access: Access) -> Result<Arc<dyn Storage>> {
        let (allowed, _) = self.open(from, Implicit::DataFile, name, Some(Format::Raw.name()))?;
        let data = allowed.path().to_owned();
        // Its locks would be in the way of the writer's.
        drop(allowed);
        Ok(FileStorage::open(&data, access)?)
    }
}

/// Follows plain paths, relative to the image, with an explicit format; nothing else.
pub struct PlainPaths;

impl Gate for PlainPaths {
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        name: &str,
        format: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format)> {
        plain(from, kind, name, format, Locking::Off)
    }
}

/// As [`PlainPaths`], with a reader's locks on every file, as QEMU takes them on backing files.
pub struct LockedPaths;

impl Gate for LockedPaths {
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        name: &str,
        format: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format)> {
        plain(from, kind, name, format, Locking::Reader)
    }
}

fn plain(
    from: &Path,
    kind: Implicit,
    name: &str,
    format: Option<&str>,
    locking: Locking,
) -> Result<(Arc<dyn Storage>, Format)> {
    let protocol = name.split_once(':').is_some_and(|(p, _)| !p.contains('/'));
    if protocol || name.is_empty() {
        return Err(Error::refused(from, format!("its header names {name:?}, which is not a plain path")));
    }
    let format = match (kind, format) {
        (Implicit::DataFile, _) => Format::Raw,
        (Implicit::Backing, Some(f)) => Format::from_name(f).ok_or_else(|| {
            Error::unsupported(
                from,
                format!("its backing file {name:?} is of format {f:?}: only raw and qcow2 are supported"),
            )
        })?,
        (Implicit::Backing, None) => {
            return Err(Error::refused(
                from,
                format!(
                    "it names the backing file {name:?} without its format, which is never guessed: set it with `qemu-img rebase -u -F FORMAT -b {name} {}`",
                    from.display()
                ),
            ));
        }
    };
    let path = from.parent().unwrap_or(Path::new(".")).join(name);
    let storage = FileStorage::open_with(&path, Access::Read, locking)?;
    Ok((storage, format))
}

/// Refuses every file that an image names.
pub struct NoImplicit;

impl Gate for NoImplicit {
    fn open(
        &self,
        from: &Path,
        _: Implicit,
        name: &str,
        _: Option<&str>,
    ) -> Result<(Arc<dyn Storage>, Format)> {
        Err(Error::refused(from, format!("its header names {name:?}, and no other file may be opened here")))
    }
}
