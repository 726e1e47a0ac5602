//! Small files: manifests, definitions, what the mount says of itself.

use knib_fuse::{File, FsError, FsResult, Problem};

/// A small file that is read whole when it is opened.
#[derive(Debug)]
pub struct Text {
    bytes: Vec<u8>,
    lasting: bool,
}

impl Text {
    /// A file that says the same whenever it is opened.
    pub fn lasting(bytes: Vec<u8>) -> Self {
        Self { bytes, lasting: true }
    }

    /// A file that says something else each time.
    pub fn of_the_moment(bytes: Vec<u8>) -> Self {
        Self { bytes, lasting: false }
    }
}

impl File for Text {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_lasting(&self) -> bool {
        self.lasting
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.bytes.get(from..).and_then(|b| b.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or_else(|| FsError::new(Problem::Invalid, "past the end"))?);
        Ok(())
    }
}
