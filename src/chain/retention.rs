//! Which backups are kept: "keep-last/hourly/daily/weekly/monthly/yearly".

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::store::BackupId;
use crate::store::manifest::{BackupState, Manifest};

/// How many backups of each kind are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest ones.
    pub last: u32,
    /// The newest of each hour that has one, for so many hours.
    pub hourly: u32,
    /// The same for days.
    pub daily: u32,
    /// The same for weeks, which begin on Mondays.
    pub weekly: u32,
    /// The same for months.
    pub monthly: u32,
    /// The same for years.
    pub yearly: u32,
}

/// Why a backup is kept; each stands for what the person asked for, or for a rule that comes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Among the newest.
    Last,
    /// The newest of its hour.
    Hourly,
    /// The newest of its day.
    Daily,
    /// The newest of its week.
    Weekly,
    /// The newest of its month.
    Monthly,
    /// The newest of its year.
    Yearly,
    /// The next incremental stands on it: retention never makes a new full backup necessary.
    Current,
    /// It is in use.
    InUse,
    /// Its state needs a person: it is neither counted nor removed.
    State,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::Current => "current",
            Self::InUse => "in use",
            Self::State => "its state",
        })
    }
}

impl Keep {
    /// Whether it asks for nothing, which would remove everything.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// The listed backups that are kept, with all their reasons; the others are to be removed. Times are UTC, as backups' names
/// are; what is newer follows from the sequence, never from the clock.
pub fn kept(
    backups: &[Manifest],
    current: Option<BackupId>,
    keep: &Keep,
    in_use: &dyn Fn(BackupId) -> bool,
) -> BTreeMap<BackupId, BTreeSet<Reason>> {
    let mut kept: BTreeMap<BackupId, BTreeSet<Reason>> = BTreeMap::new();
    let mut add = |id, reason| {
        kept.entry(id).or_default().insert(reason);
    };
    let mut newest_first: Vec<&Manifest> = backups.iter().filter(|m| m.is_listed()).collect();
    newest_first.sort_by_key(|m| std::cmp::Reverse(m.sequence));
    for backup in &newest_first {
        if Some(backup.id) == current {
            add(backup.id, Reason::Current);
        }
        if in_use(backup.id) {
            add(backup.id, Reason::InUse);
        }
        if backup.state != BackupState::BackedUp {
            add(backup.id, Reason::State);
        }
    }
    newest_first.retain(|m| m.state == BackupState::BackedUp);
    let rules = [
        (Reason::Hourly, keep.hourly),
        (Reason::Daily, keep.daily),
        (Reason::Weekly, keep.weekly),
        (Reason::Monthly, keep.monthly),
        (Reason::Yearly, keep.yearly),
    ];
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    newest_first.iter().take(count(keep.last)).for_each(|m| add(m.id, Reason::Last));
    for (reason, most) in rules {
        let mut periods = BTreeSet::new();
        for backup in &newest_first {
            if periods.len() < count(most) && periods.insert(period(reason, backup.taken)) {
                add(backup.id, reason);
            }
        }
    }
    kept
}

/// What the newest is kept of.
fn period(reason: Reason, taken: Timestamp) -> (i16, i16, i8) {
    let at = taken.to_zoned(TimeZone::UTC);
    match reason {
        Reason::Hourly => (at.year(), at.day_of_year(), at.hour()),
        Reason::Daily => (at.year(), at.day_of_year(), 0),
        Reason::Weekly => {
            let week = at.date().iso_week_date();
            (week.year(), i16::from(week.week()), 0)
        }
        Reason::Monthly => (at.year(), i16::from(at.month()), 0),
        _ => (at.year(), 0, 0),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::VmName;
    use crate::store::layout_fixtures::{manifest, vm_record};

    fn backups(times: &[&str]) -> Vec<Manifest> {
        let vm = vm_record(&VmName::new("web1").unwrap());
        times.iter().enumerate().map(|(at, time)| manifest(&vm, time, at as u64 + 1)).collect()
    }

    /// Indices of those that are kept.
    fn left(backups: &[Manifest], keep: &Keep) -> Vec<usize> {
        let kept = kept(backups, None, keep, &|_| false);
        (0..backups.len()).filter(|at| kept.contains_key(&backups[*at].id)).collect()
    }

    const TIMES: [&str; 8] = [
        "2024-12-30T10:00:00Z", // a Monday, of the first week of 2025
        "2025-01-05T10:00:00Z", // the Sunday of the same week
        "2025-01-31T10:10:00Z",
        "2025-01-31T10:50:00Z",
        "2025-02-01T00:00:00Z",
        "2025-02-01T23:59:59Z",
        "2025-02-02T00:00:00Z",
        "2025-02-02T00:30:00Z",
    ];

    #[test]
    fn the_newest_of_each_period_is_kept() {
        let b = backups(&TIMES);
        let cases = [
            (Keep { last: 3, ..Keep::default() }, vec![5, 6, 7]),
            (Keep { last: 99, ..Keep::default() }, (0..8).collect()),
            (Keep { hourly: 3, ..Keep::default() }, vec![4, 5, 7]),
            (Keep { daily: 3, ..Keep::default() }, vec![3, 5, 7]),
            (Keep { weekly: 2, ..Keep::default() }, vec![1, 7]),
            (Keep { monthly: 2, ..Keep::default() }, vec![3, 7]),
            (Keep { yearly: 5, ..Keep::default() }, vec![0, 7]),
            (Keep { last: 1, yearly: 2, monthly: 2, ..Keep::default() }, vec![0, 3, 7]),
        ];
        for (keep, wanted) in cases {
            assert_eq!(left(&b, &keep), wanted, "{keep:?}");
        }
    }

    #[test]
    fn the_current_one_those_in_use_and_those_in_trouble_are_kept_whatever_was_asked() {
        let mut b = backups(&TIMES);
        b[2].state = BackupState::Error;
        b[3].state = BackupState::Removed;
        let (current, used) = (b[0].id, b[1].id);
        let keep = Keep { last: 1, ..Keep::default() };
        let kept = kept(&b, Some(current), &keep, &|id| id == used);
        let why = |at: usize| kept.get(&b[at].id).map(|r| r.iter().copied().collect::<Vec<_>>());
        assert_eq!(why(0), Some(vec![Reason::Current]));
        assert_eq!(why(1), Some(vec![Reason::InUse]));
        assert_eq!(why(2), Some(vec![Reason::State]));
        assert_eq!(why(3), None, "a removed one is not listed, so not kept either");
        assert_eq!(why(7), Some(vec![Reason::Last]));
        assert_eq!(kept.len(), 4);
    }

    #[test]
    fn a_clock_that_went_back_does_not_make_the_newest_backup_old() {
        let b = backups(&["2025-05-05T10:00:00Z", "2020-01-01T10:00:00Z"]);
        assert_eq!(left(&b, &Keep { last: 1, ..Keep::default() }), [1]);
    }

    proptest! {
        #[test]
        fn each_rule_keeps_no_more_than_asked_and_always_the_newest(
            hours in prop::collection::vec(0i64..30_000, 1..40), most in 1u32..6,
        ) {
            let vm = vm_record(&VmName::new("web1").unwrap());
            let mut hours = hours;
            hours.sort_unstable();
            let start: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
            let b: Vec<Manifest> = hours.iter().enumerate().map(|(at, hour)| {
                let taken = start + jiff::SignedDuration::from_hours(*hour);
                manifest(&vm, &taken.to_string(), at as u64 + 1)
            }).collect();
            for keep in [
                Keep { last: most, ..Keep::default() },
                Keep { hourly: most, ..Keep::default() },
                Keep { daily: most, ..Keep::default() },
                Keep { weekly: most, ..Keep::default() },
                Keep { monthly: most, ..Keep::default() },
                Keep { yearly: most, ..Keep::default() },
            ] {
                let kept = left(&b, &keep);
                prop_assert!(kept.len() <= most as usize);
                prop_assert_eq!(kept.last(), Some(&(b.len() - 1)));
                // Done again on what is left, it removes nothing.
                let rest: Vec<Manifest> = kept.iter().map(|at| b[*at].clone()).collect();
                prop_assert_eq!(left(&rest, &keep).len(), rest.len());
            }
        }
    }
}
