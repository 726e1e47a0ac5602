//! Compressed clusters. Contexts are kept and reused, one a thread.

use std::cell::RefCell;

use flate2::{Compress, Compression as Level, Decompress, FlushCompress, FlushDecompress, Status};
use libdeflater::Decompressor;
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
    inflate: Inflate,
}

/// Contexts for deflate: one for whole streams, and one that can stop within one.
pub(crate) struct Inflate {
    whole: Decompressor,
    part: Decompress,
}

impl Inflate {
    pub(crate) fn new() -> Self {
        Self { whole: Decompressor::new(), part: Decompress::new(false) }
    }

    /// Decompresses a cluster. A stream that ends with it takes little more than half of the time.
    pub(crate) fn cluster(&mut self, input: &[u8], out: &mut [u8]) -> Result<(), String> {
        match self.whole.deflate_decompress(input, out) {
            Ok(len) if len == out.len() => Ok(()),
            // Writers may leave a stream without its last block: what is odd or damaged is judged as QEMU does.
            _ => self.beginning(input, out),
        }
    }

    /// Decompresses the first bytes of a cluster, or all.
    pub(crate) fn beginning(&mut self, input: &[u8], out: &mut [u8]) -> Result<(), String> {
        let context = &mut self.part;
        context.reset(false);
        let want = out.len() as u64;
        loop {
            let (before_in, before_out) = (context.total_in(), context.total_out());
            let rest = input.get(before_in as usize..).unwrap_or(&[]);
            let status = context
                .decompress(
                    rest,
                    out.get_mut(before_out as usize..).unwrap_or(&mut []),
                    FlushDecompress::None,
                )
                .map_err(|e| e.to_string())?;
            if context.total_out() == want {
                // A cluster is done when it is full.
                return Ok(());
            }
            if status == Status::StreamEnd
                || (context.total_in(), context.total_out()) == (before_in, before_out)
            {
                return Err("it ends too early".into());
            }
        }
    }
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> =
        RefCell::new(Contexts { zstd: DCtx::create(), inflate: Inflate::new() });
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
        CompressionType::Deflate => contexts.inflate.cluster(input, out),
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

/// How many of `input`'s first bytes are the cluster of `len` bytes: an entry of the L2 table says it only in sectors.
/// `None` where that cannot be told, or where they are no such cluster.
pub(crate) fn stored_len(kind: CompressionType, input: &[u8], len: u64) -> Option<usize> {
    match kind {
        CompressionType::Zstd => {
            let whole = zstd::zstd_safe::get_frame_content_size(input).ok().flatten();
            whole.filter(|whole| *whole == len)?;
            zstd::zstd_safe::find_frame_compressed_size(input).ok()
        }
        CompressionType::Deflate => with_buffers(|_, whole| {
            whole.resize(len as usize, 0);
            CONTEXTS.with_borrow_mut(|contexts| {
                contexts.inflate.beginning(input, whole).ok()?;
                // QEMU wants the last block's end, which may follow the last byte.
                let inflate = &mut contexts.inflate.part;
                let rest = input.get(inflate.total_in() as usize..)?;
                let end = inflate.decompress(rest, &mut [], FlushDecompress::Finish).ok();
                let ended = end == Some(Status::StreamEnd);
                ended.then_some(inflate.total_in() as usize)
            })
        }),
    }
}

/// Level 3 of zstd is tuned here for clusters of these sizes, in bytes.
const TUNED: std::ops::RangeInclusive<usize> = 32 << 10..=128 << 10;
/// Compresses clusters with contexts that are kept.
pub struct Compressor {
    how: Compression,
    zstd: CCtx<'static>,
    tuned: Option<Tuned>,
    deflate: Compress,
    finer: Option<Finer>,
}

/// Three ways for clusters of usual sizes, measured on the files of a Debian system. Where there is much to find, smaller
/// tables than level 3's lose next to nothing and stay in the processor's cache. Where there is little, level 3 looks
/// twice at every byte for nothing: one table then finds as much, and short matches, which pay where literals are long,
/// more. Neighbours resemble each other, so the last cluster tells which way the next one goes.
struct Tuned {
    ways: [CCtx<'static>; 3],
    next: usize,
}

/// From these shares of a cluster (in percent) on, what it shrank to sends the next one the second or the third way.
const WAYS: [usize; 2] = [40, 60];

fn context(parameters: &[CParameter]) -> Result<CCtx<'static>, String> {
    let mut context = CCtx::create();
    // Every reader then notices a flipped bit, QEMU too.
    for p in [CParameter::ChecksumFlag(true)].iter().chain(parameters) {
        context.set_parameter(*p).map_err(|e| get_error_name(e).to_owned())?;
    }
    Ok(context)
}

impl Tuned {
    fn new() -> Result<Self, String> {
        use CParameter::{ChainLog, CompressionLevel, HashLog, MinMatch};
        let ways = [
            context(&[CompressionLevel(3), HashLog(15), ChainLog(14), MinMatch(5)])?,
            context(&[CompressionLevel(2), HashLog(15), MinMatch(5)])?,
            context(&[CompressionLevel(2), HashLog(15), MinMatch(4)])?,
        ];
        Ok(Self { ways, next: 0 })
    }

    fn compress(&mut self, guest: &[u8], out: &mut [u8]) -> Option<usize> {
        let len = self.ways.get_mut(self.next)?.compress2(out, guest).ok();
        let became = len.unwrap_or(guest.len());
        self.next = WAYS.iter().filter(|percent| became * 100 >= guest.len() * **percent).count();
        len
    }
}

/// Level 7 of deflate means 9 for a cluster whose last neighbour shrank little, and 5 for the others, whatever its size.
/// Level 9 alone also takes matches of three bytes. Where literals are long they make the file 2–4 % smaller; where there
/// is much to find they gain next to nothing. On the files of a Debian system the mixture takes no more time than
/// level 7 throughout, and the file is 1 % smaller.
struct Finer {
    deflate: Compress,
    next: bool,
}

/// From this share of a cluster (in percent) on, what it shrank to has the next one compressed at level 9.
const FINER: usize = 35;

fn deflate(level: u32) -> Compress {
    Compress::new_with_window_bits(Level::new(level), false, WINDOW_BITS)
}

impl Compressor {
    /// Contexts for one thread. The error is the reason.
    pub fn new(how: Compression) -> Result<Self, String> {
        let level = CParameter::CompressionLevel(how.level.try_into().unwrap_or(3));
        let is_zstd = how.kind == CompressionType::Zstd;
        let zstd = if is_zstd { context(&[level])? } else { CCtx::create() };
        let tuned = (is_zstd && how.level == 3).then(Tuned::new).transpose()?;
        let finer = (!is_zstd && how.level == 7).then(|| Finer { deflate: deflate(9), next: false });
        let deflate = deflate(if finer.is_some() { 5 } else { how.level.min(9) });
        Ok(Self { how, zstd, tuned, deflate, finer })
    }

    /// Its codec.
    pub fn kind(&self) -> CompressionType {
        self.how.kind
    }

    /// Forgets what clusters were like so far: from here on the output depends only on what follows.
    pub fn forget(&mut self) {
        if let Some(tuned) = &mut self.tuned {
            tuned.next = 0;
        }
        if let Some(finer) = &mut self.finer {
            finer.next = false;
        }
    }

    /// Appends the compressed cluster to `out` and says how long it is; `None` (and `out` as before) when it would not
    /// be shorter than the cluster.
    pub fn compress(&mut self, guest: &[u8], out: &mut Vec<u8>) -> Result<Option<usize>, String> {
        let start = out.len();
        out.resize(start + guest.len(), 0);
        let len = self.compress_into(guest, &mut out[start..]);
        out.truncate(start + len.as_ref().map_or(0, |len| len.unwrap_or(0)));
        len
    }

    /// Compresses one cluster into `out`, which has its length, and says how long it became; `None` when that would not
    /// be shorter. The error is the reason.
    pub fn compress_into(&mut self, guest: &[u8], out: &mut [u8]) -> Result<Option<usize>, String> {
        let room = guest.len().saturating_sub(1).min(out.len());
        let target = &mut out[..room];
        Ok(match (self.how.kind, &mut self.tuned) {
            // The one error to expect is that the output does not fit.
            (CompressionType::Zstd, Some(tuned)) if TUNED.contains(&guest.len()) => {
                tuned.compress(guest, target)
            }
            (CompressionType::Zstd, _) => self.zstd.compress2(target, guest).ok(),
            (CompressionType::Deflate, _) => {
                let deflate = match &mut self.finer {
                    Some(finer) if finer.next => &mut finer.deflate,
                    _ => &mut self.deflate,
                };
                deflate.reset();
                let status =
                    deflate.compress(guest, target, FlushCompress::Finish).map_err(|e| e.to_string())?;
                let len = (status == Status::StreamEnd).then_some(deflate.total_out() as usize);
                if let Some(finer) = &mut self.finer {
                    finer.next = len.is_some_and(|len| len * 100 >= guest.len() * FINER);
                }
                len
            }
        })
    }
}
