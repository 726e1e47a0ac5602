//! Small files: manifests, definitions, what the mount says of itself.

use std::sync::Arc;

use knib_fuse::{File, FsError, FsResult, Problem};

/// A small file that is read whole when it is opened.
#[derive(Debug)]
pub struct Text(pub Arc<[u8]>);

impl File for Text {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.0.get(from..).and_then(|b| b.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or_else(|| FsError::new(Problem::Invalid, "past the end"))?);
        Ok(())
    }
}
