//! Checks an image's metadata: every reference is counted from nothing and compared with the refcounts that are
//! stored. Source: the qcow2 specification, "Host cluster management"; the rules are those of `qemu-img check`.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display};
use std::sync::atomic::Ordering;

use crate::counts::{Counts, clusters};
use crate::entry::{COMPRESSED, COPIED, L1_MAX, L2, OFFSET_MASK};
use crate::refcount::{self, BLOCK_MASK};
use crate::rw::BitmapDirectory;
use crate::storage::read_exact;
use crate::{Control, Error, Header, Image, Result, Storage, bitmap, snapshot};

/// A report has at most so many messages; the counts go on.
const MAX_MESSAGES: usize = 100;
/// Bits that must be clear: in the refcount table, in L1 entries, in standard L2 entries.
const TABLE_RESERVED: u64 = 0x1ff;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What may cost data: references without a refcount, entries that point outside the file, wrong flags.
    pub corruptions: u64,
    /// Clusters whose refcount is higher than what uses them: lost space only.
    pub leaks: u64,
    /// Those of the corruptions that are copied flags, which may be wrong for a refcount's sake alone.
    pub flags: u64,
    /// Clusters in use whose refcount is 0, which a writer would take for free: only [`crate::Repair::All`] helps.
    pub uncounted: u64,
    /// Refcount blocks that cannot be used as they are (askew, with reserved bits, or in a cluster that others use too):
    /// only [`crate::Repair::All`] helps.
    pub blocks: u64,
    /// The first of them in words, at most 100.
    pub messages: Vec<String>,
    /// How the clusters of the disk are laid out.
    pub usage: Usage,
}

/// How the clusters of a disk are laid out, counted as `qemu-img check` counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Clusters of the guest's disk.
    pub total: u64,
    /// Those that have a place on the host, snapshots not counted.
    pub allocated: u64,
    /// Those that do not follow the one before them on the host; compressed ones never do.
    pub fragmented: u64,
    /// Those that are compressed.
    pub compressed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub end_offset: u64,
}

impl Report {
    /// Whether nothing is wrong, not even lost space.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }
    fn corrupt(&mut self, what: String) {
        self.corruptions += 1;
        self.say(what);
    }
    fn say(&mut self, what: String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(what);
        }
    }
}

/// Checks all metadata of an image that nobody writes to. Damage is counted in the report; an error means that the
/// check itself could not be done. Memory: 4 bytes for each cluster in use, and about 24 for each
/// one of a table. `control` cancels and hears of the guest
/// bytes done.
pub fn check(image: &Image, control: &Control) -> Result<Report> {
    let mut c = Check::new(image, control)?;
    let table = c.count_all()?;
    c.compare(&table)?;
    Ok(c.report)
}

/// What a check knows when it is done, for those who act upon it.
pub(crate) struct Counted {
    pub(crate) report: Report,
    /// Corruptions of other things than refcounts, copied flags and what a snapshot's entry lacks.
    pub(crate) structural: u64,
    /// Whether a snapshot's entry lacks what version 3 wants.
    pub(crate) incomplete: bool,
    /// References to each cluster, those of the refcount table and blocks included.
    pub(crate) counts: Counts,
    /// Offsets of the refcount blocks that were counted; 0 for none.
    pub(crate) blocks: Vec<u64>,
    /// Those that were counted once more, since the table names them again.
    pub(crate) doubled: Vec<u64>,
}

/// As [`check`], with the counts.
pub(crate) fn count(image: &Image, control: &Control) -> Result<Counted> {
    let mut c = Check::new(image, control)?;
    let blocks = c.count_all()?;
    let overlaps = c.tables.keys().filter(|cluster| c.overlap(**cluster)).count() as u64;
    let (counts, structural) = (c.counts.clone(), c.report.corruptions - c.flags - c.incomplete + overlaps);
    c.compare(&blocks)?;
    let incomplete = c.incomplete > 0;
    Ok(Counted { report: c.report, structural, incomplete, counts, blocks, doubled: c.doubled })
}

/// What a reference is for, as far as others may share the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// The guest's data, of any number of guest clusters and snapshots.
    Data,
    /// An L2 table, which snapshots may share.
    L2,
    /// A table that is alone in its clusters.
    Alone,
}

/// A cluster of the guest's disk, in messages.
struct Guest<'a> {
    cluster: u64,
    owner: &'a str,
}

impl Display for Guest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest cluster {} of {}", self.cluster, self.owner)
    }
}

struct Check<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    /// The file's length in bytes.
    len: u64,
    /// The same, up to whole clusters.
    end: u64,
    counts: Counts,
    /// The clusters of tables: references as an L2 table, and as a table that is alone.
    tables: HashMap<u64, (u32, u32)>,
    /// Corruptions that are copied flags alone.
    flags: u64,
    /// Snapshots' entries that lack what version 3 wants.
    incomplete: u64,
    /// Offsets of refcount blocks for each time that the table names them again.
    doubled: Vec<u64>,
    /// The refcount block that was read last: its number and bytes.
    stored: Option<(usize, Vec<u8>)>,
    report: Report,
    control: &'a Control<'a>,
}

impl<'a> Check<'a> {
    fn new(image: &'a Image, control: &'a Control<'a>) -> Result<Self> {
        let storage = &**image.storage();
        let len = storage.len().map_err(|e| Error::io(storage.path(), "asking for the length", e))?;
        let header = image.header();
        Ok(Check {
            storage,
            header,
            len,
            end: len.next_multiple_of(header.cluster_size()),
            counts: Counts::default(),
            tables: HashMap::new(),
            flags: 0,
            incomplete: 0,
            doubled: Vec::new(),
            stored: None,
            report: Report::default(),
            control,
        })
    }

    /// Counts every reference; the offsets of the refcount blocks that can be used.
    fn count_all(&mut self) -> Result<Vec<u64>> {
        let h = self.header;
        self.report.usage.total = h.size.div_ceil(h.cluster_size());
        self.count(0, h.cluster_size(), "the header", Use::Alone);
        if let Some(what) = &h.refcounts_lost {
            self.report.corrupt(what.clone());
        }
        let len = u64::from(h.refcount_table_clusters) << h.cluster_bits;
        self.count(h.refcount_table_offset, len, "the refcount table", Use::Alone);
        let table = self.refcount_table()?;
        self.l1(h.l1_offset, h.l1_size, true, "the disk")?;
        self.snapshots()?;
        self.bitmaps()?;
        Ok(table)
    }

    /// Counts a reference to every cluster of a range; one that leaves the file is a corruption.
    fn count(&mut self, offset: u64, len: u64, what: impl Display, used: Use) -> bool {
        let bits = self.header.cluster_bits;
        let end = offset.checked_add(len);
        if end.is_none_or(|e| e > self.end) {
            self.report.corrupt(format!("{what} at {offset:#x} ({len} bytes) lies outside the file"));
            return false;
        }
        self.counts.add_bytes(offset, len, bits);
        if used != Use::Data {
            for cluster in clusters(offset, len, bits) {
                let (l2, alone) = self.tables.entry(cluster).or_default();
                let n = if used == Use::L2 { l2 } else { alone };
                *n = n.saturating_add(1);
            }
        }
        true
    }

    /// Whether the cluster holds a table and something else.
    fn overlap(&self, cluster: u64) -> bool {
        let Some((l2, alone)) = self.tables.get(&cluster) else { return false };
        self.counts.get(cluster) != if *alone > 0 { 1 } else { *l2 }
    }

    fn words(&self, offset: u64, count: u64, what: &str) -> Result<Vec<u64>> {
        let mut bytes = vec![0u8; (count * 8) as usize];
        read_exact(self.storage, &mut bytes, offset, what)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    /// The offsets of the refcount blocks; 0 where there is none, or none that can be used.
    fn refcount_table(&mut self) -> Result<Vec<u64>> {
        let h = self.header;
        let count = (u64::from(h.refcount_table_clusters) << h.cluster_bits) / 8;
        let mut table = self.words(h.refcount_table_offset, count, "the refcount table")?;
        let mut seen = HashSet::new();
        for (number, entry) in table.iter_mut().enumerate() {
            let offset = *entry & BLOCK_MASK;
            let what = format!("refcount block {number}");
            if *entry & TABLE_RESERVED != 0 {
                self.report.blocks += 1;
                self.report.corrupt(format!("{what}: its entry has reserved bits"));
            }
            if offset != 0 && !seen.insert(offset) {
                self.report.blocks += 1;
                self.report.corrupt(format!("{what} at {offset:#x} is another one's too"));
                if self.count(offset, h.cluster_size(), &what, Use::Alone) {
                    self.doubled.push(offset);
                }
                *entry = 0;
                continue;
            }
            let aligned = offset.is_multiple_of(h.cluster_size());
            if !aligned {
                self.report.blocks += 1;
                self.report.corrupt(format!("{what} at {offset:#x} is not aligned"));
            }
            // A block is read whole, so it must be there whole.
            let there = aligned && offset.checked_add(h.cluster_size()).is_some_and(|e| e <= self.len);
            if aligned && !there && offset != 0 {
                self.report.corrupt(format!("{what} at {offset:#x} lies outside the file"));
            }
            let used = offset != 0 && there && self.count(offset, h.cluster_size(), &what, Use::Alone);
            *entry = if used { offset } else { 0 };
        }
        Ok(table)
    }

    fn l1(&mut self, offset: u64, size: u32, active: bool, owner: &str) -> Result<()> {
        let h = self.header;
        let bytes = u64::from(size) * 8;
        let what = format!("the L1 table of {owner}");
        if !offset.is_multiple_of(h.cluster_size()) {
            self.report.corrupt(format!("{what} at {offset:#x} is not aligned"));
            return Ok(());
        }
        if offset.checked_add(bytes).is_none_or(|e| e > self.len) {
            self.report.corrupt(format!("{what} at {offset:#x} ({bytes} bytes) lies outside the file"));
            return Ok(());
        }
        if !self.count(offset, bytes, &what, Use::Alone) {
            return Ok(());
        }
        let span = h.l2_entries() << h.cluster_bits;
        let mut seen = HashSet::new();
        for (number, entry) in self.words(offset, u64::from(size), &what)?.into_iter().enumerate() {
            if self.control.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let l2 = entry & OFFSET_MASK;
            if l2 != 0 {
                let what = format!("L2 table {number} of {owner}");
                if entry & L1_RESERVED != 0 {
                    self.report.corrupt(format!("{what}: its entry has reserved bits"));
                }
                if !seen.insert(l2) {
                    self.report.corrupt(format!("{what} at {l2:#x} is another one's too"));
                } else if !l2.is_multiple_of(h.cluster_size()) {
                    self.report.corrupt(format!("{what} at {l2:#x} is not aligned"));
                } else if l2.checked_add(h.cluster_size()).is_none_or(|e| e > self.len) {
                    self.report.corrupt(format!("{what} at {l2:#x} lies outside the file"));
                } else if self.count(l2, h.cluster_size(), &what, Use::L2) {
                    if active {
                        self.copied(entry & COPIED != 0, l2, &what)?;
                    }
                    self.l2(l2, number as u64 * h.l2_entries(), active, owner)?;
                }
            }
            if active {
                (self.control.progress)((number as u64 + 1).saturating_mul(span).min(h.size));
            }
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, first: u64, active: bool, owner: &str) -> Result<()> {
        let h = self.header;
        let step = (h.l2_entry_size() / 8) as usize;
        let words = self.words(offset, h.cluster_size() / 8, "an L2 table")?;
        // Where the next cluster would lie if the file were not fragmented; each table begins anew.
        let mut expected = None;
        for (at, entry) in words.chunks_exact(step).enumerate() {
            let word = entry.first().copied().unwrap_or(0);
            let subclusters = entry.get(1).copied().unwrap_or(0);
            if word == 0 && subclusters == 0 {
                continue;
            }
            // There are many of them, and few are wrong.
            let what = || Guest { cluster: first + at as u64, owner };
            let (allocated, zero) = (subclusters as u32, (subclusters >> 32) as u32);
            if word & COMPRESSED == 0 && word & L2_RESERVED != 0 {
                self.report.corrupt(format!("{}: its entry has reserved bits", what()));
            }
            match L2::decode(word, h) {
                Err(why) => self.report.corrupt(format!("{}: {why}", what())),
                Ok(L2::Compressed { offset, max_len }) => {
                    if word & COPIED != 0 || subclusters != 0 {
                        self.report.corrupt(format!("{}: flags that compressed clusters lack", what()));
                    }
                    if active {
                        self.report.usage.allocated += 1;
                        self.report.usage.compressed += 1;
                        self.report.usage.fragmented += 1;
                    }
                    if L2::compressed_is_inside(offset, max_len, self.len, h) {
                        self.counts.add_bytes(offset, max_len, h.cluster_bits);
                    } else {
                        self.report.corrupt(format!(
                            "{} at {offset:#x} ({max_len} bytes) lies outside the file",
                            what()
                        ));
                    }
                }
                Ok(L2::Data(offset) | L2::Zero { allocated: Some(offset) }) => {
                    if allocated & zero != 0 {
                        self.report.corrupt(format!("{}: subclusters both allocated and zero", what()));
                    }
                    if active {
                        self.report.usage.allocated += 1;
                        let follows = expected.is_none_or(|e| e == offset);
                        self.report.usage.fragmented += u64::from(!follows);
                        expected = offset.checked_add(h.cluster_size());
                    }
                    if h.external_data() {
                        continue;
                    }
                    if offset < self.len {
                        self.count(offset, h.cluster_size(), what(), Use::Data);
                    } else {
                        self.report.corrupt(format!("{} at {offset:#x} lies outside the file", what()));
                    }
                    if active {
                        self.copied(word & COPIED != 0, offset, what())?;
                    }
                }
                Ok(L2::Unallocated | L2::Zero { allocated: None }) => {
                    if allocated != 0 {
                        self.report.corrupt(format!("{}: allocated subclusters without a cluster", what()));
                    }
                }
            }
        }
        Ok(())
    }

    /// The copied flag stands exactly where the stored refcount is 1.
    fn copied(&mut self, flag: bool, offset: u64, what: impl Display) -> Result<()> {
        let count = self.stored_count(offset >> self.header.cluster_bits)?;
        // A refcount of 0 is told by the comparison too: QEMU counts both.
        if flag != (count == 1) {
            let flag = if flag { "set" } else { "clear" };
            self.flags += 1;
            self.report.flags += 1;
            self.report.corrupt(format!(
                "{what} at {offset:#x}: the copied flag is {flag}, its refcount is {count}"
            ));
        }
        Ok(())
    }

    fn stored_count(&mut self, cluster: u64) -> Result<u64> {
        let h = self.header;
        // Asked for every cluster: no divisions.
        let per_block_bits = h.cluster_bits + 3 - h.refcount_order;
        let (number, at) =
            ((cluster >> per_block_bits) as usize, (cluster & ((1 << per_block_bits) - 1)) as usize);
        if self.stored.as_ref().is_none_or(|(n, _)| *n != number) {
            let entries = (u64::from(h.refcount_table_clusters) << h.cluster_bits) / 8;
            if number as u64 >= entries {
                return Ok(0);
            }
            let entry = self.words(h.refcount_table_offset + number as u64 * 8, 1, "the refcount table")?;
            let offset = entry.first().copied().unwrap_or(0) & BLOCK_MASK;
            let there = offset != 0
                && offset.is_multiple_of(h.cluster_size())
                && offset.checked_add(h.cluster_size()).is_some_and(|e| e <= self.len);
            let mut bytes = Vec::new();
            if there {
                bytes.resize(h.cluster_size() as usize, 0);
                read_exact(self.storage, &mut bytes, offset, "a refcount block")?;
            }
            self.stored = Some((number, bytes));
        }
        Ok(self.stored.as_ref().map_or(0, |(_, bytes)| refcount::get(bytes, h.refcount_order, at)))
    }

    fn snapshots(&mut self) -> Result<()> {
        let h = self.header;
        if h.snapshot_count == 0 {
            return Ok(());
        }
        let mut at = h.snapshots_offset;
        for number in 0..h.snapshot_count {
            let mut fixed = [0u8; 40];
            let end = at.checked_add(40).filter(|e| *e <= self.len);
            if end.is_none() {
                self.report.corrupt(format!("the snapshot table ends in snapshot {number}"));
                break;
            }
            read_exact(self.storage, &mut fixed, at, "the snapshot table")?;
            let field = |from: usize, len: usize| {
                fixed[from..from + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
            };
            let (l1, size) = (field(0, 8), field(8, 4) as u32);
            if u64::from(size) * 8 > L1_MAX {
                self.report.corrupt(format!("snapshot {number} has an L1 table of {size} entries"));
            } else {
                self.l1(l1, size, false, &format!("snapshot {number}"))?;
            }
            if h.version >= 3 && field(36, 4) < snapshot::EXTRA_MIN as u64 {
                // The size of the disk is missing, and QEMU opens no image without.
                self.incomplete += 1;
                self.report.corrupt(format!("entry {number} of the snapshot table is incomplete"));
            }
            if field(36, 4) > snapshot::EXTRA_MAX as u64 {
                let extra = field(36, 4);
                self.report.corrupt(format!("snapshot {number} has {extra} bytes of extra data, too many"));
            }
            at += (40 + field(36, 4) + field(12, 2) + field(14, 2)).next_multiple_of(8);
            if at - h.snapshots_offset > snapshot::TABLE_MAX {
                self.report
                    .corrupt(format!("the snapshot table is longer than 64 MiB from snapshot {number} on"));
                break;
            }
        }
        self.count(h.snapshots_offset, at - h.snapshots_offset, "the snapshot table", Use::Alone);
        Ok(())
    }

    fn bitmaps(&mut self) -> Result<()> {
        let h = self.header;
        let directory = match BitmapDirectory::read(self.storage, h) {
            Ok(Some(directory)) => directory,
            Ok(None) => return Ok(()),
            Err(Error::Damaged { what, .. }) => {
                self.report.corrupt(what);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.count(directory.offset, directory.bytes.len() as u64, "the bitmap directory", Use::Alone);
        let entries = match directory.entries(self.storage.path()) {
            Ok(entries) => entries,
            Err(e) => {
                self.report.corrupt(e.to_string());
                return Ok(());
            }
        };
        for (number, start) in entries.into_iter().enumerate() {
            let field = |from: usize, len: usize| {
                let bytes = directory.bytes.get(start + from..start + from + len);
                bytes.unwrap_or(&[]).iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
            };
            let (offset, size) = (field(0, 8), field(8, 4));
            let what = format!("bitmap {number}");
            let wrong = match bitmap::read(self.storage, h, &directory, start) {
                Err(Error::Damaged { what, .. }) => Some(what),
                Err(e) => return Err(e),
                Ok(_) => None,
            };
            let inside = offset.checked_add(size * 8).is_some_and(|e| e <= self.len);
            if !inside || !offset.is_multiple_of(h.cluster_size()) {
                self.report.corrupt(format!("the table of {what} at {offset:#x} lies outside the file"));
                continue;
            }
            if let Some(wrong) = wrong {
                self.report.corrupt(wrong);
            }
            self.count(offset, size * 8, &what, Use::Alone);
            for entry in self.words(offset, size, "a bitmap table")? {
                match bitmap::bits_at(entry, h) {
                    Err(why) => self.report.corrupt(format!("{what}: {why}")),
                    Ok(0) => {}
                    Ok(bits) => {
                        self.count(bits, h.cluster_size(), &what, Use::Alone);
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares the stored refcounts with what was counted.
    fn compare(&mut self, table: &[u64]) -> Result<()> {
        let h = self.header;
        let per_block = (h.cluster_size() * 8) >> h.refcount_order;
        let mut doubled = HashMap::new();
        for offset in &self.doubled {
            *doubled.entry(offset >> h.cluster_bits).or_insert(0u32) += 1;
        }
        // Blocks that share their cluster: this is told by itself, whatever its refcount says.
        let mut told: HashSet<u64> = doubled.keys().copied().collect();
        for (number, offset) in table.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            let cluster = offset >> h.cluster_bits;
            let own = doubled.get(&cluster).copied().unwrap_or(0).saturating_add(1);
            let others = self.counts.get(cluster).saturating_sub(own);
            if others > 0 {
                self.report.blocks += 1;
                self.report.corrupt(format!(
                    "refcount block {number} at {offset:#x}: a table, and something else too ({others} other references)"
                ));
                told.insert(cluster);
            }
        }
        let shared =
            self.tables.keys().copied().filter(|cluster| !told.contains(cluster) && self.overlap(*cluster));
        let overlaps: HashSet<u64> = shared.collect();
        let mut block = vec![0u8; h.cluster_size() as usize];
        let mut stored = Vec::new();
        for (number, offset) in table.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            if self.control.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            read_exact(self.storage, &mut block, *offset, "a refcount block")?;
            let mut first = number as u64 * per_block;
            let end = first + per_block;
            while first < end {
                let counted = self.counts.rest_of_part(first);
                let n = (counted.len() as u64).min(end - first);
                let at = first - number as u64 * per_block;
                stored.clear();
                stored.extend((at..at + n).map(|i| refcount::get(&block, h.refcount_order, i as usize)));
                // Nearly always.
                let same = stored.iter().zip(counted).all(|(s, c)| *s == u64::from(*c));
                if same && overlaps.is_empty() {
                    if let Some(last) = stored.iter().rposition(|s| *s != 0) {
                        self.used(first + last as u64);
                    }
                } else {
                    for (cluster, stored) in (first..).zip(&stored) {
                        self.compare_one(cluster, *stored, overlaps.contains(&cluster));
                    }
                }
                first += n;
            }
        }
        // What is left is used, and no block counts it.
        let has_block = |cluster: u64| table.get((cluster / per_block) as usize).is_some_and(|b| *b != 0);
        let left: Vec<(u64, u32)> = self.counts.used().filter(|(cluster, _)| !has_block(*cluster)).collect();
        for (cluster, counted) in left {
            self.used(cluster);
            self.differ(cluster, 0, u64::from(counted));
        }
        Ok(())
    }

    fn compare_one(&mut self, cluster: u64, stored: u64, overlap: bool) {
        let counted = self.counts.get(cluster);
        // A count past the end of the file takes no space: QEMU does not look at it either.
        if cluster >= self.end >> self.header.cluster_bits && counted == 0 {
            return;
        }
        if stored > 0 || counted > 0 {
            self.used(cluster);
        }
        if stored != u64::from(counted) {
            self.differ(cluster, stored, u64::from(counted));
        } else if overlap {
            self.report.corrupt(format!(
                "cluster {cluster}: a table, and something else too ({counted} references)"
            ));
        }
    }

    fn used(&mut self, cluster: u64) {
        let end = (cluster + 1).saturating_mul(self.header.cluster_size());
        self.report.usage.end_offset = self.report.usage.end_offset.max(end);
    }

    fn differ(&mut self, cluster: u64, stored: u64, counted: u64) {
        if stored < counted {
            self.report.uncounted += u64::from(stored == 0);
            self.report.corrupt(format!("cluster {cluster}: refcount {stored}, but {counted} references"));
        } else {
            self.report.leaks += 1;
            self.report.say(format!("cluster {cluster}: refcount {stored}, but only {counted} references"));
        }
    }
}
