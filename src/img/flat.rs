//! Several disks one behind the other as one, and disks of which not every byte can be read.

use knib_qcow::{Chain, ExtentKind, Result, Run, Source};

/// A sector, in bytes: what is given up at a time where data cannot be read.
const SECTOR: u64 = 512;
/// Longest run, in bytes, so that the map of a huge disk is not walked ahead of the work.
const LONGEST: u64 = 1 << 20;

struct Part<'a> {
    chain: &'a Chain,
    start: u64,
    end: u64,
}

/// Disks in a row; each is a whole number of sectors long.
pub struct Flat<'a> {
    parts: Vec<Part<'a>>,
    cluster: u64,
    salvage: Option<&'a (dyn Fn(u64) + Sync)>,
}

impl<'a> Flat<'a> {
    /// Runs are cut at multiples of `cluster` bytes. With `salvage`, what cannot be read is zeros, and its offset is told.
    pub fn new(chains: &'a [Chain], cluster: u64, salvage: Option<&'a (dyn Fn(u64) + Sync)>) -> Self {
        let mut start = 0;
        let parts = chains.iter().map(|chain| {
            let part = Part { chain, start, end: start + chain.size().next_multiple_of(SECTOR) };
            start = part.end;
            part
        });
        Self { parts: parts.collect(), cluster, salvage }
    }

    /// Length of all in bytes.
    pub fn size(&self) -> u64 {
        self.parts.last().map_or(0, |p| p.end)
    }

    /// Whether there is data at `at`, and up to where that holds.
    fn look(&self, at: u64) -> Result<(bool, u64)> {
        let Some(part) = self.parts.iter().find(|p| at < p.end) else { return Ok((false, u64::MAX)) };
        let inside = at - part.start;
        if inside >= part.chain.size() {
            return Ok((false, part.end));
        }
        match part.chain.extent_at(inside) {
            Ok(extent) => {
                let data = matches!(extent.kind, ExtentKind::Data { .. } | ExtentKind::Compressed { .. });
                Ok((data, part.start + extent.start + extent.len))
            }
            // What the tables say is lost: reading tells which bytes are.
            Err(_) if self.salvage.is_some() => Ok((true, (at + self.cluster).min(part.end))),
            Err(e) => Err(e),
        }
    }

    fn read_part(&self, part: &Part<'_>, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inside = offset - part.start;
        let there = part.chain.size().saturating_sub(inside).min(buf.len() as u64) as usize;
        let (data, past) = buf.split_at_mut(there);
        past.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        let read = part.chain.read_at(data, inside);
        let (Err(_), Some(lost)) = (&read, self.salvage) else { return read };
        for (at, sector) in (inside..).step_by(SECTOR as usize).zip(data.chunks_mut(SECTOR as usize)) {
            if part.chain.read_at(sector, at).is_err() {
                sector.fill(0);
                lost(part.start + at);
            }
        }
        Ok(())
    }
}

impl Source for Flat<'_> {
    fn next(&self, from: u64) -> Result<Option<Run>> {
        let (size, cluster) = (self.size(), self.cluster);
        let mut at = from;
        while at < size {
            let (data, end) = self.look(at)?;
            if !data {
                at = end;
                continue;
            }
            let start = (at / cluster * cluster).max(from);
            let mut stop = end.next_multiple_of(cluster);
            while stop < size && stop - start < LONGEST.max(cluster) {
                let (data, end) = self.look(stop)?;
                if !data {
                    break;
                }
                stop = end.next_multiple_of(cluster);
            }
            return Ok(Some(Run { start, len: stop.min(size) - start, zero: false }));
        }
        Ok(None)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let Some(part) = self.parts.iter().find(|p| at < p.end) else {
                buf.get_mut(done..).unwrap_or(&mut []).fill(0);
                break;
            };
            let n = (part.end - at).min((buf.len() - done) as u64) as usize;
            self.read_part(part, at, buf.get_mut(done..done + n).unwrap_or(&mut []))?;
            done += n;
        }
        Ok(())
    }
}
