//! Merging and deleting layers that nothing needs any more, one after the other.
//!
//! What was once decided is not undone by Ctrl-C: a merge that stops half way only has to be done again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::tree::{self, Tree};
use super::{SnapshotError, settle};
use crate::chain::snapshot::{Step, is_kept, next};
use crate::failpoint;
use crate::hypervisor::{Hypervisor, HypervisorError, ImageRef, Images as _, JobControl};
use crate::ops::backup::merge;
use crate::ops::control::OpControl;
use crate::ops::hypervisor::{is_block, same_file, target};
use crate::ops::images::EngineImages;
use crate::store::journal::{Journal, Outcome};
use crate::store::manifest::PrimaryImage;
use crate::store::snapshot::{LayerMerge, Snapshot};
use crate::store::vm::Volume;
use crate::store::{Operation, Store, VmRecord, VolumeId};

/// A VM whose layers are tidied up.
pub(super) struct Tidy<'a> {
    pub store: &'a Store,
    pub record: &'a mut VmRecord,
    pub hypervisor: &'a dyn Hypervisor,
    pub journal: &'a mut Journal,
    pub intact: BTreeSet<VolumeId>,
    pub control: OpControl<'a>,
}

impl Tidy<'_> {
    /// Does all that can be done about these volumes; what had to be kept, in words.
    pub fn run(&mut self, volumes: &[VolumeId]) -> Result<Vec<String>, SnapshotError> {
        self.go_on()?;
        let mut kept = Vec::new();
        for id in volumes {
            let Some(volume) = self.record.volumes.iter().find(|v| v.id == *id).cloned() else { continue };
            self.volume(&volume, &mut kept)?;
        }
        self.forget_removed()?;
        settle::save(self.store, self.record, &self.hypervisor.inspect()?, &self.intact)?;
        Ok(kept)
    }

    fn volume(&mut self, volume: &Volume, kept: &mut Vec<String>) -> Result<(), SnapshotError> {
        let mut failed: BTreeSet<PathBuf> = BTreeSet::new();
        loop {
            let guest = self.hypervisor.inspect()?;
            let mut tree = match tree::look(self.record, volume, &guest, self.hypervisor) {
                Ok(tree) => tree,
                // Nothing is merged where it is not known what stands on what; all that is needed is there.
                Err(error) => {
                    let name = &volume.name;
                    kept.push(format!(
                        "the layers of {name} were kept, removing a snapshot later tries again: {error}"
                    ));
                    return Ok(());
                }
            };
            for image in tree.images.iter_mut().filter(|i| failed.contains(&i.path)) {
                image.others = true;
            }
            let (path, done) = match next(&tree.images) {
                None => return Ok(()),
                Some(Step::Delete { path }) => {
                    self.control.step(format!("deleting {}", path.display()));
                    let done = self.delete(&path);
                    failpoint::hit("snapshot-deleted");
                    (path, done)
                }
                Some(Step::Merge { top, base }) => {
                    self.control.step(format!("merging {} into {}", top.display(), base.display()));
                    let done = self.begin(volume, &tree, &top, &base);
                    (top, done)
                }
            };
            if let Err(error) = done {
                self.journal.update_snapshot(|op| op.merge = None)?;
                kept.push(format!(
                    "{} was kept, removing a snapshot later tries again: {error}",
                    path.display()
                ));
                failed.insert(path);
            }
        }
    }

    /// Deletes an image that nothing names, and forgets it.
    fn delete(&mut self, path: &Path) -> Result<(), SnapshotError> {
        merge::unlink(self.hypervisor, path)?;
        match path.exists() {
            true => Err(HypervisorError::NotNow { what: format!("{} is used", path.display()) }.into()),
            false => {
                self.record.layers.retain(|l| l.image.path != path);
                Ok(())
            }
        }
    }

    fn begin(&mut self, volume: &Volume, tree: &Tree, top: &Path, base: &Path) -> Result<(), SnapshotError> {
        let (Some(top), Some(base)) = (tree.image(top), tree.image(base)) else { return Ok(()) };
        let merge = LayerMerge {
            volume: volume.id,
            in_chain: tree.in_chain(&top.path),
            top: top.clone(),
            base: base.clone(),
            outcome: Outcome::Begun,
        };
        self.journal.update_snapshot(|op| op.merge = Some(merge.clone()))?;
        failpoint::hit("snapshot-merge");
        self.merge(volume, merge)
    }

    /// Brings the merge that a crash interrupted to its end.
    fn go_on(&mut self) -> Result<(), SnapshotError> {
        let Operation::Snapshot(op) = &self.journal.entry().operation else { return Ok(()) };
        let Some(merge) = op.merge.clone() else { return Ok(()) };
        match self.record.volumes.iter().find(|v| v.id == merge.volume).cloned() {
            Some(volume) => self.merge(&volume, merge),
            None => Ok(()),
        }
    }

    /// All of it can be done again: `top` shows the same as before until nothing stands on it any more.
    fn merge(&mut self, volume: &Volume, merge: LayerMerge) -> Result<(), SnapshotError> {
        if merge.outcome != Outcome::Done {
            self.data(volume, &merge)?;
            failpoint::hit("snapshot-merged");
            self.journal.update_snapshot(|op| {
                if let Some(merge) = &mut op.merge {
                    merge.outcome = Outcome::Done;
                }
            })?;
        }
        let guest = self.hypervisor.inspect()?;
        // A merged image of plain disk files has taken the given path.
        let base = guest
            .volumes
            .iter()
            .find(|v| v.target == target(volume))
            .map(tree::chain)
            .transpose()?
            .and_then(|chain| {
                chain.into_iter().find(|i| (i.device, i.inode) == (merge.base.device, merge.base.inode))
            })
            .unwrap_or_else(|| merge.base.clone());
        let names = |image: &PrimaryImage, which: &PrimaryImage| {
            // The same image may have another name there.
            tree::is_same(image, which) || tree::is_there(which) && same_file(&image.path, &which.path)
        };
        let frozen = self.record.snapshots.iter_mut().flat_map(|s| &mut s.volumes);
        for frozen in frozen.filter(|f| f.volume == merge.volume) {
            if names(&frozen.image, &merge.top) || names(&frozen.image, &merge.base) {
                frozen.image = PrimaryImage { owner: None, ..base.clone() };
            }
        }
        // It is somebody's until it is deleted.
        if tree::is_there(&merge.top) {
            let image = PrimaryImage { owner: None, ..merge.top.clone() };
            tree::add_layer(self.record, volume.id, image);
        }
        settle::save(self.store, self.record, &guest, &self.intact)?;
        failpoint::hit("snapshot-merge-recorded");
        // A merged live image of plain disk files was replaced by what it was merged into.
        if tree::is_there(&merge.top) {
            merge::unlink(self.hypervisor, &merge.top.path)?;
        }
        if merge.top.path.symlink_metadata().is_err() {
            self.record.layers.retain(|l| l.image.path != merge.top.path);
        }
        failpoint::hit("snapshot-merge-unlinked");
        self.journal.update_snapshot(|op| op.merge = None)?;
        Ok(())
    }

    /// Copies what `top` holds into `base`, and makes what stood on `top` stand on `base`.
    fn data(&mut self, volume: &Volume, merge: &LayerMerge) -> Result<(), SnapshotError> {
        let name = target(volume);
        let go_on = AtomicBool::new(false);
        let control = JobControl { cancel: &go_on, progress: &|_| {}, rate_limit: None };
        let (top, base) = (as_ref(&merge.top), as_ref(&merge.base));
        if merge.in_chain {
            // Where they are not both in the chain, it was done before a crash.
            let control = OpControl { cancel: &go_on, ..self.control };
            merge::commit(self.hypervisor, &name, &top.path, &base.path, &control)?;
        } else if tree::is_there(&merge.top) {
            merge::refuse_snapshots(&top.path)?;
            for image in [&top, &base] {
                EngineImages.check_unused(image)?;
            }
            EngineImages.commit(&name, std::slice::from_ref(&top), &base, &control)?;
        }
        failpoint::hit("snapshot-merge-data");
        if !tree::is_there(&merge.top) {
            return Ok(());
        }
        let guest = self.hypervisor.inspect()?;
        let tree = tree::look(self.record, volume, &guest, self.hypervisor)?;
        for above in tree.images.iter().filter(|i| i.on.as_ref() == Some(&top.path)) {
            if tree.in_chain(&above.path) {
                let what = format!("{} still stands on {}", above.path.display(), top.path.display());
                return Err(HypervisorError::NotNow { what }.into());
            }
            // By name alone where it was so: the folder may be moved as a whole.
            let beside =
                guest.uuid.is_none() && above.path.parent() == base.path.parent() && !is_block(&base.path);
            let alone = base.path.file_name().filter(|_| beside).map(PathBuf::from);
            let backing = ImageRef { path: alone.unwrap_or_else(|| base.path.clone()), ..base.clone() };
            EngineImages.set_backing(&above.path, &backing)?;
            failpoint::hit("snapshot-rebased");
        }
        Ok(())
    }

    /// Drops the records of removed snapshots that are no image of their own any more.
    fn forget_removed(&mut self) -> Result<(), SnapshotError> {
        let guest = self.hypervisor.inspect()?;
        let mut trees = Vec::new();
        for volume in &self.record.volumes {
            if self.record.snapshots.iter().any(|s| s.removed && s.frozen(volume.id).is_some()) {
                let tree = tree::look(self.record, volume, &guest, self.hypervisor).ok();
                trees.push((volume.id, tree));
            }
        }
        let kept = |snapshot: &Snapshot| {
            snapshot.volumes.iter().any(|f| {
                let tree = trees.iter().find(|(id, _)| *id == f.volume).map(|(_, tree)| tree.as_ref());
                let kept = |tree: &Tree| is_kept(&tree.images, &f.image.path);
                // Where it is not known what there is, the snapshot stays in the record.
                tree::is_there(&f.image) && tree.is_some_and(|t| t.is_none_or(kept))
            })
        };
        let gone: Vec<_> = self
            .record
            .snapshots
            .iter()
            .filter(|s| s.removed && !kept(s))
            .map(|s| (s.id, s.parent))
            .collect();
        for (id, parent) in gone {
            self.record.snapshots.retain(|s| s.id != id);
            for child in self.record.snapshots.iter_mut().filter(|s| s.parent == Some(id)) {
                child.parent = parent;
            }
        }
        Ok(())
    }
}

fn as_ref(image: &PrimaryImage) -> ImageRef {
    ImageRef { path: image.path.clone(), format: image.format }
}
