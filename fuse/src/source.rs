//! Where a file's bytes come from.

use std::os::fd::BorrowedFd;

use crate::{FsError, FsResult, Problem};

/// Names a decoded block. Two sources that hold the same block should give it the same key, so that it is kept once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// The image; a number that is never used for another.
    pub image: u64,
    /// The block in it.
    pub block: u64,
}

/// A run of a source's bytes. It holds the offset that was asked for and is never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Bytes. May reach past the end of the source.
    pub len: u64,
    /// What they are.
    pub kind: SpanKind,
}

/// What a run of bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// Zeros; nothing is stored.
    Zero,
    /// Stored as they are: [`BlockSource::read_direct`].
    Direct,
    /// One block that is decoded as a whole: [`BlockSource::read_block`]. `Span::len` is its decoded length.
    Block(BlockKey),
}

impl Span {
    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// A file as runs of zeros, of stored bytes and of blocks to decode. Called from many threads at once; must not hold a
/// lock while it reads or decodes.
pub trait BlockSource: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The run that holds `offset`, which is below the length.
    fn span(&self, offset: u64) -> FsResult<Span>;

    /// Fills `buf` from a run of [`SpanKind::Direct`], checked.
    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> FsResult<()>;

    /// Decodes the block that begins at `start` into `out`, which is exactly as long as the block, checked.
    fn read_block(&self, start: u64, key: BlockKey, out: &mut [u8]) -> FsResult<()>;

    /// Fills `buf` with the bytes from `from` on of the block of `len` bytes that begins at `start`, checked. A source that can stop
    /// decoding there should.
    fn read_part(&self, start: u64, key: BlockKey, len: usize, from: usize, buf: &mut [u8]) -> FsResult<()> {
        crate::with_buffer(len, |block| {
            self.read_block(start, key, block)?;
            let part = block.get(from..from.saturating_add(buf.len()));
            buf.copy_from_slice(part.ok_or_else(|| FsError::new(Problem::Bug, "a part outside its block"))?);
            Ok(())
        })
    }

    /// As [`crate::File::lock`].
    fn lock(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether reads wait for a disk now, so that the next one might.
    fn waits(&self) -> bool {
        false
    }

    /// Told that a range of one run of [`SpanKind::Direct`] is read soon: a source on a disk has it brought in, without waiting for
    /// it.
    fn will_need(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Called behind a read that has been answered, when nobody else reads: work that prepares for the next read and that
    /// no reader should wait for.
    fn replied(&self) {}

    /// The first byte at or behind `offset` that is stored; none when only zeros follow. A source that can jump over
    /// what is not stored should.
    fn next_data(&self, offset: u64) -> FsResult<Option<u64>> {
        let mut at = offset;
        while at < self.len() {
            let span = self.span(at)?;
            if span.kind != SpanKind::Zero {
                return Ok(Some(at));
            }
            at = span.end().max(at.saturating_add(1));
        }
        Ok(None)
    }

    /// The first byte at or behind `offset` that is not stored, or the end.
    fn next_hole(&self, offset: u64) -> FsResult<u64> {
        let mut at = offset;
        while at < self.len() {
            let span = self.span(at)?;
            if span.kind == SpanKind::Zero {
                return Ok(at);
            }
            at = span.end().max(at.saturating_add(1));
        }
        Ok(self.len())
    }
}
