//! An overlay that shows its backing file whole again.

use crate::Result;
use crate::entry::{L2, OFFSET_MASK};
use crate::rw::ImageMut;
use crate::rw::tables::Entry;

impl ImageMut {
    /// Lets go of everything that the image itself says of the disk, and of the space: its backing file shows (zeros
    /// where there is none). Internal snapshots stay. Flushes.
    pub fn make_empty(&mut self) -> Result<()> {
        self.prepare(0, 0)?;
        let clusters = self.header.size.div_ceil(self.header.cluster_size());
        let entries = self.header.l2_entries();
        let mut index = 0;
        while index < clusters {
            if self.l1_entry(index)? & OFFSET_MASK == 0 {
                index = (index / entries + 1) * entries;
                continue;
            }
            let result = self.forget(index);
            self.failed |= result.is_err();
            result?;
            index += 1;
            if self.tables_full() {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn forget(&mut self, index: u64) -> Result<()> {
        let entry = self.entry(index)?;
        if entry.word == 0 && entry.sub == 0 {
            return Ok(());
        }
        let old = self.decode(index, entry)?;
        if !matches!(old, L2::Unallocated) {
            self.free(old);
        }
        self.set_entry(index, Entry { word: 0, sub: 0 })
    }
}
