//! The kernel's end of a mount.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::MountFlags;

use crate::link::Link;
use crate::mount::Stopper;
use crate::unmount;

/// How a tree is mounted.
#[derive(Debug, Clone)]
pub struct MountConfig {
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

/// Readahead of the kernel: large replies, and several at a time, which cores decode at once. KiB.
const READ_AHEAD: &str = "4096";
/// The kernel wants room for the longest request that there can be, also for a short one. Bytes.
const REQUEST: usize = 1 << 20;
/// Where the second word of flags stands in a FUSE_INIT request (`struct fuse_in_header`, `struct fuse_init_in`), and in it
/// FUSE_HAS_RESEND.
const FLAGS2: usize = 40 + 16;
const HAS_RESEND: u32 = 1 << (39 - 32);
/// FUSE_NOTIFY_RESEND.
const RESEND: i32 = 7;

/// A mount as the kernel sees it. It lives for as long as someone holds this, or a queue of it.
///
/// Servers do not read requests from here but from a queue of their own: what a dead server had taken from it is answered
/// with an error when the last copy of the queue is closed, and is handed out again by [`Device::resend`] while one is open.
#[derive(Debug)]
pub struct Device {
    device: File,
    greeting: Vec<u8>,
    answered: bool,
    stopper: Stopper,
}

impl Device {
    /// Mounts at a folder, given by its absolute path without links.
    pub fn mount(mount_point: &Path, config: &MountConfig) -> Result<Self, MountError> {
        let mut device = if rustix::process::geteuid().is_root() {
            mount_as_root(mount_point, config)?
        } else {
            mount_as_user(mount_point, config)?
        };
        let stopper = Stopper::of(mount_point);
        let mut greeting = vec![0; REQUEST];
        match device.read(&mut greeting) {
            Ok(size) => greeting.truncate(size),
            Err(source) => {
                let _ = stopper.detach();
                return Err(MountError::Failed { mount_point: mount_point.into(), source });
            }
        }
        Ok(Self { device, greeting, answered: false, stopper })
    }

    /// What takes the mount away.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The kernel's first request, FUSE_INIT.
    pub fn greeting(&self) -> &[u8] {
        &self.greeting
    }

    /// Whether the kernel can hand requests out again: Linux 6.9 and later.
    pub fn can_resend(&self) -> bool {
        let flags = self.greeting.get(FLAGS2..FLAGS2 + 4).and_then(|b| b.try_into().ok());
        flags.is_some_and(|b| u32::from_ne_bytes(b) & HAS_RESEND != 0)
    }

    /// A queue for a server to read requests from.
    pub fn queue(&self) -> io::Result<OwnedFd> {
        let fresh = OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/fuse")?);
        knib_raw::device::join_connection(&fresh, self.device.as_fd())?;
        Ok(fresh)
    }

    /// Answers the greeting, the first time that this is called: the kernel takes one answer.
    pub fn answer(&mut self, answer: &[u8]) -> io::Result<()> {
        if self.answered {
            return Ok(());
        }
        self.device.write_all(answer)?;
        self.answered = true;
        if let Some(number) = self.stopper.device() {
            // Only root may; without it reads are smaller and all else is the same.
            let _ = std::fs::write(format!("/sys/class/bdi/{number}/read_ahead_kb"), READ_AHEAD);
        }
        Ok(())
    }

    /// Has the kernel hand out again what was taken from any queue that is open and not answered.
    pub fn resend(&mut self) -> io::Result<()> {
        // struct fuse_out_header: length, code in place of the error, and 0 where a reply has its request's number.
        let mut notice = Vec::with_capacity(16);
        notice.extend_from_slice(&16u32.to_ne_bytes());
        notice.extend_from_slice(&RESEND.to_ne_bytes());
        notice.extend_from_slice(&0u64.to_ne_bytes());
        self.device.write_all(&notice)
    }

    /// Gives the kernel a file to read by itself; the number that it knows it by.
    pub fn open_backing(&self, file: BorrowedFd<'_>) -> io::Result<u32> {
        knib_raw::device::open_backing(&self.device, file)
    }

    /// Has the kernel forget one. Open files that it is read for stay open.
    pub fn close_backing(&self, id: u32) -> io::Result<()> {
        knib_raw::device::close_backing(&self.device, id)
    }

    /// Whether the mount is gone, and the last open file of it.
    pub fn has_ended(&self) -> bool {
        let mut found = [PollFd::new(&self.device, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut found, Some(&now)).is_ok_and(|n| n > 0) && found[0].revents().contains(PollFlags::ERR)
    }
}

/// fuser's own way through mount(2) has faults (a comma in the name adds options; unmounting by root fails), and keeps the
/// descriptor to itself.
fn mount_as_root(mount_point: &Path, config: &MountConfig) -> Result<File, MountError> {
    let failed = |source| MountError::Failed { mount_point: mount_point.into(), source };
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => MountError::NoDevice,
        io::ErrorKind::PermissionDenied => MountError::Denied { doing: "open /dev/fuse".into() },
        _ => failed(e),
    })?;
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
    Ok(device)
}

/// fusermount3 mounts and sends the descriptor through a socket, whose number the environment names.
fn mount_as_user(mount_point: &Path, config: &MountConfig) -> Result<File, MountError> {
    let failed = |source| MountError::Failed { mount_point: mount_point.into(), source };
    // It would say so itself, less clearly.
    match OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| e.kind()) {
        Err(io::ErrorKind::NotFound) => return Err(MountError::NoDevice),
        Err(io::ErrorKind::PermissionDenied) => {
            return Err(MountError::Denied { doing: "open /dev/fuse".into() });
        }
        _ => {}
    }
    let (ours, theirs) = Link::pair().map_err(failed)?;
    let mut options = format!(
        "fsname={name},subtype={name},ro,nosuid,nodev,noexec,default_permissions",
        name = config.name
    );
    if config.allow_other {
        options.push_str(",allow_other");
    }
    let mut command = Command::new("fusermount3");
    command.args(["-o", &options, "--"]).arg(mount_point);
    command.env("_FUSE_COMMFD", "0").stdin(theirs.into_fd()).stdout(Stdio::null());
    let output = command.output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => MountError::NoFusermount,
        _ => failed(e),
    })?;
    drop(command);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(if said.contains("user_allow_other") {
            MountError::NoAllowOther
        } else {
            MountError::Denied { doing: format!("mount ({})", said.trim().replace('\n', "; ")) }
        });
    }
    match ours.receive_bytes() {
        Ok((_, Some(device))) => Ok(device.into()),
        Ok((_, None)) => {
            let _ = unmount(mount_point);
            Err(failed(io::Error::other("fusermount3 sent no descriptor")))
        }
        Err(error) => Err(failed(error)),
    }
}
