//! New images from the options that `-o` takes: read, checked in QEMU's order, described, made.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use knib_qcow::measure::Shape;
use knib_qcow::{
    Access, CompressionType, CreateOptions, FileStorage, Format, ImageMut, PlainPaths, Preallocation,
    Storage as _, create_with,
};

use super::{Failure, name, optlist, size};

/// How much is allocated ahead, by QEMU's name.
pub fn preallocation(text: &str) -> Result<Preallocation, Failure> {
    match text {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        _ => Err(Failure::new(format!("Parameter 'preallocation' does not accept value '{text}'"))),
    }
}

enum Kind {
    Text,
    Size,
    Number,
    Bool,
}

impl Kind {
    fn word(&self) -> &'static str {
        match self {
            Kind::Text => "str",
            Kind::Size => "size",
            Kind::Number => "num",
            Kind::Bool => "bool (on/off)",
        }
    }
}

/// Options of a new qcow2 image in the order in which QEMU shows them, with what is shown where nothing is given.
const QCOW2: &[(&str, Kind, Option<&str>, &str)] = &[
    ("cluster_size", Kind::Size, Some("65536"), "qcow2 cluster size"),
    ("extended_l2", Kind::Bool, Some("off"), "Extended L2 tables"),
    ("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ("compression_type", Kind::Text, Some("zlib"), "Compression method used for image cluster compression"),
    ("size", Kind::Size, None, "Virtual disk size"),
    ("compat", Kind::Text, None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("backing_file", Kind::Text, None, "File name of a base image"),
    ("backing_fmt", Kind::Text, None, "Image format of the base image"),
    ("data_file", Kind::Text, None, "File name of an external data file"),
    ("data_file_raw", Kind::Bool, None, "The external data file must stay valid as a raw image"),
    ("lazy_refcounts", Kind::Bool, Some("off"), "Postpone refcount updates"),
    ("refcount_bits", Kind::Number, Some("16"), "Width of a reference count entry in bits"),
    ("nocow", Kind::Bool, None, "Turn off copy-on-write (valid only on btrfs)"),
    ("extent_size_hint", Kind::Size, None, "Extent size hint for the image file, 0 to disable"),
];

/// The same of a raw image.
const RAW: &[(&str, Kind, Option<&str>, &str)] = &[
    ("size", Kind::Size, None, "Virtual disk size"),
    ("nocow", Kind::Bool, None, "Turn off copy-on-write (valid only on btrfs)"),
    ("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, falloc, full)"),
    ("extent_size_hint", Kind::Size, None, "Extent size hint for the image file, 0 to disable"),
];

/// What was asked of a new image, each option checked by itself.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its format.
    pub format: Format,
    given: Vec<(String, String)>,
}

impl Wanted {
    /// Takes the lists of `-o`.
    pub fn parse(format: Format, lists: &[&str]) -> Result<Self, Failure> {
        let mut wanted = Self { format, given: Vec::new() };
        for (key, value) in optlist::parse(lists)? {
            wanted.set(&key, &value)?;
        }
        Ok(wanted)
    }

    fn known(&self) -> &'static [(&'static str, Kind, Option<&'static str>, &'static str)] {
        match self.format {
            Format::Raw => RAW,
            Format::Qcow2 => QCOW2,
        }
    }

    /// Whether the lists ask for help instead.
    pub fn asks_for_help(lists: &[&str]) -> bool {
        optlist::parse(lists).is_ok_and(|o| o.iter().any(|(key, _)| key == "help"))
    }

    /// What options there are.
    pub fn help(format: Format, with_file: bool) -> String {
        let all = Self { format, given: Vec::new() };
        let mut lines: Vec<String> = all
            .known()
            .iter()
            .filter(|(key, ..)| with_file || !matches!(*key, "nocow" | "extent_size_hint"))
            .filter(|(key, ..)| with_file || format == Format::Qcow2 || *key == "size")
            .map(|(key, kind, _, help)| format!("  {:<22} - {help}\n", format!("{key}=<{}>", kind.word())))
            .collect();
        lines.sort();
        let (title, note) = if with_file {
            ("Supported options:\n".to_owned(), "")
        } else {
            (
                format!("Supported {} options:\n", format.name()),
                "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n",
            )
        };
        title + &lines.concat() + note
    }

    /// Sets an option, over what was given before.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Failure> {
        if key == "encryption" && self.format == Format::Qcow2 && !optlist::boolean(key, value)? {
            self.given.retain(|(known, _)| known != key);
            self.given.push((key.to_owned(), value.to_owned()));
            return Ok(());
        }
        let Some((_, kind, ..)) = self.known().iter().find(|(known, ..)| *known == key) else {
            let encryption = key == "encryption" || key.starts_with("encrypt.");
            return Err(Failure::new(if encryption && self.format == Format::Qcow2 {
                format!("Encryption ('{key}') is not supported: encrypt the device below, or the file system")
            } else {
                format!("Invalid parameter '{key}'")
            }));
        };
        match kind {
            Kind::Text => {}
            Kind::Bool => {
                optlist::boolean(key, value)?;
            }
            Kind::Size => {
                size::parse(value).map_err(|_| {
                    Failure::new(format!(
                        "Parameter '{key}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
                    ))
                })?;
            }
            Kind::Number => {
                value
                    .parse::<u64>()
                    .map_err(|_| Failure::new(format!("Parameter '{key}' expects a number")))?;
            }
        }
        self.given.retain(|(known, _)| known != key);
        self.given.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    /// The value of an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.given.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// The value of a size option, in bytes.
    pub fn bytes(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(|v| size::parse(v).ok())
    }

    /// Whether a flag is on.
    pub fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|v| optlist::boolean(key, v).unwrap_or(false))
    }

    /// The options that were given.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.given.iter().map(|(key, _)| key.as_str())
    }

    /// The line that says what is about to be made.
    pub fn describe(&self, file: &str) -> String {
        let mut text = format!("Formatting '{file}', fmt={}", self.format.name());
        if let Some(off) = self.get("encryption") {
            text += &format!(" encryption={off}");
        }
        for (key, kind, default, _) in self.known() {
            let value = match (self.get(key), default) {
                (Some(value), _) => value,
                (None, Some(default)) => default,
                (None, None) => continue,
            };
            let value = match kind {
                Kind::Size => size::parse(value).map_or_else(|_| value.to_owned(), |n| n.to_string()),
                _ => value.replace(',', ",,"),
            };
            text += &format!(" {key}={value}");
        }
        text + "\n"
    }

    fn cluster_size(&self) -> Result<u64, Failure> {
        let cluster = self.bytes("cluster_size").unwrap_or(1 << 16);
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return Err(Failure::new("Cluster size must be a power of two between 512 and 2048k"));
        }
        Ok(cluster)
    }

    fn refcount_bits(&self) -> Result<u64, Failure> {
        let bits: u64 = self.get("refcount_bits").and_then(|v| v.parse().ok()).unwrap_or(16);
        if !bits.is_power_of_two() || bits > 64 {
            return Err(Failure::new("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        Ok(bits)
    }

    fn check_subclusters(&self, cluster: u64) -> Result<(), Failure> {
        if self.is_on("extended_l2") && cluster < 16 << 10 {
            return Err(Failure::new(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        Ok(())
    }

    /// What a new qcow2 image's size depends on. As QEMU does, only the options that count for it are looked at:
    /// whether the others go together is for those to know who make the image.
    pub fn shape(&self) -> Result<Measured, Failure> {
        let cluster = self.cluster_size()?;
        self.check_subclusters(cluster)?;
        let version = match self.get("compat") {
            None | Some("1.1") => 3,
            Some("0.10") => 2,
            // `create` translates the other names.
            Some(other) => return Err(Failure::new(format!("Invalid compatibility level: '{other}'"))),
        };
        let preallocation = self.get("preallocation").map(preallocation).transpose()?.unwrap_or_default();
        let refcount_bits = self.refcount_bits()?;
        if version == 2 && refcount_bits != 16 {
            return Err(Failure::new(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
            ));
        }
        let shape = Shape {
            size: self.bytes("size").unwrap_or(0).next_multiple_of(512),
            cluster_bits: cluster.trailing_zeros(),
            refcount_order: refcount_bits.trailing_zeros(),
            extended_l2: self.is_on("extended_l2"),
        };
        Ok(Measured { shape, version, preallocation, has_backing: self.get("backing_file").is_some() })
    }

    /// What the engine is to make. The size must have been set.
    pub fn plan(&self) -> Result<Plan, Failure> {
        let size = self.bytes("size").unwrap_or(0);
        // Disks are whole sectors.
        let size = size.next_multiple_of(512);
        let preallocation = self.get("preallocation").map(preallocation).transpose()?.unwrap_or_default();
        if self.format == Format::Raw {
            if preallocation == Preallocation::Metadata {
                return Err(Failure::new("Unsupported preallocation mode: metadata"));
            }
            return Ok(Plan {
                format: Format::Raw,
                qcow2: CreateOptions { size, ..CreateOptions::default() },
                preallocation,
            });
        }
        let compression = match self.get("compression_type") {
            None | Some("zlib") => CompressionType::Deflate,
            Some("zstd") => CompressionType::Zstd,
            Some(other) => {
                return Err(Failure::new(format!(
                    "Parameter 'compression-type' does not accept value '{other}'"
                )));
            }
        };
        let version = match self.get("compat") {
            None | Some("v3" | "1.1") => 3,
            Some("v2" | "0.10") => 2,
            Some(other) => {
                return Err(Failure::new(format!("Parameter 'version' does not accept value '{other}'")));
            }
        };
        let (cluster, refcount_bits) = (self.cluster_size()?, self.refcount_bits()?);
        let v3_only = |what: &str| {
            Failure::new(format!(
                "{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)"
            ))
        };
        let (extended_l2, lazy) = (self.is_on("extended_l2"), self.is_on("lazy_refcounts"));
        let data_file = self.get("data_file").map(str::to_owned);
        let data_file_raw = self.is_on("data_file_raw");
        if version == 2 {
            if compression != CompressionType::Deflate {
                return Err(v3_only("Non-zlib compression type is"));
            }
            if extended_l2 {
                return Err(v3_only("Extended L2 entries are"));
            }
            if lazy {
                return Err(v3_only("Lazy refcounts are"));
            }
            if refcount_bits != 16 {
                return Err(v3_only("Refcount widths other than 16 bits are"));
            }
            if data_file.is_some() {
                return Err(v3_only("External data files are"));
            }
        }
        self.check_subclusters(cluster)?;
        if data_file_raw && data_file.is_none() {
            return Err(Failure::new("data-file-raw requires data-file"));
        }
        let backing = self.get("backing_file").map(str::to_owned);
        if backing.is_none() && self.get("backing_fmt").is_some() {
            return Err(Failure::new("Backing format cannot be used without backing file"));
        }
        if data_file_raw && backing.is_some() {
            return Err(Failure::new("Backing file and data-file-raw cannot be used at the same time"));
        }
        if preallocation != Preallocation::Off && backing.is_some() && !extended_l2 {
            return Err(Failure::new(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ));
        }
        let backing = match (backing, self.get("backing_fmt")) {
            (None, _) => None,
            (Some(file), Some(of)) => Some((file, super::open::format(of)?)),
            (Some(_), None) => {
                return Err(Failure::new("Use of backing file requires explicit backing format (-F)"));
            }
        };
        let qcow2 = CreateOptions {
            size,
            version,
            cluster_bits: cluster.trailing_zeros(),
            refcount_order: refcount_bits.trailing_zeros(),
            lazy_refcounts: lazy,
            extended_l2,
            compression,
            backing,
            data_file: data_file.map(|file| (file, data_file_raw)),
        };
        // A raw data file is to show the disk by itself: every cluster has its place there.
        let preallocation = match preallocation {
            Preallocation::Off if data_file_raw => Preallocation::Metadata,
            other => other,
        };
        Ok(Plan { format: Format::Qcow2, qcow2, preallocation })
    }
}

/// What the size of a new qcow2 image depends on.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Its disk and tables.
    pub shape: Shape,
    /// 2 or 3.
    pub version: u32,
    /// What is reserved.
    pub preallocation: Preallocation,
    /// Whether it stands on another image.
    pub has_backing: bool,
}

/// An image that can be made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its format; of a raw image only the size below counts.
    pub format: Format,
    /// What a qcow2 image is to be.
    pub qcow2: CreateOptions,
    /// What is reserved.
    pub preallocation: Preallocation,
}

impl Plan {
    /// Makes the image at `path`, over what is there, and returns it open for writing.
    pub fn make(&self, path: &Path) -> Result<Arc<FileStorage>, Failure> {
        self.open_data_file(path)?;
        let target = Target::open(path)?;
        match self.write(&target.file, path) {
            Ok(()) => Ok(target.file),
            Err(failure) => {
                target.give_up();
                Err(failure)
            }
        }
    }

    fn write(&self, file: &Arc<FileStorage>, path: &Path) -> Result<(), Failure> {
        let new = &self.qcow2;
        let wrong = |e: std::io::Error| Failure::new(format!("Could not create '{}': {e}", path.display()));
        if self.format == Format::Raw {
            if !file.is_block_device() {
                file.set_len(0).map_err(wrong)?;
            }
            file.set_len(new.size).map_err(wrong)?;
            return fill(file, 0, new.size, self.preallocation).map_err(wrong);
        }
        create_with(file.clone(), new)?;
        if self.preallocation != Preallocation::Off {
            // Nothing is read from a backing file here, so it need not be there.
            let mut image = ImageMut::open_over(file.clone(), &PlainPaths, None)?;
            image.preallocate(0..new.size, self.preallocation)?;
        }
        Ok(())
    }

    /// Makes the external data file, and gives it its size.
    fn open_data_file(&self, image: &Path) -> Result<(), Failure> {
        let Some((named, _)) = &self.qcow2.data_file else { return Ok(()) };
        let folder = image.parent().filter(|p| !p.as_os_str().is_empty());
        if !named.starts_with('/') && folder.is_some_and(|f| f != Path::new(".")) {
            return Err(Failure::new(format!(
                "The data file '{named}' is named relative to another folder than the image's: give its absolute path, since programs differ in where they look for it"
            )));
        }
        let data = target(&name::file(named.as_ref())?)?;
        let wrong = |e: std::io::Error| Failure::new(format!("Could not create '{named}': {e}"));
        if !data.is_block_device() {
            data.set_len(0).map_err(wrong)?;
        }
        data.set_len(self.qcow2.size).and_then(|()| data.sync()).map_err(wrong)
    }
}

/// Reserves a range of a file, or writes its zeros. Durable on return.
pub fn fill(file: &FileStorage, offset: u64, len: u64, how: Preallocation) -> std::io::Result<()> {
    match how {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => file.reserve(offset, len)?,
        Preallocation::Full => {
            let zeros = vec![0u8; 1 << 20];
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let n = (end - at).min(zeros.len() as u64);
                file.write_at(zeros.get(..n as usize).unwrap_or(&zeros), at)?;
                at += n;
            }
        }
    }
    file.sync()
}

/// Opens a file to be written anew, which may not be there yet; what it holds stays until it is written.
pub fn target(path: &Path) -> Result<Arc<FileStorage>, Failure> {
    Ok(Target::open(path)?.file)
}

/// A file that is to be written anew, under a writer's lock.
struct Target {
    file: Arc<FileStorage>,
    /// Whether it was made here, and was not there before.
    made: bool,
}

impl Target {
    fn open(path: &Path) -> Result<Self, Failure> {
        let wrong = |e| Failure::new(format!("Could not create '{}': {e}", path.display()));
        // Made or found in one step: what another program makes meanwhile is found.
        let error = match FileStorage::create_new(path) {
            Ok(file) => return Ok(Self { file, made: true }),
            Err(error) => error,
        };
        let found = matches!(&error, knib_qcow::Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists);
        if !found {
            return Err(wrong(error));
        }
        // A link to what is not there yet: that file is made, as by any program that opens it to write.
        let missing = std::fs::metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound);
        if let (true, Ok(to)) = (missing, std::fs::read_link(path)) {
            return Self::open(&path.parent().unwrap_or(Path::new("")).join(to));
        }
        let file = FileStorage::open(path, Access::ReadWrite).map_err(wrong)?;
        Ok(Self { file, made: false })
    }

    /// No file stays behind where there was none; that it cannot be removed changes nothing. One that another program
    /// put in its place is that program's.
    fn give_up(self) {
        let path = self.file.path();
        if self.made && super::open::identity(path) == self.file.identity() {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_that_was_made_here_is_removed_when_its_image_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        Target::open(&path).unwrap().give_up();
        assert!(!path.exists(), "it was made here");
        // Another program's, there before us.
        std::fs::write(&path, "other").unwrap();
        let target = Target::open(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"other", "nothing is written by opening it");
        target.give_up();
        assert!(path.exists());
        // Another program's, put in the place of ours.
        std::fs::remove_file(&path).unwrap();
        let target = Target::open(&path).unwrap();
        std::fs::write(dir.path().join("b"), "other").unwrap();
        std::fs::rename(dir.path().join("b"), &path).unwrap();
        target.give_up();
        assert_eq!(std::fs::read(&path).unwrap(), b"other");
        // The file that a link names, not the link.
        std::os::unix::fs::symlink("to", dir.path().join("link")).unwrap();
        Target::open(&dir.path().join("link")).unwrap().give_up();
        assert!(!dir.path().join("to").exists());
        assert!(dir.path().join("link").is_symlink());
    }

    #[test]
    fn a_file_in_the_making_is_locked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let first = Target::open(&path).unwrap();
        let refused = Target::open(&path).err().unwrap().text;
        assert!(refused.contains("in use"), "{refused}");
        first.give_up();
    }
}
