//! What a random history is, the model of it, and the world in which it happens.

mod model;
mod world;

use proptest::prelude::*;

pub use world::World;

/// A VM and a store, and what happens to them.
#[derive(Debug, Clone)]
pub struct History {
    pub setup: Setup,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone)]
pub struct Setup {
    /// Tracked by overlays; else by scan.
    pub overlay: bool,
    /// A scanned disk is qcow2; else raw.
    pub qcow2: bool,
    /// Sectors of 512 bytes of each disk.
    pub disks: Vec<u64>,
    pub compress: Option<Library>,
    pub write_once: bool,
    pub chain_size: i64,
}

#[derive(Debug, Clone, Copy)]
pub enum Library {
    Zstd,
    Zlib,
}

#[derive(Debug, Clone)]
pub enum Step {
    Write(Vec<Write>),
    Resize { disk: prop::sample::Index, sectors: u64 },
    Backup { isolated: bool, kill: Option<Kill> },
    Remove { which: Vec<prop::sample::Index>, leased: Option<prop::sample::Index>, kill: Option<Kill> },
    Export { which: prop::sample::Index, disk: prop::sample::Index, qcow2: bool },
    Compress { which: prop::sample::Index, kill: Option<Kill> },
    Prune { last: u32, kill: Option<Kill> },
    ChainSize(i64),
    EndChain { kill: Option<Kill> },
}

/// One write on one disk, in sectors; cut where the disk ends.
#[derive(Debug, Clone)]
pub struct Write {
    pub disk: prop::sample::Index,
    pub at: u64,
    pub len: u64,
    pub what: What,
}

#[derive(Debug, Clone, Copy)]
pub enum What {
    /// One byte over and over: compresses well.
    Byte(u8),
    /// Bytes that do not compress.
    Noise(u64),
    /// Zeros written as such.
    Zeros,
    /// Zeros as a hole.
    Hole,
}

/// The operation is killed at its n-th place, and `recover` perhaps too.
#[derive(Debug, Clone)]
pub struct Kill {
    pub at: u32,
    pub recover_at: Option<u32>,
}

/// Sectors of the largest disk: 3 MiB.
const MOST: u64 = 6144;

impl Arbitrary for History {
    type Parameters = ();
    type Strategy = BoxedStrategy<Self>;

    fn arbitrary_with((): ()) -> Self::Strategy {
        let library = prop_oneof![
            2 => Just(None),
            1 => Just(Some(Library::Zstd)),
            1 => Just(Some(Library::Zlib)),
        ];
        let sizes = prop_oneof![2 => Just(1i64), 3 => Just(3), 2 => Just(2), 4 => Just(-1)];
        let disks = prop::collection::vec(prop_oneof![64u64..MOST, Just(128), Just(2048)], 1..3);
        let setup = (any::<bool>(), any::<bool>(), disks, library, prop::bool::weighted(0.2), sizes)
            .prop_map(|(overlay, qcow2, disks, compress, write_once, chain_size)| Setup {
                overlay,
                qcow2,
                disks,
                compress,
                write_once,
                chain_size,
            });
        (setup, prop::collection::vec(step(), 1..16)).prop_map(|(setup, steps)| Self { setup, steps }).boxed()
    }
}

fn step() -> impl Strategy<Value = Step> {
    let kill = || {
        let kill = (1u32..110, prop::option::weighted(0.3, 1u32..60));
        prop::option::weighted(0.2, kill.prop_map(|(at, recover_at)| Kill { at, recover_at }))
    };
    let index = any::<prop::sample::Index>;
    prop_oneof![
        5 => prop::collection::vec(write(), 1..4).prop_map(Step::Write),
        1 => (index(), 1u64..MOST).prop_map(|(disk, sectors)| Step::Resize { disk, sectors }),
        6 => (prop::bool::weighted(0.15), kill()).prop_map(|(isolated, kill)| Step::Backup { isolated, kill }),
        4 => (prop::collection::vec(index(), 1..4), prop::option::weighted(0.15, index()), kill())
            .prop_map(|(which, leased, kill)| Step::Remove { which, leased, kill }),
        1 => (index(), index(), any::<bool>())
            .prop_map(|(which, disk, qcow2)| Step::Export { which, disk, qcow2 }),
        1 => (index(), kill()).prop_map(|(which, kill)| Step::Compress { which, kill }),
        2 => (1u32..4, kill()).prop_map(|(last, kill)| Step::Prune { last, kill }),
        1 => prop_oneof![Just(1i64), Just(2), Just(4), Just(0)].prop_map(Step::ChainSize),
        1 => kill().prop_map(|kill| Step::EndChain { kill }),
    ]
}

fn write() -> impl Strategy<Value = Write> {
    let what = prop_oneof![
        3 => any::<u8>().prop_map(What::Byte),
        2 => any::<u64>().prop_map(What::Noise),
        1 => Just(What::Zeros),
        1 => Just(What::Hole),
    ];
    let len = prop_oneof![1u64..256, 1u64..2048, Just(128)];
    (any::<prop::sample::Index>(), 0..MOST, len, what).prop_map(|(disk, at, len, what)| Write {
        disk,
        at,
        len,
        what,
    })
}
