//! Whether what lies under a delta on primary is what the delta was made on.
//!
//! Row "when in doubt, full" holds where the disk can be read as the guest sees it, whatever another tool did to its
//! layers. A delta of ours on a base that it was not made on shows a disk that never was: that is no doubt, and no
//! backup of it may take the place of a good one.

use std::path::PathBuf;

use crate::store::manifest::PrimaryImage;
use crate::store::vm::VolumeTracking;

/// A delta of ours that stands on something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its delta {} stands on {}, {}", delta.display(), found.display(), match replaced {
    true => "which is another file than the one that it was made on".to_owned(),
    false => format!("not on {} as it was made", was.display()),
})]
pub struct ForeignBase {
    /// The delta.
    pub delta: PathBuf,
    /// What it stands on now.
    pub found: PathBuf,
    /// What it was made on.
    pub was: PathBuf,
    /// It is at the same path.
    pub replaced: bool,
}

/// Looks for a delta that was left in `left` and that stands on an image that was not below it then. Images that were
/// merged away or put on top since are no harm.
pub fn foreign_base(left: &VolumeTracking, now: &[PrimaryImage]) -> Option<ForeignBase> {
    let at = now.iter().position(|image| image.owner.is_some())?;
    let delta = now.get(at)?;
    let below = left.images.iter().position(|was| was.path == delta.path)? + 1;
    let mut known = left.images.get(below..)?;
    for image in now.get(at + 1..)? {
        // The same inode on a device of another number: the file system was mounted anew.
        let same = known.iter().position(|was| was.inode == image.inode && was.format == image.format);
        match (same, known.first()) {
            (Some(place), _) => known = known.get(place + 1..).unwrap_or_default(),
            (None, Some(was)) => {
                return Some(ForeignBase {
                    delta: delta.path.clone(),
                    found: image.path.clone(),
                    was: was.path.clone(),
                    replaced: image.path == was.path,
                });
            }
            (None, None) => {
                return Some(ForeignBase {
                    delta: delta.path.clone(),
                    found: image.path.clone(),
                    was: left.images.last()?.path.clone(),
                    replaced: false,
                });
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::BackupId;
    use crate::store::manifest::ImageFormat;

    fn image(name: &str, inode: u64, owner: Option<BackupId>) -> PrimaryImage {
        PrimaryImage {
            path: format!("/images/{name}").into(),
            format: ImageFormat::Qcow2,
            device: 1,
            inode,
            virtual_size: 1 << 20,
            modified: None,
            owner,
        }
    }

    #[test]
    fn layers_may_come_and_go_but_not_change_under_a_delta() {
        let own = Some(BackupId::random());
        let (delta, top, base) = (image("delta", 3, own), image("top", 2, None), image("base", 1, None));
        let left =
            VolumeTracking { images: vec![delta.clone(), top.clone(), base.clone()], virtual_size: 1 << 20 };
        let found = |now: &[&PrimaryImage]| {
            foreign_base(&left, &now.iter().map(|i| (*i).clone()).collect::<Vec<_>>())
        };
        let snapshot = image("snapshot", 9, None);
        for harmless in [
            &[&delta, &top, &base][..],
            &[&snapshot, &delta, &top, &base],
            &[&delta, &base],
            &[&delta, &top],
            &[&delta],
            // The delta itself is gone: there is nothing to mistrust.
            &[&top, &base],
            &[&snapshot],
            &[],
        ] {
            assert_eq!(found(harmless), None, "{harmless:?}");
        }
        let moved = PrimaryImage { device: 7, ..top.clone() };
        assert_eq!(found(&[&delta, &moved, &base]), None, "only the device's number changed");

        let other = image("top", 5, None);
        assert!(found(&[&delta, &other, &base]).unwrap().replaced);
        let elsewhere = image("elsewhere", 6, None);
        assert_eq!(found(&[&delta, &top, &elsewhere]).unwrap().found, elsewhere.path);
        assert_eq!(found(&[&delta, &top, &base, &elsewhere]).unwrap().was, base.path);
        assert!(found(&[&delta, &base, &top]).is_some(), "turned round");
    }
}
