//! Internal snapshots by what people call them.

use knib_qcow::snapshot::{self, Snapshot};

use super::Failure;
use super::open::Opened;
use super::optlist;

/// Which snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// By id, or else by name.
    Either(String),
    /// By what was given of both.
    Both {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

impl Wanted {
    /// `snapshot.id=ID,snapshot.name=NAME` with one or both, or just an id or name.
    pub fn parse(text: &str) -> Self {
        let parts = text.starts_with("snapshot.").then(|| optlist::parse(&[text]).ok()).flatten();
        let Some(parts) = parts else { return Self::Either(text.to_owned()) };
        let of = |key: &str| parts.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        Self::Both { id: of("snapshot.id"), name: of("snapshot.name") }
    }

    fn find(&self, all: Vec<Snapshot>) -> Option<Snapshot> {
        match self {
            Self::Either(text) => {
                let at = all
                    .iter()
                    .position(|s| s.id == *text)
                    .or_else(|| all.iter().position(|s| s.name == *text));
                at.and_then(|at| all.into_iter().nth(at))
            }
            Self::Both { id, name } => all.into_iter().find(|s| {
                id.as_ref().is_none_or(|id| s.id == *id) && name.as_ref().is_none_or(|name| s.name == *name)
            }),
        }
    }
}

/// The snapshot of an open image.
pub fn find(opened: &Opened, wanted: &Wanted) -> Result<Snapshot, Failure> {
    if opened.header()?.is_none() {
        return Err(Failure::new("Failed to load snapshot: raw images have none"));
    }
    let all = snapshot::list(&*opened.storage).map_err(|e| opened.wrong(&e))?;
    wanted.find(all).ok_or_else(|| Failure::new("Failed to load snapshot: Can't find snapshot"))
}
