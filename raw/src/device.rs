//! Calls about descriptors of /dev/fuse that no library offers in a safe form.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use rustix::io::DupFlags;
use rustix::ioctl;

/// `FUSE_DEV_IOC_CLONE` of linux/fuse.h: `_IOR(229, 0, uint32_t)`.
const CLONE: ioctl::Opcode = ioctl::opcode::read::<u32>(229, 0);
/// `FUSE_DEV_IOC_BACKING_CLOSE` of linux/fuse.h: `_IOW(229, 2, uint32_t)`.
const BACKING_CLOSE: ioctl::Opcode = ioctl::opcode::write::<u32>(229, 2);

/// Makes a freshly opened /dev/fuse another queue of the connection of `device`.
pub fn join_connection(fresh: &OwnedFd, device: BorrowedFd<'_>) -> io::Result<()> {
    // A descriptor that is borrowed is not negative.
    let mut number = device.as_raw_fd().unsigned_abs();
    // SAFETY: the kernel reads one u32 through the pointer, which `Updater` makes from a reference that lives through the
    // call, and writes nothing. The number is that of an open descriptor, because it is borrowed.
    unsafe { ioctl::ioctl(fresh, ioctl::Updater::<CLONE, u32>::new(&mut number)) }?;
    Ok(())
}

/// Makes the descriptor `place` another name of `with`: what it named before is closed, its owner goes on using its number.
pub fn replace(place: BorrowedFd<'_>, with: impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, because it is borrowed, and it is never closed through this second owner. It stays
    // open through the call: `dup3` closes and opens the number in one step.
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(place.as_raw_fd()) });
    rustix::io::dup3(with, &mut place, DupFlags::CLOEXEC)?;
    Ok(())
}

/// Gives a file to the connection of `device`, for the kernel to read by itself. The number that the connection knows it by, until
/// [`close_backing`] or its end.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN or where passthrough was not agreed on, `ELOOP` for a file on a stacked file system, `ENOTTY`
/// before Linux 6.9, `EOPNOTSUPP` where it is built without.
pub fn open_backing(device: impl AsFd, file: BorrowedFd<'_>) -> io::Result<u32> {
    BackingId::create_raw(device, file)
}

/// Has the connection of `device` forget a file. Who has it open reads on.
pub fn close_backing(device: impl AsFd, id: u32) -> io::Result<()> {
    // SAFETY: the kernel reads one u32 through the pointer, which `Setter` makes from its own copy, and writes nothing.
    unsafe { ioctl::ioctl(device, ioctl::Setter::<BACKING_CLOSE, u32>::new(id)) }?;
    Ok(())
}

/// Answers an open: the kernel reads the file that its connection knows by this number.
pub fn answer_with_backing(reply: ReplyOpen, handle: FileHandle, flags: FopenFlags, id: u32) {
    // SAFETY: what is asked for is that the number is one of this connection while `backing` lives, because fuser closes it then.
    // It is not closed here; and where the connection has no such file the kernel fails the open, and touches no memory.
    let backing = unsafe { reply.wrap_backing(id) };
    reply.opened_passthrough(handle, flags, &backing);
    let _ = backing.into_raw();
}
