//! A source as a sparse raw file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::writer::{Control, Run, Source, pipeline};
use crate::{Error, Result, Storage};

/// Granularity in which zeros become holes, in bytes.
const BLOCK: u64 = 65536;

/// Writes `source` into an empty file as a flat disk of `size` bytes with holes for zeros; says how many bytes of data
/// it holds.
pub fn write_raw<S: Source>(dest: Arc<dyn Storage>, size: u64, source: &S, control: &Control) -> Result<u64> {
    let path: PathBuf = dest.path().to_owned();
    let io = |doing: &'static str| {
        let path = path.clone();
        move |e| Error::io(&path, doing, e)
    };
    dest.set_len(size).map_err(io("setting the size"))?;
    let written = AtomicU64::new(0);
    let make = |buf: &mut Vec<u8>, run: Run| {
        if run.zero {
            return Ok(());
        }
        buf.resize(run.len as usize, 0);
        source.read(run.start, buf)?;
        // Neighbouring blocks with data go out in one write.
        let mut from = 0;
        while from < buf.len() {
            let block = |at: usize| &buf[at..buf.len().min(at + BLOCK as usize)];
            if is_zero(block(from)) {
                from += BLOCK as usize;
                continue;
            }
            let mut to = from;
            while to < buf.len() && !is_zero(block(to)) {
                to = buf.len().min(to + BLOCK as usize);
            }
            dest.write_at(&buf[from..to], run.start + from as u64).map_err(io("writing"))?;
            written.fetch_add((to - from) as u64, Ordering::Relaxed);
            from = to;
        }
        Ok(())
    };
    pipeline::run(source, BLOCK, control, || Ok(Vec::new()), make, |()| Ok(()))?;
    dest.sync().map_err(io("syncing"))?;
    Ok(written.into_inner())
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}
