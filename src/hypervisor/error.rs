//! What can go wrong with a VM, said so that a person knows what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Result of a call to a hypervisor.
pub type Result<T> = std::result::Result<T, HypervisorError>;

fn unasked(silent: &[String]) -> String {
    if silent.is_empty() {
        return String::new();
    }
    format!(" that answers (no answer: {})", silent.join(", "))
}

/// What was being done, with what, what went wrong, what to do.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// libvirt does not answer.
    #[error("cannot reach libvirt at {uri}: {why}; {}", if *changing { "look with `virsh domblklist` whether the change was made, then run `knibfs recover`" } else { "start it (`systemctl start libvirtd` or virtqemud) and see that you may use it, or name another host with --uri" })]
    Unreachable {
        /// The host.
        uri: String,
        /// What libvirt's library says.
        why: String,
        /// The connection was lost in the middle of a change.
        changing: bool,
    },
    /// libvirt's library cannot be loaded: it is not installed, or too old.
    #[error(
        "cannot reach libvirt at {uri}: its library cannot be loaded: {why}; install it (`apt install libvirt0`, `dnf install libvirt-libs`)"
    )]
    NoLibrary {
        /// The host.
        uri: String,
        /// What the loader says.
        why: String,
    },
    /// libvirt takes calls and does not answer them.
    #[error(
        "cannot {doing}: the libvirt at {uri} hangs ({why}); see whether `virsh -c {uri} list` answers, restart it (`systemctl restart libvirtd` or virtqemud) if not, and run `knibfs recover` then; the setting knib.timeout says how long it may take"
    )]
    Silent {
        /// The host.
        uri: String,
        /// What, as it follows "cannot".
        doing: String,
        /// How long nothing came.
        why: String,
    },
    /// No such domain.
    #[error("there is no domain \"{domain}\" at {uri}; `virsh -c {uri} list --all` shows what there is")]
    NoSuchDomain {
        /// The host.
        uri: String,
        /// Name or UUID as given.
        domain: String,
    },
    /// No host that is known has the domain any more.
    #[error(
        "the domain of {vm} (UUID {uuid}) is gone: {uri} has it no longer, nor has any other host of `knibfs host list`{}; name the host that it moved to with `knibfs host add`, or take it out of knibfs's care with `knibfs vm remove {vm}`, which keeps its backups",
        unasked(silent)
    )]
    Gone {
        /// The VM.
        vm: String,
        /// The domain's UUID.
        uuid: String,
        /// The host where it was.
        uri: String,
        /// Hosts that could not be asked.
        silent: Vec<String>,
    },
    /// No such volume.
    #[error("{vm} has no disk \"{target}\" that can be backed up; it has {there}")]
    NoSuchVolume {
        /// The VM.
        vm: String,
        /// The disk as given.
        target: String,
        /// The disks that it has.
        there: String,
    },
    /// Something that libvirt refused.
    #[error("cannot {doing} of domain \"{domain}\": {why}")]
    Libvirt {
        /// What, as it follows "cannot", with an object: "take a snapshot".
        doing: String,
        /// The domain.
        domain: String,
        /// libvirt's words.
        why: String,
    },
    /// The definition makes no sense.
    #[error("cannot read the definition of domain \"{domain}\": {why}")]
    BadDefinition {
        /// The domain.
        domain: String,
        /// What is wrong.
        why: String,
    },
    /// The definition could not be made to name what is on disk.
    #[error(
        "disk {target} of domain \"{domain}\" now is {}, but its definition could not be changed to say so: {why}; change the disk's source with `virsh edit {domain}` before it is started again", path.display()
    )]
    Definition {
        /// The domain.
        domain: String,
        /// The disk.
        target: String,
        /// The image that is right.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The VM is in a state in which this must not be done.
    #[error("{what}; nothing was changed")]
    NotNow {
        /// Who, why, and what to do.
        what: String,
    },
    /// The guest agent does not answer.
    #[error(
        "the guest agent of domain \"{domain}\" does not answer: {why}; install and start qemu-guest-agent in the guest and give the domain the channel org.qemu.guest_agent.0, or leave out --quiesce; nothing was changed"
    )]
    AgentMissing {
        /// The domain.
        domain: String,
        /// What is missing.
        why: String,
    },
    /// The guest did not freeze its file systems.
    #[error(
        "the guest of domain \"{domain}\" did not freeze its file systems: {why}; {}; look at the guest agent's log and its freeze hooks, or leave out --quiesce; no snapshot was taken",
        if *thawed { "it is thawed" } else { "IT MAY STILL BE FROZEN: run `virsh domfsthaw` on it" }
    )]
    Freeze {
        /// The domain.
        domain: String,
        /// The agent's words, or that time was up.
        why: String,
        /// The guest confirmed that nothing is frozen.
        thawed: bool,
    },
    /// The helper that thaws the guest should knibfs die could not be started.
    #[error(
        "cannot start the helper that thaws the guest should knibfs be killed: {why}; nothing was changed"
    )]
    ThawGuard {
        /// Why not.
        why: String,
    },
    /// The chain is not what the caller thinks.
    #[error(
        "disk {target} of {vm} does not stand on {} above {}: its chain is {chain}; it was changed by something else, nothing was merged",
        top.display(), base.display()
    )]
    NotInChain {
        /// The VM.
        vm: String,
        /// The disk.
        target: String,
        /// What was to be merged.
        top: PathBuf,
        /// Into what.
        base: PathBuf,
        /// The chain as it is.
        chain: String,
    },
    /// The base is used by others: merging into it would change their data.
    #[error("{} cannot be merged into: {user} stands on it too; nothing was changed", base.display())]
    Shared {
        /// The image.
        base: PathBuf,
        /// Who.
        user: String,
    },
    /// Another job runs on the disk.
    #[error(
        "disk {target} of domain \"{domain}\" has a job running ({job}); wait for it, or end it with `virsh blockjob {domain} {target} --abort`; nothing was changed"
    )]
    JobRunning {
        /// The domain.
        domain: String,
        /// The disk.
        target: String,
        /// libvirt's name of it.
        job: String,
    },
    /// A merge ended without its work done.
    #[error("merging {} of domain \"{domain}\" failed: {why}; its disk {target} is as it was", top.display())]
    JobFailed {
        /// The domain.
        domain: String,
        /// The disk.
        target: String,
        /// What was to be merged.
        top: PathBuf,
        /// Why.
        why: String,
    },
    /// Data was not pulled to its end. The guest sees the same data as before.
    #[error(
        "pulling the data of disk {target} of domain \"{domain}\" failed: {why}; `knibfs recover` goes on with it"
    )]
    PullFailed {
        /// The domain.
        domain: String,
        /// The disk.
        target: String,
        /// Why.
        why: String,
    },
    /// Stopped because the caller asked.
    #[error("stopped as asked; disk {target} is as it was")]
    Cancelled {
        /// The disk.
        target: String,
    },
    /// An image's header makes no sense or asks for what is not supported.
    #[error("cannot use {} as a backing chain: {what}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// What is wrong, what to do.
        what: String,
    },
    /// An image is used by someone else.
    #[error("{} is in use: {who}; stop what uses it first; nothing was changed", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
        /// What tells so.
        who: String,
    },
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What, as it follows "cannot".
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The image engine refused.
    #[error("cannot {doing} {}: {why}", path.display())]
    Engine {
        /// What, as it follows "cannot".
        doing: &'static str,
        /// The image.
        path: PathBuf,
        /// The engine's words.
        why: String,
    },
    /// This kind of VM cannot do that.
    #[error("{what}")]
    Unsupported {
        /// What cannot be done, why, and what to do instead.
        what: String,
    },
    /// The tool that steers block jobs is missing.
    #[error("cannot run virsh: {why}; install libvirt's client programs (package libvirt-clients)")]
    NoVirsh {
        /// Why not.
        why: io::Error,
    },
    /// Something took longer than it may.
    #[error("{what} took longer than {} s", limit.as_secs())]
    TimedOut {
        /// What.
        what: String,
        /// The bound.
        limit: Duration,
    },
}

impl HypervisorError {
    pub(super) fn no_domain() -> Self {
        Self::Unsupported { what: "plain disk files have no domain that could do that".into() }
    }

    pub(super) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| HypervisorError::Io { doing, path, source }
    }
}
