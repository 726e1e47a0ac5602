//! Mounts a tree, serves it, takes it away again.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::adapter::Adapter;
use crate::{OpenFiles, Tree, mount_at};

/// How a tree is mounted.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// Threads that answer requests; at least one.
    pub threads: usize,
    /// Users other than the one that mounts may enter; the modes of the nodes say what they may do.
    pub allow_other: bool,
    /// What `mount` shows as source and, behind `fuse.`, as type. Letters, digits and dashes.
    pub name: String,
}

/// Why a tree could not be mounted, with the way out.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE.
    #[error(
        "there is no /dev/fuse: load the kernel's module with `modprobe fuse`, or give it to this container"
    )]
    NoDevice,
    /// This process may not.
    #[error(
        "no permission to {doing}: run as root, or have the administrator install fuse3 and let users open /dev/fuse (mode 666)"
    )]
    Denied {
        /// What was being done.
        doing: String,
    },
    /// `--allow-other` by a user.
    #[error(
        "only root may let other users in: add the line `user_allow_other` to /etc/fuse.conf, or mount without --allow-other"
    )]
    NoAllowOther,
    /// fusermount3 is missing.
    #[error("users other than root mount through fusermount3, which is not there: install the package fuse3")]
    NoFusermount,
    /// Anything else.
    #[error("cannot mount at {}: {source}", mount_point.display())]
    Failed {
        /// Where.
        mount_point: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A mounted tree, ready to be served.
pub struct Server {
    session: Session<Adapter>,
    files: Arc<OpenFiles>,
    stopper: Stopper,
}

/// Takes a mount away, from any thread.
#[derive(Debug, Clone)]
pub struct Stopper {
    mount_point: PathBuf,
    device: Option<String>,
}

/// Readahead of the kernel: large replies, and several at a time, which cores decode at once. KiB.
const READ_AHEAD: &str = "4096";

impl Server {
    /// Mounts a tree at a folder, given by its absolute path without links.
    pub fn mount(tree: Arc<dyn Tree>, mount_point: &Path, config: &MountConfig) -> Result<Self, MountError> {
        let files = Arc::new(OpenFiles::default());
        let adapter = Adapter::new(tree, files.clone());
        let mut session = Config::default();
        session.n_threads = Some(config.threads.max(1));
        session.clone_fd = true;
        session.acl = if config.allow_other { SessionACL::All } else { SessionACL::Owner };
        let session = if rustix::process::geteuid().is_root() {
            mount_as_root(adapter, mount_point, config, session)?
        } else {
            mount_as_user(adapter, mount_point, config, session)?
        };
        let device = mount_at(mount_point).ok().flatten().map(|m| m.device);
        if let Some(device) = &device {
            // Only root may; without it reads are smaller and all else is the same.
            let _ = std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD);
        }
        Ok(Self { session, files, stopper: Stopper { mount_point: mount_point.into(), device } })
    }

    /// The files that are open.
    pub fn open_files(&self) -> Arc<OpenFiles> {
        self.files.clone()
    }

    /// What takes the mount away.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
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

impl Stopper {
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

/// fuser's own way through mount(2) has faults (a comma in the name adds options; unmounting by root fails), so root
/// mounts here.
fn mount_as_root(
    adapter: Adapter,
    mount_point: &Path,
    config: &MountConfig,
    session: Config,
) -> Result<Session<Adapter>, MountError> {
    let failed = |source| MountError::Failed { mount_point: mount_point.into(), source };
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => MountError::NoDevice,
        io::ErrorKind::PermissionDenied => MountError::Denied { doing: "open /dev/fuse".into() },
        _ => failed(e),
    })?;
    let device = OwnedFd::from(device);
    let mut options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if config.allow_other {
        options.push_str(",allow_other");
    }
    let options = CString::new(options).map_err(|e| failed(e.into()))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let fs_type = format!("fuse.{}", config.name);
    rustix::mount::mount(config.name.as_str(), mount_point, fs_type.as_str(), flags, options.as_c_str())
        .map_err(|e| match e {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                MountError::Denied { doing: "mount (CAP_SYS_ADMIN is missing)".into() }
            }
            rustix::io::Errno::NODEV => MountError::NoDevice,
            _ => failed(e.into()),
        })?;
    let acl = session.acl;
    Session::from_fd(adapter, device, acl, session).map_err(|e| {
        let _ = unmount(mount_point);
        failed(e)
    })
}

fn mount_as_user(
    adapter: Adapter,
    mount_point: &Path,
    config: &MountConfig,
    mut session: Config,
) -> Result<Session<Adapter>, MountError> {
    session.mount_options = vec![
        MountOption::FSName(config.name.clone()),
        MountOption::Subtype(config.name.clone()),
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::DefaultPermissions,
    ];
    Session::new(adapter, mount_point, &session).map_err(|source| {
        let text = source.to_string();
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map(drop);
        let device = device.map_err(|e| e.kind());
        if device == Err(io::ErrorKind::NotFound) {
            MountError::NoDevice
        } else if device == Err(io::ErrorKind::PermissionDenied) {
            MountError::Denied { doing: "open /dev/fuse".into() }
        } else if text.contains("user_allow_other") {
            MountError::NoAllowOther
        } else if source.kind() == io::ErrorKind::NotFound {
            MountError::NoFusermount
        } else if source.kind() == io::ErrorKind::PermissionDenied {
            MountError::Denied { doing: format!("mount ({})", text.trim()) }
        } else {
            MountError::Failed { mount_point: mount_point.into(), source }
        }
    })
}
