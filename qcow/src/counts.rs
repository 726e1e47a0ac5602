//! How often each host cluster is referred to: four bytes for each cluster of the parts that are in use.

use std::collections::HashMap;

/// Clusters in one part.
const PART: u64 = 4096;

/// The counts of one part.
type Part = Box<[u32; PART as usize]>;

/// A part that nothing refers to.
static NOTHING: [u32; PART as usize] = [0; PART as usize];

/// References counted by cluster.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    /// The part that was used last, by its number: references come mostly in order.
    current: Option<(u64, Part)>,
    /// The others.
    parts: HashMap<u64, Part>,
}

impl Counts {
    fn part(&self, number: u64) -> Option<&[u32; PART as usize]> {
        match &self.current {
            Some((at, part)) if *at == number => Some(part),
            _ => self.parts.get(&number).map(|part| &**part),
        }
    }

    pub(crate) fn get(&self, cluster: u64) -> u32 {
        let part = self.part(cluster / PART);
        part.and_then(|p| p.get((cluster % PART) as usize)).copied().unwrap_or(0)
    }

    /// The counts of `cluster` and of those after it, as far as they lie together: at least one.
    pub(crate) fn rest_of_part(&self, cluster: u64) -> &[u32] {
        let part = self.part(cluster / PART).unwrap_or(&NOTHING);
        part.get((cluster % PART) as usize..).unwrap_or(&[])
    }

    fn slot(&mut self, cluster: u64) -> &mut u32 {
        let number = cluster / PART;
        let (_, part) = match self.current.take() {
            Some(current) if current.0 == number => self.current.insert(current),
            other => {
                self.parts.extend(other);
                let part = self.parts.remove(&number);
                self.current.insert((number, part.unwrap_or_else(|| Box::new([0; PART as usize]))))
            }
        };
        &mut part[(cluster % PART) as usize]
    }

    pub(crate) fn add(&mut self, cluster: u64) {
        let n = self.slot(cluster);
        *n = n.saturating_add(1);
    }

    pub(crate) fn remove(&mut self, cluster: u64) {
        if self.get(cluster) > 0 {
            *self.slot(cluster) -= 1;
        }
    }

    /// Adds a reference to each cluster that the bytes `offset..offset + len` touch; the sum does not overflow.
    pub(crate) fn add_bytes(&mut self, offset: u64, len: u64, cluster_bits: u32) {
        for cluster in clusters(offset, len, cluster_bits) {
            self.add(cluster);
        }
    }

    pub(crate) fn remove_bytes(&mut self, offset: u64, len: u64, cluster_bits: u32) {
        for cluster in clusters(offset, len, cluster_bits) {
            self.remove(cluster);
        }
    }

    /// Every cluster that is referred to, in order, with its count.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u32)> {
        let current = self.current.iter().map(|(number, _)| *number);
        let mut parts: Vec<u64> = self.parts.keys().copied().chain(current).collect();
        parts.sort_unstable();
        parts.into_iter().flat_map(move |part| {
            let counts = self.part(part).map_or(&[][..], |p| &p[..]);
            let numbered = counts.iter().enumerate().filter(|(_, n)| **n != 0);
            numbered.map(move |(i, n)| (part * PART + i as u64, *n))
        })
    }
}

/// The clusters that a range of bytes touches.
pub(crate) fn clusters(offset: u64, len: u64, cluster_bits: u32) -> std::ops::Range<u64> {
    if len == 0 {
        return 0..0;
    }
    offset >> cluster_bits..(offset.saturating_add(len - 1) >> cluster_bits) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_come_and_go() {
        let mut counts = Counts::default();
        counts.add_bytes(1000, 1, 9);
        counts.add_bytes(1000, 100, 9);
        counts.add_bytes(5000 << 9, 1024, 9);
        assert_eq!(counts.used().collect::<Vec<_>>(), [(1, 2), (2, 1), (5000, 1), (5001, 1)]);
        counts.remove_bytes(1000, 100, 9);
        counts.remove(77);
        assert_eq!((counts.get(1), counts.get(2), counts.get(5000), counts.get(9000)), (1, 0, 1, 0));
        assert_eq!(counts.used().count(), 3);
    }
}
