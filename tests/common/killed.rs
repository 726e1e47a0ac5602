//! Commands of the program that are killed at their failpoints: at each place that they come to, or at each by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Output;

use knibfs::failpoint::ENV;

use super::failpoints::List;
use super::lab::Lab;

/// No operation has as many failpoints.
const MOST: u32 = 150;

/// The failpoints at which a loop that counts places has killed a program; at the end it must have been all of a list.
#[derive(Debug, Default)]
pub struct Seen(BTreeSet<String>);

impl Seen {
    /// Takes note of where a program was killed, if it was.
    pub fn note(&mut self, output: &Output) {
        let said = String::from_utf8_lossy(&output.stderr);
        self.0
            .extend(said.lines().filter_map(|l| l.strip_prefix("failpoint: killed at ")).map(str::to_owned));
    }

    /// Fails unless it was killed at each name of the list, and at no other.
    pub fn assert_all(&self, list: List) {
        let listed: BTreeSet<&str> = list.names().collect();
        let seen: BTreeSet<&str> = self.0.iter().map(String::as_str).collect();
        let never: Vec<_> = listed.difference(&seen).collect();
        let unlisted: Vec<_> = seen.difference(&listed).collect();
        assert!(
            never.is_empty() && unlisted.is_empty(),
            "{} of tests/common/failpoints.rs: never passed: {never:?}; passed and not in the list: {unlisted:?}",
            list.called
        );
    }
}

/// Kills the command that `command` names at each place that it comes to, in turn. `before` sets the scene for each,
/// `after` looks at what `recover` made of it.
pub fn everywhere(
    lab: &Lab,
    list: List,
    before: impl Fn(u32),
    command: impl Fn(u32) -> String,
    after: impl Fn(u32),
) {
    let mut seen = Seen::default();
    for n in 1..MOST {
        before(n);
        let line = command(n);
        let out = lab.command(&words(&line)).env(ENV, format!("#{n}")).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let ended = out.status.success();
        assert!(ended || said.contains("failpoint: killed at"), "{line} {n}: {said}");
        seen.note(&out);
        if !ended {
            lab.ok(&["recover"]);
        }
        after(n);
        if ended {
            seen.assert_all(list);
            return;
        }
    }
    panic!("it does not end");
}

/// At which of the times that a program comes to a failpoint it is killed.
#[derive(Debug, Clone, Copy)]
pub enum Times {
    First,
    FirstAndLast,
    /// The same, but at those of each change of the store for the first time only: there are many.
    Few,
    /// The same, but not at those of this list: the operation begins as another one, which is killed there.
    FewBut(List),
}

impl Times {
    fn of(self, name: &str, all: u32) -> BTreeSet<u32> {
        let stores = ["write.", "rename.", "remove.", "create-dir."];
        match self {
            Times::FewBut(known) if known.names().any(|known| known == name) => BTreeSet::new(),
            Times::First => BTreeSet::from([1]),
            Times::Few | Times::FewBut(_) if stores.iter().any(|s| name.starts_with(s)) => {
                BTreeSet::from([1])
            }
            _ => BTreeSet::from([1, all]),
        }
    }
}

/// Kills the command that `command` names at each of the failpoints in `list`. `scene` sets the scene for each, `after` gets it when `recover` has been run, and words for which
/// kill it was. First the command runs to its end, and must pass just the failpoints of the list.
pub fn at_each_name<W: Deref<Target = Lab>>(
    times: Times,
    list: List,
    scene: impl Fn(u32) -> W,
    command: impl Fn(&W, u32) -> String,
    after: impl Fn(&W, &str),
) {
    let world = scene(0);
    let line = command(&world, 0);
    let (passed, seen) = passed(&world, &line);
    seen.assert_all(list);
    after(&world, &format!("{line} ended by itself"));
    drop(world);
    let kills =
        passed.iter().flat_map(|(name, all)| times.of(name, *all).into_iter().map(move |time| (name, time)));
    for ((name, time), number) in kills.zip(1..) {
        let world = scene(number);
        let line = command(&world, number);
        let killed = world.command(&words(&line)).env(ENV, format!("{name}#{time}")).output().unwrap();
        let step = format!("{line} at {name}#{time}: {}", String::from_utf8_lossy(&killed.stderr));
        // How often it looks at something that QEMU does is not the same each time.
        let missed = time > 1 && killed.status.success();
        assert!(missed || killed.status.signal() == Some(9), "not killed: {step}");
        world.ok(&["recover"]);
        after(&world, &step);
    }
}

/// Kills a command, for a scene.
pub fn kill(lab: &Lab, line: &str, place: &str) {
    let killed = lab.command(&words(line)).env(ENV, place).output().unwrap();
    let said = String::from_utf8_lossy(&killed.stderr);
    assert_eq!(killed.status.signal(), Some(9), "{line} was not killed at {place}: {said}");
}

/// The failpoints that a command passes to its end, each with how often.
fn passed(lab: &Lab, line: &str) -> (BTreeMap<String, u32>, Seen) {
    std::fs::create_dir_all(lab.path("log")).unwrap();
    let file = lab.path("log").join("failpoints");
    let _ = std::fs::remove_file(&file);
    let out = lab.command(&words(line)).env(ENV, format!("list:{}", file.display())).output().unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    let mut times = BTreeMap::new();
    for name in std::fs::read_to_string(&file).unwrap_or_default().lines() {
        *times.entry(name.to_owned()).or_insert(0) += 1;
    }
    let seen = Seen(times.keys().cloned().collect());
    (times, seen)
}

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}
