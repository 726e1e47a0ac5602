//! The model of a drawn chain: which rows there are and how they hang together. The command line paints it.

use crate::store::manifest::{BackupState, Kind, Manifest};
use crate::store::{BackupId, BackupName};

/// One row of the drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The backup; none for hidden ones, which only show that something is kept there.
    pub backup: Option<BackupName>,
    /// Removed backups that are kept here for what stands on them.
    pub hidden: usize,
    /// How it hangs on the row above.
    pub link: Link,
    /// What its volumes are.
    pub kind: Shown,
    /// The next incremental stands on it.
    pub current: bool,
    /// Nothing will stand on it.
    pub end_of_chain: bool,
}

/// How a row hangs on the one above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// It begins a chain.
    Start,
    /// It stands on the row above; more of the chain follows.
    Middle,
    /// It stands on the row above and is the last of its chain.
    Last,
    /// Outside every chain.
    Isolated,
}

/// What the volumes of a backup are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// All full.
    Full,
    /// All incremental.
    Incremental,
    /// Some full inside an incremental backup.
    Mixed,
}

impl Shown {
    /// What a backup's volumes are.
    pub fn of(manifest: &Manifest) -> Self {
        let full = manifest.disks.iter().filter(|d| d.kind == Kind::Full).count();
        match full {
            0 if !manifest.disks.is_empty() => Self::Incremental,
            n if n == manifest.disks.len() => Self::Full,
            _ => Self::Mixed,
        }
    }
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Mixed => "mixed",
        })
    }
}

/// Draws a VM's backups, which are in order of their sequence numbers: chain after chain, each in order.
pub fn rows(backups: &[Manifest], current: Option<BackupId>) -> Vec<Row> {
    let mut rows = Vec::new();
    for root in backups.iter().filter(|m| !has_parent_in(m, backups)) {
        let chain = descendants(root, backups);
        let first = rows.len();
        let mut hidden = 0;
        for manifest in chain {
            if manifest.state == BackupState::Removed {
                hidden += 1;
                continue;
            }
            if hidden > 0 {
                rows.push(hidden_row(hidden, rows.len() == first));
                hidden = 0;
            }
            let link = match rows.len() == first {
                true if manifest.isolated => Link::Isolated,
                true => Link::Start,
                false => Link::Middle,
            };
            rows.push(Row {
                backup: Some(manifest.name.clone()),
                hidden: 0,
                link,
                kind: Shown::of(manifest),
                current: current == Some(manifest.id),
                end_of_chain: manifest.end_of_chain,
            });
        }
        if hidden > 0 {
            rows.push(hidden_row(hidden, rows.len() == first));
        }
        if let Some(last) = rows.last_mut().filter(|r| r.link == Link::Middle) {
            last.link = Link::Last;
        }
    }
    rows
}

fn hidden_row(hidden: usize, starts: bool) -> Row {
    let link = if starts { Link::Start } else { Link::Middle };
    Row { backup: None, hidden, link, kind: Shown::Full, current: false, end_of_chain: false }
}

fn has_parent_in(manifest: &Manifest, backups: &[Manifest]) -> bool {
    // Earlier than the child: a loop in damaged manifests must not hide its members.
    let parent = manifest.parent.as_ref();
    parent.is_some_and(|p| backups.iter().any(|b| b.id == p.id && b.sequence < manifest.sequence))
}

/// The backup and all that stand on it, in order of their sequence numbers.
fn descendants<'a>(root: &'a Manifest, backups: &'a [Manifest]) -> Vec<&'a Manifest> {
    let mut chain = vec![root];
    for manifest in backups {
        let stands = manifest.parent.as_ref().is_some_and(|p| chain.iter().any(|m| m.id == p.id));
        if stands && manifest.sequence > root.sequence {
            chain.push(manifest);
        }
    }
    chain
}
