//! Who may read what is mounted.

use std::fs;

/// Owner, group and permission bits of everything in the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits of files; folders may be entered by whoever may read. Never writable.
    pub mode: u16,
}

impl Access {
    /// Only whoever mounts.
    pub fn only_me() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mode: 0o400,
        }
    }

    /// Bits of a file.
    pub fn file_mode(&self) -> u16 {
        self.mode & 0o444
    }

    /// Bits of a folder.
    pub fn folder_mode(&self) -> u16 {
        let read = self.file_mode();
        read | (read >> 2)
    }

    /// Bits of a folder with secrets: only its owner's.
    pub fn secret_folder_mode(&self) -> u16 {
        0o700
    }

    /// Bits of a file with secrets: only its owner's.
    pub fn secret_mode(&self) -> u16 {
        0o600
    }
}

/// Root, and the group of the user that libvirt runs QEMU as; none when there is no such user.
pub fn hypervisor_access() -> Option<Access> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let gid = ["libvirt-qemu", "qemu"].into_iter().find_map(|name| group_of(&users, name))?;
    Some(Access { uid: 0, gid, mode: 0o440 })
}

/// passwd(5): `name:password:uid:gid:…`.
fn group_of(users: &str, name: &str) -> Option<u32> {
    let mut fields = users
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?;
    fields.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_can_be_entered_by_those_who_may_read_and_nothing_can_be_written() {
        for (mode, file, folder) in [(0o400, 0o400, 0o500), (0o440, 0o440, 0o550), (0o777, 0o444, 0o555)] {
            let access = Access { uid: 0, gid: 0, mode };
            assert_eq!((access.file_mode(), access.folder_mode()), (file, folder));
        }
    }

    #[test]
    fn qemus_group_is_found() {
        let users = "root:x:0:0::/root:/bin/sh\nqemu2:x:1:1::\nlibvirt-qemu:x:64055:109:Libvirt:/var:/bin/false\nbad\n";
        assert_eq!(group_of(users, "libvirt-qemu"), Some(109));
        assert_eq!(group_of(users, "qemu"), None);
    }
}
