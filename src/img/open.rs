//! Opening images by name: format given or recognised, QEMU's locks taken, the chain followed by plain paths.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use knib_qcow::{
    Access, Chain, FileStorage, Format, Gate, Header, Implicit, LockedPaths, Locking, PlainPaths, Storage,
};

use super::{Failure, name};

/// The device and the inode of what a path leads to; none where there is nothing.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// What other formats begin with, at which offset, and their names.
const OTHERS: [(u64, &[u8], &str); 11] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow (version 1)"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VPC"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
];

/// Formats that QEMU knows and this does not.
const UNSUPPORTED: [&str; 16] = [
    "bochs",
    "cloop",
    "dmg",
    "file",
    "host_device",
    "luks",
    "nbd",
    "parallels",
    "qcow",
    "qed",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

/// The format that is neither raw nor qcow2 of an image that begins with `head` (at least 68 bytes, if it has them).
pub fn other_format(head: &[u8]) -> Option<&'static str> {
    let is = |offset: u64, magic| head.get(offset as usize..).is_some_and(|rest| rest.starts_with(magic));
    OTHERS.into_iter().find(|(offset, magic, _)| is(*offset, magic)).map(|(_, _, called)| called)
}

/// The format of this name.
pub fn format(of: &str) -> Result<Format, Failure> {
    Format::from_name(of).ok_or_else(|| {
        Failure::new(if UNSUPPORTED.contains(&of) {
            format!("The format '{of}' is not supported: only raw and qcow2 are")
        } else {
            format!("Unknown driver '{of}'")
        })
    })
}

/// An image that was opened by its name.
pub struct Opened {
    /// Its path as it was given.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The file.
    pub storage: Arc<FileStorage>,
    /// Whether its format was recognised as raw by finding nothing else.
    pub guessed_raw: bool,
}

/// How an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To read, while nobody writes.
    Read,
    /// To read, whoever else writes (`-U`).
    Shared,
    /// To change it, while nobody else uses it.
    Write,
}

impl Mode {
    /// To read; shared if `-U` was given.
    pub fn reading(shared: bool) -> Self {
        if shared { Mode::Shared } else { Mode::Read }
    }
}

/// Opens the image `named`; its format is recognised where it is not given.
pub fn open(named: &OsStr, of: Option<&str>, mode: Mode) -> Result<Opened, Failure> {
    let shown = named.to_string_lossy();
    let wrong = |why: String| Failure::new(format!("Could not open '{shown}': {why}"));
    let path = name::file(named)?;
    let given = of.map(format).transpose().map_err(|e| wrong(e.text))?;
    let (access, locking) = match mode {
        Mode::Read => (Access::Read, Locking::Reader),
        Mode::Shared => (Access::Read, Locking::Off),
        Mode::Write => (Access::ReadWrite, Locking::Writer),
    };
    let storage = FileStorage::open_with(&path, access, locking).map_err(|e| wrong(reason(&path, &e)))?;
    let (format, guessed_raw) = match given {
        Some(format) => (format, false),
        None => probe(&*storage).map_err(wrong)?,
    };
    Ok(Opened { path, format, storage, guessed_raw })
}

/// What is wrong, without the path where the message around it has it.
fn reason(path: &Path, error: &knib_qcow::Error) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text).to_owned()
}

/// Whether the file is qcow2; raw where it is nothing known. The error names another format.
fn probe(storage: &dyn Storage) -> Result<(Format, bool), String> {
    let mut head = [0u8; 512];
    let n = storage.read_at(&mut head, 0).map_err(|e| e.to_string())?;
    let head = head.get(..n).unwrap_or(&[]);
    if let Some(called) = other_format(head) {
        return Err(format!(
            "it is a {called} image, and only raw and qcow2 are supported (-f raw takes its bytes as they are)"
        ));
    }
    if head.starts_with(b"QFI\xfb") { Ok((Format::Qcow2, false)) } else { Ok((Format::Raw, true)) }
}

impl Opened {
    /// The checked header of a qcow2 image.
    pub fn header(&self) -> Result<Option<Header>, Failure> {
        match self.format {
            Format::Raw => Ok(None),
            Format::Qcow2 => Header::parse(&*self.storage).map(Some).map_err(|e| self.wrong(&e)),
        }
    }

    /// The image with all that it stands on.
    pub fn chain(&self, gate: &Following) -> Result<Chain, Failure> {
        Chain::from_storage(self.storage.clone(), self.format, gate).map_err(|e| self.wrong(&e))
    }

    /// That the image could not be opened.
    pub fn wrong(&self, error: &knib_qcow::Error) -> Failure {
        Failure::new(format!("Could not open '{}': {}", self.path.display(), reason(&self.path, error)))
    }

    /// Says on standard error what QEMU says where raw was guessed and the image is changed.
    pub fn warning(&self) -> Option<String> {
        self.guessed_raw.then(|| {
            format!(
                "WARNING: Image format was not specified for '{}' and probing guessed raw: give it with -f raw.",
                self.path.display()
            )
        })
    }
}

/// Follows plain paths with an explicit format, with a reader's locks unless told not to.
pub struct Following {
    share: bool,
}

impl Following {
    /// Locks what it opens, unless `share` is set.
    pub fn new(share: bool) -> Self {
        Self { share }
    }
}

impl Gate for Following {
    fn open(
        &self,
        from: &Path,
        kind: Implicit,
        named: &str,
        format: Option<&str>,
    ) -> knib_qcow::Result<(Arc<dyn Storage>, Format)> {
        let plain = named.strip_prefix("file:").unwrap_or(named);
        if self.share {
            PlainPaths.open(from, kind, plain, format)
        } else {
            LockedPaths.open(from, kind, plain, format)
        }
    }
}
