//! Image files that no domain owns: disks of a VM that is off.
//!
//! Tracked by `scan`, nothing here is ever touched. Tracked by `overlay`, the given path stays the live image: a
//! snapshot gives the old image another name beside it and puts an empty overlay in its place. There is a file at the
//! given path at every moment, with the same data.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::layers::{check_new, is_block, place, same_file, volume, without};
use super::{
    Definition, DiskPlace, Guest, GuestVolume, Hypervisor, HypervisorError, ImageFormat, ImageRef, ImageUser,
    Images, JobControl, NewOverlay, NotTaken, Power, Quiesce, Result, Snapshot, header,
};
use crate::failpoint;
use crate::store::vm::Track;

/// Ending of the name under which an overlay is made before it takes the given path.
const NEW: &str = ".knib-new";

/// Disk files, each with a name.
#[derive(Clone)]
pub struct DiskFiles {
    name: String,
    disks: Vec<(String, ImageRef)>,
    track: Track,
    images: Arc<dyn Images>,
}

impl DiskFiles {
    /// The disks `(name, image)` of the VM that errors call `name`.
    pub fn new(name: &str, disks: Vec<(String, ImageRef)>, track: Track, images: Arc<dyn Images>) -> Self {
        Self { name: name.to_owned(), disks, track, images }
    }

    /// After a crash in [`Hypervisor::snapshot`]: removes what it had prepared for these disks and not yet used. A disk
    /// whose overlay is in place already keeps it.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn undo_interrupted(&self, overlays: &[NewOverlay]) -> Result<()> {
        for (name, image) in &self.disks {
            let Some(new) = overlays.iter().find(|o| o.target == *name) else { continue };
            let fresh = fresh_name(&image.path);
            if fresh.symlink_metadata().is_ok() {
                std::fs::remove_file(&fresh).map_err(HypervisorError::io("remove", &fresh))?;
            }
            // Two names of one file: the data stays under the given path.
            if new.path != image.path
                && new.path.symlink_metadata().is_ok()
                && same_file(&new.path, &image.path)
            {
                std::fs::remove_file(&new.path).map_err(HypervisorError::io("remove", &new.path))?;
            }
            sync_folder(&image.path)?;
        }
        Ok(())
    }

    fn image(&self, target: &str) -> Option<&ImageRef> {
        self.disks.iter().find(|(name, _)| name == target).map(|(_, image)| image)
    }

    /// Refuses a disk that cannot be tracked by an overlay at its path.
    fn check_overlay(&self, image: &ImageRef, frozen: &Path) -> Result<()> {
        let cannot = |why: &str| {
            let path = image.path.display();
            Err(HypervisorError::Unsupported {
                what: format!("{path} cannot be tracked by overlay: {why}; nothing was changed"),
            })
        };
        if self.track == Track::Scan {
            return cannot("the VM is tracked by scan");
        }
        if image.format != ImageFormat::Qcow2 {
            return cannot("it is raw, and its path would become qcow2; use --track scan");
        }
        let file = image.path.symlink_metadata().map_err(HypervisorError::io("look at", &image.path))?;
        if file.is_symlink() {
            return cannot("it is a symbolic link; give the file itself");
        }
        if is_block(&image.path) || !file.is_file() {
            return cannot("it is no file; use --track scan");
        }
        if frozen.parent() != image.path.parent() {
            return cannot("the old image can only be renamed within its folder");
        }
        Ok(())
    }

    /// Both names and the overlay, the given path untouched.
    fn prepare(&self, image: &ImageRef, frozen: &Path) -> Result<()> {
        let fresh = fresh_name(&image.path);
        std::fs::hard_link(&image.path, frozen)
            .map_err(HypervisorError::io("give the old image another name (a hard link)", frozen))?;
        failpoint::hit("overlay-linked");
        // By name alone: the folder may be moved as a whole.
        let backing =
            ImageRef { path: frozen.file_name().map(PathBuf::from).unwrap_or_default(), ..image.clone() };
        self.images.create_overlay(&fresh, &backing)?;
        as_owned(&fresh, &image.path)?;
        sync_folder(&image.path)?;
        failpoint::hit("overlay-made");
        Ok(())
    }
}

impl std::fmt::Debug for DiskFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskFiles")
            .field("name", &self.name)
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}

impl Hypervisor for DiskFiles {
    fn inspect(&self) -> Result<Guest> {
        let mut guest = Guest {
            uuid: None,
            name: self.name.clone(),
            power: Power::Off,
            persistent: false,
            managed_save: false,
            volumes: Vec::new(),
            skipped: Vec::new(),
            refused: Vec::new(),
            xml: String::new(),
            nvram: None,
            tpm_state: None,
        };
        for (name, image) in &self.disks {
            match header::backing_chain(&image.path, image.format) {
                Ok(chain) => guest.volumes.push(GuestVolume {
                    target: name.clone(),
                    serial: None,
                    chain,
                    block_device: is_block(&image.path),
                    mirror: None,
                }),
                Err(why) => guest.refused.push(NotTaken {
                    target: name.clone(),
                    reason: format!("has a chain that cannot be used: {why}"),
                }),
            }
        }
        Ok(guest)
    }

    fn snapshot(&self, overlays: &[NewOverlay], _quiesce: Quiesce) -> Result<Snapshot> {
        let guest = self.inspect()?;
        let mut todo = Vec::new();
        for new in overlays {
            let volume = volume(&guest, &new.target)?;
            let Some(image) = self.image(&new.target) else { continue };
            self.check_overlay(image, &new.path)?;
            check_new(&new.path)?;
            check_new(&fresh_name(&image.path))?;
            self.images.check_unused(image)?;
            todo.push((volume, image, new));
        }
        let prepared = todo.iter().try_for_each(|(_, image, new)| self.prepare(image, &new.path));
        let swapped = prepared.and_then(|()| {
            todo.iter().try_for_each(|(_, image, _)| {
                std::fs::rename(fresh_name(&image.path), &image.path)
                    .map_err(HypervisorError::io("put the overlay at", &image.path))?;
                failpoint::hit("overlay-swapped");
                sync_folder(&image.path)
            })
        });
        if let Err(error) = swapped {
            for (_, image, new) in &todo {
                put_back(image, &new.path);
            }
            return Err(error);
        }
        let volumes = todo
            .iter()
            .map(|(volume, image, new)| {
                let mut chain = volume.chain.clone();
                if let Some(old) = chain.first_mut() {
                    old.path.clone_from(&new.path);
                }
                chain.insert(0, (*image).clone());
                GuestVolume { chain, ..(*volume).clone() }
            })
            .collect();
        Ok(Snapshot { frozen: false, volumes, notes: Vec::new() })
    }

    fn commit(
        &self,
        target: &str,
        top: &Path,
        base: &Path,
        control: &JobControl<'_>,
    ) -> Result<Vec<ImageRef>> {
        let guest = self.inspect()?;
        let volume = volume(&guest, target)?;
        let (above, below) = place(volume, &format!("\"{}\"", self.name), top, base)?;
        let (Some(layers), Some(into)) = (volume.chain.get(above..below), volume.chain.get(below)) else {
            return Ok(volume.chain.clone());
        };
        let live = volume.chain.first().filter(|_| above == 0);
        if let Some(live) = live {
            self.check_overlay(live, &into.path)?;
            if into.format != live.format {
                return Err(HypervisorError::Unsupported {
                    what: format!(
                        "{} cannot take the path {}: it is raw; nothing was changed",
                        into.path.display(),
                        live.path.display()
                    ),
                });
            }
        }
        let other = self.users_of(&into.path)?.into_iter().find(|u| u.target != target);
        if let Some(user) = other {
            return Err(HypervisorError::Shared { base: into.path.clone(), user: user.to_string() });
        }
        for image in &volume.chain {
            self.images.check_unused(image)?;
        }
        self.images.commit(target, layers, into, control)?;
        failpoint::hit("overlay-merged");
        let mut chain = without(&volume.chain, above, below);
        if let Some(live) = live {
            std::fs::rename(&into.path, &live.path)
                .map_err(HypervisorError::io("put the merged image at", &live.path))?;
            sync_folder(&live.path)?;
            if let Some(first) = chain.first_mut() {
                first.path.clone_from(&live.path);
            }
        } else if let Some(image) = above.checked_sub(1).and_then(|i| volume.chain.get(i)) {
            let beside = image.path.parent() == into.path.parent();
            let name = into.path.file_name().filter(|_| beside).map(PathBuf::from);
            let backing = ImageRef { path: name.unwrap_or_else(|| into.path.clone()), format: into.format };
            self.images.set_backing(&image.path, &backing)?;
        }
        failpoint::hit("overlay-rebased");
        Ok(chain)
    }

    fn users_of(&self, path: &Path) -> Result<Vec<ImageUser>> {
        let mut users = Vec::new();
        for (name, image) in &self.disks {
            if !image.path.exists() {
                continue;
            }
            let chain = header::backing_chain(&image.path, image.format)?;
            if let Some(depth) = chain.iter().position(|i| same_file(&i.path, path)) {
                users.push(ImageUser {
                    domain: self.name.clone(),
                    uuid: None,
                    definition: Definition::DiskFiles,
                    target: name.clone(),
                    depth,
                });
            }
        }
        Ok(users)
    }

    /// Puts the overlay that is each chain's first image in the place of the live image, which is gone then. One that is
    /// not there any more has its place already.
    fn place(&self, disks: &[DiskPlace]) -> Result<()> {
        let mut todo = Vec::new();
        for disk in disks {
            let (Some(image), Some(fresh)) = (self.image(&disk.target), disk.chain.first()) else { continue };
            if fresh.path.symlink_metadata().is_ok() {
                self.check_overlay(image, &fresh.path)?;
                self.images.check_unused(image)?;
                todo.push((image, &fresh.path));
            }
        }
        for (image, fresh) in todo {
            as_owned(fresh, &image.path)?;
            std::fs::rename(fresh, &image.path)
                .map_err(HypervisorError::io("put the overlay at", &image.path))?;
            failpoint::hit("overlay-swapped");
            sync_folder(&image.path)?;
        }
        Ok(())
    }

    fn agent_ping(&self, _limit: Duration) -> Result<()> {
        Err(HypervisorError::Unsupported {
            what: format!("\"{}\" is disk files of a VM that is off: there is no guest to ask", self.name),
        })
    }
}

/// Gives a new image the owner and the permissions of the one whose place it takes.
fn as_owned(fresh: &Path, like: &Path) -> Result<()> {
    let old = std::fs::metadata(like).map_err(HypervisorError::io("look at", like))?;
    std::os::unix::fs::chown(fresh, Some(old.uid()), Some(old.gid()))
        .and_then(|()| std::fs::set_permissions(fresh, old.permissions()))
        .map_err(HypervisorError::io("set the owner of", fresh))
}

fn fresh_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    PathBuf::from(name)
}

/// The state before the snapshot, whether or not the overlay is in place: it is empty.
fn put_back(image: &ImageRef, frozen: &Path) {
    let _ = std::fs::remove_file(fresh_name(&image.path));
    if frozen.symlink_metadata().is_err() {
        return;
    }
    // Of two names of one file, `rename` would leave both.
    let put = if same_file(frozen, &image.path) {
        std::fs::remove_file(frozen)
    } else {
        std::fs::rename(frozen, &image.path)
    };
    if let Err(error) = put.map(|()| drop(sync_folder(&image.path))) {
        tracing::warn!("cannot put {} back to {}: {error}", frozen.display(), image.path.display());
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    File::open(folder).and_then(|f| f.sync_all()).map_err(HypervisorError::io("sync", folder))
}
