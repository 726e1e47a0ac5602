//! What a node is, and the number that follows from it.

use crate::store::{BackupId, BackupName, DiskName, StoreId, VmName};
use crate::verified::number;

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
    /// `manifest.json` or `domain.xml` with a hash of its text.
    Text {
        of: BackupRef,
        file: TextFile,
        hash: u64,
    },
    /// `by-id/<id>`.
    IdLink(BackupRef),
}

/// Small files of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFile {
    Manifest,
    DomainXml,
}

impl TextFile {
    pub const ALL: [Self; 2] = [Self::Manifest, Self::DomainXml];

    pub fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest.json",
            Self::DomainXml => "domain.xml",
        }
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
            Self::Text { of, file, hash } => {
                of_store("text", &[of.id.uuid().as_bytes(), file.name().as_bytes(), &hash.to_le_bytes()])
            }
            Self::IdLink(of) => of_store("id", &[of.id.uuid().as_bytes()]),
        }
    }
}

#[cfg(test)]
mod tests {
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
            Node::Text { of: of.clone(), file: TextFile::Manifest, hash: 1 },
            Node::Text { of: of.clone(), file: TextFile::DomainXml, hash: 1 },
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
