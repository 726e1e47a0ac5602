//! Writing that goes on beside the work, so that little is left to wait for at the end.
//!
//! A file that is written once and then synced gains nothing from the page cache: each page is found, copied into, marked
//! and later handed to the device, which takes more of a processor than compressing does. So what lies in a row is
//! gathered into pieces that go to the device as they are ([`Storage::write_past_cache`]), from a thread that mostly
//! waits. What is too short for that, and all of it where the file cannot do it, goes through the page cache, and the
//! device is made to begin early.
//!
//! Memory: [`PIECES`] pieces of [`PIECE`] bytes.

use std::sync::{Arc, mpsc};
use std::thread::Scope;

use crate::page_buf::PAGE;
use crate::{Error, PageBuf, Result, Storage};

/// Bytes of a piece; pieces begin at multiples of this in the file, but the first of a row.
const PIECE: u64 = 2 << 20;
/// So many are filled or on their way at once.
const PIECES: usize = 4;
/// A row that is shorter (bytes) waits less in the page cache, where it may be joined with others on its way.
const SHORT: usize = 256 << 10;
/// A gap of fewer bytes is filled with zeros: rows that it parted would be two.
const GAP: u64 = 64 << 10;
/// The system is asked to begin whenever so many bytes are new in the page cache.
const BEGIN: u64 = 16 << 20;

/// Writes to one file, mostly from a thread of its own, which ends when this is dropped.
pub(crate) struct WriteBehind<'a> {
    dest: &'a dyn Storage,
    past_cache: bool,
    jobs: mpsc::Sender<Job>,
    done: mpsc::Receiver<(PageBuf, Result<()>)>,
    /// Pieces that the thread has.
    away: usize,
    spare: Vec<PageBuf>,
    piece: Option<Piece>,
    /// Where what follows the last write goes.
    next: u64,
    /// What is new in the page cache: from and to, in bytes.
    fresh: Option<(u64, u64)>,
}

enum Job {
    Write(Piece),
    Begin(u64, u64),
}

/// A part of a row: `start..end` of `buf` goes to `offset` and so many bytes on.
struct Piece {
    buf: PageBuf,
    offset: u64,
    start: usize,
    end: usize,
}

impl Piece {
    fn write(&self, dest: &dyn Storage) -> Result<()> {
        let (bytes, at) = self.bytes();
        // The buffer begins where a page of the file does: whole pages of the two are the same.
        let head = (self.start.next_multiple_of(PAGE) - self.start).min(bytes.len());
        let (head, rest) = bytes.split_at(head);
        let (pages, tail) = rest.split_at(rest.len() / PAGE * PAGE);
        let mut place = at;
        for (part, whole) in [(head, false), (pages, true), (tail, false)] {
            let written = match part {
                [] => Ok(()),
                _ if whole => dest.write_past_cache(part, place),
                _ => dest.write_at(part, place),
            };
            written.map_err(|e| failed(dest, bytes.len(), at, e))?;
            place += part.len() as u64;
        }
        Ok(())
    }

    fn bytes(&self) -> (&[u8], u64) {
        (self.buf.get(self.start..self.end).unwrap_or_default(), self.offset + self.start as u64)
    }
}

fn failed(dest: &dyn Storage, len: usize, offset: u64, error: std::io::Error) -> Error {
    Error::io(dest.path(), format!("writing {len} bytes at {offset}"), error)
}

impl<'a> WriteBehind<'a> {
    pub(crate) fn new<'scope>(scope: &'scope Scope<'scope, '_>, dest: &'a Arc<dyn Storage>) -> Self {
        let (jobs, todo) = mpsc::channel();
        let (tell, done) = mpsc::channel();
        let file = dest.clone();
        scope.spawn(move || {
            for job in todo {
                match job {
                    Job::Begin(from, to) => file.begin_write_back(from, to - from),
                    Job::Write(piece) => {
                        let written = piece.write(&*file);
                        // Nobody listens once the work has failed.
                        let _ = tell.send((piece.buf, written));
                    }
                }
            }
        });
        Self {
            dest: &**dest,
            past_cache: dest.writes_past_cache(),
            jobs,
            done,
            away: 0,
            spare: Vec::new(),
            piece: None,
            next: 0,
            fresh: None,
        }
    }

    /// Writes `bytes` at `offset`, sooner or later: errors come here or at the end. Offsets should ascend: going back waits
    /// for all that is on its way.
    pub(crate) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        if !self.past_cache {
            return self.write_cached(bytes, offset);
        }
        match offset.checked_sub(self.next) {
            Some(0) => {}
            Some(gap) if gap < GAP && self.piece.is_some() => {
                self.gather(&[0; GAP as usize][..gap as usize], self.next)?;
            }
            Some(_) => self.send()?,
            None => self.flush()?,
        }
        self.gather(bytes, offset)
    }

    /// All that was written is with the system on return, though not synced.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.send()?;
        while self.away > 0 {
            let buf = self.back()?;
            self.spare.push(buf);
        }
        Ok(())
    }

    fn gather(&mut self, mut bytes: &[u8], mut offset: u64) -> Result<()> {
        while !bytes.is_empty() {
            let mut piece = match self.piece.take() {
                Some(piece) => piece,
                None => {
                    let start = (offset % PAGE as u64) as usize;
                    Piece { buf: self.buffer()?, offset: offset - start as u64, start, end: start }
                }
            };
            let room = (offset / PIECE + 1) * PIECE - offset;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            piece.buf[piece.end..piece.end + now.len()].copy_from_slice(now);
            piece.end += now.len();
            let full = now.len() as u64 == room;
            self.piece = Some(piece);
            if full {
                self.send()?;
            }
            offset += now.len() as u64;
            bytes = later;
        }
        self.next = offset;
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        let Some(piece) = self.piece.take() else { return Ok(()) };
        if piece.end - piece.start < SHORT {
            let (bytes, at) = piece.bytes();
            self.write_cached(bytes, at)?;
            self.spare.push(piece.buf);
            return Ok(());
        }
        self.away += 1;
        self.jobs.send(Job::Write(piece)).map_err(|_| Error::Cancelled)
    }

    fn buffer(&mut self) -> Result<PageBuf> {
        if let Some(buf) = self.spare.pop() {
            return Ok(buf);
        }
        if self.away >= PIECES - 1 {
            return self.back();
        }
        let mut buf = PageBuf::default();
        buf.set_len(PIECE as usize);
        Ok(buf)
    }

    /// Waits for the oldest that the thread has.
    fn back(&mut self) -> Result<PageBuf> {
        let (buf, written) = self.done.recv().map_err(|_| Error::Cancelled)?;
        self.away -= 1;
        written.map(|()| buf)
    }

    fn write_cached(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.dest.write_at(bytes, offset).map_err(|e| failed(self.dest, bytes.len(), offset, e))?;
        let (from, to) = self.fresh.unwrap_or((offset, offset));
        let (from, to) = (from.min(offset), to.max(offset.saturating_add(bytes.len() as u64)));
        self.fresh = Some((from, to)).filter(|_| to - from < BEGIN);
        if self.fresh.is_none() {
            // Advice: nothing depends on who hears it.
            let _ = self.jobs.send(Job::Begin(from, to));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, FileStorage};

    fn with(file: &Arc<dyn Storage>, work: impl FnOnce(&mut WriteBehind) -> Result<()>) -> Result<()> {
        std::thread::scope(|scope| {
            let mut behind = WriteBehind::new(scope, file);
            work(&mut behind)?;
            behind.flush()
        })
    }

    #[test]
    fn rows_of_any_length_and_place_are_in_the_file_after_a_flush() {
        let dir = tempfile::tempdir().unwrap();
        // (offset, length): long and short rows, gaps that are filled and such that are not, one that goes back.
        let rows: [(usize, usize); 12] = [
            (30_000_000, 300_000),
            (30_340_000, 300_000),
            (65536, 5 << 20),
            (65536 + (5 << 20), 100_000),
            (65536 + (5 << 20) + 100_700, 300_000),
            (7_000_001, 3_000_000),
            (10_000_001, 1),
            (12 << 20, 2 << 20),
            (14 << 20, 512),
            (20_000_000, 40_000),
            (0, 512),
            // Into a gap that was filled.
            (30_300_000, 40_000),
        ];
        let mut model = vec![0u8; 30_640_000];
        let file: Arc<dyn Storage> = FileStorage::create_new(&dir.path().join("file")).unwrap();
        with(&file, |behind| {
            for (n, (at, len)) in rows.into_iter().enumerate() {
                let bytes: Vec<u8> = (0..len).map(|i| (i / 3 + i / 4096 + n) as u8).collect();
                model[at..at + len].copy_from_slice(&bytes);
                for (i, part) in bytes.chunks(777_777).enumerate() {
                    behind.write(part, (at + i * 777_777) as u64)?;
                }
            }
            Ok(())
        })
        .unwrap();
        let mut found = vec![1; model.len() + 1];
        assert_eq!(file.read_at(&mut found, 0).unwrap(), model.len());
        assert!(found[..model.len()] == model);
    }

    #[test]
    fn an_error_beside_the_work_comes_to_light() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"").unwrap();
        // It is open to read only: every write fails.
        let file: Arc<dyn Storage> = FileStorage::open(&path, Access::Read).unwrap();
        for len in [1000, 1 << 20, 20 << 20] {
            let error = with(&file, |behind| behind.write(&vec![1; len], 0)).unwrap_err().to_string();
            assert!(error.contains("writing") && error.contains("file"), "{error}");
        }
    }
}
