//! Two calls about descriptors of /dev/fuse that no library offers in a safe form.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::io::DupFlags;
use rustix::ioctl;

/// `FUSE_DEV_IOC_CLONE` of linux/fuse.h: `_IOR(229, 0, uint32_t)`.
const CLONE: ioctl::Opcode = ioctl::opcode::read::<u32>(229, 0);

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
