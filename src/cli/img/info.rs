//! `img info`: what an image is.

use std::collections::HashSet;
use std::path::Path;

use knib_qcow::bitmap::{self, Bitmap};
use knib_qcow::header::incompatible;
use knib_qcow::snapshot::{self, Snapshot};
use knib_qcow::{CompressionType, Format, Header, Storage as _};

use super::json::Json;
use super::options::{Given, flag, value};
use super::{Command, Done, Output, say};
use crate::img::open::{Mode, Opened, open};
use crate::img::{Failure, name, size};

/// Compatible feature bit of lazy refcounts.
const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit: the external data file is raw by itself.
const DATA_FILE_RAW: u64 = 2;

pub const COMMAND: Command = Command {
    name: "info",
    about: "Show what an image is",
    usage: "[OPTIONS] FILENAME",
    options: &[
        value('f', "format", "FMT", "format of the image: raw or qcow2"),
        flag('b', "backing-chain", "show its backing files too"),
        flag('U', "force-share", "read though another process may write"),
        Output::OPTION,
    ],
    run,
};

fn run(given: &Given) -> Done {
    let name = given.one_name()?;
    let output = Output::of(given)?;
    let mode = Mode::reading(given.has("force-share"));
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((name.to_owned(), given.text("format")?.map(str::to_owned)));
    while let Some((name, format)) = next.take() {
        let opened = open(&name, format.as_deref(), mode)?;
        if opened.storage.identity().is_some_and(|id| !seen.insert(id)) {
            return Err(Failure::new(format!(
                "Backing file '{}' creates an infinite loop.",
                name.to_string_lossy()
            )));
        }
        let info = Info::of(&opened)?;
        if given.has("backing-chain")
            && let Some(backing) = info.header.as_ref().and_then(|h| h.backing.clone())
        {
            let format = info.header.as_ref().and_then(|h| h.backing_format.clone()).ok_or_else(|| {
                Failure::new(format!(
                    "'{}' names the backing file '{backing}' without its format, which is never guessed: set it with rebase -u -F FORMAT -b {backing}",
                    opened.path.display()
                ))
            })?;
            next = Some((name::combine(&opened.path, &backing).into(), Some(format)));
        }
        infos.push(info);
    }
    let text = match output {
        Output::Human => infos.iter().map(Info::human).collect::<Vec<_>>().join("\n"),
        Output::Json if given.has("backing-chain") => {
            Json::List(infos.iter().map(Info::json).collect()).pretty() + "\n"
        }
        Output::Json => infos.iter().map(|i| i.json().pretty() + "\n").collect(),
    };
    say(&text)?;
    Ok(0)
}

struct Info {
    path: String,
    protocol: &'static str,
    file_len: u64,
    disk_size: u64,
    header: Option<Header>,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

impl Info {
    fn of(opened: &Opened) -> Result<Self, Failure> {
        let header = opened.header()?;
        let (snapshots, bitmaps) = match &header {
            Some(_) => (
                snapshot::list(&*opened.storage).map_err(|e| opened.wrong(&e))?,
                bitmap::list(&*opened.storage).map_err(|e| opened.wrong(&e))?,
            ),
            None => (Vec::new(), Vec::new()),
        };
        let device = opened.storage.is_block_device();
        Ok(Self {
            path: opened.path.to_string_lossy().into_owned(),
            protocol: if device { "host_device" } else { "file" },
            // QEMU counts in whole sectors.
            file_len: opened.storage.len()?.next_multiple_of(512),
            disk_size: opened.storage.allocated()?,
            header,
            snapshots,
            bitmaps,
        })
    }

    fn size(&self) -> u64 {
        self.header.as_ref().map_or(self.file_len, |h| h.size)
    }

    fn format(&self) -> &'static str {
        if self.header.is_some() { Format::Qcow2.name() } else { Format::Raw.name() }
    }

    fn is_dirty(&self) -> bool {
        self.header.as_ref().is_some_and(|h| h.incompatible & incompatible::DIRTY != 0)
    }

    fn human(&self) -> String {
        let bytes = |n: u64| format!("{} ({n} bytes)", size::human(n));
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {}\ndisk size: {}\n",
            self.path,
            self.format(),
            bytes(self.size()),
            size::human(self.disk_size)
        );
        if let Some(h) = &self.header {
            text += &format!("cluster_size: {}\n", h.cluster_size());
            if self.is_dirty() {
                text += "cleanly shut down: no\n";
            }
            if let Some(backing) = &h.backing {
                let full = name::combine(Path::new(&self.path), backing);
                text += &format!("backing file: {backing}");
                text += &if full == *backing { "\n".to_owned() } else { format!(" (actual path: {full})\n") };
            }
            if let Some(format) = h.backing_format.as_ref().filter(|_| h.backing.is_some()) {
                text += &format!("backing file format: {format}\n");
            }
            if !self.snapshots.is_empty() {
                text += "Snapshot list:\n";
                text += &snapshot_table(&self.snapshots);
            }
            text += "Format specific information:\n";
            text += &human_members(&specifics(h, &self.bitmaps), 4);
        }
        text += &format!(
            "Child node '/file':\n    filename: {}\n    protocol type: {}\n    file length: {}\n    disk size: {}\n",
            self.path,
            self.protocol,
            bytes(self.file_len),
            size::human(self.disk_size)
        );
        text
    }

    fn json(&self) -> Json {
        let none = || Json::Object(Vec::new());
        let file = Json::Object(vec![
            ("children", Json::List(Vec::new())),
            ("virtual-size", self.file_len.into()),
            ("filename", self.path.as_str().into()),
            ("format", self.protocol.into()),
            ("actual-size", self.disk_size.into()),
            ("format-specific", Json::Object(vec![("type", "file".into()), ("data", none())])),
            ("dirty-flag", false.into()),
        ]);
        let child = Json::Object(vec![("name", "file".into()), ("info", file)]);
        let mut members = vec![
            ("children", Json::List(vec![child])),
            ("virtual-size", self.size().into()),
            ("filename", self.path.as_str().into()),
            ("format", self.format().into()),
            ("actual-size", self.disk_size.into()),
            ("dirty-flag", self.is_dirty().into()),
        ];
        if let Some(h) = &self.header {
            members.push(("cluster-size", h.cluster_size().into()));
            members.push((
                "format-specific",
                Json::Object(vec![
                    ("type", "qcow2".into()),
                    ("data", Json::Object(specifics(h, &self.bitmaps))),
                ]),
            ));
            if !self.snapshots.is_empty() {
                members.push(("snapshots", Json::List(self.snapshots.iter().map(snapshot_json).collect())));
            }
            if let Some(backing) = &h.backing {
                let full = name::combine(Path::new(&self.path), backing);
                members.push(("backing-filename", backing.as_str().into()));
                members.push(("full-backing-filename", full.into()));
                if let Some(format) = &h.backing_format {
                    members.push(("backing-filename-format", format.as_str().into()));
                }
            }
        }
        Json::Object(members)
    }
}

/// What only qcow2 has, in the order in which people see it.
fn specifics(h: &Header, bitmaps: &[Bitmap]) -> Vec<(&'static str, Json)> {
    let compression = match h.compression {
        CompressionType::Deflate => "zlib",
        CompressionType::Zstd => "zstd",
    };
    let mut members = vec![("compat", if h.version >= 3 { "1.1".into() } else { "0.10".into() })];
    members.push(("compression-type", compression.into()));
    if h.version >= 3 {
        members.push(("lazy-refcounts", (h.compatible & LAZY_REFCOUNTS != 0).into()));
    }
    if !bitmaps.is_empty() {
        members.push(("bitmaps", Json::List(bitmaps.iter().map(bitmap_json).collect())));
    }
    members.push(("refcount-bits", (1u64 << h.refcount_order).into()));
    if h.version >= 3 {
        if let Some(file) = &h.data_file {
            members.push(("data-file", file.as_str().into()));
            members.push(("data-file-raw", (h.autoclear & DATA_FILE_RAW != 0).into()));
        }
        members.push(("corrupt", (h.incompatible & incompatible::CORRUPT != 0).into()));
        members.push(("extended-l2", h.extended_l2().into()));
    }
    members
}

fn bitmap_json(b: &Bitmap) -> Json {
    let flags = [(b.in_use, "in-use"), (b.auto, "auto")];
    let flags = flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name.into()).collect();
    Json::Object(vec![
        ("flags", Json::List(flags)),
        ("name", b.name.as_str().into()),
        ("granularity", b.granularity.into()),
    ])
}

fn snapshot_json(s: &Snapshot) -> Json {
    let mut members = vec![
        ("id", s.id.as_str().into()),
        ("name", s.name.as_str().into()),
        ("vm-state-size", s.vm_state_size.into()),
        ("date-sec", s.date.0.into()),
        ("date-nsec", s.date.1.into()),
        ("vm-clock-sec", (s.vm_clock / 1_000_000_000).into()),
        ("vm-clock-nsec", (s.vm_clock % 1_000_000_000).into()),
    ];
    members.extend(s.icount.map(|n| ("icount", n.into())));
    Json::Object(members)
}

/// The table of snapshots that `info` and `snapshot -l` print, without its title.
pub fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    let mut text = row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for s in snapshots {
        let date = jiff::Timestamp::from_second(s.date.0.into())
            .map(|t| t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string())
            .unwrap_or_default();
        let (seconds, milliseconds) = (s.vm_clock / 1_000_000_000, s.vm_clock / 1_000_000 % 1000);
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        let clock = format!("{hours:04}:{minutes:02}:{:02}.{milliseconds:03}", seconds % 60);
        let icount = s.icount.map_or_else(|| "--".to_owned(), |n| n.to_string());
        text += &row([&s.id, &s.name, &size::human(s.vm_state_size), &date, &clock, &icount]);
    }
    text
}

/// Members one a line, dashes as spaces, lists and objects indented.
fn human_members(members: &[(&'static str, Json)], indent: usize) -> String {
    members.iter().map(|(key, value)| human_member(&key.replace('-', " "), value, indent)).collect()
}

fn human_member(key: &str, value: &Json, indent: usize) -> String {
    let left = format!("{}{key}:", " ".repeat(indent));
    match value {
        Json::Bool(value) => format!("{left} {value}\n"),
        Json::Number(value) => format!("{left} {value}\n"),
        Json::Text(value) => format!("{left} {value}\n"),
        Json::Object(members) => format!("{left}\n{}", human_members(members, indent + 4)),
        Json::List(items) => {
            let items = items.iter().enumerate();
            let items = items.map(|(at, item)| human_member(&format!("[{at}]"), item, indent + 4));
            format!("{left}\n{}", items.collect::<String>())
        }
    }
}
