//! Whether, and when, a server that died is followed by another.

use std::time::Duration;

/// What happens after a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next server takes over after this pause, and gets what the dead one had not answered.
    Resume(Duration),
    /// The same, but what was not answered fails: one of these requests may be what kills the servers.
    Abandon(Duration),
    /// No more.
    GiveUp,
}

/// Deaths in a row.
#[derive(Debug, Default)]
pub struct Patience {
    crashes: usize,
}

/// A server that has lived this long was good.
const GOOD: Duration = Duration::from_secs(30);
/// Pauses before the next one, in milliseconds.
const PAUSES: [u64; 6] = [0, 100, 300, 1000, 2000, 4000];
/// From this crash in a row on, requests are not handed out again.
const ABANDON: usize = 3;

impl Patience {
    /// A server died. `served` is for how long it had served, if it had; `killed` says that a person (or the kernel, for want of
    /// memory) ended it, and no fault of its own.
    pub fn after_death(&mut self, served: Option<Duration>, killed: bool) -> Next {
        match served {
            Some(_) if killed => return Next::Resume(Duration::ZERO),
            Some(served) if served >= GOOD => self.crashes = 0,
            _ => {}
        }
        let Some(pause) = PAUSES.get(self.crashes) else { return Next::GiveUp };
        self.crashes += 1;
        let pause = Duration::from_millis(*pause);
        if self.crashes >= ABANDON && served.is_some() { Next::Abandon(pause) } else { Next::Resume(pause) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn killing_a_server_never_ends_the_mount() {
        let mut patience = Patience::default();
        for _ in 0..1000 {
            assert_eq!(patience.after_death(Some(Duration::ZERO), true), Next::Resume(Duration::ZERO));
        }
    }

    #[test]
    fn crashes_in_a_row_drop_the_requests_and_then_end_it() {
        let mut patience = Patience::default();
        let next: Vec<Next> =
            (0..7).map(|_| patience.after_death(Some(Duration::from_secs(1)), false)).collect();
        let kinds = next.iter().map(|n| match n {
            Next::Resume(_) => 'r',
            Next::Abandon(_) => 'a',
            Next::GiveUp => 'g',
        });
        assert_eq!(kinds.collect::<String>(), "rraaaag");
    }

    #[test]
    fn a_server_that_never_serves_is_given_up() {
        let mut patience = Patience::default();
        let mut tries = 0;
        while patience.after_death(None, true) != Next::GiveUp {
            tries += 1;
        }
        assert_eq!(tries, PAUSES.len());
    }

    #[test]
    fn a_good_while_forgives() {
        let mut patience = Patience::default();
        for _ in 0..100 {
            assert_eq!(patience.after_death(Some(GOOD), false), Next::Resume(Duration::ZERO));
        }
    }
}
