//! Random histories of whole stores on real files: writes, resizes, backups, removals, exports, compressions, kills. After
//! each step the store and the disks are what a model says that they must be.
//!
//! `KNIBFS_HISTORIES` is how many (200), `KNIBFS_SEED` makes them again; `scripts/histories` runs more. A failure prints
//! its seed and the shortest history that was found to fail.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod history;

use history::{History, World};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// One part of the histories: parts run beside each other.
fn part(number_of: u64) {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("KNIBFS_SEED", clock.as_secs());
    let total = number("KNIBFS_HISTORIES", 200);
    let config = Config {
        cases: u32::try_from(total.div_ceil(PARTS)).unwrap(),
        rng_seed: RngSeed::Fixed(seed.wrapping_mul(PARTS).wrapping_add(number_of)),
        failure_persistence: None,
        max_shrink_iters: 300,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&any::<History>(), |history| {
        let mut world = World::new(&history.setup);
        for step in &history.steps {
            world.step(step)?;
        }
        world.check_all()
    });
    if let Err(error) = outcome {
        panic!("KNIBFS_SEED={seed} KNIBFS_HISTORIES={total}: {error}");
    }
}

const PARTS: u64 = 4;

#[test]
fn random_histories_agree_with_the_model_1() {
    part(0);
}

#[test]
fn random_histories_agree_with_the_model_2() {
    part(1);
}

#[test]
fn random_histories_agree_with_the_model_3() {
    part(2);
}

#[test]
fn random_histories_agree_with_the_model_4() {
    part(3);
}
