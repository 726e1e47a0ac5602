//! Compressed clusters. Contexts are kept and reused, one a thread.

use std::cell::RefCell;

use flate2::{Compress, Compression as Level, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, InBuffer, OutBuffer, get_error_name};

use crate::CompressionType;

/// QEMU inflates with a window of 12 bits, so nothing larger may be written.
const WINDOW_BITS: u8 = 12;

/// A codec and how hard it tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// Codec.
    pub kind: CompressionType,
    /// Its own level: zstd 1–19, deflate 1–9.
    pub level: u32,
}

struct Contexts {
    zstd: DCtx<'static>,
    inflate: Decompress,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> =
        RefCell::new(Contexts { zstd: DCtx::create(), inflate: Decompress::new(false) });
    static BUFFERS: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Two buffers of this thread, kept between calls.
pub(crate) fn with_buffers<T>(work: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>) -> T) -> T {
    BUFFERS.with(|cell| match cell.try_borrow_mut() {
        Ok(mut b) => {
            let (first, second) = &mut *b;
            work(first, second)
        }
        Err(_) => work(&mut Vec::new(), &mut Vec::new()),
    })
}

/// Decompresses exactly `out.len()` bytes; what follows them in `input` is padding. The error is the reason.
pub fn decompress(kind: CompressionType, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    CONTEXTS.with_borrow_mut(|contexts| match kind {
        CompressionType::Zstd => unzstd(&mut contexts.zstd, input, out),
        CompressionType::Deflate => inflate(&mut contexts.inflate, input, out),
    })
}

fn unzstd(context: &mut DCtx<'static>, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    context.reset(zstd::zstd_safe::ResetDirective::SessionOnly).map_err(|e| get_error_name(e).to_owned())?;
    let want = out.len();
    let mut output = OutBuffer::around(out);
    let mut source = InBuffer::around(input);
    loop {
        let before = (output.pos(), source.pos());
        let hint =
            context.decompress_stream(&mut output, &mut source).map_err(|e| get_error_name(e).to_owned())?;
        if hint == 0 && output.pos() == want {
            return Ok(());
        }
        if (output.pos(), source.pos()) == before {
            return Err(if output.pos() == want {
                "it yields more than a cluster"
            } else {
                "it ends too early"
            }
            .into());
        }
    }
}

fn inflate(context: &mut Decompress, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    context.reset(false);
    let want = out.len() as u64;
    loop {
        let (before_in, before_out) = (context.total_in(), context.total_out());
        let rest = input.get(before_in as usize..).unwrap_or(&[]);
        let status = context
            .decompress(rest, out.get_mut(before_out as usize..).unwrap_or(&mut []), FlushDecompress::None)
            .map_err(|e| e.to_string())?;
        if context.total_out() == want {
            // A cluster is done when it is full: writers may leave the stream without its last block.
            return Ok(());
        }
        if status == Status::StreamEnd || (context.total_in(), context.total_out()) == (before_in, before_out)
        {
            return Err("it ends too early".into());
        }
    }
}

/// Compresses clusters with one context.
pub struct Compressor {
    how: Compression,
    zstd: CCtx<'static>,
    deflate: Compress,
}

impl Compressor {
    /// A context for one thread. The error is the reason.
    pub fn new(how: Compression) -> Result<Self, String> {
        let mut zstd = CCtx::create();
        if how.kind == CompressionType::Zstd {
            let set =
                |zstd: &mut CCtx<'static>, p| zstd.set_parameter(p).map_err(|e| get_error_name(e).to_owned());
            set(&mut zstd, CParameter::CompressionLevel(how.level.try_into().unwrap_or(3)))?;
            // Every reader then notices a flipped bit, QEMU too.
            set(&mut zstd, CParameter::ChecksumFlag(true))?;
        }
        let deflate = Compress::new_with_window_bits(Level::new(how.level.min(9)), false, WINDOW_BITS);
        Ok(Self { how, zstd, deflate })
    }

    /// Its codec.
    pub fn kind(&self) -> CompressionType {
        self.how.kind
    }

    /// Appends the compressed cluster to `out` and says how long it is; `None` (and `out` as before) when it would not
    /// be shorter than the cluster.
    pub fn compress(&mut self, guest: &[u8], out: &mut Vec<u8>) -> Result<Option<usize>, String> {
        let start = out.len();
        let room = guest.len().saturating_sub(1);
        out.resize(start + room, 0);
        let target = &mut out[start..];
        let len = match self.how.kind {
            // The one error to expect is that the output does not fit.
            CompressionType::Zstd => self.zstd.compress2(target, guest).ok(),
            CompressionType::Deflate => {
                self.deflate.reset();
                let status =
                    self.deflate.compress(guest, target, FlushCompress::Finish).map_err(|e| e.to_string())?;
                (status == Status::StreamEnd).then_some(self.deflate.total_out() as usize)
            }
        };
        out.truncate(start + len.unwrap_or(0));
        Ok(len)
    }
}
