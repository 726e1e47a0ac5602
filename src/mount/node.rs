//! What a node is, and the number that follows from it.

use knib_fuse::{FsError, FsResult, Problem};

use super::small::SmallPath;
use crate::store::{BackupId, BackupName, DiskName, Manifest, Store, StoreId, VmName};
use crate::verified::{Damage, number};

/// Where a backup lies, and which one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRef {
    pub vm: VmName,
    pub name: BackupName,
    pub id: BackupId,
}

/// A node of the mount. Holds what identifies it; what it says is read from the store when it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Root,
    Vms,
    ById,
    /// `.knibfs/`.
    Control,
    /// `.knibfs/damage`; another node whenever something is added.
    Damage {
        version: u64,
    },
    /// `.knibfs/status`; says something else whenever it is opened.
    Status,
    Vm(VmName),
    Latest(VmName),
    Backup(BackupRef),
    /// `<disk>.qcow2`; another node when the file is replaced by a compressed one.
    Stored {
        of: BackupRef,
        disk: DiskName,
        digest: String,
    },
    /// `<disk>.raw`; the guest's bytes are the same whatever becomes of the stored files.
    Raw {
        of: BackupRef,
        disk: DiskName,
    },
    /// `manifest.json`, `domain.xml`, … with a hash of its bytes.
    Small {
        of: BackupRef,
        path: SmallPath,
        hash: u64,
    },
    /// `tpm/` and folders in it.
    SmallFolder {
        of: BackupRef,
        path: SmallPath,
    },
    /// `by-id/<id>`.
    IdLink(BackupRef),
}

impl BackupRef {
    /// The backup that a manifest tells of.
    pub fn new(manifest: &Manifest) -> Self {
        Self { vm: manifest.vm.clone(), name: manifest.name.clone(), id: manifest.id }
    }

    /// Its manifest as it is now, which must still be the same backup's.
    pub fn manifest(&self, store: &Store, damage: &Damage) -> FsResult<Manifest> {
        let found = store.manifest(&self.vm, &self.name).map_err(|e| match damage.of_store(&e) {
            gone if gone.problem() == Problem::NotFound => FsError::stale(),
            other => other,
        })?;
        if found.id == self.id { Ok(found) } else { Err(FsError::stale()) }
    }
}

impl Node {
    /// The number: from what the node is, so that it is the same after the next mount and never another's.
    pub fn ino(&self, store: StoreId) -> u64 {
        let uuid = store.uuid();
        let of_store = |kind: &str, parts: &[&[u8]]| {
            let mut all: Vec<&[u8]> = vec![uuid.as_bytes(), kind.as_bytes()];
            all.extend_from_slice(parts);
            number(&all)
        };
        match self {
            Self::Root => knib_fuse::Ino::ROOT.0,
            Self::Vms => of_store("vms", &[]),
            Self::ById => of_store("by-id", &[]),
            Self::Control => of_store("control", &[]),
            Self::Damage { version } => of_store("damage", &[&version.to_le_bytes()]),
            Self::Status => of_store("status", &[]),
            Self::Vm(vm) => of_store("vm", &[vm.as_str().as_bytes()]),
            Self::Latest(vm) => of_store("latest", &[vm.as_str().as_bytes()]),
            Self::Backup(of) => of_store("backup", &[of.id.uuid().as_bytes()]),
            Self::Stored { of, disk, digest } => {
                of_store("stored", &[of.id.uuid().as_bytes(), disk.as_str().as_bytes(), digest.as_bytes()])
            }
            Self::Raw { of, disk } => of_store("raw", &[of.id.uuid().as_bytes(), disk.as_str().as_bytes()]),
            Self::Small { of, path, hash } => {
                of_store("text", &[of.id.uuid().as_bytes(), path.as_str().as_bytes(), &hash.to_le_bytes()])
            }
            Self::SmallFolder { of, path } => {
                of_store("folder", &[of.id.uuid().as_bytes(), path.as_str().as_bytes()])
            }
            Self::IdLink(of) => of_store("id", &[of.id.uuid().as_bytes()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::small::Small;
    use super::*;

    #[test]
    fn numbers_follow_from_what_a_node_is() {
        let store = StoreId::random();
        let of = BackupRef {
            vm: "web1".parse().unwrap(),
            name: "2026-11-23T22-32-42Z".parse().unwrap(),
            id: BackupId::random(),
        };
        let disk: DiskName = "root".parse().unwrap();
        let small = |name: &str| match SmallPath::in_backup(name).unwrap() {
            Small::File(path) | Small::Folder(path) => path,
        };
        let stored =
            |digest: &str| Node::Stored { of: of.clone(), disk: disk.clone(), digest: digest.into() };
        let nodes = [
            Node::Root,
            Node::Vms,
            Node::ById,
            Node::Control,
            Node::Status,
            Node::Vm(of.vm.clone()),
            Node::Latest(of.vm.clone()),
            Node::Backup(of.clone()),
            stored("a"),
            stored("b"),
            Node::Raw { of: of.clone(), disk: disk.clone() },
            Node::Small { of: of.clone(), path: small("manifest.json"), hash: 1 },
            Node::Small { of: of.clone(), path: small("domain.xml"), hash: 1 },
            Node::SmallFolder { of: of.clone(), path: small("tpm") },
            Node::IdLink(of.clone()),
        ];
        let numbers: std::collections::BTreeSet<u64> = nodes.iter().map(|n| n.ino(store)).collect();
        assert_eq!(numbers.len(), nodes.len());
        assert_eq!(stored("a").ino(store), nodes[8].ino(store));
        // The same name with another backup behind it is another node.
        let again = BackupRef { id: BackupId::random(), ..of.clone() };
        assert_ne!(Node::Backup(again).ino(store), Node::Backup(of).ino(store));
    }
}
