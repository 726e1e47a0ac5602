//! Merging the deltas that a VM has on primary: what goes into what.

use std::path::{Path, PathBuf};

use crate::store::manifest::PrimaryImage;

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
/// below that stays: templates, snapshots of others and the disk itself are never merged into anything.
pub fn merges(images: &[PrimaryImage]) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut stays: Option<&Path> = None;
    for image in images.iter().rev() {
        match stays {
            Some(base) if image.owner.is_some() => {
                steps.push(Step { top: image.path.clone(), base: base.to_path_buf() });
            }
            _ => stays = Some(&image.path),
        }
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
            owner: owned.then(BackupId::random),
        };
        owned.iter().enumerate().map(image).collect()
    }

    #[test]
    fn the_delta_of_the_current_backup_goes_into_the_disk() {
        let steps = merges(&images(&[true, false]));
        assert_eq!(steps, [Step { top: "/images/0".into(), base: "/images/1".into() }]);
    }

    #[test]
    fn another_s_snapshot_above_a_delta_is_kept() {
        let steps = merges(&images(&[false, true, false, false]));
        assert_eq!(steps, [Step { top: "/images/1".into(), base: "/images/2".into() }]);
    }

    proptest! {
        #[test]
        fn afterwards_nothing_on_primary_has_an_owner_and_nothing_else_was_touched(
            owned in prop::collection::vec(any::<bool>(), 0..12),
        ) {
            let before = images(&owned);
            let mut left: Vec<&PrimaryImage> = before.iter().collect();
            for step in merges(&before) {
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
