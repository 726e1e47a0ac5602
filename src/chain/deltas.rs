//! Merging the deltas that a VM has on primary: what goes into what.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::store::manifest::PrimaryImage;

/// The images that snapshots on primary are made of: nothing is ever merged into one of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// These, by device and inode: one image may have several names.
    Images(BTreeSet<(u64, u64)>),
    /// Nobody knows which: an image of a snapshot cannot be read.
    All,
}

impl Held {
    /// No snapshot is there.
    pub fn none() -> Self {
        Self::Images(BTreeSet::new())
    }

    /// Whether a snapshot is made of it.
    pub fn has(&self, image: &PrimaryImage) -> bool {
        match self {
            Self::Images(images) => images.contains(&(image.device, image.inode)),
            Self::All => true,
        }
    }
}

/// One image that is merged into another below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is merged.
    pub top: PathBuf,
    /// What it is merged into.
    pub base: PathBuf,
}

/// "Ending a chain early", and row "it is current": all that knibfs left of a volume is merged, the lowest first.
///
/// `images` are as they lie on primary, top first. Only deltas with an owner are merged, and each into the next image
/// below that stays, unless a snapshot holds that: templates, snapshots of others and the disk itself are never merged
/// into anything. A delta that is kept stays its owner's; removing the snapshot merges it.
pub fn merges(images: &[PrimaryImage], held: &Held) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut stays: Option<&PrimaryImage> = None;
    for image in images.iter().rev() {
        match stays {
            Some(base) if image.owner.is_some() && !held.has(base) => {
                steps.push(Step { top: image.path.clone(), base: base.path.clone() });
            }
            _ => stays = Some(image),
        }
    }
    steps
}

/// Step 4 and 5 of a backup: the deltas of earlier backups are merged, at the end of a chain (`merge_live`) the new one
/// too. `before` are a volume's images before the snapshot, `after` are the paths afterwards, one more, top first: an
/// overlay at the given path has renamed what it stands on.
pub fn after_backup(
    before: &[PrimaryImage],
    after: &[&Path],
    keep_deltas: bool,
    merge_live: bool,
    held: &Held,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut stays: Option<(&PrimaryImage, &Path)> = None;
    for (image, now) in before.iter().zip(after.iter().skip(1)).rev() {
        match stays {
            Some((below, base)) if image.owner.is_some() && !keep_deltas && !held.has(below) => {
                steps.push(Step { top: now.to_path_buf(), base: base.to_path_buf() });
            }
            _ => stays = Some((image, now)),
        }
    }
    if let (true, Some(live), Some((below, base))) = (merge_live, after.first(), stays)
        && !held.has(below)
    {
        steps.push(Step { top: live.to_path_buf(), base: base.to_path_buf() });
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::BackupId;
    use crate::store::manifest::ImageFormat;

    fn images(owned: &[bool]) -> Vec<PrimaryImage> {
        let image = |(at, owned): (usize, &bool)| PrimaryImage {
            path: format!("/images/{at}").into(),
            format: ImageFormat::Qcow2,
            device: 1,
            inode: at as u64,
            virtual_size: 1 << 20,
            modified: None,
            owner: owned.then(BackupId::random),
        };
        owned.iter().enumerate().map(image).collect()
    }

    #[test]
    fn the_delta_of_the_current_backup_goes_into_the_disk() {
        let steps = merges(&images(&[true, false]), &Held::none());
        assert_eq!(steps, [Step { top: "/images/0".into(), base: "/images/1".into() }]);
    }

    #[test]
    fn another_s_snapshot_above_a_delta_is_kept() {
        let steps = merges(&images(&[false, true, false, false]), &Held::none());
        assert_eq!(steps, [Step { top: "/images/1".into(), base: "/images/2".into() }]);
    }

    #[test]
    fn nothing_is_merged_into_what_a_snapshot_holds() {
        let held = Held::Images([(1, 2), (1, 3)].into());
        // 0 is live, a snapshot is 2 with all below it.
        let steps = merges(&images(&[true, false, true, false]), &held);
        assert_eq!(steps, [Step { top: "/images/0".into(), base: "/images/1".into() }]);
        assert_eq!(merges(&images(&[true, false]), &Held::All), []);
        let after: Vec<&Path> =
            ["/new", "/images/0", "/images/1", "/images/2", "/images/3"].map(Path::new).into();
        let steps = after_backup(&images(&[true, false, true, false]), &after, false, true, &held);
        let expected = [("/images/0", "/images/1"), ("/new", "/images/1")];
        assert_eq!(steps, expected.map(|(top, base)| Step { top: top.into(), base: base.into() }));
    }

    proptest! {
        #[test]
        fn afterwards_nothing_on_primary_has_an_owner_and_nothing_else_was_touched(
            owned in prop::collection::vec(any::<bool>(), 0..12),
        ) {
            let before = images(&owned);
            let mut left: Vec<&PrimaryImage> = before.iter().collect();
            for step in merges(&before, &Held::none()) {
                let at = left.iter().position(|i| i.path == step.top).unwrap();
                // Each merge goes one down, so a crash between two leaves a chain that shows the same.
                prop_assert_eq!(left.get(at + 1).map(|i| &i.path), Some(&step.base));
                prop_assert!(left[at].owner.is_some());
                left.remove(at);
            }
            // The lowest image has nothing to go into.
            let kept = left.iter().filter(|i| i.owner.is_some()).count();
            prop_assert_eq!(kept, usize::from(owned.last() == Some(&true)));
            let others = before.iter().filter(|i| i.owner.is_none()).count();
            prop_assert_eq!(left.len() - kept, others);
        }
    }
}
