//! A model image in memory, its sums on disk, and what becomes of both when they are damaged.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const BITS: u32 = 12;
const CLUSTER: u64 = 1 << BITS;

#[derive(Debug, Clone, Copy)]
enum Shape {
    Data,
    Compressed(u16),
    Zero,
}

/// What a writer would have made: the image's bytes, and what it told the observer.
struct Model {
    image: Vec<u8>,
    guest: BTreeMap<u64, Vec<u8>>,
    places: BTreeMap<u64, Place>,
    virtual_size: u64,
    _dir: tempfile::TempDir,
    path: PathBuf,
    summary: SumsSummary,
}

fn bytes(seed: u64, len: u64) -> Vec<u8> {
    // Never zeros: a zero cluster is another thing.
    (0..len)
        .map(|i| ((seed.wrapping_mul(31).wrapping_add(i).wrapping_mul(2_654_435_761) >> 7) as u8) | 1)
        .collect()
}

fn build(clusters: &BTreeMap<u64, Shape>) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.sums");
    let virtual_size = clusters.keys().next_back().map_or(CLUSTER, |c| (c + 1) * CLUSTER);
    let writer = SumsWriter::create(&path, BITS, virtual_size).unwrap();
    let mut image = bytes(7, CLUSTER);
    writer.record_metadata(0, &image[..112]).unwrap();
    image[112..].fill(0); // padding behind the header
    let (mut guest, mut places) = (BTreeMap::new(), BTreeMap::new());
    for (&cluster, shape) in clusters {
        let content =
            if matches!(shape, Shape::Zero) { vec![0; CLUSTER as usize] } else { bytes(cluster, CLUSTER) };
        let stored = match *shape {
            Shape::Data => {
                image.resize(image.len().next_multiple_of(CLUSTER as usize), 0);
                content.clone()
            }
            Shape::Compressed(len) => bytes(cluster + 1000, u64::from(len % 4000) + 1),
            Shape::Zero => vec![],
        };
        let (offset, len) = (image.len() as u64, stored.len() as u64);
        let place = match shape {
            Shape::Data => Place::Data { offset, len },
            Shape::Compressed(_) => Place::Compressed { offset, len },
            Shape::Zero => Place::Zero,
        };
        writer.record_cluster(cluster, place, &writer.digest_cluster(&content, &stored)).unwrap();
        image.extend_from_slice(&stored);
        guest.insert(cluster, content);
        places.insert(cluster, place);
    }
    image.resize(image.len().next_multiple_of(CLUSTER as usize), 0);
    for table in 0..3 {
        let table = bytes(table, CLUSTER * 2 + 512);
        writer.record_metadata(image.len() as u64, &table).unwrap();
        image.extend_from_slice(&table);
    }
    // The header is written again when all is known.
    image[..112].copy_from_slice(&bytes(8, 112));
    writer.record_metadata(0, &image[..112]).unwrap();
    let summary = writer.finish(image.len() as u64).unwrap();
    Model { image, guest, places, virtual_size, _dir: dir, path, summary }
}

fn open(model: &Model) -> crate::store::StoreResult<Sums> {
    Sums::open_checked(&model.path, &model.summary.digest, SumsCache::new(1 << 20))
}

/// Whether every piece of the image is as it was written.
fn image_is_sound(sums: &Sums, image: &[u8]) -> crate::store::StoreResult<bool> {
    let pieces = sums.host_pieces(0, u64::MAX)?;
    Ok(pieces.iter().all(|p| image.get(p.offset as usize..p.end() as usize).is_some_and(|b| p.matches(b))))
}

fn shapes() -> impl Strategy<Value = BTreeMap<u64, Shape>> {
    let shape = prop_oneof![Just(Shape::Data), any::<u16>().prop_map(Shape::Compressed), Just(Shape::Zero)];
    // A region is 4096 clusters here: several regions, and holes between them.
    prop::collection::btree_map(0u64..20_000, shape, 0..60)
}

#[test]
fn an_image_without_clusters_has_sums_too() {
    let model = build(&BTreeMap::new());
    let sums = open(&model).unwrap();
    assert_eq!(sums.next_stored(0).unwrap(), None);
    assert!(image_is_sound(&sums, &model.image).unwrap());
}

#[test]
fn a_tail_cluster_is_hashed_as_if_padded_with_zeros() {
    let tail = bytes(1, 700);
    let mut padded = tail.clone();
    padded.resize(CLUSTER as usize, 0);
    assert_eq!(strong(&tail, CLUSTER), strong(&padded, CLUSTER));
    assert_ne!(strong(&tail, CLUSTER), strong(&padded, CLUSTER * 2));
}

#[test]
fn clusters_out_of_order_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let writer = SumsWriter::create(&dir.path().join("a"), BITS, 100 * CLUSTER).unwrap();
    let digest = writer.digest_cluster(&bytes(1, CLUSTER), &bytes(1, CLUSTER));
    let at = |offset| Place::Data { offset, len: CLUSTER };
    writer.record_cluster(5, at(CLUSTER * 2), &digest).unwrap();
    assert!(writer.record_cluster(5, at(CLUSTER * 3), &digest).is_err(), "twice");
    assert!(writer.record_cluster(4, at(CLUSTER * 3), &digest).is_err(), "guest order");
    assert!(writer.record_cluster(100, at(CLUSTER * 3), &digest).is_err(), "past the end");
    assert!(SumsWriter::create(&dir.path().join("a"), BITS, 1).is_err(), "the file is there");
}

#[test]
fn places_may_change_order_within_a_region_but_neither_overlap_nor_go_back_behind_another_region() {
    let dir = tempfile::tempdir().unwrap();
    let size = 20_000 * CLUSTER;
    let writer = SumsWriter::create(&dir.path().join("a"), BITS, size).unwrap();
    let digest = writer.digest_cluster(&bytes(1, CLUSTER), &bytes(1, CLUSTER));
    let at = |cluster| Place::Data { offset: cluster * CLUSTER, len: CLUSTER };
    writer.record_cluster(5, at(4), &digest).unwrap();
    writer.record_cluster(6, at(2), &digest).unwrap();
    writer.record_cluster(7, at(3), &digest).unwrap();
    assert!(writer.record_cluster(5000, at(3), &digest).is_err(), "another region behind this one");
    writer.record_cluster(5000, at(6), &digest).unwrap();
    writer.finish(7 * CLUSTER).unwrap();
    let sums = Sums::open(&dir.path().join("a"), SumsCache::new(1 << 20)).unwrap();
    let place = sums.with_record(6, |r| r.unwrap().place).unwrap();
    assert_eq!(place, at(2));
    let offsets: Vec<u64> = sums.host_pieces(0, 7 * CLUSTER).unwrap().iter().map(|p| p.offset).collect();
    assert!(offsets.is_sorted() && offsets.contains(&(2 * CLUSTER)) && offsets.contains(&(4 * CLUSTER)));

    let writer = SumsWriter::create(&dir.path().join("b"), BITS, size).unwrap();
    writer.record_cluster(5, at(3), &digest).unwrap();
    writer.record_cluster(6, at(2), &digest).unwrap();
    writer.record_cluster(7, at(3), &digest).unwrap();
    assert!(writer.finish(7 * CLUSTER).is_err(), "two clusters at one place");
}

#[test]
fn a_cache_keeps_to_its_limit() {
    let model = build(&(0..40).map(|n| (n * 500, Shape::Data)).collect());
    let cache = SumsCache::new(2000);
    let sums = Sums::open(&model.path, cache.clone()).unwrap();
    for cluster in model.guest.keys() {
        assert!(sums.with_record(*cluster, |r| r.is_some()).unwrap());
        assert!(cache.bytes() <= 2000);
    }
    drop(sums);
    assert_eq!(cache.bytes(), 0);
}

#[test]
fn a_chain_answers_with_the_newest_layer_that_knows() {
    let base = build(&BTreeMap::from([(1, Shape::Data), (2, Shape::Data), (9000, Shape::Data)]));
    let top = build(&BTreeMap::from([(2, Shape::Zero), (3, Shape::Compressed(9)), (9000, Shape::Data)]));
    let layers = vec![Arc::new(open(&top).unwrap()), Arc::new(open(&base).unwrap())];
    let chain = SumsChain::new(layers).unwrap();
    assert_eq!(chain.strong(1).unwrap(), Some(strong(&base.guest[&1], CLUSTER)));
    assert_eq!(chain.strong(2).unwrap(), None);
    assert_eq!(chain.strong(3).unwrap(), Some(strong(&top.guest[&3], CLUSTER)));
    assert_eq!(chain.strong(4).unwrap(), None);
    let stored: Vec<_> =
        std::iter::successors(chain.next_stored(0).unwrap(), |c| chain.next_stored(c + 1).unwrap()).collect();
    assert_eq!(stored, [1, 2, 3, 9000]);
}

#[test]
fn a_scan_leaves_out_what_the_chain_holds() {
    let base = build(&BTreeMap::from([(1, Shape::Data), (2, Shape::Data)]));
    let chain = SumsChain::new(vec![Arc::new(open(&base).unwrap())]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let writer = SumsWriter::create(&dir.path().join("a"), BITS, base.virtual_size)
        .unwrap()
        .leave_out_what_is_in(chain);
    let zeros = vec![0; CLUSTER as usize];
    assert!(!writer.is_new(1, &base.guest[&1]), "the same");
    assert!(writer.is_new(1, &base.guest[&2]), "other data");
    assert!(writer.is_new(1, &zeros), "zeros over data");
    assert!(!writer.is_new(0, &zeros), "zeros over nothing");
    assert!(writer.is_new(0, &base.guest[&1]), "data over nothing");
}

#[test]
fn a_sums_file_of_another_image_is_refused() {
    let one = build(&BTreeMap::from([(1, Shape::Data)]));
    let other = build(&BTreeMap::from([(2, Shape::Data)]));
    fs::copy(&other.path, &one.path).unwrap();
    assert!(open(&one).unwrap_err().to_string().contains("manifest"));
    fs::remove_file(&one.path).unwrap();
    assert!(open(&one).unwrap_err().to_string().contains("it is missing"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read(shapes in shapes()) {
        let model = build(&shapes);
        let sums = open(&model).unwrap();
        prop_assert_eq!(sums.info().clusters, shapes.len() as u64);
        prop_assert_eq!(fs::metadata(&model.path).unwrap().len(), model.summary.len);
        for (cluster, place) in &model.places {
            let region = sums.region_of(*cluster).unwrap().unwrap();
            let record = region.get(*cluster).unwrap();
            prop_assert_eq!(record.place, *place);
            prop_assert!(record.matches_guest(&model.guest[cluster], CLUSTER));
            if let Some((offset, len)) = place.stored() {
                let stored = &model.image[offset as usize..(offset + len) as usize];
                prop_assert!(record.matches_stored(0, stored));
            }
        }
        let walked: Vec<_> =
            std::iter::successors(sums.next_stored(0).unwrap(), |c| sums.next_stored(c + 1).unwrap()).collect();
        prop_assert_eq!(walked, shapes.keys().copied().collect::<Vec<_>>());
        prop_assert!(!shapes.contains_key(&20_001) && sums.with_record(20_001, |r| r.is_none()).unwrap());
    }

    #[test]
    fn every_byte_of_the_image_is_covered(shapes in shapes(), place in any::<prop::sample::Index>(), flip in 1u8..=255) {
        let mut model = build(&shapes);
        let sums = open(&model).unwrap();
        prop_assert!(image_is_sound(&sums, &model.image).unwrap());
        let at = place.index(model.image.len());
        model.image[at] ^= flip;
        prop_assert!(!image_is_sound(&sums, &model.image).unwrap());
    }

    #[test]
    fn pieces_cover_any_range_without_gaps(shapes in shapes(), from in any::<prop::sample::Index>(), len in 1u64..30_000) {
        let model = build(&shapes);
        let sums = open(&model).unwrap();
        let start = from.index(model.image.len()) as u64;
        let end = (start + len).min(model.image.len() as u64);
        let pieces = sums.host_pieces(start, len).unwrap();
        prop_assert!(pieces[0].offset <= start && pieces[pieces.len() - 1].end() >= end);
        for pair in pieces.windows(2) {
            prop_assert_eq!(pair[0].end(), pair[1].offset);
        }
        for piece in &pieces {
            prop_assert!(piece.len > 0 && piece.offset < end && piece.end() > start, "{:?} is not asked for", piece);
            prop_assert!(piece.matches(&model.image[piece.offset as usize..piece.end() as usize]));
        }
    }

    #[test]
    fn a_damaged_sums_file_is_noticed_or_harmless(
        shapes in shapes(), place in any::<prop::sample::Index>(), flip in 1u8..=255, cut in any::<bool>(),
    ) {
        let model = build(&shapes);
        let mut file = fs::read(&model.path).unwrap();
        let at = place.index(file.len());
        if cut { file.truncate(at) } else { file[at] ^= flip }
        fs::write(&model.path, &file).unwrap();
        // Every byte is under a checksum: opening and reading all of it must fail somewhere.
        let read_all = || -> crate::store::StoreResult<()> {
            let sums = open(&model)?;
            for region in sums.regions() { region?; }
            sums.host_pieces(0, u64::MAX).map(drop)
        };
        let error = read_all().unwrap_err().to_string();
        prop_assert!(error.contains("root.sums"), "{}", error);
    }

    #[test]
    fn hostile_bytes_never_panic(mut noise in prop::collection::vec(any::<u8>(), 0..400), region in any::<u64>()) {
        let _ = Region::decode(region, BITS, u64::MAX, &noise);
        let _ = super::host::Metadata::decode(&noise, u64::MAX);
        noise.resize(super::format::HEADER_LEN, 0);
        let _ = super::format::Header::decode(noise.as_slice().try_into().unwrap(), u64::MAX);
    }
}
