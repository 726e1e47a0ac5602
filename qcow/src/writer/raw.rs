//! A source as a sparse raw file.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::writer::pipeline::{self, Jobs};
use crate::writer::write_behind::WriteBehind;
use crate::writer::{Control, Run, Source};
use crate::{Error, PageBuf, Result, Storage};

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
    let spare = Mutex::new(Vec::<PageBuf>::new());
    let make = |(): &mut (), run: Run| {
        let mut buf = PageBuf::default();
        if !run.zero {
            buf = spare.lock().pop().unwrap_or_default();
            buf.set_len(run.len as usize);
            source.read(run.start, &mut buf)?;
        }
        let rows = rows(&buf);
        Ok((run.start, buf, rows))
    };
    std::thread::scope(|scope| {
        let mut behind = WriteBehind::new(scope, &dest);
        let mut written = 0;
        let take = |(start, buf, rows): (u64, PageBuf, Vec<Range<usize>>)| {
            for row in rows {
                let (at, bytes) = (start + row.start as u64, buf.get(row).unwrap_or_default());
                behind.write(bytes, at)?;
                written += bytes.len() as u64;
            }
            if !buf.is_empty() {
                spare.lock().push(buf);
            }
            Ok(())
        };
        let jobs = Jobs { cluster: BLOCK, bytes: pipeline::COPY_BYTES };
        pipeline::run(source, jobs, control, || Ok(()), make, take)?;
        behind.flush()?;
        dest.sync().map_err(io("syncing"))?;
        Ok(written)
    })
}

/// Where blocks lie in a row that hold anything but zeros: each row goes out in one write.
fn rows(buf: &[u8]) -> Vec<Range<usize>> {
    let mut rows: Vec<Range<usize>> = Vec::new();
    for (block, at) in buf.chunks(BLOCK as usize).zip((0..).step_by(BLOCK as usize)) {
        if is_zero(block) {
            continue;
        }
        match rows.last_mut() {
            Some(last) if last.end == at => last.end += block.len(),
            _ => rows.push(at..at + block.len()),
        }
    }
    rows
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}
