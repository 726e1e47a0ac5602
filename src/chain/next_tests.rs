//! Every row of the table "Backups" as a test, and properties over random histories.

use std::path::PathBuf;

use proptest::prelude::*;

use super::drawing::{Link, rows};
use super::*;
use crate::store::layout_fixtures::{manifest, vm_record};
use crate::store::manifest::{BackupState, ImageFormat, Kind, Manifest, Parent, PrimaryImage};
use crate::store::vm::{Current, Tracking, VmRecord, VolumeTracking};
use crate::store::{BackupId, DiskName, VmName, VolumeId};

/// A VM on primary, its backups and its record: what operations do with a plan, without doing it.
struct Vm {
    record: VmRecord,
    history: Vec<Manifest>,
    now: Vec<VolumeNow>,
    chain_size: i64,
    method: Method,
    inode: u64,
    /// Backups ever made.
    made: u64,
}

impl Vm {
    fn new(chain_size: i64) -> Self {
        let record = vm_record(&VmName::new("web1").unwrap());
        let mut vm = Self {
            record,
            history: vec![],
            now: vec![],
            chain_size,
            method: Method::Delta,
            inode: 1,
            made: 0,
        };
        let id = vm.record.volumes[0].id;
        vm.add_volume(id, "root");
        vm
    }

    fn image(&mut self, path: &str, format: ImageFormat) -> PrimaryImage {
        self.inode += 1;
        PrimaryImage {
            path: path.into(),
            format,
            device: 1,
            inode: self.inode,
            virtual_size: 1 << 30,
            modified: None,
            owner: None,
        }
    }

    fn add_volume(&mut self, id: VolumeId, name: &str) {
        let image = self.image(&format!("/images/{name}.raw"), ImageFormat::Raw);
        let name = DiskName::new(name).unwrap();
        self.now.push(VolumeNow {
            id,
            name,
            virtual_size: 1 << 30,
            images: vec![image],
            stored: StoredFile::Sound,
        });
    }

    fn plan(&self, isolated: bool) -> Plan {
        plan(&Next {
            chain_size: self.chain_size,
            isolated,
            method: self.method,
            history: &self.history,
            tracking: &self.record.tracking,
            volumes: &self.now,
        })
    }

    /// Takes a backup as the plan says, and leaves primary as section 3 has it.
    fn backup(&mut self, isolated: bool) -> Plan {
        let plan = self.plan(isolated);
        self.made += 1;
        let sequence = self.made;
        let mut made = manifest(&self.record, "2026-11-23T22:32:42Z", sequence);
        made.name = crate::store::BackupName::at(made.taken, sequence as u32);
        let sample = made.disks.remove(0);
        made.parent = plan.parent.clone();
        made.position = plan.position;
        made.end_of_chain = plan.end_of_chain;
        made.isolated = isolated;
        for (now, volume) in self.now.iter().zip(&plan.volumes) {
            let mut disk = sample.clone();
            (disk.name, disk.volume) = (now.name.clone(), now.id);
            (disk.kind, disk.depth, disk.reason) = (volume.kind, volume.depth, volume.why.to_string());
            made.disks.push(disk);
        }
        crate::store::Record::check(&made).unwrap();
        if plan.becomes_current {
            let id = made.id;
            self.record.tracking = Tracking::default();
            for at in 0..self.now.len() {
                let old = self.now[at].images.clone();
                // The parent's delta was merged.
                self.now[at].images.retain(|i| i.owner.is_none());
                if !plan.end_of_chain && self.method == Method::Delta {
                    let mut delta = self.image(&format!("/images/{sequence}-{at}.qcow2"), ImageFormat::Qcow2);
                    delta.owner = Some(id);
                    self.now[at].images.insert(0, delta);
                }
                assert!(old.len() <= self.now[at].images.len() + 1);
                let left = VolumeTracking {
                    images: if self.method == Method::Scan { vec![] } else { self.now[at].images.clone() },
                    virtual_size: self.now[at].virtual_size,
                };
                if !plan.end_of_chain {
                    self.record.tracking.volumes.insert(self.now[at].id, left);
                }
            }
            let name = made.name.clone();
            self.record.tracking.current = (!plan.end_of_chain).then_some(Current { id, name });
            self.record.tracking.end_of_chain = plan.end_of_chain;
        }
        self.history.push(made);
        plan
    }

    /// All deltas of knibfs are merged, and nothing can stand on the current backup.
    fn end_tracking(&mut self) {
        for volume in &mut self.now {
            for step in deltas::merges(&volume.images, &deltas::Held::none()) {
                let at = volume.images.iter().position(|i| i.path == step.top).unwrap();
                assert_eq!(volume.images[at + 1].path, step.base);
                volume.images.remove(at);
            }
        }
        self.record.tracking = Tracking { end_of_chain: true, ..Default::default() };
    }

    fn nodes(&self) -> Vec<Node> {
        self.history.iter().map(Node::from).collect()
    }

    /// Removes backups as the rules say; those that are removed already are refused.
    fn remove(&mut self, targets: &[BackupId]) {
        let current = self.record.tracking.current.as_ref().map(|c| c.id);
        for (target, step) in remove_all(&self.nodes(), current, targets, &|_| None) {
            match step {
                Err(refusal) => assert_eq!(refusal, Refusal::AlreadyRemoved),
                Ok(Removal::Hide) => {
                    let hidden = self.history.iter_mut().find(|m| m.id == target).unwrap();
                    hidden.state = BackupState::Removed;
                }
                Ok(Removal::Delete { merge_deltas, delete, ends_chain }) => {
                    self.history.retain(|m| !delete.contains(&m.id));
                    let ends = |m: &&mut Manifest| Some(m.id) == ends_chain;
                    self.history.iter_mut().filter(ends).for_each(|m| m.end_of_chain = true);
                    if merge_deltas {
                        self.end_tracking();
                    }
                }
            }
        }
    }

    /// Merges removed backups into what stands on them.
    fn absorb(&mut self) {
        for step in absorb::absorbs(&self.nodes()) {
            let gone: Vec<Manifest> = step
                .from
                .iter()
                .map(|id| self.history.iter().find(|m| m.id == *id).unwrap().clone())
                .collect();
            let onto = step.onto.map(|id| self.history.iter().find(|m| m.id == id).unwrap().name.clone());
            self.history.retain(|m| !step.from.contains(&m.id));
            let into = self.history.iter_mut().find(|m| m.id == step.into).unwrap();
            for disk in &mut into.disks {
                let below = gone.iter().map(|m| m.disk_of(disk.volume).map(|d| d.kind));
                if disk.kind == Incremental && below.take_while(Option::is_some).any(|k| k == Some(Full)) {
                    (disk.kind, disk.depth) = (Full, 1);
                }
            }
            let stands = into.disks.iter().any(|d| d.kind == Incremental);
            into.parent = step.onto.zip(onto).filter(|_| stands).map(|(id, name)| Parent { id, name });
        }
        for changed in absorb::renumber(&self.history) {
            let at = self.history.iter().position(|m| m.id == changed.id).unwrap();
            self.history[at] = changed;
        }
    }

    fn kinds(&mut self, count: usize) -> Vec<Kind> {
        (0..count).map(|_| self.backup(false).volumes[0].kind).collect()
    }

    fn why(&self) -> Why {
        let plan = self.plan(false);
        assert_eq!((plan.volumes[0].kind, plan.position), (Kind::Full, 1));
        plan.volumes[0].why.clone()
    }
}

use Kind::{Full, Incremental};

#[test]
fn a_volume_that_was_restored_is_full_and_says_from_what() {
    let mut vm = Vm::new(8);
    vm.backup(false);
    vm.end_tracking();
    let id = vm.record.volumes[0].id;
    vm.record.tracking.restored.insert(id, "web1/first".into());
    assert_eq!(vm.why(), Why::Restored { backup: "web1/first".into() });
    assert!(vm.why().to_string().contains("restored from web1/first"));
    vm.backup(false);
    assert_eq!(vm.plan(false).volumes[0].kind, Incremental);
}

#[test]
fn chain_size_1_makes_every_backup_full_and_leaves_no_delta() {
    let mut vm = Vm::new(1);
    assert_eq!(vm.backup(false).volumes[0].why, Why::EveryOneFull);
    assert!(vm.history[0].end_of_chain);
    assert_eq!(vm.kinds(3), [Full; 3]);
    assert_eq!(vm.now[0].images.len(), 1);
}

#[test]
fn chain_size_3_ends_a_chain_with_its_third_backup() {
    // Acceptance table B, rows 1 to 5.
    let mut vm = Vm::new(3);
    assert_eq!(vm.kinds(7), [Full, Incremental, Incremental, Full, Incremental, Incremental, Full]);
    let ends: Vec<_> = vm.history.iter().map(|m| m.end_of_chain).collect();
    assert_eq!(ends, [false, false, true, false, false, true, false]);
    let drawn: Vec<_> = rows(&vm.history, None).iter().map(|r| r.link).collect();
    use Link::{Last, Middle, Start};
    assert_eq!(drawn, [Start, Middle, Last, Start, Middle, Last, Start]);
}

#[test]
fn chain_size_below_1_is_unlimited() {
    for size in [0, -1, i64::MIN] {
        let mut vm = Vm::new(size);
        let kinds = vm.kinds(30);
        assert!(kinds[0] == Full && kinds[1..].iter().all(|k| *k == Incremental));
    }
}

#[test]
fn removed_backups_count() {
    let mut vm = Vm::new(3);
    vm.kinds(2);
    vm.history[0].state = BackupState::Removed;
    let third = vm.backup(false);
    assert!(third.end_of_chain && third.position == 3);
    let drawn = rows(&vm.history, None);
    assert_eq!((drawn[0].hidden, &drawn[0].backup, drawn.len()), (1, &None, 3));
}

#[test]
fn a_lowered_chain_size_ends_the_chain_at_once() {
    let mut vm = Vm::new(8);
    vm.kinds(4);
    vm.chain_size = 3;
    assert_eq!(vm.why(), Why::ChainFull { size: 4 });
}

#[test]
fn a_new_volume_is_full_inside_an_otherwise_incremental_backup() {
    let mut vm = Vm::new(8);
    vm.kinds(1);
    vm.add_volume(VolumeId::random(), "data");
    let plan = vm.backup(false);
    assert_eq!(plan.volumes.iter().map(|v| v.kind).collect::<Vec<_>>(), [Incremental, Full]);
    assert_eq!(plan.volumes[1].why, Why::NoTracking);
    assert_eq!(plan.position, 2);
    // And the next is incremental for both, each on its own depth.
    let next = vm.plan(false);
    assert_eq!(
        next.volumes.iter().map(|v| (v.kind, v.depth)).collect::<Vec<_>>(),
        [(Incremental, 3), (Incremental, 2)]
    );
}

#[test]
fn an_isolated_backup_is_full_and_the_chain_goes_on_without_it() {
    let mut vm = Vm::new(8);
    vm.kinds(1);
    let isolated = vm.backup(true);
    assert_eq!(isolated.volumes[0].why, Why::Isolated);
    assert!(isolated.end_of_chain && !isolated.becomes_current && isolated.parent.is_none());
    let next = vm.backup(false);
    assert_eq!((next.volumes[0].kind, next.parent.unwrap().id), (Incremental, vm.history[0].id));
    assert_eq!(rows(&vm.history, None)[2].link, Link::Isolated);
}

#[test]
fn an_isolated_backup_is_not_the_first_of_a_chain() {
    let mut vm = Vm::new(8);
    vm.backup(true);
    assert_eq!(vm.why(), Why::First);
}

#[test]
fn at_a_depth_of_190_images_the_next_backup_is_full() {
    let mut vm = Vm::new(-1);
    let kinds = vm.kinds(200);
    // One image in the store, then two on primary: the delta and the disk.
    let full: Vec<_> = (0..200).filter(|n| kinds[*n] == Full).collect();
    assert_eq!(full, [0, 188]);
    assert_eq!(vm.history[188].disks[0].reason, Why::TooDeep { depth: 190 }.to_string());
    assert!(vm.history.iter().all(|m| m.disks[0].depth + 2 <= FULL_AT_DEPTH));
}

#[test]
fn primary_s_own_layers_count_for_the_depth() {
    let mut vm = Vm::new(-1);
    for n in 0..187 {
        let image = vm.image(&format!("/images/layer{n}"), ImageFormat::Qcow2);
        vm.now[0].images.push(image);
    }
    assert_eq!(vm.kinds(2), [Full, Full], "one in the store, 189 on primary");
    vm.now[0].images.truncate(188);
    vm.record.tracking.volumes.values_mut().for_each(|t| t.images.truncate(188));
    assert_eq!(vm.kinds(2), [Incremental, Full]);
}

#[test]
fn when_in_doubt_the_backup_is_full() {
    let doubt = |change: &dyn Fn(&mut Vm)| {
        let mut vm = Vm::new(8);
        vm.kinds(2);
        assert_eq!(vm.plan(false).volumes[0].kind, Incremental);
        change(&mut vm);
        vm.why()
    };

    assert!(matches!(doubt(&|vm| vm.history[1].state = BackupState::Error), Why::ParentState { .. }));
    assert!(matches!(doubt(&|vm| drop(vm.history.pop())), Why::ParentGone { .. }));
    assert!(matches!(doubt(&|vm| vm.now[0].stored = StoredFile::Missing), Why::FileMissing { .. }));
    assert!(matches!(
        doubt(&|vm| vm.now[0].stored = StoredFile::Damaged("x".into())),
        Why::FileDamaged { .. }
    ));
    assert_eq!(
        doubt(&|vm| vm.now[0].virtual_size += 512),
        Why::Resized { from: 1 << 30, to: (1 << 30) + 512 }
    );
    // Someone else took a snapshot.
    let snapshot = |vm: &mut Vm| {
        let image = vm.image("/images/s1.qcow2", ImageFormat::Qcow2);
        vm.now[0].images.insert(0, image);
    };
    assert!(doubt(&snapshot).to_string().contains("/images/s1.qcow2 is where /images/2-0.qcow2 was"));
    // Someone else merged the delta.
    assert!(matches!(doubt(&|vm| drop(vm.now[0].images.remove(0))), Why::ChainChanged { .. }));
    assert!(matches!(doubt(&|vm| drop(vm.now[0].images.pop())), Why::ChainChanged { .. }));
    // The disk was replaced, under the same name too.
    assert!(matches!(
        doubt(&|vm| vm.now[0].images[1].path = PathBuf::from("/other")),
        Why::ChainChanged { .. }
    ));
    assert!(doubt(&|vm| vm.now[0].images[1].inode += 1).to_string().contains("another file"));
    assert!(matches!(doubt(&|vm| vm.now[0].images[1].format = ImageFormat::Qcow2), Why::ChainChanged { .. }));
    // No delta of the current backup: nothing knows what changed.
    let disown = |vm: &mut Vm| vm.record.tracking.volumes.values_mut().for_each(|v| v.images[0].owner = None);
    assert_eq!(doubt(&disown), Why::NoTracking);
    assert_eq!(doubt(&|vm| vm.record.tracking.volumes.clear()), Why::NoTracking);
    assert_eq!(doubt(&|vm| vm.record.tracking.end_of_chain = true), Why::ChainEnded);
    assert_eq!(doubt(&|vm| vm.record.tracking = Tracking::default()), Why::ChainEnded);
    assert_eq!(doubt(&|vm| vm.history[1].end_of_chain = true), Why::ChainEnded);
}

#[test]
fn a_snapshot_that_knibfs_recorded_is_one_more_layer_of_changes() {
    let mut vm = Vm::new(8);
    vm.kinds(2);
    assert_eq!(vm.plan(false).volumes[0].layers, 1);
    let snapshot = vm.image("/images/s1.qcow2", ImageFormat::Qcow2);
    vm.now[0].images.insert(0, snapshot.clone());
    vm.record.tracking.volumes.values_mut().for_each(|t| t.images.insert(0, snapshot.clone()));
    let plan = vm.plan(false);
    assert_eq!((plan.volumes[0].kind, plan.volumes[0].layers), (Incremental, 2));
}

#[test]
fn a_scan_does_not_mind_a_replaced_file_but_a_resized_one() {
    let mut vm = Vm::new(8);
    vm.method = Method::Scan;
    vm.kinds(1);
    vm.now[0].images[0].inode += 7;
    vm.now[0].images[0].path = "/images/moved.raw".into();
    let plan = vm.plan(false);
    assert_eq!((plan.volumes[0].kind, plan.volumes[0].layers), (Incremental, 0));
    vm.now[0].virtual_size *= 2;
    assert!(matches!(vm.why(), Why::Resized { .. }));
}

#[derive(Debug, Clone)]
enum Event {
    Backup,
    Isolated,
    NewVolume,
    ForeignSnapshot,
    Resize,
    FileLost,
    ParentError,
    ChainSize(i64),
    Remove(Vec<prop::sample::Index>),
    Prune(u32),
    EndChain,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        8 => Just(Event::Backup),
        1 => Just(Event::Isolated),
        1 => Just(Event::NewVolume),
        1 => Just(Event::ForeignSnapshot),
        1 => Just(Event::Resize),
        1 => Just(Event::FileLost),
        1 => Just(Event::ParentError),
        1 => (-1i64..6).prop_map(Event::ChainSize),
        3 => prop::collection::vec(any::<prop::sample::Index>(), 1..4).prop_map(Event::Remove),
        1 => (1u32..5).prop_map(Event::Prune),
        1 => Just(Event::EndChain),
    ];
    prop::collection::vec(event, 0..60)
}

proptest! {
    #[test]
    fn every_chain_holds_together(events in events(), size in -1i64..6) {
        let mut vm = Vm::new(size);
        for event in events {
            match event {
                Event::Backup | Event::Isolated => {
                    let before = vm.record.tracking.clone();
                    let plan = vm.backup(matches!(event, Event::Isolated));
                    check(&vm, &plan, &before)?;
                    vm.now.iter_mut().for_each(|v| v.stored = StoredFile::Sound);
                }
                Event::NewVolume => {
                    let name = format!("disk{}", vm.now.len());
                    vm.add_volume(VolumeId::random(), &name);
                }
                Event::ForeignSnapshot => {
                    let image = vm.image("/images/foreign.qcow2", ImageFormat::Qcow2);
                    vm.now[0].images.insert(0, image);
                }
                Event::Resize => vm.now[0].virtual_size += 1 << 20,
                Event::FileLost => vm.now[0].stored = StoredFile::Missing,
                Event::ParentError => {
                    if let Some(last) = vm.history.last_mut() { last.state = BackupState::Error; }
                }
                Event::ChainSize(size) => vm.chain_size = size,
                Event::Remove(picks) if !vm.history.is_empty() => {
                    let targets: Vec<_> = picks.iter().map(|p| p.get(&vm.history).id).collect();
                    vm.remove(&targets);
                }
                Event::Remove(_) => {}
                Event::Prune(last) => {
                    let current = vm.record.tracking.current.as_ref().map(|c| c.id);
                    let keep = retention::Keep { last, ..Default::default() };
                    let kept = retention::kept(&vm.history, current, &keep, &|_| false);
                    let listed = vm.history.iter().filter(|m| m.is_listed());
                    let targets: Vec<_> = listed.map(|m| m.id).filter(|id| !kept.contains_key(id)).collect();
                    let before = vm.record.tracking.clone();
                    vm.remove(&targets);
                    vm.absorb();
                    prop_assert_eq!(&vm.record.tracking, &before, "retention never makes a full necessary");
                    let hidden = vm.history.iter().filter(|m| m.state == BackupState::Removed);
                    prop_assert_eq!(hidden.count(), 0, "a dead file is kept");
                }
                Event::EndChain => vm.end_tracking(),
            }
            legal(&vm)?;
        }
        // Every living backup is drawn exactly once.
        let drawn: Vec<_> = rows(&vm.history, None).into_iter().filter_map(|row| row.backup).collect();
        let living = vm.history.iter().filter(|m| m.is_listed());
        prop_assert_eq!(drawn.len(), living.count());
    }
}

/// What must be true after each operation, whatever it was.
fn legal(vm: &Vm) -> Result<(), TestCaseError> {
    for made in &vm.history {
        crate::store::Record::check(made).map_err(TestCaseError::fail)?;
        let parent = made.parent.as_ref().map(|p| vm.history.iter().find(|m| m.id == p.id));
        prop_assert!(parent.is_none_or(|p| p.is_some()), "a backup lost what it stands on");
        let parent = parent.flatten();
        prop_assert_eq!(made.position, parent.map_or(1, |p| p.position + 1));
        for disk in made.disks.iter().filter(|d| d.kind == Incremental) {
            let below = parent.and_then(|p| p.disk_of(disk.volume));
            prop_assert_eq!(Some(disk.depth), below.map(|d| d.depth + 1));
        }
        let needed = vm.history.iter().any(|m| m.parent.as_ref().is_some_and(|p| p.id == made.id));
        prop_assert!(needed || made.state != BackupState::Removed, "a removed backup is kept for nobody");
    }
    let current = vm.record.tracking.current.as_ref().map(|c| c.id);
    prop_assert!(current.is_none_or(|id| vm.history.iter().any(|m| m.id == id)));
    for volume in &vm.now {
        let owners: Vec<_> = volume.images.iter().filter_map(|i| i.owner).collect();
        prop_assert!(owners.len() <= 1 && owners.iter().all(|o| Some(*o) == current), "{:?}", owners);
    }
    Ok(())
}

fn check(vm: &Vm, plan: &Plan, before: &Tracking) -> Result<(), TestCaseError> {
    let made = vm.history.last().unwrap();
    let find = |id: BackupId| vm.history.iter().find(|m| m.id == id);
    let parent = made.parent.as_ref().map(|p| find(p.id).unwrap());
    prop_assert_eq!(parent.is_some(), made.disks.iter().any(|d| d.kind == Incremental));
    for (disk, volume) in made.disks.iter().zip(&plan.volumes) {
        prop_assert!(disk.depth < FULL_AT_DEPTH);
        if disk.kind == Incremental {
            let below = parent.unwrap().disk_of(disk.volume).unwrap();
            prop_assert_eq!(disk.depth, below.depth + 1);
            // The layers are those above and with the parent's delta, and no more.
            let left = &before.volumes[&disk.volume].images;
            prop_assert_eq!(left[volume.layers - 1].owner, parent.map(|p| p.id));
        }
    }
    if let Some(parent) = parent {
        prop_assert_eq!(parent.state, BackupState::BackedUp);
        prop_assert!(!parent.isolated && !parent.end_of_chain);
        prop_assert_eq!(made.position, parent.position + 1);
        prop_assert_eq!(Some(parent.id), before.current.as_ref().map(|c| c.id));
        prop_assert!(vm.chain_size < 1 || i64::from(made.position) <= vm.chain_size);
        let children = vm.history.iter().filter(|m| m.parent.as_ref().is_some_and(|p| p.id == parent.id));
        prop_assert_eq!(children.count(), 1, "a chain never branches");
    }
    if made.isolated {
        prop_assert_eq!(&vm.record.tracking, before);
    }
    Ok(())
}
