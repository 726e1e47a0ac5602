//! What is written: bytes in memory, or what another chain shows.

use std::borrow::Cow;
use std::ops::Range;

use crate::{Chain, Error, Result, Storage};

/// Guest bytes that are read at once where the system does not copy by itself.
const STEP: u64 = 256 << 10;

/// Bytes to write, by their offsets from the first on.
pub(crate) trait Content {
    /// A part of them.
    fn bytes(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>>;
    /// Writes a part of them to `host` of a file.
    fn put(&self, to: &dyn Storage, range: Range<u64>, host: u64) -> Result<()>;
}

/// Writes bytes, if there are any.
pub(super) fn write(to: &dyn Storage, bytes: &[u8], host: u64) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    to.write_at(bytes, host)
        .map_err(|e| Error::io(to.path(), format!("writing {} bytes at {host}", bytes.len()), e))
}

impl Content for &[u8] {
    fn bytes(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(self.get(range.start as usize..range.end as usize).unwrap_or_default()))
    }
    fn put(&self, to: &dyn Storage, range: Range<u64>, host: u64) -> Result<()> {
        write(to, &self.bytes(range)?, host)
    }
}

/// What a chain shows from `offset` on.
pub(crate) struct Shown<'a> {
    pub(crate) chain: &'a Chain,
    pub(crate) offset: u64,
}

impl Content for Shown<'_> {
    fn bytes(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.chain.read_at(&mut bytes, self.offset + range.start)?;
        Ok(Cow::Owned(bytes))
    }

    fn put(&self, to: &dyn Storage, range: Range<u64>, host: u64) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.chain.extent_at(self.offset + at)?;
            let len = extent.len.min(range.end - at);
            let place = host + (at - range.start);
            let mut done = match self.chain.file_of(&extent) {
                Some((file, from)) => to.copy_from(file, from, place, len),
                None => 0,
            };
            while done < len {
                let n = STEP.min(len - done);
                write(to, &self.bytes(at + done..at + done + n)?, place + done)?;
                done += n;
            }
            at += len;
        }
        Ok(())
    }
}
