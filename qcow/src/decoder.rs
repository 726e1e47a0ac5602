//! Decompression for readers that verified the stored bytes by a checksum of their own: only as far into a cluster as
//! they need, and without the codec's own checksum.

use parking_lot::Mutex;
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

use crate::CompressionType;
use crate::codec::Inflate;

/// Contexts that nobody uses. The last one given back, which lies in the processor's cache, is the next one taken,
/// whichever thread works.
struct Pool<T>(Mutex<Vec<T>>);

/// Contexts that are kept: about as many as threads work at once.
const MOST_FREE: usize = 16;

impl<T> Pool<T> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn with<R>(&self, new: impl FnOnce() -> T, work: impl FnOnce(&mut T) -> R) -> R {
        let taken = self.0.lock().pop();
        let mut context = taken.unwrap_or_else(new);
        let result = work(&mut context);
        let mut free = self.0.lock();
        if free.len() < MOST_FREE {
            free.push(context);
        }
        result
    }
}

static ZSTD: Pool<DCtx<'static>> = Pool::new();
static INFLATE: Pool<Inflate> = Pool::new();

/// zstd decodes no less than a block of its format, and these are 128 KiB, or end a frame. Bytes.
const ZSTD_BLOCK: usize = 128 << 10;

/// How long `out` should be in [`decompress_verified`] for the first `want` bytes of a cluster of `cluster` bytes. More than `want`
/// where more is decoded anyhow: straight into a buffer for all of it takes less time.
pub fn decoded_len(kind: CompressionType, cluster: usize, want: usize) -> usize {
    if kind == CompressionType::Zstd && cluster <= ZSTD_BLOCK { cluster } else { want }
}

/// Decompresses the first `out.len()` bytes of a cluster of `cluster` bytes; what follows them in `input` may be anything.
/// The error is the reason.
pub fn decompress_verified(
    kind: CompressionType,
    cluster: usize,
    input: &[u8],
    out: &mut [u8],
) -> Result<(), String> {
    if out.is_empty() {
        return Ok(());
    }
    match kind {
        CompressionType::Zstd => ZSTD.with(unchecked, |context| unzstd(context, input, out)),
        CompressionType::Deflate => INFLATE.with(Inflate::new, |context| {
            if out.len() == cluster { context.cluster(input, out) } else { context.beginning(input, out) }
        }),
    }
}

fn unchecked() -> DCtx<'static> {
    let mut context = DCtx::create();
    // A library that cannot leave the checksum out compares it, which does no harm.
    let _ = context.set_parameter(DParameter::ForceIgnoreChecksum(true));
    context
}

fn unzstd(context: &mut DCtx<'static>, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    let name = |code| get_error_name(code).to_owned();
    context.reset(ResetDirective::SessionOnly).map_err(name)?;
    let want = out.len();
    let mut output = OutBuffer::around(out);
    let mut source = InBuffer::around(input);
    loop {
        let before = (output.pos(), source.pos());
        context.decompress_stream(&mut output, &mut source).map_err(name)?;
        if output.pos() == want {
            return Ok(());
        }
        if (output.pos(), source.pos()) == before {
            return Err(format!("it holds {} bytes instead of {want}", output.pos()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    proptest! {
        #[test]
        fn any_beginning_of_what_was_encoded_is_decoded_with_anything_behind_it(
            bytes in prop::collection::vec(0u8..4, 1..70_000),
            behind in prop::collection::vec(any::<u8>(), 0..600),
            part in any::<prop::sample::Index>(),
        ) {
            for (kind, encoded) in [
                (CompressionType::Deflate, deflate(&bytes)),
                (CompressionType::Zstd, zstd::encode_all(&bytes[..], 3).unwrap()),
            ] {
                let mut stored = encoded.clone();
                stored.extend_from_slice(&behind);
                for len in [bytes.len(), part.index(bytes.len()) + 1] {
                    let mut out = vec![0xaa; len];
                    decompress_verified(kind, bytes.len(), &stored, &mut out).unwrap();
                    prop_assert!(out == bytes[..len]);
                }
                let mut more = vec![0; bytes.len() + 1];
                prop_assert!(decompress_verified(kind, bytes.len() + 1, &encoded, &mut more).is_err());
            }
        }

        #[test]
        fn noise_is_an_error_or_bytes_but_never_a_panic(noise in prop::collection::vec(any::<u8>(), 0..500)) {
            let mut out = [0; 4096];
            let _ = decompress_verified(CompressionType::Deflate, 4096, &noise, &mut out);
            let _ = decompress_verified(CompressionType::Zstd, 4096, &noise, &mut out);
        }
    }
}
