//! Finds a VM's domain: on its own host, or on another known one that it has moved to since.

use std::sync::Arc;
use std::time::Duration;

use super::hypervisor;
use crate::chain::whereabouts::{Answer, Whereabouts, whereabouts};
use crate::hypervisor::{Hypervisor, HypervisorError, Power, Result, limit};
use crate::store::vm::Source;
use crate::store::{Host, Store, VmRecord};

/// How long a host may take to answer someone who only looks.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a VM's domain is, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Presence {
    /// On the host that the record names; disk files always are.
    Here,
    /// On another known host.
    Moved {
        /// Its name.
        host: String,
        /// Its libvirt.
        uri: String,
    },
    /// No host that could be asked has it.
    Gone {
        /// Hosts that could not be asked.
        unasked: Vec<String>,
    },
    /// Its host cannot be asked.
    Unknown {
        /// Why not.
        why: String,
    },
    /// It was taken out of knibfs's care: nobody looks.
    Removed,
}

/// The hypervisor of a VM, wherever its domain is now; a move is recorded. The caller holds the VM's lock.
///
/// # Errors
/// libvirt cannot be reached, or the domain is gone from all hosts that are known.
pub fn find(store: &Store, record: &mut VmRecord) -> Result<Arc<dyn Hypervisor>> {
    let Source::Domain { uri, .. } = &record.source else { return hypervisor::of(record) };
    let own = ask(uri, record);
    if own == Answer::Runs {
        return hypervisor::of(record);
    }
    let hosts = others(store, uri);
    let answers: Vec<Answer> = hosts.iter().map(|host| ask(&host.uri, record)).collect();
    match whereabouts(&own, &answers) {
        // An unreachable one says so by itself.
        Whereabouts::Home | Whereabouts::Unknown { .. } => hypervisor::of(record),
        Whereabouts::Moved(at) => {
            let Some(host) = hosts.get(at) else { return hypervisor::of(record) };
            tracing::info!("{} has moved from {uri} to {}", record.name, host.uri);
            let uri = host.uri.clone();
            if let Source::Domain { uri: own, .. } = &mut record.source {
                *own = uri;
            }
            // Only a note: it would be found again.
            if let Err(error) = store.save_vm(record) {
                tracing::warn!("cannot record where {} is: {error}", record.name);
            }
            hypervisor::of(record)
        }
        Whereabouts::Gone { silent } => Err(HypervisorError::Gone {
            vm: record.name.to_string(),
            uuid: record.id.to_string(),
            uri: uri.clone(),
            silent: silent.iter().filter_map(|at| Some(hosts.get(*at)?.name.clone())).collect(),
        }),
    }
}

/// Where the domains of VMs are, in the same order; no host holds up the look for long.
pub fn look(store: &Store, records: &[&VmRecord]) -> Vec<Presence> {
    let mut deaf: Vec<(String, String)> = Vec::new();
    records.iter().map(|record| look_at(store, record, &mut deaf)).collect()
}

fn look_at(store: &Store, record: &VmRecord, deaf: &mut Vec<(String, String)>) -> Presence {
    if record.removed.is_some() {
        return Presence::Removed;
    }
    let Source::Domain { uri, .. } = &record.source else { return Presence::Here };
    let own = ask_briefly(uri, record, deaf);
    if own == Answer::Runs {
        return Presence::Here;
    }
    let hosts = others(store, uri);
    let answers: Vec<Answer> = hosts.iter().map(|host| ask_briefly(&host.uri, record, deaf)).collect();
    let name = |at: &usize| hosts.get(*at).map(|host| host.name.clone());
    match whereabouts(&own, &answers) {
        Whereabouts::Home => Presence::Here,
        Whereabouts::Moved(at) => match hosts.get(at) {
            Some(host) => Presence::Moved { host: host.name.clone(), uri: host.uri.clone() },
            None => Presence::Here,
        },
        Whereabouts::Gone { silent } => Presence::Gone { unasked: silent.iter().filter_map(name).collect() },
        Whereabouts::Unknown { why } => Presence::Unknown { why },
    }
}

/// The known hosts but for one.
fn others(store: &Store, own: &str) -> Vec<Host> {
    let all = store.hosts().unwrap_or_else(|error| {
        tracing::warn!("no other host is asked: {error}");
        Vec::new()
    });
    all.into_iter().filter(|host| host.uri != own).collect()
}

/// By UUID: names may be taken by others.
fn ask(uri: &str, record: &VmRecord) -> Answer {
    match hypervisor::power(uri, &record.id.to_string()) {
        Ok(Power::Off) => Answer::Off,
        Ok(Power::Running | Power::Paused) => Answer::Runs,
        Err(HypervisorError::NoSuchDomain { .. }) => Answer::Missing,
        Err(error) => Answer::Silent(error.to_string()),
    }
}

/// As `ask`. A host that did not answer in time is not asked again.
fn ask_briefly(uri: &str, record: &VmRecord, deaf: &mut Vec<(String, String)>) -> Answer {
    if let Some((_, why)) = deaf.iter().find(|(deaf, _)| deaf == uri) {
        return Answer::Silent(why.clone());
    }
    let (to, about) = (uri.to_owned(), record.clone());
    let answer = limit::within(PATIENCE, uri, "look for VMs", move || ask(&to, &about));
    answer.unwrap_or_else(|_| {
        let why = format!("libvirt at {uri} does not answer within {} s", PATIENCE.as_secs());
        deaf.push((uri.to_owned(), why.clone()));
        Answer::Silent(why)
    })
}
