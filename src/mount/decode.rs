//! Decoding of compressed clusters, with a context for each thread.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, ResetDirective};

/// How an image's clusters are compressed (the header's compression type).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

thread_local! {
    static DEFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Decodes exactly one cluster; what follows it in `stored` (QEMU fills up sectors) is ignored.
pub fn decode(codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
    match codec {
        Codec::Deflate => DEFLATE.with_borrow_mut(|context| inflate(context, stored, out)),
        Codec::Zstd => ZSTD.with_borrow_mut(|context| {
            let context = match context {
                Some(context) => context,
                None => context.insert(DCtx::try_create().ok_or("there is no memory for zstd")?),
            };
            unzstd(context, stored, out)
        }),
    }
}

fn inflate(context: &mut Decompress, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
    context.reset(false);
    let wanted = out.len() as u64;
    let status = context.decompress(stored, out, FlushDecompress::Finish).map_err(|e| e.to_string())?;
    match status {
        Status::StreamEnd | Status::Ok | Status::BufError if context.total_out() == wanted => Ok(()),
        _ => Err(format!("it holds {} bytes instead of {wanted}", context.total_out())),
    }
}

fn unzstd(context: &mut DCtx<'static>, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
    let name = |code| zstd::zstd_safe::get_error_name(code).to_owned();
    context.reset(ResetDirective::SessionOnly).map_err(name)?;
    let wanted = out.len();
    let mut output = OutBuffer::around(out);
    let mut input = InBuffer::around(stored);
    loop {
        let before = (input.pos, output.pos());
        let more = context.decompress_stream(&mut output, &mut input).map_err(name)?;
        if output.pos() == wanted {
            return Ok(());
        }
        if more == 0 || before == (input.pos, output.pos()) {
            return Err(format!("it holds {} bytes instead of {wanted}", output.pos()));
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
        fn what_was_encoded_is_decoded_with_anything_behind_it(
            bytes in prop::collection::vec(0u8..4, 1..5000),
            behind in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            for (codec, mut stored) in
                [(Codec::Deflate, deflate(&bytes)), (Codec::Zstd, zstd::encode_all(&bytes[..], 3).unwrap())]
            {
                stored.extend_from_slice(&behind);
                let mut out = vec![0xaa; bytes.len()];
                decode(codec, &stored, &mut out).unwrap();
                prop_assert_eq!(&out, &bytes);
                let mut more = vec![0; bytes.len() + 1];
                if behind.is_empty() {
                    prop_assert!(decode(codec, &stored, &mut more).is_err());
                }
            }
        }

        #[test]
        fn noise_is_an_error_or_bytes_but_never_a_panic(noise in prop::collection::vec(any::<u8>(), 0..500)) {
            let mut out = [0; 4096];
            let _ = decode(Codec::Deflate, &noise, &mut out);
            let _ = decode(Codec::Zstd, &noise, &mut out);
        }
    }
}
