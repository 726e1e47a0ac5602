//! An image as it was when an internal snapshot was taken: the same file, with the snapshot's L1 table and size in the
//! place of the header's. To read only.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::Storage;
use crate::snapshot::Snapshot;

/// Where the header has what differs: size (24), encryption (32), L1 size (36) and offset (40).
const FIELDS: std::ops::Range<u64> = 24..48;

struct View {
    image: Arc<dyn Storage>,
    fields: [u8; 24],
}

impl Snapshot {
    /// The image whose table has this snapshot, as the snapshot shows it.
    ///
    /// ```no_run
    /// # fn main() -> knib_qcow::Result<()> {
    /// use knib_qcow::{Access, Chain, FileStorage, Format, PlainPaths, snapshot};
    /// let image = FileStorage::open("disk.qcow2".as_ref(), Access::Read)?;
    /// for snapshot in snapshot::list(&*image)? {
    ///     let then = Chain::from_storage(snapshot.view(image.clone()), Format::Qcow2, &PlainPaths)?;
    ///     println!("{}: {} bytes", snapshot.name, then.size());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn view(&self, image: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let mut fields = [0; 24];
        fields[..8].copy_from_slice(&self.disk_size.to_be_bytes());
        fields[12..16].copy_from_slice(&self.l1_size.to_be_bytes());
        fields[16..].copy_from_slice(&self.l1_offset.to_be_bytes());
        Arc::new(View { image, fields })
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a snapshot is read only")
}

impl Storage for View {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = self.image.read_at(buf, offset)?;
        for (at, byte) in FIELDS.zip(self.fields) {
            let to = at.checked_sub(offset).and_then(|i| buf.get_mut(..n)?.get_mut(i as usize));
            if let Some(to) = to {
                *to = byte;
            }
        }
        Ok(n)
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(read_only())
    }
    fn len(&self) -> io::Result<u64> {
        self.image.len()
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(read_only())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }
    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.image.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.image.next_hole(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.image.allocated()
    }
    fn identity(&self) -> Option<(u64, u64)> {
        self.image.identity()
    }
    fn path(&self) -> &Path {
        self.image.path()
    }
}
