//! Where a VM's domain is, by what the hosts answer (section 3, "Removing VMs").

/// What a host answers about a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It runs there, or is paused.
    Runs,
    /// It is defined there and off.
    Off,
    /// It is not there.
    Missing,
    /// The host cannot be asked, and why.
    Silent(String),
}

/// Where a domain is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// On its own host.
    Home,
    /// It has moved to the other host of that number.
    Moved(usize),
    /// No host has it; those of these numbers could not be asked.
    Gone {
        /// Numbers of other hosts.
        silent: Vec<usize>,
    },
    /// Its own host cannot be asked, and it runs on no other.
    Unknown {
        /// Why not.
        why: String,
    },
}

/// Where the domain is. A VM is where it runs: a migration may leave a definition behind. A definition that is off is only
/// believed of another host when its own no longer has it.
pub fn whereabouts(own: &Answer, others: &[Answer]) -> Whereabouts {
    let on = |answer: &Answer| others.iter().position(|other| other == answer);
    match own {
        Answer::Runs => Whereabouts::Home,
        Answer::Off => on(&Answer::Runs).map_or(Whereabouts::Home, Whereabouts::Moved),
        Answer::Silent(why) => {
            on(&Answer::Runs).map_or_else(|| Whereabouts::Unknown { why: why.clone() }, Whereabouts::Moved)
        }
        Answer::Missing => match on(&Answer::Runs).or_else(|| on(&Answer::Off)) {
            Some(at) => Whereabouts::Moved(at),
            None => {
                let silent = |(at, answer)| matches!(answer, &Answer::Silent(_)).then_some(at);
                Whereabouts::Gone { silent: others.iter().enumerate().filter_map(silent).collect() }
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::Answer::{Missing, Off, Runs};
    use super::*;

    fn silent() -> Answer {
        Answer::Silent("down".into())
    }

    #[test]
    fn it_is_where_it_runs() {
        assert_eq!(whereabouts(&Runs, &[Runs]), Whereabouts::Home);
        for own in [Off, Missing, silent()] {
            assert_eq!(whereabouts(&own, &[Off, silent(), Missing, Runs]), Whereabouts::Moved(3));
        }
    }

    #[test]
    fn one_that_is_off_has_moved_only_where_its_own_host_says_that_it_has_it_not() {
        assert_eq!(whereabouts(&Off, &[Off]), Whereabouts::Home);
        assert_eq!(whereabouts(&silent(), &[Off]), Whereabouts::Unknown { why: "down".into() });
        assert_eq!(whereabouts(&Missing, &[Missing, Off]), Whereabouts::Moved(1));
    }

    #[test]
    fn it_is_gone_where_nobody_has_it() {
        assert_eq!(whereabouts(&Missing, &[]), Whereabouts::Gone { silent: vec![] });
        assert_eq!(whereabouts(&Missing, &[Missing, silent()]), Whereabouts::Gone { silent: vec![1] });
    }
}
