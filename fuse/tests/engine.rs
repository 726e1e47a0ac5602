//! The read engine and its cache against a model.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Kind, MemorySource};
use knib_fuse::*;
use proptest::prelude::*;

fn file(source: &Arc<MemorySource>, limit: usize) -> (BlockFile, Arc<BlockCache>) {
    let cache = BlockCache::new(limit);
    (BlockFile::new(source.clone(), cache.clone(), ReadAhead::start()), cache)
}

fn kinds() -> impl Strategy<Value = Vec<Kind>> {
    let kind = prop_oneof![1 => Just(Kind::Zero), 1 => Just(Kind::Direct), 3 => Just(Kind::Block)];
    prop::collection::vec(kind, 1..40)
}

proptest! {
    #[test]
    fn any_reads_see_what_the_model_says(
        kinds in kinds(),
        cut in 0u64..4096,
        limit in prop_oneof![Just(0usize), Just(10_000), Just(1 << 20)],
        reads in prop::collection::vec((0.0f64..1.0, 1usize..30_000), 1..40),
        sequential in any::<bool>(),
    ) {
        let len = kinds.len() as u64 * 4096 - cut.min(4095);
        let source = Arc::new(MemorySource::new(7, 4096, kinds, len));
        let (file, cache) = file(&source, limit);
        let mut next = 0;
        for (place, size) in reads {
            #[allow(clippy::cast_sign_loss)]
            let at = if sequential { next % len } else { (place * (len - 1) as f64) as u64 };
            let size = size.min((len - at) as usize);
            let mut seen = vec![0xaa; size];
            file.read(at, &mut seen).unwrap();
            prop_assert_eq!(&seen, &source.content(at, size));
            prop_assert!(cache.stats().bytes <= limit);
            next = at + size as u64;
        }
    }

    #[test]
    fn seeks_find_the_edges_of_data(kinds in kinds(), place in 0.0f64..1.0) {
        let len = kinds.len() as u64 * 4096;
        let source = Arc::new(MemorySource::new(7, 4096, kinds.clone(), len));
        let (file, _) = file(&source, 1 << 20);
        #[allow(clippy::cast_sign_loss)]
        let at = (place * len as f64) as u64;
        let is_data = |o: &u64| kinds[(*o / 4096) as usize] != Kind::Zero;
        prop_assert_eq!(file.next_data(at).unwrap(), (at..len).find(is_data));
        prop_assert_eq!(file.next_hole(at).unwrap(), (at..len).find(|o| !is_data(o)).unwrap_or(len));
    }

    #[test]
    fn damage_hits_only_the_reads_that_touch_it(kinds in kinds(), hit in any::<prop::sample::Index>()) {
        let bad = hit.index(kinds.len()) as u64;
        let len = kinds.len() as u64 * 4096;
        let mut source = MemorySource::new(7, 4096, kinds.clone(), len);
        source.damaged.insert(bad);
        let source = Arc::new(source);
        let (file, _) = file(&source, 1 << 20);
        for round in 0..2 {
            for cluster in 0..kinds.len() as u64 {
                let mut seen = vec![0; 4096];
                let read = file.read(cluster * 4096, &mut seen);
                if cluster == bad && kinds[cluster as usize] != Kind::Zero {
                    prop_assert_eq!(read.unwrap_err().problem(), Problem::Damage, "round {}", round);
                } else {
                    read.unwrap();
                    prop_assert_eq!(seen, source.content(cluster * 4096, 4096));
                }
            }
        }
    }
}

#[test]
fn a_block_that_many_want_is_decoded_once() {
    let cache = BlockCache::new(1 << 20);
    let decoded = AtomicUsize::new(0);
    let key = BlockKey { image: 1, block: 2 };
    let begun = Barrier::new(2);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            cache
                .get(key, 16, |out| {
                    begun.wait();
                    // The others are counted as hits before they wait for this one.
                    while cache.stats().hits < 7 {
                        std::thread::yield_now();
                    }
                    decoded.fetch_add(1, Ordering::SeqCst);
                    out.fill(9);
                    Ok(())
                })
                .unwrap()
        });
        begun.wait();
        let others: Vec<_> =
            (0..7).map(|_| scope.spawn(|| cache.get(key, 16, |_| panic!("twice")).unwrap())).collect();
        for other in others {
            assert_eq!(*other.join().unwrap(), [9; 16]);
        }
        assert_eq!(*first.join().unwrap(), [9; 16]);
    });
    assert_eq!(decoded.load(Ordering::SeqCst), 1);
    assert_eq!((cache.stats().hits, cache.stats().misses), (7, 1));
}

#[test]
fn no_lock_is_held_while_a_block_is_decoded() {
    // Small, so that both blocks are in one shard.
    let cache = BlockCache::new(1 << 20);
    let key = |block| BlockKey { image: 1, block };
    let other = cache.get(key(1), 16, |_| {
        // With the shard's lock held this would never return.
        cache.get(key(2), 16, |out| {
            out.fill(2);
            Ok(())
        })?;
        Ok(())
    });
    assert!(other.is_ok());
    assert_eq!(*cache.get(key(2), 16, |_| panic!("it is held")).unwrap(), [2; 16]);
}

#[test]
fn who_waits_for_a_decoding_that_panics_or_fails_hears_of_it_and_the_next_tries_again() {
    let cache = BlockCache::new(1 << 20);
    let key = BlockKey { image: 1, block: 2 };
    let begun = Barrier::new(2);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            cache.get(key, 16, |_| {
                begun.wait();
                while cache.stats().hits < 1 {
                    std::thread::yield_now();
                }
                panic!("as the test wants it")
            })
        });
        begun.wait();
        let waits = scope.spawn(|| cache.get(key, 16, |_| Ok(())));
        assert_eq!(waits.join().unwrap().unwrap_err().problem(), Problem::Bug);
        assert!(first.join().is_err());
    });
    assert!(cache.get(key, 16, |_| Err(FsError::damage("bad"))).is_err());
    assert_eq!(
        *cache
            .get(key, 16, |out| {
                out.fill(3);
                Ok(())
            })
            .unwrap(),
        [3; 16]
    );
}

#[test]
fn blocks_that_are_used_outlive_those_that_are_not() {
    let cache = BlockCache::new(100);
    let get = |block| cache.get(BlockKey { image: 1, block }, 10, |_| Ok(())).unwrap();
    for block in 0..10 {
        get(block);
    }
    get(3);
    for block in 10..19 {
        get(block);
    }
    assert!(cache.holds(BlockKey { image: 1, block: 3 }));
    assert!(!cache.holds(BlockKey { image: 1, block: 0 }));
    assert_eq!(cache.stats().bytes, 100);
}

#[test]
fn a_block_larger_than_the_cache_is_given_but_not_kept() {
    let cache = BlockCache::new(100);
    let key = BlockKey { image: 1, block: 1 };
    assert_eq!(cache.get(key, 1000, |_| Ok(())).unwrap().len(), 1000);
    assert_eq!(cache.stats().bytes, 0);
    assert!(!cache.holds(key));
}

#[test]
fn a_sequential_reader_finds_the_next_blocks_decoded() {
    let source = Arc::new(MemorySource::new(1, 65536, vec![Kind::Block; 256], 256 * 65536));
    let (file, cache) = file(&source, 64 << 20);
    let mut buffer = vec![0; 65536];
    for block in 0..8u64 {
        file.read(block * 65536, &mut buffer).unwrap();
    }
    // Nobody asked for these; the wait ends because the workers come to them.
    while !(8..16).all(|block| cache.holds(BlockKey { image: 1, block })) {
        std::thread::yield_now();
    }
    for block in 8..256u64 {
        file.read(block * 65536, &mut buffer).unwrap();
        assert_eq!(buffer, source.content(block * 65536, 65536));
    }
    assert_eq!(source.decoded.load(Ordering::SeqCst), 256, "each block is decoded once");
}

#[test]
fn a_sequential_reader_leaves_the_cache_to_others_wherever_it_turns() {
    const COUNT: u64 = 4096;
    let source = Arc::new(MemorySource::new(1, 4096, vec![Kind::Block; COUNT as usize], COUNT * 4096));
    let (file, cache) = file(&source, 8 << 20);
    // Somebody else's, which just fit beside a quarter of the cache.
    let others = |block| BlockKey { image: 2, block };
    for block in 0..1500 {
        cache.get(others(block), 4096, |_| Ok(())).unwrap();
    }
    let mut buffer = vec![0; 4096];
    for start in [0, 2000, 1000, 3000] {
        for block in start..start + 700 {
            file.read(block * 4096, &mut buffer).unwrap();
            assert_eq!(buffer, source.content(block * 4096, 4096));
        }
    }
    assert!((0..1500).all(|block| cache.holds(others(block))));
}

#[test]
fn a_read_goes_on_behind_a_block_that_another_thread_decodes() {
    let source = Arc::new(MemorySource::new(1, 65536, vec![Kind::Block; 64], 64 * 65536));
    let (file, cache) = file(&source, 64 << 20);
    let (begun, first) = (Barrier::new(2), BlockKey { image: 1, block: 8 });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let decoded = cache.get(first, 65536, |out| {
                begun.wait();
                // Ends only when the reader has decoded the second block.
                let since = std::time::Instant::now();
                while source.decoded.load(Ordering::SeqCst) == 0 {
                    assert!(since.elapsed().as_secs() < 30, "the reader waits for this block first");
                    std::thread::yield_now();
                }
                out.copy_from_slice(&source.content(8 * 65536, 65536));
                Ok(())
            });
            assert!(decoded.is_ok());
        });
        begun.wait();
        let mut both = vec![0; 2 * 65536];
        file.read(8 * 65536, &mut both).unwrap();
        assert!(both == source.content(8 * 65536, 2 * 65536));
    });
}

#[test]
fn reads_past_the_end_are_refused() {
    let source = Arc::new(MemorySource::new(1, 4096, vec![Kind::Direct; 2], 8000));
    let (file, _) = file(&source, 1 << 20);
    assert!(file.read(7999, &mut [0; 1]).is_ok());
    assert!(file.read(7999, &mut [0; 2]).is_err());
    assert!(file.read(u64::MAX, &mut [0; 2]).is_err());
}

#[test]
fn a_block_is_decoded_in_part_first_and_kept_when_it_is_asked_for_again() {
    let source = Arc::new(MemorySource::new(1, 65536, vec![Kind::Block; 64], 64 * 65536));
    let (file, cache) = file(&source, 64 << 20);
    let mut page = vec![0; 4096];
    // Far apart, so that nobody reads ahead.
    for (round, held) in [(0, false), (1, true), (2, true)] {
        for block in [50u64, 1] {
            let at = block * 65536 + 8192;
            file.read(at, &mut page).unwrap();
            assert_eq!(page, source.content(at, 4096));
            assert_eq!(cache.holds(BlockKey { image: 1, block }), held, "round {round}");
        }
    }
    assert_eq!(source.decoded.load(Ordering::SeqCst), 4, "the third time nothing is decoded");
}
