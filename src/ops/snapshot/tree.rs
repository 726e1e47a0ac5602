//! The images of a volume as they lie on primary: the chain of the live one, and what snapshots keep beside it.

use std::path::Path;

use super::SnapshotError;
use crate::chain::snapshot::Image;
use crate::hypervisor::{Definition, Guest, GuestVolume, Hypervisor, ImageRef, backing_chain};
use crate::ops::backup::primary;
use crate::ops::hypervisor::target;
use crate::store::manifest::PrimaryImage;
use crate::store::snapshot::Layer;
use crate::store::vm::Volume;
use crate::store::{StoreError, VmRecord, VolumeId};

/// A volume's images, each as the rules see it and as it was found.
pub(super) struct Tree {
    pub images: Vec<Image>,
    found: Vec<PrimaryImage>,
    live: Vec<ImageRef>,
}

impl Tree {
    /// The image at a path.
    pub fn image(&self, path: &Path) -> Option<&PrimaryImage> {
        self.found.iter().find(|i| i.path == path)
    }

    /// Whether the live image is it or stands on it.
    pub fn in_chain(&self, path: &Path) -> bool {
        let inode = self.image(path).map(|i| (i.device, i.inode));
        self.live.iter().filter_map(|l| self.image(&l.path)).any(|l| Some((l.device, l.inode)) == inode)
    }

    /// Adds a chain, top first; the path of its first image in the tree.
    fn add(&mut self, chain: &[ImageRef]) -> Result<Option<std::path::PathBuf>, SnapshotError> {
        let mut above: Option<usize> = None;
        let mut first = None;
        for image in chain {
            let seen = primary(image)?;
            let known = self.found.iter().position(|f| (f.device, f.inode) == (seen.device, seen.inode));
            let at = known.unwrap_or_else(|| {
                self.images.push(Image {
                    path: seen.path.clone(),
                    on: None,
                    live: false,
                    shown: false,
                    tracked: false,
                    others: false,
                    made: false,
                });
                self.found.push(seen);
                self.found.len() - 1
            });
            let path = self.images.get(at).map(|i| i.path.clone());
            if let Some(above) = above.and_then(|above| self.images.get_mut(above)) {
                above.on.clone_from(&path);
            }
            first = first.or(path);
            above = Some(at);
        }
        Ok(first)
    }

    fn mark(&mut self, path: Option<&Path>, mark: impl FnOnce(&mut Image)) {
        if let Some(image) = self.images.iter_mut().find(|i| Some(i.path.as_path()) == path) {
            mark(image);
        }
    }
}

/// Looks at a volume.
pub(super) fn look(
    record: &VmRecord,
    volume: &Volume,
    guest: &Guest,
    hypervisor: &dyn Hypervisor,
) -> Result<Tree, SnapshotError> {
    let name = target(volume);
    let mut tree = Tree { images: Vec::new(), found: Vec::new(), live: Vec::new() };
    match guest.volumes.iter().find(|v| v.target == name) {
        Some(found) => {
            tree.live.clone_from(&found.chain);
            let live = tree.add(&found.chain)?;
            tree.mark(live.as_deref(), |i| i.live = true);
        }
        None => {
            // It was detached, and whose it is now is not known: nothing below it is touched.
            if let Ok(chain) = backing_chain(&volume.path, volume.format) {
                tree.add(&chain)?;
                for image in &chain {
                    tree.mark(Some(&image.path), |i| i.others = true);
                }
            }
        }
    }
    for snapshot in &record.snapshots {
        let Some(frozen) = snapshot.frozen(volume.id) else { continue };
        if !is_there(&frozen.image) {
            if snapshot.removed {
                continue;
            }
            // It may come back, and stand on what would have been merged.
            let what = format!(
                "{}, the image of the snapshot {} of {}, is gone or another file: put it back, or remove that snapshot",
                frozen.image.path.display(),
                snapshot.name,
                volume.name
            );
            return Err(StoreError::Invalid(what).into());
        }
        let shown = tree.add(&backing_chain(&frozen.image.path, frozen.image.format)?)?;
        tree.mark(shown.as_deref(), |i| i.shown |= !snapshot.removed);
    }
    for layer in record.layers.iter().filter(|l| l.volume == volume.id && is_there(&l.image)) {
        let made = tree.add(&backing_chain(&layer.image.path, layer.image.format)?)?;
        tree.mark(made.as_deref(), |i| i.made = true);
    }
    let tracking = &record.tracking;
    let left = tracking.volumes.get(&volume.id).map(|t| t.images.as_slice()).unwrap_or_default();
    for delta in left.iter().filter(|i| i.owner.is_some()) {
        let current = tracking.current.as_ref().filter(|_| !tracking.end_of_chain).map(|c| c.id);
        let at = tree.found.iter().find(|f| is_same(f, delta)).map(|f| f.path.clone());
        tree.mark(at.as_deref(), |i| {
            i.made = true;
            i.tracked = current.is_some() && delta.owner == current;
        });
    }
    for image in &mut tree.images {
        let users = hypervisor.users_of(&image.path)?;
        image.others |= users.iter().any(|u| {
            u.uuid != guest.uuid || u.target != name || matches!(u.definition, Definition::Snapshot(_))
        });
    }
    Ok(tree)
}

/// Whether an image is the one that was recorded. The number of its device changes when its file system is mounted anew.
pub(super) fn is_same(a: &PrimaryImage, b: &PrimaryImage) -> bool {
    a.path == b.path && a.inode == b.inode
}

/// Records that an image is a layer of the volume, if it is not recorded.
pub(super) fn add_layer(record: &mut VmRecord, volume: VolumeId, image: PrimaryImage) {
    if record.layers.iter().all(|l| !is_same(&l.image, &image)) {
        record.layers.push(Layer { volume, image });
    }
}

/// Whether what was recorded is still there.
pub(super) fn is_there(image: &PrimaryImage) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(&image.path).is_ok_and(|m| m.ino() == image.inode)
}

/// The volumes whose images are just as the record says that they were left.
pub(super) fn intact(record: &VmRecord, guest: &Guest) -> Vec<VolumeId> {
    let as_left = |volume: &&Volume| {
        let Some(left) = record.tracking.volumes.get(&volume.id).filter(|l| !l.images.is_empty()) else {
            return false;
        };
        let found = guest.volumes.iter().find(|v| v.target == target(volume));
        found.and_then(|f| chain(f).ok()).is_some_and(|now| {
            let same = |(a, b): (&PrimaryImage, &PrimaryImage)| is_same(a, b) && a.device == b.device;
            now.len() == left.images.len() && now.iter().zip(&left.images).all(same)
        })
    };
    record.volumes.iter().filter(as_left).map(|v| v.id).collect()
}

/// The images of a volume as they are now, owned by no backup.
pub(super) fn chain(volume: &GuestVolume) -> Result<Vec<PrimaryImage>, SnapshotError> {
    Ok(volume.chain.iter().map(primary).collect::<Result<_, _>>()?)
}
