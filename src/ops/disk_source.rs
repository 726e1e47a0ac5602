//! A disk of a backup as the source of a new image: only bytes that match their checksums come through.

use knib_fuse::{BlockSource, FsError, SpanKind};
use knib_qcow::{CompressionType, Run, Source};

use crate::store::{DiskName, Manifest, Store};
use crate::verified::{VerifiedDisk, VerifiedReader};

/// Runs are cut at so many bytes, so that work is shared evenly.
const LONGEST_RUN: u64 = 16 << 20;
/// Runs start and end at multiples of it: the largest cluster of a new image.
const CLUSTER: u64 = 65536;

/// A disk of a backup.
pub struct DiskSource {
    disk: VerifiedDisk,
    path: std::path::PathBuf,
}

impl DiskSource {
    /// Opens the disk `name` of `of`, and all that it stands on.
    ///
    /// # Errors
    /// It is not there or damaged: the reason names the file.
    pub fn open(
        store: &Store,
        reader: &VerifiedReader,
        of: &Manifest,
        name: &DiskName,
    ) -> Result<Self, FsError> {
        Ok(Self {
            disk: reader.disk(of, name, reader.lease_disk(of.id))?,
            path: store.disk_path(&of.vm, &of.name, name),
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.disk.len()
    }

    fn error(&self, error: &FsError) -> knib_qcow::Error {
        knib_qcow::Error::damaged(&self.path, error.to_string())
    }

    fn read_part(&self, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let span = self.disk.span(offset)?;
        let len = span.end().min(self.disk.len()).saturating_sub(offset).min(buf.len() as u64) as usize;
        let (part, _) = buf.split_at_mut(len);
        match span.kind {
            SpanKind::Zero => part.fill(0),
            SpanKind::Direct => self.disk.read_direct(offset, part)?,
            SpanKind::Block(key) if span.start == offset && span.len == len as u64 => {
                self.disk.read_block(span.start, key, part)?;
            }
            SpanKind::Block(key) => {
                let mut block = vec![0; span.len as usize];
                self.disk.read_block(span.start, key, &mut block)?;
                let within = (offset - span.start) as usize;
                part.copy_from_slice(block.get(within..within + len).unwrap_or_default());
            }
        }
        Ok(len)
    }
}

impl Source for DiskSource {
    fn next(&self, from: u64) -> knib_qcow::Result<Option<Run>> {
        let size = self.size();
        if from >= size {
            return Ok(None);
        }
        let Some(data) = self.disk.next_data(from).map_err(|e| self.error(&e))? else { return Ok(None) };
        let start = (data / CLUSTER * CLUSTER).max(from);
        // A hole is looked for only so far: a long run of data is handed out in parts.
        let mut end = data;
        while end < size && end - start < LONGEST_RUN {
            let span = self.disk.span(end).map_err(|e| self.error(&e))?;
            if span.kind == SpanKind::Zero {
                break;
            }
            end = span.end().max(end + 1);
        }
        let end = end.max(data + 1).next_multiple_of(CLUSTER).min(size);
        Ok((start < size).then_some(Run { start, len: end - start, zero: false }))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> knib_qcow::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let n = self.read_part(at, &mut buf[done..]).map_err(|e| self.error(&e))?;
            if n == 0 {
                return Err(knib_qcow::Error::out_of_range(
                    &self.path,
                    format!("offset {at} lies past the disk's end"),
                ));
            }
            done += n;
        }
        Ok(())
    }

    fn take_stored(
        &self,
        start: u64,
        cluster: u64,
        kind: CompressionType,
        out: &mut Vec<u8>,
    ) -> knib_qcow::Result<bool> {
        self.disk.take_stored(start, cluster, kind, out).map_err(|e| self.error(&e))
    }
}
