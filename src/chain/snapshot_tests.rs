//! Snapshots and backups in one tree of images: table A row by row, then random histories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::deltas::{Held, Step as DeltaStep, after_backup, merges};
use super::snapshot::{Image, Step, apply, is_kept, next};
use crate::store::BackupId;
use crate::store::manifest::{ImageFormat, PrimaryImage};

/// What blocks hold.
type Data = BTreeMap<u8, u32>;

/// Whose an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    User,
    Snapshots,
    Backup(BackupId),
}

#[derive(Debug, Clone)]
struct Made {
    path: PathBuf,
    on: Option<PathBuf>,
    owner: Owner,
    data: Data,
}

#[derive(Debug, Clone)]
struct Taken {
    path: PathBuf,
    removed: bool,
    shows: Data,
}

/// One volume on primary, with what everything should show.
#[derive(Debug)]
struct World {
    images: Vec<Made>,
    live: PathBuf,
    guest_sees: Data,
    snapshots: Vec<Taken>,
    current: Option<BackupId>,
    written: BTreeSet<u8>,
    count: u32,
}

impl World {
    fn new() -> Self {
        let base = Made { path: "/B".into(), on: None, owner: Owner::User, data: Data::new() };
        World {
            live: base.path.clone(),
            images: vec![base],
            guest_sees: Data::new(),
            snapshots: Vec::new(),
            current: None,
            written: BTreeSet::new(),
            count: 0,
        }
    }

    fn at(&self, path: &Path) -> &Made {
        let found = self.images.iter().find(|i| i.path == path);
        found.unwrap_or_else(|| panic!("{} is gone", path.display()))
    }

    fn chain(&self, path: &Path) -> Vec<&Made> {
        let below = |i: &&Made| i.on.as_ref().map(|on| self.at(on));
        std::iter::successors(Some(self.at(path)), below).collect()
    }

    fn shows(&self, path: &Path) -> Data {
        let mut all = Data::new();
        for image in self.chain(path).into_iter().rev() {
            all.extend(&image.data);
        }
        all
    }

    fn write(&mut self, block: u8) {
        self.count += 1;
        let (live, value) = (self.live.clone(), self.count);
        let live = self.images.iter_mut().find(|i| i.path == live).unwrap();
        live.data.insert(block, value);
        self.guest_sees.insert(block, value);
        self.written.insert(block);
    }

    fn overlay(&mut self, on: &Path, owner: Owner) {
        self.count += 1;
        let path = PathBuf::from(format!("/{}", self.count));
        self.images.push(Made { path: path.clone(), on: Some(on.into()), owner, data: Data::new() });
        self.live = path;
    }

    fn create(&mut self) {
        let path = self.live.clone();
        self.snapshots.push(Taken { path: path.clone(), removed: false, shows: self.guest_sees.clone() });
        self.overlay(&path, Owner::Snapshots);
    }

    fn revert(&mut self, at: usize) {
        let Taken { path, shows, .. } = self.snapshots[at].clone();
        self.overlay(&path, Owner::Snapshots);
        self.guest_sees = shows;
        self.current = None;
        for image in self.images.iter_mut().filter(|i| matches!(i.owner, Owner::Backup(_))) {
            image.owner = Owner::Snapshots;
        }
        self.tidy();
    }

    fn remove(&mut self, at: usize) {
        self.snapshots[at].removed = true;
        self.tidy();
    }

    /// Merges data as the engine does, and has what stood on `top` stand on `base`.
    fn merge(&mut self, top: &Path, base: &Path) {
        let at = self.images.iter().position(|i| i.path == top).unwrap();
        let gone = self.images.remove(at);
        assert_eq!(gone.on.as_deref(), Some(base), "only into the image that it was made on");
        assert_ne!(gone.owner, Owner::User, "a disk of the user's is taken away");
        for image in &mut self.images {
            if image.on.as_deref() == Some(top) {
                image.on = Some(base.into());
            }
            if image.path == base {
                image.data.extend(&gone.data);
            }
        }
        if self.live == top {
            self.live = base.into();
        }
    }

    fn view(&self) -> Vec<Image> {
        let shown = |path: &Path| self.snapshots.iter().any(|s| !s.removed && s.path == path);
        let image = |i: &Made| Image {
            path: i.path.clone(),
            on: i.on.clone(),
            live: i.path == self.live,
            shown: shown(&i.path),
            tracked: self.current.is_some_and(|c| i.owner == Owner::Backup(c)),
            others: false,
            made: i.owner != Owner::User,
        };
        self.images.iter().map(image).collect()
    }

    fn tidy(&mut self) {
        while let Some(step) = next(&self.view()) {
            let mut expected = self.view();
            apply(&mut expected, &step);
            match &step {
                Step::Delete { path } => self.images.retain(|i| i.path != *path),
                Step::Merge { top, base } => {
                    self.merge(top, base);
                    for snapshot in self.snapshots.iter_mut().filter(|s| s.path == *top) {
                        snapshot.path.clone_from(base);
                    }
                }
            }
            assert_eq!(self.view(), expected, "{step:?}");
        }
        let view = self.view();
        self.snapshots.retain(|s| !s.removed || is_kept(&view, &s.path));
    }

    fn held(&self) -> Held {
        let living = self.snapshots.iter().filter(|s| !s.removed);
        let numbers = living.flat_map(|s| self.chain(&s.path)).map(|i| (1, number(&i.path)));
        Held::Images(numbers.collect())
    }

    fn primary(&self) -> Vec<PrimaryImage> {
        let image = |i: &&Made| PrimaryImage {
            path: i.path.clone(),
            format: ImageFormat::Qcow2,
            device: 1,
            inode: number(&i.path),
            virtual_size: 1 << 20,
            modified: None,
            owner: match i.owner {
                Owner::Backup(id) => Some(id),
                _ => None,
            },
        };
        self.chain(&self.live).iter().map(image).collect()
    }

    fn backup(&mut self, end_of_chain: bool) {
        self.an_incremental_would_hold_what_changed();
        let before = self.primary();
        let id = BackupId::random();
        let frozen = self.live.clone();
        self.overlay(&frozen, Owner::Backup(id));
        let after: Vec<PathBuf> = self.chain(&self.live).iter().map(|i| i.path.clone()).collect();
        let after: Vec<&Path> = after.iter().map(PathBuf::as_path).collect();
        let held = self.held();
        for DeltaStep { top, base } in after_backup(&before, &after, false, end_of_chain, &held) {
            self.merge(&top, &base);
        }
        self.current = (!end_of_chain).then_some(id);
        self.written.clear();
    }

    /// The chain of backups ends, and all deltas go.
    fn end(&mut self) {
        for DeltaStep { top, base } in merges(&self.primary(), &self.held()) {
            self.merge(&top, &base);
        }
        self.current = None;
    }

    /// The layers from the live one to the delta of the current backup hold just what was written since.
    fn an_incremental_would_hold_what_changed(&self) {
        let Some(current) = self.current else { return };
        let chain = self.chain(&self.live);
        let at = chain.iter().position(|i| i.owner == Owner::Backup(current)).expect("its delta is there");
        let held: BTreeSet<u8> = chain[..=at].iter().flat_map(|i| i.data.keys().copied()).collect();
        assert_eq!(held, self.written);
    }

    fn check(&self) {
        assert_eq!(self.shows(&self.live), self.guest_sees, "the guest sees other data: {self:?}");
        let mut needed: BTreeSet<&Path> = self.chain(&self.live).iter().map(|i| i.path.as_path()).collect();
        let mut living = 0;
        for snapshot in self.snapshots.iter().filter(|s| !s.removed) {
            assert_eq!(self.shows(&snapshot.path), snapshot.shows, "a snapshot lost a layer: {self:?}");
            assert_ne!(snapshot.path, self.live, "the guest writes to a snapshot");
            needed.extend(self.chain(&snapshot.path).iter().map(|i| i.path.as_path()));
            living += 1;
        }
        for image in &self.images {
            assert!(needed.contains(image.path.as_path()), "{} is an orphan: {self:?}", image.path.display());
        }
        self.an_incremental_would_hold_what_changed();
        assert!(self.images.len() <= 2 + 3 * living, "layers pile up: {self:?}");
    }
}

fn number(path: &Path) -> u64 {
    path.to_str().unwrap().trim_start_matches('/').parse().unwrap_or(0)
}

#[test]
fn table_a() {
    let mut world = World::new();
    let names = |world: &World, path: &Path| -> Vec<String> {
        world.chain(path).iter().map(|i| i.path.to_str().unwrap().to_owned()).collect()
    };
    world.write(0);
    world.create();
    let (s1, first) = (0, world.live.clone());
    assert_eq!(names(&world, &world.live), [first.to_str().unwrap(), "/B"], "row 1");
    world.write(1);
    world.create();
    let (s2, second) = (1, world.live.clone());
    assert_eq!(world.on(&second), first, "row 2");
    world.write(2);
    world.revert(s2);
    assert_eq!(world.on(&world.live), first, "row 3");
    assert!(world.images.iter().all(|i| i.path != second), "row 3: what was written since is gone");
    world.write(3);
    world.revert(s1);
    assert_eq!(world.on(&world.live), Path::new("/B"), "row 4");
    let fourth = world.live.clone();
    world.write(4);
    world.create();
    assert_eq!((world.on(&world.live), world.images.len()), (fourth.clone(), 4), "row 5");
    world.write(5);
    world.remove(s1);
    assert!(world.snapshots[s1].removed, "row 6: marked removed");
    assert_eq!(world.images.len(), 4, "row 6: still on storage");
    let s3 = 2;
    world.remove(s3);
    assert_eq!(
        (world.live.clone(), world.images.len()),
        (fourth, 3),
        "row 7: merged with the current volume"
    );
    assert_eq!(world.snapshots.len(), 2, "row 7");
    let s2 = world.snapshots.iter().position(|s| !s.removed).unwrap();
    world.remove(s2);
    assert_eq!(names(&world, &world.live), ["/B"], "row 8: gone, and s1 merged with the current volume");
    assert!(world.snapshots.is_empty(), "row 8");
    world.check();
}

impl World {
    fn on(&self, path: &Path) -> PathBuf {
        self.at(path).on.clone().unwrap()
    }
}

/// What other tools use is neither changed nor taken away.
#[test]
fn what_others_use_stays() {
    let image = |path: &str, on: Option<&str>| Image {
        path: path.into(),
        on: on.map(Into::into),
        live: path == "/2",
        shown: false,
        tracked: false,
        others: false,
        made: path != "/B",
    };
    let chain = [image("/2", Some("/1")), image("/1", Some("/B")), image("/B", None)];
    let with = |path: &str, change: fn(&mut Image)| {
        let mut images = chain.to_vec();
        images.iter_mut().filter(|i| i.path == Path::new(path)).for_each(change);
        next(&images)
    };
    let merge = |top: &str, base: &str| Some(Step::Merge { top: top.into(), base: base.into() });
    assert_eq!(next(&chain), merge("/1", "/B"));
    assert_eq!(with("/B", |i| i.others = true), merge("/2", "/1"), "another VM stands on it");
    assert_eq!(with("/1", |i| i.others = true), None, "virsh's snapshot names it");
    assert_eq!(with("/1", |i| i.made = false), merge("/2", "/1"), "it is another tool's");
    assert_eq!(with("/1", |i| i.tracked = true), merge("/2", "/1"), "it is the current backup's delta");
    assert_eq!(with("/2", |i| i.live = false), Some(Step::Delete { path: "/2".into() }));
    assert_eq!(with("/2", |i| (i.live, i.made) = (false, false)), merge("/1", "/B"), "it is the user's");
}

#[derive(Debug, Clone)]
enum Op {
    Write(u8),
    Create,
    Revert(prop::sample::Index),
    Remove(prop::sample::Index),
    Backup { end_of_chain: bool },
    End,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u8..8).prop_map(Op::Write),
        3 => Just(Op::Create),
        2 => any::<prop::sample::Index>().prop_map(Op::Revert),
        3 => any::<prop::sample::Index>().prop_map(Op::Remove),
        3 => prop::bool::weighted(0.2).prop_map(|end_of_chain| Op::Backup { end_of_chain }),
        1 => Just(Op::End),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_living_snapshot_ever_loses_a_layer(ops in prop::collection::vec(op(), 1..40)) {
        let mut world = World::new();
        for op in ops {
            let living: Vec<usize> =
                (0..world.snapshots.len()).filter(|i| !world.snapshots[*i].removed).collect();
            match op {
                Op::Write(block) => world.write(block),
                Op::Create => world.create(),
                Op::Revert(at) if !living.is_empty() => world.revert(*at.get(&living)),
                Op::Remove(at) if !living.is_empty() => world.remove(*at.get(&living)),
                Op::Backup { end_of_chain } => world.backup(end_of_chain),
                Op::End => world.end(),
                _ => {}
            }
            world.check();
        }
    }
}
