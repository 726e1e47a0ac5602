//! The checksums are taken where the engine writes an image.

use std::io;

use knib_qcow::{Observer, Place as Stored};

use super::{ClusterDigest, Place, SumsWriter};
use crate::store::StoreError;

impl SumsWriter {
    fn engine(&self, error: StoreError) -> knib_qcow::Error {
        // A full disk stays one: the operation's message depends on it.
        let source = match error {
            StoreError::Io { source, .. } => source,
            other => io::Error::other(other.to_string()),
        };
        knib_qcow::Error::io(self.path(), "recording checksums", source)
    }
}

impl Observer for SumsWriter {
    type Digest = ClusterDigest;

    fn keep(&self, cluster: u64, guest: &[u8]) -> bool {
        self.is_new(cluster, guest)
    }

    fn digest(&self, _: u64, guest: &[u8], stored: &[u8]) -> ClusterDigest {
        self.digest_cluster(guest, stored)
    }

    fn stored(&self, cluster: u64, place: Stored, digest: ClusterDigest) -> knib_qcow::Result<()> {
        let place = match place {
            Stored::Zero => Place::Zero,
            Stored::Data { offset, len } => Place::Data { offset, len },
            Stored::Compressed { offset, len } => Place::Compressed { offset, len },
        };
        self.record_cluster(cluster, place, &digest).map_err(|e| self.engine(e))
    }

    fn metadata(&self, offset: u64, bytes: &[u8]) -> knib_qcow::Result<()> {
        self.record_metadata(offset, bytes).map_err(|e| self.engine(e))
    }
}
