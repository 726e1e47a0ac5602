//! Serves a tree, and takes mounts away.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};
use rustix::mount::UnmountFlags;

use crate::adapter::Adapter;
use crate::link::Link;
use crate::{Device, Holder, Ino, MountConfig, MountError, OpenFiles, ToKeeper, ToServer, Tree, mount_at};

/// A mounted tree, ready to be served.
pub struct Server {
    session: Session<Adapter>,
    files: Arc<OpenFiles>,
    /// Without a keeper, this process holds the mount.
    device: Option<Device>,
}

/// Takes a mount away, from any thread.
#[derive(Debug, Clone)]
pub struct Stopper {
    mount_point: PathBuf,
    device: Option<String>,
}

impl Server {
    /// Mounts a tree at a folder, given by its absolute path without links, and serves it with `threads`, at least one. The mount
    /// ends with this process.
    pub fn mount(
        tree: Arc<dyn Tree>,
        mount_point: &Path,
        config: &MountConfig,
        threads: usize,
    ) -> Result<Self, MountError> {
        let mut device = Device::mount(mount_point, config)?;
        let files = Arc::new(OpenFiles::default());
        let serving = (|| {
            let queue = device.queue()?;
            let adapter = Adapter::new(tree, files.clone(), threads, queue.as_fd())?;
            let (session, answer) = shake_hands(adapter, device.greeting(), &queue, config.allow_other)?;
            device.answer(&answer)?;
            Ok(session)
        })();
        match serving {
            Ok(session) => Ok(Self { session, files, device: Some(device) }),
            Err(source) => {
                let _ = device.stopper().detach();
                Err(MountError::Failed { mount_point: mount_point.into(), source })
            }
        }
    }

    /// Serves a mount that a keeper holds, in place of the server before, if there was one.
    pub fn take_over(
        tree: Arc<dyn Tree>,
        keeper: Arc<Link>,
        allow_other: bool,
        threads: usize,
    ) -> io::Result<Self> {
        let files = Arc::new(OpenFiles::told_to(keeper.clone()));
        let mut greeting = None;
        loop {
            match keeper.receive()? {
                Some((ToServer::Greeting { request }, Some(queue))) => greeting = Some((request, queue)),
                Some((ToServer::Handle { handle, ino, pid, backing }, _)) => {
                    let ino = Ino(ino);
                    let holder = Holder { pid, ino };
                    match tree.open(ino) {
                        Ok(file) => files.add(handle, file, holder, backing),
                        Err(error) => {
                            tracing::error!("a file that was open cannot be opened again now: {error}");
                            files.miss(handle, holder, backing);
                        }
                    }
                }
                Some((ToServer::Go, _)) => break,
                // None was asked for yet.
                Some((ToServer::Backed { .. }, _)) => {}
                Some((ToServer::Ping, _)) => keeper.send(&ToKeeper::Pong, None)?,
                Some((ToServer::Greeting { .. }, None)) => return Err(io::Error::other("there is no queue")),
                None => return Err(io::Error::other("the keeper of the mount is gone")),
            }
        }
        let (request, queue) = greeting.ok_or_else(|| io::Error::other("there is no greeting"))?;
        let adapter = Adapter::new(tree, files.clone(), threads, queue.as_fd())?;
        let (session, answer) = shake_hands(adapter, &request, &queue, allow_other)?;
        keeper.send(&ToKeeper::Answer { answer }, None)?;
        Ok(Self { session, files, device: None })
    }

    /// The files that are open.
    pub fn open_files(&self) -> Arc<OpenFiles> {
        self.files.clone()
    }

    /// What takes the mount away, where this process holds it.
    pub fn stopper(&self) -> Option<Stopper> {
        self.device.as_ref().map(Device::stopper)
    }

    /// Serves until the mount is taken away and the last open file is closed.
    pub fn run(self) -> io::Result<()> {
        match self.session.run() {
            // What the last threads may see of an unmount, or `echo 1 > /sys/fs/fuse/connections/…/abort`.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
            other => other,
        }
    }
}

/// A session that reads from `queue`, and its answer to the greeting. fuser insists on reading the greeting itself, which
/// the kernel sends once: so it gets it from a pair of sockets, and then the queue in place of its end of them.
fn shake_hands(
    adapter: Adapter,
    greeting: &[u8],
    queue: &OwnedFd,
    allow_other: bool,
) -> io::Result<(Session<Adapter>, Vec<u8>)> {
    let (ours, theirs) = Link::pair()?;
    ours.send_bytes(greeting, None)?;
    let acl = if allow_other { SessionACL::All } else { SessionACL::Owner };
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(adapter.takers());
    let session = Session::from_fd(adapter, theirs.into_fd(), acl, config)?;
    let (answer, _) = ours.receive_bytes()?;
    knib_raw::device::replace(session.as_fd(), queue)?;
    Ok((session, answer))
}

impl Stopper {
    /// Of what is mounted there now.
    pub fn of(mount_point: &Path) -> Self {
        let device = mount_at(mount_point).ok().flatten().map(|m| m.device);
        Self { mount_point: mount_point.into(), device }
    }

    /// Device number of the mount, `major:minor`.
    pub(crate) fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Takes the mount away if it still is ours. Files that are open stay readable for as long as the server runs.
    pub fn detach(&self) -> io::Result<()> {
        match mount_at(&self.mount_point)? {
            Some(found) if Some(&found.device) == self.device.as_ref() => unmount(&self.mount_point),
            _ => Ok(()),
        }
    }
}

/// Takes away what is mounted at `path`, at once; files that are open stay so until they are closed.
pub fn unmount(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            let output = Command::new("fusermount3").args(["-u", "-z", "--"]).arg(path).output()?;
            if output.status.success() {
                return Ok(());
            }
            Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}
