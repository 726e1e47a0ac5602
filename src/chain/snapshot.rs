//! Snapshots on primary: which of a volume's images are needed, which are merged, which deleted.
//!
//! The images of a volume are a tree: each stands on the one below it, the guest writes to one of them, and snapshots and
//! reverts make it branch. An image is *shown* when a living snapshot is that image with all below it. Rows are those of
//! table A in the requirements, on images B (the disk), then one for each overlay in the order in which they are made:
//!
//! | row | | images, `*` shown, `!` live |
//! |---|---|---|
//! | 1 | take s1 | B\* ← 1! |
//! | 2 | take s2 | B\* ← 1\* ← 2! |
//! | 3 | revert to s2 | B\* ← 1\* ← 3!; 2 is deleted |
//! | 4 | revert to s1 | B\* ← 1\*, B ← 4!; 3 is deleted |
//! | 5 | take s3 | B\* ← 1\*, B ← 4\* ← 5! |
//! | 6 | remove s1 | B ← 1\*, B ← 4\* ← 5!: two stand on B, so it stays |
//! | 7 | remove s3 | B ← 1\*, B ← 4!: 5 is merged into 4 |
//! | 8 | remove s2 | B!: 1 is deleted, 4 is merged into B |

use std::path::{Path, PathBuf};

/// An image of a volume on primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it lies.
    pub path: PathBuf,
    /// What it stands on.
    pub on: Option<PathBuf>,
    /// The guest writes to it.
    pub live: bool,
    /// A living snapshot is this image with all below it.
    pub shown: bool,
    /// It is the delta that the current backup left: it holds what changed since, and nothing older.
    pub tracked: bool,
    /// Something that knibfs does not manage names it or stands on it: another tool's snapshot, another VM.
    pub others: bool,
    /// knibfs made it.
    pub made: bool,
}

/// One thing to do; after each the volume's images are as sound as before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Row 3: nothing stands on it and nothing shows it.
    Delete {
        /// The image.
        path: PathBuf,
    },
    /// Rows 7 and 8: nothing but one image stands on `base`, which nothing shows.
    Merge {
        /// The image that goes.
        top: PathBuf,
        /// The image that then is what `top` was.
        base: PathBuf,
    },
}

/// What to do next, the lowest first; none when all is as it should be.
///
/// A merge changes `base` and deletes `top`, so nothing may show `base`, nothing else may stand on it, and nothing that
/// knibfs does not manage may name either. `top` must be of knibfs: a disk of the user's is never taken away. The delta of
/// the current backup never goes down: what changed before the backup and after it would be one.
pub fn next(images: &[Image]) -> Option<Step> {
    let mut merges: Vec<(usize, Step)> = Vec::new();
    for image in images {
        let mut above = images.iter().filter(|i| i.on.as_deref() == Some(&image.path));
        let free = !image.live && !image.shown && !image.others;
        match (above.next(), above.next()) {
            (None, _) if free && image.made => return Some(Step::Delete { path: image.path.clone() }),
            (Some(top), None) if free && top.made && !top.others && !top.tracked => {
                let step = Step::Merge { top: top.path.clone(), base: image.path.clone() };
                merges.push((depth(images, image), step));
            }
            _ => {}
        }
    }
    merges.into_iter().min_by_key(|(depth, _)| *depth).map(|(_, step)| step)
}

/// Images below it. A loop, which no sound chain has, ends the count.
fn depth(images: &[Image], image: &Image) -> usize {
    let below = |i: &&Image| images.iter().find(|b| i.on.as_deref() == Some(&b.path));
    std::iter::successors(Some(image), below).take(images.len()).count()
}

/// The images after a step.
pub fn apply(images: &mut Vec<Image>, step: &Step) {
    match step {
        Step::Delete { path } => images.retain(|i| i.path != *path),
        Step::Merge { top, base } => {
            let Some(at) = images.iter().position(|i| i.path == *top) else { return };
            let gone = images.remove(at);
            for image in images.iter_mut() {
                if image.on.as_deref() == Some(top) {
                    image.on = Some(base.clone());
                }
                if image.path == *base {
                    image.live |= gone.live;
                    image.shown |= gone.shown;
                }
            }
        }
    }
}

/// Whether a removed snapshot that was `path` is still there: as an image of its own that others stand on.
pub fn is_kept(images: &[Image], path: &Path) -> bool {
    images.iter().any(|i| i.path == path && !i.live && !i.shown)
}

/// What a new snapshot or a revert is refused for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the sentences say it
pub enum Refused {
    #[error("the VM is {state}: shut it down first, as going back to a snapshot changes its disks under it")]
    NotOff { state: &'static str },
    #[error(
        "its memory was saved by `virsh managedsave` and would not fit its disks then: start it, or `virsh managedsave-remove` it"
    )]
    Saved,
    #[error("the disk {disk} is no disk of the VM any more: attach it again first")]
    Detached { disk: String },
    #[error("the image {} of its disk {disk} {what}", path.display())]
    Image { disk: String, path: PathBuf, what: String },
    #[error(
        "its disk {disk} stands on {depth} images already, and QEMU takes no more than {}: remove snapshots",
        super::MAX_DEPTH
    )]
    TooDeep { disk: String, depth: usize },
}

/// A disk that is to go back to a snapshot.
#[derive(Debug, Clone)]
pub struct RevertDisk {
    /// Its name.
    pub disk: String,
    /// It is a disk of the VM.
    pub attached: bool,
    /// The image that the snapshot is.
    pub path: PathBuf,
    /// What is wrong with that image, if anything: "is gone".
    pub trouble: Option<String>,
    /// Images of its chain.
    pub depth: usize,
}

/// Whether a VM may go back to a snapshot: table A, row 3, "stop, revert".
///
/// # Errors
/// [`Refused`]: nothing may be changed.
pub fn revert(state: Option<&'static str>, saved: bool, disks: &[RevertDisk]) -> Result<(), Refused> {
    if let Some(state) = state {
        return Err(Refused::NotOff { state });
    }
    if saved {
        return Err(Refused::Saved);
    }
    for disk in disks {
        if !disk.attached {
            return Err(Refused::Detached { disk: disk.disk.clone() });
        }
        if let Some(what) = &disk.trouble {
            let (path, what) = (disk.path.clone(), what.clone());
            return Err(Refused::Image { disk: disk.disk.clone(), path, what });
        }
        room_above(&disk.disk, disk.depth)?;
    }
    Ok(())
}

/// Row "depth" of the table "Backups": a chain that one more image may be put on. A backup needs one, too.
///
/// # Errors
/// [`Refused::TooDeep`].
pub fn room_above(disk: &str, depth: usize) -> Result<(), Refused> {
    if depth + 2 > super::MAX_DEPTH as usize {
        return Err(Refused::TooDeep { disk: disk.to_owned(), depth });
    }
    Ok(())
}
