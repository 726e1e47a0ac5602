//! A libvirt domain, running, paused or off.
//!
//! Every call opens its own connection, so a libvirt that was restarted in between is no trouble, and calls from several
//! threads do not wait for each other.

mod commit;
pub(crate) mod define;
mod inspect;
mod persistent;
mod pull;
mod snapshot;
mod users;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::agent::Agent;
use super::{
    DiskPlace, ErrorPolicy, Guest, Hypervisor, HypervisorError, ImageRef, ImageUser, Images, JobControl,
    NewOverlay, Pulled, Quiesce, Result, Snapshot, limit,
};

/// How long a thaw is tried after knibfs died.
const CRASH_THAW: Duration = Duration::from_secs(300);

/// A domain of a host's libvirt.
#[derive(Clone)]
pub struct LibvirtDomain {
    uri: String,
    uuid: Uuid,
    images: Arc<dyn Images>,
    /// This program, for the helper that thaws.
    program: Option<PathBuf>,
}

impl LibvirtDomain {
    /// Finds a domain by its name or UUID at a libvirt URI (`qemu:///system`). `images` is the engine that works on its
    /// images while it is off.
    ///
    /// # Errors
    /// [`HypervisorError::Unreachable`], [`HypervisorError::NoSuchDomain`].
    pub fn open(uri: &str, domain: &str, images: Arc<dyn Images>) -> Result<Self> {
        let session = Session::open(uri, domain)?;
        Ok(Self { uri: uri.to_owned(), uuid: session.uuid, images, program: None })
    }

    /// Names the knibfs program, for the helper that thaws; without it, the running program is it.
    #[must_use]
    pub fn with_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// The libvirt URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn session(&self) -> Result<Session> {
        Session::open(&self.uri, &self.uuid.to_string())
    }
}

impl std::fmt::Debug for LibvirtDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LibvirtDomain")
            .field("uri", &self.uri)
            .field("uuid", &self.uuid)
            .finish_non_exhaustive()
    }
}

impl Hypervisor for LibvirtDomain {
    fn inspect(&self) -> Result<Guest> {
        inspect::inspect(&self.session()?)
    }

    fn snapshot(&self, overlays: &[NewOverlay], quiesce: Quiesce) -> Result<Snapshot> {
        snapshot::snapshot(self, &self.session()?, overlays, quiesce)
    }

    fn commit(
        &self,
        target: &str,
        top: &Path,
        base: &Path,
        control: &JobControl<'_>,
    ) -> Result<Vec<ImageRef>> {
        commit::commit(self, &self.session()?, target, top, base, control)
    }

    fn users_of(&self, path: &Path) -> Result<Vec<ImageUser>> {
        users::users_of(&self.session()?, path)
    }

    fn place(&self, disks: &[DiskPlace]) -> Result<()> {
        define::place(&self.session()?, disks)
    }

    fn attach(&self, disk: &DiskPlace) -> Result<()> {
        define::attach(&self.session()?, disk)
    }

    fn start(&self) -> Result<()> {
        define::start(&self.session()?)
    }

    fn pull(&self, target: &str, foreign: &Path, control: &JobControl<'_>) -> Result<Pulled> {
        pull::pull(self, &self.session()?, target, foreign, control)
    }

    fn flush(&self, path: &Path) -> Result<()> {
        pull::flush(&self.session()?, path)
    }

    fn resume(&self) -> Result<()> {
        pull::resume(&self.session()?)
    }

    fn resume_after_error(&self) -> Result<bool> {
        pull::resume_after_error(&self.session()?)
    }

    fn set_error_policy(&self, target: &str, policy: &ErrorPolicy) -> Result<()> {
        define::set_error_policy(&self.session()?, target, policy)
    }

    fn reopen(&self) -> Result<()> {
        define::reopen(&self.session()?)
    }

    fn copy_to(&self, uri: &str) -> Result<Arc<dyn Hypervisor>> {
        Ok(Arc::new(define::copy_to(self, &self.session()?, uri)?))
    }

    fn undefine(&self) -> Result<()> {
        define::undefine(&self.session()?)
    }

    fn agent_ping(&self, limit: Duration) -> Result<()> {
        let session = self.session()?;
        let guest = inspect::inspect(&session)?;
        snapshot::agent_can_answer(&guest)?;
        session.agent().ping(limit)
    }
}

/// A connection and the domain on it. Each call is bounded: see [`limit`].
struct Session {
    uri: String,
    link: Arc<Link>,
    /// After `link`: fields are dropped in this order.
    closing: Closing,
    uuid: Uuid,
    name: String,
}

/// Tells when the connection is closed. The program must not end in the middle of that: libvirt's library would clean up
/// beside it.
#[derive(Default)]
struct Closing(Option<(Sender<()>, Receiver<()>)>);

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some((held, closed)) = self.0.take() {
            drop(held);
            let _ = closed.recv_timeout(limit::of_a_connection());
        }
    }
}

/// A connection. All are made here, for libvirt's library is loaded first.
fn open(uri: &str) -> Result<Connect> {
    knib_raw::libvirt::load()
        .map_err(|why| HypervisorError::NoLibrary { uri: uri.to_owned(), why: why.to_owned() })?;
    // The library prints every error; here they are returned.
    virt::error::clear_error_callback();
    Connect::open(Some(uri)).map_err(|e| define::unreachable(uri, &e))
}

struct Link {
    connect: Connect,
    domain: Domain,
}

impl Session {
    /// By UUID where `key` is one that is known, else by name.
    fn open(uri: &str, key: &str) -> Result<Self> {
        let (at, key) = (uri.to_owned(), key.to_owned());
        limit::within(limit::of_a_connection(), uri, "connect", move || Self::connect(at, &key))?
    }

    fn connect(uri: String, key: &str) -> Result<Self> {
        let unreachable = |e: Error| define::unreachable(&uri, &e);
        let connect = open(&uri)?;
        let by_uuid = Uuid::parse_str(key).ok().map(|uuid| connect.lookup_domain_by_uuid(uuid));
        let found = match by_uuid {
            Some(Ok(domain)) => Ok(domain),
            _ => connect.lookup_domain_by_name(key),
        };
        let domain = found.map_err(|e| {
            if e.code().is(ErrorNumber::NoDomain) {
                HypervisorError::NoSuchDomain { uri: uri.clone(), domain: key.to_owned() }
            } else {
                unreachable(e)
            }
        })?;
        let name = domain.name().map_err(unreachable)?;
        let uuid = domain.uuid().map_err(unreachable)?;
        Ok(Self { uri, link: Arc::new(Link { connect, domain }), closing: Closing::default(), uuid, name })
    }

    fn agent(&self) -> Agent {
        Agent { uri: self.uri.clone(), domain: self.link.domain.clone(), name: self.name.clone() }
    }

    /// Asks libvirt for something; `doing` follows "cannot" and precedes "of domain".
    fn ask<T: Send + 'static>(
        &self,
        doing: &str,
        call: impl FnOnce(&Domain) -> std::result::Result<T, Error> + Send + 'static,
    ) -> Result<T> {
        self.call(doing, call)?.map_err(self.refused(doing))
    }

    /// Asks libvirt for something; what it answers, an error too.
    fn call<T: Send + 'static>(
        &self,
        doing: &str,
        call: impl FnOnce(&Domain) -> std::result::Result<T, Error> + Send + 'static,
    ) -> Result<std::result::Result<T, Error>> {
        let domain = self.link.domain.clone();
        limit::within(limit::of_a_call(), &self.uri, doing, move || call(&domain))
    }

    /// Asks the host for something that is not about the domain alone.
    fn ask_host<T: Send + 'static>(
        &self,
        doing: &str,
        call: impl FnOnce(&Connect) -> std::result::Result<T, Error> + Send + 'static,
    ) -> Result<std::result::Result<T, Error>> {
        let connect = self.link.connect.clone();
        limit::within(limit::of_a_call(), &self.uri, doing, move || call(&connect))
    }

    /// Replaces the definition of the next run.
    fn define(&self, doing: &str, text: &str) -> Result<()> {
        let text = text.to_owned();
        let defined = self.ask_host(doing, move |connect| connect.define_domain_xml(&text).map(drop))?;
        defined.map_err(self.refused(doing))
    }

    /// libvirt refused something; `doing` follows "cannot" and precedes "of domain".
    fn refused(&self, doing: &str) -> impl Fn(Error) -> HypervisorError {
        let (uri, domain, doing) = (self.uri.clone(), self.name.clone(), doing.to_owned());
        let connect = self.link.connect.clone();
        move |e| {
            let lost = vec![ErrorNumber::Rpc, ErrorNumber::NoConnect, ErrorNumber::InvalidConn];
            // A daemon that ends in the middle is told as any system error.
            if e.code().is_any(lost) || !connect.is_alive().unwrap_or(false) {
                return HypervisorError::Unreachable {
                    uri: uri.clone(),
                    why: e.message().into(),
                    changing: false,
                };
            }
            let why = e.message().to_owned();
            HypervisorError::Libvirt { doing: doing.clone(), domain: domain.clone(), why }
        }
    }
}

impl Drop for Session {
    /// The last one to let go of a connection closes it, which asks libvirt too, so this is bounded as well.
    fn drop(&mut self) {
        let link = self.link.clone();
        let ((held, let_go), (say, closed)) = (channel(), channel());
        let spawned = std::thread::Builder::new().spawn(move || {
            // Until this session has let go.
            let _ = let_go.recv();
            drop(link);
            let _ = say.send(());
        });
        self.closing = Closing(spawned.is_ok().then_some((held, closed)));
    }
}

/// Whether the domain runs.
pub(crate) fn power(uri: &str, domain: &str) -> Result<super::Power> {
    inspect::power(&Session::open(uri, domain)?)
}

/// Whether the domain can be reached.
pub(super) fn reach(uri: &str, domain: &str) -> Result<()> {
    Session::open(uri, domain).map(drop)
}

/// Thaws the domain, however long libvirt needs to come back.
pub(super) fn thaw_after_crash(uri: &str, domain: &str) -> Result<()> {
    let end = std::time::Instant::now() + CRASH_THAW;
    loop {
        let tried = Session::open(uri, domain).and_then(|session| {
            session.agent().thaw(Duration::from_secs(20)).map_err(|why| HypervisorError::Freeze {
                domain: session.name.clone(),
                why,
                thawed: false,
            })
        });
        match tried {
            Ok(_) => return Ok(()),
            // A domain that is gone is not frozen.
            Err(HypervisorError::NoSuchDomain { .. }) => return Ok(()),
            Err(e) if std::time::Instant::now() >= end => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_secs(1)),
        }
    }
}
