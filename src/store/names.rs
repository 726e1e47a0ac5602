//! Names that become parts of paths. What exists is valid: every constructor checks, deserialisation too.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// Longest VM or disk name in bytes: with a suffix it stays far below every file system's 255.
pub const MAX_NAME: usize = 100;

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{shown}\" cannot be a {what}: {why}")]
pub struct NameError {
    what: &'static str,
    shown: String,
    why: &'static str,
}

impl NameError {
    fn new(what: &'static str, name: &str, why: &'static str) -> Self {
        // Hostile names reach terminals and logs: escaped, and not longer than is useful.
        let shown: String = name.chars().take(120).flat_map(char::escape_debug).collect();
        Self { what, shown, why }
    }
}

/// QEMU and libvirt parse colons and commas in paths; the rest cannot be stored on CIFS or would break a terminal.
fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let refuse = |why| Err(NameError::new(what, name, why));
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > MAX_NAME {
        return refuse("it is longer than 100 bytes");
    }
    if name.chars().any(char::is_control) {
        return refuse("it holds a control character");
    }
    if name.contains(['/', '\\', ':', ',', '=', '"', '*', '?', '<', '>', '|']) {
        return refuse("it holds one of / \\ : , = \" * ? < > |");
    }
    if name.starts_with(['.', '-']) || name.ends_with('.') {
        return refuse("it starts with a dot or a dash, or ends with a dot");
    }
    if name.starts_with(char::is_whitespace) || name.ends_with(char::is_whitespace) {
        return refuse("it starts or ends with white space");
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                $check($what, &name)?;
                Ok(Self(name))
            }

            /// The name as text; safe as one part of a path.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

name!(
    /// Name of a VM in a store: a folder under `vms/`.
    VmName,
    "VM name",
    check
);
name!(
    /// Name of a disk of a VM: the stem of its files in a backup.
    DiskName,
    "disk name",
    check
);
name!(
    /// Name of a VM or volume snapshot.
    SnapshotName,
    "snapshot name",
    check
);
name!(
    /// Name of a backup: its time in UTC, `2026-11-23T22-32-42Z`, with `-2`, `-3`, … when taken.
    BackupName,
    "backup name",
    check_backup
);

const STAMP: &str = "%Y-%m-%dT%H-%M-%SZ";
const STAMP_LEN: usize = "2026-11-23T22-32-42Z".len();

fn check_backup(what: &'static str, name: &str) -> Result<(), NameError> {
    let refuse =
        || NameError::new(what, name, "it is not of the form 2026-11-23T22-32-42Z or 2026-11-23T22-32-42Z-2");
    let (stamp, rest) = name.split_at_checked(STAMP_LEN).ok_or_else(refuse)?;
    let shape = "dddd-dd-ddTdd-dd-ddZ";
    let shaped =
        stamp.bytes().zip(shape.bytes()).all(|(c, s)| if s == b'd' { c.is_ascii_digit() } else { c == s });
    if !shaped || jiff::civil::DateTime::strptime(STAMP, stamp).is_err() {
        return Err(refuse());
    }
    if !rest.is_empty() {
        let number = rest.strip_prefix('-').ok_or_else(refuse)?;
        let plain =
            number.len() <= 6 && number.bytes().all(|c| c.is_ascii_digit()) && !number.starts_with('0');
        if !plain || number == "1" || number.is_empty() {
            return Err(refuse());
        }
    }
    Ok(())
}

impl BackupName {
    /// The name for a backup taken at `time`, the `n`th of that second (1 has no suffix).
    pub fn at(time: Timestamp, n: u32) -> Self {
        let stamp = time.to_zoned(TimeZone::UTC).strftime(STAMP).to_string();
        if n <= 1 { Self(stamp) } else { Self(format!("{stamp}-{n}")) }
    }
}

/// `VM/BACKUP` as people write it; `BACKUP` may be `latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSpec {
    /// The VM.
    pub vm: VmName,
    /// The backup; `None` is `latest`.
    pub backup: Option<BackupName>,
}

impl FromStr for BackupSpec {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let (vm, backup) = text
            .split_once('/')
            .ok_or_else(|| NameError::new("backup", text, "write it as VM/BACKUP or VM/latest"))?;
        let backup = if backup == "latest" { None } else { Some(BackupName::new(backup)?) };
        Ok(Self { vm: VmName::new(vm)?, backup })
    }
}

impl fmt::Display for BackupSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.backup.as_ref().map_or("latest", BackupName::as_str))
    }
}

/// `VM/BACKUP/DISK` as people write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The backup.
    pub backup: BackupSpec,
    /// The disk.
    pub disk: DiskName,
}

impl FromStr for DiskSpec {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let refuse =
            || NameError::new("disk of a backup", text, "write it as VM/BACKUP/DISK or VM/latest/DISK");
        let (backup, disk) = text.rsplit_once('/').ok_or_else(refuse)?;
        if !backup.contains('/') {
            return Err(refuse());
        }
        Ok(Self { backup: backup.parse()?, disk: DiskName::new(disk)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_would_leave_their_folder_or_confuse_qemu_are_refused() {
        let long = "x".repeat(101);
        for bad in [
            "", ".", "..", "../x", ".hidden", "a/b", "/etc", "a:b", "nbd:host", "json:{}", "a,b", "a\nb",
            "a\0b", "a\u{7f}", "a\\b", "-rf", "a=b", " a", "a ", "a.", &long,
        ] {
            assert!(VmName::new(bad).is_err(), "{bad:?} was taken");
            assert!(DiskName::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn ordinary_names_are_taken() {
        for good in ["web1", "db-2.example.org", "Büro", "vm with space", "a+b@c", &"x".repeat(100)] {
            assert_eq!(VmName::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_backup_name_is_a_time_and_perhaps_a_number() {
        for good in ["2026-11-23T22-32-42Z", "2026-11-23T22-32-42Z-2", "2026-02-28T00-00-00Z-17"] {
            assert_eq!(BackupName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "latest",
            "2026-11-23",
            "2026-11-23T22-32-42",
            "2026-11-23T22-32-42Z-1",
            "2026-11-23T22-32-42Z-0",
            "2026-11-23T22-32-42Z-02",
            "2026-11-23T22-32-42Z-",
            "2026-13-23T22-32-42Z",
            "2026-02-30T22-32-42Z",
            "2026-11-23T22-32-42Z/..",
            "2026-11-23T22-32-42Zx",
            "2026-11-23 22-32-42Z",
            "+026-11-23T22-32-42Z",
        ] {
            assert!(BackupName::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_second_backup_of_a_second_gets_a_number() {
        let time: Timestamp = "2026-11-23T22:32:42.9Z".parse().unwrap();
        assert_eq!(BackupName::at(time, 1).as_str(), "2026-11-23T22-32-42Z");
        assert_eq!(BackupName::at(time, 2).as_str(), "2026-11-23T22-32-42Z-2");
    }

    #[test]
    fn a_spec_names_vm_backup_and_disk() {
        let spec: DiskSpec = "web1/latest/vda".parse().unwrap();
        assert_eq!((spec.backup.vm.as_str(), spec.backup.backup, spec.disk.as_str()), ("web1", None, "vda"));
        for bad in ["web1", "web1/", "web1/latest/../x", "/latest", "web1/other"] {
            assert!(bad.parse::<BackupSpec>().is_err(), "{bad:?} was taken");
        }
        assert!("web1/vda".parse::<DiskSpec>().is_err());
    }

    proptest! {
        #[test]
        fn no_name_that_is_taken_can_leave_its_folder(name in "\\PC{0,20}|[./\\\\:,a\n\0-]{0,6}") {
            if let Ok(name) = VmName::new(name) {
                let path = std::path::Path::new("base").join(&name);
                prop_assert_eq!(path.components().count(), 2);
                prop_assert!(!name.as_str().contains([':', ',', '\n', '/']));
                prop_assert!(serde_json::from_str::<VmName>(&serde_json::to_string(&name).unwrap()).unwrap() == name);
            }
        }

        #[test]
        fn every_time_makes_a_valid_backup_name(seconds in 0i64..253_402_207_200, n in 1u32..1000) {
            let name = BackupName::at(Timestamp::from_second(seconds).unwrap(), n);
            prop_assert!(BackupName::new(name.as_str()).is_ok());
        }
    }
}
